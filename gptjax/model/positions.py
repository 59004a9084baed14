"""How a token knows its place."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import ModelConfig


def rotary_angles(positions_BT: jax.Array, config: ModelConfig) -> tuple[jax.Array, jax.Array]:
    """(cos, sin), each [B, T, 1, R/2] in float32: position p turns pair i of a head's first R numbers by
    p * rope_base**(-2i/R) (Su et al., 2021, equation 15), which `ROPE_SCALING` may slow down; yarn multiplies both.
    """
    width = config.rotary_dim
    frequencies = config.rope_base ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    if config.rope_scaling != "none":
        frequencies = frequencies * jnp.asarray(ROPE_SCALING[config.rope_scaling](config), jnp.float32)
    angles_BT1F = positions_BT[:, :, None, None].astype(jnp.float32) * frequencies
    cos, sin, factor = jnp.cos(angles_BT1F), jnp.sin(angles_BT1F), attention_factor(config)
    return (cos, sin) if factor == 1 else (cos * factor, sin * factor)


def angles_by_base(positions_BT: jax.Array, layers: tuple[ModelConfig, ...]) -> dict[Any, tuple[jax.Array, jax.Array]]:
    """`rotary_angles` once for all layers that turn alike, by `angles_key`; no entry for layers that turn nothing."""
    kinds = {angles_key(layer): layer for layer in layers if layer.position == "rotary"}
    return {key: rotary_angles(positions_BT, layer) for key, layer in kinds.items()}


def angles_key(layer: ModelConfig) -> tuple[Any, ...]:
    """What the angles of a model's layers may differ in."""
    return (layer.position, layer.rope_base, layer.rope_scaling)


def sinusoids(positions_BT: jax.Array, width: int) -> jax.Array:
    """[B, T, width] in float32: sin(p / 10000**(2i/width)) at 2i, cos of the same at 2i + 1 (Vaswani et al., 2017, section 3.5).

    An odd width has one sine more.
    """
    turns_BTF = positions_BT[..., None].astype(jnp.float32) * 10000.0 ** (-jnp.arange(0, width, 2, dtype=jnp.float32) / width)
    pairs_BTF2 = jnp.stack([jnp.sin(turns_BTF), jnp.cos(turns_BTF)], axis=-1)
    return pairs_BTF2.reshape(*positions_BT.shape, -1)[..., :width]


def rotate(x_BTNH: jax.Array, angles: tuple[jax.Array, jax.Array]) -> jax.Array:
    """Turns the pairs (x[i], x[i + R/2]) of each head's first R numbers, where `angles` has R/2 pairs; the rest of it stays.

    Llama's layout in Hugging Face files. Computed in float32, returned in x's dtype.
    """
    cos, sin = angles
    half = cos.shape[-1]
    first, second, rest = jnp.split(x_BTNH, (half, 2 * half), axis=-1)
    first, second = first.astype(jnp.float32), second.astype(jnp.float32)
    turned = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return jnp.concatenate([turned.astype(x_BTNH.dtype), rest], axis=-1)


# --- longer contexts: by what each frequency is multiplied, [R/2] in float64 ----------------------------------------------------


def _linear(config: ModelConfig) -> np.ndarray:
    """Position interpolation (Chen et al., 2023)."""
    return np.full(config.rotary_dim // 2, 1 / config.rope_scaling_factor)


def _dynamic(config: ModelConfig) -> np.ndarray:
    """NTK-aware scaling of the base, dynamic in the length L: base * (factor * L / original - factor + 1)**(R / (R - 2)).

    L is `max_seq_len`, not the length of the row at hand, so that a token's rotation depends on nothing after it, on no padding,
    and not on whether a cache is used; up to the original length nothing is changed.
    """
    width, factor = config.rotary_dim, config.rope_scaling_factor
    stretch = (factor * config.max_seq_len / _original(config) - factor + 1) ** (width / (width - 2))
    return stretch ** (-np.arange(0, width, 2) / width)


def _llama3(config: ModelConfig) -> np.ndarray:
    """Llama 3.1's (Dubey et al., 2024): by how often a frequency turns in the original context, a ramp between two bounds."""
    turns = _turns(config)
    low, high = config.rope_low_freq_factor, config.rope_high_freq_factor
    kept = np.clip((turns - low) / (high - low), 0, 1)
    return kept + (1 - kept) / config.rope_scaling_factor


def _yarn(config: ModelConfig) -> np.ndarray:
    """YaRN (Peng et al., 2023, section 3.2): a ramp over pairs, between the two that turn beta_fast and beta_slow times."""
    width = config.rotary_dim

    def pair(turns: float) -> float:
        return width * math.log(_original(config) / (turns * 2 * math.pi)) / (2 * math.log(config.rope_base))

    low, high = pair(config.rope_beta_fast), pair(config.rope_beta_slow)
    if config.rope_truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, width - 1)
    stretched = np.clip((np.arange(width // 2) - low) / ((high - low) or 0.001), 0, 1)
    return stretched / config.rope_scaling_factor + 1 - stretched


ROPE_SCALING: dict[str, Callable[[ModelConfig], np.ndarray]] = {
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
}


def attention_factor(config: ModelConfig) -> float:
    """What rotated queries and keys are multiplied by: YaRN's square root of 1 / temperature; 1 without it."""
    if config.rope_scaling != "yarn":
        return 1.0
    return config.rope_attention_factor or 0.1 * math.log(config.rope_scaling_factor) + 1.0


def _original(config: ModelConfig) -> int:
    return config.rope_original_max_seq_len or config.max_seq_len


def _turns(config: ModelConfig) -> np.ndarray:
    """How often each pair turns within the original context."""
    width = config.rotary_dim
    return _original(config) * config.rope_base ** (-np.arange(0, width, 2) / width) / (2 * math.pi)
