"""Where the runs were made: versions, commit, hardware; and a warning where that was not the same for all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gptjax.pages.blocks import Block, Table, Text
from gptjax.report.numbers import joined, plural
from gptjax.sweeps.groups import Run

_HARDWARE = {
    "device_kind": "device",
    "device_count": "devices a run",
    "process_count": "processes a run",
    "cpu_model": "CPU",
    "cpu_cores": "CPU cores a run",
}


def environment(runs: Sequence[Run]) -> list[Block]:
    """A table of what finished runs wrote down."""
    finished = [run for run in runs if run.result]
    facts = [facts_of(run) for run in finished]
    if not any(facts):
        return [Text("No run has finished, and only finished runs write their environment down.", "note")]
    rows, mixed = [], []
    for name in dict.fromkeys(key for own in facts for key in own):
        values = [own.get(name, "unknown") for own in facts]
        distinct = list(dict.fromkeys(values))
        if len(distinct) == 1:
            rows.append((name, distinct[0]))
        else:
            mixed.append(name)
            rows.append((name, "; ".join(f"{value} ({plural(values.count(value), 'run')})" for value in distinct)))
    found: list[Block] = []
    if mixed:
        found.append(
            Text(
                f"The runs were not all made alike: {joined(mixed)} differ. A difference between groups may come from that.",
                "warning",
            )
        )
    found.append(Table("Versions and hardware", ("what", "value"), tuple(rows), texts=frozenset({1})))
    if len(finished) < len(runs):
        missing = len(runs) - len(finished)
        found.append(
            Text(
                f"Of {plural(len(finished), 'finished run')}; {missing} of {len(runs)} have not finished and say nothing.", "note"
            )
        )
    return found


def facts_of(run: Run) -> dict[str, str]:
    """{name: text} of a finished run."""
    versions, hardware = run.result.get("versions", {}), run.result.get("hardware", {})
    facts = {name: str(version) for name, version in versions.items()}
    if "git_commit" in run.result:
        dirty: Any = run.result.get("git_dirty")
        changed = ", with changes that are in no commit" if dirty is True else ""
        facts["commit"] = f"{run.result['git_commit']}{changed}"
    return facts | {text: str(hardware[name]) for name, text in _HARDWARE.items() if name in hardware}
