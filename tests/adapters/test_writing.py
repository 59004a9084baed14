"""Texts behind places that prompt and prefix tuning put ahead: written and scored, against whole rows without a cache."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.adapters.merge import for_writing
from gptjax.config import Config, UserError
from gptjax.generate import decode, filling, forward, strategies, weights
from gptjax.generate.settings import GenerationConfig
from gptjax.generate.text import generate_text, prompt_ids
from gptjax.harness.likelihood import Likelihood, Row, score_rows
from gptjax.model.decoder import logits, output_table
from gptjax.parallel.mesh import make_mesh
from gptjax.train.objectives import Example
from gptjax.train.step import hidden_states
from tests.adapters.cases import WINDOWS, case, drawn
from tests.small import LLAMA, Letters, small

CONFIGS = {
    "prompt": case("prompt"),
    "prefix": case("prefix"),
    "prompt of a llama in int8": small(LLAMA, WINDOWS, {"adapter.method": "prompt", "adapter.base": "int8"}),
    "prefix with a window": small(WINDOWS, {"adapter.method": "prefix", "model.position": "alibi", "model.attention_window": 6}),
    "prefix LM": small(WINDOWS, {"adapter.method": "prefix", "objective.name": "prefix"}),
}
PLACES = 3
LONGEST = 16 - PLACES


@functools.lru_cache(maxsize=8)
def made(name: str) -> tuple[Config, Any, Any]:
    """(config, its parameters, those that generation takes)."""
    config = CONFIGS[name]
    params = drawn(config)
    same, writing = for_writing(config, params)
    assert same == config and "adapters" not in writing
    return config, params, weights.prepare(writing, config.model)


@functools.partial(jax.jit, static_argnums=0)
def _row_logits(config: Config, params: Any, tokens_1T: Any, prefix_1T: Any) -> jax.Array:
    positions_1T = jnp.arange(tokens_1T.shape[1])[None]
    row = Example(tokens_1T, tokens_1T, jnp.ones_like(positions_1T), positions_1T, jnp.ones_like(positions_1T), prefix_1T)
    return logits(hidden_states(config, params, row)[0], output_table(params, config.model), config.model)[0]


def row_logits(config: Config, params: Any, ids: list[int], prefix: int = 0) -> np.ndarray:
    """[T, V] as training computes them: one pass over the row, no cache."""
    tokens_1T = np.pad(np.array(ids, np.int32), (0, LONGEST - len(ids)))[None]
    prefix_1T = jnp.arange(LONGEST)[None] < prefix if prefix else None
    return np.asarray(_row_logits(config, params, tokens_1T, prefix_1T))[: len(ids)]


@pytest.mark.parametrize("name", CONFIGS)
def test_a_text_is_continued_as_whole_rows_say(name: str) -> None:
    config, params, writing = made(name)
    model, both_ways = forward.within(config.model, writing), config.objective.name == "prefix"
    assert model.max_seq_len == LONGEST
    prompts = [[3, 1, 4, 1, 5], [9, 2]]
    settings = GenerationConfig(max_new_tokens=6, do_sample=False)
    options: dict[str, Any] = {"settings": settings, "seed": 0, "eos_ids": (), "vocab_size": 23}
    found = decode.generate_tokens(writing, model, prompts, prefix=both_ways, **options)
    for prompt, new, log_probs in zip(prompts, found.tokens, found.log_probs, strict=True):
        ids = list(prompt)
        for token, log_prob in zip(new, log_probs, strict=True):
            wanted = jax.nn.log_softmax(row_logits(config, params, ids, len(prompt) if both_ways else 0)[-1])
            assert token == wanted.argmax()
            assert log_prob == pytest.approx(float(wanted.max()), abs=2e-5)
            ids.append(int(token))


def test_a_text_goes_on_past_the_context_behind_the_same_places() -> None:
    config, params, writing = made("prompt")
    settings = GenerationConfig(max_new_tokens=9, do_sample=False)
    model, prompt = forward.within(config.model, writing), [3, 1, 4, 1, 5, 9, 2, 6, 5, 3]
    found = decode.generate_tokens(writing, model, [prompt], settings=settings, seed=0, eos_ids=(), vocab_size=23)
    ids = prompt + found.tokens[0].tolist()
    for place in range(len(prompt), len(ids)):
        start = 0
        while place - start > LONGEST:  # a window is full: half a context of the text begins the next
            start += LONGEST + 1 - LONGEST // 2
        assert ids[place] == row_logits(config, params, ids[start:place])[-1].argmax(), place


@pytest.mark.parametrize("name", ["prompt", "prefix"])
def test_all_strategies_begin_behind_the_places(name: str) -> None:
    """What is likeliest is the same text by every road; beam search says what its texts are worth."""
    config, params, writing = made(name)
    model, prompts = forward.within(config.model, writing), [[3, 1, 4, 1, 5], [9, 2, 6]]
    options: dict[str, Any] = {"seed": 0, "eos_ids": (), "vocab_size": 23}

    def write(draft: Any = None, **knobs: Any) -> decode.Generated:
        settings = GenerationConfig(max_new_tokens=6, do_sample=False, **knobs)
        return strategies.generate(writing, model, prompts, settings=settings, draft=draft, **options)

    def ids(found: decode.Generated) -> list[list[int]]:
        return [row.tolist() for row in found.tokens]

    greedy = ids(write())
    assert ids(write(draft=(writing, model))) == greedy
    assert ids(write(prompt_lookup_num_tokens=2)) == greedy
    assert ids(write(penalty_alpha=1e-6, top_k=2)) == greedy
    best = write(num_beams=3)
    for prompt, new, log_probs in zip(prompts, best.tokens, best.log_probs, strict=True):
        wanted = jax.nn.log_softmax(row_logits(config, params, [*prompt, *new[:-1]]))[len(prompt) - 1 :]
        np.testing.assert_allclose(log_probs, np.asarray(wanted)[np.arange(6), new], atol=2e-5)


@pytest.mark.parametrize("name", CONFIGS)
def test_texts_are_scored_behind_the_places(name: str) -> None:
    config, params, _ = made(name)
    both_ways = config.objective.name == "prefix"
    rows = [Row(np.array(ids, np.int32), 3, len(ids) - 3 if both_ways else 0) for ids in ([3, 1, 4, 1, 5, 9], [2, 6, 5, 3])]
    found = score_rows(config, params, rows, make_mesh(config.mesh), 4)
    for row, own in zip(rows, found, strict=True):
        ids = row.ids.tolist()
        log_probs = jax.nn.log_softmax(row_logits(config, params, ids[:-1], row.prefix))
        wanted = [log_probs[place - 1, ids[place]] for place in range(len(ids) - 3, len(ids))]
        np.testing.assert_allclose(own.log_probs, wanted, atol=2e-5)


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_masks_are_filled_behind_the_places(method: str) -> None:
    config = small(WINDOWS, {"adapter.method": method, "objective.name": "masked"})
    params, ids = drawn(config), [3, 1, 4, 1, 5]
    row, is_text = np.pad(np.array(ids, np.int32), (0, LONGEST - len(ids)))[None], np.ones(23, bool)
    found = filling._predictions(params, config, row, np.arange(LONGEST)[None] < len(ids), is_text)
    wanted = jax.nn.log_softmax(row_logits(config, params, ids, len(ids)))
    np.testing.assert_allclose(np.asarray(found)[: len(ids)], wanted, atol=2e-5)


class Model:
    """What `Likelihood` looks at."""

    def __init__(self, config: Config):
        self.config, self.params, self.tokenizer = config, None, Letters(23)


def test_the_room_that_is_left_is_said() -> None:
    config, _, writing = made("prompt")
    room = r"model.max_seq_len=16 less the 3 places that adapter.method=prompt puts ahead"
    with pytest.raises(UserError, match=f"the prompt has 14 tokens, more than {room}"):
        prompt_ids(config, Letters(23), list(range(14)))
    with pytest.raises(UserError, match=f"14 tokens is longer than {room}"):
        Likelihood(Model(config)).of_ids([([1], list(range(14)))])
    both_ways = small(WINDOWS, {"adapter.method": "prompt", "objective.name": "prefix"})
    with pytest.raises(UserError, match="writes no text: places of adapter.method=prompt see a prompt"):
        generate_text(writing, both_ways, Letters(23), [np.array([1])], GenerationConfig())
