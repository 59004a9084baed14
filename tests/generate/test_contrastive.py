"""Contrastive search against the paper's formula in float64, over hidden vectors of one full forward a candidate."""

from __future__ import annotations

import functools
from typing import Any

import jax
import numpy as np
import pytest

from gptjax.config import UserError
from gptjax.generate import contrastive
from gptjax.generate.decode import Generated
from gptjax.generate.settings import GenerationConfig
from gptjax.model.decoder import Decoder
from tests.generate.small_models import FAMILIES, full_logits, model_config, random_params

CONFIG = model_config(**FAMILIES["llama"], max_seq_len=24)
PARAMS = random_params(CONFIG, 2, scale=0.5)
PROMPTS = [[3, 1, 4, 1, 5], [9], [6, 5, 3, 5, 8, 9, 7]]
COUNT, K = 12, 4

_hidden = jax.jit(lambda tokens_BT: Decoder(CONFIG).apply({"params": PARAMS}, tokens_BT, method=Decoder.hidden)[0])


@functools.cache
def directions(tokens: tuple[int, ...]) -> np.ndarray:
    """[T, D] in float64: last hidden vectors, of length 1."""
    padded = np.zeros((1, CONFIG.max_seq_len), np.int32)
    padded[0, : len(tokens)] = tokens
    hidden = np.asarray(_hidden(padded))[0, : len(tokens)].astype(np.float64)
    return hidden / np.linalg.norm(hidden, axis=-1, keepdims=True)


def reference(prompt: list[int], alpha: float, eos: int) -> list[int]:
    text = tuple(prompt)
    while len(text) < len(prompt) + COUNT:
        logits = full_logits(PARAMS, CONFIG, list(text))[-1].astype(np.float64)
        probabilities = np.exp(logits - logits.max())
        probabilities /= probabilities.sum()
        best = []
        for token in np.argsort(-probabilities)[:K]:
            *before, own = directions((*text, int(token)))
            best.append(((1 - alpha) * probabilities[token] - alpha * np.max(np.stack(before) @ own), int(token)))
        text += (max(best)[1],)
        if text[-1] == eos:
            break
    return list(text[len(prompt) :])


def search(prompts: list[list[int]], eos: int = -1, **settings: Any) -> Generated:
    asked = GenerationConfig(**{"max_new_tokens": COUNT, "do_sample": False, "top_k": K} | settings)
    return contrastive.generate_tokens(PARAMS, CONFIG, prompts, settings=asked, seed=0, eos_ids=(eos,), vocab_size=37)


def lists(generated: Generated) -> list[list[int]]:
    return [row.tolist() for row in generated.tokens]


@pytest.mark.parametrize("alpha", [0.1, 0.6, 1.0])
@pytest.mark.parametrize("eos", [-1, 7, 19])
def test_every_token_is_the_best_by_the_papers_formula(alpha: float, eos: int) -> None:
    got = search(PROMPTS, eos, penalty_alpha=alpha)
    assert lists(got) == [reference(prompt, alpha, eos) for prompt in PROMPTS]
    assert got.stopped.tolist() == [row[-1] == eos for row in lists(got)]
    for prompt, row, log_probs in zip(PROMPTS, lists(got), got.log_probs, strict=True):
        logits = full_logits(PARAMS, CONFIG, prompt + row)[len(prompt) - 1 : -1].astype(np.float64)
        own = logits[np.arange(len(row)), row] - np.log(np.exp(logits).sum(-1))
        np.testing.assert_allclose(log_probs, own, atol=1e-4)


def test_the_cases_stop_and_differ() -> None:
    rows = [lists(search(PROMPTS, eos, penalty_alpha=alpha)) for alpha in (0.1, 0.6) for eos in (-1, 7, 19)]
    assert rows[0] != rows[3], "alpha should matter"
    assert len({len(row) for case in rows for row in case}) > 1, "some should stop"


def test_a_row_does_not_depend_on_the_others() -> None:
    together = lists(search(PROMPTS, penalty_alpha=0.6))
    assert lists(search([PROMPTS[2], [1] * 6, PROMPTS[0]], penalty_alpha=0.6))[::2] == [together[2], together[0]]


def test_penalties_and_lengths_of_a_bucket_share_one_compilation() -> None:
    search(PROMPTS, penalty_alpha=0.6)
    before = contrastive.compiled_search._cache_size()
    for length in range(1, 12):
        search([[1] * length, [2], [3]], eos=length, penalty_alpha=length / 20, max_new_tokens=length)
    assert contrastive.compiled_search._cache_size() == before


def test_what_makes_no_sense_is_refused() -> None:
    with pytest.raises(UserError, match="penalty_alpha=0.0"):
        search(PROMPTS, penalty_alpha=0.0)
    with pytest.raises(UserError, match="max_new_tokens=20 are more than model.max_seq_len=24"):
        search(PROMPTS, penalty_alpha=0.5, max_new_tokens=20)
