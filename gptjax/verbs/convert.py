"""`gptjax convert`: models of other formats to a run's folder, and a run's model to Hugging Face's format."""

from __future__ import annotations

import argparse
import pathlib
import re
from typing import Any

from gptjax.config import UserError
from gptjax.verbs.arguments import add_verb, count, required
from gptjax.verbs.output import fault, log, print_json


def add(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "convert",
        run,
        "Make a run's folder of a Hugging Face folder, a GGUF file or a llama2.c file, or a Hugging Face folder of a run.",
        """examples:
  gptjax convert --from=Qwen2-0.5B --output=runs/qwen2
  gptjax convert --workdir=runs/shakespeare --to=huggingface --output=shakespeare-hf --verify
  gptjax convert --from=gpt2 --adapter=gpt2-lora --output=runs/tuned
  gptjax convert --workdir=runs/lora --to=peft --output=lora-peft
  gptjax convert --from=gpt2 --adapter=gpt2-spam --output=runs/spam --config.task.kind=classification \\
      --config.task.path=spam.jsonl --config.task.labels=ham,spam""",
    )
    parser.add_argument("--from", dest="source", metavar="PATH", help="a Hugging Face folder, a .gguf file or a llama2.c file")
    parser.add_argument(
        "--format", choices=("huggingface", "gguf", "llama2c"), help="of --from; by default it is told by what is there"
    )
    parser.add_argument(
        "--tokenizer",
        default="",
        metavar="PATH",
        help="with --from: a tokenizer file or folder in place of its own; none: without",
    )
    parser.add_argument("--adapter", default="", metavar="DIR", help="with --from: a PEFT folder, an adapter of that model")
    parser.add_argument("--workdir", metavar="DIR", help="a run's folder")
    parser.add_argument(
        "--to",
        choices=("huggingface", "peft"),
        help="what becomes of --workdir: its model, into which adapters are merged, or its adapter alone",
    )
    parser.add_argument(
        "--task",
        default="",
        metavar="NAME",
        help="with --workdir, of a run with several: the task whose head is written; none: the decoder without a head",
    )
    parser.add_argument("--step", type=count, metavar="N", help="a checkpoint's step; by default the newest intact one")
    parser.add_argument(
        "--max_shard_size", type=_size, default=_size("5GB"), metavar="SIZE", help="of a file of weights, as in 500MB (5GB)"
    )
    parser.add_argument("--output", metavar="DIR", help="a folder that is not there yet, or is empty")
    parser.add_argument(
        "--dtype", choices=("float32", "bfloat16", "float16"), default="", help="of the weights; by default as they are stored"
    )
    parser.add_argument(
        "--verify", action="store_true", help="compare logits with transformers and write verify.json (extra: parity)"
    )


def run(arguments: argparse.Namespace) -> int:
    output = pathlib.Path(required(arguments, "output"))
    if bool(arguments.source) == bool(arguments.workdir):
        raise UserError("gptjax convert needs either --from, a model of another format, or --workdir with --to, a run's folder.")
    _check_belonging(arguments)
    from gptjax.train import convert
    from gptjax.train.checkpoints import CheckpointError

    try:
        if arguments.source:
            summary = convert.import_model(
                pathlib.Path(arguments.source),
                output,
                log,
                format=arguments.format or "",
                dtype=arguments.dtype,
                tokenizer_path=arguments.tokenizer,
                overrides=arguments.overrides,
                verified=arguments.verify,
                adapter=arguments.adapter,
            )
        elif arguments.to == "peft":
            summary = convert.export_adapter(
                pathlib.Path(arguments.workdir), output, log, step=arguments.step, task=arguments.task
            )
        else:
            summary = convert.export_model(
                pathlib.Path(arguments.workdir),
                output,
                log,
                step=arguments.step,
                dtype=arguments.dtype,
                shard_bytes=arguments.max_shard_size,
                verified=arguments.verify,
                task=arguments.task,
            )
    except OSError as error:
        return fault(
            f"{error.filename or output} cannot be written or read: {error.strerror}; nothing is left of --output={output}.", 1
        )
    except (CheckpointError, convert.VerificationFailed) as error:
        return fault(str(error), 1)
    if arguments.json:
        print_json(summary)
    else:
        print(_sentence(summary))
    return 0


def _check_belonging(arguments: argparse.Namespace) -> None:
    """Raises `UserError` for an argument of the other direction."""
    if arguments.source:
        given = {"to": arguments.to, "step": arguments.step, "task": arguments.task}
        if arguments.dtype == "float16":
            raise UserError("--dtype=float16 is for --to=huggingface; a run's parameters are float32 or bfloat16.")
    else:
        given = {"format": arguments.format, "tokenizer": arguments.tokenizer, "config.*": arguments.overrides}
        given |= {"adapter": arguments.adapter}
        required(arguments, "to")
        if arguments.to == "peft" and (arguments.verify or arguments.dtype):
            raise UserError("--verify and --dtype are for --to=huggingface; an adapter is written as it was trained.")
    wrong = [f"--{name}" for name, value in given.items() if value not in (None, "", [])]
    if wrong:
        other = "--workdir" if arguments.source else "--from"
        raise UserError(f"{wrong[0]} belongs to gptjax convert with {other}; leave it out.")


def _sentence(summary: dict[str, Any]) -> str:
    if "step" in summary:
        text = f"{summary['output']}: step {summary['step']} as {summary['architecture']}, {summary['bytes'] / 1e6:,.1f} MB"
    else:
        text = f"{summary['output']}: {summary['architecture']}, {summary['parameters']:,} parameters in {summary['dtype']}"
        text += f", tokenizer {summary['tokenizer']}" if summary["tokenizer"] else ", no tokenizer"
        text += f", with the head of task.kind={summary['task']}" if summary["task"] else ""
    if summary["verify"]:
        text += f"; transformers' logits differ by at most {summary['verify']['largest_error']:.2g}"
    return text + "."


def _size(text: str) -> int:
    """Bytes: 500MB, 5GB, 1000."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(|KB|MB|GB|TB)", text.upper())
    if not found or not float(found[1]):
        raise argparse.ArgumentTypeError(f"{text!r} must be a size such as 500MB")
    return int(float(found[1]) * {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12}[found[2]])
