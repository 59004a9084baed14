"""Layers as a pipeline give the run that layers one after the other give."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from gptjax.parallel.pipeline import bubble_fraction
from tests.parallel.run_module import run_module


@pytest.fixture(scope="module")
def found() -> dict[str, Any]:
    return run_module("pipeline_devices")


def pairs(found: dict[str, Any]) -> Iterator[tuple[str, dict[str, Any], dict[str, Any]]]:
    """(name, run over stages, run of the same model on one device)"""
    for model, runs in found["runs"].items():
        for name, run in runs.items():
            if name != "one":
                yield f"{model}, {name}", run, runs["one"]


def test_initial_parameters_are_the_same_bits(found: dict[str, Any]) -> None:
    for name, run, one in pairs(found):
        assert run["init"] == one["init"], name
        assert (run["devices"], one["devices"]) == (8, 1), name


def test_each_device_holds_the_layers_of_its_stage(found: dict[str, Any]) -> None:
    assert [run["layers_per_device"] for _, run, _ in pairs(found)] == [1, 4, 2]


def test_results_gradients_and_sums_are_those_of_a_loop(found: dict[str, Any]) -> None:
    assert len(found["by hand"]) == 5
    for name, apart in found["by hand"].items():
        assert apart < 3e-6, f"{name}: {apart:.1e}"


def test_losses_and_gradients_agree_with_dropout_and_packed_rows(found: dict[str, Any]) -> None:
    """NaN in idle slots would show here, as would another dropout mask or a row that lost its positions or segments."""
    for name, run, one in pairs(found):
        np.testing.assert_allclose(run["loss"], one["loss"], rtol=1e-5, err_msg=name)
        assert run["gradients"].keys() == one["gradients"].keys()
        whole = np.sqrt(sum(np.square(leaf).sum() for leaf in one["gradients"].values()))
        for leaf, theirs in one["gradients"].items():
            apart = np.linalg.norm(np.subtract(run["gradients"][leaf], theirs))
            # The key's bias has no gradient but rounding, since softmax does not see it.
            size = np.linalg.norm(theirs) if "['key']['bias']" not in leaf else whole
            assert apart <= 1e-5 * size, f"{name}: {leaf} is {apart / size:.1e} apart"


def test_evaluation_and_generation_agree(found: dict[str, Any]) -> None:
    compared = [(run, one) for name, run, one in pairs(found) if name.startswith("gpt2")]
    assert len(compared) == 2
    for run, one in compared:
        np.testing.assert_allclose(run["row_nats"], one["row_nats"], rtol=1e-5)
        assert run["tokens"] == one["tokens"]


def test_activations_are_shifted_and_parameters_stay(found: dict[str, Any]) -> None:
    moved = {name: run["collectives"] for name, run, _ in pairs(found)}
    shifts = moved["gpt2, stage 8"]["collective-permute"]
    assert shifts and all(shape == [1, 2, 12, 16] for shape in shifts), "a micro-batch of one stage: 32 rows / 16, T 12, D 16"
    # Into the first stage and out of the last, 16 micro-batches at once; and scalars of the gradient's norm.
    others = [shape for kind, shapes in moved["gpt2, stage 8"].items() if kind != "collective-permute" for shape in shapes]
    assert [shape for shape in others if shape] == [[16, 2, 12, 16]] * 2
    # With fsdp parameters are gathered, but one layer's at a time; a stage has 4, the model 8.
    gathered = moved["gpt2, stage 2, data 2, fsdp 2"]["all-gather"]
    assert [1, 16, 64] in gathered and not any(shape[0] in (4, 8) for shape in gathered), gathered


def test_what_does_not_divide_is_refused(found: dict[str, Any]) -> None:
    layers, period, rows, rows_over_data, evaluation, no_pipeline = found["refused"]
    assert "model.num_layers=3 does not divide over mesh.stage=2" in layers
    assert "mesh.stage=2 leaves 1 layers a stage, not whole repetitions of the 2 of model.attention_pattern" in period
    over = "does not divide over mesh.data * mesh.fsdp * mesh.expert * mesh.micro_batches"
    assert f"data.batch_size / train.accumulation_steps=8 {over}=3" in rows
    assert f"data.batch_size / train.accumulation_steps=4 {over}=8" in rows_over_data
    assert f"evaluate.batch_size=6 {over}=4" in evaluation
    assert no_pipeline == ""


@pytest.mark.parametrize(("stages", "micro_batches", "repeats"), [(1, 4, 1), (4, 4, 1), (4, 16, 1), (8, 1, 1), (4, 8, 3)])
def test_bubble_fraction_counts_idle_ticks(stages: int, micro_batches: int, repeats: int) -> None:
    """Against a schedule played through: each stage takes what the one before it has done, later rounds first."""
    done = np.zeros((micro_batches, repeats * stages + 1), bool)
    done[:, 0] = True
    ticks = 0
    while not done.all():
        before = done.copy()
        for stage in range(stages):
            works = [r * stages + stage for r in reversed(range(repeats))]
            ready = [(m, w) for w in works for m in range(micro_batches) if before[m, w] and not before[m, w + 1]]
            if ready:
                done[ready[0][0], ready[0][1] + 1] = True
        ticks += 1
    idle = 1 - micro_batches * repeats / ticks
    assert bubble_fraction(stages, micro_batches, repeats) == pytest.approx(idle, abs=1e-12)
