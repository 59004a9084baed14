"""Logits to a token: processors, small functions over logits [B, V] in float32, composed in the order of `PROCESSORS`.

A token that a processor rules out has logit -inf from there on, so each processor sees the renormalised rest of those before it.
Which processors run is fixed when a call is compiled; their settings are traced values, which ask for no other compilation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from gptjax.generate.settings import GenerationConfig

Values = dict[str, Any]


@struct.dataclass
class History:
    """The rows so far, for processors that look back. Entries of `tokens_BW` at `lengths_B` and beyond mean nothing."""

    tokens_BW: jax.Array  # prompt and continuation
    lengths_B: jax.Array  # tokens in use
    prompt_lengths_B: jax.Array
    limits_B: jax.Array  # prompt and max_new_tokens: the length at which a row ends


def within_vocabulary(logits_BV: jax.Array, vocab_size: jax.Array) -> jax.Array:
    """Rules out the rows of the embedding that stand for no token: ids from `vocab_size` on."""
    return jnp.where(jnp.arange(logits_BV.shape[-1]) < vocab_size, logits_BV, -jnp.inf)


def apply_temperature(logits_BV: jax.Array, temperature: jax.Array) -> jax.Array:
    """Above 1 flatter, below 1 sharper. The highest logit is taken off first: a tiny temperature then overflows only to -inf."""
    return (logits_BV - logits_BV.max(-1, keepdims=True)) / temperature


def keep_top_k(logits_BV: jax.Array, k: jax.Array) -> jax.Array:
    """Keeps the k highest logits (Fan et al., 2018) and those equal to the k-th; k = 0 keeps all."""

    def cut(logits_BV: jax.Array) -> jax.Array:
        descending_BV = jnp.sort(logits_BV, axis=-1, descending=True)
        kth = jnp.minimum(k, logits_BV.shape[-1]) - 1
        return jnp.where(logits_BV >= descending_BV[:, kth, None], logits_BV, -jnp.inf)

    # The sort is the dear part; a cond spares it where k is 0.
    return jax.lax.cond(k > 0, cut, lambda x: x, logits_BV)


def keep_top_p(logits_BV: jax.Array, p: jax.Array) -> jax.Array:
    """Keeps the fewest most probable tokens whose probabilities reach p (Holtzman et al., 2020), and all that tie with the last.

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


@dataclass(frozen=True)
class Vocabulary:
    """The ids that logits stand for."""

    size: int  # of the tokenizer; ids from there on stand for nothing
    eos_ids: tuple[int, ...]  # those that end a text


@dataclass(frozen=True)
class Processor:
    """One entry of the table."""

    is_on: Callable[[GenerationConfig], bool]
    values: Callable[[GenerationConfig, Vocabulary], Any]  # arrays of fixed types and shapes
    apply: Callable[[jax.Array, History, Any], jax.Array]  # (logits [B, V], history, values) -> logits [B, V]


# Applied from first to last, where they are on.
PROCESSORS: dict[str, Processor] = {
    "temperature": Processor(
        lambda settings: not settings.greedy and settings.temperature != 1,
        # Far below any gap between logits, and far above what a device flushes to 0.
        lambda settings, vocabulary: np.float32(max(settings.temperature, 1e-30)),
        lambda logits_BV, history, value: apply_temperature(logits_BV, value),
    ),
    "top_k": Processor(
        lambda settings: not settings.greedy and settings.top_k > 0,
        lambda settings, vocabulary: np.int32(settings.top_k),
        lambda logits_BV, history, value: keep_top_k(logits_BV, value),
    ),
    "top_p": Processor(
        lambda settings: not settings.greedy and settings.top_p < 1,
        lambda settings, vocabulary: np.float32(settings.top_p),
        lambda logits_BV, history, value: keep_top_p(logits_BV, value),
    ),
}


def plan(settings: GenerationConfig, vocabulary: Vocabulary) -> tuple[tuple[str, ...], Values]:
    """(names of the processors that are on, in order: fixed for a compilation; their settings: traced)."""
    names = tuple(name for name, processor in PROCESSORS.items() if processor.is_on(settings))
    return names, {name: PROCESSORS[name].values(settings, vocabulary) for name in names}


def process(names: tuple[str, ...], values: Values, logits_BV: jax.Array, history: History) -> jax.Array:
    """The logits [B, V] that a token is drawn from, ruled-out tokens at -inf; `names` and `values` as `plan` gives them."""
    for name in names:
        logits_BV = PROCESSORS[name].apply(logits_BV, history, values[name])
    return logits_BV


def draw(logits_BV: jax.Array, keys_B: jax.Array, greedy: jax.Array) -> jax.Array:
    """One token a row, int32 [B], by that row's key alone; the most probable one where `greedy`, a scalar bool."""
    return jax.lax.cond(
        greedy,
        lambda: jnp.argmax(logits_BV, axis=-1).astype(jnp.int32),
        lambda: jax.vmap(jax.random.categorical)(keys_B, logits_BV).astype(jnp.int32),
    )
