"""Processors that look at one distribution: temperature, and those that keep a part of it.

Tokens with equal logits stay together or go together. transformers does the same in all but top-p, top-h and min_tokens_to_keep,
which cut through ties in the order of ids.

A part is everything from some threshold up. The threshold is found bit by bit, by 32 sums over the vocabulary: XLA's sort on a
CPU takes tens of times as long. `least`, where it is given, is a number of tokens that stay in any case.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

# Top-h weighs the entropy of this many tokens, as transformers does.
TOP_H_TOKENS = 100


def apply_temperature(logits_BV: jax.Array, temperature: jax.Array) -> jax.Array:
    """Above 1 flatter, below 1 sharper. The highest logit is taken off first: a tiny temperature then overflows only to -inf."""
    return (logits_BV - logits_BV.max(-1, keepdims=True)) / temperature


def keep_top_k(logits_BV: jax.Array, k: jax.Array, least: jax.Array | None = None) -> jax.Array:
    """Keeps the k highest logits (Fan et al., 2018) and those equal to the k-th, at least one."""
    keys_BV = _ordered(logits_BV)
    k = k if least is None else jnp.maximum(k, least)
    return jnp.where(keys_BV >= _kth_highest(keys_BV, k), logits_BV, -jnp.inf)


def keep_top_p(logits_BV: jax.Array, p: jax.Array, least: jax.Array | None = None) -> jax.Array:
    """Keeps the fewest most probable tokens whose probabilities reach p (Holtzman et al., 2020), and ties of the last."""
    return _keep_highest(logits_BV, logits_BV, jax.nn.softmax(logits_BV, axis=-1), p, least)


def keep_typical(logits_BV: jax.Array, mass: jax.Array, least: jax.Array | None = None) -> jax.Array:
    """Keeps the fewest tokens with surprise nearest the entropy whose probabilities reach `mass` (Meister et al., 2023)."""
    log_probs_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    entropy_B1 = _entropy_terms(log_probs_BV).sum(-1, keepdims=True)
    return _keep_highest(logits_BV, -jnp.abs(log_probs_BV + entropy_B1), jnp.exp(log_probs_BV), mass, least)


def keep_min_p(logits_BV: jax.Array, min_p: jax.Array, least: jax.Array | None = None) -> jax.Array:
    """Keeps tokens at least `min_p` times as probable as the most probable (Nguyen et al., 2024)."""
    return _keep(logits_BV, jnp.exp(logits_BV - logits_BV.max(-1, keepdims=True)) >= min_p, least)


def keep_above_epsilon(logits_BV: jax.Array, epsilon: jax.Array, least: jax.Array | None = None) -> jax.Array:
    """Keeps tokens of at least the probability `epsilon`, and the most probable (Hewitt et al., 2022)."""
    return _keep(logits_BV, jax.nn.softmax(logits_BV, axis=-1) >= epsilon, least)


def keep_above_eta(logits_BV: jax.Array, epsilon: jax.Array, least: jax.Array | None = None) -> jax.Array:
    """Keeps tokens of at least min(epsilon, sqrt(epsilon) exp(-entropy)), and the most probable (Hewitt et al., 2022)."""
    log_probs_BV = jax.nn.log_softmax(logits_BV, axis=-1)
    entropy_B1 = _entropy_terms(log_probs_BV).sum(-1, keepdims=True)
    eta_B1 = jnp.minimum(epsilon, jnp.sqrt(epsilon) * jnp.exp(-entropy_B1))
    return _keep(logits_BV, jnp.exp(log_probs_BV) >= eta_B1, least)


def keep_top_h(logits_BV: jax.Array, share: jax.Array) -> jax.Array:
    """Keeps the most probable tokens whose terms -p log p together stay within `share` of the entropy (Potraghloo et al., 2025).

    p is the probability among the 100 most probable tokens. The most probable is always kept.
    """
    keys_BV = _ordered(logits_BV)
    among_BV = jnp.where(keys_BV >= _kth_highest(keys_BV, jnp.int32(TOP_H_TOKENS)), logits_BV, -jnp.inf)
    terms_BV = _entropy_terms(jax.nn.log_softmax(among_BV, axis=-1))
    budget_B1 = share * terms_BV.sum(-1, keepdims=True)
    too_low_B1 = _highest_threshold(keys_BV, lambda at_least_BV: _sum_of(terms_BV, at_least_BV) > budget_B1)
    return _keep(among_BV, keys_BV > too_low_B1)


def _keep(logits_BV: jax.Array, kept_BV: jax.Array, least: jax.Array | None = None) -> jax.Array:
    """Rules out all but `kept_BV`, the highest logits, and the `least` highest."""
    kept_BV |= logits_BV == logits_BV.max(-1, keepdims=True)
    if least is not None:
        keys_BV = _ordered(logits_BV)
        kept_BV |= keys_BV >= _kth_highest(keys_BV, least)
    return jnp.where(kept_BV, logits_BV, -jnp.inf)


def _keep_highest(
    logits_BV: jax.Array, scores_BV: jax.Array, probs_BV: jax.Array, mass: jax.Array, least: jax.Array | None
) -> jax.Array:
    """Rules out all but the fewest with the highest scores, ties included, whose probabilities reach `mass`."""
    keys_BV = _ordered(scores_BV)
    threshold_B1 = _highest_threshold(keys_BV, lambda at_least_BV: _sum_of(probs_BV, at_least_BV) >= mass)
    if least is not None:
        threshold_B1 = jnp.minimum(threshold_B1, _kth_highest(keys_BV, least))
    return jnp.where(keys_BV >= threshold_B1, logits_BV, -jnp.inf)


def _kth_highest(keys_BV: jax.Array, k: jax.Array) -> jax.Array:
    return _highest_threshold(keys_BV, lambda at_least_BV: at_least_BV.sum(-1, keepdims=True, dtype=jnp.int32) >= k)


def _sum_of(values_BV: jax.Array, kept_BV: jax.Array) -> jax.Array:
    return jnp.where(kept_BV, values_BV, 0).sum(-1, keepdims=True)


def _ordered(scores_BV: jax.Array) -> jax.Array:
    """uint32 in the order of the float32 scores, -0 equal to 0."""
    bits_BV = jax.lax.bitcast_convert_type(scores_BV, jnp.int32)
    signed_BV = jnp.where(bits_BV < 0, -(bits_BV & 0x7FFFFFFF), bits_BV)
    return jax.lax.bitcast_convert_type(signed_BV, jnp.uint32) ^ jnp.uint32(1 << 31)


def _highest_threshold(keys_BV: jax.Array, is_enough: Callable[[jax.Array], jax.Array]) -> jax.Array:
    """[B, 1]: the highest threshold, up to the highest key, from which up there is enough; 0 where there is never.

    `is_enough` takes keys >= threshold, [B, V] bool, to [B, 1], and must hold of more wherever it holds of less; sums of
    non-negative numbers do, as rounding is monotone too.
    """

    def with_bit(index: jax.Array, threshold_B1: jax.Array) -> jax.Array:
        higher_B1 = threshold_B1 | (jnp.uint32(1 << 31) >> index.astype(jnp.uint32))
        return jnp.where(is_enough(keys_BV >= higher_B1), higher_B1, threshold_B1)

    threshold_B1 = jax.lax.fori_loop(0, 32, with_bit, jnp.zeros_like(keys_BV[:, :1]))
    return jnp.minimum(threshold_B1, keys_BV.max(-1, keepdims=True))


def _entropy_terms(log_probs_BV: jax.Array) -> jax.Array:
    """-p log p, 0 where p is 0."""
    return jnp.where(jnp.isfinite(log_probs_BV), -jnp.exp(log_probs_BV) * log_probs_BV, 0)
