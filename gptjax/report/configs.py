"""What the groups' configs differ in, and what they have in common."""

from __future__ import annotations

from typing import Any

from gptjax.config import Config, flatten
from gptjax.pages.blocks import Block, Cell, Table, Text
from gptjax.report.importance import swept_keys
from gptjax.sweeps.definition import show
from gptjax.sweeps.groups import SEED, Group

MOST_COLUMNS = 7
MOST_CHARACTERS = 120  # of a value


def configs(groups: tuple[Group, ...]) -> list[Block]:
    """The knobs that differ, by group; the knobs that no group has at its default and that are the same in all."""
    firsts = [group.runs[0] for group in groups]
    values = [flatten(run.config) for run in firsts]
    differing = swept_keys(firsts)
    found: list[Block] = []
    rows: tuple[tuple[str | Cell, ...], ...]
    if not differing:
        found.append(Text("The groups' configs are the same but for the seed.", "note"))
    elif len(differing) < MOST_COLUMNS or len(groups) > len(differing):
        rows = tuple(
            (Cell(f"{group.number}", group.number), *(_shown(own[key]) for key in differing))
            for group, own in zip(groups, values, strict=True)
        )
        found.append(Table("Knobs that differ between groups", ("group", *differing), rows))
    else:
        head = ("knob", *(str(group.number) for group in groups))
        found.append(
            Table("Knobs that differ, by group", head, tuple((key, *(_shown(own[key]) for own in values)) for key in differing))
        )
    defaults = flatten(Config())
    own = {key for run in firsts for key in run.knobs} - set(differing) - {SEED}
    shared = [(key, _shown(values[0][key]), _shown(defaults[key])) for key in values[0] if key in own]
    if shared:
        found.append(
            Table("The same in all, and not at the default", ("knob", "value", "default"), tuple(shared), texts=frozenset({1}))
        )
    return found


def _shown(value: Any) -> str:
    text = show(value) if value != "" else '""'
    return text if len(text) <= MOST_CHARACTERS else text[: MOST_CHARACTERS - 1] + "…"
