"""Generation against one full forward a token."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import ModelConfig, UserError
from gptjax.generate import decode
from gptjax.generate.decode import generate_tokens
from gptjax.generate.settings import GenerationConfig
from gptjax.model.attention import Cache
from gptjax.model.cache import BLOCK
from gptjax.model.decoder import Decoder
from tests.generate.small_models import FAMILIES, full_logits, greedy_by_full_forwards, model_config, random_params

# Every test asks for three rows and for a count of one bucket where it can: compiling takes all the time.
COUNT = 40  # two and a half contexts: each row goes on from its last half several times
GREEDY = GenerationConfig(max_new_tokens=COUNT, do_sample=False)
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9, 3]]


@pytest.fixture(params=sorted(FAMILIES))
def model(request: pytest.FixtureRequest) -> tuple[Any, ModelConfig]:
    config = model_config(**FAMILIES[request.param])
    return random_params(config), config


def run(model: tuple[Any, ModelConfig], prompts: list[list[int]], **changes: Any) -> decode.Generated:
    params, config = model
    options = {"settings": GREEDY, "seed": 0, "eos_ids": (), "vocab_size": config.vocab_size} | changes
    return generate_tokens(params, config, prompts, **options)


def lists(generated: decode.Generated) -> list[list[int]]:
    return [row.tolist() for row in generated.tokens]


@pytest.mark.parametrize("prompt_length", [1, 7])
def test_cached_logits_equal_the_full_forward_at_every_position(model: tuple[Any, ModelConfig], prompt_length: int) -> None:
    params, config = model
    tokens = np.random.default_rng(1).integers(0, config.vocab_size, (2, config.max_seq_len)).astype(np.int32)
    step = jax.jit(lambda *inputs: Decoder(config).apply({"params": params}, inputs[0], inputs[1], cache=inputs[2]))

    positions = np.broadcast_to(np.arange(prompt_length, dtype=np.int32), (2, prompt_length))
    logits, cache = step(tokens[:, :prompt_length], positions, Cache.empty(config, 2, config.max_seq_len))
    pieces = [logits]
    for position in range(prompt_length, config.max_seq_len):
        logits, cache = step(tokens[:, position : position + 1], np.full((2, 1), position, np.int32), cache)
        pieces.append(logits)

    for row in range(2):
        expected = full_logits(params, config, tokens[row].tolist())
        got = np.concatenate([np.asarray(piece)[row] for piece in pieces])
        # Logits are of size 10; a float32 sum of 16 products in another order is off by some 1e-6 of that.
        np.testing.assert_allclose(got, expected, atol=1e-5)


def test_ragged_greedy_equals_full_forwards_past_the_context_too(model: tuple[Any, ModelConfig]) -> None:
    context = model[1].max_seq_len
    for prompts in (PROMPTS, [[7] * context, [8] * (context - 1), list(range(context))]):
        expected = [greedy_by_full_forwards(*model, prompt, COUNT) for prompt in prompts]
        assert lists(run(model, prompts)) == expected


def test_a_context_of_one_sees_one_token_at_a_time() -> None:
    config = model_config(max_seq_len=1, **FAMILIES["gpt2"])
    params = random_params(config)
    tokens = [2]
    for _ in range(9):
        tokens.append(int(full_logits(params, config, tokens[-1:])[-1].argmax()))
    assert lists(run((params, config), [[2]], settings=dataclasses.replace(GREEDY, max_new_tokens=9))) == [tokens[1:]]


def test_a_row_stops_at_eos_and_the_others_go_on(model: tuple[Any, ModelConfig]) -> None:
    settings = GenerationConfig(max_new_tokens=COUNT, temperature=2.0)
    plain = lists(run(model, PROMPTS, settings=settings))
    eos = plain[0][4]
    generated = run(model, PROMPTS, settings=settings, eos_ids=(eos,))
    for row, stopped, unstopped in zip(lists(generated), generated.stopped, plain, strict=True):
        assert stopped == (eos in unstopped)
        assert row == (unstopped[: unstopped.index(eos) + 1] if stopped else unstopped)
    assert generated.stopped[0]
    assert generated.num_new.tolist() == [len(row) for row in lists(generated)]
    assert len(set(generated.num_new.tolist())) > 1, "the case should hold rows of different lengths"


def test_a_rows_tokens_do_not_depend_on_the_rest_of_the_batch(model: tuple[Any, ModelConfig]) -> None:
    settings = GenerationConfig(max_new_tokens=COUNT, temperature=1.2, top_k=20, top_p=0.95)
    context = model[1].max_seq_len
    prompts = [PROMPTS[0], list(range(context)), PROMPTS[0]]
    samples = [0, 7, 3]
    together = lists(run(model, prompts, settings=settings, samples=samples))
    for prompt, sample, expected in zip(prompts, samples, together, strict=True):
        assert lists(run(model, [prompt], settings=settings, samples=[sample])) == [expected]
    backwards = lists(run(model, prompts[::-1], settings=settings, samples=samples[::-1]))
    assert backwards[::-1] == together
    assert together[0] != together[2], "two samples of one prompt"


def test_the_seed_and_nothing_else_changes_the_draws(model: tuple[Any, ModelConfig]) -> None:
    draws = [lists(run(model, PROMPTS, settings=GenerationConfig(max_new_tokens=COUNT), seed=seed)) for seed in (0, 0, 1)]
    assert draws[0] == draws[1] != draws[2]
    longer = lists(run(model, PROMPTS, settings=GenerationConfig(max_new_tokens=50)))
    assert [row[:COUNT] for row in longer] == draws[0]


def test_ids_past_the_tokenizer_are_never_drawn(model: tuple[Any, ModelConfig]) -> None:
    for settings in (GREEDY, GenerationConfig(max_new_tokens=COUNT, temperature=100.0)):
        rows = lists(run(model, [[0, 1], [2], [3]], settings=settings, vocab_size=5))
        assert max(max(row) for row in rows) < 5


def test_bfloat16_runs_with_a_bfloat16_cache() -> None:
    config = model_config(dtype="bfloat16", **FAMILIES["llama"] | {"tied_embeddings": True})
    generated = run((random_params(config), config), PROMPTS)
    assert generated.num_new.tolist() == [COUNT, COUNT, COUNT]
    assert Cache.empty(config, 1, 8).keys.dtype == jnp.bfloat16


def test_nothing_to_do() -> None:
    config = model_config()
    params = random_params(config)
    assert lists(run((params, config), PROMPTS, settings=dataclasses.replace(GREEDY, max_new_tokens=0))) == [[], [], []]
    assert lists(run((params, config), [])) == []


def test_lengths_of_a_bucket_and_values_of_the_settings_share_one_compilation() -> None:
    config = model_config(num_layers=1, max_seq_len=64)  # of this test alone, so that its first call does compile
    model = random_params(config), config
    before = decode.compiled_generate._cache_size()
    for length in range(1, 17):
        settings = GenerationConfig(length, temperature=0.55 + length / 10, top_k=1 + length % 5, top_p=1 - length / 50)
        eos_ids = () if length % 2 else (3,)
        run(model, [[1] * length], settings=settings, seed=length, eos_ids=eos_ids, vocab_size=20 + length)
    assert decode.compiled_generate._cache_size() == before + 1
    run(model, [[1] * 17], settings=dataclasses.replace(settings, max_new_tokens=COUNT))
    assert decode.compiled_generate._cache_size() == before + 2, "the count should see another bucket"


@pytest.mark.parametrize(
    ("prompts", "changes", "named"),
    [
        ([[1] * 16], {}, "16 tokens, more than model.max_seq_len=15"),
        ([[1], []], {}, "prompt 1 is empty"),
        ([[1, 37]], {}, "token id 37"),
        ([[1, -2]], {}, "token id -2"),
        ([[1]], {"vocab_size": 38}, "model.vocab_size=37"),
        ([[1]], {"seed": -1}, "seed=-1"),
    ],
)
def test_what_cannot_be_answered_is_refused(prompts: list[list[int]], changes: dict[str, Any], named: str) -> None:
    config = model_config()
    with pytest.raises(UserError, match=named):
        run((random_params(config), config), prompts, **changes)


def test_rows_that_cross_a_block_of_the_cache_equal_full_forwards_to_the_contexts_end() -> None:
    config = model_config(max_seq_len=2 * BLOCK + 9, num_layers=1, attention_window=BLOCK + 50, **FAMILIES["llama"])
    model = random_params(config, scale=0.3), config
    rng = np.random.default_rng(3)
    prompts = [rng.integers(0, config.vocab_size, length).tolist() for length in (2 * BLOCK - 7, BLOCK - 3)]
    generated = run(model, prompts, settings=dataclasses.replace(GREEDY, max_new_tokens=16))
    for prompt, tokens, log_probs in zip(prompts, generated.tokens, generated.log_probs, strict=True):
        logits_TV = full_logits(*model, [*prompt, *tokens.tolist()])[len(prompt) - 1 : -1].astype(np.float64)
        assert tokens.tolist() == logits_TV.argmax(-1).tolist()
        expected = logits_TV.max(-1) - np.log(np.exp(logits_TV).sum(-1))
        np.testing.assert_allclose(log_probs, expected, atol=1e-5)
    assert len(set(generated.tokens[0].tolist())) > 3, "the case should not repeat one token"
