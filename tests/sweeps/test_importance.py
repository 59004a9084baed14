"""What is read out of a search: shares against the variance worked out by hand, contours against the function, files."""

from __future__ import annotations

import csv
import dataclasses
import json
import math
import pathlib

import numpy as np
import pytest

from gptjax import cli
from gptjax.config import UserError
from gptjax.sweeps.importance import importances, read_search, surface
from gptjax.sweeps.search import Search
from gptjax.sweeps.space import choice, integers, log_uniform
from gptjax.sweeps.study import Study

SPACE = {
    "optimizer.learning_rate": log_uniform(1e-4, 1.0),
    "model.activation": choice(["gelu", "relu"]),
    "model.num_layers": integers(1, 5),
}


def height(rate: float, activation: str, layers: int) -> float:
    """Additive: the variance over the space is the sum of the knobs' own."""
    return math.log10(rate) + (activation == "relu") + 0.2 * layers


# log10 of the rate is uniform over 4 decades, a choice is a coin, layers are 1 to 5
VARIANCES = {"optimizer.learning_rate": 4**2 / 12, "model.activation": 1 / 4, "model.num_layers": 0.2**2 * 2}


@pytest.fixture
def folder(tmp_path: pathlib.Path) -> pathlib.Path:
    from optuna.trial import TrialState

    study = Study(tmp_path, Search(60, "random", seed=7), SPACE)
    while (trial := study.ask()) is not None:
        if trial.number % 20 == 19:
            study.tell(trial.number, TrialState.FAIL, why="crash: it did")
        else:
            study.tell(trial.number, TrialState.COMPLETE, height(*trial.params.values()))
    search = {"metric": "eval/loss", "maximize": False, "limit": 60, "suggested": 60, "refused": [], "sampler": "random"}
    (tmp_path / "sweep.json").write_text(json.dumps({"trials": [], "jobs": 1, "search": search}))
    return tmp_path


def test_importance_is_each_knobs_share_of_the_variance(folder):
    from optuna.trial import create_trial

    searched, rng = read_search(folder), np.random.default_rng(0)
    points = [{key: distribution.draw(rng) for key, distribution in SPACE.items()} for _ in range(400)]
    ranges = {axis.key: axis.distribution for axis in searched.axes}
    trials = [create_trial(value=height(*point.values()), params=point, distributions=ranges) for point in points]
    shares = importances(dataclasses.replace(searched, trials=tuple(trials)))
    total = sum(VARIANCES.values())
    assert list(shares) == sorted(VARIANCES, key=lambda key: -VARIANCES[key])
    assert sum(shares.values()) == pytest.approx(1)
    for key, variance in VARIANCES.items():
        assert shares[key] == pytest.approx(variance / total, abs=0.07), "a forest on 400 points"


def test_the_surface_is_the_functions_between_the_trials(folder):
    searched = read_search(folder)
    axes = {axis.key: axis for axis in searched.axes}
    x, y = axes["optimizer.learning_rate"], axes["model.num_layers"]
    only = [trial for trial in searched.trials if trial.params["model.activation"] == "gelu"]  # a plane, then
    searched = dataclasses.replace(searched, trials=tuple(only))
    across, up, metric = surface(searched, x, y)
    expected = np.log10([x.value(unit) for unit in across])[None] + 0.2 * np.array([y.value(unit) for unit in up])[:, None]
    inside = np.isfinite(metric)
    assert inside.mean() > 0.5
    np.testing.assert_allclose(metric[inside], expected[inside], atol=1e-9)


def test_the_verb_writes_figures_and_their_numbers(folder, capsys, tmp_path):
    output = tmp_path / "figures"
    assert cli.main(["importance", str(folder), f"--output={output}"]) == 0
    said = capsys.readouterr()
    assert said.out.splitlines()[1].split()[0] == "optimizer.learning_rate" and "57 finished trials" in said.out
    for name in ("importance.png", "contour.png", "history.png"):
        assert (output / name).read_bytes().startswith(b"\x89PNG")
    rows = list(csv.DictReader((output / "trials.csv").read_text().splitlines()))
    assert len(rows) == 60 and [row["state"] for row in rows].count("fail") == 3
    first = rows[0]
    point = float(first["optimizer.learning_rate"]), first["model.activation"], int(first["model.num_layers"])
    assert float(first["eval/loss"]) == height(*point)
    shares = {
        row["key"]: float(row["importance"]) for row in csv.DictReader((output / "importance.csv").read_text().splitlines())
    }
    assert shares == importances(read_search(folder))
    pairs = {(row["x"], row["y"]) for row in csv.DictReader((output / "contour.csv").read_text().splitlines())}
    assert len(pairs) == 3


def test_a_folder_that_says_nothing_is_refused(tmp_path):
    (tmp_path / "sweep.json").write_text(json.dumps({"trials": [], "jobs": 1}))
    with pytest.raises(UserError, match="the folder of a sweep that was no search"):
        read_search(tmp_path)
    (tmp_path / "sweep.json").write_text(
        json.dumps({"trials": [], "jobs": 1, "search": {"metric": "eval/loss", "maximize": False}})
    )
    Study(tmp_path, Search(3, "random"), SPACE).ask()
    with pytest.raises(UserError, match="has 0 finished trials; importance needs at least 4"):
        read_search(tmp_path)
