"""One device and eight, however they are arranged, give the same run."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.parallel.run_module import run_module


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return run_module("eight_devices")


def test_initial_parameters_are_the_same_bits(found: dict[str, Any]) -> None:
    one = found["meshes"]["one"]
    for name, run in found["meshes"].items():
        assert run["init"] == one["init"], name
        assert run["devices"] == (1 if name == "one" else 8), name


def test_parameters_are_shared_out(found: dict[str, Any]) -> None:
    held = {name: run["bytes"] for name, run in found["meshes"].items()}
    assert held["data"] == held["one"]
    # Some vectors are split by fsdp alone, some by tensor alone.
    for mesh in ("fsdp", "tensor", "fsdp and tensor"):
        assert held["one"] / 8 < held[mesh] < held["one"] / 5
    assert held["fsdp and tensor"] < held["data, fsdp, tensor"] < held["one"] / 3


def test_steps_agree_within_rounding_with_dropout_on(found: dict[str, Any]) -> None:
    """Sums in another order; another dropout mask would move the loss by percents."""
    one = found["meshes"]["one"]
    for mesh, run in found["meshes"].items():
        for name in ("loss", "gradient_norm"):
            np.testing.assert_allclose(run[name], one[name], rtol=2e-5, err_msg=mesh)
        for ours, theirs in zip(run["params"], one["params"], strict=True):
            np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5, err_msg=mesh)
        assert run["compilations"] == 1, mesh


def test_an_objective_that_sees_both_ways_agrees_over_meshes_and_stages(found: dict[str, Any]) -> None:
    one = found["objective"]["one"]
    assert one[0] > 1
    for mesh, values in found["objective"].items():
        np.testing.assert_allclose(values, one, rtol=2e-5, err_msg=mesh)


def test_what_does_not_divide_and_missing_devices_are_refused(found: dict[str, Any]) -> None:
    rows, nine, fits, heads, twelve, three, length = found["refused"]
    assert "=12 does not divide over mesh.data * mesh.fsdp * mesh.expert=8" in rows
    assert "mesh.data=9 needs 9 devices, but there are 8" in nine
    assert fits == ""
    assert "model.num_heads=4 does not divide over mesh.tensor=8" in heads
    assert "mesh.fsdp=3, mesh.tensor=4 needs 12 devices, but there are 8" in twelve
    assert "mesh.fsdp=3 takes devices by 3, which does not divide the 8" in three
    assert "data.seq_len=12 does not divide over 2 * mesh.context=16" in length
