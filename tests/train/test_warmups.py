"""Warm-ups of batch size and sequence length: no row is lost, tokens are counted, and a resumed run is the undisturbed one."""

from __future__ import annotations

import collections
import dataclasses
import math
import pathlib
import signal
from typing import Any

import numpy as np
import pytest

from gptjax.config import Config, UserError
from gptjax.data.packing import pack, shortened
from gptjax.data.pipeline import batch_documents, load_dataset, train_batches
from gptjax.train import loop
from gptjax.train.feed import check_steps_divide
from gptjax.train.metrics import read_metrics
from gptjax.train.objectives import causal
from gptjax.train.optimizers import Lengths
from tests.small import small
from tests.train.test_loop import rows_without_clock, stop_after, text_file, tiny  # noqa: F401 (a fixture)

RAMPS: dict[str, dict[str, Any]] = {
    "none": {},
    "batch": {"train.batch_warmup_start": 2, "train.batch_warmup_steps": 7},
    "length": {"train.seq_len_warmup_start": 3, "train.seq_len_warmup_tokens": 500},
    "both": {
        "train.batch_warmup_start": 1,
        "train.batch_warmup_tokens": 700,
        "train.seq_len_warmup_start": 6,
        "train.seq_len_warmup_epochs": 0.8,
    },
}


@pytest.mark.parametrize("name", RAMPS)
def test_counts_are_prefix_sums(name: str) -> None:
    """Rows, their inverse and intervals, against sums over the steps one by one."""
    config = small(RAMPS[name], evaluate__every_tokens=8 * 12 * 3 - 5)  # 8 rows of 12 tokens: every 3 full batches
    stages = config.stages(10.0)
    sizes = [stages.at(step).batch_size for step in range(60)]
    rows = np.cumsum([0, *sizes])
    assert [stages.rows(step) for step in range(61)] == rows.tolist()
    assert sizes == sorted(sizes) and sizes[-1] == 8
    lengths = [stages.at(step).seq_len for step in range(60)]
    assert lengths == sorted(lengths) and lengths[-1] == 12
    for batches in (0.0, 0.1, 1.0, 2.5, 7.0, 20.25):
        assert stages.steps(batches) == np.searchsorted(rows, batches * 8)
        taken = [steps for steps in range(51) if rows[50] - rows[50 - steps] >= batches * 8]
        assert stages.last_steps(batches, 50) == taken[0]
    due = [step for step in range(1, 60) if config.is_due("evaluate", step, 10.0)]
    assert due == [step for step in range(1, 60) if rows[step] // 24 > rows[step - 1] // 24]
    if name == "none":
        assert due == list(range(3, 60, 3))


def test_a_warm_up_is_as_long_as_is_said() -> None:
    batch = small(RAMPS["batch"]).stages(10.0)
    # 2 and 4 rows for ceil(7 / 2) steps each
    assert [(stage.first_step, stage.batch_size) for stage in batch.every] == [(0, 2), (4, 4), (8, 8)]
    # 1, 2, 4 rows for n steps: 7 n rows of 12 tokens are 700 with n = ceil(8.33); 0.8 epochs are 64 rows, 27 steps take 63
    both = small(RAMPS["both"]).stages(10.0)
    assert [(stage.first_step, stage.batch_size, stage.seq_len) for stage in both.every] == [
        (0, 1, 6), (9, 2, 6), (18, 4, 6), (27, 8, 6), (28, 8, 12)
    ]  # fmt: skip
    assert len({(stage.batch_size, stage.seq_len) for stage in both.every}) == 5, "shapes that are compiled"


def test_durations_in_tokens_count_the_ramp() -> None:
    config = small(RAMPS["batch"], train__duration_steps=0, train__duration_tokens=50 * 12, optimizer__warmup_tokens=9 * 12)
    # 4 steps of 2 rows, 4 of 4 rows are 24 rows; 26 more take 4 steps of 8. 9 rows: 8 in 4 steps, then one more step.
    assert Lengths.of(config, 1.0)[:2] == (12, 5)
    wsd = {"optimizer.schedule": "wsd", "optimizer.decay_tokens": 10 * 12, "optimizer.warmup_tokens": 12}
    assert Lengths.of(small(RAMPS["batch"], wsd), 1.0).decay == 2, "a fall at the end is in steps of the full size"


def test_refusals_name_both_knobs() -> None:
    for knobs, said in (
        ({"train.batch_warmup_start": 4}, "train.batch_warmup_start=4 needs the length"),
        ({"train.seq_len_warmup_steps": 4}, "train.seq_len_warmup_steps=4 is the length of a warm-up that .*_start=0 turns off"),
        ({"train.batch_warmup_start": 3, "train.batch_warmup_steps": 4}, "doubled to data.batch_size=8; make it 4 or 2 or 1"),
        ({"train.seq_len_warmup_start": 12, "train.seq_len_warmup_steps": 4}, "doubled to data.seq_len=12; make it 6 or 3"),
        (RAMPS["batch"] | {"train.accumulation_steps": 4}, "train.accumulation_steps=4 .* train.batch_warmup_start=2"),
    ):
        with pytest.raises(UserError, match=said):
            small(knobs)


def packed(tmp_path: pathlib.Path, **changes: Any) -> Config:
    path = tmp_path / "some.jsonl"
    if not path.exists():
        rng = np.random.default_rng(0)
        texts = ["".join(rng.choice(list("abcdefgh"), size)) for size in rng.integers(2, 70, 60)]
        path.write_text("".join(f'{{"text": "{text}"}}\n' for text in texts), encoding="utf-8")
    return tiny(path, data__source="jsonl", data__packing="packed", data__split_by="hash", **changes)


@pytest.mark.parametrize("shape", ["packed", "windows"])
def test_no_row_is_skipped_or_repeated(tmp_path, text_file, shape: str) -> None:  # noqa: F811
    """Ten steps of a ramp from any step on are the rows that a run without it takes one after the other."""
    make = packed if shape == "packed" else (lambda _, **changes: tiny(text_file, **changes))
    plain = make(tmp_path, train__accumulation_steps=1)
    ramp = make(tmp_path, train__accumulation_steps=1, train__batch_warmup_start=1, train__batch_warmup_steps=5)
    split = load_dataset(plain, lambda _: None, tmp_path / "cache").train
    stages = ramp.stages(1.0)
    assert [stages.at(step).batch_size for step in range(8)] == [1, 1, 1, 2, 2, 2, 4, 4]

    def batches(config: Config, start: int, stop: int, skipped: int = 0) -> list[dict[str, np.ndarray]]:
        found: list[dict[str, np.ndarray]] = []
        while start + len(found) < stop:
            for batch in train_batches(config, split, start + len(found), skipped_rows=skipped):
                found.append(batch)
                if start + len(found) == stop:
                    break
        return found

    def joined(found: list[dict[str, np.ndarray]]) -> np.ndarray:
        return np.concatenate([np.stack([batch[name] for name in sorted(batch)], 1) for batch in found])

    whole = joined(batches(plain, 0, 8))
    np.testing.assert_array_equal(joined(batches(ramp, 0, 9)), whole[:21])  # 3 + 6 + 12 rows
    np.testing.assert_array_equal(joined(batches(ramp, 4, 7)), whole[5:13])
    np.testing.assert_array_equal(joined(batches(ramp, 4, 7, skipped=11)), whole[16:24])
    assert batch_documents(ramp, split, 6, skipped_rows=3) == batch_documents(plain, split, 3)

    short = dataclasses.replace(ramp, train=dataclasses.replace(ramp.train, seq_len_warmup_start=4, seq_len_warmup_steps=8))
    cut = batches(short, 0, 6)
    assert [batch["tokens"].shape for batch in cut] == [(4, 5)] * 3 + [(8, 5)] + [(4, 9)] * 2
    targets = [collections.Counter(_predicted(batch)) for batch in cut]
    assert sum(targets, collections.Counter()) == collections.Counter(_predicted({
        name: np.concatenate([batch[name] for batch in batches(ramp, 0, 6)]) for name in cut[0]
    }))  # fmt: skip


def _predicted(batch: dict[str, np.ndarray]) -> list[tuple[int, int]]:
    """(token before, token) of all that counts."""
    example = causal(batch)
    counts = np.asarray(example.weights) > 0
    return list(zip(np.asarray(example.inputs)[counts].tolist(), np.asarray(example.targets)[counts].tolist(), strict=True))


@pytest.mark.parametrize("length", [1, 2, 4, 8, 16])
def test_shortened_rows_by_brute_force(length: int) -> None:
    """Every piece is read token by token: segments count from 1, positions from 0 in each, padding stays at the end."""
    rng = np.random.default_rng(length)
    offsets = np.concatenate([[0], np.cumsum(rng.integers(2, 40, 30))])
    rows = pack(offsets, 16)
    tokens = np.arange(offsets[-1], dtype=np.int32) + 1  # each its own, so that it says where it is from
    batch = rows.batch(tokens, np.array([0, 3, -1, 5, len(rows) - 1])) | {"source": np.arange(5)}
    cut = shortened(batch, length)
    pieces = 16 // length
    assert cut["tokens"].shape == (5 * pieces, length + 1) and cut["source"].tolist() == np.repeat(np.arange(5), pieces).tolist()
    for row in range(5 * pieces):
        whole, start = row // pieces, row % pieces * length
        segment, position, before = 0, 0, None
        for column in range(length + 1):
            original = batch["segment_ids"][whole, start + column]
            assert cut["tokens"][row, column] == batch["tokens"][whole, start + column]
            if original == 0:
                assert cut["segment_ids"][row, column] == cut["positions"][row, column] == 0
                continue
            segment, position = (segment, position + 1) if original == before else (segment + 1, 0)
            assert (cut["segment_ids"][row, column], cut["positions"][row, column]) == (segment, position)
            before = original
    assert sorted(_predicted(cut)) == sorted(_predicted(batch))


RUN = {
    "train__accumulation_steps": 1,
    "train__batch_warmup_start": 2,
    "train__batch_warmup_steps": 4,
    "train__seq_len_warmup_start": 8,
    "train__seq_len_warmup_steps": 6,
    "evaluate__sample_tokens": 0,
    "evaluate__every_steps": 0,
    "model__num_layers": 1,
}


def test_a_run_stopped_in_its_warm_ups_goes_on_bit_for_bit(text_file, tmp_path, monkeypatch) -> None:  # noqa: F811
    config = tiny(text_file, **RUN)
    whole = loop.train(config, tmp_path / "whole")
    assert whole["tokens"] == (4 * 2 + 8 * 4) * 16
    rows = [row for row in read_metrics(tmp_path / "whole/metrics.jsonl") if "train/loss" in row]
    assert [(row["batch_size"], row["seq_len"]) for row in rows] == [(2, 8)] * 4 + [(4, 8)] * 2 + [(4, 16)] * 6
    assert [row["tokens"] for row in rows] == np.cumsum([32] * 4 + [64] * 8).tolist()
    assert [row["train/weight"] for row in rows] == [32.0] * 4 + [64.0] * 8, "windows have no padding: every token counts"
    assert all(math.isfinite(row["train/loss"]) for row in rows)
    for step in (2, 3):  # within a stage and at its end; a stop is heard one step later
        with monkeypatch.context() as patch:
            stop_after(patch, step, signal.SIGTERM)
            with pytest.raises(loop.Interrupted):
                loop.train(config, tmp_path / f"{step}")
        assert loop.train(config, tmp_path / f"{step}")["state_sha256"] == whole["state_sha256"]
        assert rows_without_clock(tmp_path / f"{step}") == rows_without_clock(tmp_path / "whole")


def test_a_stage_that_does_not_divide_over_the_mesh_is_refused(text_file) -> None:  # noqa: F811
    from gptjax.parallel.mesh import abstract_mesh

    config = tiny(text_file, **RUN | {"data__batch_size": 8, "mesh__data": 4})
    with pytest.raises(UserError, match="in the warm-up's steps of 2 rows of 8 tokens, .*=2 does not divide over .*=4"):
        check_steps_divide(config, config.stages(1.0), abstract_mesh(config.mesh, 4))
