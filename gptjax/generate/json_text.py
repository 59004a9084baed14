"""JSON values as patterns: what the texts of strings, numbers and of any value look like."""

from __future__ import annotations

import functools
import json

from gptjax.generate.patterns import Chars, Choice, Pattern, Repeat, Separated, Sequence, complement, literal
from gptjax.generate.regex import ANY, parse_regex

SPACE = Repeat(literal(" "), 0, 1)
COMMA, COLON = Sequence((literal(","), SPACE)), Sequence((literal(":"), SPACE))


def choice(options: list[Pattern]) -> Pattern:
    return options[0] if len(options) == 1 else Choice(tuple(options))


# --- strings ----------------------------------------------------------------------------------------------------------

_YEAR, _TIME = "[1-9][0-9]{3}", r"([01]\d|2[0-3]):[0-5]\d:[0-5]\d(\.\d{1,6})?(Z|[+-]([01]\d|2[0-3]):[0-5]\d)"
_DATE = (
    f"{_YEAR}-("
    r"(0[1-9]|1[0-2])-(0[1-9]|1\d|2[0-8])|"  # every month
    r"(0[13-9]|1[0-2])-(29|30)|(0[13578]|1[02])-31)"  # all but February; the long ones
)
FORMATS = {
    "date": _DATE,
    "time": _TIME,
    "date-time": f"{_DATE}T{_TIME}",
    "uuid": "[0-9a-f]{8}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{4}-[0-9a-f]{12}",
}

_MUST_ESCAPE = [*range(0x20), ord('"'), ord("\\")]
_PLAIN = complement(tuple((code, code) for code in sorted(_MUST_ESCAPE)))


def escaped(pattern: Pattern) -> Pattern:
    """The same texts as they stand between the quotation marks of a JSON string."""
    match pattern:
        case Chars():
            return _escaped_characters(pattern)
        case Sequence():
            return Sequence(tuple(map(escaped, pattern.parts)))
        case Choice():
            return Choice(tuple(map(escaped, pattern.options)))
        case Repeat():
            return Repeat(escaped(pattern.part), pattern.low, pattern.high)
    raise TypeError(f"a regular expression has no {type(pattern).__name__}")


@functools.cache
def _escaped_characters(pattern: Chars) -> Pattern:
    both = [
        (max(low, begin), min(high, end)) for low, high in pattern.ranges for begin, end in _PLAIN if low <= end and begin <= high
    ]
    escapes = [
        literal(json.dumps(chr(code))[1:-1]) for code in _MUST_ESCAPE if any(low <= code <= high for low, high in pattern.ranges)
    ]
    return choice([Chars(tuple(both)), *escapes])


# --- numbers ----------------------------------------------------------------------------------------------------------

NUMBER = parse_regex(r"-?(0|[1-9]\d{0,17})(\.\d{1,15})?([eE][+-]?\d{1,2})?")
DIGITS = 18


def integer_expression(low: int, high: int) -> str:
    """A regular expression of the integers from `low` to `high`, written without leading zeros."""
    options = []
    if low < 0:
        options += ["-" + option for option in _naturals(max(1, -high), -low)]
    if high >= 0:
        options += _naturals(max(0, low), high)
    return "|".join(options)


def _naturals(low: int, high: int) -> list[str]:
    """Expressions of the integers from `low` to `high`, both at least 0."""
    options = []
    for digits in range(len(str(low)), len(str(high)) + 1):
        first = max(low, 10 ** (digits - 1) if digits > 1 else 0)
        options += _same_length(str(first), str(min(high, 10**digits - 1)))
    return options


def _same_length(low: str, high: str) -> list[str]:
    """Expressions of the digit strings from `low` to `high`, which have one length."""
    rest = len(low) - 1
    if rest < 0:
        return [""]
    if low[0] == high[0]:
        return [low[0] + option for option in _same_length(low[1:], high[1:])]
    options = []
    begin, end = int(low[0]), int(high[0])
    if low[1:].strip("0"):
        options += [low[0] + option for option in _same_length(low[1:], "9" * rest)]
        begin += 1
    if high[1:].strip("9"):
        options += [high[0] + option for option in _same_length("0" * rest, high[1:])]
        end -= 1
    if begin <= end:
        options.append(f"[{begin}-{end}]" + (f"[0-9]{{{rest}}}" if rest else ""))
    return options


# --- any value --------------------------------------------------------------------------------------------------------


@functools.cache
def anything(depth: int) -> Pattern:
    """Any JSON value, at most `depth` objects or arrays deep."""
    scalars = [any_string(), NUMBER, *map(literal, ("true", "false", "null"))]
    if depth == 0:
        return choice(scalars)
    array = Sequence((literal("["), Repeat(Separated(anything(depth - 1), COMMA), 0, 1), literal("]")))
    return choice([*scalars, any_object(depth), array])


@functools.cache
def any_object(depth: int) -> Pattern:
    pair = Sequence((any_string(), COLON, anything(depth - 1)))
    return Sequence((literal("{"), Repeat(Separated(pair, COMMA), 0, 1), literal("}")))


@functools.cache
def any_string() -> Pattern:
    return Sequence((literal('"'), escaped(Repeat(ANY, 0, None)), literal('"')))
