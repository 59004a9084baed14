"""Each processor against brute force in float64, alone and in company, and draws against exact distributions."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.stats

from gptjax.config import UserError
from gptjax.generate import processors, truncation
from gptjax.generate.processors import Vocabulary
from gptjax.generate.settings import GenerationConfig
from tests.generate.processor_cases import (
    COLUMNS,
    ORDER,
    ROWS,
    VOCABULARY,
    Row,
    alone,
    brute,
    history,
    kept,
    probabilities,
    random_logits,
    random_rows,
    random_settings,
    together,
)

draw = jax.jit(processors.draw)
keep_top_k, keep_top_p = jax.jit(truncation.keep_top_k), jax.jit(truncation.keep_top_p)
# Instead of what it contradicts.
PREFIX = {"forced_bos_token_id": None, "forced_prefix_ids": (3, 19, 2), "min_new_tokens": 0, "min_length": 7}


def agree(got: Any, expected: np.ndarray, name: str) -> None:
    np.testing.assert_array_equal(kept(got), kept(expected), err_msg=name)
    # Logits are of size 10 at most, but for make_finite's, which are the largest float32.
    np.testing.assert_allclose(np.asarray(got)[kept(got)], expected[kept(got)], rtol=2e-6, atol=5e-6, err_msg=name)


@pytest.mark.parametrize(
    ("changes", "only"), [({}, ORDER), (PREFIX, ("min_length", "begin_suppress_tokens", "forced_prefix_ids"))]
)
def test_each_processor_equals_brute_force(changes: dict[str, Any], only: tuple[str, ...]) -> None:
    before = alone._cache_size()
    for seed in range(60):
        rng = np.random.default_rng(seed)
        settings, rows, logits = random_settings(rng, **changes), random_rows(rng), random_logits(rng)
        if seed % 3 == 0:
            logits[0, :3] = np.nan, np.inf, -np.inf
        names, values = processors.plan(settings, VOCABULARY)
        names = tuple(name for name in names if name in only)
        results = alone(names, {name: values[name] for name in names}, jnp.asarray(logits), history(rows, rng))
        for index, row in enumerate(rows):
            if np.isfinite(logits[index, : VOCABULARY.size]).all():  # others are for remove_invalid_values
                for name in names:
                    shifted = np.asarray(results[name][index])
                    if name == "temperature":  # which takes the highest logit off
                        shifted = shifted + logits[index].max() / np.float32(settings.temperature)
                    agree(shifted, brute(name, logits[index], row, settings), f"{name} {settings} {row}")
            elif changes == {}:
                expected = brute("remove_invalid_values", logits[index], row, settings)
                agree(results["remove_invalid_values"][index], expected, "remove_invalid_values")
        assert set(only) - set(names) <= {"forced_prefix_ids"}
    assert alone._cache_size() <= before + 1, "values ask for no other compilation"


@pytest.mark.parametrize(("changes", "least"), [({}, 1), (PREFIX, 3)])
def test_all_together_are_composed_in_the_stated_order(changes: dict[str, Any], least: int) -> None:
    left = []
    for seed in range(100, 130):
        rng = np.random.default_rng(seed)
        mild = {"top_k": 12, "top_p": 0.9, "typical_p": 0.9, "epsilon_cutoff": 0.01, "eta_cutoff": 0.01, "min_p": 0.01}
        mild |= {"no_repeat_ngram_size": 3, "encoder_no_repeat_ngram_size": 2, "top_h": 0.9}
        settings = random_settings(rng, **mild | changes)
        rows, logits = random_rows(rng), random_logits(rng)
        names, values = processors.plan(settings, VOCABULARY, min_tokens_to_keep=least)
        assert names == tuple(name for name in ORDER if name in names)
        got = together(names, values, jnp.asarray(logits), history(rows, rng))
        for index, row in enumerate(rows):
            expected = logits[index]
            for name in names:
                expected = brute(name, expected, row, settings, least)
            agree(got[index], expected, f"{settings} {row}")
            left.append(kept(expected).sum())
    assert set(processors.PROCESSORS) == set(ORDER)
    assert len(set(left)) > 4, "the last processor still has something to choose from"


def test_what_is_off_is_not_in_the_program() -> None:
    assert processors.plan(GenerationConfig(), VOCABULARY) == ((), {})
    sampled = GenerationConfig(top_k=3, top_p=0.5, min_p=0.1, typical_p=0.3, epsilon_cutoff=0.1, eta_cutoff=0.1, top_h=0.3)
    for greedy in ({"do_sample": False}, {"temperature": 0.0}):
        assert processors.plan(dataclasses.replace(sampled, **greedy), VOCABULARY) == ((), {})


def test_no_array_is_larger_than_the_logits_and_the_history() -> None:
    rng = np.random.default_rng(0)
    past = history(random_rows(rng), rng)
    names, values = processors.plan(random_settings(rng), VOCABULARY)
    jaxpr = jax.make_jaxpr(lambda logits: processors.process(names, values, logits, past))(jnp.zeros((ROWS, 5000)))

    def sizes(jaxpr: Any) -> Any:
        for equation in jaxpr.eqns:
            yield from (variable.aval.size for variable in equation.outvars)
            for inner in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")):
                inner = getattr(inner, "jaxpr", inner)
                if hasattr(inner, "eqns"):
                    yield from sizes(inner)

    assert max(sizes(jaxpr.jaxpr)) == ROWS * 5000


def test_longer_lists_share_a_compilation_with_others_of_their_power_of_two() -> None:
    rng = np.random.default_rng(0)
    past, logits = history(random_rows(rng), rng), jnp.asarray(random_logits(rng))
    before = together._cache_size()
    for count in (1, 5, 8, 9, 16):
        settings = GenerationConfig(
            suppress_tokens=range_of(count), bad_words_ids=[range_of(3)] * count, eos_token_id=range_of(count), min_length=9
        )
        names, values = processors.plan(settings, Vocabulary(VOCABULARY.size, settings.eos_ids(None)))
        got = together(names, values, logits, past)
        assert not kept(got)[:, :count].any() and kept(got)[:, count : VOCABULARY.size].all()
    assert together._cache_size() == before + 2


def range_of(count: int) -> tuple[int, ...]:
    return tuple(range(count))


@pytest.mark.parametrize(("k", "expected"), [(1, 1), (2, 4), (3, 4), (5, 5), (6, 6), (100, 6)])
def test_top_k_keeps_all_that_tie_with_the_kth(k: int, expected: int) -> None:
    got = keep_top_k(jnp.array([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]]), jnp.int32(k))
    np.testing.assert_array_equal(kept(got)[0], np.argsort(np.argsort([-1.0, -3, -2, -2, -2, 0], kind="stable")) < expected)


def test_zeros_of_both_signs_tie() -> None:
    got = keep_top_k(jnp.array([[0.0, -0.0, -1.0, -0.0, -2.0, -3.0]]), jnp.int32(1))
    assert kept(got)[0].tolist() == [True, True, False, True, False, False]


def test_top_p_ties_and_exact_sums() -> None:
    # Probabilities 1/2, 1/8 four times: exact in binary. Half is reached by the first alone; past it the four tie.
    logits = jnp.log(jnp.array([[0.125, 0.5, 0.125, 0.125, 0.125]]))
    np.testing.assert_array_equal(kept(keep_top_p(logits, jnp.float32(0.49)))[0], [False, True, False, False, False])
    assert kept(keep_top_p(logits, jnp.float32(0.51))).all()


def test_the_most_probable_token_stays_whatever_the_setting() -> None:
    tiny = {"top_p": 1e-40, "epsilon_cutoff": 0.999, "top_h": 1e-40, "min_p": 1.0}
    flat = np.zeros((1, COLUMNS), np.float32)
    flat[0, 4] = 1e-3
    rng = np.random.default_rng(0)
    settings = dataclasses.replace(random_settings(rng), **tiny)
    names, values = processors.plan(settings, VOCABULARY)
    results = alone(names, values, jnp.asarray(np.repeat(flat, ROWS, axis=0)), history(random_rows(rng), rng))
    for name in tiny:
        assert np.flatnonzero(kept(results[name])[0]).tolist() == [4], name


def test_a_tiny_temperature_is_greedy_and_finite_where_it_counts() -> None:
    logits = random_logits(np.random.default_rng(0))
    _, values = processors.plan(GenerationConfig(temperature=1e-38), VOCABULARY)
    tempered = truncation.apply_temperature(jnp.asarray(logits), values["temperature"])
    np.testing.assert_array_equal(draw(tempered, jax.random.split(jax.random.key(0), ROWS), np.bool_(False)), logits.argmax(-1))


def test_greedy_is_the_argmax() -> None:
    logits, keys = random_logits(np.random.default_rng(0)), jax.random.split(jax.random.key(0), ROWS)
    np.testing.assert_array_equal(draw(jnp.asarray(logits), keys, np.bool_(True)), logits.argmax(-1))


def test_a_row_with_nothing_left_takes_id_0() -> None:
    rng = np.random.default_rng(5)
    rows = [dataclasses.replace(row, limit=99) for row in random_rows(rng, length=5)]
    names, values = processors.plan(random_settings(rng), VOCABULARY)
    for name, got in alone(names, values, np.full((ROWS, COLUMNS), -np.inf, np.float32), history(rows, rng)).items():
        for greedy in (True, False):
            assert not np.asarray(draw(got, jax.random.split(jax.random.key(0), ROWS), np.bool_(greedy))).any(), name


DRAWS = 100_000
STRATEGIES: list[dict[str, Any]] = [
    {},
    {"temperature": 0.6},
    {"temperature": 1.7},
    {"top_k": 5},
    {"top_p": 0.8},
    {"min_p": 0.1},
    {"typical_p": 0.7},
    {"epsilon_cutoff": 0.03},
    {"eta_cutoff": 0.1},
    {"top_h": 0.5},
    {"repetition_penalty": 1.8},
    {"encoder_repetition_penalty": 1.8},
    {"presence_penalty": 0.7},
    {"frequency_penalty": 0.4},
    {"no_repeat_ngram_size": 2},
    {"bad_words_ids": [[1], [3, 0], [3, 3, 4]]},
    {"sequence_bias": [[[1], 1.5], [[3, 0], -1.0], [[0, 0, 0], 1.0]]},
    {"suppress_tokens": [0, 6], "min_new_tokens": 9, "exponential_decay_length_penalty": (1, 1.3)},
    {"temperature": 1.4, "top_k": 9, "top_p": 0.9},
    {"temperature": 0.8, "top_p": 0.95, "min_p": 0.02, "repetition_penalty": 1.2},
    {"temperature": 2.0, "typical_p": 0.9, "top_k": 12, "no_repeat_ngram_size": 2, "presence_penalty": 0.5},
    {"top_h": 0.9, "epsilon_cutoff": 0.02, "eta_cutoff": 0.02, "frequency_penalty": 0.3, "bad_words_ids": [[5], [3, 3, 4]]},
]


NO_SEQUENCES = processors.plan(GenerationConfig(sequence_bias=[[[0, 0, 0], 0.0]]), VOCABULARY)[1]["sequence_bias"]
# Values that change nothing.
NEUTRAL: dict[str, Any] = {
    "sequence_bias": NO_SEQUENCES,
    "encoder_repetition_penalty": np.float32(1),
    "repetition_penalty": np.float32(1),
    "presence_and_frequency_penalty": (np.float32(0), np.float32(0)),
    "no_repeat_ngram_size": np.int32(99),
    "bad_words_ids": NO_SEQUENCES,
    "temperature": np.float32(1),
    "top_h": np.float32(2),
    "top_k": processors.Part(np.int32(99)),
    "top_p": processors.Part(np.float32(2)),
    "min_p": processors.Part(np.float32(0)),
    "typical_p": processors.Part(np.float32(2)),
    "epsilon_cutoff": processors.Part(np.float32(0)),
    "eta_cutoff": processors.Part(np.float32(0)),
}


@jax.jit
def many_draws(values: Any, logits: jax.Array, past: processors.History, seed: jax.Array) -> jax.Array:
    """How often each token is drawn. One compilation for all strategies."""
    names = tuple(name for name in ORDER if name in values)
    logits_BV = jnp.broadcast_to(processors.process(names, values, logits, past), (DRAWS, COLUMNS))
    drawn_B = processors.draw(logits_BV, jax.random.split(jax.random.key(seed), DRAWS), jnp.bool_(False))
    return jnp.bincount(drawn_B, length=COLUMNS)


def test_draws_follow_the_exact_distribution_of_each_strategy_and_of_combinations() -> None:
    row = Row(tokens=[1, 2, 0, 3, 2, 1, 3, 3], prompt=[1, 2, 0, 3], limit=20)
    rng = np.random.default_rng(11)
    logits, past = 0.6 * random_logits(rng)[:1], history([row], rng)
    for number, strategy in enumerate(STRATEGIES):
        settings = GenerationConfig(**strategy)
        names, values = processors.plan(settings, VOCABULARY)
        observed = np.asarray(many_draws(NEUTRAL | values, logits, past, number))
        expected = logits[0].astype(np.float64)
        for name in names:
            expected = brute(name, expected, row, settings)
        unchanged = np.allclose(probabilities(expected), probabilities(logits[0]), atol=1e-3)
        assert unchanged == (not strategy), f"{strategy} has something to do"
        expected = probabilities(expected) * DRAWS
        assert observed[expected == 0].sum() == 0 and observed.sum() == DRAWS
        large = expected >= 20
        cells = [np.append(counts[large], counts[~large].sum()) for counts in (observed, expected)]
        possible = cells[1] > 0
        chi_square = ((cells[0] - cells[1])[possible] ** 2 / cells[1][possible]).sum()
        p_value = scipy.stats.chi2.sf(chi_square, possible.sum() - 1)
        assert possible.sum() > 2 and p_value > 1e-4, (strategy, p_value)
    assert many_draws._cache_size() == 2, "one, and one for what rules out ids and ends"


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"suppress_tokens": [3, 21]}, "suppress_tokens has the token id 21, but ids go from 0 to 20"),
        ({"bad_words_ids": [[1], [2, 30]]}, "bad_words_ids has the token id 30"),
        ({"sequence_bias": [[[21], 1.0]]}, "sequence_bias has the token id 21"),
        ({"forced_eos_token_id": 22}, "forced_eos_token_id has the token id 22"),
        ({"eos_token_id": [22, 1]}, "eos_token_id has the token id 22"),
        ({"suppress_tokens": list(range(21))}, "suppress_tokens rules out all 21 ids"),
    ],
)
def test_ids_that_the_vocabulary_lacks_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        processors.plan(GenerationConfig(**settings), VOCABULARY)
