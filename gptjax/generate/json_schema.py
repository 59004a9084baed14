"""JSON schemas as patterns: the texts written are JSON that is valid under the schema, but not every such text is written.

Read are, of drafts 4 to 2020-12:

- `type` (one or a list), `enum`, `const`; `anyOf`; `oneOf` where no value can be valid under two of its schemas; `$ref` into
  the same document, not to itself; `true`, `{}` and a type alone
- objects: `properties`, `required`, `additionalProperties` (true or false: none are written, but see below)
- arrays: `items`, `prefixItems`, `minItems`, `maxItems`
- strings: `minLength`, `maxLength`, `pattern` (see regex.py), `format` date, time, date-time and uuid
- integers: `minimum`, `maximum`, `exclusiveMinimum`, `exclusiveMaximum`, as numbers
- annotations, which mean nothing here: `title`, `description`, `default`, `examples`, `$schema`, `$id`, `$comment`, ...

Every other keyword is refused, naming its place; so is one that has no meaning for the types at its place.

How it is written: properties in the schema's order; one space or none behind ',' and ':'; no other white space. Strings escape
only what must be escaped, in the one way of `json.dumps`. Numbers have at most 18 digits before the point, integers more where
a limit asks for it; 15 behind it and 2 in the exponent. Dates have years from 1000 to 9999 and no 29 February. Where anything
may stand, or an object or array whose content nothing describes, it is at most `ANY_DEPTH` objects or arrays deep.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from gptjax.config import UserError
from gptjax.generate.json_text import (
    COLON,
    COMMA,
    DIGITS,
    FORMATS,
    NUMBER,
    any_object,
    anything,
    choice,
    escaped,
    integer_expression,
)
from gptjax.generate.patterns import (
    Compiled,
    Listing,
    Pattern,
    Repeat,
    Separated,
    Sequence,
    compile_pattern,
    intersection,
    literal,
)
from gptjax.generate.regex import ANY, parse_regex, parse_search

ANY_DEPTH = 3

_ANNOTATIONS = {
    *("title", "description", "default", "examples", "deprecated", "readOnly", "writeOnly"),
    *("$schema", "$id", "id", "$comment", "$anchor", "$defs", "definitions"),
}
_KEYWORDS = {
    "object": ("properties", "required", "additionalProperties"),
    "array": ("items", "prefixItems", "minItems", "maxItems"),
    "string": ("minLength", "maxLength", "pattern", "format"),
    "integer": ("minimum", "maximum", "exclusiveMinimum", "exclusiveMaximum"),
    "number": (),
    "boolean": (),
    "null": (),
}
# Each alone decides what may stand; beside it are annotations only, and a type beside the first two.
_ALONE = ("enum", "const", "anyOf", "oneOf", "$ref")


def schema_pattern(schema: Any) -> Pattern:
    """The texts described above. `schema` is as `json.loads` gives it.

    Raises `UserError` naming the place of what is not supported, as a JSON pointer.
    """
    return _Reader(schema).pattern(schema, "#")


@dataclass(frozen=True)
class _Reader:
    root: Any
    references: tuple[str, ...] = ()  # those that led here

    def pattern(self, schema: Any, place: str) -> Pattern:
        """The values that are valid under the schema that stands at `place`, a JSON pointer."""
        if schema is True or schema == {}:
            return anything(ANY_DEPTH)
        if schema is False:
            _refuse(place, "false allows no value")
        if not isinstance(schema, dict):
            _refuse(place, f"a schema is an object, true or false, not {schema!r}")
        types = _types(schema, place)
        alone = [keyword for keyword in _ALONE if keyword in schema]
        if not alone:
            return choice([_TYPES[kind](self, schema, place) for kind in types])
        others = set(schema) - _ANNOTATIONS - {alone[0]} - ({"type"} if alone[0] in ("enum", "const") else set())
        if others:
            _refuse(f"{place}/{min(others)}", f"beside {alone[0]} it is not supported")
        if alone[0] == "$ref":
            return self._reference(schema["$ref"], f"{place}/$ref")
        if alone[0] in ("anyOf", "oneOf"):
            return self._alternatives(schema[alone[0]], f"{place}/{alone[0]}")
        return choice([_value(value, f"{place}/{alone[0]}") for value in _constants(schema, types, place)])

    def _alternatives(self, schemas: Any, place: str) -> Pattern:
        if not isinstance(schemas, list) or not schemas:
            _refuse(place, f"it is a list of one or more schemas, not {schemas!r}")
        options = [self.pattern(schema, f"{place}/{number}") for number, schema in enumerate(schemas)]
        if place.endswith("/oneOf"):
            for second in range(len(schemas)):
                for first in range(second):
                    if not self._disjoint(schemas[first], schemas[second]):
                        _refuse(
                            place,
                            f"a value may be valid under both number {first} and number {second}; give them different types, "
                            "or a required property with different constants, or write anyOf",
                        )
        return choice(options)

    def _reference(self, reference: Any, place: str) -> Pattern:
        if reference in self.references:
            _refuse(place, f"{reference} refers to itself, and only finite schemas are supported")
        schema = self._resolved(reference, place)
        return _Reader(self.root, (*self.references, reference)).pattern(schema, reference)

    def _resolved(self, reference: Any, place: str) -> Any:
        """What a $ref points to (RFC 6901)."""
        if not isinstance(reference, str) or not re.fullmatch("#(/.*)?", reference, re.DOTALL):
            _refuse(place, f"{reference!r} is not a place in this document, such as #/$defs/name")
        found = self.root
        for part in reference.split("/")[1:]:
            name = part.replace("~1", "/").replace("~0", "~")
            if isinstance(found, list) and name.isdecimal() and int(name) < len(found):
                found = found[int(name)]
            elif isinstance(found, dict) and name in found:
                found = found[name]
            else:
                _refuse(place, f"{reference} is not there: there is no {name!r}")
        return found

    # --- the types ---

    def object(self, schema: dict[str, Any], place: str) -> Pattern:
        properties = schema.get("properties", {})
        required = schema.get("required", [])
        others = schema.get("additionalProperties", not properties)
        if not isinstance(properties, dict):
            _refuse(f"{place}/properties", f"it is an object of schemas, not {properties!r}")
        if not isinstance(required, list) or not all(isinstance(name, str) for name in required):
            _refuse(f"{place}/required", f"it is a list of names, not {required!r}")
        if not isinstance(others, bool):
            _refuse(f"{place}/additionalProperties", "a schema is not supported, only true and false")
        if unknown := [name for name in required if name not in properties]:
            _refuse(f"{place}/required", f"{unknown[0]!r} is not among the properties")
        if not properties and others:
            return any_object(ANY_DEPTH)
        parts = []
        for name, inner in properties.items():
            key = literal(json.dumps(_text(name, place), ensure_ascii=False))
            there = f"{place}/properties/{name.replace('~', '~0').replace('/', '~1')}"
            parts.append((Sequence((key, COLON, self.pattern(inner, there))), name in required))
        return Sequence((literal("{"), Listing(tuple(parts), COMMA), literal("}")))

    def array(self, schema: dict[str, Any], place: str) -> Pattern:
        low, high = _sizes(schema, "minItems", "maxItems", place)
        first = schema.get("prefixItems", [])
        if not isinstance(first, list):
            _refuse(f"{place}/prefixItems", f"it is a list of schemas, not {first!r}")
        items = schema.get("items", not first)
        if isinstance(items, list):
            _refuse(f"{place}/items", "a list of schemas is not supported here; write prefixItems")
        if items is False:
            high = len(first) if high is None else min(high, len(first))
        if high is not None and low > high:
            _refuse(f"{place}/minItems", f"at least {low} items are wanted, but at most {high} can be there")
        if items is True and not first and low <= 1 and high is None:
            array = Separated(anything(ANY_DEPTH - 1), COMMA)
            return Sequence((literal("["), array if low else Repeat(array, 0, 1), literal("]")))
        parts = [self.pattern(inner, f"{place}/prefixItems/{number}") for number, inner in enumerate(first[:high])]
        rest = None if items is False else anything(ANY_DEPTH - 1) if items is True else self.pattern(items, f"{place}/items")
        return Sequence((literal("["), _array_content(parts, rest, low, high), literal("]")))

    def string(self, schema: dict[str, Any], place: str) -> Pattern:
        low, high = _sizes(schema, "minLength", "maxLength", place)
        contents: list[Pattern] = []
        if "pattern" in schema:
            contents.append(_parsed(schema["pattern"], f"{place}/pattern"))
        if "format" in schema:
            name = schema["format"]
            if not isinstance(name, str) or name not in FORMATS:
                _refuse(f"{place}/format", f"{name!r} is not supported; known are {', '.join(sorted(FORMATS))}")
            contents.append(parse_regex(FORMATS[name]))
        if not contents or (low, high) != (0, None):
            contents.append(Repeat(ANY, low, high))
        return Sequence((literal('"'), _all_of([escaped(content) for content in contents], place), literal('"')))

    def integer(self, schema: dict[str, Any], place: str) -> Pattern:
        low = _limits(schema, place, "minimum", "exclusiveMinimum", math.ceil, 1, max)
        high = _limits(schema, place, "maximum", "exclusiveMaximum", math.floor, -1, min)
        most = 10**DIGITS - 1
        if low is None:
            low = -most if high is None or high >= -most else -(10 ** (len(str(-high)) + 1) - 1)
        if high is None:
            high = most if low <= most else 10 ** (len(str(low)) + 1) - 1
        if low > high:
            _refuse(place, f"there is no integer from {low} to {high}")
        return parse_regex(integer_expression(low, high))

    # --- what can be told apart ---

    def _disjoint(self, left: Any, right: Any) -> bool:
        """Whether it is certain that no value is valid under both schemas."""
        one, other = self._plain(left), self._plain(right)
        if one is None or other is None:
            return False
        if "const" in one or "enum" in one:
            return all(self._excludes(other, value) for value in one.get("enum", [one.get("const")]))
        if "const" in other or "enum" in other:
            return self._disjoint(right, left)
        left_types, right_types = (
            {"number" if kind == "integer" else kind for kind in _named(schema)} for schema in (one, other)
        )
        if not left_types & right_types:
            return True
        if left_types & right_types != {"object"}:
            return False
        shared = set(one.get("required", [])) & set(other.get("required", []))
        return any(
            name in one.get("properties", {})
            and name in other.get("properties", {})
            and self._disjoint(one["properties"][name], other["properties"][name])
            for name in shared
        )

    def _excludes(self, schema: dict[str, Any], value: Any) -> bool:
        if "const" in schema or "enum" in schema:
            return all(not _equal(value, other) for other in schema.get("enum", [schema.get("const")]))
        return not any(_is_of(value, kind) for kind in _named(schema))

    def _plain(self, schema: Any) -> dict[str, Any] | None:
        """The schema behind its $ref; None where it has no types or constants of its own."""
        seen = set()
        while isinstance(schema, dict) and isinstance(schema.get("$ref"), str) and schema["$ref"] not in seen:
            seen.add(schema["$ref"])
            schema = self._resolved(schema["$ref"], schema["$ref"])
        known = (
            isinstance(schema, dict)
            and ({"const", "enum", "type"} & set(schema))
            and not {"anyOf", "oneOf", "$ref"} & set(schema)
        )
        return schema if known else None


_TYPES: dict[str, Callable[[_Reader, dict[str, Any], str], Pattern]] = {
    "object": _Reader.object,
    "array": _Reader.array,
    "string": _Reader.string,
    "integer": _Reader.integer,
    "number": lambda reader, schema, place: NUMBER,
    "boolean": lambda reader, schema, place: choice([literal("true"), literal("false")]),
    "null": lambda reader, schema, place: literal("null"),
}


def _refuse(place: str, reason: str) -> NoReturn:
    raise UserError(f"the JSON schema, {place}: {reason}.")


# --- types and constants ----------------------------------------------------------------------------------------------


def _named(schema: dict[str, Any]) -> list[str]:
    """The types that a schema names; all where it names none."""
    named = schema.get("type", list(_KEYWORDS))
    return named if isinstance(named, list) else [named]


def _types(schema: dict[str, Any], place: str) -> list[str]:
    """The types to write, after a check that every keyword is known and means something to one of them."""
    named = _named(schema)
    for kind in named:
        if not isinstance(kind, str) or kind not in _KEYWORDS:
            _refuse(f"{place}/type", f"{kind!r} is not one of {', '.join(_KEYWORDS)}")
    if not named:
        _refuse(f"{place}/type", "there is no type in it")
    known = {keyword for kind in named for keyword in _KEYWORDS[kind]}
    every = {keyword for keywords in _KEYWORDS.values() for keyword in keywords}
    for keyword in sorted(set(schema) - _ANNOTATIONS - {*_ALONE, "type"}):
        if keyword in _KEYWORDS["integer"] and "type" in schema and "number" in named:
            _refuse(f"{place}/{keyword}", "limits are supported for the type integer only")
        if keyword not in known:
            nothing = f"it means nothing for the type {' or '.join(named)}"
            _refuse(f"{place}/{keyword}", nothing if keyword in every else "this keyword is not supported")
    if "type" not in schema:  # a keyword speaks of one type; values of others would be valid too, and are not written
        meant = [kind for kind in named if {*_KEYWORDS[kind]} & set(schema)]
        return meant or ["object", "array", "string", "number", "boolean", "null"]
    return [kind for kind in named if not (kind == "integer" and "number" in named)]


def _constants(schema: dict[str, Any], types: list[str], place: str) -> list[Any]:
    """The values of enum or const that are of the schema's types."""
    values = schema["enum"] if "enum" in schema else [schema["const"]]
    if not isinstance(values, list) or not values:
        _refuse(f"{place}/enum", f"it is a list of one or more values, not {values!r}")
    fitting = [value for value in values if "type" not in schema or any(_is_of(value, kind) for kind in types)]
    if not fitting:
        _refuse(f"{place}/type", f"none of the constants is of the type {' or '.join(types)}")
    return fitting


def _is_of(value: Any, kind: str) -> bool:
    """Whether a value of `json.loads` is of the type; 1.0 is an integer."""
    if isinstance(value, bool) or value is None:
        return kind == ("null" if value is None else "boolean")
    if isinstance(value, int | float):
        return kind == "number" or (kind == "integer" and (isinstance(value, int) or value.is_integer()))
    return isinstance(value, {"object": dict, "array": list, "string": str}.get(kind, ()))


def _equal(left: Any, right: Any) -> bool:
    """Equality of JSON values: 1 is 1.0, but true is not 1."""
    if isinstance(left, list) and isinstance(right, list):
        return len(left) == len(right) and all(map(_equal, left, right))
    if isinstance(left, dict) and isinstance(right, dict):
        return left.keys() == right.keys() and all(_equal(left[name], right[name]) for name in left)
    return isinstance(left, bool) == isinstance(right, bool) and left == right


def _value(value: Any, place: str) -> Pattern:
    """That constant, written with one space or none behind ',' and ':'."""
    if isinstance(value, list):
        inner = Listing(tuple((_value(item, place), True) for item in value), COMMA)
        return Sequence((literal("["), inner, literal("]")))
    if isinstance(value, dict):
        pairs = [Sequence((_value(name, place), COLON, _value(item, place))) for name, item in value.items()]
        return Sequence((literal("{"), Listing(tuple((pair, True) for pair in pairs), COMMA), literal("}")))
    if isinstance(value, float) and not math.isfinite(value):
        _refuse(place, f"{value} is not JSON")
    return literal(json.dumps(_text(value, place) if isinstance(value, str) else value, ensure_ascii=False))


def _text(value: str, place: str) -> str:
    if any(0xD800 <= ord(character) <= 0xDFFF for character in value):
        _refuse(place, f"{value!r} holds a lone surrogate, which is no character")
    return value


# --- strings ----------------------------------------------------------------------------------------------------------


def _parsed(expression: Any, place: str) -> Pattern:
    if not isinstance(expression, str):
        _refuse(place, f"it is a regular expression, not {expression!r}")
    try:
        return parse_search(expression)
    except UserError as error:
        _refuse(place, str(error).removesuffix("."))


def _all_of(patterns: list[Pattern], place: str) -> Pattern:
    if len(patterns) == 1:
        return patterns[0]
    try:
        return Compiled(functools.reduce(intersection, map(compile_pattern, patterns)))
    except UserError as error:
        _refuse(place, str(error).removesuffix("."))


# --- numbers and sizes ------------------------------------------------------------------------------------------------


def _sizes(schema: Mapping[str, Any], least: str, most: str, place: str) -> tuple[int, int | None]:
    low, high = schema.get(least, 0), schema.get(most)
    for keyword, value in ((least, low), (most, high)):
        if keyword in schema and not (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
            _refuse(f"{place}/{keyword}", f"it is a whole number from 0 up, not {value!r}")
    if high is not None and low > high:
        _refuse(f"{place}/{least}", f"{low} is above {most}, {high}")
    return low, high


def _limits(
    schema: Mapping[str, Any],
    place: str,
    inclusive: str,
    exclusive: str,
    rounded: Callable[[float], int],
    step: int,
    tighter: Callable[..., int],
) -> int | None:
    """The tighter of the two limits that are there, as the first or last integer that it allows."""
    found = []
    for keyword in (inclusive, exclusive):
        if keyword not in schema:
            continue
        value = schema[keyword]
        if isinstance(value, bool) or not isinstance(value, int | float) or value in (math.inf, -math.inf) or value != value:
            _refuse(f"{place}/{keyword}", f"it is a number, not {value!r}")
        limit = rounded(value)
        found.append(limit + step if keyword == exclusive and limit == value else limit)
    return tighter(found) if found else None


# --- arrays and anything ----------------------------------------------------------------------------------------------


def _array_content(parts: list[Pattern], rest: Pattern | None, low: int, high: int | None) -> Pattern:
    """`low` to `high` items with commas between: the parts, as far as they go, then `rest`, if any, again and again."""
    if rest is not None and not parts and low <= 1 and high is None:
        return Repeat(Separated(rest, COMMA), low, 1)
    content: Pattern = Sequence(())
    if rest is not None:
        begin = max(len(parts), 1)  # the items that stand before the repetition; a first one has no comma
        if not parts and high != 0:
            parts = [rest]
        more = None if high is None else max(0, high - begin)
        content = Repeat(Sequence((COMMA, rest)), max(0, low - begin), more)
    # From the last part to the first: what follows may be missing where there are enough items.
    for number in reversed(range(len(parts))):
        comma = (COMMA,) if number else ()
        content = Sequence((*comma, parts[number], content))
        if low <= number:
            content = Repeat(content, 0, 1)
    return content
