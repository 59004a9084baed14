"""Tasks of lm-evaluation-harness: those it comes with, and those of a folder of task files, which need no network."""

from __future__ import annotations

import contextlib
import os
import pathlib
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from gptjax.config import UserError
from gptjax.data.sources import nearest

# Resamples for the standard errors that have no formula. The harness' own default, 100,000, takes minutes in one process.
RESAMPLES = 1000


def evaluate_tasks(
    model: Any,
    tasks: Sequence[str],
    *,
    num_fewshot: int | None = None,
    include_path: str = "",
    limit: int | None = None,
    batch_size: int = 32,
    prefix: str | None = None,
    chat_template: bool = False,
    seed: int = 0,
    log: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """What the harness' `simple_evaluate` gives, without the samples: {"results": {task: {"acc,none": ...}}, "n-shot", ...}.

    `tasks`: names, groups, tags or patterns such as blimp_*. `include_path`: a folder of task files (YAML); where it holds all
    that is asked for, the harness' own thousands are not read. `num_fewshot` None: as each task has it. `limit`: items of each
    task. `seed` is for texts that are drawn; examples are drawn by the harness' own seeds, so that its published scores are met.
    Raises `UserError` for an unknown task, and where lm_eval is missing.
    """
    folder = check(include_path)
    from gptjax.harness.lm_eval_model import GptjaxLM

    with _quiet():
        from lm_eval import evaluator

        manager, names = _find(folder, tasks)
        lm = GptjaxLM(model, batch_size=batch_size, prefix=prefix, seed=seed, log=log)
        found: Any = evaluator.simple_evaluate(
            lm,
            tasks=names,
            task_manager=manager,
            num_fewshot=num_fewshot,
            limit=limit,
            apply_chat_template=chat_template,
            fewshot_as_multiturn=chat_template,
            bootstrap_iters=RESAMPLES,
            log_samples=False,
        )
    return dict(found)


def check(include_path: str | None) -> pathlib.Path | None:
    """The folder of task files, None where none is named. Raises `UserError` where it is none, and where lm_eval is missing."""
    from gptjax.harness import lm_eval_model  # noqa: F401 - says what to install

    folder = pathlib.Path(include_path).expanduser() if include_path else None
    if folder is not None and not folder.is_dir():
        raise UserError(f"--include_path={include_path} is not a folder of task files.")
    return folder


def table(results: dict[str, Any]) -> str:
    """The harness' own table, and that of groups where there are any."""
    from lm_eval.utils import make_table

    groups = ["groups"] if results.get("groups") else []
    return "\n".join(make_table(results, column) for column in ("results", *groups)).rstrip("\n")


def _find(folder: pathlib.Path | None, tasks: Sequence[str]) -> tuple[Any, list[str]]:
    """(the harness' task manager, the names that `tasks` match). Raises `UserError` for one that matches none."""
    from lm_eval.tasks import TaskManager

    manager: Any = None
    for own_only in (True, False) if folder else (False,):
        manager = TaskManager(include_path=str(folder) if folder else None, include_defaults=not own_only)
        matched = [(task, manager.match_tasks([task])) for task in tasks]
        if all(names for _, names in matched):
            return manager, [name for _, names in matched for name in names]
    missing = next(task for task, names in matched if not names)
    where = f"neither in {folder} nor in" if folder else "not in"
    raise UserError(f"--tasks: {missing} is {where} lm_eval{nearest(missing, manager.all_tasks)}")


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """The harness prints to standard output, which is for results; and its bootstrap would fork, which JAX's threads forbid."""
    before = os.environ.get("DISABLE_MULTIPROC")
    os.environ["DISABLE_MULTIPROC"] = "1"
    try:
        with contextlib.redirect_stdout(sys.stderr):
            yield
    finally:
        if before is None:
            del os.environ["DISABLE_MULTIPROC"]
        else:
            os.environ["DISABLE_MULTIPROC"] = before
