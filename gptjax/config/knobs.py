"""How a knob is declared, and the error for a person's mistake."""

from __future__ import annotations

import dataclasses
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
