"""Latent attention under a mesh of eight devices."""

from __future__ import annotations

import numpy as np

from tests.parallel.run_module import run_module


def test_a_mesh_changes_nothing_and_shares_out_heads() -> None:
    found = run_module("latent_devices")
    one, tensor = found["one"], found["tensor"]
    assert tensor["init"] == one["init"] and tensor["tokens"] == one["tokens"]
    np.testing.assert_allclose(tensor["loss"], one["loss"], rtol=1e-5)
    for ours, theirs in zip(tensor["log_probs"], one["log_probs"], strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    # Two of four heads; one of four rows, whose latents serve all heads.
    assert tensor["shapes"] == [[1, 10, 2, 6], [1, 1, 128, 1, 14]]
