"""Causal attention that keeps no T x T array for the backward pass. Axis letters: see decoder.py.

As in FlashAttention-2 (Dao, 2023) the forward pass keeps the output and each query's log-sum-exp, and the backward pass
computes the weights again from them. Unlike it, a block of queries meets all keys up to its own end in one product: on a CPU
a few large products beat many small ones, and the softmax needs no running maximum. The upper triangle is skipped block by
block.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp

from gptjax.model import primitives

# Groups of query blocks that are traced one by one, each with a prefix of keys of its own; blocks of one group share a loop
# and a prefix.
_MAX_GROUPS = 8


@dataclasses.dataclass(frozen=True)
class _Options:
    causal: bool
    scale: float
    block_size: int
    dropout_rate: float


def blockwise_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    segment_ids_BT: jax.Array | None = None,
    causal: bool = True,
    scale: float | None = None,
    block_size: int = 0,
    dropout_rate: float = 0.0,
    dropout_keys: jax.Array | None = None,
) -> jax.Array:
    """Scaled dot-product attention [B, T, N, H], N // K query heads sharing a key head; softmax in float32, the result as
    `v_BSKH`.

    Query and key t of a row stand at the same place. A query sees the keys of its own segment, when causal no later ones.
    `scale` is H**-0.5 by default, `block_size` (queries) 0 chooses. `dropout_keys` [B, 2] as for `primitives.dropout`, which
    drops the same weights.
    """
    batch, length, heads, width = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    if k_BSKH.shape[1] != length:
        raise ValueError(f"queries and keys must stand at the same {length} places, but there are {k_BSKH.shape[1]} keys.")
    block_size = block_size or (length if length < 256 else 128)
    drops = dropout_rate > 0 and dropout_keys is not None
    options = _Options(causal, width**-0.5 if scale is None else scale, block_size, dropout_rate if drops else 0.0)

    padding = -length % block_size
    if padding:  # of a segment of its own: no real query sees it
        segment_ids_BT = jnp.zeros((batch, length), jnp.int32) if segment_ids_BT is None else segment_ids_BT
        segment_ids_BT = jnp.pad(segment_ids_BT, ((0, 0), (0, padding)), constant_values=jnp.iinfo(segment_ids_BT.dtype).min)
        q_BTNH, k_BSKH, v_BSKH = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q_BTNH, k_BSKH, v_BSKH))

    keys_BNT2 = None
    if (
        drops and dropout_keys is not None
    ):  # one key a vector of weights; places as `primitives.dropout` counts them in [B, K, G, T, S]
        places_NT = jnp.arange(heads)[:, None] * length + jnp.arange(length + padding)
        keys_BNT2 = primitives.fold_in(dropout_keys[:, None, None], places_NT).reshape(batch, kv_heads, -1, length + padding, 2)

    q_BKGTH = q_BTNH.reshape(batch, length + padding, kv_heads, -1, width).transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
    out_BKGTH = _attention(options, q_BKGTH, k_BKSH, v_BKSH, segment_ids_BT, keys_BNT2)
    out_BTNH = out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(batch, length + padding, heads, width)
    return out_BTNH[:, :length]


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options: _Options, q_BKGTH, k_BKSH, v_BKSH, segment_ids_BT, keys_BKGT2):
    return _attention_forward(options, q_BKGTH, k_BKSH, v_BKSH, segment_ids_BT, keys_BKGT2)[0]


def _attention_forward(options, q_BKGTH, k_BKSH, v_BKSH, segment_ids_BT, keys_BKGT2):
    def block(first, q_BKGtH, segments_Bt, keys_BKGt2, k_BKSH, v_BKSH, segments_BS):
        scores_BKGtS = _scores(options, first, q_BKGtH, k_BKSH, segments_Bt, segments_BS)
        top_BKGt1 = scores_BKGtS.max(-1, keepdims=True)
        weights_BKGtS = jnp.exp(scores_BKGtS - top_BKGt1)
        total_BKGt1 = weights_BKGtS.sum(-1, keepdims=True)
        weights_BKGtS = _drop(options, weights_BKGtS / total_BKGt1, keys_BKGt2)
        out_BKGtH = _values(weights_BKGtS.astype(v_BKSH.dtype), v_BKSH)
        return (out_BKGtH.astype(v_BKSH.dtype), (top_BKGt1 + jnp.log(total_BKGt1))[..., 0]), ()

    queries, keys = (q_BKGTH, segment_ids_BT, keys_BKGT2), (k_BKSH, v_BKSH, segment_ids_BT)
    (out_BKGTH, lse_BKGT), _ = _over_blocks(options, block, queries, keys)
    return out_BKGTH, (q_BKGTH, k_BKSH, v_BKSH, segment_ids_BT, keys_BKGT2, out_BKGTH, lse_BKGT)


def _attention_backward(options, residuals, g_BKGTH):
    q_BKGTH, k_BKSH, v_BKSH, segment_ids_BT, keys_BKGT2, out_BKGTH, lse_BKGT = residuals
    # What each query's gradient owes to the softmax's denominator: sum over s of weight * d(weight).
    owed_BKGT = (g_BKGTH.astype(jnp.float32) * out_BKGTH.astype(jnp.float32)).sum(-1)

    def block(first, q_BKGtH, segments_Bt, keys_BKGt2, g_BKGtH, lse_BKGt, owed_BKGt, k_BKSH, v_BKSH, segments_BS):
        scores_BKGtS = _scores(options, first, q_BKGtH, k_BKSH, segments_Bt, segments_BS)
        weights_BKGtS = jnp.exp(scores_BKGtS - lse_BKGt[..., None])
        dv_BKSH = _back_to_keys(_drop(options, weights_BKGtS, keys_BKGt2).astype(g_BKGtH.dtype), g_BKGtH)
        dweights_BKGtS = _drop(options, _products(g_BKGtH, v_BKSH), keys_BKGt2)
        dscores_BKGtS = (weights_BKGtS * (dweights_BKGtS - owed_BKGt[..., None]) * options.scale).astype(q_BKGtH.dtype)
        return (_values(dscores_BKGtS, k_BKSH),), (_back_to_keys(dscores_BKGtS, q_BKGtH), dv_BKSH)

    queries = (q_BKGTH, segment_ids_BT, keys_BKGT2, g_BKGTH, lse_BKGT, owed_BKGT)
    (dq_BKGTH,), (dk_BKSH, dv_BKSH) = _over_blocks(options, block, queries, (k_BKSH, v_BKSH, segment_ids_BT))
    return dq_BKGTH.astype(q_BKGTH.dtype), dk_BKSH.astype(k_BKSH.dtype), dv_BKSH.astype(v_BKSH.dtype), None, None


_attention.defvjp(_attention_forward, _attention_backward)


def _scores(options, first, q_BKGtH, k_BKSH, segments_Bt, segments_BS) -> jax.Array:
    """Scaled scores in float32, [B, K, G, t, S], of the queries from place `first` on; -inf where a query may not see."""
    scores_BKGtS = _products(q_BKGtH, k_BKSH) * options.scale
    rows, columns = scores_BKGtS.shape[-2:]
    if options.causal:
        later = first + jnp.arange(rows)[:, None] < jnp.arange(columns)
        scores_BKGtS = jnp.where(later, -jnp.inf, scores_BKGtS)
    if segments_Bt is not None:
        apart = segments_Bt[:, :, None] != segments_BS[:, None, :]
        scores_BKGtS = jnp.where(apart[:, None, None], -jnp.inf, scores_BKGtS)
    return scores_BKGtS


def _drop(options, weights_BKGtS, keys_BKGt2) -> jax.Array:
    if not options.dropout_rate:
        return weights_BKGtS
    keep = primitives.keep(keys_BKGt2, options.dropout_rate, weights_BKGtS.shape[-1])
    return jnp.where(keep, weights_BKGtS * primitives.kept_scale(options.dropout_rate), 0.0)


def _products(a_BKGtH, b_BKSH) -> jax.Array:
    """Each query with each key, [B, K, G, t, S] in float32; the G heads of a group are rows of one product."""
    batch, kv_heads, groups, rows, width = a_BKGtH.shape
    flat = a_BKGtH.reshape(batch, kv_heads, groups * rows, width)
    y = jax.lax.dot_general(flat, b_BKSH, (((3,), (3,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)
    return y.reshape(batch, kv_heads, groups, rows, -1)


def _values(weights_BKGtS, v_BKSH) -> jax.Array:
    """Sums over keys, [B, K, G, t, H] in float32."""
    batch, kv_heads, groups, rows, columns = weights_BKGtS.shape
    flat = weights_BKGtS.reshape(batch, kv_heads, groups * rows, columns)
    y = jax.lax.dot_general(flat, v_BKSH, (((3,), (2,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)
    return y.reshape(batch, kv_heads, groups, rows, -1)


def _back_to_keys(weights_BKGtS, g_BKGtH) -> jax.Array:
    """Sums over queries and over the heads of a group, [B, K, S, H] in float32."""
    batch, kv_heads, groups, rows, columns = weights_BKGtS.shape
    flat = weights_BKGtS.reshape(batch, kv_heads, groups * rows, columns)
    g_flat = g_BKGtH.reshape(batch, kv_heads, groups * rows, -1)
    return jax.lax.dot_general(flat, g_flat, (((2,), (2,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)


def _over_blocks(options: _Options, block: Callable, queries: tuple, keys: tuple) -> tuple[tuple, tuple]:
    """(results a query, joined along T; results a key, summed) of `block(first, *queries of a block, *keys they may see)`.

    Arrays [B, T] have their places on axis 1, others queries on 3, keys on 2.
    """
    length, size = queries[0].shape[3], options.block_size
    per_group = -(-(length // size) // _MAX_GROUPS)
    by_query: list[tuple] = []
    by_key: tuple = ()
    for start in reversed(
        range(0, length, per_group * size)
    ):  # the last group sees all keys: its sums are the first of the accumulators
        end = min(start + per_group * size, length)
        seen = end if options.causal else length
        part = tuple(_slice(x, 0, seen, 2) for x in keys)
        blocks = (end - start) // size
        if blocks == 1:
            of_queries, of_keys = block(start, *(_slice(x, start, end, 3) for x in queries), *part)
        else:
            of_queries, of_keys = _loop(block, start, size, tuple(_slice(x, start, end, 3) for x in queries), part)
        by_query.insert(0, of_queries)
        by_key = tuple(total.at[:, :, :seen].add(x) for total, x in zip(by_key, of_keys, strict=True)) if by_key else of_keys
    return tuple(jnp.concatenate(xs, axis=3) if len(xs) > 1 else xs[0] for xs in zip(*by_query, strict=True)), by_key


def _loop(block: Callable, start: int, size: int, queries: tuple, keys: tuple) -> tuple[tuple, tuple]:
    """`block` for each of several blocks of queries that see the same keys."""

    def split(x):
        axis = _axis(x, 3)
        blocks = x.shape[axis] // size
        return jnp.moveaxis(x.reshape(*x.shape[:axis], blocks, size, *x.shape[axis + 1 :]), axis, 0)

    def step(total, item):
        of_queries, of_keys = block(start + item[0] * size, *item[1], *keys)
        return jax.tree.map(jnp.add, total, of_keys), of_queries

    stacked = jax.tree.map(split, queries)
    count = jax.tree.leaves(stacked)[0].shape[0]
    first = jax.tree.map(lambda x: x[0], stacked)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(lambda *a: block(start, *a)[1], *first, *keys))
    of_keys, of_queries = jax.lax.scan(step, zeros, (jnp.arange(count), stacked))
    joined = tuple(jnp.moveaxis(x, 0, 3).reshape(*x.shape[1:4], count * size, *x.shape[5:]) for x in of_queries)
    return joined, of_keys


def _axis(x: jax.Array, axis: int) -> int:
    return 1 if x.ndim == 2 else axis


def _slice(x: jax.Array | None, start: int, end: int, axis: int) -> jax.Array | None:
    return x if x is None else jax.lax.slice_in_dim(x, start, end, axis=_axis(x, axis))
