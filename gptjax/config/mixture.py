"""The three knobs of a mixture of sources, read: which sources there are, what each is set to, and their weights over the run."""

from __future__ import annotations

import dataclasses
import difflib
import math
import re
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from gptjax.config.knobs import UserError

if TYPE_CHECKING:
    from gptjax.config.data import DataConfig

Knots = tuple[tuple[float, float], ...]  # (place in the run from 0 to 1, weight), places ascending, at most two the same

NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]*")
# What a source may have of its own. The first three are empty unless it has; the others are then those of all.
_OWN = ("path", "eval_path", "name")
_SETTINGS = (*_OWN, "train_split", "eval_split", "text_field", "split_by", "eval_fraction")


def mixture_sources(data: DataConfig) -> dict[str, DataConfig]:
    """{source's name: the knobs of it alone}, in the order of `data.mixture`. Raises `UserError`."""
    found: dict[str, DataConfig] = {}
    for item, name, kind, place in members("data.mixture", data.mixture, "NAME=SOURCE or NAME=SOURCE:PATH"):
        _check_choice(f"data.mixture: the source of {name}", "source", data, kind)
        if kind == "stdlib" and place:
            raise UserError(f"data.mixture: {item!r} gives a path to stdlib, which has none.")
        path, dataset = ("", place) if kind == "tfds" else (place, "")
        found[name] = dataclasses.replace(
            data, mixture=(), mixture_weights=(), mixture_settings=(), source=kind, path=path, name=dataset, eval_path=""
        )
    _lay_settings(data, found)
    for name, alone in found.items():
        if alone.source in ("text", "jsonl") and not alone.path:
            raise UserError(f"data.mixture: {name}={alone.source} needs a path, a file or a glob: {name}={alone.source}:PATH.")
        if alone.source == "tfds" and not alone.name:
            raise UserError(f"data.mixture: {name}=tfds needs the data set's name: {name}=tfds:DATA_SET.")
    return found


def _lay_settings(data: DataConfig, found: dict[str, DataConfig]) -> None:
    where = "data.mixture_settings"
    else_known = f"; a source has of its own {', '.join(_SETTINGS)}."
    given = own_settings(where, data.mixture_settings, tuple(found), _SETTINGS, "source", "chat.text_field=body", else_known)
    for name, setting, text in given:
        key = f"{name}.{setting}"
        if setting in _OWN and getattr(found[name], setting):
            raise UserError(f"{where}: {key} is given twice.")
        _check_choice(f"{where}: {key}", setting, data, text)
        value: str | float = text
        if setting == "eval_fraction":
            value = _number(f"{where}: '{key}={text}'", text)
            if not 0 < value < 1:
                raise UserError(f"{where}: '{key}={text}' must be above 0 and below 1.")
        found[name] = _with(found[name], setting, value)


def _with(alone: DataConfig, setting: str, value: Any) -> DataConfig:
    return dataclasses.replace(alone, **{setting: value})


def members(key: str, items: Sequence[str], form: str) -> Iterator[tuple[str, str, str, str]]:
    """(item, NAME, KIND, PLACE) of each NAME=KIND or NAME=KIND:PLACE that the knob `key` holds; `form`: what an item must be.
    Raises `UserError`.
    """
    names: set[str] = set()
    for item in items:
        name, equals, what = item.partition("=")
        kind, _, place = what.partition(":")
        if not equals or not NAME.fullmatch(name):
            raise UserError(f"{key}: {item!r} must be {form}, NAME of letters, digits, - and _.")
        if name in names:
            raise UserError(f"{key} names {name} twice.")
        names.add(name)
        yield item, name, kind, place


def own_settings(
    key: str, items: Sequence[str], names: tuple[str, ...], settings: Sequence[str], what: str, example: str, known: str = "."
) -> Iterator[tuple[str, str, str]]:
    """(NAME, SETTING, VALUE) of each NAME.SETTING=VALUE that the knob `key` holds, the names being those of `what`; `known` ends
    the message where no setting is near. Raises `UserError`.
    """
    given: set[str] = set()
    for item in items:
        place, equals, text = item.partition("=")
        name, dot, setting = place.partition(".")
        if not (equals and dot):
            raise UserError(f"{key}: {item!r} must be NAME.SETTING=VALUE, as in {example}.")
        check_name(key, name, names, what)
        if setting not in settings:
            raise UserError(f"{key}: {place} is no setting of a {what}{nearest(setting, tuple(settings)) or known}")
        if place in given:
            raise UserError(f"{key}: {place} is given twice.")
        given.add(place)
        yield name, setting, text


def mixture_weights(data: DataConfig) -> dict[str, Knots]:
    """{source's name: its weights by place in the run}; {} where none are given. Raises `UserError`."""
    return weights_over_run("data.mixture_weights", data.mixture_weights, tuple(mixture_sources(data)))


def weights_over_run(key: str, items: Sequence[str], names: tuple[str, ...]) -> dict[str, Knots]:
    """{name: its weights by place in the run} of NAME=WEIGHT and NAME=WEIGHT@PLACE, what the knob `key` holds; {} where it holds
    none. Raises `UserError`.
    """
    places: dict[str, list[tuple[float, float]]] = {}
    bare: dict[str, str] = {}
    for item in items:
        name, equals, text = item.partition("=")
        where = f"{key}: {item!r}"
        if not equals:
            raise UserError(f"{where} must be NAME=WEIGHT or NAME=WEIGHT@PLACE, PLACE from 0, the run's start, to 1, its end.")
        check_name(key, name, names)
        weight, at, where_in_run = text.partition("@")
        if name in bare or (not at and name in places):
            raise UserError(f"{where} gives {name} a second weight; weights that change all need a place: {name}=WEIGHT@PLACE.")
        if not at:
            bare[name] = item
        knot = (_number(where, where_in_run) if at else 0.0, _number(where, weight))
        if knot[1] < 0:
            raise UserError(f"{where} must not be negative.")
        if not 0 <= knot[0] <= 1:
            raise UserError(f"{where} must have its place from 0, the run's start, to 1, its end.")
        places.setdefault(name, []).append(knot)
        if sum(knot[0] == other for other, _ in places[name]) > 2:
            raise UserError(f"{where} is the third weight of {name} at the same place; two of them make a step.")
    if not places:
        return {}
    missing = [name for name in names if name not in places]
    if missing:
        raise UserError(f"{key} has no weight for {' and '.join(missing)}; 0 leaves a source to evaluation.")
    weights = {name: tuple(sorted(places[name], key=lambda knot: knot[0])) for name in names}
    for place in sorted({place for knots in weights.values() for place, _ in knots}):
        for after in (False, True):
            if not sum(weight_at(knots, place, after) for knots in weights.values()):
                raise UserError(f"{key}: at {place:g} of the run all weights are 0.")
    return weights


def weight_at(knots: Knots, place: float, after: bool = True) -> float:
    """Straight lines between the knots, level outside them; at a step the weight after it, or the one before."""
    lower = [knot for knot in knots if (knot[0] <= place if after else knot[0] < place)]
    upper = [knot for knot in knots if (knot[0] > place if after else knot[0] >= place)]
    if not lower or not upper:
        return (lower[-1] if lower else upper[0])[1]
    (left, low), (right, high) = lower[-1], upper[0]
    return low + (high - low) * ((place - left) / (right - left))


def check_mixture(data: DataConfig) -> None:
    """Raises `UserError` for mixture knobs that say no mixture."""
    for key in ("mixture_weights", "mixture_settings"):
        if getattr(data, key) and not data.mixture:
            raise UserError(f"data.{key}={','.join(getattr(data, key))} needs data.mixture, which names the sources.")
    mixture_weights(data)


def check_name(key: str, name: str, names: Sequence[str], what: str = "source") -> None:
    """Raises `UserError` for a name that the mixture of `key` has not."""
    if name not in names:
        group = key.rpartition(".")[0]
        hint = nearest(name, tuple(names)) or f"; {group}.mixture has {', '.join(names)}."
        raise UserError(f"{key}: {name!r} is no {what}{hint}")


def _check_choice(what: str, knob: str, data: DataConfig, value: str) -> None:
    choices = next(field.metadata["choices"] for field in dataclasses.fields(data) if field.name == knob)
    if choices and value not in choices:
        raise UserError(f"{what} is {value!r}, but it must be one of {', '.join(choices)}{nearest(value, choices) or '.'}")


def _number(where: str, text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise UserError(f"{where}: {text!r} is not a finite number.")
    return value


def nearest(name: str, names: tuple[str, ...]) -> str:
    near = difflib.get_close_matches(name, names, n=1)
    return f"; did you mean {near[0]}?" if near else ""
