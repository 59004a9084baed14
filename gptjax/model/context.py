"""Causal attention over a sequence that the devices of a mesh axis share out. Axis letters: see decoder.py.

Between layers, device r of c holds the r-th part of every row. For attention, a row is cut into 2c chunks, and device r takes
the queries of chunks r and 2c - 1 - r: an early chunk, which sees little, with a late one, which sees much, so that all
devices have the same number of (query, key) pairs to visit. Queries travel there and results back by collective permutes; keys
and values are gathered (Dubey et al., 2024, "The Llama 3 Herd of Models", section 3.3.2, cuts and gathers the same way), and
gathered again in the backward pass rather than kept. A device's memory grows with T, never with T * T.

Everything here but `visits` runs inside `jax.shard_map`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.model import primitives
from gptjax.model.blockwise import Keys, Options, backward_block, by_group, drop, scores, sink, values, with_sink
from gptjax.model.scores import Learned

# Queries, and keys, of one visit at most: scores of 512 x 512 floats a head take 1 MiB.
_LARGEST_BLOCK = 512


@dataclasses.dataclass(frozen=True)
class Shared:
    """A sequence of `length` tokens that the `parts` devices of the mesh axis `axis` share out."""

    axis: str
    parts: int
    length: int

    @property
    def chunk(self) -> int:
        return self.length // (2 * self.parts)


@dataclasses.dataclass(frozen=True)
class _Zigzag(Options):
    shared: Shared = Shared("", 1, 0)
    size: int = 1  # queries, and keys, of a block


def context_attention(
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    shared: Shared,
    *,
    segment_ids_BT: jax.Array | None = None,
    prefix_BT: jax.Array | None = None,
    anchors_BT: jax.Array | None = None,
    learned: Learned | None = None,
    scale: float | None = None,
    function: str = "",
    dropout_rate: float = 0.0,
    dropout_keys: jax.Array | None = None,
    first_head: jax.Array | int = 0,
    window: int = 0,
    softcap: float = 0.0,
) -> jax.Array:
    """As `blockwise_attention`, of this device's part of each row ([B, T / c, ...] throughout) to its part of the result.

    What is learned is of this device's heads and whole along the length ("bias": [N, 2T - 1]); its gradients are of this device's
    queries, for `shard_map` to add up. `dropout_keys` [B, 2] drop the weights that they drop where one device has everything; for
    that, `first_head` is the number of this device's first query head.
    """
    batch, length, heads, width = q_BTNH.shape
    kv_heads = k_BTKH.shape[2]
    drops = dropout_rate > 0 and dropout_keys is not None
    size = block_size(shared.chunk)
    scale = width**-0.5 if scale is None else scale
    options = _Zigzag(scale, True, dropout_rate if drops else 0.0, window, softcap, function, shared, size)

    keys_BKGT2 = None
    if drops and dropout_keys is not None:
        places_NT = (first_head + jnp.arange(heads))[:, None] * shared.length + own_places(shared)
        keys_BNT2 = primitives.fold_in(dropout_keys[:, None, None], places_NT)
        keys_BKGT2 = keys_BNT2.reshape(batch, kv_heads, -1, length, 2)
    q_BTNH = to_zigzag(q_BTNH, shared)
    q_BKGTH = q_BTNH.reshape(batch, length, kv_heads, -1, width).transpose(0, 2, 3, 1, 4)
    k_BKTH, v_BKTH = k_BTKH.transpose(0, 2, 1, 3), v_BTKH.transpose(0, 2, 1, 3)
    keys = Keys(k_BKTH, v_BKTH, segment_ids_BT, prefix_BT, anchors_BT)
    out_BKGTH = _attention(options, q_BKGTH, keys, by_group(learned, kv_heads), keys_BKGT2)
    return from_zigzag(out_BKGTH.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, -1), shared)


# --- who has what --------------------------------------------------------------------------


def _home(chunk: int, parts: int) -> int:
    return min(chunk, 2 * parts - 1 - chunk)


def own_places(shared: Shared) -> jax.Array:
    """[T / c]: the places in the row of this device's queries, in the order that `to_zigzag` gives."""
    device, chunk = jax.lax.axis_index(shared.axis), shared.chunk
    within = jnp.arange(chunk)
    return jnp.concatenate([device * chunk + within, (2 * shared.parts - 1 - device) * chunk + within])


def to_zigzag(x: jax.Array, shared: Shared) -> jax.Array:
    """From chunks 2r and 2r + 1 of each row, [B, T / c, ...], to chunks r and 2c - 1 - r."""
    even, odd = (
        jax.lax.ppermute(half, shared.axis, [(r, _home(2 * r + parity, shared.parts)) for r in range(shared.parts)])
        for parity, half in enumerate(jnp.split(x, 2, axis=1))
    )
    # Chunk r is even where r is; its partner 2c - 1 - r then is odd.
    mine = jax.lax.axis_index(shared.axis) % 2 == 0
    return jnp.concatenate([jnp.where(mine, even, odd), jnp.where(mine, odd, even)], axis=1)


def from_zigzag(x: jax.Array, shared: Shared) -> jax.Array:
    """The way back of `to_zigzag`."""
    early, late = jnp.split(x, 2, axis=1)
    mine = jax.lax.axis_index(shared.axis) % 2 == 0
    halves = (jnp.where(mine, early, late), jnp.where(mine, late, early))
    back = [
        jax.lax.ppermute(half, shared.axis, [(_home(2 * r + parity, shared.parts), r) for r in range(shared.parts)])
        for parity, half in enumerate(halves)
    ]
    return jnp.concatenate(back, axis=1)


def gather(x: jax.Array, shared: Shared, dim: int) -> jax.Array:
    """Whole rows from every device's part of them along `dim`."""
    return jax.lax.all_gather(x, shared.axis, axis=dim, tiled=True)


def block_size(chunk: int) -> int:
    """The largest number up to 512 that divides a chunk."""
    return next(size for size in range(min(chunk, _LARGEST_BLOCK), 0, -1) if chunk % size == 0)


def visits(parts: int, length: int, size: int, window: int = 0, prefix: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """(first, number), each [c, 2C / size]: for each device and block of its own queries, the blocks of keys that hold anything
    which the block may see. `prefix`: all of them, since keys that are seen from before may stand anywhere.
    """
    chunk = length // (2 * parts)
    devices = np.arange(parts)[:, None]
    within = np.arange(0, chunk, size)
    starts = np.concatenate([devices * chunk + within, (2 * parts - 1 - devices) * chunk + within], axis=1)
    if prefix:
        return np.zeros_like(starts, np.int32), np.full_like(starts, length // size, np.int32)
    first = np.maximum(0, starts - window + 1) // size if window else np.zeros_like(starts)
    return first.astype(np.int32), (starts // size + 1 - first).astype(np.int32)


def _pairs(options: _Zigzag, prefix: bool, anchors: bool) -> jax.Array:
    """int32 [visits, 2]: this device's (block of own queries, block of keys), of the same number on all devices.

    A window leaves the first device, whose early chunk has little before it, some to spare: it looks from its first queries at
    the row's last keys, which they may not see, so that nothing comes of it.
    """
    shared = options.shared
    first, number = visits(shared.parts, shared.length, options.size, 0 if anchors else options.window, prefix)
    device = jax.lax.axis_index(shared.axis)
    order = jnp.arange(number.sum(1).max())
    first_q, ends_q = jnp.asarray(first)[device], jnp.asarray(number.cumsum(1, dtype=np.int32))[device]
    begins_q = ends_q - jnp.asarray(number)[device]
    own = jnp.searchsorted(ends_q, order, side="right")
    spare = own == len(ends_q)
    own = jnp.where(spare, 0, own)
    key = jnp.where(spare, shared.length // options.size - 1, first_q[own] + order - begins_q[own])
    return jnp.stack([own, key], axis=1)


# --- the products --------------------------------------------------------------------------


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _attention(options, q_BKGTH, keys: Keys, learned, keys_BKGT2):
    return _attention_forward(options, q_BKGTH, keys, learned, keys_BKGT2)[0]


def _attention_forward(options, q_BKGTH, keys, learned, keys_BKGT2):
    """Queries are in zig-zag order, keys, values and segments in that of the row; online softmax as in FlashAttention-2."""
    visit = _Visitor(options, keys)
    rows = visit.blocks((q_BKGTH, visit.own_segments, keys_BKGT2))

    def step(totals, pair):
        (q_BKGtH, segments_Bt, keys_BKGt2), some, places = visit(rows, pair)
        out_BKGtH, top_BKGt, total_BKGt = (_take(x, pair[0]) for x in totals)
        scores_BKGtS, _ = scores(options, places, q_BKGtH, segments_Bt, some, learned)
        new_top_BKGt = jnp.maximum(top_BKGt, scores_BKGtS.max(-1))
        weights_BKGtS = jnp.exp(scores_BKGtS - new_top_BKGt[..., None])
        shrink_BKGt = jnp.exp(top_BKGt - new_top_BKGt)
        total_BKGt = total_BKGt * shrink_BKGt + weights_BKGtS.sum(-1)
        weights_BKGtS = drop(options, weights_BKGtS, keys_BKGt2, places[1])
        out_BKGtH = out_BKGtH * shrink_BKGt[..., None] + values(weights_BKGtS.astype(some.values.dtype), some.values)
        return tuple(_put(x, new, pair[0]) for x, new in zip(totals, (out_BKGtH, new_top_BKGt, total_BKGt), strict=True)), None

    out = jnp.zeros((*rows[0].shape[:-1], keys.values.shape[-1]), jnp.float32)
    # A finite floor: where a block shows a query nothing, exp(-inf - floor) is 0, not NaN.
    top = jnp.full(rows[0].shape[:-1], jnp.finfo(jnp.float32).min / 2)
    total = jnp.zeros_like(top)
    if "sink_bias" in learned:  # the first that is seen: its own weight, and no value
        top, total = jnp.broadcast_to(sink(learned), top.shape), jnp.ones_like(top)
    (out, top, total), _ = jax.lax.scan(step, (out, top, total), visit.pairs)
    out_BKGTH = _join((out / total[..., None]).astype(keys.values.dtype))
    lse_BKGT = _join(top + jnp.log(total))
    return out_BKGTH, (q_BKGTH, keys, learned, keys_BKGT2, out_BKGTH, lse_BKGT)


def _attention_backward(options, residuals, g_BKGTH):
    q_BKGTH, keys, learned, keys_BKGT2, out_BKGTH, lse_BKGT = residuals
    owed_BKGT = (g_BKGTH.astype(jnp.float32) * out_BKGTH.astype(jnp.float32)).sum(-1)
    visit = _Visitor(options, keys)
    rows = visit.blocks((q_BKGTH, visit.own_segments, keys_BKGT2, g_BKGTH, lse_BKGT, owed_BKGT))

    def step(totals, pair):
        row, some, places = visit(rows, pair)
        (dq_BKGtH,), of_keys, of_both = backward_block(options, places, row, some, learned)
        (dq, *by_key), of_all = totals
        by_key = (visit.add_to_keys(total, new, pair[1]) for total, new in zip(by_key, of_keys, strict=True))
        of_all = {name: total + of_both[name] for name, total in of_all.items()}
        return ((_put(dq, _take(dq, pair[0]) + dq_BKGtH, pair[0]), *by_key), of_all), None

    dq = jnp.zeros(rows[0].shape, jnp.float32)
    dk_BKSH, dv_BKSH = (jnp.zeros(x.shape, jnp.float32) for x in (visit.whole.keys, visit.whole.values))
    dlearned = {name: jnp.zeros(x.shape, jnp.float32) for name, x in learned.items() if name != "sink_bias"}
    ((dq, dk_BKSH, dv_BKSH), dlearned), _ = jax.lax.scan(step, ((dq, dk_BKSH, dv_BKSH), dlearned), visit.pairs)
    dk_BKTH, dv_BKTH = (jax.lax.psum_scatter(x, options.shared.axis, scatter_dimension=2, tiled=True) for x in (dk_BKSH, dv_BKSH))
    dkeys = Keys(dk_BKTH.astype(keys.keys.dtype), dv_BKTH.astype(keys.values.dtype), None, None, None)
    return _join(dq).astype(q_BKGTH.dtype), dkeys, with_sink(dlearned, learned, lse_BKGT, owed_BKGT), None


_attention.defvjp(_attention_forward, _attention_backward)


class _Visitor:
    """This device's visits to blocks of the whole row's keys and values."""

    def __init__(self, options: _Zigzag, keys: Keys) -> None:
        shared = options.shared
        self.size = options.size
        self.places_T = own_places(shared)
        self.pairs = _pairs(options, keys.prefix is not None, keys.anchors is not None)
        self.whole = Keys(*(None if x is None else gather(x, shared, 2 if x.ndim == 4 else 1) for x in keys))
        self.own_segments = None if self.whole.segments is None else self.whole.segments[:, self.places_T]

    def blocks(self, arrays: tuple) -> Any:
        """Arrays of this device's queries, cut into blocks on a leading axis; [B, T] has its places on axis 1, others on 3."""

        def cut(x: jax.Array) -> jax.Array:
            axis = 1 if x.ndim == 2 else 3
            return jnp.moveaxis(x.reshape(*x.shape[:axis], -1, self.size, *x.shape[axis + 1 :]), axis, 0)

        return jax.tree.map(cut, arrays)

    def __call__(self, rows: Any, pair: jax.Array) -> tuple[Any, Keys, tuple[jax.Array, jax.Array]]:
        """(arrays of the pair's queries, its keys, the places where the two begin)."""
        first_key = pair[1] * self.size

        def cut(x: jax.Array | None) -> jax.Array | None:
            return None if x is None else jax.lax.dynamic_slice_in_dim(x, first_key, self.size, 2 if x.ndim == 4 else 1)

        row = jax.tree.map(lambda x: _take(x, pair[0]), rows)
        return row, Keys(*map(cut, self.whole)), (self.places_T[pair[0] * self.size], first_key)

    def add_to_keys(self, total_BKSH: jax.Array, new_BKSH: jax.Array, block: jax.Array) -> jax.Array:
        first_key = block * self.size
        old_BKSH = jax.lax.dynamic_slice_in_dim(total_BKSH, first_key, self.size, 2)
        return jax.lax.dynamic_update_slice_in_dim(total_BKSH, old_BKSH + new_BKSH, first_key, 2)


def _take(x: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_index_in_dim(x, index, 0, keepdims=False)


def _put(x: jax.Array, new: jax.Array, index: jax.Array) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(x, new, index, 0)


def _join(x: jax.Array) -> jax.Array:
    """[blocks, B, K, G, t, ...] to [B, K, G, T, ...]."""
    x = jnp.moveaxis(x, 0, 3)
    return x.reshape(*x.shape[:3], -1, *x.shape[5:])
