"""How queries meet keys: the table of attention scores. Axis letters: see decoder.py; t, s: queries and keys of a part of them.

A score of your own is a function, a line of `ATTENTION_SCORES` and a choice of `model.attention_score` in config/model.py; every
backend that holds scores itself (dense, blockwise, over mesh.context, with a cache) then has it, gradients included.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.config import ModelConfig
from gptjax.model import primitives
from gptjax.model.layers import parameter

# Learned parameters of attention by name, heads first: [N, ...] by layer, [K, G, ...] where blocks are computed.
Learned = Mapping[str, jax.Array]


class Learn(NamedTuple):
    """A parameter [N, *sizes] that scores are made with."""

    initializer: Callable[[ModelConfig], Any]
    axes: tuple[str, ...] = ()  # logical names of what follows the heads
    sizes: Callable[[ModelConfig], tuple[int, ...]] = lambda config: ()


class Score(NamedTuple):
    """One way to score. It is a product of queries and keys, times head_dim**power, where `function` is None."""

    # (learned, queries [B, K, G, t, H], keys [B, K, s, H]), float32 -> scores [B, K, G, t, s]. It is called with parts so small
    # that it may hold a few arrays [B, K, G, t, s, H].
    function: Callable[[Learned, jax.Array, jax.Array], jax.Array] | None = None
    power: float = 0.0
    # (learned, queries [B, T, N, H], keys [B, T, K, H]) -> both, as backends are to get them; before positions turn them.
    prepare: Callable[[Learned, jax.Array, jax.Array], tuple[jax.Array, jax.Array]] | None = None
    learned: Mapping[str, Learn] = {}


def additive(learned: Learned, q_BKGtH: jax.Array, k_BKsH: jax.Array) -> jax.Array:
    """v . tanh(query + key), v [H] for each head (Bahdanau et al., 2015, appendix A.1.2), whose matrices are the projections."""
    hidden_BKGtsH = jnp.tanh(q_BKGtH[..., None, :] + k_BKsH[:, :, None, None])
    return primitives.row_sum(hidden_BKGtsH * learned["score_vector"].astype(jnp.float32)[:, :, None, None])


def _directions(learned: Learned, q_BTNH: jax.Array, k_BTKH: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Queries and keys of length 1 each, queries times their head's temperature (after Henry et al., 2020, who have one)."""
    width = q_BTNH.shape[-1]
    unit_H = jnp.full(width, width**-0.5, jnp.float32)  # x / (sqrt(H) * rms(x)) = x / |x|
    q_BTNH, k_BTKH = (primitives.rms_norm(x, unit_H, _TINY) for x in (q_BTNH, k_BTKH))
    q_BTNH = q_BTNH * learned["cosine_norm_scale"].astype(jnp.float32)[:, None]
    return q_BTNH.astype(k_BTKH.dtype), k_BTKH


_TINY = 1e-12  # added to the mean square: a vector of zeros has no direction, and stays zeros

ATTENTION_SCORES: dict[str, Score] = {
    "scaled_dot": Score(power=-0.5),
    "dot": Score(),
    # Directions in H numbers have products of about H**-0.5: times H**0.5, scores start as those of scaled_dot at unit variance.
    "cosine": Score(
        prepare=_directions,
        learned={"cosine_norm_scale": Learn(lambda c: nn.initializers.constant(math.sqrt(c.head_dim)))},
    ),
    "additive": Score(
        function=additive,
        learned={"score_vector": Learn(lambda c: nn.initializers.normal(c.init_std), ("head_dim",), lambda c: (c.head_dim,))},
    ),
}

SINKS: dict[str, dict[str, Learn]] = {"none": {}, "learned": {"sink_bias": Learn(lambda c: nn.initializers.zeros)}}


def declare(module: nn.Module, config: ModelConfig, learned: Mapping[str, Learn]) -> dict[str, jax.Array]:
    """These parameters of a layer's attention, [N, ...] each, made in `module` where it is initialising."""
    return {
        name: parameter(
            module,
            name,
            one.initializer(config),
            ("heads", *one.axes),
            (config.num_heads, *one.sizes(config)),
            config.param_dtype,
        )
        for name, one in learned.items()
    }


# --- in parts ------------------------------------------------------------------------------

# Numbers of an array [B, K, G, t, s, H] that a score's function may make at once: 4 MiB in float32.
_MOST = 2**20


def scored(name: str, learned: Learned, q_BKGTH: jax.Array, k_BKSH: jax.Array) -> jax.Array:
    """[B, K, G, T, S] in float32 by the score's function, called with parts of the queries and of the keys, one after the other:
    neither pass ever holds an array [T, S, H].
    """
    return _scored(name, dict(learned), q_BKGTH.astype(jnp.float32), k_BKSH.astype(jnp.float32))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _scored(name: str, learned: Any, q_BKGTH: jax.Array, k_BKSH: jax.Array) -> jax.Array:
    function = _function(name)
    t, s = _sizes(q_BKGTH, k_BKSH)
    if (t, s) == (q_BKGTH.shape[3], k_BKSH.shape[2]):
        return function(learned, q_BKGTH, k_BKSH)

    def step(scores_BKGTS: jax.Array, pair: jax.Array) -> tuple[jax.Array, None]:
        first_q, first_k = pair[0] * t, pair[1] * s
        part = function(learned, _cut(q_BKGTH, first_q, t, 3), _cut(k_BKSH, first_k, s, 2))
        return jax.lax.dynamic_update_slice(scores_BKGTS, part, (0, 0, 0, first_q, first_k)), None

    empty = jnp.zeros((*q_BKGTH.shape[:4], k_BKSH.shape[2]), jnp.float32)
    return jax.lax.scan(step, empty, _pairs(q_BKGTH, k_BKSH, t, s))[0]


def _scored_forward(name, learned, q_BKGTH, k_BKSH):
    return _scored(name, learned, q_BKGTH, k_BKSH), (learned, q_BKGTH, k_BKSH)


def _scored_backward(name, residuals, g_BKGTS):
    learned, q_BKGTH, k_BKSH = residuals
    function = _function(name)
    t, s = _sizes(q_BKGTH, k_BKSH)
    if (t, s) == (q_BKGTH.shape[3], k_BKSH.shape[2]):
        return jax.vjp(function, learned, q_BKGTH, k_BKSH)[1](g_BKGTS)

    def step(totals: tuple[Any, jax.Array, jax.Array], pair: jax.Array) -> tuple[tuple[Any, jax.Array, jax.Array], None]:
        dlearned, dq_BKGTH, dk_BKSH = totals
        first_q, first_k = pair[0] * t, pair[1] * s
        _, back = jax.vjp(function, learned, _cut(q_BKGTH, first_q, t, 3), _cut(k_BKSH, first_k, s, 2))
        of_learned, of_q, of_k = back(_cut(_cut(g_BKGTS, first_q, t, 3), first_k, s, 4))
        dlearned = jax.tree.map(lambda total, new: total + new.astype(jnp.float32), dlearned, of_learned)
        return (dlearned, _add(dq_BKGTH, of_q, first_q, 3), _add(dk_BKSH, of_k, first_k, 2)), None

    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), (learned, q_BKGTH, k_BKSH))
    (dlearned, dq_BKGTH, dk_BKSH), _ = jax.lax.scan(step, zeros, _pairs(q_BKGTH, k_BKSH, t, s))
    return jax.tree.map(lambda total, x: total.astype(x.dtype), dlearned, learned), dq_BKGTH, dk_BKSH


_scored.defvjp(_scored_forward, _scored_backward)


def _function(name: str) -> Callable[[Learned, jax.Array, jax.Array], jax.Array]:
    function = ATTENTION_SCORES[name].function
    if function is None:
        raise ValueError(f"the score {name!r} is a product, which has faster ways than its function.")
    return function


def _sizes(q_BKGTH: jax.Array, k_BKSH: jax.Array) -> tuple[int, int]:
    """(queries, keys) of a part: divisors of T and S, as near to a square as the room allows."""
    length, keys = q_BKGTH.shape[3], k_BKSH.shape[2]
    each = math.prod(q_BKGTH.shape[:3]) * q_BKGTH.shape[4]
    t = _divisor(length, max(1, math.isqrt(_MOST // each)))
    return t, _divisor(keys, max(1, _MOST // (each * t)))


def _divisor(length: int, most: int) -> int:
    return next(size for size in range(min(length, most), 0, -1) if length % size == 0)


def _pairs(q_BKGTH: jax.Array, k_BKSH: jax.Array, t: int, s: int) -> jax.Array:
    pairs = jnp.meshgrid(jnp.arange(q_BKGTH.shape[3] // t), jnp.arange(k_BKSH.shape[2] // s), indexing="ij")
    return jnp.stack(pairs, axis=-1).reshape(-1, 2)


def _cut(x: jax.Array, first: Any, size: int, axis: int) -> jax.Array:
    return jax.lax.dynamic_slice_in_dim(x, first, size, axis)


def _add(total: jax.Array, part: jax.Array, first: Any, axis: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(total, _cut(total, first, part.shape[axis], axis) + part, first, axis)
