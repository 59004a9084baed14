"""Which runs a report is on, and where its question stands: found from the folders that were named."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Sequence

import gptjax
from gptjax.config import UserError
from gptjax.report.question import Question, read_question
from gptjax.sweeps.groups import Run, read_runs

README, SWEEP_FILE = "README.md", "sweep.py"
ROOTS = (pathlib.Path(), pathlib.Path(gptjax.__file__).resolve().parents[1])  # where a sweep file's path may start


@dataclasses.dataclass(frozen=True)
class Sources:
    """`folders` are the runs' and sweeps' that were read; `arguments` what the sweep files were called with."""

    folders: tuple[str, ...]
    runs: tuple[Run, ...]
    questions: tuple[Question, ...]
    arguments: tuple[str, ...]


def find_sources(folders: Sequence[str], readme: str = "") -> Sources:
    """The runs below these folders, each a run's, a sweep's, one that holds such, or an experiment's (README.md and sweep.py).

    The question is in `readme`, or else in the README.md of the folders or beside the sweep file that the sweep was started
    from. Raises `UserError` where a folder holds no run.
    """
    found: list[pathlib.Path] = []
    experiments = [path for path in map(pathlib.Path, folders) if _is_experiment(path)]
    for path in map(pathlib.Path, folders):
        inside = _expand(path)
        if not inside and path in experiments:
            if len(experiments) < len(folders):
                continue  # the runs are in the others
            inside = _expand(pathlib.Path("runs") / path.resolve().name)
            if not inside:
                raise UserError(
                    f"{path} has a {README} and a {SWEEP_FILE}, but no runs, and there are none in runs/{path.resolve().name}; "
                    f"name the sweep's folder as well: gptjax report {path} DIR."
                )
        if not inside:
            what = "does not exist" if not path.exists() else "holds no run and no sweep: no config.json and no sweep.json"
            raise UserError(f"{path} {what}.")
        found += [one for one in inside if one not in found]
    definitions = [_sweep_file(path) for path in found]
    files = [file for file, _ in filter(None, definitions)]
    asked = [pathlib.Path(readme)] if readme else _readmes([*experiments, *map(pathlib.Path, folders)], files)
    arguments = tuple(dict.fromkeys(argument for _, argument in filter(None, definitions) if argument))
    runs = tuple(read_runs([str(path) for path in found]))
    return Sources(tuple(map(str, found)), runs, tuple(map(read_question, asked)), arguments)


def _is_experiment(path: pathlib.Path) -> bool:
    return (path / README).is_file() and (path / SWEEP_FILE).is_file() and not (path / "sweep.json").is_file()


def _is_source(path: pathlib.Path) -> bool:
    return (path / "sweep.json").is_file() or (path / "config.json").is_file()


def _expand(path: pathlib.Path) -> list[pathlib.Path]:
    """The runs' and sweeps' folders that `path` is, belongs to as a sweep's trials, or holds; [] for none."""
    if _is_source(path):
        return [path]
    if path.resolve().name == "trials" and (path.resolve().parent / "sweep.json").is_file():
        return [path.parent if path.name == "trials" else path.resolve().parent]
    return sorted(child for child in path.iterdir() if _is_source(child)) if path.is_dir() else []


def _sweep_file(path: pathlib.Path) -> tuple[pathlib.Path, str] | None:
    """(sweep file, its argument) that the sweep in `path` was started from; None where that is not known."""
    try:
        spec = json.loads((path / "sweep.json").read_text(encoding="utf-8")).get("file", "")
    except (OSError, ValueError, AttributeError):  # no sweep; a damaged one is refused where its trials are read
        return None
    file, _, argument = str(spec).partition(":")
    return (pathlib.Path(file), argument) if file else None


def _readmes(folders: Sequence[pathlib.Path], files: Sequence[pathlib.Path]) -> list[pathlib.Path]:
    """Those of the folders; where they have none, those beside the sweep files."""
    own = [path / README for path in folders]
    beside = [root / file.parent / README for file in files for root in ROOTS]
    for paths in (own, beside):
        there: dict[pathlib.Path, pathlib.Path] = {}
        for path in paths:
            if path.is_file():
                there.setdefault(path.resolve(), path)
        if there:
            return list(there.values())
    return []
