"""Objectives in generation: a prompt seen both ways, gaps that are filled, and what a model does not do."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import UserError, from_dict
from gptjax.config.objective import loss_refusal
from gptjax.data.reserved import reserve, special_ids
from gptjax.data.tokenizers import ByteTokenizer
from gptjax.generate.filling import fill
from gptjax.generate.settings import GenerationConfig
from gptjax.generate.text import generate, prompt_ids
from gptjax.model.decoder import Decoder
from gptjax.train.restore import TrainedModel
from tests.small import random_params

MIXTURE = ("X/3/0.5=1", "S=1")


@functools.cache
def model_of(name: str) -> TrainedModel:
    model = {"num_layers": 2, "model_dim": 16, "num_heads": 2, "max_seq_len": 24, "vocab_size": 272}
    values = {"model": model, "data": {"seq_len": 24}, "train": {"duration_steps": 1}}
    config = from_dict(values | {"objective": {"name": name, "mixture": MIXTURE, "span_mean_length": 1.0}})
    return TrainedModel(config, random_params(config, std=0.5), reserve(ByteTokenizer(), config.objective, 24), 0)


@functools.cache
def _forward(name: str) -> Any:
    model = model_of(name).config.model
    return jax.jit(lambda params, tokens, prefix: Decoder(model).apply({"params": params}, tokens, prefix_BT=prefix)[0][0])


def plain_logits(name: str, tokens: list[int], given: int) -> np.ndarray:
    """[n, V] of one whole forward without a cache, whose first `given` tokens see each other both ways."""
    row = np.zeros((1, 24), np.int32)
    row[0, : len(tokens)] = tokens
    return np.asarray(_forward(name)(model_of(name).params, jnp.asarray(row), jnp.arange(24)[None] < given))[: len(tokens)]


def greedily(name: str, prompt: list[int], new: int, given: int, stops: tuple[int, ...]) -> list[int]:
    tokens, vocab = list(prompt), model_of(name).tokenizer.vocab_size
    while len(tokens) < len(prompt) + new:
        tokens.append(int(plain_logits(name, tokens, given)[-1, :vocab].argmax()))
        if tokens[-1] in stops:
            break
    return tokens[len(prompt) :]


@pytest.mark.parametrize("name", ["prefix", "mixture"])
def test_a_prompt_is_seen_both_ways_and_what_follows_is_not(name: str) -> None:
    """As without a cache, in a batch of prompts of several lengths."""
    model = model_of(name)
    prompts = ["to be, or", "a", "who is it"]
    found = generate(model, prompts, max_new_tokens=7, do_sample=False)
    differs = 0
    for prompt, sample in zip(prompts, found, strict=True):
        ids = prompt_ids(model.config, model.tokenizer, prompt).tolist()
        first = [model.tokenizer.token_id("[S]")] if name == "mixture" else []
        assert ids == [*first, 256, *prompt.encode()]
        expected = greedily(name, ids, 7, len(ids), (256,))
        assert list(sample.tokens) == expected
        differs += expected != greedily(name, ids, 7, 0, (256,))
    assert differs, "the test wants a prompt that reads otherwise from left to right alone"


def test_masks_are_filled_by_the_likeliest_tokens() -> None:
    model = model_of("masked")
    filled = fill(model, "to [MASK]e or n[MASK]t")
    mask = special_ids(model.tokenizer, model.config.objective, 24).mask
    ids = [256, *b"to ", mask, *b"e or n", mask, *b"t", 256]
    logits = plain_logits("masked", ids, len(ids))[:, :256].astype(np.float64)
    log_probs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    best = [int(log_probs[place].argmax()) for place in (4, 11)]
    assert filled.gaps == tuple(bytes([i]).decode(errors="replace") for i in best)
    np.testing.assert_allclose(filled.log_probs, [log_probs[place].max() for place in (4, 11)], rtol=1e-5)
    ids[4], ids[11] = best
    assert filled.text == bytes(i for i in ids if i < 256).decode(errors="replace")


@pytest.mark.parametrize("name", ["span", "mixture"])
def test_spans_are_filled_by_what_follows_their_sentinels(name: str) -> None:
    model = model_of(name)
    sentinels = special_ids(model.tokenizer, model.config.objective, 24).sentinels
    filled = fill(model, "a<extra_id_0>b<extra_id_1>c", max_new_tokens=9, do_sample=False)
    first = [model.tokenizer.token_id("[X]")] if name == "mixture" else []
    ids = [*first, 256, *b"a", sentinels[0], *b"b", sentinels[1], *b"c", 256]
    drawn, spans, here = greedily(name, ids, 9, len(ids), (sentinels[2],)), {}, None
    for token in drawn:
        if token in sentinels:
            here = token if token not in spans else None
            spans.setdefault(token, [])
        elif here is not None:
            spans[here].append(token)
    assert filled.gaps == tuple(model.tokenizer.decode(spans.get(mark, [])) for mark in sentinels[:2])
    with pytest.raises(UserError, match="each once and in this order"):
        fill(model, "a<extra_id_1>b")


def test_a_model_says_what_it_does_not_do() -> None:
    with pytest.raises(UserError, match=r"objective.name=masked does not write on from a prompt: it fills \[MASK\]"):
        generate(model_of("masked"), "a")
    with pytest.raises(UserError, match="objective.name=span does not write on from a prompt: it fills gaps"):
        generate(model_of("span"), "a")
    with pytest.raises(UserError, match="beam search does not show a prompt both ways"):
        generate(model_of("prefix"), "a", num_beams=2, max_new_tokens=1)
    with pytest.raises(UserError, match="objective.name=prefix fills no marked gaps"):
        fill(model_of("prefix"), "a [MASK]")
    with pytest.raises(UserError, match=r"the text has no gap: it has none of \[MASK\]"):
        fill(model_of("masked"), "a")
    with pytest.raises(UserError, match="25 tokens, more than model.max_seq_len=24"):
        fill(model_of("masked"), "[MASK]" + "a" * 22)
    assert GenerationConfig().num_beams == 1


LOSSES = {  # trained for: objectives whose loss it has, of all
    "causal": "causal prefix",
    "masked": "masked",
    "prefix": "causal prefix",
    "infill": "causal prefix infill",
    "span": "span",
    "mixture": "causal prefix span mixture",
}


@pytest.mark.parametrize("trained", LOSSES)
def test_whose_loss_a_model_has(trained: str) -> None:
    objective = model_of("mixture").config.objective
    others = {name: dataclasses.replace(objective, name=name) for name in LOSSES}
    able = [name for name, other in others.items() if not loss_refusal(others[trained], other)]
    assert sorted(able) == sorted(LOSSES[trained].split())
