"""Speculative decoding against plain decoding: token for token when greedy, else by chi-square against exact distributions."""

from __future__ import annotations

import dataclasses
import itertools
from typing import Any

import numpy as np
import pytest

from gptjax.config import ModelConfig, UserError
from gptjax.generate import decode, speculative
from gptjax.generate.settings import GenerationConfig
from gptjax.generate.speculative import Speculated
from tests.generate.small_models import FAMILIES, full_logits, model_config, random_params

CONFIG = model_config(**FAMILIES["llama"], max_seq_len=32)
DRAFT = model_config(**FAMILIES["gpt2"], num_layers=1, model_dim=8, max_seq_len=32)
PROMPTS = [[3, 1, 4, 1, 5], [9], [6, 5, 3, 5, 8, 9, 5], [7, 7, 7]]
GREEDY = GenerationConfig(max_new_tokens=16, do_sample=False, num_assistant_tokens=4)
LOOKUP = dataclasses.replace(GREEDY, prompt_lookup_num_tokens=4)

TINY = model_config(**FAMILIES["gpt2"], vocab_size=5, num_layers=1, model_dim=8, num_heads=2, num_kv_heads=1, max_seq_len=16)
TINY_PARAMS, TINY_DRAFT = random_params(TINY, 0, scale=0.3), random_params(TINY, 1, scale=0.3)


def run(params: Any, prompts: list[list[int]], settings: GenerationConfig, draft: Any = None, **changes: Any) -> Speculated:
    options = {"seed": 0, "eos_ids": (), "vocab_size": 37} | changes
    return speculative.generate_tokens(params, CONFIG, prompts, settings=settings, draft=draft, **options)


def plain(params: Any, prompts: list[list[int]], settings: GenerationConfig, **changes: Any) -> decode.Generated:
    options = {"seed": 0, "eos_ids": (), "vocab_size": 37} | changes
    return decode.generate_tokens(params, CONFIG, prompts, settings=settings, **options)


def lists(generated: decode.Generated) -> list[list[int]]:
    return [row.tolist() for row in generated.tokens]


@pytest.mark.parametrize("drafted", ["by a model", "by lookup"])
def test_greedy_equals_plain_greedy_token_for_token(drafted: str) -> None:
    kept, shown = 0, 0
    for seed in range(30):
        params = random_params(CONFIG, seed)
        eos_ids = (seed, seed + 1)
        expected = plain(params, PROMPTS, GREEDY, eos_ids=eos_ids)
        if drafted == "by lookup":
            got = run(params, PROMPTS, LOOKUP, eos_ids=eos_ids)
        else:
            # A stranger's drafts are never right; the model's own, disturbed a little, often are.
            got = run(params, PROMPTS, GREEDY, (near(params, seed), CONFIG), eos_ids=eos_ids)
        assert lists(got) == lists(expected)
        np.testing.assert_array_equal(got.stopped, expected.stopped)
        for row, own in zip(got.log_probs, expected.log_probs, strict=True):
            np.testing.assert_allclose(row, own, atol=1e-4)
        assert (got.num_new >= got.rounds).all() and (got.rounds + got.accepted >= got.num_new).all()
        kept, shown = kept + got.accepted.sum(), shown + got.drafted.sum()
    assert 0.2 < kept / shown < 0.95, "some drafts should be kept, and some not"


def near(params: Any, seed: int) -> Any:
    """The model with noise on its head."""
    noise = np.random.default_rng(seed).normal(0, 0.1, params["head"].shape).astype(np.float32)
    return params | {"head": params["head"] + noise}


def test_a_model_that_drafts_for_itself_is_always_right() -> None:
    params = random_params(CONFIG)
    got = run(params, PROMPTS, GREEDY, (params, CONFIG))
    np.testing.assert_array_equal(got.accepted, got.drafted)
    # 16 tokens: three rounds of 4 + 1, and the last one.
    np.testing.assert_array_equal(got.rounds, [4, 4, 4, 4])
    np.testing.assert_array_equal(got.accepted, [12, 12, 12, 12])


def looked_up(prompt: list[int], new: list[int], most: int, ngram: int) -> tuple[int, int, int]:
    """(rounds, drafted, accepted) of a text that is known, by lists."""
    text, end, counts = list(prompt), len(prompt) + GREEDY.max_new_tokens, [0, 0, 0]
    whole = prompt + new
    while len(text) < len(whole):
        drafts: list[int] = []
        for size in range(min(ngram, len(text) - 1), 0, -1):
            starts = [start for start in range(len(text) - size) if text[start : start + size] == text[-size:]]
            if starts:
                drafts = text[starts[0] + size :][: min(most, end - len(text) - 1)]
                break
        right = list(itertools.takewhile(lambda pair: pair[0] == pair[1], zip(drafts, whole[len(text) :], strict=False)))
        counts = [counts[0] + 1, counts[1] + len(drafts), counts[2] + len(right)]
        text = whole[: len(text) + len(right) + 1]
    return counts[0], counts[1], counts[2]


@pytest.mark.parametrize(("most", "ngram"), [(1, 1), (3, 2), (4, 5)])
def test_lookup_drafts_what_followed_the_longest_ngram(most: int, ngram: int) -> None:
    params = random_params(CONFIG, 7)
    settings = dataclasses.replace(LOOKUP, prompt_lookup_num_tokens=most, max_matching_ngram_size=ngram)
    prompts = [[1, 2, 3, 1, 2, 4, 1, 2], [5, 5, 5, 5], [1, 2, 3, 4, 5, 6, 2, 3], [9]]
    got = run(params, prompts, settings)
    expected = [looked_up(prompt, row, most, ngram) for prompt, row in zip(prompts, lists(got), strict=True)]
    assert list(zip(got.rounds.tolist(), got.drafted.tolist(), got.accepted.tolist(), strict=True)) == expected


def exact(prompt: tuple[int, ...], length: int, temperature: float, k: int, eos: int) -> dict[tuple[int, ...], float]:
    """Probability of each continuation."""
    chances = {(): 1.0}
    for _ in range(length):
        longer: dict[tuple[int, ...], float] = {}
        for text, chance in chances.items():
            if text and text[-1] == eos:
                longer[text] = chance
                continue
            logits = full_logits(TINY_PARAMS, TINY, [*prompt, *text])[-1].astype(np.float64) / temperature
            weights = np.where(logits >= np.sort(logits)[-k], np.exp(logits - logits.max()), 0)
            longer |= {(*text, token): chance * weight for token, weight in enumerate(weights / weights.sum()) if weight}
        chances = longer
    return chances


@pytest.mark.parametrize("drafted", ["by a model", "by lookup"])
def test_draws_follow_the_models_own_distribution(drafted: str) -> None:
    """Chi-square of whole continuations over 100,000 draws, for several settings that share a compilation."""
    prompt, rows, eos, length = [1, 2, 0, 1, 3, 1, 2], 25_000, 4, 3
    for temperature, k, count in [(0.7, 4, 2), (2.0, 5, 4)]:
        given = {"max_new_tokens": length, "temperature": temperature, "top_k": k, "num_assistant_tokens": count}
        settings = GenerationConfig(**given, prompt_lookup_num_tokens=count if drafted == "by lookup" else 0)
        draft = None if drafted == "by lookup" else (TINY_DRAFT, TINY)
        observed: dict[tuple[int, ...], int] = {}
        kept = shown = 0
        for call in range(4):
            got = speculative.generate_tokens(
                TINY_PARAMS, TINY, [prompt] * rows, settings=settings, seed=5, eos_ids=(eos,), vocab_size=5, draft=draft,
                samples=range(call * rows, (call + 1) * rows),
            )  # fmt: skip
            for row in got.tokens:
                observed[tuple(row.tolist())] = observed.get(tuple(row.tolist()), 0) + 1
            kept, shown = kept + got.accepted.sum(), shown + got.drafted.sum()
        assert 0.1 < kept / shown < 0.9, "both ways of settling a token should be common"
        chances = exact(tuple(prompt), length, temperature, k, eos)
        assert set(observed) <= set(chances)
        expected = {text: 4 * rows * chance for text, chance in chances.items()}
        rare = {text for text, count in expected.items() if count < 10}  # pooled: the test needs some in each cell
        cells = [(observed.get(text, 0), count) for text, count in expected.items() if text not in rare]
        cells += [(sum(observed.get(text, 0) for text in rare), sum(expected[text] for text in rare))] if rare else []
        chi_square = sum((seen - count) ** 2 / count for seen, count in cells)
        freedom = len(cells) - 1
        # Wilson and Hilferty's approximation of the point that is passed once in 10,000 (3.719 standard deviations).
        assert freedom > 10
        assert chi_square < freedom * (1 - 2 / (9 * freedom) + 3.719 * (2 / (9 * freedom)) ** 0.5) ** 3


def test_a_row_depends_on_its_prompt_sample_and_seed_alone() -> None:
    settings = dataclasses.replace(GREEDY, do_sample=True)
    params = random_params(CONFIG)
    draft = near(params, 0), CONFIG
    together = run(params, PROMPTS, settings, draft, samples=[4, 5, 6, 7])
    others = run(params, [PROMPTS[2], [1, 1], PROMPTS[0], PROMPTS[0]], settings, draft, samples=[6, 0, 4, 5])
    assert lists(others)[0] == lists(together)[2] and lists(others)[2] == lists(together)[0]
    assert others.rounds[[0, 2]].tolist() == together.rounds[[2, 0]].tolist()
    assert lists(others)[3] != lists(others)[2], "two samples of one prompt"
    assert lists(run(params, PROMPTS, settings, draft, samples=[4, 5, 6, 7], seed=1)) != lists(together)


def test_counts_and_lengths_of_a_bucket_share_one_compilation() -> None:
    params = random_params(CONFIG)
    run(params, PROMPTS, LOOKUP)
    before = speculative.compiled_rounds._cache_size()
    for length in range(1, 17):
        values = {"prompt_lookup_num_tokens": 1 + length % 4, "max_matching_ngram_size": 1 + length % 3}
        settings = dataclasses.replace(LOOKUP, max_new_tokens=1 + length % 16, do_sample=length % 2 == 0, **values)
        run(params, [[1] * length, [2], [3], [4]], settings, seed=length, eos_ids=(length,))
    assert speculative.compiled_rounds._cache_size() == before


@pytest.mark.parametrize(
    ("settings", "draft", "named"),
    [
        (GREEDY, None, "prompt_lookup_num_tokens=0"),
        (LOOKUP, CONFIG, "only one can draft"),
        (GREEDY, dataclasses.replace(CONFIG, vocab_size=38), "model.vocab_size=38 and the model 37"),
        (GREEDY, dataclasses.replace(CONFIG, max_seq_len=20), "more than model.max_seq_len=20, past which the draft model"),
        (dataclasses.replace(LOOKUP, max_new_tokens=26), None, "7 tokens and max_new_tokens=26"),
    ],
)
def test_what_makes_no_sense_is_refused(settings: GenerationConfig, draft: ModelConfig | None, named: str) -> None:
    with pytest.raises(UserError, match=named):
        run(None, PROMPTS, settings, None if draft is None else (None, draft))
