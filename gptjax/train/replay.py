"""One step of a run once more, looked at: whose its loss and its gradient are.

The state before the step is that of the nearest checkpoint before it, trained forward; the numbers that the run wrote down on the
way show whether it is the same state. Of a run that went back from spikes, a step is the one that was taken last, or with
`rewinds` the one that was taken before a rewind, such as the spike itself.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import statistics
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NoReturn

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gptjax.config import Config, UserError
from gptjax.data.pipeline import Dataset, steps_per_epoch
from gptjax.parallel import hosts
from gptjax.parallel.mesh import make_mesh
from gptjax.tasks.load import TaskDataset
from gptjax.train.agreement import Agreement, agreement
from gptjax.train.attribution import gradient_squares, update_squares
from gptjax.train.checkpoints import Checkpoints, CheckpointsDamaged
from gptjax.train.documents import Document, documents_of
from gptjax.train.feed import check_steps_divide, step_batches
from gptjax.train.loop import load_data
from gptjax.train.metrics import FILE_NAME, read_metrics, step_figures
from gptjax.train.optimizers import Lengths
from gptjax.train.provenance import check_same_data, check_same_initial
from gptjax.train.reference import with_reference
from gptjax.train.reproduction import of_changed_configs, recorded_config
from gptjax.train.restore import initial_params
from gptjax.train.rewind import Rewind, recorded_rewinds, skipped_before
from gptjax.train.state import TrainState
from gptjax.train.step import abstract_state, init_state


@dataclasses.dataclass(frozen=True)
class Norms:
    """Of one parameter, or of one layer's part of it; `layer` is None where it is of no layer."""

    name: str
    layer: int | None
    gradient: float  # of the mean loss, before clipping
    parameters: float  # before the step
    update: float  # what the step added


@dataclasses.dataclass(frozen=True)
class Replay:
    """A step and what it was made of."""

    folder: pathlib.Path
    config: Config
    step: int
    from_step: int  # of the checkpoint; 0: from the run's beginning
    rewinds: int  # that were followed
    of_rewinds: int
    figures: dict[str, Any]  # the step's own, by the names of metrics.jsonl
    before: dict[str, float]  # medians of the steps from the checkpoint up to this one; {} where there are none
    documents: tuple[Document, ...]  # the dearest first
    norms: tuple[Norms, ...]
    agreement: Agreement
    notes: tuple[str, ...]

    @property
    def gaps(self) -> dict[str, float]:
        """Relative differences of what was taken apart, added up again, from the step's own figures."""
        loss = sum(one.loss for one in self.documents) / max(self.figures["train/weight"], 1.0)
        norm = np.sqrt(sum(np.square(np.float64(one.gradient)) for one in self.norms))
        sums = {"train/loss": loss, "gradient_norm": float(norm)}
        return {name: abs(value - self.figures[name]) / max(abs(self.figures[name]), 1e-30) for name, value in sums.items()}


@dataclasses.dataclass(frozen=True)
class _Past:
    """What the steps of a run are functions of."""

    config: Config
    dataset: Dataset
    lengths: Lengths
    mesh: Mesh
    rewinds: tuple[Rewind, ...]  # that are followed

    def batches(self, start: int) -> Iterator[Any]:
        """(compiled step, batch) of each step after `start`, over the rewinds' rows."""
        skipped = -1
        batches: Iterator[Any] = iter(())
        for step in range(start + 1, self.lengths.total + 1):
            if (now := skipped_before(self.rewinds, step)) != skipped:
                skipped = now
                batches = step_batches(self.config, self.dataset.train, self.lengths, self.mesh, step - 1, skipped)
            yield next(batches)


def replay(
    folder: pathlib.Path,
    step: int,
    rewinds: int | None = None,
    overrides: Sequence[str] = (),
    log: Callable[[str], None] = print,
) -> Replay:
    """Takes `step` (from 1) of the run in `folder` once more; nothing in the folder is changed.

    `rewinds`: how many of the run's rewinds are followed; None: all. Raises `UserError` where something is missing or has
    changed, and for a step that was never taken.
    """
    config = recorded_config(folder, overrides)
    every = recorded_rewinds(folder)
    followed = tuple(every if rewinds is None else every[:rewinds])
    _check_taken(folder, step, rewinds, every)
    dataset = load_data(config, log)
    notes = [*of_changed_configs(folder, step), check_same_data(folder, dataset)]
    config = dataset.settled(config)
    epoch_steps = steps_per_epoch(config, dataset.train)
    mesh, lengths = make_mesh(config.mesh), Lengths.of(config, epoch_steps)
    check_steps_divide(config, config.stages(epoch_steps), mesh)
    if step > lengths.total:
        raise UserError(f"--step={step} is more than the {lengths.total} steps of {folder}.")
    if isinstance(dataset, TaskDataset):
        dataset = with_reference(config, dataset, folder, mesh, functools.partial(_no_reference, folder), log)
    past = _Past(config, dataset, lengths, mesh, followed)
    state, from_step = _state_before(folder, past, step, log)
    log(f"step {step}: {step - from_step} steps from {f'the checkpoint of step {from_step}' if from_step else 'the beginning'}.")
    made, documents, norms = _retake(past, state, from_step, step)
    middle = {name: [row[name] for row in made[:-1]] for name in ("train/loss", "gradient_norm")}
    return Replay(
        folder,
        config,
        step,
        from_step,
        len(followed),
        len(every),
        made[-1],
        {name: statistics.median(values) for name, values in middle.items() if values},
        documents,
        norms,
        agreement(_recorded(folder, made[-1], every, len(followed), config), made, from_step + 1, step),
        tuple(note for note in notes if note),
    )


def _check_taken(folder: pathlib.Path, step: int, rewinds: int | None, every: Sequence[Rewind]) -> None:
    """Raises `UserError` for rewinds that there were not, and a step to which the run did not come before the next one."""
    if rewinds is None or rewinds == len(every):
        return
    if rewinds > len(every):
        raise UserError(f"--rewinds={rewinds}: {folder} went back {len(every)} times.")
    if step > every[rewinds].found_at:
        raise UserError(
            f"--step={step} --rewinds={rewinds}: {folder} went back at step {every[rewinds].found_at}, and had not come so far "
            "before."
        )


def _no_reference(folder: pathlib.Path) -> NoReturn:
    raise UserError(f"{folder} has no reference.npz, what its initial model said of its records: its steps cannot be taken anew.")


# --- the state before the step ------------------------------------------------------------------------------------------------


def _state_before(folder: pathlib.Path, past: _Past, step: int, log: Callable[[str], None]) -> tuple[TrainState, int]:
    """(state, its step): of the newest intact checkpoint before `step` that is on its way there; else that of the beginning."""
    wanted = abstract_state(past.config, past.lengths, past.mesh)
    with Checkpoints(folder / "checkpoints", past.config.checkpoint, log, read_only=True) as checkpoints:
        for saved in reversed([saved for saved in checkpoints.steps() if saved < step]):
            try:
                rewinds = checkpoints.metadata(saved).get("spikes", {}).get("rewinds", ())
                if not _same_way([Rewind(**one) for one in rewinds], past.rewinds, saved):
                    continue
                restored = checkpoints.restore(wanted, saved)
            except CheckpointsDamaged:
                continue
            assert restored is not None
            _check_tokenizer(folder, restored.metadata, past.dataset)
            return restored.state, saved
    check_same_initial(folder, past.config)
    params = initial_params(past.config, past.mesh, log, past.dataset.tokenizer)
    return init_state(past.config, past.lengths, past.mesh, params), 0


def _same_way(a: Sequence[Rewind], b: Sequence[Rewind], steps: int) -> bool:
    """Whether the first `steps` steps took the same rows; rows change only behind a step that was gone back to."""
    changes = {one.back_to + 1 for one in (*a, *b)} | {1}
    return all(skipped_before(a, step) == skipped_before(b, step) for step in changes if step <= steps)


def _check_tokenizer(folder: pathlib.Path, metadata: dict[str, Any], dataset: Dataset) -> None:
    if metadata.get("tokenizer") not in (None, dataset.tokenizer.encoding_fingerprint):
        raise UserError(
            f"{folder} was trained with another tokenizer than its config gives now: its files or its text have changed."
        )


# --- the steps ----------------------------------------------------------------------------------------------------------------


def _retake(
    past: _Past, state: TrainState, start: int, step: int
) -> tuple[list[dict[str, Any]], tuple[Document, ...], tuple[Norms, ...]]:
    """(rows of metrics of the steps after `start`, the last one's documents, its norms)."""
    made = []
    batches = past.batches(start)
    for number in range(start + 1, step):
        train_step, batch = next(batches)
        hosts.moved("step", number, patience=10)
        state, metrics = train_step(state, batch)
        made.append(_row(number, metrics))
    train_step, batch = next(batches)
    hosts.moved("step", step, patience=100)
    epoch_steps = steps_per_epoch(past.config, past.dataset.train)
    of_stage = past.config.at_stage(past.config.stages(epoch_steps).at(step - 1))
    documents = documents_of(
        past.config, of_stage, past.dataset, past.mesh, state, batch, step - 1, skipped_before(past.rewinds, step)
    )
    squares = gradient_squares(of_stage, past.mesh, state, batch)
    before = jax.tree.map(jnp.copy, state.params)
    state, metrics = train_step(state, batch)
    made.append(_row(step, metrics))
    updates = update_squares(of_stage, past.mesh, before, state.params)
    return made, documents, tuple(_norms(squares["gradient"], squares["parameters"], updates))


def _row(step: int, metrics: dict[str, jax.Array]) -> dict[str, Any]:
    return {"step": step} | step_figures({name: value.item() for name, value in jax.device_get(metrics).items()})


def _norms(gradient: dict[str, np.ndarray], parameters: dict[str, np.ndarray], update: dict[str, np.ndarray]) -> Iterator[Norms]:
    for name, squares in gradient.items():
        of_all = [np.sqrt(np.asarray(array[name], np.float64)) for array in (gradient, parameters, update)]
        if squares.ndim == 0:
            yield Norms(name, None, *(float(norm) for norm in of_all))
            continue
        for layer in range(len(squares)):
            yield Norms(name, layer, *(float(norm[layer]) for norm in of_all))


def _recorded(folder: pathlib.Path, like: dict[str, Any], every: Sequence[Rewind], followed: int, config: Config) -> list[Any]:
    """The rows of metrics that are of the steps taken here. Before a rewind they are those up to where it went back to, and of
    the abandoned ones the last value, by which the spike was found.
    """
    path = folder / FILE_NAME
    rows = read_metrics(path) if path.is_file() else []
    rows = [{name: value for name, value in row.items() if name in like} for row in rows]
    abandoned = every[followed:]
    if not abandoned:
        return rows
    common = min(one.back_to for one in abandoned)
    name = "train/loss" if config.train.spike_metric == "loss" else config.train.spike_metric
    found = abandoned[0]
    spike = [] if found.value is None else [{"step": found.found_at, name: found.value}]
    return [row for row in rows if row["step"] <= common] + spike
