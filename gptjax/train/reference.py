"""What the initial model says of the examples that a run's tasks compare it with, asked once and kept in the run's folder."""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable
from typing import Any

import numpy as np
from jax.sharding import Mesh

from gptjax.config import Config, UserError, tasks_of
from gptjax.data.pipeline import Mixture, Split
from gptjax.parallel import hosts
from gptjax.tasks.load import TaskDataset
from gptjax.tasks.table import TASKS
from gptjax.train.task_evaluation import outputs_by_example

FILE = "reference.npz"


def with_reference(
    config: Config,
    dataset: TaskDataset,
    folder: pathlib.Path,
    mesh: Mesh,
    initial: Callable[[], Any],
    log: Callable[[str], None],
) -> TaskDataset:
    """The data with the columns "reference" filled: from `folder`, or by the parameters that `initial` gives, and kept there.

    So a resumed run compares with the very numbers that it began with, wherever `init_from` has gone since.
    Raises `UserError` where the file is of other data.
    """
    names = [name for name, knobs in tasks_of(config).items() if TASKS[knobs.kind].compares]
    if not names:
        return dataset
    splits = _splits(dataset)
    path = folder / FILE
    if not hosts.from_process_0(path.is_file()):
        log(f"the initial model is asked for what {' and '.join(names)} compares with.")
        params = initial()
        found = {
            f"{split}/{name}": _nats(config, params, splits[split], dataset, mesh, name) for split, name in _places(splits, names)
        }
        if hosts.is_primary():
            _keep(path, found)
    else:
        with np.load(path, allow_pickle=False) as file:
            found = {key: file[key] for key in file.files}
    columns: dict[str, dict[str, np.ndarray]] = {}
    for split, name in _places(splits, names):
        nats = found.get(f"{split}/{name}")
        places = np.flatnonzero(_own(config, splits[split], name))
        if nats is None or len(nats) != len(places):
            raise UserError(f"{path} is of other records than this run has now; with new ones, begin a new run.")
        column = np.zeros(len(splits[split].tokens), np.float32)
        column[places] = nats
        columns.setdefault(split, {})[f"{name}/reference"] = column
    filled = {split: dataclasses.replace(own, columns={**own.columns, **columns.get(split, {})}) for split, own in splits.items()}
    train: Split | Mixture = filled.get("train", dataset.train)
    if isinstance(dataset.train, Mixture):
        own = {name: filled[f"train/{name}"] for name in dataset.train.splits}
        train = dataclasses.replace(dataset.train, splits=own)
    held_out: Split | dict[str, Split] = filled.get("eval", dataset.eval)
    if isinstance(dataset.eval, dict):
        held_out = {name: filled[f"eval/{name}"] for name in dataset.eval}
    return dataclasses.replace(dataset, train=train, eval=held_out)


def _splits(dataset: TaskDataset) -> dict[str, Split]:
    """{"train" and "eval", or "train/TASK" and "eval/TASK" of each of several}."""
    found: dict[str, Split] = {}
    for part, own in (("train", dataset.train), ("eval", dataset.eval)):
        several = own.splits if isinstance(own, Mixture) else own
        found |= {f"{part}/{name}": split for name, split in several.items()} if isinstance(several, dict) else {part: several}
    return found


def _places(splits: dict[str, Split], names: list[str]) -> list[tuple[str, str]]:
    """(split, task) of each split that has examples of the task."""
    return [(split, name) for split in splits for name in names if split.partition("/")[2] in ("", name)]


def _own(config: Config, split: Split, name: str) -> np.ndarray:
    number = list(tasks_of(config)).index(name) + 1
    return (split.columns["task"] == number) & (split.columns["read"] > 0)


def _nats(config: Config, params: Any, split: Split, dataset: TaskDataset, mesh: Mesh, name: str) -> np.ndarray:
    """float32 [tokens with `read` 1 of the task], in their order: examples stand one after the other."""
    examples = dataset.examples[split.name]
    outputs = outputs_by_example(config, params, split, examples, mesh)
    parts = [outputs[number][:, 0] for number in sorted(outputs) if examples[number].task == name]
    return np.concatenate(parts).astype(np.float32)


def _keep(path: pathlib.Path, arrays: dict[str, np.ndarray]) -> None:
    """Whole or not at all."""
    part = path.with_name(f"{path.name}.part")
    with open(part, "wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    part.replace(path)
