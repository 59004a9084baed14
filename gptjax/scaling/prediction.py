"""A held-out run's loss, written down before the run is trained, and looked at again after it.

In a family's folder:
    plan.json                 what `gptjax scaling run` planned; the held-out run is known by its hash
    predictions/HASH.json     written once the family's runs are done, and never again after the held-out run has been started
"""

from __future__ import annotations

import json
import pathlib
import time
from typing import Any

import numpy as np

from gptjax.config import UserError
from gptjax.scaling.family import Plan, Planned
from gptjax.scaling.laws import Fits
from gptjax.sweeps.definition import Trial
from gptjax.sweeps.folder import SweepFolder
from gptjax.train.run import read_result, write_json

PLAN, FOLDER = "plan.json", "predictions"


def write_plan(folder: SweepFolder, plan: Plan, trial: Trial | None, spec: str) -> None:
    """`plan.json`. `trial` is the held-out one's."""
    held_out = None
    if plan.held_out is not None and trial is not None:
        held_out = {"name": trial.name, "hash": trial.hash} | describe(plan.held_out)
    about = {"family": spec, "runs": len(plan.runs), "left_out": plan.left_out, "held_out": held_out}
    write_json(folder.path / PLAN, about)


def describe(run: Planned) -> dict[str, Any]:
    return {
        "parameters": run.counted.total,
        "non_embedding": run.counted.non_embedding,
        "tokens": run.tokens,
        "steps": run.steps,
        "flops": run.flops,
        "epochs": round(run.epochs, 4),
        "learning_rate": run.rate,
        "overrides": run.point,
    }


def read_plan(path: pathlib.Path) -> dict[str, Any]:
    """Raises `UserError` where there is none."""
    try:
        return json.loads((path / PLAN).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is not the folder of `gptjax scaling run`: it has no {PLAN}.") from None
    except ValueError as error:
        raise UserError(f"{path / PLAN} is not valid JSON: {error}.") from None


def held_out_hashes(path: pathlib.Path) -> set[str]:
    """Of all runs that are, or were, to be predicted: no fit may see them."""
    hashes = {file.stem for file in (path / FOLDER).glob("*.json")}
    if (path / PLAN).exists():
        held_out = read_plan(path)["held_out"]
        hashes |= {held_out["hash"]} if held_out else set()
    return hashes


def read_prediction(path: pathlib.Path, digest: str) -> dict[str, Any] | None:
    file = path / FOLDER / f"{digest}.json"
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValueError as error:
        raise UserError(f"{file} is not valid JSON: {error}.") from None


def predict_held_out(path: pathlib.Path, fits: Fits) -> dict[str, Any]:
    """The prediction of the plan's held-out run, written down. The one that stands is returned where that run has been started.

    Raises `UserError` where there is no such run, or it was started before anything was predicted.
    """
    plan = read_plan(path)
    held_out = plan["held_out"]
    if not held_out:
        raise UserError(
            f"the family {plan['family']} has no held_out run to predict; --parameters and --tokens predict any other."
        )
    digest = held_out["hash"]
    standing = read_prediction(path, digest)
    if _was_started(path, held_out["name"]):
        if standing is None:
            raise UserError(
                f"the held-out run {held_out['name']} was started before its loss was predicted: none made now would be one."
            )
        return standing
    losses = {
        f"{name}, {count}": _estimate(
            fits, name, count, held_out["parameters" if count == "total" else count], held_out["tokens"]
        )
        for name, count in fits.laws
    }
    prediction = {
        "held_out": held_out,
        "made": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
        "law": f"{fits.main.name}, {fits.main.count}",
        "confidence": fits.options.confidence,
        "resamples": fits.options.resamples,
        "losses": losses,
        "fitted_to": list(fits.observations.names),
    }
    (path / FOLDER).mkdir(exist_ok=True)
    write_json(path / FOLDER / f"{digest}.json", prediction)
    return prediction


def _estimate(fits: Fits, name: str, count: str, size: float, tokens: float) -> dict[str, float]:
    (found,) = fits.laws[name, count].predict(np.array([float(size)]), np.array([float(tokens)]), fits.options)
    return {"loss": found.value, "low": found.low, "high": found.high}


def _was_started(path: pathlib.Path, name: str) -> bool:
    folder = SweepFolder(path)
    return folder.trial(name).is_dir() and folder.observed(name).status not in ("waiting", "queued")


def outcome(path: pathlib.Path, prediction: dict[str, Any]) -> dict[str, Any] | None:
    """{"loss", "error", "inside", "errors"} of the held-out run against its prediction; None while it has not finished.

    `error` is measured / predicted - 1 of the law that was said to predict, `errors` that of each.
    """
    result = read_result(path / "trials" / prediction["held_out"]["name"])
    if result is None:
        return None
    loss, main = result["eval"]["loss"], prediction["losses"][prediction["law"]]
    return {
        "loss": loss,
        "error": loss / main["loss"] - 1,
        "inside": main["low"] <= loss <= main["high"],
        "errors": {law: loss / found["loss"] - 1 for law, found in prediction["losses"].items()},
    }
