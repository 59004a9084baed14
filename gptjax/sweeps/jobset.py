"""Trials on Kubernetes: a JobSet manifest for each, by launch/render_jobset.py."""

from __future__ import annotations

import pathlib
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import gptjax
from gptjax.config import UserError
from gptjax.sweeps.definition import Sweep, Trial, as_override
from gptjax.sweeps.folder import SweepFolder

RENDERER = pathlib.Path(gptjax.__file__).parents[1] / "launch" / "render_jobset.py"


def manifests(sweep: Sweep, trials: Sequence[Trial], overrides: Sequence[str], workdir: str) -> str:
    """YAML documents for `kubectl apply -f -`, one for each trial that is not done.

    `workdir` is the sweep's folder as the pods see it, gs://BUCKET/FOLDER or under a volume. Where it is a folder here too, as on
    a machine that mounts the same volume, `gptjax status` follows the trials. Raises `UserError` with the renderer's sentence.
    """
    options = dict(sweep.jobset)
    name = options.pop("name", None)
    if not name:
        raise UserError("--where=jobset needs a name for its JobSets: Sweep(jobset={'name': ..., 'image': ..., ...}).")
    if not RENDERER.is_file():
        raise UserError(f"--where=jobset needs {RENDERER}, which lies in the repository and is not installed with the package.")
    missing = list(trials)
    here = pathlib.Path(workdir)
    if here.is_dir():
        folder = SweepFolder(here)
        trials = folder.settle_names(trials)
        folder.write_definition(trials, {"recipe": sweep.recipe, "jobs": len(trials), "where": "jobset"})
        missing = [trial for trial in trials if folder.observed(trial.name).status != "done"]
    rendered = []
    for trial in missing:
        own = [f"--name={name}-{trial.hash}", f"--workdir={workdir.rstrip('/')}/trials/{trial.name}", *_words(options)]
        rendered.append(_render([*own, "--", *_command(sweep, trial, overrides)]))
    return "---\n".join(rendered)


def _command(sweep: Sweep, trial: Trial, overrides: Sequence[str]) -> list[str]:
    """The trial in words, for a machine that has the recipe but not the sweep's folder."""
    laid = [as_override(key, value) for key, value in (dict(sweep.overrides) | trial.overrides).items()]
    return ["gptjax", "train", f"--config={sweep.recipe}", *(f"--config.{override}" for override in [*laid, *overrides])]


def _words(options: Mapping[str, Any]) -> list[str]:
    """{"gpus_per_node": 8, "env": ["A=1", "B=2"]} as --gpus-per-node=8 --env=A=1 --env=B=2."""
    words = []
    for key, value in options.items():
        values = value if isinstance(value, (list, tuple)) else [value]
        words += [f"--{key.replace('_', '-')}={item}" for item in values]
    return words


def _render(words: Sequence[str]) -> str:
    done = subprocess.run([sys.executable, str(RENDERER), *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise UserError(f"--where=jobset: {(done.stderr.strip() or 'the renderer failed').removeprefix('render_jobset.py: ')}")
    return done.stdout
