"""Shares of the variance: against ordinary least squares and scipy, and what is said where knobs can't be told apart."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
from scipy import stats

from gptjax import config as config_lib
from gptjax.report.build import Wanted, build
from gptjax.report.importance import QUANTILES, entangled, explained, importances, swept_keys
from gptjax.report.sources import find_sources
from gptjax.sweeps.compare import compare
from gptjax.sweeps.groups import SEED, group_runs, read_runs


def write_run(folder: pathlib.Path, loss: float, seed: int, **knobs: object) -> str:
    """`knobs` by dotted key with __ for the dot."""
    values = config_lib.defaults()
    values.train.duration_steps = 40
    values.train.seed = seed
    for key, value in knobs.items():
        group, name = key.split("__")
        values[group][name] = value
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(config_lib.to_json(config_lib.from_dict(values).with_vocab_size(65)))
    (folder / "result.json").write_text(json.dumps({"eval": {"loss": loss}}))
    return str(folder)


def report_of(folders: list[str]):
    return compare(group_runs(read_runs(folders)))


def adjusted_r_squared(places: np.ndarray, values: np.ndarray) -> float:
    """Of the least squares fit on an indicator for each level, by its definition."""
    matrix = np.stack([places == place for place in np.unique(places)], axis=1).astype(np.float64)
    rest = values - matrix @ np.linalg.lstsq(matrix, values, rcond=None)[0]
    n, k = matrix.shape
    return 1 - (rest @ rest / (n - k)) / (np.var(values) * n / (n - 1))


@pytest.mark.parametrize("sizes", [(3, 3, 3), (2, 5), (1, 1, 4, 6)])
def test_shares_are_adjusted_r_squared_and_p_is_the_f_tests(sizes):
    draw = np.random.default_rng(len(sizes))
    places = np.repeat(np.arange(len(sizes)), sizes)
    values = draw.normal(size=places.size) + 1.5 * places
    share, p = explained(places, values)
    assert share == pytest.approx(adjusted_r_squared(places, values), rel=1e-12)
    assert p == pytest.approx(stats.f_oneway(*(values[places == place] for place in range(len(sizes)))).pvalue, rel=1e-9)


def test_what_explains_nothing_has_a_small_share_whatever_its_number_of_values():
    draw = np.random.default_rng(0)
    places = np.repeat(np.arange(6), 2)  # the unadjusted share would be 5 / 11 on average
    found = [explained(places, draw.normal(size=12)) for _ in range(400)]
    assert np.mean([share for share, _ in found]) < 0.16
    assert 0.02 < np.mean([p < 0.05 for _, p in found]) < 0.08
    assert explained(np.arange(4), np.arange(4.0)) == (None, None)
    assert explained(np.array([0, 0, 1, 1]), np.ones(4)) == (0.0, 1.0)


def test_the_knob_that_matters_comes_first_and_the_seed_is_there_to_compare_with(tmp_path):
    draw = np.random.default_rng(1)
    folders = []
    for rate in (1e-3, 2e-3):
        for layers in (1, 2, 3):
            for seed in range(3):
                loss = 2.0 - 0.1 * layers + 0.01 * float(draw.normal())
                name = f"{rate}-{layers}-{seed}"
                folders.append(write_run(tmp_path / name, loss, seed, model__num_layers=layers, optimizer__learning_rate=rate))
    report = report_of(folders)
    found = importances(report)
    assert [one.keys for one in found][0] == ("model.num_layers",) and found[0].share > 0.9 and found[0].p_holm < 1e-6
    assert {one.keys[0] for one in found[1:]} == {"optimizer.learning_rate", SEED} and max(one.share for one in found[1:]) < 0.2
    assert [level.text for level in found[0].levels] == ["1", "2", "3"] and [len(level.values) for level in found[0].levels] == [
        6
    ] * 3
    assert entangled(report) == []


def test_knobs_that_change_together_are_one_and_knobs_half_crossed_are_named(tmp_path):
    points = [("gelu", False, 512), ("silu", True, 341), ("gelu", False, 512), ("relu", False, 512)]
    folders = [
        write_run(
            tmp_path / f"{number}-{seed}",
            1.8 + 0.1 * gated + 0.01 * seed + 0.001 * number,
            seed,
            model__activation=activation,
            model__gated_mlp=gated,
            model__mlp_dim=size,
            optimizer__beta2=0.9 + 0.02 * number,
        )
        for number, (activation, gated, size) in enumerate(points)
        for seed in range(2)
    ]
    report = report_of(folders)
    found = {one.keys: one for one in importances(report)}
    together = found["model.mlp_dim", "model.gated_mlp"]
    # Each size stands beside its own gate, though sizes are in order of size and gates in that of appearance.
    assert {level.text: len(level.values) for level in together.levels} == {"512, False": 6, "341, True": 2}
    assert ("model.activation", "optimizer.beta2") in entangled(report)
    page = str(build(find_sources(folders), Wanted(), lambda config: None).page)
    assert "Knobs joined by + always change together" in page
    assert "Not every value meets every other as often" in page and "model.mlp_dim and model.gated_mlp" not in page


def test_many_numbers_are_put_into_bins(tmp_path):
    rates = np.geomspace(1e-4, 1e-1, 16)
    folders = [
        write_run(tmp_path / str(i), float((np.log10(rate) + 2.5) ** 2), 0, optimizer__learning_rate=float(rate))
        for i, rate in enumerate(rates)
    ]
    (one,) = importances(report_of(folders))
    assert [len(level.values) for level in one.levels] == [4] * QUANTILES and one.share > 0.5
    assert one.levels[0].text.startswith("0.0001 to ") and one.levels[-1].text.endswith(" to 0.1")


def test_nothing_swept_or_too_few_runs(tmp_path):
    folders = [write_run(tmp_path / str(seed), 1.8, seed) for seed in range(3)]
    assert importances(report_of(folders)) == [] and swept_keys(read_runs(folders)) == []
    two = [write_run(tmp_path / f"r{n}", 1.8 + n, 0, optimizer__learning_rate=1e-3 * (n + 2)) for n in range(2)]
    assert importances(report_of(two)) == []
