"""Text in, text out, with a tokenizer of capital letters."""

from __future__ import annotations

import dataclasses
from typing import Any

import numpy as np
import pytest

from gptjax.config import Config, DataConfig, UserError
from gptjax.generate.settings import GenerationConfig as Settings
from gptjax.generate.text import generate_text
from tests.generate.small_models import GPT2_LIKE, greedy_by_full_forwards, model_config, random_params


class Letters:
    """Ids 0 and 1 are begin and end of text; then A to Z and the space. Like SentencePiece, decoding strips a leading space."""

    vocab_size = 29
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZ "

    def __init__(self, bos_id: int | None = 0, eos_id: int | None = 1) -> None:
        self.bos_id, self.eos_id = bos_id, eos_id

    def encode(self, text: str) -> np.ndarray:
        return np.array([2 + self.alphabet.index(letter) for letter in text], np.int32)

    def decode(self, ids: Any) -> str:
        return "".join(self.alphabet[token - 2] for token in ids if token >= 2).removeprefix(" ")

    def vocabulary(self) -> list[bytes | None]:
        return [None, None, *(letter.encode() for letter in self.alphabet)]


CONFIG = dataclasses.replace(Config(), model=model_config(max_seq_len=32, **GPT2_LIKE))
PARAMS = random_params(CONFIG.model, seed=3)


def test_greedy_text_with_a_begin_of_text_token() -> None:
    (completion,) = generate_text(PARAMS, CONFIG, Letters(eos_id=None), ["HELLO"], Settings(max_new_tokens=6, do_sample=False))
    # The embedding has rows that the tokenizer has no ids for.
    restricted = {
        **PARAMS,
        "embed": {**PARAMS["embed"], "tokens": PARAMS["embed"]["tokens"][:29]},
        "head": PARAMS["head"][:, :29],
    }
    config = model_config(max_seq_len=32, vocab_size=29, **GPT2_LIKE)
    expected = greedy_by_full_forwards(restricted, config, [0, *Letters().encode("HELLO")], 6)
    assert list(completion.tokens) == expected
    assert completion.text == "".join(Letters.alphabet[token - 2] for token in expected if token >= 2)
    assert (completion.prompt, completion.sample, completion.finish_reason) == ("HELLO", 0, "length")


def test_add_bos_is_obeyed_and_needs_a_token() -> None:
    without = dataclasses.replace(CONFIG, data=DataConfig(add_bos=False))
    for config, tokenizer in ((without, Letters()), (CONFIG, Letters(bos_id=None))):
        with pytest.raises(UserError, match="the prompt is empty"):
            generate_text(PARAMS, config, tokenizer, [""], Settings(max_new_tokens=1))
    ways = [
        generate_text(PARAMS, config, Letters(bos_id=bos, eos_id=None), ["AB"], Settings(max_new_tokens=8, do_sample=False))
        for config, bos in ((without, 0), (CONFIG, None), (CONFIG, 0))
    ]
    assert ways[0] == ways[1] != ways[2]
    assert generate_text(PARAMS, CONFIG, Letters(), [""], Settings(max_new_tokens=1))[0].prompt == ""


def test_the_end_of_text_token_ends_a_row_and_is_not_text() -> None:
    plain = generate_text(PARAMS, CONFIG, Letters(eos_id=None), ["AB"], Settings(max_new_tokens=8, do_sample=False))[0]
    end = plain.tokens[5]
    (completion,) = generate_text(PARAMS, CONFIG, Letters(eos_id=end), ["AB"], Settings(max_new_tokens=8, do_sample=False))
    first = plain.tokens.index(end)
    assert completion.finish_reason == "eos"
    assert completion.tokens == plain.tokens[: first + 1]
    assert completion.text == "".join(Letters.alphabet[token - 2] for token in plain.tokens[:first] if token >= 2)


def test_samples_are_numbered_differ_and_do_not_depend_on_their_company() -> None:
    many = generate_text(PARAMS, CONFIG, Letters(), ["AB", "C", "AB"], Settings(max_new_tokens=8, num_return_sequences=3), seed=4)
    assert [(c.prompt, c.sample) for c in many] == [(prompt, sample) for prompt in ("AB", "C", "AB") for sample in range(3)]
    assert len({c.tokens for c in many[:3]}) == 3
    assert many[:3] == many[6:]
    (alone,) = generate_text(PARAMS, CONFIG, Letters(), ["C"], Settings(max_new_tokens=8, num_return_sequences=1), seed=4)
    assert (alone.text, alone.tokens) == (many[3].text, many[3].tokens)
    np.testing.assert_allclose(alone.log_probs, many[3].log_probs, atol=1e-5)


def test_a_leading_space_of_the_continuation_is_kept() -> None:
    space = Letters().encode(" ")[0]
    found = 0
    for seed in range(12):
        for completion in generate_text(
            PARAMS,
            CONFIG,
            Letters(eos_id=None),
            ["AB"],
            Settings(max_new_tokens=2, num_return_sequences=9, temperature=9.0),
            seed=seed,
        ):
            if completion.tokens[0] == space:
                found += 1
                assert completion.text.startswith(" ")
    assert found


def test_refusals() -> None:
    with pytest.raises(UserError, match="num_return_sequences=0"):
        generate_text(PARAMS, CONFIG, Letters(), ["A"], Settings(max_new_tokens=1, num_return_sequences=0))
    with pytest.raises(UserError, match="model.max_seq_len=32"):
        generate_text(PARAMS, CONFIG, Letters(), ["A" * 32], Settings(max_new_tokens=1))
