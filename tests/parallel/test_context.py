"""A sequence that devices share out gives what one device gives, with no square of its length held and equal work for all."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from gptjax.model.context import block_size, visits
from tests.parallel.run_module import run_module


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return run_module("context_devices")


def test_losses_and_gradients_equal_those_of_one_device(found: dict[str, Any]) -> None:
    """Packed rows, dropout on the attention weights included; a leaf such as a key's bias has only rounding for a gradient."""
    for name, (one, *others) in found["runs"].items():
        largest = max(np.abs(leaf).max() for leaf in one["gradients"].values())
        assert len(one["loss"]) == (1 if "additive" in name else 4)
        for number, run in enumerate(others):
            np.testing.assert_allclose(run["loss"], one["loss"][: len(run["loss"])], rtol=1e-5, err_msg=f"{name} {number}")
            for leaf, ours in run["gradients"].items():
                theirs = np.asarray(one["gradients"][leaf])
                bound = 1e-5 * np.abs(theirs).max() + 1e-7 * largest
                np.testing.assert_allclose(ours, theirs, rtol=0, atol=bound, err_msg=f"{name} {number} {leaf}")


def test_rows_evaluate_to_the_same_nats(found: dict[str, Any]) -> None:
    one, other = found["runs"]["learned positions"]
    np.testing.assert_allclose(other["rows"], one["rows"], rtol=1e-5)


def test_splash_agrees_with_dense_wherever_its_parts_lie(found: dict[str, Any]) -> None:
    assert set(found["splash"]) == {"shared out", "by device"}
    assert max(found["splash"].values()) < 2e-6


def test_scores_sinks_and_prefixes_equal_dense_on_one_device(found: dict[str, Any]) -> None:
    """Gradients of what is learned included, each device having those of its own queries."""
    assert set(found["distances"]) == {"additive, prefix", "dot, first tokens"}
    assert max(found["distances"].values()) < 5e-6


def test_keys_are_gathered_queries_permuted_and_no_square_is_held(found: dict[str, Any]) -> None:
    compiled = found["compiled"]
    assert compiled["squares"] == []
    # Whole keys or values are 1024 x 64 floats; a block of scores is 2 x 128 x 128.
    assert compiled["largest"] <= 1024 * 64
    assert compiled["all-gather"] >= 1 and compiled["reduce-scatter"] >= 1
    assert compiled["collective-permute"] >= 4  # two halves of the queries there, and of the results back


def test_gathered_keys_are_not_kept_for_the_backward_pass(found: dict[str, Any]) -> None:
    """Of 1024 places, 2 query heads and 1 key head of 64: gathered keys on 4 devices are twice the queries."""
    assert found["compiled"]["kept"] == found["splash compiled"]["kept"] == 1024 * 2 * 64


def test_what_cannot_be_shared_out_is_refused(found: dict[str, Any]) -> None:
    length, dense, xla, two_axes, heads, fits = found["refused"]
    assert "data.seq_len=24 does not divide over 2 * mesh.context=16" in length
    assert "model.attention=dense cannot do mesh.context=2; blockwise and splash can" in dense
    assert "model.attention=xla cannot do mesh.context=2" in xla
    assert "lay 'length' over context and tensor" in two_axes
    assert "'heads' and 'kv_heads' over different axes" in heads
    assert fits == ""


# --- balance ---------------------------------------------


def seen_blocks(parts: int, length: int, size: int, window: int) -> list[int]:
    """For each device the blocks of its queries' scores that a query may see anything of, counted from the mask itself."""
    place = np.arange(length)
    before = place[:, None] - place
    mask = (before >= 0) & ((before < window) if window else True)
    blocks = mask.reshape(length // size, size, length // size, size).any((1, 3)).sum(1)
    chunks = blocks.reshape(2 * parts, -1).sum(1)
    return [int(chunks[r] + chunks[2 * parts - 1 - r]) for r in range(parts)]


@pytest.mark.parametrize(("parts", "length", "size"), [(2, 64, 4), (3, 96, 16), (4, 64, 8), (8, 512, 16)])
@pytest.mark.parametrize("window", [0, 9, 40])
def test_devices_visit_all_that_is_seen_and_equally_much(parts: int, length: int, size: int, window: int) -> None:
    first, number = visits(parts, length, size, window)
    work = number.sum(1).tolist()
    assert work == seen_blocks(parts, length, size, window)
    if not window:
        blocks = length // size
        assert work == [blocks * (blocks + 1) // 2 // parts] * parts
    else:  # only the row's beginning, which has less than a window before it, is cheaper
        assert max(work) - min(work) <= ((window + size - 2) // size + 1) ** 2
        assert work[1:] == [max(work)] * (parts - 1) or window > length // (2 * parts)


def test_blocks_divide_a_chunk() -> None:
    assert [block_size(chunk) for chunk in (1, 6, 512, 768, 1024, 1026)] == [1, 6, 512, 384, 512, 342]
