"""`gptjax generate`: write text with a trained model."""

from __future__ import annotations

import argparse
import pathlib
import sys
from typing import Any

from gptjax.config import UserError
from gptjax.generate import settings as settings_lib
from gptjax.generate.settings import GenerationConfig
from gptjax.verbs.arguments import add_run, add_verb, count, positive, required, run_config
from gptjax.verbs.output import log, print_json, write_text
from gptjax.verbs.prompts import decoded, many_prompts, one_prompt


def add(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "generate",
        run,
        "Write text with a trained model.",
        """examples:
  gptjax generate --workdir=runs/shakespeare --prompt="ROMEO:" --max_new_tokens=200 --temperature=0.8 --num_return_sequences=3
  gptjax generate --workdir=runs/shakespeare --prompts=prompts.jsonl --output=answers.jsonl --batch_size=16
  gptjax generate --workdir=Qwen2-0.5B-Instruct --chat""",
        uses_devices=True,
    )
    add_run(parser)
    parser.add_argument("--prompt", help="text to go on from; -: standard input")
    parser.add_argument("--prompt_file", metavar="FILE", help="a file that holds the prompt")
    parser.add_argument("--prompts", metavar="FILE", help="a file of prompts, one a line or JSONL; -: standard input")
    parser.add_argument("--output", metavar="FILE", help="with --prompts: where the JSONL goes; by default standard output")
    parser.add_argument("--batch_size", type=positive, default=8, metavar="N", help="with --prompts: samples at once (8)")
    parser.add_argument("--stream", action="store_true", help="show text as it is drawn, also where that is not a terminal")
    parser.add_argument("--chat", action="store_true", help="a conversation, a line in and an answer out; /reset, /system, /exit")
    parser.add_argument("--system", metavar="TEXT", help="with --chat: what the model is told beforehand")
    parser.add_argument("--chat_template", metavar="FILE", help="a Jinja file in place of the tokenizer's own template")
    parser.add_argument("--seed", type=count, default=0, metavar="N", help="samples are a function of it")
    settings_lib.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    _check_belonging(arguments)
    settings = settings_lib.from_arguments(arguments)
    lines = None if arguments.prompts is None else many_prompts(arguments.prompts)
    prompt = one_prompt(arguments) if lines is None and not arguments.chat else ""
    template = _template(arguments.chat_template)
    model = _load(arguments)
    if settings.eos_token_id is None and model.eos_ids is not None:
        settings = settings.replace(eos_token_id=model.eos_ids)
    if arguments.chat:
        from gptjax.verbs.chat import converse

        return converse(model, settings, arguments.seed, template, arguments.system)
    if lines is not None:
        from gptjax.verbs.batches import answer_lines

        return answer_lines(model, lines, settings, arguments, template)
    return _answer(model, prompt, settings, arguments)


def _check_belonging(arguments: argparse.Namespace) -> None:
    """Raises `UserError` for options that contradict each other."""
    given = [f"--{name}" for name in ("prompt", "prompt_file", "prompts") if getattr(arguments, name) is not None]
    if len(given) > 1:
        raise UserError(f"{' and '.join(given)} are both given; keep one.")
    if arguments.chat and (given or arguments.json):
        raise UserError(f"--chat reads from standard input and prints text; leave out {given[0] if given else '--json'}.")
    if arguments.system is not None and not arguments.chat:
        raise UserError("--system belongs to --chat.")
    if arguments.prompts is not None:
        if arguments.json and not arguments.output:
            raise UserError("--json prints one object, and --prompts one a sample; name a file for these with --output=FILE.")
    elif arguments.output is not None:
        raise UserError("--output belongs to --prompts=FILE.")


def _template(name: str | None) -> str | None:
    if name is None:
        return None
    path = pathlib.Path(name)
    try:
        return decoded(path.read_bytes(), f"--chat_template={path}")
    except OSError as error:
        raise UserError(f"--chat_template={path} cannot be read: {error.strerror}.") from None


def _load(arguments: argparse.Namespace) -> Any:
    """The model of a run's folder, with the overrides laid over its config, or of a Hugging Face folder."""
    from gptjax.train import loading
    from gptjax.train.restore import load_run

    workdir = pathlib.Path(required(arguments, "workdir"))
    if not loading.is_huggingface(workdir):
        workdir, config = run_config(arguments)
        return load_run(workdir, log, arguments.step, config)
    if arguments.overrides or arguments.config:
        raise UserError(f"{workdir} is a Hugging Face folder, and only a run's config can be overridden; convert it first.")
    return loading.load(workdir, step=arguments.step, log=log)


def _answer(model: Any, prompt: str, settings: GenerationConfig, arguments: argparse.Namespace) -> int:
    """The samples of one prompt."""
    from gptjax.generate.text import generate_text
    from gptjax.generate.timing import Speed

    is_one = settings.num_return_sequences == 1 and not arguments.json
    if arguments.stream and not is_one:
        raise UserError("--stream shows one text as it is drawn; leave out --json, and ask for one sample.")
    streams = is_one and (arguments.stream or sys.stdout.isatty())
    speed = Speed()
    started = False

    def show(number: int, text: str) -> None:
        nonlocal started
        if not started:
            write_text(prompt)
        started = True
        write_text(text)

    try:
        samples = generate_text(
            model.params, model.config, model.tokenizer, [prompt], settings,
            seed=arguments.seed, on_text=show if streams else None, speed=speed,
        )  # fmt: skip
    except KeyboardInterrupt:
        if started:
            write_text("\n")
        raise
    if arguments.json:
        print_json({"step": model.step, "samples": [sample_as_dict(sample) for sample in samples], "speed": speed.as_dict()})
        return 0
    for index, sample in enumerate(samples):
        shown = "" if started else sample.prompt + sample.text
        write_text(("---\n" if index else "") + shown + "\n")
    log(f"{speed}.")
    return 0


def sample_as_dict(sample: Any) -> dict[str, Any]:
    """A completion for JSON."""
    return {
        "prompt": sample.prompt,
        "sample": sample.sample,
        "text": sample.text,
        "tokens": list(sample.tokens),
        "log_probs": list(sample.log_probs),
        "finish_reason": sample.finish_reason,
    }
