"""Beam search against all sequences there are, and against a plain search over lists in float64."""

from __future__ import annotations

import collections
import functools
import itertools
from typing import Any

import numpy as np
import pytest

from gptjax.config import UserError
from gptjax.generate import beam
from gptjax.generate.settings import GenerationConfig
from tests.generate.small_models import FAMILIES, full_logits, model_config, random_params

# Compiling takes all the time: one shape a search, and what is traced differs.
CONFIG = model_config(**FAMILIES["llama"], max_seq_len=24)
PARAMS = random_params(CONFIG, scale=0.3)
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7]]
COUNT = 10
EOS = (3, 7, 14)  # tokens that some beams meet early

TINY = model_config(**FAMILIES["gpt2"], vocab_size=4, num_layers=1, max_seq_len=8)
TINY_PARAMS = random_params(TINY, seed=1, scale=0.5)

Text = tuple[int, ...]


@functools.cache
def log_probs(tiny: bool, tokens: Text) -> np.ndarray:
    """[V] in float64, of the token after `tokens`."""
    params, config = (TINY_PARAMS, TINY) if tiny else (PARAMS, CONFIG)
    logits = full_logits(params, config, list(tokens))[-1].astype(np.float64)
    return logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()


def search(tiny: bool, prompts: list[list[int]], eos_ids: tuple[int, ...], **settings: Any) -> beam.Searched:
    params, config = (TINY_PARAMS, TINY) if tiny else (PARAMS, CONFIG)
    asked = GenerationConfig(**{"do_sample": False} | settings)
    return beam.generate_tokens(params, config, prompts, settings=asked, seed=0, eos_ids=eos_ids, vocab_size=config.vocab_size)


def reference(prompt: list[int], eos: int, settings: dict[str, Any]) -> list[tuple[float, Text]]:
    """(score, new tokens) of what beams find, best first, kept as lists of texts."""
    groups = settings.get("num_beam_groups", 1)
    size = settings["num_beams"] // groups
    power = settings.get("length_penalty", 1.0)
    early = settings.get("early_stopping", False)
    running: list[list[tuple[float, Text]]] = [[(0.0, ())] for _ in range(groups)]
    finished: list[list[tuple[float, Text]]] = [[] for _ in range(groups)]
    done = [False] * groups
    for length in range(1, COUNT + 1):
        taken: collections.Counter[int] = collections.Counter()
        for group in range(groups):
            if done[group]:
                continue
            found = [
                (score + value - settings.get("diversity_penalty", 0.0) * taken[token], (*text, token))
                for score, text in running[group]
                for token, value in enumerate(log_probs(False, (*prompt, *text)))
            ]
            found = sorted(found, reverse=True)[: 2 * size]
            ending = [(score / length**power, text) for score, text in found[:size] if text[-1] == eos or length == COUNT]
            finished[group] = sorted(finished[group] + ending, reverse=True)[:size]
            running[group] = [candidate for candidate in found if candidate[1][-1] != eos][:size]
            taken.update(text[-1] for _, text in running[group])
            if len(finished[group]) == size:
                reach = COUNT if early == "never" and power > 0 else length
                hopeless = running[group][0][0] / reach**power <= finished[group][-1][0]
                done[group] = early is True or hopeless
    return sorted(itertools.chain(*finished), reverse=True)


def check(settings: dict[str, Any], eos: int) -> list[Text]:
    got = search(False, PROMPTS, (eos,), max_new_tokens=COUNT, **settings)
    each = settings["num_return_sequences"]
    expected = [best for prompt in PROMPTS for best in reference(prompt, eos, settings)[:each]]
    texts = [tuple(row.tolist()) for row in got.tokens]
    assert texts == [text for _, text in expected]
    np.testing.assert_allclose(got.scores, [score for score, _ in expected], rtol=1e-5)
    assert got.stopped.tolist() == [text[-1] == eos for text in texts]
    for number, (text, row) in enumerate(zip(texts, got.log_probs, strict=True)):
        prompt = PROMPTS[number // each]
        own = [log_probs(False, (*prompt, *text[:place]))[token] for place, token in enumerate(text)]
        np.testing.assert_allclose(row, own, atol=1e-5)
    return texts


@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 1.0, 2.5])
def test_enough_beams_find_the_best_of_all_sequences(length_penalty: float) -> None:
    prompt, eos, length = [1, 2], 3, 4
    every = []
    for text in itertools.product(range(4), repeat=length):
        end = text.index(eos) + 1 if eos in text else length
        every.append(text[:end])
    scores = {}
    for text in every:
        total = sum(log_probs(True, (*prompt, *text[:place]))[token] for place, token in enumerate(text))
        scores[text] = total / len(text) ** length_penalty
    best = sorted(scores, key=scores.__getitem__, reverse=True)[:10]
    settings = {"num_beams": 64, "num_return_sequences": 10, "early_stopping": "never", "max_new_tokens": length}
    got = search(True, [prompt], (eos,), length_penalty=length_penalty, **settings)
    assert [tuple(row.tolist()) for row in got.tokens] == best
    np.testing.assert_allclose(got.scores, [scores[text] for text in best], rtol=1e-5)
    assert {True, False} <= set(got.stopped.tolist()) or length_penalty < 0


def test_texts_that_do_not_exist_are_empty() -> None:
    settings = {"num_beams": 64, "num_return_sequences": 10, "early_stopping": "never", "max_new_tokens": 1}
    got = search(True, [[1, 2]], (3,), **settings)
    order = np.argsort(-log_probs(True, (1, 2)))
    assert [row.tolist() for row in got.tokens] == [[token] for token in order] + [[]] * 6
    assert np.isfinite(got.scores).tolist() == [True] * 4 + [False] * 6
    assert not got.stopped[4:].any()


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [-0.5, 0.0, 1.0, 2.0])
def test_beams_equal_the_plain_search(early_stopping: Any, length_penalty: float) -> None:
    settings = {"num_beams": 2, "num_return_sequences": 2, "length_penalty": length_penalty, "early_stopping": early_stopping}
    for eos in EOS:
        check(settings, eos)


def test_the_cases_above_tell_settings_apart() -> None:
    found: dict[Any, list[Text]] = {}
    for early, power, eos in itertools.product((True, False, "never"), (-0.5, 0.0, 1.0, 2.0), EOS):
        settings = {"num_beams": 2, "num_return_sequences": 2, "length_penalty": power, "early_stopping": early}
        rows = search(False, PROMPTS, (eos,), max_new_tokens=COUNT, **settings).tokens
        for key in (f"early_stopping={early}", f"length_penalty={power}"):
            found.setdefault(key, []).extend(tuple(row.tolist()) for row in rows)
    distinct = [len({tuple(texts) for name, texts in found.items() if name.startswith(key)}) for key in ("early", "length")]
    assert distinct[0] == 3 and distinct[1] >= 3
    assert len({len(text) for texts in found.values() for text in texts}) > 4


@pytest.mark.parametrize("diversity_penalty", [0.1, 0.7, 5.0])
def test_diverse_groups_equal_the_plain_search(diversity_penalty: float) -> None:
    settings = {"num_beams": 4, "num_beam_groups": 2, "num_return_sequences": 4, "diversity_penalty": diversity_penalty}
    texts = [text for eos in EOS[:2] for text in check(settings, eos)]
    if diversity_penalty == 0:  # the groups find the same
        assert texts[0::2] == texts[1::2]
    else:
        assert len(set(texts)) > len(texts) * 2 / 3


def test_a_prompts_texts_do_not_depend_on_the_others() -> None:
    settings = {"num_beams": 2, "num_return_sequences": 2, "max_new_tokens": COUNT}
    together = search(False, PROMPTS, (18,), **settings)
    others = search(False, [PROMPTS[2], PROMPTS[0], [1] * 7], (18,), **settings)
    texts, moved = ([row.tolist() for row in found.tokens] for found in (together, others))
    assert moved[:4] == texts[4:] + texts[:2]
    np.testing.assert_array_equal(others.scores[:4], np.concatenate([together.scores[4:], together.scores[:2]]))


def test_sampled_beams_are_drawn_without_replacement() -> None:
    """One token by two beams: four candidates are drawn one after the other, the first two end, the likelier comes first."""
    rows = 20_000
    settings = GenerationConfig(max_new_tokens=1, num_beams=2, temperature=1.7)
    samples = list(range(rows))
    got = beam.generate_tokens(
        TINY_PARAMS, TINY, [[1, 2]] * rows, settings=settings, seed=3, eos_ids=(), vocab_size=4, samples=samples
    )
    weights = np.exp(log_probs(True, (1, 2)) / 1.7)
    weights /= weights.sum()
    expected = np.zeros(4)
    for first, second in itertools.permutations(range(4), 2):
        better = first if weights[first] > weights[second] else second
        expected[better] += rows * weights[first] * weights[second] / (1 - weights[first])
    observed = np.bincount(np.concatenate(got.tokens), minlength=4)
    possible = expected > 0
    assert observed[~possible].sum() == 0 and possible.sum() == 3
    # 2 degrees of freedom; 18.4 is passed once in 10,000.
    assert ((observed - expected)[possible] ** 2 / expected[possible]).sum() < 18.4
    np.testing.assert_allclose(got.scores, np.log(weights)[np.concatenate(got.tokens)], atol=1e-5)


def test_lengths_of_a_bucket_and_values_of_the_settings_share_one_compilation() -> None:
    shared = {"num_beams": 2, "num_return_sequences": 2}
    search(False, PROMPTS, (18,), max_new_tokens=COUNT, **shared)
    before = beam.compiled_search._cache_size()
    for length in range(1, 17):
        values: dict[str, Any] = {"length_penalty": length / 5 - 1, "early_stopping": (True, False, "never")[length % 3]}
        search(False, [[1] * length, [2], [3]], (length,), max_new_tokens=1 + length % 8, **shared | values)
    assert beam.compiled_search._cache_size() == before


def test_a_text_past_the_context_is_refused() -> None:
    with pytest.raises(UserError, match="5 tokens and max_new_tokens=20 are more than model.max_seq_len=24"):
        search(False, PROMPTS[:1], (), num_beams=2, max_new_tokens=20)


def test_what_beams_cannot_do_is_refused() -> None:
    asked = {"settings": GenerationConfig(num_beams=2, do_sample=False), "seed": 0, "eos_ids": (), "vocab_size": 4}
    with pytest.raises(UserError, match="cannot follow"):
        beam.generate_tokens(TINY_PARAMS, TINY, [[1]], guides=(object(),), **asked)
    with pytest.raises(UserError, match="cannot stream"):
        beam.generate_tokens(TINY_PARAMS, TINY, [[1]], on_tokens=print, **asked)
    nothing = beam.generate_tokens(TINY_PARAMS, TINY, [], **asked)
    assert nothing.tokens == () and nothing.scores.shape == (0,)
