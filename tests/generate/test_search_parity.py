"""Beam search against transformers' own, token for token."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pytest

from gptjax.config import ModelConfig
from gptjax.generate import beam, speculative
from gptjax.generate.settings import GenerationConfig
from gptjax.interop.huggingface import load
from tests.interop.transformer_models import random_transformer

pytestmark = pytest.mark.parity

PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7]]
COUNT, BEAMS, EACH = 12, 4, 3
EOS = (3, 46, 92)  # tokens that some beams meet early

Loaded = tuple[Any, ModelConfig, Any]


@pytest.fixture(scope="module")
def loaded(tmp_path_factory: pytest.TempPathFactory) -> Loaded:
    """(their model, our config, our parameters)"""
    folder = tmp_path_factory.mktemp("model")
    # Without tied embeddings, which have a random model repeat itself.
    model = random_transformer(
        "llama",
        num_hidden_layers=1,
        hidden_size=48,
        num_attention_heads=6,
        num_key_value_heads=2,
        intermediate_size=72,
        max_position_embeddings=40,
        rms_norm_eps=3e-4,
        tie_word_embeddings=False,
    )
    model.save_pretrained(folder, safe_serialization=True)
    knobs, params = load(folder)
    return model, ModelConfig(**knobs), params


def theirs(model: Any, prompts: list[list[int]], eos: int, **settings: Any) -> tuple[list[list[int]], list[float]]:
    """(new tokens up to eos, scores) of left-padded prompts."""
    import torch

    width, pad = max(map(len, prompts)), eos
    padded = [[pad] * (width - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        out = model.generate(
            torch.tensor(padded), attention_mask=torch.tensor(mask), max_new_tokens=COUNT, do_sample=False, eos_token_id=eos,
            pad_token_id=pad, return_dict_in_generate=True, output_scores=True, **settings,
        )  # fmt: skip
    rows = [row[width:] for row in out.sequences.tolist()]
    rows = [row[: row.index(eos) + 1] if eos in row else row for row in rows]
    return rows, out.sequences_scores.tolist() if "num_beams" in settings else []


@pytest.mark.parametrize("early_stopping", [True, False, "never"])
@pytest.mark.parametrize("length_penalty", [-1.0, 0.0, 0.7, 1.0, 2.0])
def test_beams_equal_theirs(loaded: Loaded, length_penalty: float, early_stopping: Any) -> None:
    model, config, params = loaded
    shared: dict[str, Any] = {"num_beams": BEAMS, "num_return_sequences": EACH, "length_penalty": length_penalty}
    settings = GenerationConfig(max_new_tokens=COUNT, do_sample=False, early_stopping=early_stopping, **shared)
    for eos in EOS:
        got = beam.generate_tokens(params, config, PROMPTS, settings=settings, seed=0, eos_ids=(eos,), vocab_size=101)
        rows, scores = theirs(model, PROMPTS, eos, early_stopping=early_stopping, **shared)
        assert [row.tolist() for row in got.tokens] == rows
        np.testing.assert_allclose(got.scores, scores, rtol=1e-4)
        assert got.stopped.tolist() == [eos in row for row in rows]


def test_greedy_lookup_equals_their_greedy(loaded: Loaded) -> None:
    model, config, params = loaded
    settings = GenerationConfig(max_new_tokens=COUNT, do_sample=False, prompt_lookup_num_tokens=4)
    got = speculative.generate_tokens(params, config, PROMPTS, settings=settings, seed=0, eos_ids=(0,), vocab_size=101)
    for prompt, row in zip(PROMPTS, got.tokens, strict=True):
        assert row.tolist() == theirs(model, [prompt], 0)[0][0]
        assert row.tolist() == theirs(model, [prompt], 0, prompt_lookup_num_tokens=4)[0][0]


@pytest.mark.parametrize(
    "settings",
    [
        {"repetition_penalty": 1.8},
        {"no_repeat_ngram_size": 2},
        {"min_new_tokens": 9},
        {"bad_words_ids": [[6, 22], [37, 100]], "suppress_tokens": [1]},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3, "min_new_tokens": 5, "forced_eos_token_id": 93},
    ],
)
def test_processors_shape_beams_as_theirs(loaded: Loaded, settings: dict[str, Any]) -> None:
    model, config, params = loaded
    # Texts that end early are worth more, so that beams meet ends.
    shared: dict[str, Any] = {"num_beams": BEAMS, "num_return_sequences": EACH, "length_penalty": -1.0, "early_stopping": True}
    ours = GenerationConfig(max_new_tokens=COUNT, do_sample=False, **shared).replace(**settings)
    eos, prompts = 93, [PROMPTS[0]]
    got = beam.generate_tokens(params, config, prompts, settings=ours, seed=0, eos_ids=(eos,), vocab_size=101)
    rows, scores = theirs(model, prompts, eos, **settings, **shared)
    plain, _ = theirs(model, prompts, eos, **shared)
    assert rows != plain, "the case should change something"
    assert [row.tolist() for row in got.tokens] == rows
    np.testing.assert_allclose(got.scores, scores, rtol=1e-4)
