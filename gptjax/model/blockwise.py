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
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gptjax.model import primitives
from gptjax.model.biases import of_block
from gptjax.model.scores import Learned, scored

# Groups of query blocks that are traced one by one, each with a prefix of keys of its own; blocks of one group share a loop
# and a prefix.
_MAX_GROUPS = 8


@dataclasses.dataclass(frozen=True)
class Options:
    """How scores become weights; 0 turns dropout, window and cap off."""

    scale: float  # of products
    causal: bool = True
    dropout_rate: float = 0.0
    window: int = 0
    softcap: float = 0.0
    function: str = ""  # a score that is no product: the name of its function


@dataclasses.dataclass(frozen=True)
class _Blocks(Options):
    size: int = 128  # queries in a block


class Keys(NamedTuple):
    """Keys and all that is known of them, [B, K, S, H] and [B, S]; None: there are no segments, no such keys."""

    keys: Any
    values: Any
    segments: Any
    prefix: Any  # seen from before them
    anchors: Any  # seen from beyond the window


def blockwise_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    *,
    segment_ids_BT: jax.Array | None = None,
    prefix_BT: jax.Array | None = None,
    anchors_BT: jax.Array | None = None,
    learned: Learned | None = None,
    causal: bool = True,
    scale: float | None = None,
    function: str = "",
    block_size: int = 0,
    dropout_rate: float = 0.0,
    dropout_keys: jax.Array | None = None,
    window: int = 0,
    softcap: float = 0.0,
) -> jax.Array:
    """Attention [B, T, N, H], N // K query heads sharing a key head; softmax in float32, the result as `v_BSKH`.

    Query and key t of a row stand at the same place. A query sees the keys of its own segment, when causal no later ones but
    those of `prefix_BT`. Scores are products times `scale` (None: H**-0.5), or those of `function` in scores.py.
    `block_size` (queries) 0 chooses. `dropout_keys` [B, 2] as for `primitives.dropout`, which drops the same weights. `window`: a
    query sees no key window places or more from its own, but those of `anchors_BT`. `softcap`: scores s become
    softcap * tanh(s / softcap). 0 turns both off. `learned`, [N, ...] each: what `function` takes; "bias" [N, 2T - 1], added
    by distance (see biases.py); "sink_bias" [N], a score in the softmax that takes weight to no key.
    """
    batch, length, heads, width = q_BTNH.shape
    kv_heads = k_BSKH.shape[2]
    if k_BSKH.shape[1] != length:
        raise ValueError(f"queries and keys must stand at the same {length} places, but there are {k_BSKH.shape[1]} keys.")
    block_size = block_size or (length if length < 256 else 128)
    drops = dropout_rate > 0 and dropout_keys is not None
    scale = width**-0.5 if scale is None else scale
    options = _Blocks(scale, causal, dropout_rate if drops else 0.0, window, softcap, function, block_size)
    learned = by_group(learned, kv_heads)

    padding = -length % block_size
    if padding:  # of a segment of its own: no real query sees it
        segment_ids_BT = jnp.zeros((batch, length), jnp.int32) if segment_ids_BT is None else segment_ids_BT
        segment_ids_BT = jnp.pad(segment_ids_BT, ((0, 0), (0, padding)), constant_values=jnp.iinfo(segment_ids_BT.dtype).min)
        q_BTNH, k_BSKH, v_BSKH = (jnp.pad(x, ((0, 0), (0, padding), (0, 0), (0, 0))) for x in (q_BTNH, k_BSKH, v_BSKH))
        prefix_BT, anchors_BT = (None if x is None else jnp.pad(x, ((0, 0), (0, padding))) for x in (prefix_BT, anchors_BT))
        if "bias" in learned:
            learned["bias"] = jnp.pad(learned["bias"], ((0, 0), (0, 0), (padding, padding)))

    keys_BNT2 = None
    if drops and dropout_keys is not None:
        # One key a vector of weights; places as `primitives.dropout` counts them in [B, K, G, T, S].
        places_NT = jnp.arange(heads)[:, None] * length + jnp.arange(length + padding)
        keys_BNT2 = primitives.fold_in(dropout_keys[:, None, None], places_NT).reshape(batch, kv_heads, -1, length + padding, 2)

    q_BKGTH = q_BTNH.reshape(batch, length + padding, kv_heads, -1, width).transpose(0, 2, 3, 1, 4)
    k_BKSH, v_BKSH = k_BSKH.transpose(0, 2, 1, 3), v_BSKH.transpose(0, 2, 1, 3)
    keys = Keys(k_BKSH, v_BKSH, segment_ids_BT, prefix_BT, anchors_BT)
    out_BKGTH = _attention(options, q_BKGTH, keys, learned, keys_BNT2)
    out_BTNH = out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(batch, length + padding, heads, -1)
    return out_BTNH[:, :length]


def by_group(learned: Learned | None, kv_heads: int) -> dict[str, jax.Array]:
    """Learned parameters [N, ...] as [K, G, ...]."""
    return {name: x.reshape(kv_heads, -1, *x.shape[1:]) for name, x in (learned or {}).items()}


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options: _Blocks, q_BKGTH, keys: Keys, learned, keys_BKGT2):
    return _attention_forward(options, q_BKGTH, keys, learned, keys_BKGT2)[0]


def _attention_forward(options, q_BKGTH, keys, learned, keys_BKGT2):
    def block(first, first_key, q_BKGtH, segments_Bt, keys_BKGt2, *keys):
        keys = Keys(*keys)
        scores_BKGtS, _ = scores(options, (first, first_key), q_BKGtH, segments_Bt, keys, learned)
        top_BKGt1 = scores_BKGtS.max(-1, keepdims=True)
        if "sink_bias" in learned:
            top_BKGt1 = jnp.maximum(top_BKGt1, sink(learned)[..., None])
        weights_BKGtS = jnp.exp(scores_BKGtS - top_BKGt1)
        total_BKGt1 = weights_BKGtS.sum(-1, keepdims=True)
        if "sink_bias" in learned:
            total_BKGt1 = total_BKGt1 + jnp.exp(sink(learned)[..., None] - top_BKGt1)
        weights_BKGtS = drop(options, weights_BKGtS / total_BKGt1, keys_BKGt2, first_key)
        out_BKGtH = values(weights_BKGtS.astype(keys.values.dtype), keys.values)
        return (out_BKGtH.astype(keys.values.dtype), (top_BKGt1 + jnp.log(total_BKGt1))[..., 0]), (), {}

    (out_BKGTH, lse_BKGT), _, _ = _over_blocks(options, block, (q_BKGTH, keys.segments, keys_BKGT2), keys)
    return out_BKGTH, (q_BKGTH, keys, learned, keys_BKGT2, out_BKGTH, lse_BKGT)


def _attention_backward(options, residuals, g_BKGTH):
    q_BKGTH, keys, learned, keys_BKGT2, out_BKGTH, lse_BKGT = residuals
    # What each query's gradient owes to the softmax's denominator: sum over s of weight * d(weight).
    owed_BKGT = (g_BKGTH.astype(jnp.float32) * out_BKGTH.astype(jnp.float32)).sum(-1)

    def block(first, first_key, q_BKGtH, segments_Bt, keys_BKGt2, g_BKGtH, lse_BKGt, owed_BKGt, *keys):
        row = (q_BKGtH, segments_Bt, keys_BKGt2, g_BKGtH, lse_BKGt, owed_BKGt)
        return backward_block(options, (first, first_key), row, Keys(*keys), learned)

    queries = (q_BKGTH, keys.segments, keys_BKGT2, g_BKGTH, lse_BKGT, owed_BKGT)
    (dq_BKGTH,), (dk_BKSH, dv_BKSH), dlearned = _over_blocks(options, block, queries, keys)
    dlearned = with_sink(dlearned, learned, lse_BKGT, owed_BKGT)
    dkeys = Keys(dk_BKSH.astype(keys.keys.dtype), dv_BKSH.astype(keys.values.dtype), None, None, None)
    return dq_BKGTH.astype(q_BKGTH.dtype), dkeys, dlearned, None


_attention.defvjp(_attention_forward, _attention_backward)


def sink(learned: Learned) -> jax.Array:
    """The sink's scores, [K, G, 1] in float32."""
    return learned["sink_bias"].astype(jnp.float32)[..., None]


def with_sink(dlearned: Any, learned: Learned, lse_BKGT: jax.Array, owed_BKGT: jax.Array) -> dict[str, jax.Array]:
    """Gradients of all that is learned, in its types, from those of the blocks: a sink is met by queries, not by keys. It carries
    nothing, so its weight w gives it -w * (sum over s of weight * d(weight)).
    """
    if "sink_bias" in learned:
        dlearned = dict(dlearned) | {"sink_bias": -(jnp.exp(sink(learned) - lse_BKGT) * owed_BKGT).sum((0, 3))}
    return {name: dlearned[name].astype(x.dtype) for name, x in learned.items()}


def backward_block(
    options: Options, places: tuple[Any, Any], row: tuple, keys: Keys, learned: Learned
) -> tuple[tuple, tuple, dict[str, jax.Array]]:
    """((d queries,), (d keys, d values), {name: d learned, but for the sink}) in float32, what a block of queries and one of keys
    owe to each other.

    `places`: of the first query and the first key. `row`: queries, their segments, dropout's keys, the output's gradient, the
    log-sum-exp, and sum over s of weight * d(weight).
    """
    q_BKGtH, segments_Bt, keys_BKGt2, g_BKGtH, lse_BKGt, owed_BKGt = row
    scores_BKGtS, slopes_BKGtS = scores(options, places, q_BKGtH, segments_Bt, keys, learned)
    weights_BKGtS = jnp.exp(scores_BKGtS - lse_BKGt[..., None])
    dv_BKSH = back_to_keys(drop(options, weights_BKGtS, keys_BKGt2, places[1]).astype(g_BKGtH.dtype), g_BKGtH)
    dweights_BKGtS = drop(options, products(g_BKGtH, keys.values), keys_BKGt2, places[1])
    dscores_BKGtS = weights_BKGtS * (dweights_BKGtS - owed_BKGt[..., None])
    dlearned = {}
    if "bias" in learned:
        rows, columns = dscores_BKGtS.shape[3:]
        _, back = jax.vjp(lambda bias: of_block(bias, places[0], places[1], rows, columns), learned["bias"])
        (dlearned["bias"],) = back(dscores_BKGtS.sum(0))
    if options.function:
        dscores_BKGtS = dscores_BKGtS if slopes_BKGtS is None else dscores_BKGtS * slopes_BKGtS
        taken = {name: x for name, x in learned.items() if name not in ("bias", "sink_bias")}
        inputs = (taken, q_BKGtH.astype(jnp.float32), keys.keys.astype(jnp.float32))
        _, back = jax.vjp(functools.partial(scored, options.function), *inputs)
        of_function, dq_BKGtH, dk_BKSH = back(dscores_BKGtS)
        return (dq_BKGtH,), (dk_BKSH, dv_BKSH), dlearned | {name: x.astype(jnp.float32) for name, x in of_function.items()}
    dscores_BKGtS = dscores_BKGtS * options.scale
    dscores_BKGtS = (dscores_BKGtS if slopes_BKGtS is None else dscores_BKGtS * slopes_BKGtS).astype(q_BKGtH.dtype)
    return (values(dscores_BKGtS, keys.keys),), (back_to_keys(dscores_BKGtS, q_BKGtH), dv_BKSH), dlearned


def scores(options, places, q_BKGtH, segments_Bt, keys: Keys, learned) -> tuple[jax.Array, jax.Array | None]:
    """(scores in float32, capped, then with what is added by distance, [B, K, G, t, S], -inf where a query may not see; the cap's
    slope, None without).

    `places`: queries stand at places[0], places[0] + 1, ..., keys at places[1], ...
    """
    if options.function:
        scores_BKGtS = scored(options.function, learned, q_BKGtH, keys.keys)
    else:
        scores_BKGtS = products(q_BKGtH, keys.keys) * options.scale
    slopes_BKGtS = None
    if options.softcap:
        tanh_BKGtS = jnp.tanh(scores_BKGtS / options.softcap)
        scores_BKGtS, slopes_BKGtS = options.softcap * tanh_BKGtS, 1 - jnp.square(tanh_BKGtS)
    rows, columns = scores_BKGtS.shape[-2:]
    if "bias" in learned:
        scores_BKGtS = scores_BKGtS + of_block(learned["bias"], places[0], places[1], rows, columns)
    before_tS = (places[0] + jnp.arange(rows))[:, None] - (places[1] + jnp.arange(columns))
    if options.causal:
        scores_BKGtS = jnp.where(_but(before_tS < 0, keys.prefix), -jnp.inf, scores_BKGtS)
    if options.window:
        far_tS = (before_tS if keys.prefix is None else jnp.abs(before_tS)) >= options.window
        scores_BKGtS = jnp.where(_but(far_tS, keys.anchors), -jnp.inf, scores_BKGtS)
    if segments_Bt is not None:
        apart = segments_Bt[:, :, None] != keys.segments[:, None, :]
        scores_BKGtS = jnp.where(apart[:, None, None], -jnp.inf, scores_BKGtS)
    return scores_BKGtS, slopes_BKGtS


def _but(hidden_tS: jax.Array, marked_BS: jax.Array | None) -> jax.Array:
    """What is hidden but for the marked keys, to broadcast with [B, K, G, t, S]."""
    return hidden_tS if marked_BS is None else (hidden_tS & ~marked_BS[:, None, :])[:, None, None]


def drop(options: Options, weights_BKGtS: jax.Array, keys_BKGt2: jax.Array | None, first_key) -> jax.Array:
    """Dropout of the weights for the keys from place `first_key` on."""
    if not options.dropout_rate or keys_BKGt2 is None:
        return weights_BKGtS
    keep = primitives.keep(keys_BKGt2, options.dropout_rate, weights_BKGtS.shape[-1], first_key)
    return jnp.where(keep, weights_BKGtS * primitives.kept_scale(options.dropout_rate), 0.0)


def products(a_BKGtH, b_BKSH) -> jax.Array:
    """Each query with each key, [B, K, G, t, S] in float32; the G heads of a group are rows of one product."""
    batch, kv_heads, groups, rows, width = a_BKGtH.shape
    flat = a_BKGtH.reshape(batch, kv_heads, groups * rows, width)
    y = jax.lax.dot_general(flat, b_BKSH, (((3,), (3,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)
    return y.reshape(batch, kv_heads, groups, rows, -1)


def values(weights_BKGtS, v_BKSH) -> jax.Array:
    """Sums over keys, [B, K, G, t, H] in float32."""
    batch, kv_heads, groups, rows, columns = weights_BKGtS.shape
    flat = weights_BKGtS.reshape(batch, kv_heads, groups * rows, columns)
    y = jax.lax.dot_general(flat, v_BKSH, (((3,), (2,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)
    return y.reshape(batch, kv_heads, groups, rows, -1)


def back_to_keys(weights_BKGtS, g_BKGtH) -> jax.Array:
    """Sums over queries and over the heads of a group, [B, K, S, H] in float32."""
    batch, kv_heads, groups, rows, columns = weights_BKGtS.shape
    flat = weights_BKGtS.reshape(batch, kv_heads, groups * rows, columns)
    g_flat = g_BKGtH.reshape(batch, kv_heads, groups * rows, -1)
    return jax.lax.dot_general(flat, g_flat, (((2,), (2,)), ((0, 1), (0, 1))), preferred_element_type=jnp.float32)


def _over_blocks(options: _Blocks, block: Callable, queries: tuple, keys: Keys) -> tuple[tuple, tuple, Any]:
    """(results a query, joined along T; results a key, summed; results of all, summed) of `block(place of the first query, of the
    first key, *queries of a block, *keys they may see)`.

    Arrays [B, T] have their places on axis 1, others queries on 3, keys on 2.
    """
    length, size = queries[0].shape[3], options.size
    per_group = -(-(length // size) // _MAX_GROUPS)
    by_query: list[tuple] = []
    by_key: tuple = ()
    of_all: Any = None
    # Without a window the last group sees all keys: its sums are the first of the accumulators.
    for start in reversed(range(0, length, per_group * size)):
        end = min(start + per_group * size, length)
        low = max(0, start - options.window + 1) if options.window and keys.anchors is None else 0
        high = end if options.causal and keys.prefix is None else length
        part = tuple(_slice(x, low, high, 2) for x in keys)
        rows = tuple(_slice(x, start, end, 3) for x in queries)
        if end - start == size:
            of_queries, of_keys, of_both = block(start, low, *rows, *part)
        else:
            shifted = functools.partial(lambda low, first, *arrays: block(first, low, *arrays), low)
            of_queries, of_keys, of_both = _loop(shifted, start, size, rows, part)
        by_query.insert(0, of_queries)
        of_all = of_both if of_all is None else jax.tree.map(jnp.add, of_all, of_both)
        if by_key:
            by_key = tuple(total.at[:, :, low:high].add(x) for total, x in zip(by_key, of_keys, strict=True))
        else:
            by_key = tuple(jnp.pad(x, ((0, 0), (0, 0), (low, length - high), (0, 0))) for x in of_keys)
    joined = tuple(jnp.concatenate(xs, axis=3) if len(xs) > 1 else xs[0] for xs in zip(*by_query, strict=True))
    return joined, by_key, of_all


def _loop(block: Callable, start: int, size: int, queries: tuple, keys: tuple) -> tuple[tuple, tuple, Any]:
    """`block` for each of several blocks of queries that see the same keys."""

    def split(x):
        axis = _axis(x, 3)
        blocks = x.shape[axis] // size
        return jnp.moveaxis(x.reshape(*x.shape[:axis], blocks, size, *x.shape[axis + 1 :]), axis, 0)

    def step(total, item):
        of_queries, *sums = block(start + item[0] * size, *item[1], *keys)
        return jax.tree.map(jnp.add, total, sums), of_queries

    stacked = jax.tree.map(split, queries)
    count = jax.tree.leaves(stacked)[0].shape[0]
    first = jax.tree.map(lambda x: x[0], stacked)
    sums = jax.eval_shape(lambda *a: list(block(start, *a)[1:]), *first, *keys)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), sums)
    (of_keys, of_both), of_queries = jax.lax.scan(step, zeros, (jnp.arange(count), stacked))
    joined = tuple(jnp.moveaxis(x, 0, 3).reshape(*x.shape[1:4], count * size, *x.shape[5:]) for x in of_queries)
    return joined, of_keys, of_both


def _axis(x: jax.Array, axis: int) -> int:
    return 1 if x.ndim == 2 else axis


def _slice(x: jax.Array | None, start: int, end: int, axis: int) -> jax.Array | None:
    return x if x is None else jax.lax.slice_in_dim(x, start, end, axis=_axis(x, axis))
