"""What the models wrote while they were trained: the last sample of each group's first seed, chosen before it was read."""

from __future__ import annotations

from gptjax.pages.blocks import Block, Quote, Text
from gptjax.report.numbers import plural
from gptjax.sweeps.groups import Group, Run

MOST_CHARACTERS = 700
MOST_GROUPS = 12


def samples(groups: tuple[Group, ...]) -> list[Block]:
    """One quotation a group."""
    found: list[Block] = []
    for group in groups:
        for run in group.runs:
            sample = last_sample(run)
            if sample is not None:
                found.append(
                    Quote(f"{group.number} {group.label}, seed {run.seed}, step {sample[0]:,}", _cut(sample[1]), group.number)
                )
                break
    if not found:
        return [Text("The runs wrote no samples: evaluate.sample_tokens is 0, or they did not come to an evaluation.", "note")]
    without = len(groups) - len(found)
    said = "Of each group the last sample of its lowest seed that has one; nothing was picked by what it says."
    said += f" {plural(without, 'group')} without a sample." if without else ""
    if len(found) > MOST_GROUPS:
        said += f" The first {MOST_GROUPS} of {len(found)}."
    return [Text(said, "note"), *found[:MOST_GROUPS]]


def last_sample(run: Run) -> tuple[int, str] | None:
    """(step, text) of the latest file in the run's folder `samples`."""
    paths = [path for path in (run.folder / "samples").glob("*.txt") if path.stem.isdecimal()]
    if not paths:
        return None
    path = max(paths, key=lambda one: int(one.stem))
    return int(path.stem), path.read_text(encoding="utf-8", errors="replace")


def _cut(text: str) -> str:
    return text if len(text) <= MOST_CHARACTERS else f"{text[:MOST_CHARACTERS]} … [cut here, of {len(text):,} characters]"
