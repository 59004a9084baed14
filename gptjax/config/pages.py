"""Documentation of the knobs, made from their declarations: a page for each group."""

from __future__ import annotations

import dataclasses
import difflib
import textwrap
import typing
from typing import Any

from gptjax.config.knobs import TYPE_NAMES, UserError
from gptjax.config.schema import Config

_BOUNDS = {"at_least": "at least", "above": "above", "at_most": "at most", "below": "below"}
_NARROWEST = 40


def groups() -> dict[str, Any]:
    """{"model": its defaults, ...} of every group of knobs."""
    default = Config()
    named = {field.name: getattr(default, field.name) for field in dataclasses.fields(Config)}
    return {name: value for name, value in named.items() if dataclasses.is_dataclass(value)}


def contents(width: int = 80) -> str:
    """The groups, a line each, and the knobs that stand in none."""
    default, lines = Config(), ["groups of knobs, each with a page, `gptjax config --help GROUP`:"]
    for name, group in groups().items():
        about = f"{_first_sentence(type(group).__doc__)} {len(dataclasses.fields(group))} knobs."
        lines += _wrapped(about, width, f"  {name:<11} ", " " * 14)
    alone = [field for field in dataclasses.fields(Config) if field.name not in groups()]
    for field in alone:
        lines += ["", *_entry(field, str, getattr(default, field.name), "", width)]
    return "\n".join(lines) + "\n"


def group_page(group: str, width: int = 80) -> str:
    """Every knob of a group with type, default, choices, bounds and meaning, in lines of at most `width` characters.

    Raises `UserError` for a group that there is not.
    """
    known = groups()
    if group not in known:
        near = difflib.get_close_matches(group, known, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}."
        raise UserError(f"there is no group of knobs {group}; {hint}")
    defaults = known[group]
    types = typing.get_type_hints(type(defaults))
    lines = _wrapped(f"{group}: {_first_sentence(type(defaults).__doc__)}", width, "", "")
    for field in dataclasses.fields(defaults):
        lines += ["", *_entry(field, types[field.name], field.default, f"{group}.", width)]
    return "\n".join(lines) + "\n"


def _entry(field: dataclasses.Field, kind: Any, default: Any, prefix: str, width: int) -> list[str]:
    """The lines of one knob."""
    facts = [TYPE_NAMES[kind]]
    facts += [f"{_BOUNDS[name]} {bound}" for name, bound in field.metadata["bounds"].items()]
    facts.append(f"default {_text(default)}")
    lines = _wrapped(", ".join(facts), width, f"{prefix}{field.name}: ", "    ")
    if field.metadata["choices"]:
        lines += _wrapped(f"one of {', '.join(field.metadata['choices'])}", width, "    ", "    ")
    lines += _wrapped(field.metadata["meaning"], width, "    ", "    ")
    if not field.metadata["shapes_run"]:
        lines += _wrapped("A resumed run may change it.", width, "    ", "    ")
    return lines


def _text(default: Any) -> str:
    if isinstance(default, tuple):
        return " ".join(map(repr, default)) or "none"
    return repr(default) if default == "" else str(default)


def _first_sentence(text: str | None) -> str:
    return " ".join((text or "").split()).partition(". ")[0].rstrip(".") + "."


def _wrapped(text: str, width: int, first: str, others: str) -> list[str]:
    width = max(width, _NARROWEST)
    wrapper = textwrap.TextWrapper(width, initial_indent=first, subsequent_indent=others, break_long_words=False)
    wrapper.break_on_hyphens = False
    return wrapper.wrap(text)
