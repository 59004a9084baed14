"""`gptjax train`: train a model, or go on where it stopped."""

from __future__ import annotations

import argparse
import pathlib
import signal
import sys
from typing import Any

from gptjax import recipes
from gptjax.verbs.arguments import add_verb, required
from gptjax.verbs.output import fault, print_json


def add(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "train",
        run,
        "Train a model; the same command goes on where it stopped.",
        """example:
  gptjax train --config=configs/shakespeare_char.py:cpu --workdir=runs/shakespeare --config.train.seed=1

The run's folder gets config.json, metrics.jsonl, checkpoints/, samples/, tokenizer/ and, at the end, result.json and
loss_curve.png. SIGTERM and Ctrl-C save first; exit status 75 and 130. A changed config is refused, unless its keys are named by
--allow_changes.

Several processes, on one host or many, are one run where each has GPTJAX_COORDINATOR=HOST:PORT, GPTJAX_NUM_PROCESSES and
GPTJAX_PROCESS_ID in its environment, or GPTJAX_DISTRIBUTED=auto.""",
        uses_devices=True,
    )
    parser.add_argument("--config", metavar="FILE.py[:ARG]", help="recipe, or a config.json")
    parser.add_argument("--workdir", metavar="DIR", help="the run's folder")
    parser.add_argument(
        "--allow_changes", metavar="KEY,KEY", default="", help="config keys that may differ from those the run began with"
    )


def run(arguments: argparse.Namespace) -> int:
    config = recipes.load_recipe(required(arguments, "config"), arguments.overrides)
    workdir = pathlib.Path(required(arguments, "workdir"))
    allowed = [key for key in arguments.allow_changes.split(",") if key]
    from gptjax.train.checkpoints import CheckpointError
    from gptjax.train.loop import Interrupted, NonFiniteError, train

    try:
        result = train(config, workdir, allowed)
    except Interrupted as stopped:
        print(f"gptjax: {stopped}", file=sys.stderr)
        return 75 if stopped.signal_number == signal.SIGTERM else 130
    except (CheckpointError, NonFiniteError) as error:
        return fault(str(error), 1)
    if arguments.json:
        print_json(result)
    return 0
