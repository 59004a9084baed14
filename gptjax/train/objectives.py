"""What is predicted: a function from a batch to inputs, targets and weights. All objectives share one loss (loss.py).

What a row shows of its documents (masks, gaps, spans) is settled before, in numpy, where lengths may change
(data/corruption.py); the functions here say which of what is shown is predicted, and who sees whom.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp

from gptjax.config import Config


class Example(NamedTuple):
    """Arrays [B, T]. A target of weight 0 costs nothing; inputs see only their own segment."""

    inputs: jax.Array
    targets: jax.Array
    weights: jax.Array  # float32
    positions: jax.Array
    segment_ids: jax.Array
    prefix: jax.Array | None = None  # bool: inputs that all of their segment see, those before them too; None: causal


def causal(batch: Mapping[str, jax.Array]) -> Example:
    """Predict each token from those before it in its segment.

    `batch`: `tokens`, `segment_ids` (0 is padding), `positions`, each [B, T + 1]; a `loss_mask` [B, T + 1] of 0 and 1, where
    given, says which tokens count as targets.
    """
    tokens, segment_ids, positions = batch["tokens"], batch["segment_ids"], batch["positions"]
    same_segment = (segment_ids[:, 1:] == segment_ids[:, :-1]) & (segment_ids[:, 1:] > 0)
    weights = same_segment.astype(jnp.float32)
    if "loss_mask" in batch:
        weights = weights * batch["loss_mask"][:, 1:]
    return Example(tokens[:, :-1], tokens[:, 1:], weights, positions[:, :-1], segment_ids[:, :-1])


def prefix(batch: Mapping[str, jax.Array]) -> Example:
    """As `causal`, but tokens where `prefix` [B, T + 1] is 1 are given: all of their segment see them, and none is a target
    (a prefix LM, Raffel et al., 2020).
    """
    example = causal(batch)
    given = batch["prefix"] > 0
    return example._replace(weights=example.weights * ~given[:, 1:], prefix=given[:, :-1])


def masked(batch: Mapping[str, jax.Array]) -> Example:
    """Predict `targets` [B, T + 1] at their own places, below 0 nothing, from the whole segment (Devlin et al., 2019).

    `tokens` shows other tokens in their stead; the last place of a row is not used.
    """
    tokens, segment_ids, targets = (batch[name][:, :-1] for name in ("tokens", "segment_ids", "targets"))
    weights = (targets >= 0) & (segment_ids > 0)
    positions = batch["positions"][:, :-1]
    return Example(tokens, jnp.maximum(targets, 0), weights.astype(jnp.float32), positions, segment_ids, prefix=segment_ids > 0)


OBJECTIVES: dict[str, Callable[[Mapping[str, jax.Array]], Example]] = {
    "causal": causal,
    "masked": masked,
    "prefix": prefix,
    "infill": causal,
    "span": prefix,
    "mixture": prefix,
}

_MORE = {"masked": ("targets",), "prefix": ("prefix",)}


def batch_arrays(config: Config) -> tuple[str, ...]:
    """Names of the int32 arrays [B, T + 1] of a batch."""
    return ("tokens", "segment_ids", "positions", *_MORE.get(OBJECTIVES[config.objective.name].__name__, ()))
