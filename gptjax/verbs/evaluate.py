"""`gptjax evaluate`: the loss over a whole split."""

from __future__ import annotations

import argparse
from typing import Any

from gptjax.config import UserError
from gptjax.parallel import hosts
from gptjax.verbs.arguments import add_run, add_verb, run_config
from gptjax.verbs.output import log, print_json


def add(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "evaluate",
        run,
        "Loss, perplexity and bits per byte over the whole evaluation split.",
        """example:
  gptjax evaluate --workdir=runs/shakespeare --config.evaluate.batch_size=64 --json""",
        uses_devices=True,
    )
    add_run(parser)


def run(arguments: argparse.Namespace) -> int:
    workdir, config = run_config(arguments)
    from gptjax.parallel.mesh import make_mesh
    from gptjax.train.evaluate import evaluate
    from gptjax.train.loop import load_data
    from gptjax.train.restore import load_run

    model = load_run(workdir, log, arguments.step, config)
    dataset = load_data(config, log)
    if dataset.tokenizer.encoding_fingerprint != model.tokenizer.encoding_fingerprint:
        raise UserError(
            f"the tokenizer that data.tokenizer={config.data.tokenizer} gives is not the one that {workdir} was trained with."
        )
    figures = evaluate(config, model.params, dataset, make_mesh(config.mesh)) | {"step": model.step}
    if arguments.json:
        print_json(figures)
    elif hosts.is_primary():
        print(
            f"step {figures['step']}: loss {figures['loss']:.4f} nats a token, perplexity {figures['perplexity']:.3f}, "
            f"{figures['bits_per_byte']:.4f} bits per byte over {figures['tokens']} tokens ({figures['bytes']} bytes)"
        )
    return 0
