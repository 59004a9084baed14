"""Each processor against brute force in float64."""

from __future__ import annotations

import itertools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import UserError
from gptjax.generate import processors
from gptjax.generate.processors import History, Vocabulary
from gptjax.generate.settings import GenerationConfig

keep_top_k, keep_top_p = jax.jit(processors.keep_top_k), jax.jit(processors.keep_top_p)
draw, process = jax.jit(processors.draw), jax.jit(processors.process, static_argnums=0)
LOGITS = np.random.default_rng(0).normal(0, 2, (5, 23)).astype(np.float32)


def filtered(logits: np.ndarray, settings: GenerationConfig) -> jax.Array:
    ones = jnp.ones(len(logits), jnp.int32)
    history = History(tokens_BW=ones[:, None], lengths_B=ones, prompt_lengths_B=ones, limits_B=10 * ones)
    names, values = processors.plan(settings, Vocabulary(size=logits.shape[1], eos_ids=()))
    return process(names, values, jnp.asarray(logits), history)


def kept(logits: jax.Array) -> np.ndarray:
    return np.isfinite(np.asarray(logits))


def probabilities(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(logits.astype(np.float64) - logits.max())
    return weights / weights.sum()


def brute_top_k(row: np.ndarray, k: int) -> np.ndarray:
    """Kept where fewer than k logits are strictly higher."""
    return np.array([sum(other > value for other in row) < k for value in row]) if k else np.ones(len(row), bool)


def brute_top_p(row: np.ndarray, p: float) -> np.ndarray:
    """Kept where the strictly more probable tokens do not reach p by themselves."""
    probs = probabilities(row)
    return np.array([sum(other for other in probs if other > value) < p for value in probs])


@pytest.mark.parametrize("k", [0, 1, 2, 7, 22, 23, 24, 1000])
def test_top_k_equals_brute_force(k: int) -> None:
    got = keep_top_k(jnp.asarray(LOGITS), jnp.int32(k))
    expected = np.stack([brute_top_k(row, k) for row in LOGITS])
    np.testing.assert_array_equal(kept(got), expected)
    np.testing.assert_array_equal(np.asarray(got)[expected], LOGITS[expected])


def test_top_k_keeps_all_that_tie_with_the_kth() -> None:
    got = keep_top_k(jnp.array([[1.0, 3.0, 2.0, 2.0, 2.0, 0.0]]), jnp.int32(2))
    np.testing.assert_array_equal(kept(got)[0], [False, True, True, True, True, False])


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.35, 0.5, 0.9, 0.99, 1.0])
def test_top_p_equals_brute_force(p: float) -> None:
    got = keep_top_p(jnp.asarray(LOGITS), jnp.float32(p))
    expected = np.stack([brute_top_p(row, p) for row in LOGITS])
    np.testing.assert_array_equal(kept(got), expected)
    np.testing.assert_array_equal(np.asarray(got)[expected], LOGITS[expected])


def test_top_p_ties_and_exact_sums() -> None:
    # Probabilities 1/2, 1/8 four times: exact in binary. Half is reached by the first alone; past it the four tie.
    logits = jnp.log(jnp.array([[0.125, 0.5, 0.125, 0.125, 0.125]]))
    np.testing.assert_array_equal(kept(keep_top_p(logits, jnp.float32(0.49)))[0], [False, True, False, False, False])
    assert kept(keep_top_p(logits, jnp.float32(0.51))).all()


def test_top_p_of_one_keeps_what_rounding_would_lose() -> None:
    # 1 + 1e-9 is 1 in float32, so the running sum alone would cut the tail.
    assert kept(keep_top_p(jnp.array([[20.0, 0.0, 0.0]]), jnp.float32(1.0))).all()


@pytest.mark.parametrize("temperature", [0.1, 1.0, 3.0])
def test_temperature_gives_the_tempered_distribution(temperature: float) -> None:
    got = processors.apply_temperature(jnp.asarray(LOGITS), jnp.float32(temperature))
    for row, expected in zip(np.asarray(got), LOGITS, strict=True):
        np.testing.assert_allclose(probabilities(row), probabilities(expected / temperature), atol=1e-6)


def test_a_tiny_temperature_is_greedy_and_finite_where_it_counts() -> None:
    keys = jax.random.split(jax.random.key(0), len(LOGITS))
    drawn = draw(filtered(LOGITS, GenerationConfig(temperature=1e-38, top_p=0.9, top_k=5)), keys, np.bool_(False))
    np.testing.assert_array_equal(drawn, LOGITS.argmax(-1))


@pytest.mark.parametrize(("temperature", "k", "p"), list(itertools.product([0.7, 1.5], [0, 5], [0.6, 1.0])))
def test_the_composition_is_temperature_then_top_k_then_top_p(temperature: float, k: int, p: float) -> None:
    got = filtered(LOGITS, GenerationConfig(temperature=temperature, top_k=k, top_p=p))
    for row, logits in zip(np.asarray(got), LOGITS, strict=True):
        tempered = logits.astype(np.float64) / temperature
        after_k = np.where(brute_top_k(tempered, k), tempered, -np.inf)
        expected = np.where(brute_top_p(after_k, p) & np.isfinite(after_k), after_k, -np.inf)
        np.testing.assert_allclose(probabilities(row), probabilities(expected), atol=1e-6)


def test_draws_follow_the_filtered_distribution() -> None:
    settings = GenerationConfig(temperature=1.3, top_k=6, top_p=0.9)
    count = 20_000
    logits = filtered(LOGITS[:1], settings)
    keys = jax.random.split(jax.random.key(1), count)
    drawn = np.asarray(draw(jnp.broadcast_to(logits, (count, logits.shape[1])), keys, np.bool_(False)))
    expected = probabilities(np.asarray(logits)[0]) * count
    observed = np.bincount(drawn, minlength=LOGITS.shape[1])
    assert observed[expected == 0].sum() == 0
    possible = expected > 0
    chi_square = ((observed - expected)[possible] ** 2 / expected[possible]).sum()
    # At most 5 degrees of freedom; 25.7 is passed once in 10,000.
    assert possible.sum() <= 6
    assert chi_square < 25.7


def test_greedy_is_the_argmax_of_unmodified_logits() -> None:
    keys = jax.random.split(jax.random.key(0), len(LOGITS))
    for settings in (GenerationConfig(do_sample=False, temperature=5.0, top_k=3, top_p=0.2), GenerationConfig(temperature=0.0)):
        assert settings.greedy
        np.testing.assert_array_equal(filtered(LOGITS, settings), LOGITS)
        np.testing.assert_array_equal(draw(jnp.asarray(LOGITS), keys, np.bool_(True)), LOGITS.argmax(-1))


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"temperature": -1.0}, "temperature=-1.0"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"top_k": -1}, "top_k=-1"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"top_p": 1.1}, "top_p=1.1"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"num_return_sequences": 0}, "num_return_sequences=0"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        GenerationConfig(**settings)
