"""One device and eight give the same run."""

from __future__ import annotations

import json
import os
import pathlib
import subprocess
import sys
from typing import Any

import numpy as np
import pytest

ROOT = pathlib.Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-m", "tests.parallel.eight_devices"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_initial_parameters_are_the_same_bits(found: dict[str, Any]) -> None:
    assert found["one"]["init"] == found["eight"]["init"]
    assert (found["one"]["devices"], found["eight"]["devices"]) == (1, 8)


def test_steps_agree_within_rounding_with_dropout_on(found: dict[str, Any]) -> None:
    """Sums over rows in another order; another dropout mask would move the loss by percents."""
    for name in ("loss", "gradient_norm"):
        np.testing.assert_allclose(found["eight"][name], found["one"][name], rtol=2e-5)
    for eight, one in zip(found["eight"]["params"], found["one"]["params"], strict=True):
        np.testing.assert_allclose(eight, one, rtol=1e-4, atol=1e-5)
    assert found["one"]["compilations"] == found["eight"]["compilations"] == 1


def test_rows_that_do_not_divide_and_missing_devices_are_refused(found: dict[str, Any]) -> None:
    twelve, nine, four = found["refused"]
    assert "12 rows" in twelve and "mesh.data=8" in twelve
    assert "mesh.data=9 needs 9 devices, but there are 8" in nine
    assert four == ""
