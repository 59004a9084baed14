"""Models that others published, with the numbers that others got from them."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest

from gptjax.config import ModelConfig
from gptjax.generate.decode import generate_tokens
from gptjax.generate.settings import GenerationConfig
from gptjax.interop import huggingface, llama2c
from gptjax.model.decoder import Decoder


def test_tiny_random_gpt2_continues_as_published(shared_data: pathlib.Path) -> None:
    folder = shared_data / "tiny_random_gpt2"
    knobs, params = huggingface.load(folder)
    config = ModelConfig(**knobs)
    case = json.loads((folder / "expected.json").read_text())["greedy"]
    generated = generate_tokens(
        params,
        config,
        case["input"],
        settings=GenerationConfig(max_new_tokens=case["max_length"] - len(case["input"][0]), do_sample=False),
        seed=0,
        eos_ids=(98,),
        vocab_size=config.vocab_size,
    )
    assert [prompt + row.tolist() for prompt, row in zip(case["input"], generated.tokens, strict=True)] == case["expected"]


@pytest.mark.parametrize("name", ["stories260K.bin", "checkpoint_v1.bin"])
def test_stories_logits_equal_the_reference(shared_data: pathlib.Path, name: str) -> None:
    model = llama2c.open_file(shared_data / "stories260K" / name)
    config = model.config().model
    params = model.read(config)
    with np.load(shared_data / "stories260K" / "ref_logits_numpy_fp.npz") as reference:
        tokens, expected = reference["tokens"], reference["logits"]
    logits, _ = Decoder(config).apply({"params": params}, tokens[None, : len(expected)])
    # Two float32 computations in different orders of summation; logits reach 20.
    np.testing.assert_allclose(np.asarray(logits)[0], expected, atol=1e-4)


def test_stories_tells_its_story(shared_data: pathlib.Path) -> None:
    folder = shared_data / "stories260K"
    model = llama2c.open_file(folder / "stories260K.bin")
    tokenizer, _ = model.tokenizer()
    assert tokenizer is not None and (tokenizer.bos_id, tokenizer.eos_id) == (1, 2)
    config = model.config().model
    generated = generate_tokens(
        model.read(config),
        config,
        [[1]],
        settings=GenerationConfig(max_new_tokens=200, do_sample=False),
        seed=0,
        eos_ids=(1,),
        vocab_size=config.vocab_size,
    )
    text = tokenizer.decode(generated.tokens[0])
    assert text.strip() == (folder / "expected_greedy_200.txt").read_text(encoding="utf-8").strip()
