"""How a token knows its place."""

from __future__ import annotations

import jax
import jax.numpy as jnp


def rotary_angles(positions_BT: jax.Array, head_dim: int, base: float) -> tuple[jax.Array, jax.Array]:
    """(cos, sin), each [B, T, 1, H/2] in float32: position p turns pair i by p * base**(-2i/H) (Su et al., 2021, equation 15)."""
    frequencies = base ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angles_BT1F = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies
    return jnp.cos(angles_BT1F), jnp.sin(angles_BT1F)


def rotate(x_BTNH: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns the pairs (x[i], x[i + H/2]): Llama's layout in Hugging Face files. Computed in float32, returned in x's dtype."""
    cos, sin = angles
    first, second = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return turned.astype(x_BTNH.dtype)
