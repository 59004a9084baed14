"""`gptjax coordinates`: slopes, what is judged, table and files; model/test_parameterization.py tests what it measures."""

from __future__ import annotations

import csv
import json
import math
import pathlib
from typing import Any

import numpy as np
import pytest

from gptjax.cli import main
from gptjax.config import UserError
from gptjax.train.coordinates import slope, slopes
from gptjax.train.restore import _check_multipliers
from gptjax.verbs.coordinates import _write, describe
from tests.small import small

WIDTHS = (16, 64, 256)


def measured(exponents: dict[str, float]) -> Any:
    """Two seeds and two steps at each width, of which the second seed's values are 4 times as large."""

    def of(width: int, seed: int) -> list[dict[str, dict[str, float]]]:
        values = {name: 4.0**seed * width**exponent for name, exponent in exponents.items()}
        return [{"scale": values}, {"scale": values, "change": values}, {"scale": values, "change": values}]

    return [[of(width, seed) for seed in range(2)] for width in WIDTHS]


def test_a_power_of_the_width_has_that_slope_and_zeros_have_none() -> None:
    assert slope(WIDTHS, [3 * width**0.25 for width in WIDTHS]) == pytest.approx(0.25)
    assert math.isnan(slope(WIDTHS, [1.0, 0.0, 1.0])) and math.isnan(slope(WIDTHS, [1.0, math.inf, 1.0]))
    lines = slopes(WIDTHS, measured({"residual.0": 0.09}))
    assert [line.slope for line in lines] == pytest.approx([0.09] * 5) and all(line.passes and line.judged for line in lines)
    np.testing.assert_allclose(lines[0].values, [2 * width**0.09 for width in WIDTHS])  # sqrt(1 * 4), the geometric mean


def test_what_is_judged() -> None:
    """Not the scale of logits, nor their first change, nor the change of scores: these shrink with the width by design."""
    lines = slopes(WIDTHS, measured({"logits": -0.5, "scores.0": -0.5, "mlp.0": -0.5}))
    judged = {(line.quantity, line.measure, line.step) for line in lines if line.judged}
    scales = {(name, "scale", step) for name in ("scores.0", "mlp.0") for step in range(3)}
    assert judged == scales | {("mlp.0", "change", 1), ("mlp.0", "change", 2), ("logits", "change", 2)}


def test_table_verdict_and_files(tmp_path: pathlib.Path) -> None:
    lines = slopes(WIDTHS, measured({"mlp.0": 0.5, "embedding": 0.0}))
    text = describe(lines, WIDTHS, 0.1)
    assert text.splitlines()[-1].startswith(
        "fail: 5 of 10 slopes over widths 16, 64, 256 beyond +-0.1: mlp.0 (scale, step 0) +0.500"
    )
    assert "mlp.0       scale   +0.500*  +0.500*  +0.500*" in text
    flat = describe(slopes(WIDTHS, measured({"embedding": 0.05})), WIDTHS, 0.1)
    assert flat.splitlines()[-1].startswith("pass: 5 slopes over widths 16, 64, 256 within +-0.1; the steepest is embedding")
    assert "nan" in describe(slopes(WIDTHS, measured({"mlp.0": -2000.0})), WIDTHS, 0.1)  # all values are 0

    pytest.importorskip("matplotlib")
    _write(tmp_path / "new", {"widths": WIDTHS, "passes": False}, lines)
    with open(tmp_path / "new" / "coordinates.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == len(lines) and float(rows[0]["slope"]) == pytest.approx(lines[0].slope)
    assert json.loads((tmp_path / "new" / "coordinates.json").read_text())["passes"] is False
    assert (tmp_path / "new" / "coordinates.png").read_bytes().startswith(b"\x89PNG")


def test_mistakes_are_one_sentence(capsys: pytest.CaptureFixture[str]) -> None:
    recipe = str(pathlib.Path(__file__).parents[1] / "configs" / "shakespeare_char.py") + ":cpu"
    assert main(["coordinates", recipe, "--widths=64"]) == 2
    assert "at least two widths" in capsys.readouterr().err
    assert main(["coordinates", recipe, "--widths=64,80"]) == 2
    assert "at width 80 model.num_heads would be 2.5" in capsys.readouterr().err


def test_parameters_of_another_parameterization_are_not_started_from(tmp_path: pathlib.Path) -> None:
    mup = small(model__parameterization="mup", model__mup_base_dim=4).model
    base = small(model__parameterization="mup", model__mup_base_dim=16).model
    _check_multipliers(tmp_path, mup, mup)
    _check_multipliers(tmp_path, small().model, base)  # the same at the base width
    with pytest.raises(UserError, match=r"was trained with model.parameterization=standard, .* model.mup_base_dim=4"):
        _check_multipliers(tmp_path, small().model, mup)
