"""Generation under meshes of eight devices."""

from __future__ import annotations

from tests.parallel.run_module import run_module


def test_a_mesh_changes_no_id_and_shares_out_the_cache() -> None:
    found = run_module("generate_devices")
    assert found["tensor"] == found["alone"]
    assert found["others"] == found["alone"]
    # Three rows become four, over data * fsdp = 4; two key heads over tensor = 2.
    assert found["tensor cache"] == [[2, 4, 128, 2, 4], [2, 1, 128, 1, 4]]
    assert found["others cache"] == [[2, 3, 128, 2, 4], [2, 3, 128, 1, 4]]
