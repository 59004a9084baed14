"""Processors that look at what a row has written, or how much. Axis letters as in decode.py; S: sequences, L: their length."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

# Stands for no token: writes to it are dropped.
NO_TOKEN = 2**31 - 1


@struct.dataclass
class History:
    """The rows so far, for processors that look back. Entries of `tokens_BW` at `lengths_B` and beyond mean nothing."""

    tokens_BW: jax.Array  # prompt and continuation
    lengths_B: jax.Array  # tokens in use
    prompt_lengths_B: jax.Array
    limits_B: jax.Array  # prompt and max_new_tokens: the length at which a row ends


@struct.dataclass
class Sequences:
    """Lists of ids, each a beginning and a last id."""

    beginnings_SL: Any  # flush right; -1 in front: any token, or none
    last_S: Any  # NO_TOKEN: no sequence
    bias_S: Any


def penalise_repetition(logits_BV: jax.Array, history: History, penalty: jax.Array) -> jax.Array:
    """Divides positive logits of tokens in prompt or continuation, and multiplies negative ones (Keskar et al., 2019)."""
    return _scale(logits_BV, _present(logits_BV, history, jnp.int32(0), history.lengths_B), penalty)


def favour_prompt(logits_BV: jax.Array, history: History, penalty: jax.Array) -> jax.Array:
    """The reverse of `penalise_repetition`, for tokens of the prompt."""
    return _scale(logits_BV, _present(logits_BV, history, jnp.int32(0), history.prompt_lengths_B), 1 / penalty)


def penalise_presence(logits_BV: jax.Array, history: History, presence: jax.Array, frequency: jax.Array) -> jax.Array:
    """Takes off `frequency` for each time that a token was written and `presence` once, prompt aside: OpenAI's formula."""
    ones_BW = _between(history, history.prompt_lengths_B, history.lengths_B).astype(jnp.float32)
    counts_BV = _at_tokens(jnp.zeros(logits_BV.shape, jnp.float32), history.tokens_BW).add(ones_BW, mode="drop")
    return logits_BV - counts_BV * frequency - (counts_BV > 0) * presence


def forbid_repeated_ngrams(logits_BV: jax.Array, history: History, size: jax.Array, ends_B: jax.Array) -> jax.Array:
    """Rules out what would complete a list of `size` tokens that is there already, among the first `ends_B` tokens of the row."""
    tokens_BW = history.tokens_BW

    def compare(index: jax.Array, same_BW: jax.Array) -> jax.Array:
        recent_B1 = jnp.take_along_axis(tokens_BW, (history.lengths_B - size + 1 + index)[:, None], axis=1, mode="clip")
        return same_BW & (jnp.roll(tokens_BW, -index, axis=1) == recent_B1)

    # A window from place i holds the last size - 1 tokens, and then the token at i + size - 1.
    within_BW = jnp.arange(tokens_BW.shape[1]) + size - 1 < ends_B[:, None]
    same_BW = jax.lax.fori_loop(0, size - 1, compare, within_BW)
    forbidden_BV = _at_tokens(jnp.zeros(logits_BV.shape, bool), jnp.roll(tokens_BW, 1 - size, axis=1)).max(same_BW, mode="drop")
    return jnp.where(forbidden_BV, -jnp.inf, logits_BV)


def bias_sequences(logits_BV: jax.Array, history: History, sequences: Sequences) -> jax.Array:
    """Adds each sequence's bias to the logit of its last id where the row ends with the others."""
    length = sequences.beginnings_SL.shape[1]
    places_BL = history.lengths_B[:, None] - length + jnp.arange(length)
    recent_BL = jnp.take_along_axis(history.tokens_BW, jnp.maximum(places_BL, 0), axis=1)
    recent_BL = jnp.where(places_BL < 0, -2, recent_BL)
    same_BSL = recent_BL[:, None] == sequences.beginnings_SL
    bias_BS = jnp.where((same_BSL | (sequences.beginnings_SL < 0)).all(-1), sequences.bias_S, 0)
    return _at_tokens(logits_BV, jnp.broadcast_to(sequences.last_S, bias_BS.shape)).add(bias_BS, mode="drop")


def rule_out(logits_BV: jax.Array, ids: jax.Array, when_B: jax.Array) -> jax.Array:
    """Without `ids` in the rows of `when_B`."""
    return jnp.where(when_B[:, None] & is_one_of(ids, logits_BV.shape[-1]), -jnp.inf, logits_BV)


def force(logits_BV: jax.Array, is_forced_BV: jax.Array, when_B: jax.Array) -> jax.Array:
    """Nothing but the forced, each at logit 0, in the rows of `when_B`."""
    return jnp.where(when_B[:, None], jnp.where(is_forced_BV, 0, -jnp.inf), logits_BV)


def force_prefix(logits_BV: jax.Array, history: History, ids_P: jax.Array) -> jax.Array:
    """The continuation's token i is `ids_P[i]`, as far as they go; NO_TOKEN ends them."""
    written_B = history.lengths_B - history.prompt_lengths_B
    ids_B = ids_P.at[written_B].get(mode="fill", fill_value=NO_TOKEN)
    return force(logits_BV, jnp.arange(logits_BV.shape[-1]) == ids_B[:, None], ids_B != NO_TOKEN)


def favour_end(logits_BV: jax.Array, history: History, start: jax.Array, factor: jax.Array, eos_ids: jax.Array) -> jax.Array:
    """n tokens past `start` of the continuation, adds factor**n - 1 times its own size to the logit of each end."""
    past_B = history.lengths_B - history.prompt_lengths_B - start
    largest = jnp.finfo(jnp.float32).max
    growth_B1 = jnp.minimum(factor ** past_B.astype(jnp.float32) - 1, largest)[:, None]
    grown_BV = jnp.minimum(logits_BV + jnp.abs(logits_BV) * growth_B1, largest)
    ends_BV = is_one_of(eos_ids, logits_BV.shape[-1]) & jnp.isfinite(logits_BV)
    return jnp.where(ends_BV & (past_B > 0)[:, None], grown_BV, logits_BV)


def is_one_of(ids: jax.Array, vocab_size: int) -> jax.Array:
    """[V] bool."""
    return jnp.zeros(vocab_size, bool).at[ids].set(True, mode="drop")


def _between(history: History, starts_B: jax.Array, ends_B: jax.Array) -> jax.Array:
    """[B, W] bool: the places from `starts_B` up to `ends_B`."""
    places_W = jnp.arange(history.tokens_BW.shape[1])
    return (places_W >= starts_B[..., None]) & (places_W < ends_B[:, None])


def _present(logits_BV: jax.Array, history: History, starts_B: jax.Array, ends_B: jax.Array) -> jax.Array:
    """[B, V] bool: the tokens at places from `starts_B` up to `ends_B`."""
    there_BW = _between(history, starts_B, ends_B)
    return _at_tokens(jnp.zeros(logits_BV.shape, bool), history.tokens_BW).max(there_BW, mode="drop")


def _at_tokens(array_BV: jax.Array, tokens_BW: jax.Array) -> Any:
    return array_BV.at[jnp.arange(array_BV.shape[0])[:, None], tokens_BW]


def _scale(logits_BV: jax.Array, chosen_BV: jax.Array, penalty: jax.Array) -> jax.Array:
    scaled_BV = jnp.where(logits_BV < 0, logits_BV * penalty, logits_BV / penalty)
    return jnp.where(chosen_BV, scaled_BV, logits_BV)
