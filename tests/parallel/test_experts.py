"""The mixture of experts is the same on one device and on eight, however they are arranged."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.parallel.run_module import run_module


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return run_module("expert_devices")


@pytest.mark.parametrize("form", ["capacity", "dropless"])
def test_the_same_run_on_any_mesh(found: dict[str, Any], form: str) -> None:
    one = found["runs"][form]["one"]
    assert (sum(row["moe/dropped"] for row in one["rows"]) > 0) == (form == "capacity")
    for mesh, run in found["runs"][form].items():
        assert run["init"] == one["init"], mesh
        assert run["gradient_off"] < 1e-5, mesh
        for ours, theirs in zip(run["rows"], one["rows"], strict=True):
            for name in ("loss", "moe/load_balance", "moe/router_z"):
                np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-5, err_msg=f"{mesh} {name}")
            for name in ("moe/dropped", "moe/busiest", "moe/dropped_fraction"):
                np.testing.assert_allclose(ours[name], theirs[name], rtol=1e-6, err_msg=f"{mesh} {name}")


@pytest.mark.parametrize("form", ["capacity", "dropless"])
def test_tokens_go_to_shared_out_experts_by_all_to_all(found: dict[str, Any], form: str) -> None:
    parts = {"one": 1, "fsdp, expert, tensor": 2, "data, expert, context": 2}
    for mesh, run in found["runs"][form].items():
        assert run["experts_here"] == 8 // parts[mesh], mesh
        if mesh == "one":
            assert run["all_to_alls"] == 0
        else:  # there and back, forward and backward
            assert run["all_to_alls"] >= 4, mesh


def test_parameters_on_a_mesh_generate_the_same(found: dict[str, Any]) -> None:
    one, eight = found["samples"]
    assert one == eight and [len(row) for row in one] == [4, 4]


def test_refused(found: dict[str, Any]) -> None:
    dense, experts, width = found["refused"]
    assert "mesh.expert=2, but the model has no experts" in dense
    assert "model.num_experts=6 does not divide over mesh.expert=4" in experts
    assert "model.expert_mlp_dim=6 does not divide over mesh.tensor=4" in width
