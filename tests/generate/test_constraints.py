"""Texts of a random model held to a language, cut at stop strings and drafted, through the calls that a user makes."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

import pytest

import gptjax.generate
from gptjax.config import Config, UserError
from gptjax.data.tokenizers import ByteTokenizer
from gptjax.generate.text import Completion, generate
from gptjax.train.restore import TrainedModel
from tests.generate.small_models import GPT2_LIKE, model_config, random_params

ROWS, ROOM = 1000, 24
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer", "minimum": -99, "maximum": 99}, "ok": {"type": "boolean"}},
    "required": ["n"],
    "additionalProperties": False,
}


def random_model(**knobs: Any) -> TrainedModel:
    model = model_config(vocab_size=260, num_layers=1, max_seq_len=64, **GPT2_LIKE | knobs)
    return TrainedModel(dataclasses.replace(Config(), model=model), random_params(model), ByteTokenizer(), step=0)


MODEL = random_model()


def samples(**options: Any) -> list[Completion]:
    settings = {"max_new_tokens": ROOM, "temperature": 2.0, "num_return_sequences": ROWS}
    return generate(MODEL, "say: ", **settings | options)


def test_a_thousand_samples_match_a_regular_expression() -> None:
    expression = r"(\d{1,3}|[a-f]+é?)(, ?(\d{1,3}|[a-f]+é?))*!"
    found = samples(regex=expression)
    assert all(re.fullmatch(expression, completion.text, re.ASCII) for completion in found)
    assert len({completion.text for completion in found}) > ROWS // 2
    assert {completion.finish_reason for completion in found} <= {"eos", "stop"}  # whole, though the room is small


def test_a_thousand_samples_are_valid_under_a_json_schema() -> None:
    found = [json.loads(completion.text) for completion in samples(json_schema=SCHEMA)]
    assert all(-99 <= value.pop("n") <= 99 and set(value) <= {"ok"} for value in found)
    assert {json.dumps(value) for value in found} == {"{}", '{"ok": true}', '{"ok": false}'}


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"regex": "a{40}"}, "takes 40 tokens, more than max_new_tokens=24"),
        ({"regex": "a(?=b)"}, "position 1: of the groups"),
        ({"regex": ""}, "the empty text alone"),
        ({"regex": "a", "json_schema": {}}, "both given"),
        ({"json_schema": {"type": "object", "minProperties": 2}}, "minProperties"),
        ({"regex": "a+", "num_beams": 2, "num_return_sequences": 1}, "beam search cannot be held"),
        ({"stop_strings": ("a",), "num_beams": 2, "num_return_sequences": 1}, "beam search scores whole texts"),
    ],
)
def test_what_cannot_be_is_refused(options: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named):
        samples(**options)


def test_a_draft_changes_no_greedy_text_and_stop_strings_cut_it() -> None:
    draft = random_model(model_dim=8)
    options: dict[str, Any] = {"max_new_tokens": ROOM, "do_sample": False}
    plain = gptjax.generate(MODEL, ["one", "two"], **options)
    drafted = gptjax.generate(MODEL, ["one", "two"], draft=draft, **options)
    assert [completion.tokens for completion in drafted] == [completion.tokens for completion in plain]
    stop = plain[0].text[3:5]
    for more in ({}, {"draft": draft}, {"prompt_lookup_num_tokens": 3}):
        (cut,) = gptjax.generate(MODEL, ["one"], stop_strings=(stop,), **options, **more)
        assert (cut.text, cut.finish_reason) == (plain[0].text[: plain[0].text.index(stop)], "stop")


def test_weights_of_int8_write_a_text_of_their_own_rounding() -> None:
    options: dict[str, Any] = {"max_new_tokens": ROOM, "do_sample": False}
    (plain,) = generate(MODEL, "one", **options)
    (same,) = generate(MODEL.stored_as("float32"), "one", **options)
    (small,) = generate(MODEL.stored_as("int8"), "one", **options)
    assert (same.tokens, same.log_probs) == (plain.tokens, plain.log_probs)
    assert small.log_probs != plain.log_probs
    assert small.log_probs[0] == pytest.approx(plain.log_probs[0], abs=0.3)
    with pytest.raises(UserError, match="weights=int4"):
        MODEL.stored_as("int4")
