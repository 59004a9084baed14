"""How a knob is declared, and the error for a person's mistake."""

from __future__ import annotations

import dataclasses
import difflib
import math
import reprlib
from typing import Any


class UserError(Exception):
    """A mistake that a person can mend: one sentence naming the file or key. The command line exits with status 2."""


def knob(
    default: Any,
    meaning: str,
    *,
    choices: tuple[str, ...] = (),
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    shapes_run: bool = True,
) -> Any:
    """A dataclass field. `choices` are those of each text, where it holds several. `shapes_run=False` marks a knob that may
    change between the start and the resumption of a run.
    """
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    return dataclasses.field(
        default=default,
        metadata={
            "meaning": meaning,
            "choices": choices,
            "bounds": {name: bound for name, bound in bounds.items() if bound is not None},
            "shapes_run": shapes_run,
        },
    )


def duration(unit: str, meaning: str, shapes_run: bool = True) -> Any:
    """One member of a `_steps`, `_tokens`, `_epochs` family; at most one of the three is given, 0 means not given."""
    return knob(0.0 if unit == "epochs" else 0, f"{meaning}, in {unit}; 0: not given.", at_least=0, shapes_run=shapes_run)


TYPE_NAMES = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", tuple[str, ...]: "a list of texts"}


def typed(key: str, value: Any, expected: Any, field: dataclasses.Field) -> Any:
    """`value` as exactly the declared type and within its bounds."""
    mismatch = UserError(f"{key}={reprlib.repr(value)} must be {TYPE_NAMES[expected]}.")
    if expected == tuple[str, ...]:
        if not isinstance(value, (tuple, list)) or not all(isinstance(item, str) for item in value):
            raise mismatch
        for item in value:
            _check_choice(key, item, field.metadata["choices"])
        return tuple(value)
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            raise mismatch from None
    if type(value) is not expected:
        raise mismatch
    if expected is float and not math.isfinite(value):
        raise UserError(f"{key}={value!r} must be a finite number.")
    _check_choice(key, value, field.metadata["choices"])
    tests = {
        "at_least": (lambda x, y: x >= y, "at least"),
        "above": (lambda x, y: x > y, "above"),
        "at_most": (lambda x, y: x <= y, "at most"),
        "below": (lambda x, y: x < y, "below"),
    }
    for name, bound in field.metadata["bounds"].items():
        holds, words = tests[name]
        if not holds(value, bound):
            raise UserError(f"{key}={value!r} must be {words} {bound}.")
    return value


def _check_choice(key: str, value: Any, choices: tuple[str, ...]) -> None:
    if choices and value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise UserError(f"{key}={value!r} must be one of {', '.join(choices)}{hint}")


def parsed(key: str, text: str, expected: Any) -> Any:
    """Whole numbers may be written 1_000_000 or 1e6; a list of texts is separated by commas."""
    try:
        if expected is bool:
            return {"true": True, "1": True, "false": False, "0": False}[text.lower()]
        if expected is int:
            try:
                return int(text)
            except ValueError:
                number = float(text)
                if not number.is_integer():
                    raise
                return int(number)
        if expected is float:
            return float(text)
        if expected is str:
            return text
        return tuple(item for item in text.split(",") if item)
    except (KeyError, ValueError, OverflowError):
        raise UserError(f"{key}={text!r} must be {TYPE_NAMES[expected]}.") from None
