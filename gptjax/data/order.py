"""Random orders and phases of the rows of an epoch: functions of (train.seed, source, epoch), of a counter-based generator, so
that starting at any step costs nothing.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable

import numpy as np

ORDER, PHASE, MIXTURE = 1, 2, 3  # purposes, so that no two draw the same numbers


def epoch_order(seed: int, epoch: int, count: int, source: str = "") -> np.ndarray:
    """int64 [count], a random order: that of random keys. Numpy promises to keep the bits of Philox, but not its own shuffle."""
    return _orders(source)(seed, epoch, count)


@functools.cache
def _orders(source: str) -> Callable[[int, int, int], np.ndarray]:
    """Each source keeps its latest orders itself: of many sources, none must be drawn anew for every batch."""

    @functools.lru_cache(maxsize=4)
    def draw(seed: int, epoch: int, count: int) -> np.ndarray:
        order = np.argsort(philox(seed, ORDER, epoch, source).random_raw(count), kind="stable")
        order.flags.writeable = False
        return order

    return draw


def philox(seed: int, purpose: int, epoch: int, source: str = "") -> np.random.Philox:
    """Philox 4x64 (Salmon et al. 2011) at the start of one of its streams. A source's depends on its name alone, so that
    another one beside it changes none of its orders.
    """
    stream = int.from_bytes(hashlib.blake2b(source.encode(), digest_size=8).digest()) if source else 0
    return np.random.Philox(key=np.asarray([seed, purpose], np.uint64), counter=np.asarray([0, 0, epoch, stream], np.uint64))
