"""Where each token of a step's batch comes from: its source, its document and its place there.

The batch is made a second time by the very code that makes it for training, of data whose tokens are their own places. What the
objective does to rows (masks, gaps, spans) is left out: these are the rows before it, segment by segment the same documents.

Letters: B rows, T predicted tokens a row.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptjax.config import Config
from gptjax.data.corruption import Batch, Corruption
from gptjax.data.pipeline import Mixture, Split, train_batches

_LOW_BITS = 30  # of a place; batches are of int32


@dataclass(frozen=True)
class Origins:
    """int64 [B, T + 1]; -1 where a row is empty."""

    splits: tuple[Split, ...]
    source: np.ndarray  # of `splits`
    place: np.ndarray  # among the source's tokens
    document: np.ndarray  # of the source
    segment_ids: np.ndarray  # as in the batch, 0 for empty places

    def ids(self, here: np.ndarray) -> np.ndarray:
        """int64 [n]: the tokens of the text at places `here`, a mask or indices of one source."""
        split = self.splits[int(self.source[here][0])]
        return np.asarray(split.tokens[self.place[here]], np.int64)


def step_batch(config: Config, split: Split | Mixture, step: int, skipped_rows: int = 0) -> Batch:
    """The whole batch of the step that has `step` steps before it, on the host."""
    alone = dataclasses.replace(config, data=dataclasses.replace(config.data, prefetch=0))
    return next(train_batches(alone, split, step, skipped_rows=skipped_rows))


def batch_origins(config: Config, split: Split | Mixture, step: int, skipped_rows: int = 0) -> Origins:
    """Of the same step's batch."""
    splits = (split,) if isinstance(split, Split) else tuple(split.splits.values())

    def batch_of(value: Callable[[int, np.ndarray], Any]) -> Batch:
        made = [_with_values(one, number, value) for number, one in enumerate(splits)]
        if isinstance(split, Split):
            return step_batch(config, made[0], step, skipped_rows)
        of_all = dataclasses.replace(split, splits=dict(zip(split.splits, made, strict=True)))
        return step_batch(config, of_all, step, skipped_rows)

    low = batch_of(lambda _, places: places & ((1 << _LOW_BITS) - 1))
    real = low["segment_ids"] > 0
    place = low["tokens"].astype(np.int64)
    if max(one.num_tokens for one in splits) > 1 << _LOW_BITS:
        place |= batch_of(lambda _, places: places >> _LOW_BITS)["tokens"].astype(np.int64) << _LOW_BITS
    source = np.zeros_like(place)
    if len(splits) > 1:
        source = batch_of(lambda number, places: np.full_like(places, number))["tokens"].astype(np.int64)
    document = np.zeros_like(place)
    for number, one in enumerate(splits):
        own = source == number
        document[own] = np.searchsorted(one.offsets, place[own], side="right") - 1
    source, place, document = (np.where(real, array, -1) for array in (source, place, document))
    return Origins(splits, source, place, document, low["segment_ids"])


class _Values:
    """Stands for a split's tokens: a function of their places, never held."""

    def __init__(self, length: int, value: Callable[[np.ndarray], Any]):
        self._length, self._value = length, value

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, places: np.ndarray) -> Any:
        return self._value(np.asarray(places, np.int64))


class _AsItIs(Corruption):
    """Rows of the same documents, shown as they are."""

    def train(self, batch: Batch, seed: int, rows: np.ndarray) -> Batch:
        return {name: np.pad(x, ((0, 0), (0, self.seq_len + 1 - x.shape[1]))) for name, x in batch.items()}


def _with_values(split: Split, number: int, value: Callable[[int, np.ndarray], Any]) -> Split:
    c = split.corruption
    plain = c and _AsItIs(**{field.name: getattr(c, field.name) for field in dataclasses.fields(c)})
    tokens: Any = _Values(split.num_tokens, lambda places: value(number, places))
    return dataclasses.replace(split, tokens=tokens, corruption=plain, columns={})
