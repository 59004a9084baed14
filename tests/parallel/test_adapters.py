"""Adapters under meshes of eight devices."""

from __future__ import annotations

import numpy as np

from tests.parallel.run_module import run_module


def test_a_mesh_changes_nothing_and_shares_adapters_out_as_kernels() -> None:
    found = run_module("adapter_devices")
    for name, by_mesh in found.items():
        one, eight = by_mesh["one"], by_mesh["eight"]
        if name != "int8":  # of which magnitudes are sums
            assert eight["init"] == one["init"], name
        np.testing.assert_allclose(eight["loss"], one["loss"], rtol=2e-5, err_msg=name)
    of_lora, of_int8 = found["lora"]["eight"]["shapes"], found["int8"]["eight"]["shapes"]
    assert of_lora["layers/attention/lora_a"] == [2, 8, 3]  # 16 wide, over fsdp
    assert of_lora["layers/attention/query/lora_b"] == [2, 3, 2, 4]  # 4 heads, over tensor
    assert of_int8["layers/attention/output/lora_a"] == [1, 2, 4, 2]  # a stage's layer, its half of the heads
    assert of_int8["layers/mlp/up/magnitude"] == [1, 12]
