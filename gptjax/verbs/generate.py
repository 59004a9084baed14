"""`gptjax generate`: write text with a trained model."""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

from gptjax.config import UserError
from gptjax.generate.settings import GenerationConfig
from gptjax.parallel import hosts
from gptjax.verbs.arguments import add_run, add_verb, count, positive, rate, run_config, share
from gptjax.verbs.output import log, print_json


def add(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "generate",
        run,
        "Write text with a trained model.",
        """example:
  gptjax generate --workdir=runs/shakespeare --prompt="ROMEO:" --max_new_tokens=200 --temperature=0.8 --num_return_sequences=3""",
        uses_devices=True,
    )
    add_run(parser)
    parser.add_argument("--prompt", help="text to go on from")
    parser.add_argument("--prompt_file", metavar="FILE", help="a file that holds the prompt")
    parser.add_argument("--max_new_tokens", type=positive, default=100, metavar="N", help="tokens to write at most (100)")
    parser.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    parser.add_argument("--temperature", type=rate, default=1.0, metavar="X", help="divides the logits; 0 is greedy (1.0)")
    parser.add_argument("--top_k", type=count, default=0, metavar="K", help="draw from the K likeliest; 0: off")
    parser.add_argument(
        "--top_p", type=share, default=1.0, metavar="P", help="draw from the likeliest that hold probability P; 1: off"
    )
    parser.add_argument("--seed", type=count, default=0, metavar="N", help="samples are a function of it")
    parser.add_argument("--num_return_sequences", type=positive, default=1, metavar="N", help="samples a prompt")


def run(arguments: argparse.Namespace) -> int:
    prompts = _prompts(arguments)
    settings = GenerationConfig(
        max_new_tokens=arguments.max_new_tokens,
        do_sample=not arguments.greedy,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        num_return_sequences=arguments.num_return_sequences,
    )
    workdir, config = run_config(arguments)
    from gptjax.generate.text import generate_text
    from gptjax.train.restore import load_run

    model = load_run(workdir, log, arguments.step, config)
    samples = generate_text(
        model.params,
        config,
        model.tokenizer,
        prompts,
        settings,
        seed=arguments.seed,
    )
    if arguments.json:
        print_json({"step": model.step, "samples": [_sample_as_dict(sample) for sample in samples]})
        return 0
    for index, sample in enumerate(samples if hosts.is_primary() else ()):
        if index:
            print("---")
        print(sample.prompt + sample.text)
    return 0


def _prompts(arguments: argparse.Namespace) -> list[str]:
    if arguments.prompt_file:
        if arguments.prompt is not None:
            raise UserError("--prompt and --prompt_file are both given; keep one.")
        path = pathlib.Path(arguments.prompt_file)
        try:
            return [path.read_text(encoding="utf-8")]
        except FileNotFoundError:
            raise UserError(f"--prompt_file={path} does not exist.") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompt_file={path} cannot be read: {error}.") from None
    return [arguments.prompt or ""]


def _sample_as_dict(sample: Any) -> dict[str, Any]:
    return {
        "prompt": sample.prompt,
        "sample": sample.sample,
        "text": sample.text,
        "tokens": [int(token) for token in sample.tokens],
        "finish_reason": sample.finish_reason,
    }
