"""Logits processors and greedy generation with each of them, against transformers'."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import ModelConfig
from gptjax.generate import processors
from gptjax.generate.decode import generate_tokens
from gptjax.generate.settings import GenerationConfig
from gptjax.interop.huggingface import load
from tests.generate.processor_cases import VOCABULARY, alone, history, random_logits, random_rows, random_settings, together
from tests.interop.transformer_models import random_transformer

pytestmark = pytest.mark.parity

LENGTH, PROMPT = 12, 5
ARGUMENTS = {"input_ids_seq_length": PROMPT, "device": "cpu", "model_kwargs": {}}


@functools.cache
def any_model(vocab_size: int) -> Any:
    return random_transformer("gpt2", n_layer=1, n_embd=4, n_head=1, n_positions=8, vocab_size=vocab_size)


def theirs(settings: GenerationConfig, tokens: np.ndarray, logits: np.ndarray, num_beams: int = 1) -> dict[str, np.ndarray]:
    """What transformers' processors make of the logits: each by itself, by our name, and under "all", one after the other."""
    import torch
    import transformers

    sampled = dataclasses.replace(settings, presence_penalty=0.0, frequency_penalty=0.0)
    config = transformers.GenerationConfig(**sampled.to_huggingface() | {"num_beams": num_beams, "max_length": LENGTH + 1})
    config._eos_token_tensor = torch.tensor(VOCABULARY.eos_ids)
    model = any_model(logits.shape[1])
    ids, scores = torch.from_numpy(tokens.astype(np.int64)), torch.from_numpy(logits)
    chain = model._get_logits_processor(config, encoder_input_ids=ids[:, :PROMPT], **ARGUMENTS)
    results, after = {}, scores
    for processor in chain:
        name = NAMES[type(processor).__name__]
        results[name] = processor(ids, scores.clone()).numpy()
        # What theirs makes of forbidden tokens, the lowest number, overflows in the length penalty behind it.
        after = after if name == "remove_invalid_values" else processor(ids, after)
    return results | {"all": after.numpy()}


NAMES = {
    "SequenceBiasLogitsProcessor": "sequence_bias",
    "EncoderRepetitionPenaltyLogitsProcessor": "encoder_repetition_penalty",
    "RepetitionPenaltyLogitsProcessor": "repetition_penalty",
    "NoRepeatNGramLogitsProcessor": "no_repeat_ngram_size",
    "EncoderNoRepeatNGramLogitsProcessor": "encoder_no_repeat_ngram_size",
    "NoBadWordsLogitsProcessor": "bad_words_ids",
    "MinLengthLogitsProcessor": "min_length",
    "MinNewTokensLengthLogitsProcessor": "min_length",
    "ForcedBOSTokenLogitsProcessor": "forced_bos_token_id",
    "ForcedEOSTokenLogitsProcessor": "forced_eos_token_id",
    "InfNanRemoveLogitsProcessor": "remove_invalid_values",
    "ExponentialDecayLengthPenalty": "exponential_decay_length_penalty",
    "SuppressTokensLogitsProcessor": "suppress_tokens",
    "SuppressTokensAtBeginLogitsProcessor": "begin_suppress_tokens",
    "TemperatureLogitsWarper": "temperature",
    "TopHLogitsWarper": "top_h",
    "TopKLogitsWarper": "top_k",
    "TopPLogitsWarper": "top_p",
    "MinPLogitsWarper": "min_p",
    "TypicalLogitsWarper": "typical_p",
    "EpsilonLogitsWarper": "epsilon_cutoff",
    "EtaLogitsWarper": "eta_cutoff",
    "LogitNormalization": "renormalize_logits",
}


def agree(got: Any, expected: np.ndarray, name: str) -> None:
    """The same tokens are left, with the same logits but for a number common to a row."""
    got, expected = np.asarray(got), np.where(expected < -1e30, -np.inf, expected)
    np.testing.assert_array_equal(np.isfinite(got), np.isfinite(expected), err_msg=name)
    for ours, row in zip(got, expected, strict=True):
        left = np.isfinite(row)
        offset = ours[left].max() - row[left].max() if name in ("temperature", "all") else 0
        np.testing.assert_allclose(ours[left] - offset, row[left], rtol=2e-6, atol=5e-6, err_msg=name)


@pytest.mark.parametrize("num_beams", [1, 4])
def test_processors_agree_with_transformers(num_beams: int) -> None:
    least = 1 if num_beams == 1 else len(VOCABULARY.eos_ids) + 1
    for seed in range(12):
        rng = np.random.default_rng(seed)
        length = PROMPT if seed % 5 == 0 else LENGTH
        settings = random_settings(rng, forced_eos_token_id=None if seed % 2 else 3, top_k=int(rng.integers(2, 15)))
        rows = [dataclasses.replace(row, prompt=row.tokens[:PROMPT], limit=LENGTH + 1) for row in random_rows(rng, length)]
        logits, past = random_logits(rng), history(rows, rng)
        expected = theirs(settings, np.array([row.tokens for row in rows]), logits, num_beams)
        names, values = processors.plan(settings, VOCABULARY, least)
        in_both = tuple(name for name in names if name != "presence_and_frequency_penalty")
        assert set(expected) == {*in_both, "all"}
        # Compiling takes all the time: beams change only what keeps a part.
        tried = tuple(name for name in in_both if num_beams == 1 or isinstance(values[name], processors.Part))
        results = alone(tried, {name: values[name] for name in tried}, jnp.asarray(logits), past)
        for name in tried:
            agree(results[name], expected[name], name)
        if num_beams > 1:
            continue
        chain = tuple(name for name in in_both if name != "remove_invalid_values")
        got = together(chain, {name: values[name] for name in chain}, jnp.asarray(logits), past)
        agree(got, expected["all"], "all")


def test_invalid_values_agree_with_transformers_but_for_what_is_ruled_out() -> None:
    import torch
    import transformers

    logits = np.array([[np.nan, np.inf, -3.0, 2.0]], np.float32)
    expected = transformers.InfNanRemoveLogitsProcessor()(torch.zeros((1, 1)), torch.from_numpy(logits)).numpy()
    np.testing.assert_array_equal(processors.make_finite(jnp.asarray(logits)), expected)


# Everything is on for one program, with values that change nothing; each case makes something of one of them.
NEUTRAL: dict[str, Any] = {
    "do_sample": False,
    "max_new_tokens": 20,
    "eos_token_id": [100],
    "sequence_bias": [[[1, 2, 3, 4], 1e-9]],
    "encoder_repetition_penalty": 1 + 1e-9,
    "repetition_penalty": 1 + 1e-9,
    "no_repeat_ngram_size": 60,
    "encoder_no_repeat_ngram_size": 60,
    "bad_words_ids": [[1, 2, 3, 4]],
    "min_new_tokens": 1,
    "forced_bos_token_id": 40,
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": [1000, 1.5],
    "suppress_tokens": [100],
    "begin_suppress_tokens": [100],
    "renormalize_logits": True,
}


def test_greedy_generation_with_each_processor_agrees_with_transformers(tmp_path: pathlib.Path) -> None:
    import torch

    # An untied head and larger weights, so that the text is neither one token again and again nor without repetition.
    model = random_transformer("gpt2", n_layer=1, n_embd=16, n_head=2, n_positions=40, tie_word_embeddings=False)
    with torch.no_grad():
        model.lm_head.weight.mul_(4)
    model.save_pretrained(tmp_path)
    knobs, params = load(tmp_path)
    rng = np.random.default_rng(4)
    prompts = rng.integers(0, 12, (3, 6))

    def ours(settings: GenerationConfig, prompts: np.ndarray) -> list[list[int]]:
        options: dict[str, Any] = {"seed": 0, "eos_ids": settings.eos_ids(None), "vocab_size": 101}
        generated = generate_tokens(params, ModelConfig(**knobs), list(prompts), settings=settings, **options)
        return [row.tolist() for row in generated.tokens]

    def reference(values: dict[str, Any], prompts: np.ndarray) -> list[list[int]]:
        import transformers

        ids = torch.from_numpy(prompts)
        config = transformers.GenerationConfig(**values, pad_token_id=0)
        out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
        ends = set(values["eos_token_id"])
        rows = [row[prompts.shape[1] :].tolist() for row in out]
        return [row[: next((i + 1 for i, token in enumerate(row) if token in ends), len(row))] for row in rows]

    plain = reference(NEUTRAL, prompts)
    usual = [row[3] for row in plain]
    cases: list[dict[str, Any]] = [
        {},
        {"sequence_bias": [[[token], -3.0] for token in usual] + [[plain[0][:3], 50.0]]},
        {"encoder_repetition_penalty": 5.0},
        {"repetition_penalty": 1.7},
        {"no_repeat_ngram_size": 1},
        {"no_repeat_ngram_size": 2},
        # Rows that have the biased tokens in their prompt may not write them.
        {"encoder_no_repeat_ngram_size": 1, "sequence_bias": [[[11], 8.0], [[7], 8.0]]},
        {"bad_words_ids": [[usual[0]], plain[1][:2], plain[2][:4]]},
        {"eos_token_id": usual},
        {"eos_token_id": usual, "min_new_tokens": 9},
        {"eos_token_id": usual, "min_new_tokens": None, "min_length": 11},
        {"eos_token_id": [usual[0], 99], "exponential_decay_length_penalty": [3, 1.4]},
        {"suppress_tokens": usual},
        {"begin_suppress_tokens": [row[0] for row in plain]},
        {"max_new_tokens": None, "max_length": 17},
        {
            "sequence_bias": [[[usual[1]], -1.0]],
            "repetition_penalty": 1.3,
            "no_repeat_ngram_size": 3,
            "suppress_tokens": [usual[2]],
        },
    ]
    for case in cases:
        values = NEUTRAL | case
        expected = reference(values, prompts)
        assert (expected == plain) == (case == {}), f"{case} has something to do"
        assert ours(GenerationConfig.from_huggingface(values), prompts) == expected, case
    one = NEUTRAL | {"begin_suppress_tokens": [5]}
    assert ours(GenerationConfig.from_huggingface(one), prompts[:, :1]) == (expected := reference(one, prompts[:, :1]))
    assert {row[0] for row in expected} == {40}, "forced_bos_token_id"
    ended = NEUTRAL | {"forced_eos_token_id": 100, "suppress_tokens": [99]}
    assert ours(GenerationConfig.from_huggingface(ended), prompts) == (expected := reference(ended, prompts))
    assert {row[-1] for row in expected} == {100}, "forced_eos_token_id"
