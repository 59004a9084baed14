"""Logits to a token: processors, small functions over logits [B, V] in float32, composed in the order of `PROCESSORS`.

The order is that of transformers' `generate`: biases and penalties, then what is ruled out, then what is forced; after these,
where tokens are drawn, temperature and what keeps a part of the distribution. What transformers does not have stands beside its
kin: presence and frequency penalties behind the repetition penalty, the forced prefix behind all that rules out.
A token that a processor rules out has logit -inf from there on, so each processor sees the renormalised rest of those before it;
where a row has none left, its next token is id 0.

Which processors run is fixed when a call is compiled; their settings are traced values, which ask for no other compilation. Lists
of ids are padded to powers of two.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from gptjax.config import UserError
from gptjax.generate import history as past
from gptjax.generate import truncation
from gptjax.generate.history import NO_TOKEN, Sequences
from gptjax.generate.history import History as History
from gptjax.generate.settings import GenerationConfig

Values = dict[str, Any]

SMALLEST_LIST = 8


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


def within_vocabulary(logits_BV: jax.Array, vocab_size: jax.Array) -> jax.Array:
    """Rules out the rows of the embedding that stand for no token: ids from `vocab_size` on."""
    return jnp.where(jnp.arange(logits_BV.shape[-1]) < vocab_size, logits_BV, -jnp.inf)


def make_finite(logits_BV: jax.Array) -> jax.Array:
    """NaN as 0 and infinity as the largest number. What is ruled out stays so; transformers makes that finite too."""
    return jnp.nan_to_num(logits_BV, nan=0.0, neginf=-jnp.inf)


def _padded(ids: Sequence[int]) -> np.ndarray:
    size = max(SMALLEST_LIST, 1 << (len(ids) - 1).bit_length())
    return np.array([*ids, *[NO_TOKEN] * (size - len(ids))], np.int32)


def _ids(value: int | tuple[int, ...] | None) -> tuple[int, ...]:
    return () if value is None else (value,) if isinstance(value, int) else value


def _sequences(biases: dict[tuple[int, ...], float]) -> Sequences:
    longest = max((len(ids) - 1 for ids in biases), default=0)
    last = _padded([ids[-1] for ids in biases])
    beginnings = np.full((len(last), 1 << max(longest - 1, 0).bit_length()), -1, np.int32)
    bias = np.zeros(len(last), np.float32)
    for row, (ids, value) in enumerate(biases.items()):
        beginnings[row, beginnings.shape[1] - len(ids) + 1 :] = ids[:-1]
        bias[row] = value
    return Sequences(beginnings, last, bias)


def _bad_words(settings: GenerationConfig, vocabulary: Vocabulary) -> Sequences:
    # As in transformers, an end by itself is no bad word.
    return _sequences({ids: -np.inf for ids in settings.bad_words_ids if ids not in {(eos,) for eos in vocabulary.eos_ids}})


def _begin(history: History, one_is_forced: jax.Array) -> jax.Array:
    """[B] bool: the next token is the first that is free."""
    late_B = one_is_forced & (history.prompt_lengths_B == 1)
    return history.lengths_B == history.prompt_lengths_B + late_B


def _too_short(history: History, settings: Values) -> jax.Array:
    """[B] bool: the text may not end yet."""
    written_B = history.lengths_B - history.prompt_lengths_B
    return (written_B < settings["new"]) | (history.lengths_B < settings["whole"])


@struct.dataclass
class Part:
    """How much of a distribution is kept."""

    value: Any
    least: Any = None  # tokens that are kept in any case; None: one


def _part(
    apply: Callable[..., jax.Array], name: str, is_on: Callable[[Any], bool], dtype: Callable[[Any], Any] = np.float32
) -> Processor:
    return Processor(
        lambda settings: not settings.greedy and is_on(dtype(getattr(settings, name))),
        lambda settings, vocabulary: Part(dtype(getattr(settings, name))),
        lambda logits_BV, history, part: apply(logits_BV, part.value, part.least),
    )


def _decay(settings: GenerationConfig, vocabulary: Vocabulary) -> tuple[np.int32, np.float32, np.ndarray]:
    start, factor = settings.exponential_decay_length_penalty or (0, 1.0)
    return np.int32(start), np.float32(factor), _padded(vocabulary.eos_ids)


# Applied from first to last, where they are on.
PROCESSORS: dict[str, Processor] = {
    "sequence_bias": Processor(
        lambda settings: bool(settings.sequence_bias),
        lambda settings, vocabulary: _sequences(dict(settings.sequence_bias)),
        past.bias_sequences,
    ),
    "encoder_repetition_penalty": Processor(
        lambda settings: settings.encoder_repetition_penalty != 1,
        lambda settings, vocabulary: np.float32(settings.encoder_repetition_penalty),
        past.favour_prompt,
    ),
    "repetition_penalty": Processor(
        lambda settings: settings.repetition_penalty != 1,
        lambda settings, vocabulary: np.float32(settings.repetition_penalty),
        past.penalise_repetition,
    ),
    "presence_and_frequency_penalty": Processor(
        lambda settings: settings.presence_penalty != 0 or settings.frequency_penalty != 0,
        lambda settings, vocabulary: (np.float32(settings.presence_penalty), np.float32(settings.frequency_penalty)),
        lambda logits_BV, history, values: past.penalise_presence(logits_BV, history, *values),
    ),
    "no_repeat_ngram_size": Processor(
        lambda settings: settings.no_repeat_ngram_size > 0,
        lambda settings, vocabulary: np.int32(settings.no_repeat_ngram_size),
        lambda logits_BV, history, size: past.forbid_repeated_ngrams(logits_BV, history, size, history.lengths_B),
    ),
    "encoder_no_repeat_ngram_size": Processor(
        lambda settings: settings.encoder_no_repeat_ngram_size > 0,
        lambda settings, vocabulary: np.int32(settings.encoder_no_repeat_ngram_size),
        lambda logits_BV, history, size: past.forbid_repeated_ngrams(logits_BV, history, size, history.prompt_lengths_B),
    ),
    "bad_words_ids": Processor(lambda settings: bool(settings.bad_words_ids), _bad_words, past.bias_sequences),
    "min_length": Processor(
        lambda settings: settings.min_length > 0 or settings.min_new_tokens > 0,
        lambda settings, vocabulary: {
            "new": np.int32(settings.min_new_tokens),
            "whole": np.int32(settings.min_length),
            "eos": _padded(vocabulary.eos_ids),
        },
        lambda logits_BV, history, values: past.rule_out(logits_BV, values["eos"], _too_short(history, values)),
    ),
    "forced_bos_token_id": Processor(
        lambda settings: settings.forced_bos_token_id is not None,
        lambda settings, vocabulary: np.int32(settings.forced_bos_token_id or 0),
        lambda logits_BV, history, bos: past.force(logits_BV, jnp.arange(logits_BV.shape[-1]) == bos, history.lengths_B == 1),
    ),
    "forced_eos_token_id": Processor(
        lambda settings: bool(_ids(settings.forced_eos_token_id)),
        lambda settings, vocabulary: _padded(_ids(settings.forced_eos_token_id)),
        lambda logits_BV, history, eos: past.force(
            logits_BV, past.is_one_of(eos, logits_BV.shape[-1]), history.lengths_B == history.limits_B - 1
        ),
    ),
    "remove_invalid_values": Processor(
        lambda settings: settings.remove_invalid_values,
        lambda settings, vocabulary: (),
        lambda logits_BV, history, values: make_finite(logits_BV),
    ),
    "exponential_decay_length_penalty": Processor(
        lambda settings: settings.exponential_decay_length_penalty is not None,
        _decay,
        lambda logits_BV, history, values: past.favour_end(logits_BV, history, *values),
    ),
    "suppress_tokens": Processor(
        lambda settings: bool(settings.suppress_tokens),
        lambda settings, vocabulary: _padded(settings.suppress_tokens),
        lambda logits_BV, history, ids: past.rule_out(logits_BV, ids, jnp.ones(len(logits_BV), bool)),
    ),
    "begin_suppress_tokens": Processor(
        lambda settings: bool(settings.begin_suppress_tokens),
        lambda settings, vocabulary: (
            _padded(settings.begin_suppress_tokens),
            np.bool_(settings.forced_bos_token_id is not None),
        ),
        lambda logits_BV, history, values: past.rule_out(logits_BV, values[0], _begin(history, values[1])),
    ),
    "forced_prefix_ids": Processor(
        lambda settings: bool(settings.forced_prefix_ids),
        lambda settings, vocabulary: _padded(settings.forced_prefix_ids),
        past.force_prefix,
    ),
    "temperature": Processor(
        lambda settings: not settings.greedy and settings.temperature != 1,
        # Far below any gap between logits, and far above what a device flushes to 0.
        lambda settings, vocabulary: np.float32(max(settings.temperature, 1e-30)),
        lambda logits_BV, history, value: truncation.apply_temperature(logits_BV, value),
    ),
    "top_h": Processor(
        lambda settings: not settings.greedy and settings.top_h > 0,
        lambda settings, vocabulary: np.float32(settings.top_h),
        lambda logits_BV, history, value: truncation.keep_top_h(logits_BV, value),
    ),
    "top_k": _part(truncation.keep_top_k, "top_k", lambda k: k > 0, np.int32),
    "top_p": _part(truncation.keep_top_p, "top_p", lambda p: p < 1),
    "min_p": _part(truncation.keep_min_p, "min_p", lambda p: p > 0),
    "typical_p": _part(truncation.keep_typical, "typical_p", lambda p: p < 1),
    "epsilon_cutoff": _part(truncation.keep_above_epsilon, "epsilon_cutoff", lambda p: p > 0),
    "eta_cutoff": _part(truncation.keep_above_eta, "eta_cutoff", lambda p: p > 0),
    "renormalize_logits": Processor(
        lambda settings: settings.renormalize_logits,
        lambda settings, vocabulary: (),
        lambda logits_BV, history, values: jax.nn.log_softmax(logits_BV, axis=-1),
    ),
}


def plan(settings: GenerationConfig, vocabulary: Vocabulary, min_tokens_to_keep: int = 1) -> tuple[tuple[str, ...], Values]:
    """(names of the processors that are on, in order: fixed for a compilation; their settings: traced).

    `min_tokens_to_keep`: tokens that top_k, top_p and the like leave at least (top_h takes no notice, as in transformers); beam
    search that draws asks for one more than there are ends. Raises `UserError` for ids that the vocabulary does not have.
    """
    for name, ids in _named_ids(settings):
        if ids and max(ids) >= vocabulary.size:
            raise UserError(f"{name} has the token id {max(ids)}, but ids go from 0 to {vocabulary.size - 1}.")
    if len(set(settings.suppress_tokens)) >= vocabulary.size:
        raise UserError(f"suppress_tokens rules out all {vocabulary.size} ids, and leaves nothing to write.")
    names = tuple(name for name, processor in PROCESSORS.items() if processor.is_on(settings))
    values = {name: PROCESSORS[name].values(settings, vocabulary) for name in names}
    if min_tokens_to_keep > 1:
        least = np.int32(min_tokens_to_keep)
        parts = {name: value for name, value in values.items() if isinstance(value, Part)}
        values |= {name: dataclasses.replace(part, least=least) for name, part in parts.items()}
    return names, values


def _named_ids(settings: GenerationConfig) -> Iterator[tuple[str, tuple[int, ...]]]:
    """(name, all ids) of every setting that holds ids which are written or looked for."""
    for name in ("eos_token_id", "forced_bos_token_id", "forced_eos_token_id"):
        yield name, _ids(getattr(settings, name))
    for name in ("suppress_tokens", "begin_suppress_tokens", "forced_prefix_ids"):
        yield name, getattr(settings, name)
    yield "bad_words_ids", tuple(token for ids in settings.bad_words_ids for token in ids)
    yield "sequence_bias", tuple(token for ids, _ in settings.sequence_bias for token in ids)


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
