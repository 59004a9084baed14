"""Positions that are numbers added to scores, functions of the distance from query to key. Axis letters: see decoder.py; D:
distances.

All that a layer needs of them is one vector for each head, over every distance that can occur: [N, D], D = 2S - 1, the distance 0
in its middle. No array [T, S] is made of it but for the block at hand.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gptjax.config import ModelConfig
from gptjax.model.scores import Learn, Learned


class DistanceBias(NamedTuple):
    """A position that is added to scores."""

    function: Callable[[ModelConfig, Learned, np.ndarray], jax.Array]  # (config, learned, places before the query [D]) -> [N, D]
    learned: Mapping[str, Learn] = {}


def alibi_slopes(heads: int) -> np.ndarray:
    """[N]: 2**(-8 / n), 2**(-16 / n), ... for a power of two n. For other numbers of heads, those of the largest power of two
    below, then every other one of twice as many (Press et al., 2021, appendix A, footnote on 12 heads).
    """
    power = 2 ** int(math.log2(heads))
    slopes = 2.0 ** (-8 / power * np.arange(1, power + 1))
    between = 2.0 ** (-4 / power * np.arange(1, 2 * power + 1, 2))
    return np.concatenate([slopes, between[: heads - power]])


def _alibi(config: ModelConfig, learned: Learned, before_D: np.ndarray) -> jax.Array:
    """-slope * |distance|: where a query sees later keys, they are as far as those before it."""
    slopes_N = jnp.asarray(alibi_slopes(config.num_heads), jnp.float32)
    return -slopes_N[:, None] * np.abs(before_D).astype(np.float32)


def t5_buckets(config: ModelConfig, before: np.ndarray) -> np.ndarray:
    """The bucket of each distance (Raffel et al., 2020, section 2.1): the first half one distance each, then by its logarithm up
    to `t5_max_distance`. One direction: all later keys have bucket 0; both: theirs are the upper half of the buckets.
    """
    buckets, base = config.t5_num_buckets, np.zeros_like(before)
    if config.t5_bidirectional:
        buckets //= 2
        base = np.where(before < 0, buckets, 0)
        before = np.abs(before)
    before = np.maximum(before, 0)
    exact = buckets // 2
    # In float64: a distance on a bucket's border, such as 32 of 16, 32, 64, ..., must not fall below it by rounding.
    grown = np.log(np.maximum(before, 1) / exact) / math.log(config.t5_max_distance / exact) * (buckets - exact)
    far = np.minimum(exact + np.floor(np.round(grown, 9)).astype(before.dtype), buckets - 1)
    return base + np.where(before < exact, before, far)


def _t5(config: ModelConfig, learned: Learned, before_D: np.ndarray) -> jax.Array:
    # Beyond the last border nothing changes, so that a vector for a long cache is mostly copies of its ends.
    middle = len(before_D) // 2
    reach = min(config.t5_max_distance, middle)
    one_hot_CD = np.arange(config.t5_num_buckets)[:, None] == t5_buckets(config, np.arange(-reach, reach + 1))
    # As a product: its gradient adds up by a product too, where a look-up's would scatter.
    table_NC = learned["distance_bias"].astype(jnp.float32)
    near_ND = jnp.dot(table_NC, jnp.asarray(one_hot_CD, jnp.float32), precision=jax.lax.Precision.HIGHEST)
    return jnp.pad(near_ND, ((0, 0), (middle - reach, middle - reach)), mode="edge")


DISTANCE_BIASES: dict[str, DistanceBias] = {
    "alibi": DistanceBias(_alibi),
    "t5": DistanceBias(
        _t5,
        # One table a layer, a parameter of its attention; T5 itself has one that all layers share.
        {"distance_bias": Learn(lambda c: nn.initializers.zeros, ("positions",), lambda c: (c.t5_num_buckets,))},
    ),
}


def by_distance(config: ModelConfig, learned: Learned, length: int) -> jax.Array | None:
    """[N, 2 * length - 1] in float32: what each head adds to the score of a key that stands length - 1, ..., 1 places after the
    query, at it, 1, ..., length - 1 before it. None: `model.position` adds nothing.
    """
    if config.position not in DISTANCE_BIASES:
        return None
    return DISTANCE_BIASES[config.position].function(config, learned, np.arange(1 - length, length))


def of_block(bias_KGD: jax.Array, first, first_key, rows: int, columns: int) -> jax.Array:
    """[K, G, t, S] for queries at places `first`, `first` + 1, ... and keys at `first_key`, ...

    Without a look-up: t copies of the stretch of distances at hand, each written one number longer than it is read, so that
    every row starts one place before the row above. The gradient is the same way back.
    """
    length, middle = rows + columns - 1, bias_KGD.shape[-1] // 2
    start = first - first_key - (columns - 1) + middle
    stretch_KGD = jax.lax.dynamic_slice_in_dim(bias_KGD, start, length, axis=2)[..., ::-1]
    stretch_KGD = jnp.pad(stretch_KGD, ((0, 0), (0, 0), (0, 1)))
    heads = bias_KGD.shape[:2]
    copies = jnp.broadcast_to(stretch_KGD[:, :, None], (*heads, rows, length + 1)).reshape(*heads, -1)
    return copies[..., : rows * length].reshape(*heads, rows, length)[..., rows - 1 :]


def of_places(bias_ND: jax.Array, places_BT: jax.Array, first_key, columns: int) -> jax.Array:
    """[B, T, N, C] for queries at `places_BT` and keys at `first_key`, `first_key` + 1, ..."""
    after_ND = bias_ND[:, ::-1]  # by places after the query, which go up with the key's
    starts_BT = first_key - places_BT + bias_ND.shape[1] // 2

    def stretch(start: jax.Array) -> jax.Array:
        return jax.lax.dynamic_slice_in_dim(after_ND, start, columns, axis=1)

    return jax.vmap(jax.vmap(stretch))(starts_BT)
