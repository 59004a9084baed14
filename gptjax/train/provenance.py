"""Where a run's numbers come from: `provenance.json` in its folder says under what each start of the run ran, and on what data.

    {"format": 1, "starts": [{"from_step": 0, "command": [...], "mesh": {...}, "data": {...}, "init_from": {...},
                              "config_changes": {...}, "versions": {...}, "git_commit": ..., "hardware": {...}, "flags": {...}}]}

A start that differs from the one before it in nothing but the step is not written down again.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import pathlib
import sys
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from jax.sharding import Mesh

from gptjax import config as config_lib
from gptjax.config import Config, UserError
from gptjax.data.pipeline import Dataset, Mixture, Split
from gptjax.tasks.load import TaskDataset
from gptjax.train import manifest
from gptjax.train.run import environment, read_result, write_json

FILE = "provenance.json"
_ENVIRONMENT = ("versions", "git_commit", "git_dirty", "hardware", "flags")


def note_start(workdir: pathlib.Path, config: Config, dataset: Dataset, mesh: Mesh, step: int, about: Mapping[str, Any]) -> None:
    """Adds the start that goes on from `step` to the folder's file. `about`: what was saved with the checkpoint of that step."""
    before = starts_of(workdir)
    start = {
        "command": sys.argv,
        "mesh": dict(mesh.shape),
        "data": data_fingerprints(dataset),
        # The run no longer depends on what has become of init_from since.
        "init_from": initial_fingerprint(config) if step == 0 or not before else before[-1]["init_from"],
        "config_changes": _config_changes(about, config),
    } | environment()
    if not before or start != {name: value for name, value in before[-1].items() if name != "from_step"}:
        write_json(workdir / FILE, {"format": 1, "starts": [*before, {"from_step": step} | start]})


def starts_of(workdir: pathlib.Path) -> list[dict[str, Any]]:
    """The starts that the folder's file holds, [] where there is none. Raises `UserError` where it cannot be read."""
    path = workdir / FILE
    try:
        starts = json.loads(path.read_text(encoding="utf-8"))["starts"]
        return [dict(start) for start in starts]
    except FileNotFoundError:
        return []
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}); remove it to go on without what it says of earlier starts.") from None


def _config_changes(about: Mapping[str, Any], config: Config) -> dict[str, list[Any]]:
    """{key: [value of the checkpoint's config, value from now on]} of what shapes the run."""
    if "config" not in about:
        return {}
    changes = config_lib.differences(config_lib.from_dict(about["config"]), config, shaping_only=True)
    return {key: list(values) for key, values in changes.items()}


# --- data ---------------------------------------------------------------------------------------------------------------------


def data_fingerprints(dataset: Dataset) -> dict[str, str]:
    """{source, or "data" where there is one: a hash of all that its rows depend on beside the config}.

    Documents have that of their text, tokenizer and the tokens around them, by which the cache knows them, and nothing is read;
    tasks that of their tokens and labels.
    """
    if isinstance(dataset, TaskDataset):
        parts = {"train": dataset.train, "eval": dataset.eval}
        return {f"{part}/{split.source}".rstrip("/"): _hash_of(split) for part, own in parts.items() for split in _splits_of(own)}
    sources = dataset.report.get("sources") or {"data": dataset.report}
    return {name: pathlib.Path(report["cache"]).name.rpartition("-")[2] for name, report in sources.items()}


def _splits_of(part: Split | Mixture | dict[str, Split]) -> Iterable[Split]:
    several = part.splits if isinstance(part, Mixture) else part
    return [several] if isinstance(several, Split) else several.values()


def _hash_of(split: Split) -> str:
    digest = hashlib.sha256()
    for name, array in {"tokens": split.tokens, "offsets": split.offsets, **split.columns}.items():
        digest.update(f"{name} {array.dtype} {array.shape}\n".encode())
        digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()[:32]


def initial_fingerprint(config: Config) -> dict[str, Any] | None:
    """What `init_from` holds now: of a run's folder the newest checkpoint and its manifest's hash, of another the files' hash.

    None where `init_from` is empty, or is no folder.
    """
    folder = pathlib.Path(config.init_from)
    if not config.init_from or not folder.is_dir():
        return None
    if (folder / "checkpoints").is_dir():
        saved = [path for path in sorted((folder / "checkpoints").iterdir()) if path.name.isdigit() and manifest.exists(path)]
        if not saved:
            return None
        return {"step": int(saved[-1].name), "sha256": _file_hash([saved[-1] / manifest.NAME])}
    return {"step": None, "sha256": _file_hash(sorted(path for path in folder.iterdir() if path.is_file()))}


def _file_hash(paths: Iterable[pathlib.Path]) -> str:
    digest = hashlib.sha256()
    for path in paths:
        with open(path, "rb") as file:
            digest.update(f"{path.name}\n{hashlib.file_digest(file, 'sha256').hexdigest()}\n".encode())
    return digest.hexdigest()[:32]


def check_same_data(workdir: pathlib.Path, dataset: Dataset) -> str:
    """Raises `UserError` where the run in `workdir` had other data than `dataset`.

    A sentence for the reader where the folder does not say which data it had; "" where they are the same.
    """
    starts = starts_of(workdir)
    if not starts:
        return f"{workdir} does not say which data it had (no {FILE}): that they are the same is shown by its numbers alone."
    then, now = starts[-1]["data"], data_fingerprints(dataset)
    if changed := sorted(name for name in then.keys() | now.keys() if then.get(name) != now.get(name)):
        was, found = (str(prints.get(changed[0], "none"))[:12] for prints in (then, now))
        raise UserError(
            f"{workdir} was trained on other data: the fingerprint of {changed[0]} was {was} and is {found} now; bring back the "
            "text and the tokenizer that it had, or say where they are by --config.data.path and the like."
        )
    return ""


def check_same_initial(workdir: pathlib.Path, config: Config) -> None:
    """Raises `UserError` where `init_from` does not hold what the run in `workdir` began with, as far as its folder says so."""
    starts = starts_of(workdir)
    then = starts[0]["init_from"] if starts else None
    now = initial_fingerprint(config)
    if config.init_from and now is None:
        raise UserError(
            f"init_from={config.init_from}, whose parameters {workdir} began with, is not there any more; bring it back, or say "
            "where it is by --config.init_from."
        )
    if then is not None and now is not None and then != now:
        raise UserError(
            f"init_from={config.init_from} holds other parameters now ({_told(now)}) than {workdir} began with ({_told(then)}); "
            "bring those back, or say where they are by --config.init_from."
        )


def _told(initial: Mapping[str, Any]) -> str:
    step = "" if initial["step"] is None else f"step {initial['step']}, "
    return f"{step}sha256 {initial['sha256'][:12]}"


# --- environments -------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Change:
    """One thing that is not as it was; None where nobody wrote it down."""

    name: str
    then: Any
    now: Any


def environments(workdir: pathlib.Path) -> list[tuple[int, dict[str, Any]]]:
    """(steps before it, environment) of each start; of a run that is older than provenance.json, the one of its end."""
    starts = starts_of(workdir)
    if starts:
        return [(start["from_step"], {name: start[name] for name in (*_ENVIRONMENT, "mesh")}) for start in starts]
    result = read_result(workdir) or {}
    found = {name: result[name] for name in _ENVIRONMENT if name in result}
    return [(0, found)] if found else []


def changes(then: Mapping[str, Any], now: Mapping[str, Any]) -> list[Change]:
    """What differs between two environments, by dotted names; what only one of the two wrote down is left out."""
    a, b = _flat(then), _flat(now)
    groups = {name for name in then if name in now}
    names = [name for name in {**a, **b} if name.partition(".")[0] in groups]
    return [Change(name, a.get(name), b.get(name)) for name in names if a.get(name) != b.get(name)]


def _flat(tree: Mapping[str, Any], front: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _flat(value, f"{front}{name}.") if isinstance(value, Mapping) else {f"{front}{name}": value}
    return found
