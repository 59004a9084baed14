"""`gptjax generate`: write text with a trained model."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import sys
from typing import Any

import numpy as np

from gptjax import recipes
from gptjax.config import UserError, tasks_refusal
from gptjax.config.objective import parts as objective_parts
from gptjax.config.objective import writing_refusal
from gptjax.data.tokenizer_base import refuse_half_characters
from gptjax.generate import settings as settings_lib
from gptjax.generate.chat import PLAIN
from gptjax.generate.infill import ORDERS, find_sentinels, infill_prompt
from gptjax.generate.settings import GenerationConfig
from gptjax.verbs.arguments import add_run, add_verb, count, positive, required, run_config
from gptjax.verbs.output import log, print_json, write_text
from gptjax.verbs.prompts import decoded, in_template, many_prompts, one_prompt, template_of_run


def add(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "generate",
        run,
        "Write text with a trained model.",
        """examples:
  gptjax generate --workdir=runs/shakespeare --prompt="ROMEO:" --max_new_tokens=200 --temperature=0.8 --num_return_sequences=3
  gptjax generate --workdir=runs/shakespeare --prompts=prompts.jsonl --output=answers.jsonl --batch_size=16
  gptjax generate --workdir=Qwen2-0.5B-Instruct --chat
  gptjax generate --workdir=runs/e2e --task --prompt='{"mr": "name[Alimentum], area[riverside]"}'""",
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
    parser.add_argument(
        "--chat_template", metavar="FILE", help="a Jinja file, or plain, in place of the run's or the tokenizer's"
    )
    parser.add_argument(
        "--task",
        nargs="?",
        const="",
        metavar="NAME",
        help="put prompts into the prompt template of the run's task: JSON objects of its fields, or the text of its only one",
    )
    parser.add_argument("--seed", type=count, default=0, metavar="N", help="samples are a function of it")
    parser.add_argument("--weights", choices=("float32", "bfloat16", "int8"), help="how weights are stored (model.dtype)")
    parser.add_argument("--regex", metavar="EXPRESSION", help="every text matches the whole of it")
    parser.add_argument("--json_schema", metavar="FILE", help="every text is JSON that is valid under it")
    parser.add_argument("--draft", metavar="DIR", help="a smaller model of the same vocabulary, for speculative decoding")
    parser.add_argument("--infill_suffix", metavar="TEXT", help="write what stands between --prompt and this text")
    parser.add_argument(
        "--infill_order", choices=ORDERS, default="psm", help="which side comes first, as the model learnt it (psm)"
    )
    settings_lib.add_arguments(parser)


def run(arguments: argparse.Namespace) -> int:
    _check_belonging(arguments)
    settings = settings_lib.from_arguments(arguments)
    lines = None if arguments.prompts is None else many_prompts(arguments.prompts)
    prompt = one_prompt(arguments) if lines is None and not arguments.chat else ""
    template = _template(arguments.chat_template)
    model = _load(arguments)
    if template is None:
        template = template_of_run(model.config)
    if arguments.task is not None:
        prompt = in_template(model.config, arguments.task, prompt) if lines is None else ""
        lines = lines and [line.within(model.config, arguments.task) for line in lines]
    if settings.eos_token_id is None and model.eos_ids is not None:
        settings = settings.replace(eos_token_id=model.eos_ids)
    if arguments.chat:
        from gptjax.verbs.chat import converse

        return converse(model, settings, arguments.seed, template, arguments.system, guided(model, settings, arguments))
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
    if arguments.task is not None and arguments.chat:
        raise UserError("--task puts a prompt into its template, and --chat has no prompt; leave one out.")
    if arguments.system is not None and not arguments.chat:
        raise UserError("--system belongs to --chat.")
    if arguments.prompts is not None:
        if arguments.json and not arguments.output:
            raise UserError("--json prints one object, and --prompts one a sample; name a file for these with --output=FILE.")
    elif arguments.output is not None:
        raise UserError("--output belongs to --prompts=FILE.")
    if arguments.infill_suffix is not None and (arguments.prompts is not None or arguments.chat):
        raise UserError("--infill_suffix belongs to one --prompt, the text before the gap.")


def _template(name: str | None) -> str | None:
    if name in (None, PLAIN):
        return name
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
    if not recipes.is_foreign(workdir):
        workdir, config = run_config(arguments)
        if refusal := tasks_refusal(config):
            raise UserError(f"{workdir} {refusal}")
        model = load_run(workdir, log, arguments.step, config)
        if config.objective.name == "masked" and not arguments.weights:  # it has no cache to be stored for
            return model
        return model.stored_as(arguments.weights or "")
    if arguments.overrides or arguments.config:
        raise UserError(f"{workdir} is a Hugging Face folder, and only a run's config can be overridden; convert it first.")
    return loading.load(workdir, step=arguments.step, weights=arguments.weights or "", log=log)


def guided(model: Any, settings: GenerationConfig, arguments: argparse.Namespace) -> dict[str, Any]:
    """What --regex, --json_schema and --draft ask for, as arguments of `generate_text`. Raises `UserError`."""
    from gptjax.generate.text import as_draft, language_of
    from gptjax.train import loading

    schema = None
    if arguments.json_schema is not None:
        path = pathlib.Path(arguments.json_schema)
        try:
            schema = json.loads(path.read_bytes())
        except OSError as error:
            raise UserError(f"--json_schema={path} cannot be read: {error.strerror}.") from None
        except ValueError as error:
            raise UserError(f"--json_schema={path} is not valid JSON: {error}.") from None
    draft = None
    if arguments.draft is not None:
        found = loading.load(arguments.draft, weights="", log=log)
        if not found.tokenizer.has_ids_of(model.tokenizer):
            raise UserError(f"--draft={arguments.draft} has another tokenizer than the model.")
        draft = as_draft(found)
    return {"language": language_of(model, arguments.regex, schema, settings), "draft": draft}


def _answer(model: Any, prompt: str, settings: GenerationConfig, arguments: argparse.Namespace) -> int:
    """The samples of one prompt, or the prompt with its gaps filled."""
    from gptjax.generate.filling import has_gaps

    if writing_refusal(model.config.objective) and has_gaps(model, prompt):
        return _fill(model, prompt, settings, arguments)
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

    texts: list[str | None] = [prompt]
    ids: Any = prompt
    both_ways = None
    if arguments.infill_suffix is not None:
        refuse_half_characters(arguments.infill_suffix)
        marks = find_sentinels(model.tokenizer)
        ids = infill_prompt(model.tokenizer, prompt, arguments.infill_suffix, arguments.infill_order, marks)
        both_ways = False
        if any(part.method == "infill" for part in objective_parts(model.config.objective)) and model.config.data.add_bos:
            ids = np.concatenate([[] if model.tokenizer.bos_id is None else [model.tokenizer.bos_id], ids]).astype(np.int32)
        if marks.end is not None:
            settings = settings.replace(eos_token_id=(*settings.eos_ids(model.tokenizer.eos_id), marks.end))
    try:
        samples = generate_text(
            model.params, model.config, model.tokenizer, [ids], settings, texts=texts,
            seed=arguments.seed, on_text=show if streams else None, speed=speed, both_ways=both_ways,
            **guided(model, settings, arguments),
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
        write_text(("---\n" if index else "") + shown + (arguments.infill_suffix or "") + "\n")
    log(f"{speed}.")
    return 0


def _fill(model: Any, prompt: str, settings: GenerationConfig, arguments: argparse.Namespace) -> int:
    """The prompt with its gaps filled."""
    from gptjax.generate.filling import fill

    if settings.num_return_sequences > 1:
        raise UserError(f"num_return_sequences={settings.num_return_sequences}: gaps are filled in one way.")
    filled = fill(model, prompt, seed=arguments.seed, **dataclasses.asdict(settings))
    if arguments.json:
        print_json({"step": model.step, **dataclasses.asdict(filled)})
    else:
        write_text(filled.text + "\n")
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
