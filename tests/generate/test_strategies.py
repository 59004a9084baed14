"""Which strategy some settings stand for, and rows in their order."""

from __future__ import annotations

from typing import Any

import pytest

from gptjax.config import UserError
from gptjax.generate import decode, strategies
from gptjax.generate.beam import Searched
from gptjax.generate.settings import GenerationConfig
from tests.generate.small_models import FAMILIES, model_config, random_params

CONFIG = model_config(**FAMILIES["gpt2"], num_layers=1)
DRAFT = (None, CONFIG)


CONTRASTIVE = {"penalty_alpha": 0.6, "top_k": 4, "do_sample": False}


@pytest.mark.parametrize(
    ("settings", "draft", "name"),
    [
        ({}, None, "decoding"),
        ({"do_sample": False, "top_k": 4}, None, "decoding"),
        ({"num_beams": 2}, None, "beam search"),
        ({"num_beams": 2, "num_beam_groups": 2, "diversity_penalty": 0.5, "do_sample": False}, None, "beam search"),
        ({"penalty_alpha": 0.6, "top_k": 4, "do_sample": False}, None, "contrastive search"),
        ({}, DRAFT, "speculative decoding"),
        ({"prompt_lookup_num_tokens": 3, "do_sample": False}, None, "speculative decoding"),
    ],
)
def test_settings_choose_a_strategy(settings: dict[str, Any], draft: Any, name: str) -> None:
    assert strategies.choose(GenerationConfig(**settings), draft) == name


@pytest.mark.parametrize(
    ("settings", "draft", "named"),
    [
        ({"num_beams": 2}, DRAFT, "num_beams=2 asks for beam search and a draft model"),
        ({"num_beams": 2, "prompt_lookup_num_tokens": 3}, None, "prompt_lookup_num_tokens=3"),
        (CONTRASTIVE, DRAFT, "penalty_alpha=0.6 asks for contrastive search and a draft model"),
    ],
)
def test_two_strategies_at_once_are_refused(settings: dict[str, Any], draft: Any, named: str) -> None:
    with pytest.raises(UserError, match=named):
        strategies.choose(GenerationConfig(**settings), draft)


def test_rows_come_prompt_by_prompt() -> None:
    params, prompts = random_params(CONFIG), [[1, 2, 3], [4]]
    options: dict[str, Any] = {"seed": 0, "eos_ids": (), "vocab_size": CONFIG.vocab_size}
    settings = GenerationConfig(max_new_tokens=8, num_return_sequences=2)
    got = strategies.generate(params, CONFIG, prompts, settings=settings, **options)
    twice = [prompt for prompt in prompts for _ in range(2)]
    expected = decode.generate_tokens(params, CONFIG, twice, settings=settings, samples=[0, 1, 0, 1], **options)
    assert [row.tolist() for row in got.tokens] == [row.tolist() for row in expected.tokens]

    settings = GenerationConfig(max_new_tokens=8, num_return_sequences=2, num_beams=2, do_sample=False)
    beams = strategies.generate(params, CONFIG, prompts, settings=settings, **options)
    assert isinstance(beams, Searched)
    assert beams.scores[0] > beams.scores[1] and beams.scores[2] > beams.scores[3]
