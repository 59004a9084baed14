"""The documents of a step's batch, with what each of them cost."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import numpy as np
from jax.sharding import Mesh

from gptjax.config import Config, tasks_of
from gptjax.data.origins import Origins, batch_origins, step_batch
from gptjax.data.pipeline import Dataset
from gptjax.tasks.load import TaskDataset
from gptjax.train.attribution import group_losses, target_losses
from gptjax.train.state import TrainState


@dataclasses.dataclass(frozen=True)
class Document:
    """A document's part of a row, or an example of a task."""

    row: int  # of the batch
    segment: int  # in its row, from 1
    source: str  # of a mixture, or the task; "" where there is one
    name: str
    begin: int  # its first token's place in the document
    ids: tuple[int, ...]  # of the text, before the objective changed it
    text: str
    shown: str | None  # as the model read it, where that differs
    positions: tuple[int, ...]  # places in the row of what the model read
    weight: float  # of its targets together
    loss: float  # sum of weight * loss over its targets, whatever the objective adds included
    nats: float  # sum of weight * nll
    targets: tuple[Target, ...]  # in order; () for a task, whose loss may be of no single token

    @property
    def mean(self) -> float:
        """Loss a target; NaN without any."""
        return self.loss / self.weight if self.weight else math.nan

    def worst(self, most: int) -> list[Target]:
        """The dearest targets."""
        return sorted(self.targets, key=lambda one: (-_finite(one.loss), one.position))[:most]


@dataclasses.dataclass(frozen=True)
class Target:
    """A predicted token."""

    position: int  # of the token's place in the row
    id: int
    token: str
    loss: float


def _finite(loss: float) -> float:
    """For sorting: what is no number is the worst."""
    return math.inf if math.isnan(loss) else loss


def documents_of(
    config: Config, of_stage: Config, dataset: Dataset, mesh: Mesh, state: TrainState, batch: Any, step: int, skipped_rows: int
) -> tuple[Document, ...]:
    """The documents in the batch of the step that has `step` steps before it, the dearest a target first.

    `config` is the run's, `of_stage` that of the step's shapes; `batch` is on the devices, `state` that before the step.
    """
    shown = step_batch(config, dataset.train, step, skipped_rows)
    origins = batch_origins(config, dataset.train, step, skipped_rows)
    groups, keys = _grouped(of_stage, origins, shown)
    targets: tuple[np.ndarray, np.ndarray] | None = None
    if isinstance(dataset, TaskDataset):
        of_groups = group_losses(of_stage, mesh, state, batch, groups.astype(np.int32), len(keys))
        loss, nats, weight = (np.asarray(sums, np.float64) for sums in of_groups)
    else:
        losses, nll, weights = (x.astype(np.float64) for x in target_losses(of_stage, mesh, state, batch))
        of_target = groups[:, :-1] if config.objective.name == "masked" else groups[:, 1:]
        loss, nats, weight = (
            np.asarray(
                np.bincount(of_target.ravel(), np.where(weights > 0, weights * x, 0.0).ravel(), len(keys) + 1)[1:], np.float64
            )
            for x in (losses, nll, np.ones_like(weights))
        )
        targets = losses, weights
    found = [
        _document(config, dataset, origins, shown, groups == number + 1, targets, (weight[number], loss[number], nats[number]))
        for number in range(len(keys))
    ]
    return tuple(sorted(found, key=lambda one: (-_finite(one.mean) if one.weight else math.inf, one.row, one.segment, one.begin)))


def _grouped(config: Config, origins: Origins, shown: Any) -> tuple[np.ndarray, np.ndarray]:
    """(int64 [B, T + 1]: whose each place of the shown rows is, from 1, 0 for nobody's; a row of numbers for each group).

    Segments are documents or pieces of them. A window is one segment of many documents: it is cut where they meet, unless the
    objective has rewritten it, so that places do not say any more of which document they are. An example of a task may have
    several segments.
    """
    segments = np.asarray(shown["segment_ids"], np.int64)
    rows = np.broadcast_to(np.arange(len(segments))[:, None], segments.shape)
    documents = origins.document
    parts = [rows, documents] if tasks_of(config) else [rows, segments]
    if not tasks_of(config) and config.objective.name == "causal":
        parts.append(documents)
    real = segments > 0
    keys, which = np.unique(np.stack([part[real] for part in parts]), axis=1, return_inverse=True)
    groups = np.zeros(segments.shape, np.int64)
    groups[real] = which.ravel() + 1
    return groups, keys.T


def _document(
    config: Config, dataset: Dataset, origins: Origins, shown: Any, here: np.ndarray, losses: Any, sums: tuple[Any, ...]
) -> Document:
    row = int(np.flatnonzero(here.any(1))[0])
    positions = np.flatnonzero(here[row])
    segment = int(shown["segment_ids"][row, positions[0]])
    rewritten = not tasks_of(config) and config.objective.name != "causal"
    text_at = here
    if rewritten:  # the text's own places are those of the same segment before it was rewritten
        text_at = np.zeros_like(here)
        text_at[row] = origins.segment_ids[row] == segment
    split = origins.splits[int(origins.source[text_at][0])]
    documents = np.unique(origins.document[text_at])
    ids = origins.ids(text_at)
    weight, loss, nats = (float(x) for x in sums)
    return Document(
        row=row,
        segment=segment,
        source=split.source or (next(iter(tasks_of(config)), "") if tasks_of(config) else ""),
        name=", ".join(split.names[number] for number in documents),
        begin=int(origins.place[text_at].min() - split.offsets[documents[0]]),
        ids=tuple(ids.tolist()),
        text=dataset.tokenizer.decode(ids),
        shown=dataset.tokenizer.decode(shown["tokens"][row, positions]) if rewritten else None,
        positions=tuple(positions.tolist()),
        weight=weight,
        loss=loss,
        nats=nats,
        targets=() if losses is None else tuple(_targets(config, dataset, shown, row, positions, *losses)),
    )


def _targets(
    config: Config, dataset: Dataset, shown: Any, row: int, positions: np.ndarray, losses_BT: np.ndarray, weights_BT: np.ndarray
) -> Any:
    """Those of a row whose tokens stand at `positions`."""
    is_masked = config.objective.name == "masked"
    places = positions if is_masked else positions - 1  # of the output that predicts the token there
    inside = (places >= 0) & (places < losses_BT.shape[1])
    for position, place in zip(positions[inside].tolist(), places[inside].tolist(), strict=True):
        if weights_BT[row, place] > 0:
            number = int(shown["targets" if is_masked else "tokens"][row, position])
            yield Target(position, number, dataset.tokenizer.decode(np.asarray([number])), float(losses_BT[row, place]))
