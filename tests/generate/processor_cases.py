"""Random histories and settings, and every processor by brute force in float64, one row at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.generate import processors
from gptjax.generate.processors import History, Vocabulary
from gptjax.generate.settings import GenerationConfig

ROWS, WIDTH, COLUMNS = 6, 16, 23
VOCABULARY = Vocabulary(size=21, eos_ids=(2, 7))


@dataclass(frozen=True)
class Row:
    """What brute force sees of a row."""

    tokens: list[int]
    prompt: list[int]
    limit: int


def random_logits(rng: np.random.Generator) -> np.ndarray:
    logits = rng.normal(0, 2, (ROWS, COLUMNS)).astype(np.float32)
    logits[:, VOCABULARY.size :] = -np.inf
    return logits


def random_rows(rng: np.random.Generator, length: int | None = None) -> list[Row]:
    """Rows of few different tokens, so that they repeat themselves."""
    rows = []
    for _ in range(ROWS):
        count = length or int(rng.integers(1, WIDTH))
        tokens = rng.integers(0, 5, count).tolist()
        rows.append(Row(tokens, tokens[: int(rng.integers(1, count + 1))], count + int(rng.integers(1, 3))))
    return rows


def history(rows: list[Row], rng: np.random.Generator) -> History:
    tokens_BW = rng.integers(0, 5, (len(rows), WIDTH)).astype(np.int32)  # places that are not in use mean nothing
    for line, row in zip(tokens_BW, rows, strict=True):
        line[: len(row.tokens)] = row.tokens
    lengths = (
        [len(row.tokens) for row in rows],
        [len(row.prompt) for row in rows],
        [row.limit for row in rows],
    )
    return History(jnp.asarray(tokens_BW), *(jnp.array(column, jnp.int32) for column in lengths))


def random_settings(rng: np.random.Generator, **changes: Any) -> GenerationConfig:
    """Everything is on, but what contradicts something else."""

    def ids(count: int) -> list[int]:
        return rng.integers(0, 9, count).tolist()

    values = {
        "sequence_bias": [[ids(1 + index % 3), float(rng.normal())] for index in range(5)],
        "encoder_repetition_penalty": rng.uniform(0.5, 2),
        "repetition_penalty": rng.uniform(0.5, 2),
        "presence_penalty": rng.normal(),
        "frequency_penalty": rng.normal(),
        "no_repeat_ngram_size": rng.integers(1, 4),
        "encoder_no_repeat_ngram_size": rng.integers(1, 4),
        "bad_words_ids": [ids(1 + index % 4) for index in range(6)] + [[2]],
        "min_new_tokens": rng.integers(1, 6),
        "forced_bos_token_id": rng.integers(0, 9),
        "forced_eos_token_id": ids(2),
        "remove_invalid_values": True,
        "exponential_decay_length_penalty": (rng.integers(0, 4), rng.uniform(0.8, 1.5)),
        "suppress_tokens": [9, 10],
        "begin_suppress_tokens": [11, 12],
        "temperature": rng.uniform(0.3, 3),
        "top_h": rng.uniform(0.1, 1),
        "top_k": rng.integers(1, 15),
        "top_p": rng.uniform(0.05, 0.99),
        "min_p": rng.uniform(0.01, 0.3),
        "typical_p": rng.uniform(0.05, 0.99),
        "epsilon_cutoff": rng.uniform(0.01, 0.2),
        "eta_cutoff": rng.uniform(0.01, 0.2),
        "renormalize_logits": True,
    }
    return GenerationConfig(**(values | changes))


@jax.jit(static_argnums=0)
def alone(names: tuple[str, ...], values: Any, logits: jax.Array, history: History) -> dict[str, jax.Array]:
    """What each processor by itself makes of the logits: one compilation for all of them."""
    return {name: processors.process((name,), values, logits, history) for name in names}


together = jax.jit(processors.process, static_argnums=0)


def kept(logits: Any) -> np.ndarray:
    return np.isfinite(np.asarray(logits))


def probabilities(logits: np.ndarray) -> np.ndarray:
    logits = np.asarray(logits, np.float64)
    weights = np.exp(logits - logits.max())
    return weights / weights.sum()


def entropy(probs: np.ndarray) -> float:
    return -sum(p * np.log(p) for p in probs if p > 0)


def brute(name: str, logits: np.ndarray, row: Row, settings: GenerationConfig, least: int = 1) -> np.ndarray:
    """The processor `name` on the logits of one row."""
    out = np.array(logits, np.float64)
    if name in TRUNCATIONS:
        return np.where(TRUNCATIONS[name](out, settings, least), out, -np.inf)
    return CHANGES[name](out, row, settings)


def _scaled(out: np.ndarray, tokens: list[int], penalty: float) -> np.ndarray:
    for token in set(tokens):
        out[token] = out[token] * penalty if out[token] < 0 else out[token] / penalty
    return out


def _without(out: np.ndarray, ids: Any) -> np.ndarray:
    for token in ids:
        out[token] = -np.inf
    return out


def _only(out: np.ndarray, ids: Any) -> np.ndarray:
    return np.array([0 if token in ids else -np.inf for token in range(len(out))])


def _as_ids(value: Any) -> tuple[int, ...]:
    return (value,) if isinstance(value, int) else value


def _after_ngrams(text: list[int], tokens: list[int], size: int) -> set[int]:
    recent = tokens[len(tokens) - size + 1 :]
    if len(tokens) < size - 1:
        return set()
    return {text[i + size - 1] for i in range(len(text) - size + 1) if text[i : i + size - 1] == recent}


def _biased(out: np.ndarray, row: Row, settings: GenerationConfig) -> np.ndarray:
    for ids, bias in dict(settings.sequence_bias).items():
        if len(ids) - 1 <= len(row.tokens) and tuple(row.tokens[len(row.tokens) - len(ids) + 1 :]) == ids[:-1]:
            out[ids[-1]] += bias
    return out


def _penalised(out: np.ndarray, row: Row, settings: GenerationConfig) -> np.ndarray:
    written = row.tokens[len(row.prompt) :]
    for token in set(written):
        out[token] -= written.count(token) * settings.frequency_penalty + settings.presence_penalty
    return out


def _bad_words(out: np.ndarray, row: Row, settings: GenerationConfig) -> np.ndarray:
    for ids in settings.bad_words_ids:
        if ids not in [(eos,) for eos in VOCABULARY.eos_ids] and tuple(row.tokens[len(row.tokens) - len(ids) + 1 :]) == ids[:-1]:
            out[ids[-1]] = -np.inf
    return out


def _not_yet(out: np.ndarray, row: Row, settings: GenerationConfig) -> np.ndarray:
    is_short = len(row.tokens) < settings.min_length or len(row.tokens) - len(row.prompt) < settings.min_new_tokens
    return _without(out, VOCABULARY.eos_ids if is_short else ())


def _finite(out: np.ndarray, row: Row, settings: GenerationConfig) -> np.ndarray:
    limit = np.finfo(np.float32).max
    return np.array([0 if np.isnan(value) else min(value, limit) for value in out])


def _hurried(out: np.ndarray, row: Row, settings: GenerationConfig) -> np.ndarray:
    start, factor = settings.exponential_decay_length_penalty or (0, 1.0)
    past = len(row.tokens) - len(row.prompt) - start
    for eos in VOCABULARY.eos_ids if past > 0 else ():
        out[eos] += abs(out[eos]) * (factor**past - 1) if np.isfinite(out[eos]) else 0
    return out


def _not_first(out: np.ndarray, row: Row, settings: GenerationConfig) -> np.ndarray:
    first = len(row.prompt) + (len(row.prompt) == 1 and settings.forced_bos_token_id is not None)
    return _without(out, settings.begin_suppress_tokens if len(row.tokens) == first else ())


def _prefix(out: np.ndarray, row: Row, settings: GenerationConfig) -> np.ndarray:
    written = len(row.tokens) - len(row.prompt)
    return _only(out, settings.forced_prefix_ids[written : written + 1]) if written < len(settings.forced_prefix_ids) else out


CHANGES = {
    "sequence_bias": _biased,
    "encoder_repetition_penalty": lambda out, row, s: _scaled(out, row.prompt, 1 / s.encoder_repetition_penalty),
    "repetition_penalty": lambda out, row, s: _scaled(out, row.tokens, s.repetition_penalty),
    "presence_and_frequency_penalty": _penalised,
    "no_repeat_ngram_size": lambda out, row, s: _without(out, _after_ngrams(row.tokens, row.tokens, s.no_repeat_ngram_size)),
    "encoder_no_repeat_ngram_size": lambda out, row, s: _without(
        out, _after_ngrams(row.prompt, row.tokens, s.encoder_no_repeat_ngram_size)
    ),
    "bad_words_ids": _bad_words,
    "min_length": _not_yet,
    "forced_bos_token_id": lambda out, row, s: _only(out, (s.forced_bos_token_id,)) if len(row.tokens) == 1 else out,
    "forced_eos_token_id": lambda out, row, s: (
        _only(out, _as_ids(s.forced_eos_token_id)) if len(row.tokens) + 1 == row.limit else out
    ),
    "remove_invalid_values": _finite,
    "exponential_decay_length_penalty": _hurried,
    "suppress_tokens": lambda out, row, s: _without(out, s.suppress_tokens),
    "begin_suppress_tokens": _not_first,
    "forced_prefix_ids": _prefix,
    "temperature": lambda out, row, s: out / s.temperature,
    "renormalize_logits": lambda out, row, s: out - out.max() - np.log(np.exp(out - out.max()).sum()),
}


def _reaching(scores: np.ndarray, probs: np.ndarray, mass: float, least: int) -> np.ndarray:
    """Kept where those with higher scores do not reach `mass` by themselves, or are fewer than `least`."""
    above = [scores > score for score in scores]
    return np.array([probs[higher].sum() < mass or higher.sum() < least for higher in above])


def _typical(out: np.ndarray, settings: GenerationConfig, least: int) -> np.ndarray:
    probs = probabilities(out)
    with np.errstate(divide="ignore"):
        return _reaching(-np.abs(-np.log(probs) - entropy(probs)), probs, settings.typical_p, least)


def _top_h(out: np.ndarray, settings: GenerationConfig, least: int) -> np.ndarray:
    assert len(out) < 100  # all of which count, then
    probs = probabilities(out)
    terms = [entropy(np.array([p])) for p in probs]
    spent = [sum(term for other, term in zip(probs, terms, strict=True) if other >= p) for p in probs]
    return np.array([cost <= settings.top_h * entropy(probs) for cost in spent]) | (probs == probs.max())


def _eta(out: np.ndarray, settings: GenerationConfig, least: int) -> np.ndarray:
    epsilon, probs = settings.eta_cutoff, probabilities(out)
    return (probs >= min(epsilon, np.sqrt(epsilon) * np.exp(-entropy(probs)))) | _highest(out, least)


def _highest(out: np.ndarray, count: int) -> np.ndarray:
    """Kept where fewer than `count` logits are strictly higher."""
    return np.array([sum(other > value for other in out) < count for value in out])


TRUNCATIONS = {
    "top_h": _top_h,
    "top_k": lambda out, s, least: _highest(out, max(s.top_k, least)),
    "top_p": lambda out, s, least: _reaching(out, probabilities(out), s.top_p, least),
    "min_p": lambda out, s, least: (probabilities(out) >= s.min_p * probabilities(out).max()) | _highest(out, least),
    "typical_p": _typical,
    "epsilon_cutoff": lambda out, s, least: (probabilities(out) >= s.epsilon_cutoff) | _highest(out, least),
    "eta_cutoff": _eta,
}

# The order that transformers' generate has, and ours beside their kin.
ORDER = (
    "sequence_bias",
    "encoder_repetition_penalty",
    "repetition_penalty",
    "presence_and_frequency_penalty",
    "no_repeat_ngram_size",
    "encoder_no_repeat_ngram_size",
    "bad_words_ids",
    "min_length",
    "forced_bos_token_id",
    "forced_eos_token_id",
    "remove_invalid_values",
    "exponential_decay_length_penalty",
    "suppress_tokens",
    "begin_suppress_tokens",
    "forced_prefix_ids",
    "temperature",
    "top_h",
    "top_k",
    "top_p",
    "min_p",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
    "renormalize_logits",
)
