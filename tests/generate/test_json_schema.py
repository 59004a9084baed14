"""JSON that a schema allows: read back by `json`, judged by a checker of the tests' own, and by `jsonschema` where installed."""

import datetime
import json
import re
import uuid

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.config import UserError
from gptjax.data.tokenizers import ByteTokenizer
from gptjax.generate.automata import schema_automaton, token_automaton
from gptjax.generate.json_schema import ANY_DEPTH, schema_pattern
from gptjax.generate.json_text import integer_expression
from gptjax.generate.patterns import compile_pattern
from tests.generate.vocabularies import EOS, MODEL_VOCAB, VOCABULARY, random_texts

POINT = {"type": "object", "properties": {"x": {"type": "integer"}, "y": {"type": "number"}}, "required": ["x", "y"]}
SCHEMAS = {
    "anything": True,
    "person": {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "Person",
        "type": "object",
        "properties": {
            "name": {"type": "string", "minLength": 1, "maxLength": 6, "description": "as written"},
            "age": {"type": "integer", "minimum": 0, "maximum": 130},
            "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{1,3}$"}, "maxItems": 2},
            "boss": {"anyOf": [{"type": "boolean"}, {"type": "null"}], "default": None},
        },
        "required": ["age"],
        "additionalProperties": False,
    },
    "constants": {"enum": ["a", 1, 1.5, None, True, 'é"\n\\', [], {"x": [1, {}]}]},
    "tuple": {
        "type": "array",
        "prefixItems": [{"type": "integer", "exclusiveMinimum": -17.5, "exclusiveMaximum": 12}, {"const": "k"}],
        "items": {"type": "null"},
        "minItems": 1,
        "maxItems": 4,
    },
    "closed tuple": {"type": "array", "prefixItems": [{"type": "boolean"}, {"type": "boolean"}], "items": False},
    "references": {"$defs": {"p/q": POINT}, "type": "array", "items": {"$ref": "#/$defs/p~1q"}, "minItems": 1, "maxItems": 2},
    "strings": {"type": "string", "pattern": r"[a-c]\d|^x|\W", "minLength": 3, "maxLength": 5},
    "formats": {
        "type": "array",
        "prefixItems": [{"type": "string", "format": name} for name in ("date", "date-time", "time")],
        "minItems": 1,
    },
    "one": {
        "oneOf": [
            {"type": "object", "properties": {"k": {"const": "a"}, "v": {"type": "integer"}}, "required": ["k"]},
            {"type": "object", "properties": {"k": {"enum": ["b", "c"]}}, "required": ["k"]},
            {"type": ["string", "null"]},
            {"enum": [3, 4.5]},
        ]
    },
    "several types": {"type": ["integer", "array", "null"], "minItems": 2},
    "pairs": {"type": "array", "items": {"type": "array", "items": {"type": "boolean"}, "minItems": 2, "maxItems": 2}},
}


def is_valid(value, schema, root):
    """Whether a value is valid under a schema of the subset; written from the specification, keyword by keyword."""
    if isinstance(schema, bool):
        return schema
    kinds = {"object": dict, "array": list, "string": str, "boolean": bool, "null": type(None)}

    def is_a(kind):
        number = isinstance(value, int | float) and not isinstance(value, bool)
        if kind in ("integer", "number"):
            return number and (kind == "number" or value == int(value))
        return isinstance(value, kinds[kind])

    def same(other):
        return json.dumps(value, sort_keys=True) == json.dumps(other, sort_keys=True)

    if "$ref" in schema:
        target = root
        for part in schema["$ref"].split("/")[1:]:
            target = target[part.replace("~1", "/").replace("~0", "~")]
        return is_valid(value, target, root)
    types = schema.get("type", [])
    checks = [
        not types or any(is_a(kind) for kind in ([types] if isinstance(types, str) else types)),
        "enum" not in schema or any(map(same, schema.get("enum", []))),
        "const" not in schema or same(schema["const"]),
        "anyOf" not in schema or any(is_valid(value, one, root) for one in schema["anyOf"]),
        "oneOf" not in schema or sum(is_valid(value, one, root) for one in schema["oneOf"]) == 1,
    ]
    if isinstance(value, dict):
        known = schema.get("properties", {})
        checks += [is_valid(inner, known[name], root) for name, inner in value.items() if name in known]
        checks += [name in value for name in schema.get("required", [])]
        checks += [schema.get("additionalProperties", True) or set(value) <= set(known)]
    if isinstance(value, list):
        first = schema.get("prefixItems", [])
        checks += [is_valid(item, inner, root) for item, inner in zip(value, first, strict=False)]
        checks += [is_valid(item, schema.get("items", True), root) for item in value[len(first) :]]
        checks += [schema.get("minItems", 0) <= len(value) <= schema.get("maxItems", len(value))]
    if isinstance(value, str):
        checks += [schema.get("minLength", 0) <= len(value) <= schema.get("maxLength", len(value))]
        checks += [re.search(schema.get("pattern", ""), value) is not None]
    if is_a("number"):
        checks += [schema.get("minimum", value) <= value <= schema.get("maximum", value)]
        checks += ["exclusiveMinimum" not in schema or schema["exclusiveMinimum"] < value]
        checks += ["exclusiveMaximum" not in schema or value < schema["exclusiveMaximum"]]
    return all(checks)


@pytest.fixture(scope="module")
def answers():
    """{name: 1,000 answers of random logits}, and as many with 2 tokens to spare; made once for all tests."""
    found = {}
    for name, schema in SCHEMAS.items():
        automaton = token_automaton(compile_pattern(schema_pattern(schema)), VOCABULARY, MODEL_VOCAB, [EOS])
        shortest = int(automaton.distance_S[0])
        assert shortest <= 36
        texts = random_texts(automaton, 0, min(40, shortest + 18)) + random_texts(automaton, 1, shortest + 2)
        found[name] = [text.decode() for text in texts]
    return found


@pytest.mark.parametrize("name", SCHEMAS)
def test_a_thousand_answers_are_all_valid(answers, name):
    texts = answers[name]
    assert len(texts) == 2000 and len(set(texts)) > 5
    for text in texts:
        assert is_valid(json.loads(text), SCHEMAS[name], SCHEMAS[name]), text


@pytest.mark.parametrize("name", SCHEMAS)
def test_jsonschema_agrees(answers, name):
    jsonschema = pytest.importorskip("jsonschema")
    judge = jsonschema.Draft202012Validator(SCHEMAS[name], format_checker=jsonschema.Draft202012Validator.FORMAT_CHECKER)
    for text in set(answers[name]):
        judge.validate(json.loads(text))


def test_the_checker_of_these_tests_refuses():
    for name, value in {
        "person": {"name": "abc"},
        "constants": False,
        "tuple": [12],
        "closed tuple": [True, True, True],
        "references": [{"x": 1}],
        "strings": "aaa",
        "one": {"k": "d"},
        "several types": [1],
        "pairs": [[True]],
    }.items():
        assert not is_valid(value, SCHEMAS[name], SCHEMAS[name]), name


def test_formats_are_real_dates(answers):
    for text in answers["formats"]:
        parts = json.loads(text)
        datetime.date.fromisoformat(parts[0])
        for moment in parts[1:2]:
            datetime.datetime.fromisoformat(moment)
        for time in parts[2:]:
            datetime.time.fromisoformat(time)
    found = compile_pattern(schema_pattern({"type": "string", "format": "uuid"}))
    assert found.accepts(f'"{uuid.UUID(int=2**127 + 7)}"'.encode())
    dates = compile_pattern(schema_pattern({"type": "string", "format": "date"}))
    for day in range(366):
        date = datetime.date(2024, 1, 1) + datetime.timedelta(day)
        assert dates.accepts(f'"{date}"'.encode()) == ((date.month, date.day) != (2, 29))


NUMBERS = st.integers(-(10**18) + 1, 10**18 - 1) | st.floats(-1e9, 1e9).map(lambda x: round(x, 3))
JSON = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner, max_size=3),
    max_leaves=6,
)


def depth(value):
    if isinstance(value, dict | list):
        return 1 + max(map(depth, value.values() if isinstance(value, dict) else value), default=0)
    return 0


ANYTHING = compile_pattern(schema_pattern({}))


@given(JSON)
@settings(max_examples=300)
def test_anything_is_any_value_of_limited_depth(value):
    for separators in ((",", ":"), (", ", ": ")):
        text = json.dumps(value, ensure_ascii=False, separators=separators)
        assert ANYTHING.accepts(text.encode()) == (depth(value) <= ANY_DEPTH), text


@given(JSON)
def test_a_constant_is_that_value_alone(value):
    found = compile_pattern(schema_pattern({"const": value}))
    assert found.accepts(json.dumps(value, ensure_ascii=False).encode())
    assert not found.accepts(json.dumps([value]).encode())


@given(st.integers(-2000, 2000), st.integers(0, 3000))
def test_integers_of_a_range(low, size):
    found = compile_pattern(schema_pattern({"type": "integer", "minimum": low, "maximum": low + size}))
    expression = re.compile(integer_expression(low, low + size))
    for number in {*range(low - 3, low + 4), *range(low + size - 3, low + size + 4), 0, 9, 10, 99, 100, -1, -10, low * 10}:
        inside = low <= number <= low + size
        assert found.accepts(str(number).encode()) == inside == (expression.fullmatch(str(number)) is not None)
    assert not found.accepts(b"-0") and not found.accepts(b"007")


@pytest.mark.parametrize(
    ("schema", "smallest", "largest"),
    [
        ({}, -(10**18 - 1), 10**18 - 1),
        ({"minimum": 10**18}, 10**18, None),
        ({"maximum": -(10**18)}, None, -(10**18)),
        ({"minimum": 2.5, "exclusiveMaximum": 5}, 3, 4),
        ({"minimum": 3, "exclusiveMinimum": 3}, 4, None),
    ],
)
def test_ends_of_integer_ranges(schema, smallest, largest):
    found = compile_pattern(schema_pattern({"type": "integer", **schema}))
    for end, beyond in ((smallest, -1), (largest, 1)):
        if end is not None:
            assert found.accepts(str(end).encode()) and not found.accepts(str(end + beyond).encode())


@pytest.mark.parametrize(
    ("schema", "place", "reason"),
    [
        ({"type": "object", "patternProperties": {}}, "#/patternProperties", "not supported"),
        ({"properties": {"a/b": {"items": {"uniqueItems": True}}}}, "#/properties/a~1b/items/uniqueItems", "not supported"),
        ({"allOf": [True]}, "#/allOf", "not supported"),
        ({"not": {}}, "#/not", "not supported"),
        ({"type": "integer", "multipleOf": 2}, "#/multipleOf", "not supported"),
        ({"type": "number", "minimum": 1}, "#/minimum", "for the type integer only"),
        ({"type": "integer", "minLength": 1}, "#/minLength", "means nothing for the type integer"),
        ({"type": "integer", "minimum": True}, "#/minimum", "is a number"),
        ({"type": "integer", "minimum": 3, "maximum": 2}, "#", "no integer from 3 to 2"),
        ({"type": "string", "minLength": 3, "maxLength": 2}, "#/minLength", "3 is above"),
        ({"type": "string", "minLength": -1}, "#/minLength", "whole number"),
        ({"type": "string", "format": "email"}, "#/format", "known are date"),
        ({"type": "string", "pattern": "(?=a)"}, "#/pattern", "position 0"),
        ({"type": "string", "pattern": "^a$", "minLength": 2}, "#", "no text matches"),
        ({"type": "text"}, "#/type", "'text' is not one of"),
        ({"type": []}, "#/type", "no type"),
        ({"enum": []}, "#/enum", "one or more"),
        ({"enum": [1], "minimum": 0}, "#/minimum", "beside enum"),
        ({"const": float("nan")}, "#/const", "not JSON"),
        ({"const": "\ud800"}, "#/const", "surrogate"),
        ({"type": "string", "const": 1}, "#/type", "none of the constants"),
        ({"anyOf": []}, "#/anyOf", "one or more"),
        ({"anyOf": [True, {"type": "string", "x": 1}]}, "#/anyOf/1/x", "not supported"),
        ({"anyOf": [True], "type": "string"}, "#/type", "beside anyOf"),
        ({"oneOf": [{"type": "integer"}, {"type": "number"}]}, "#/oneOf", "number 0 and number 1"),
        ({"oneOf": [{"const": 1}, {"enum": [2, 1.0]}]}, "#/oneOf", "number 0 and number 1"),
        ({"oneOf": [POINT, {**POINT, "required": []}]}, "#/oneOf", "number 0 and number 1"),
        ({"$ref": "#"}, "#/$ref", "refers to itself"),
        ({"$ref": "other.json"}, "#/$ref", "in this document"),
        ({"items": {"$ref": "#/$defs/a"}}, "#/items/$ref", "there is no"),
        ({"$defs": {"a": {"items": {"$ref": "#/$defs/a"}}}, "$ref": "#/$defs/a"}, "#/$defs/a/items/$ref", "refers to itself"),
        ({"type": "object", "required": ["a"]}, "#/required", "'a' is not among"),
        ({"additionalProperties": {"type": "string"}}, "#/additionalProperties", "only true and false"),
        ({"type": "array", "items": [True]}, "#/items", "prefixItems"),
        ({"prefixItems": [True], "minItems": 2}, "#/minItems", "at most 1"),
        ({"properties": {"a": False}}, "#/properties/a", "allows no value"),
        ([], "#", "a schema is an object"),
    ],
)
def test_what_is_not_supported_is_refused_at_its_place(schema, place, reason):
    with pytest.raises(UserError) as caught:
        schema_pattern(schema)
    assert str(caught.value).startswith(f"the JSON schema, {place}: ") and re.search(reason, str(caught.value))


def test_with_a_tokenizer():
    found = schema_automaton({"type": "boolean"}, ByteTokenizer(), 300)
    assert found.distance_S[0] == 4 and found.accepting_S[found.state_after(b"false")]
    assert np.flatnonzero(found.dense()[0] >= 0).tolist() == [ord("f"), ord("t")]
