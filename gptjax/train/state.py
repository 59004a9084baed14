"""The whole state of a run: data, no functions."""

from __future__ import annotations

from typing import Any

import jax
from flax import struct


@struct.dataclass
class TrainState:
    """What a checkpoint holds, and all that it needs to hold: data order and dropout are functions of (seed, step)."""

    step: jax.Array  # int32: steps taken, those with a non-finite gradient included
    params: Any
    opt_state: Any
    ema_params: Any  # None without an average
    seed: jax.Array  # uint32
    nonfinite_steps: jax.Array  # int32: steps whose gradient was not finite, over the whole run
    nonfinite_streak: jax.Array  # int32: the same, in a row until now
