"""What `gptjax evaluate` scores by likelihood: tasks of lm-evaluation-harness, built-in suites, few-shot tables."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from typing import Any

from gptjax import recipes
from gptjax.config import UserError
from gptjax.verbs.arguments import count, positive, required, run_config
from gptjax.verbs.output import log, print_json, write_text

# What is asked for, and the options that belong to it alone.
_KINDS = {
    "tasks": ("num_fewshot", "include_path", "apply_chat_template", "seed"),
    "suite": ("data",),
    "few_shot": (),
}
_SHARED = ("limit", "prefix", "score_batch_size")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("scores by likelihood, in place of the loss")
    group.add_argument("--tasks", metavar="A,B", help="tasks of lm-evaluation-harness: names, groups or patterns such as blimp_*")
    group.add_argument(
        "--num_fewshot",
        "--num-fewshot",
        type=count,
        metavar="K",
        help="with --tasks: examples in a prompt; by default the task's",
    )
    group.add_argument(
        "--include_path", "--include-path", metavar="DIR", help="with --tasks: a folder of task files, which need no network"
    )
    group.add_argument(
        "--apply_chat_template", action="store_true", default=None, help="with --tasks: prompts as conversations, by the template"
    )
    group.add_argument("--seed", type=count, metavar="N", help="with --tasks: texts that are drawn are a function of it (0)")
    group.add_argument("--suite", metavar="NAME", help="a built-in suite: blimp, lambada, winogender, winobias or crows_pairs")
    group.add_argument("--data", metavar="PATH", help="with --suite: its files")
    group.add_argument("--few_shot", metavar="FILE.json", help="zero-, one- and few-shot tables: see gptjax/harness/few_shot.py")
    group.add_argument("--limit", type=positive, metavar="N", help="items of each task, file or table at most")
    group.add_argument("--prefix", metavar="TEXT", help="what stands before a text without a context (the begin-of-text token)")
    group.add_argument("--score_batch_size", type=positive, metavar="N", help="rows at once, which change no score (32)")


def is_asked_for(arguments: argparse.Namespace) -> bool:
    """Whether scores are, and not the loss. Raises `UserError` for options that don't go together."""
    asked = [name for name in _KINDS if getattr(arguments, name) is not None]
    if len(asked) > 1:
        raise UserError(f"--{asked[0]} and --{asked[1]} are both given; keep one.")
    for kind, options in _KINDS.items():
        stray = next((name for name in options if getattr(arguments, name) is not None), None)
        if stray and kind not in asked:
            raise UserError(f"--{stray} belongs to --{kind}.")
    if not asked:
        if stray := next((name for name in _SHARED if getattr(arguments, name) is not None), None):
            raise UserError(f"--{stray} belongs to --tasks, --suite or --few_shot.")
        return False
    if loss := next((name for name in ("objective", "weights") if getattr(arguments, name) is not None), None):
        raise UserError(f"--{loss} is of the loss; leave it out with --{asked[0]}.")
    return True


def run(arguments: argparse.Namespace) -> int:
    options = {"prefix": arguments.prefix, "batch_size": arguments.score_batch_size or 32, "log": log}
    if arguments.tasks is not None:
        found, text = _tasks(arguments, options)
    elif arguments.suite is not None:
        found, text = _suite(arguments, options)
    else:
        found, text = _few_shot(arguments, options)
    if arguments.json:
        print_json(found)
    else:
        write_text(text + "\n")
    return 0


def _tasks(arguments: argparse.Namespace, options: dict[str, Any]) -> tuple[dict[str, Any], str]:
    names = [name for name in arguments.tasks.split(",") if name]
    if not names:
        raise UserError("--tasks names no task.")
    from gptjax.harness import tasks

    tasks.check(arguments.include_path)
    model = _load(arguments)
    found = tasks.evaluate_tasks(
        model,
        names,
        num_fewshot=arguments.num_fewshot,
        include_path=arguments.include_path or "",
        limit=arguments.limit,
        chat_template=bool(arguments.apply_chat_template),
        seed=arguments.seed or 0,
        **options,
    )
    kept = ("results", "groups", "n-shot", "n-samples", "versions", "higher_is_better")
    return {"step": model.step} | {name: found[name] for name in kept if name in found}, tasks.table(found)


def _suite(arguments: argparse.Namespace, options: dict[str, Any]) -> tuple[dict[str, Any], str]:
    from gptjax.data.sources import nearest
    from gptjax.harness.intervals import table
    from gptjax.harness.likelihood import Likelihood
    from gptjax.harness.suites import SUITES

    if arguments.suite not in SUITES:
        raise UserError(f"--suite={arguments.suite} is none of {', '.join(SUITES)}{nearest(arguments.suite, list(SUITES))}")
    suite = SUITES[arguments.suite]
    if not arguments.data:
        raise UserError(f"--suite={arguments.suite} needs --data=PATH, {suite.data}.")
    path = pathlib.Path(arguments.data).expanduser()
    if not path.exists():
        raise UserError(f"--data={path} does not exist; it is {suite.data}.")
    model = _load(arguments)
    scores = suite.measure(Likelihood(model, **options), path, arguments.limit or 0)
    listed = [dataclasses.asdict(score) for score in scores]
    return {"step": model.step, "suite": arguments.suite, "scores": listed}, table(scores)


def _few_shot(arguments: argparse.Namespace, options: dict[str, Any]) -> tuple[dict[str, Any], str]:
    from gptjax.harness import few_shot
    from gptjax.harness.likelihood import Likelihood

    experiment = few_shot.read_experiment(pathlib.Path(arguments.few_shot))
    if arguments.limit:
        experiment = dataclasses.replace(experiment, limit=arguments.limit)
    few_shot.load(experiment)  # what is wrong with the records shows before the model is read
    model = _load(arguments)
    cells, majority = few_shot.run(Likelihood(model, **options), experiment)
    found = {"step": model.step, "majority": majority, "table": list(few_shot.as_dicts(cells))}
    return found, few_shot.table(cells, majority)


def _load(arguments: argparse.Namespace) -> Any:
    """The model of a run's folder, with the overrides laid over its config, or of a Hugging Face folder."""
    from gptjax.train import loading
    from gptjax.train.restore import load_run

    workdir = pathlib.Path(required(arguments, "workdir"))
    if not recipes.is_foreign(workdir):
        workdir, config = run_config(arguments)
        return load_run(workdir, log, arguments.step, config)
    if arguments.overrides or arguments.config:
        raise UserError(f"{workdir} is a Hugging Face folder, and only a run's config can be overridden; convert it first.")
    return loading.load(workdir, step=arguments.step, log=log)
