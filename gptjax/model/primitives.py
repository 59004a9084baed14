"""The arithmetic under the modules."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def linear(x: jax.Array, kernel: jax.Array, contracted: int, dtype: Any) -> jax.Array:
    return jnp.tensordot(x.astype(dtype), kernel.astype(dtype), axes=contracted)


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array | None, epsilon: float) -> jax.Array:
    y = x.astype(jnp.float32)
    y = y - y.mean(-1, keepdims=True)
    y = y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + epsilon) * scale
    return (y if bias is None else y + bias).astype(x.dtype)


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    y = x.astype(jnp.float32)
    return (y * jax.lax.rsqrt(jnp.mean(y * y, -1, keepdims=True) + epsilon) * scale).astype(x.dtype)


def gelu(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: jax.Array) -> jax.Array:
    return jax.nn.gelu(x, approximate=True)


def embed(table: jax.Array, ids: jax.Array) -> jax.Array:
    return table[ids]


def fold_in(keys: Any, number: Any) -> Any:
    return jax.vmap(lambda key: jax.random.fold_in(key, number))(keys)


def dropout(x: jax.Array, rate: float, keys: Any) -> jax.Array:
    """Row b of x is dropped by key b, so that the result does not depend on how a batch is split. No keys: no dropout."""
    if rate == 0 or keys is None:
        return x
    keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, x.shape[1:]))(keys)
    return jnp.where(keep, x / (1 - rate), 0).astype(x.dtype)
