"""Guides, the function that hears each step, and the log-probabilities that come back."""

from __future__ import annotations

import dataclasses
import signal
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import struct
from scipy.special import log_softmax

from gptjax.generate import decode, listening
from gptjax.generate.processors import History
from gptjax.generate.settings import GenerationConfig
from tests.generate.small_models import FAMILIES, full_logits, model_config, random_params

COUNT = 16
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9, 3]]
VOCAB = 30
CONFIG = model_config(max_seq_len=32, **FAMILIES["gpt2"])
PARAMS = random_params(CONFIG)


def run(**changes: Any) -> decode.Generated:
    options = {"settings": GenerationConfig(max_new_tokens=COUNT), "seed": 0, "eos_ids": (), "vocab_size": VOCAB} | changes
    return decode.generate_tokens(PARAMS, CONFIG, PROMPTS, **options)


@struct.dataclass
class OneKind:
    """Odd rows draw odd ids, even rows even ones; a row ends with the `quota`-th, and its last token is 0 or 1."""

    kind_B: Any
    quota_B: Any

    def allowed(self, logits_BV: jax.Array, history: History, left_B: jax.Array) -> jax.Array:
        ids_V = jnp.arange(logits_BV.shape[-1])
        fits_BV = (ids_V % 2 == self.kind_B[:, None]) & ((left_B > 1) & (self.quota_B > 1) | (ids_V < 2)[:, None]).T
        return jnp.where(fits_BV, logits_BV, -jnp.inf)

    def advanced(self, tokens_B: jax.Array, alive_B: jax.Array) -> OneKind:
        return OneKind(self.kind_B, self.quota_B - alive_B)

    def stopped(self) -> jax.Array:
        return self.quota_B == 0


def test_a_guide_bounds_what_comes_and_ends_rows() -> None:
    quotas = np.array([4, 100, 1], np.int32)
    generated = run(guides=(OneKind(np.array([0, 1, 0], np.int32), quotas),))
    assert generated.num_new.tolist() == [4, COUNT, 1]
    assert generated.guided.tolist() == [True, False, True]
    assert not generated.stopped.any()
    for row, kind in zip(generated.tokens, (0, 1, 0), strict=True):
        assert set((row % 2).tolist()) == {kind}
        assert row[-1] == kind, "the guide knows what is left"


def test_a_guide_of_other_values_is_no_other_compilation() -> None:
    def quotas(first: int) -> decode.Generated:
        return run(guides=(OneKind(np.array([0, 1, 0], np.int32), np.array([first, 100, 1], np.int32)),))

    quotas(4)
    before = decode.compiled_generate._cache_size()
    assert quotas(5).num_new.tolist() == [5, COUNT, 1]
    assert decode.compiled_generate._cache_size() == before


def test_log_probabilities_are_the_models_own_over_the_tokenizers_ids() -> None:
    settings = GenerationConfig(max_new_tokens=COUNT, temperature=0.7, top_k=9)
    generated = run(settings=settings, guides=(OneKind(np.array([0, 1, 0], np.int32), np.array([4, 100, 1], np.int32)),))
    for prompt, tokens, log_probs in zip(PROMPTS, generated.tokens, generated.log_probs, strict=True):
        assert log_probs.dtype == np.float32
        logits_TV = full_logits(PARAMS, CONFIG, [*prompt, *tokens.tolist()])[len(prompt) - 1 : -1, :VOCAB]
        expected = log_softmax(logits_TV.astype(np.float64), axis=-1)[np.arange(len(tokens)), tokens]
        # Logits are of size 10; a float32 sum of 16 products in another order is off by some 1e-6 of that.
        np.testing.assert_allclose(log_probs, expected, atol=1e-5)


def test_every_step_is_heard_in_order_and_another_listener_is_no_other_compilation() -> None:
    plain = run()
    eos = int(plain.tokens[0][3])
    for attempt in range(2):
        steps: list[tuple[np.ndarray, np.ndarray]] = []
        generated = run(eos_ids=(eos,), on_tokens=lambda *step, steps=steps: steps.append(step))
        heard = [[int(tokens[row]) for tokens, alive in steps if alive[row]] for row in range(len(PROMPTS))]
        assert heard == [row.tolist() for row in generated.tokens]
        assert len(steps) == generated.num_new.max()
        if attempt == 0:
            before = decode.compiled_generate._cache_size()
    assert decode.compiled_generate._cache_size() == before
    assert generated.num_new[0] <= 4, "the case should hold a row that ends early"
    assert not listening._listeners


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_what_a_listener_raises_ends_the_call(error: type[BaseException]) -> None:
    steps = []

    def fail(tokens_B: np.ndarray, alive_B: np.ndarray) -> None:
        steps.append(tokens_B)
        if len(steps) == 3:
            raise error("enough")

    with pytest.raises(error, match="enough"):
        run(on_tokens=fail)
    assert len(steps) == 3
    assert run().num_new.tolist() == [COUNT] * 3


def test_ctrl_c_while_a_call_runs_ends_it() -> None:
    steps = []
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # what a shell starts in the background ignores it

    def interrupt(tokens_B: np.ndarray, alive_B: np.ndarray) -> None:
        steps.append(tokens_B)
        if len(steps) == 2:
            signal.raise_signal(signal.SIGINT)

    try:
        with pytest.raises(KeyboardInterrupt):
            run(on_tokens=interrupt)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(steps) == 2


def test_greedy_log_probabilities_do_not_depend_on_a_listener() -> None:
    settings = dataclasses.replace(GenerationConfig(max_new_tokens=COUNT), do_sample=False)
    heard, alone = run(settings=settings, on_tokens=lambda *step: None), run(settings=settings)
    for one, other in zip(heard.log_probs, alone.log_probs, strict=True):
        np.testing.assert_array_equal(one, other)
