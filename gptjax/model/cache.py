"""The key/value cache as an explicit value, and attention over it. Axis letters: see decoder.py; C: keys of one block."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from flax import struct

from gptjax.config import ModelConfig
from gptjax.model import primitives
from gptjax.model.biases import of_places
from gptjax.model.scores import Learned, scored
from gptjax.parallel.sharding import constrain, parts

# Keys are seen in blocks of this many, whatever the cache's length: what a row's bits are made of does not depend on it.
BLOCK = 128

_FLOOR = float(jnp.finfo(jnp.float32).min)


@struct.dataclass
class Cache:
    """Keys and values of the tokens seen so far, [L, B, S, K, H] each; slot s holds the token at position s.

    Slots past a row's last position hold leftovers of padding; the mask never lets a query see past its own position, and the
    row's next tokens overwrite them.
    """

    keys: jax.Array
    values: jax.Array
    layer: int = struct.field(pytree_node=False, default=-1)  # the one that is read and written; -1: none

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, length: int) -> Cache:
        """For `length` positions and `batch` rows at least: lengths go up to whole blocks, rows to what the mesh divides."""
        rows = -(-batch // parts("batch")) * parts("batch")
        shape = (config.num_layers, rows, -(-length // BLOCK) * BLOCK, config.num_kv_heads, config.head_dim)
        return cls(_laid_out(jnp.zeros(shape, config.dtype)), _laid_out(jnp.zeros(shape, config.dtype)))

    @property
    def rows(self) -> int:
        return self.keys.shape[1]

    @property
    def length(self) -> int:
        return self.keys.shape[2]

    def of_layer(self, layer: int) -> Cache:
        return dataclasses.replace(self, layer=layer)

    def write(self, keys_BTKH: jax.Array, values_BTKH: jax.Array, positions_BT: jax.Array) -> Cache:
        """With the keys and values of T tokens of this layer put at their positions, in place where that is possible."""
        rows_B1 = jnp.arange(positions_BT.shape[0])[:, None]

        def put(cached: jax.Array, new_BTKH: jax.Array) -> jax.Array:
            return _laid_out(cached.at[self.layer, rows_B1, positions_BT].set(new_BTKH.astype(cached.dtype), mode="drop"))

        return dataclasses.replace(self, keys=put(self.keys, keys_BTKH), values=put(self.values, values_BTKH))

    def block(self, number: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Keys and values of this layer at positions number * BLOCK and on, [B, K, C, H] each."""

        def cut(cached: jax.Array) -> jax.Array:
            _, rows, _, heads, width = cached.shape
            start = (self.layer, 0, number * BLOCK, 0, 0)
            return jax.lax.dynamic_slice(cached, start, (1, rows, BLOCK, heads, width))[0].swapaxes(1, 2)

        return cut(self.keys), cut(self.values)


def _laid_out(cached: jax.Array) -> jax.Array:
    """Rows over the mesh's parts of the batch, heads over those of the key heads; whole where heads don't divide."""
    heads = "kv_heads" if cached.shape[3] % parts("kv_heads") == 0 else None
    rows = "batch" if cached.shape[1] % parts("batch") == 0 else None
    return constrain(cached, None, rows, None, heads, None)


def visible(before: jax.Array, window: int, prefix: jax.Array | None = None, anchors: jax.Array | None = None) -> jax.Array:
    """Whether a query may see a key that stands `before` places before it: none later but one of `prefix`; none `window` places
    (0: any) from it or more, but one of `anchors`.
    """
    seen = before >= 0 if prefix is None else (before >= 0) | prefix
    if not window:
        return seen
    near = (before if prefix is None else jnp.abs(before)) < window
    return seen & (near if anchors is None else near | anchors)


def cached_attention(
    q_BTNH: jax.Array,
    cache: Cache,
    positions_BT: jax.Array,
    *,
    scale: float,
    function: str = "",
    learned: Learned | None = None,
    prefix_BT: jax.Array | None = None,
    window: int = 0,
    softcap: float = 0.0,
    anchors: int = 0,
) -> jax.Array:
    """Attention [B, T, N, H] of queries at `positions_BT` over the layer's cache; scores and softmax in float32.

    `scale`, `function`, `window`, `softcap` and `learned` as for `blockwise_attention`, but "bias", which has the cache's length.
    `prefix_BT`: which of these tokens are seen by those before them; they stand from position 0 on. `anchors`: so many keys, from
    position 0 on, are seen from beyond the window.

    Blocks of keys one after the other with a running maximum and sum (Milakov and Gimelshein, 2018), as far as the last position
    of any row. A block that a row does not see leaves the row's numbers as they are, to the bit.
    """
    batch, length, heads, width = q_BTNH.shape
    kv_heads = cache.keys.shape[3]
    groups = heads // kv_heads
    q_BKMH = q_BTNH.reshape(batch, length, kv_heads, groups, width).swapaxes(1, 2).reshape(batch, kv_heads, -1, width)
    positions_BM = jnp.repeat(positions_BT, groups, axis=1)
    if length * groups == 1:  # as in kernels.py: a product of one row would take another road
        q_BKMH, positions_BM = jnp.repeat(q_BKMH, 2, axis=2), jnp.repeat(positions_BM, 2, axis=1)
    prefix_B = None if prefix_BT is None else jnp.where(prefix_BT, positions_BT + 1, 0).max(1)
    learned = learned or {}

    def scores(k_BKCH: jax.Array, first_key: jax.Array) -> jax.Array:
        if function:
            taken = {name: x.reshape(kv_heads, groups, *x.shape[1:]) for name, x in learned.items()}
            q_BKGTH = q_BTNH.reshape(batch, length, kv_heads, groups, width).transpose(0, 2, 3, 1, 4)
            scores_BKTGC = scored(function, taken, q_BKGTH, k_BKCH).swapaxes(2, 3)
            scores_BKMC = scores_BKTGC.reshape(batch, kv_heads, length * groups, BLOCK)
            scores_BKMC = jnp.broadcast_to(scores_BKMC, (*q_BKMH.shape[:3], BLOCK)) if length * groups == 1 else scores_BKMC
        else:
            scores_BKMC = jnp.einsum("BKMH,BKCH->BKMC", q_BKMH, k_BKCH, preferred_element_type=jnp.float32) * scale
        if softcap:
            scores_BKMC = softcap * jnp.tanh(scores_BKMC / softcap)
        if "bias" in learned:
            bias_BTKGC = of_places(learned["bias"], positions_BT, first_key, BLOCK).reshape(
                batch, length, kv_heads, groups, BLOCK
            )
            scores_BKMC = scores_BKMC + bias_BTKGC.swapaxes(1, 2).reshape(batch, kv_heads, length * groups, BLOCK)
        return scores_BKMC

    def add_block(number: jax.Array, sums: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        highest_BKM, total_BKM, out_BKMH = sums
        k_BKCH, v_BKCH = cache.block(number)
        places_C = number * BLOCK + jnp.arange(BLOCK)
        before_BMC = positions_BM[:, :, None] - places_C
        in_prefix = None if prefix_B is None else places_C < prefix_B[:, None, None]
        seen_BMC = visible(before_BMC, window, in_prefix, places_C < anchors if anchors else None)
        scores_BKMC = jnp.where(seen_BMC[:, None], scores(k_BKCH, number * BLOCK), _FLOOR)
        new_BKM = jnp.maximum(highest_BKM, scores_BKMC.max(-1))
        # exp(floor - highest) is exactly 0, but where nothing has been seen yet, whose sums the first seen key wipes out.
        weights_BKMC = jnp.exp(scores_BKMC - new_BKM[..., None])
        kept_BKM = jnp.exp(highest_BKM - new_BKM)
        total_BKM = total_BKM * kept_BKM + primitives.ordered_sum(weights_BKMC)[..., 0]
        seen_BKMH = jnp.einsum("BKMC,BKCH->BKMH", weights_BKMC.astype(v_BKCH.dtype), v_BKCH, preferred_element_type=jnp.float32)
        return new_BKM, total_BKM, out_BKMH * kept_BKM[..., None] + seen_BKMH

    shape = q_BKMH.shape[:-1]
    start = jnp.full(shape, _FLOOR), jnp.zeros(shape), jnp.zeros(q_BKMH.shape, jnp.float32)
    if "sink_bias" in learned:  # the first that is seen: its own weight, and no value
        sink_KG = learned["sink_bias"].astype(jnp.float32).reshape(kv_heads, groups)
        highest_BKM = jnp.broadcast_to(jnp.tile(sink_KG, (1, shape[2] // groups)), shape)
        start = highest_BKM, jnp.ones(shape), start[2]
    blocks = jnp.minimum(positions_BT.max() // BLOCK + 1, cache.keys.shape[2] // BLOCK)
    _, total_BKM, out_BKMH = jax.lax.fori_loop(0, blocks, add_block, start)
    out_BKMH = (out_BKMH / total_BKM[..., None]).astype(q_BTNH.dtype)[:, :, : length * groups]
    return out_BKMH.reshape(batch, kv_heads, length, groups, width).swapaxes(1, 2).reshape(q_BTNH.shape)
