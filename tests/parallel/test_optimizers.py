"""One device and eight give the same updates, by the rules whose state or estimate has a layout of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from tests.parallel.run_module import run_module


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return run_module("optimizer_devices")


@pytest.mark.parametrize(("name", "atol"), [("soap", 1e-5), ("sophia", 2e-6), ("prodigy", 2e-6), ("ademamix", 2e-6)])
def test_eight_devices_update_as_one(found: dict[str, Any], name: str, atol: float) -> None:
    """With steps of about 0.01."""
    one, eight = (found[name][mesh]["params"] for mesh in ("one", "eight"))
    assert one.keys() == eight.keys()
    for path in one:
        np.testing.assert_allclose(eight[path], one[path], rtol=1e-6, atol=atol, err_msg=path)


def test_layers_factors_are_shared_out(found: dict[str, Any]) -> None:
    """Averages of gradients lie as the parameter (fsdp and tensor); of factors and bases each device has its own layers."""
    assert found["soap"]["eight"]["layout"] == {
        "mu": [[2, 16, 32], [2, 8, 16]],
        "left": [[2, 16, 16], [1, 16, 16]],
        "right_basis": [[2, 32, 32], [1, 32, 32]],
    }
