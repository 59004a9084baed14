"""Logits to a token: strategies as small functions over logits [B, V] in float32, composed in the order of `STRATEGIES`.

A token that a strategy rules out has logit -inf from there on, so each strategy sees the renormalised rest of those before it. Every
strategy depends on the values alone: tokens with equal logits stay or go together. All settings may be traced values.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import UserError


@dataclass(frozen=True)
class Sampling:
    """How the next token is drawn. `greedy`, or a temperature of 0: the most probable token, and the other settings don't matter."""

    temperature: float = 1.0  # logits are divided by it
    top_k: int = 0  # only the k most probable tokens; 0: all
    top_p: float = 1.0  # only the most probable tokens that together reach p; 1: all
    greedy: bool = False

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature={self.temperature} must be a finite number, at least 0.")
        if not 0 <= self.top_k < 2**31:
            raise UserError(f"top_k={self.top_k} must be at least 0 (0: all tokens).")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must be above 0 and at most 1 (1: all tokens).")

    def values(self) -> dict[str, Any]:
        """The settings as arrays of fixed types, so that none of their values asks for another compilation."""
        greedy = self.greedy or self.temperature == 0
        return {
            # Far below any gap between logits, and far above what a device flushes to 0.
            "temperature": np.float32(1.0 if greedy else max(self.temperature, 1e-30)),
            "top_k": np.int32(self.top_k),
            "top_p": np.float32(self.top_p),
            "greedy": np.bool_(greedy),
        }


def within_vocabulary(logits_BV: jax.Array, vocab_size: jax.Array) -> jax.Array:
    """Rules out the rows of the embedding that stand for no token: ids from `vocab_size` on."""
    return jnp.where(jnp.arange(logits_BV.shape[-1]) < vocab_size, logits_BV, -jnp.inf)


def apply_temperature(logits_BV: jax.Array, temperature: jax.Array) -> jax.Array:
    """Above 1 flatter, below 1 sharper. The highest logit is taken off first, so that a tiny temperature overflows nowhere that counts."""
    return (logits_BV - logits_BV.max(-1, keepdims=True)) / temperature


def keep_top_k(logits_BV: jax.Array, k: jax.Array) -> jax.Array:
    """Keeps the k highest logits (Fan et al., 2018) and those equal to the k-th; k = 0 keeps all."""

    def cut(logits_BV: jax.Array) -> jax.Array:
        descending_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        kth = jnp.minimum(k, logits_BV.shape[-1]) - 1
        return jnp.where(logits_BV >= descending_BV[:, kth, None], logits_BV, -jnp.inf)

    # The sort is the dear part; a cond spares it where the strategy is off.
    return jax.lax.cond(k > 0, cut, lambda x: x, logits_BV)


def keep_top_p(logits_BV: jax.Array, p: jax.Array) -> jax.Array:
    """Keeps the fewest most probable tokens whose probabilities reach p (Holtzman et al., 2020), and those as probable as the last.

    p = 1 keeps all.
    """

    def cut(logits_BV: jax.Array) -> jax.Array:
        descending_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        probabilities_BV = jax.nn.softmax(descending_BV, axis=-1)
        before_BV = jnp.cumsum(probabilities_BV, axis=-1) - probabilities_BV
        # The first is kept whatever its probability and p; its sum before is 0, or rounding's idea of it.
        needed_BV = (before_BV < p).at[:, 0].set(True)
        last_B1 = jnp.min(jnp.where(needed_BV, descending_BV, jnp.inf), axis=-1, keepdims=True)
        return jnp.where(logits_BV >= last_B1, logits_BV, -jnp.inf)

    return jax.lax.cond(p < 1, cut, lambda x: x, logits_BV)


# Applied from first to last, each with the setting of its name.
STRATEGIES = {"temperature": apply_temperature, "top_k": keep_top_k, "top_p": keep_top_p}


def filtered(logits_BV: jax.Array, values: dict[str, Any]) -> jax.Array:
    """The logits [B, V] that a token is drawn from, ruled-out tokens at -inf."""
    for name, strategy in STRATEGIES.items():
        logits_BV = strategy(logits_BV, values[name])
    return logits_BV


def draw(logits_BV: jax.Array, keys_B: jax.Array, values: dict[str, Any]) -> jax.Array:
    """One token a row, int32 [B], by that row's key alone; `values` as `Sampling.values` gives them."""
    return jax.lax.cond(
        values["greedy"],
        lambda: jnp.argmax(logits_BV, axis=-1).astype(jnp.int32),
        lambda: jax.vmap(jax.random.categorical)(keys_B, filtered(logits_BV, values)).astype(jnp.int32),
    )
