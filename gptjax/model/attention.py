"""Attention: projections, the key/value cache as an explicit value, and backends in a table. Axis letters: see decoder.py."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct

from gptjax.config import ModelConfig
from gptjax.model import primitives
from gptjax.model.blockwise import blockwise_attention
from gptjax.model.layers import Projection
from gptjax.model.positions import rotate


@struct.dataclass
class Cache:
    """Keys and values of the tokens seen so far, [L, B, S, K, H] each; slot s holds the token at position s.

    Slots past a row's last position hold leftovers of padding; the mask never lets a query see past its own position, and the
    row's next tokens overwrite them.
    """

    keys: jax.Array
    values: jax.Array

    @classmethod
    def empty(cls, config: ModelConfig, batch: int, length: int) -> Cache:
        shape = (config.num_layers, batch, length, config.num_kv_heads, config.head_dim)
        return cls(jnp.zeros(shape, config.dtype), jnp.zeros(shape, config.dtype))

    def write(self, keys_BTKH: jax.Array, values_BTKH: jax.Array, positions_BT: jax.Array) -> Cache:
        """The cache of one layer ([B, S, K, H] each) with the keys and values of T tokens put at their positions."""
        rows_B1 = jnp.arange(positions_BT.shape[0])[:, None]
        return Cache(
            self.keys.at[rows_B1, positions_BT].set(keys_BTKH, mode="drop"),
            self.values.at[rows_B1, positions_BT].set(values_BTKH, mode="drop"),
        )


def causal_mask(length: int, segment_ids_BT: jax.Array | None) -> jax.Array:
    """[B or 1, T, T], True where query t may see key s: not later, and in the same segment."""
    order_T = jnp.arange(length)
    mask_1TS = (order_T[:, None] >= order_T[None, :])[None]
    if segment_ids_BT is None:
        return mask_1TS
    return mask_1TS & (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])


def masked_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BTS: jax.Array,
    dropout_rate: float = 0.0,
    dropout_keys: Any = None,
) -> jax.Array:
    """Scaled dot-product attention, [B, T, N, H], with the whole score matrix held; softmax in float32.

    Query heads share K key heads.
    """
    batch, length, heads, width = q_BTNH.shape
    groups = heads // k_BSKH.shape[2]
    q_BTKGH = q_BTNH.reshape(batch, length, -1, groups, width)
    scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) * width**-0.5
    # A finite floor: exp(floor - max) is exactly 0, so a masked key changes no bit of the result.
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, jnp.finfo(jnp.float32).min)
    weights_BKGTS = jax.nn.softmax(scores_BKGTS, axis=-1)
    weights_BKGTS = primitives.dropout(weights_BKGTS, dropout_rate, dropout_keys)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS.astype(v_BSKH.dtype), v_BSKH)
    return out_BTKGH.reshape(batch, length, heads, width)


def _dense(q_BTNH: Any, k_BSKH: Any, v_BSKH: Any, segment_ids_BT: Any, dropout_rate: float, dropout_keys: Any) -> jax.Array:
    mask_BTS = causal_mask(q_BTNH.shape[1], segment_ids_BT)
    return masked_attention(q_BTNH, k_BSKH, v_BSKH, mask_BTS, dropout_rate, dropout_keys)


def _blockwise(q_BTNH: Any, k_BSKH: Any, v_BSKH: Any, segment_ids_BT: Any, dropout_rate: float, dropout_keys: Any) -> jax.Array:
    options = {"dropout_rate": dropout_rate, "dropout_keys": dropout_keys}
    return blockwise_attention(q_BTNH, k_BSKH, v_BSKH, segment_ids_BT=segment_ids_BT, **options)


def _cudnn(q_BTNH: Any, k_BSKH: Any, v_BSKH: Any, segment_ids_BT: Any, dropout_rate: float, dropout_keys: Any) -> jax.Array:
    mask = None if segment_ids_BT is None else causal_mask(q_BTNH.shape[1], segment_ids_BT)[:, None]
    return jax.nn.dot_product_attention(q_BTNH, k_BSKH, v_BSKH, mask=mask, is_causal=True, implementation="cudnn")


# Each takes (q_BTNH, k_BTKH, v_BTKH, segment_ids_BT or None, dropout_rate, dropout_keys or None) and is causal.
ATTENTION_BACKENDS = {"dense": _dense, "blockwise": _blockwise, "cudnn": _cudnn}


def choose_backend(config: ModelConfig) -> str:
    """The backend that `model.attention=auto` stands for. On accelerators, XLA fuses the dense form better."""
    if config.attention != "auto":
        return config.attention
    return "blockwise" if primitives.hand_written() else "dense"


class Attention(nn.Module):
    """Causal multi-head attention with grouped keys and values (Ainslie et al., 2023)."""

    config: ModelConfig

    @nn.compact
    def __call__(
        self,
        x_BTD: jax.Array,
        positions_BT: jax.Array,
        angles: Any,
        segment_ids_BT: jax.Array | None,
        dropout_keys: Any,
        cache: Cache | None,
    ) -> tuple[jax.Array, Cache | None]:
        c = self.config
        query = Projection(c, ("embed",), ("heads", "head_dim"), (c.num_heads, c.head_dim), c.attention_bias, name="query")
        key = Projection(c, ("embed",), ("kv_heads", "head_dim"), (c.num_kv_heads, c.head_dim), c.attention_bias, name="key")
        value = Projection(c, ("embed",), ("kv_heads", "head_dim"), (c.num_kv_heads, c.head_dim), c.attention_bias, name="value")
        output = Projection(
            c, ("heads", "head_dim"), ("embed",), (c.model_dim,), c.attention_bias, into_residual=True, name="output"
        )

        q_BTNH, k_BTKH, v_BTKH = query(x_BTD), key(x_BTD), value(x_BTD)
        if angles is not None:
            q_BTNH, k_BTKH = rotate(q_BTNH, angles), rotate(k_BTKH, angles)
        if cache is not None:
            cache = cache.write(k_BTKH, v_BTKH, positions_BT)
            seen_BTS = jnp.arange(cache.keys.shape[1]) <= positions_BT[:, :, None]
            out_BTNH = masked_attention(q_BTNH, cache.keys, cache.values, seen_BTS)
        else:
            drops = dropout_keys is not None and c.attention_dropout > 0
            backend = ATTENTION_BACKENDS[choose_backend(c)]
            out_BTNH = backend(q_BTNH, k_BTKH, v_BTKH, segment_ids_BT, c.attention_dropout, dropout_keys if drops else None)
        return output(out_BTNH), cache
