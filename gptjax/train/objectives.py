"""What is predicted: a function from a batch to inputs, targets and weights. All objectives share one loss (loss.py)."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp


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


def further_ahead(example: Example, tokens: int) -> Example:
    """The example with targets so many tokens later than its own, where they are of the input's segment; 0: as it is.

    A target counts where it counts as the target of the token before it.
    """
    if not tokens:
        return example

    def later(x_BT: jax.Array) -> jax.Array:
        return jnp.pad(x_BT[:, tokens:], ((0, 0), (0, min(tokens, x_BT.shape[1]))))

    same_segment = (later(example.segment_ids) == example.segment_ids) & (example.segment_ids > 0)
    return example._replace(targets=later(example.targets), weights=later(example.weights) * same_segment)


OBJECTIVES: dict[str, Callable[[Mapping[str, jax.Array]], Example]] = {"causal": causal}
