"""Loss spikes: found by the median rule, gone back from, passed over; the same when killed at any moment and when replayed."""

from __future__ import annotations

import json
import math
import pathlib
import random
import signal
from typing import Any

import numpy as np
import pytest

from gptjax.config import Config, UserError
from gptjax.train import loop
from gptjax.train.checkpoints import Checkpoints
from gptjax.train.metrics import read_metrics
from gptjax.train.rewind import Rewind, Watch
from tests.small import small
from tests.train.test_loop import rows_without_clock, stop_after, tiny

KNOBS = {
    "train.spike_threshold": 5.0,
    "train.spike_window": 8,
    "train.spike_steps": 2,
    "train.spike_checkpoint_steps": 4,
    "train.spike_max_rewinds": 2,
}


def test_the_rule_against_numpy() -> None:
    rng = np.random.default_rng(0)
    values = rng.normal(3.0, 0.1, 200)
    values[[50, 90, 91, 120, 121]] += 3.0
    values[91], values[150] = math.nan, math.inf
    watch = Watch.restored(small(KNOBS), {})
    good: list[float] = []
    found, bad = [], 0
    for step, value in enumerate(values.tolist(), start=1):
        limit = math.inf
        if len(good) >= 8:
            median = np.median(good[-8:])
            limit = median + 5.0 * 1.4826 * np.median(np.abs(np.array(good[-8:]) - median))
        is_bad = not value <= limit
        bad = bad + 1 if is_bad else 0
        if not is_bad:
            good.append(value)
        rewind = watch.see(step, value)
        assert (rewind is not None) == (bad == 2), step
        watch = Watch.restored(small(KNOBS), json.loads(json.dumps(watch.saved())))  # what a checkpoint keeps is all of it
        if rewind is not None:
            found.append(rewind)
            assert rewind.limit == pytest.approx(limit) and rewind.value == (None if math.isnan(value) else value)
            watch, bad = Watch(watch.config, watch.values, 0, [*watch.rewinds, rewind]), 0
            if len(watch.rewinds) == 2:
                break
    assert [(one.found_at, one.first_bad, one.back_to) for one in found] == [(92, 91, 88), (122, 121, 120)]
    assert watch.see(500, 1e9) is None and watch.see(501, 1e9) is None, "train.spike_max_rewinds"


def test_without_a_threshold_nothing_is_watched() -> None:
    watch = Watch.restored(small(), {})
    assert all(watch.see(step, 10.0**step) is None for step in range(300)) and not watch.values
    assert not watch.is_point(100) and watch.held(100) == ()


def test_checkpoints_to_go_back_to_are_held() -> None:
    watch = Watch.restored(small(KNOBS), {})
    for found_at in range(10, 60):  # a spike of 2 steps that is found at a step, whose own checkpoint is not yet written
        back_to = (found_at - 2) // 4 * 4
        assert back_to in watch.held(found_at - 1) or back_to in watch.held(found_at)


def test_refusals_name_both_knobs() -> None:
    for knobs, said in (
        ({"train.spike_checkpoint_steps": 9}, "train.spike_checkpoint_steps=9 is more than train.spike_window=8"),
        ({"train.spike_steps": 5}, "train.spike_steps=5 is more than train.spike_checkpoint_steps=4"),
    ):
        with pytest.raises(UserError, match=said):
            small(KNOBS, knobs)


# --- a run over text with a corrupted place -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def config(tmp_path_factory) -> Config:
    """Digits in order, and from step 25 on 5 steps' worth of letters; 64 tokens a step, taken in the order of the text."""
    noise = random.Random(0)
    letters = "".join(noise.choice("abcdefghijklmnopqrstuvwxyz#!?") for _ in range(5 * 64))
    text = "0123456789" * 160
    path = tmp_path_factory.mktemp("text") / "digits.txt"
    path.write_text(text + letters + "0123456789" * 400, encoding="utf-8")
    knobs: dict[str, Any] = {key.replace(".", "__"): value for key, value in KNOBS.items()}
    knobs |= {"data__shuffle": False, "train__duration_steps": 40, "train__accumulation_steps": 1, "model__num_layers": 1}
    knobs |= {
        "train__spike_skip_steps": 1,
        "checkpoint__every_steps": 13,
        "checkpoint__keep_last": 1,
        "evaluate__every_steps": 9,
        "evaluate__sample_tokens": 0,
    }
    return tiny(path, **knobs, optimizer__learning_rate=0.01)


@pytest.fixture(scope="module")
def undisturbed(config, tmp_path_factory) -> tuple[pathlib.Path, dict[str, Any]]:
    workdir = tmp_path_factory.mktemp("undisturbed")
    return workdir, loop.train(config, workdir)


def test_a_spike_is_gone_back_from_and_passed_over(undisturbed) -> None:
    workdir, result = undisturbed
    assert result["steps"] == 40 and result["tokens"] == 40 * 64
    one, two = (Rewind(**rewind) for rewind in result["rewinds"])
    # Letters are in rows 100 to 120, from step 26 on (steps from 1): two bad steps, back to the last multiple of 4 before
    # them, and on 3 steps and one later, in row 112. There are still two steps of letters, and behind them no more.
    assert (one.first_bad, one.found_at, one.back_to, one.skipped_rows) == (26, 27, 24, 16)
    assert (two.first_bad, two.found_at, two.back_to, two.skipped_rows) == (25, 26, 24, 28)
    assert one.value > 1.5 * one.limit and two.value > 1.5 * two.limit
    rows = read_metrics(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 41)), "rows of the abandoned steps are gone"
    assert max(row["train/loss"] for row in rows if "train/loss" in row and row["step"] > 20) < 2, "and with them the letters"
    (told,) = [row for row in rows if "rewind_1/found_at" in row]
    assert told == {"step": 24, "tokens": 24 * 64, "rewind_1/found_at": 27, "rewind_1/first_bad": 26, "rewind_1/skipped_rows": 16}
    about = json.loads(max((workdir / "checkpoints").glob("*/metadata.json")).read_text())["metadata"]
    assert about["data"] == {"next_step": 40, "next_row": 40 * 4 + 28} and about["spikes"]["rewinds"] == result["rewinds"]


def test_a_replay_has_the_same_bits(config, undisturbed, tmp_path) -> None:
    again = loop.train(config, tmp_path)
    assert {name: again[name] for name in ("state_sha256", "rewinds", "eval")} == {
        name: undisturbed[1][name] for name in ("state_sha256", "rewinds", "eval")
    }


class Killed(Exception):
    pass


def kill_at(monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, after: bool = False, nth: int = 1) -> None:
    """Ends the process's work, for good, before or after the nth call."""
    real, calls = getattr(owner, name), [0]

    def wrapped(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == nth and not after:
            raise Killed
        result = real(*args, **kwargs)
        if calls[0] == nth:
            raise Killed
        return result

    monkeypatch.setattr(owner, name, wrapped)


# Where the way back can be cut off: before it, among the removals, before the row and its checkpoint, after them, later on.
MOMENTS = {
    "found": (loop, "_go_back", False, 1),
    "before removals": (Checkpoints, "go_back", False, 1),
    "before its row": (loop, "_keep_rewind", False, 1),
    "between its row and its checkpoint": (loop, "_save", False, 9),  # after those of 4, 8, 12, 13, 16, 20, 24 and 26
    "after its checkpoint": (loop, "_keep_rewind", True, 1),
    "before the second one": (loop, "_go_back", False, 2),
    "steps later": (loop, "_read", True, 33),
}


@pytest.mark.parametrize("moment", MOMENTS)
def test_killed_on_the_way_back(config, undisturbed, tmp_path, monkeypatch, moment: str) -> None:
    owner, name, after, nth = MOMENTS[moment]
    with monkeypatch.context() as patch:
        kill_at(patch, owner, name, after, nth)
        with pytest.raises(Killed):
            loop.train(config, tmp_path)
    result = loop.train(config, tmp_path)
    assert result["rewinds"] == undisturbed[1]["rewinds"]
    assert result["state_sha256"] == undisturbed[1]["state_sha256"] and result["eval"] == undisturbed[1]["eval"]
    assert rows_without_clock(tmp_path) == rows_without_clock(undisturbed[0])


@pytest.mark.parametrize("step", [25])
def test_stopped_within_the_spike(config, undisturbed, tmp_path, monkeypatch, step: int) -> None:
    """The stop's own checkpoint, of a bad step perhaps, is none to go back to."""
    with monkeypatch.context() as patch:
        stop_after(patch, step, signal.SIGTERM)
        with pytest.raises(loop.Interrupted):
            loop.train(config, tmp_path)
    result = loop.train(config, tmp_path)
    assert result["state_sha256"] == undisturbed[1]["state_sha256"] and result["rewinds"] == undisturbed[1]["rewinds"]
    assert rows_without_clock(tmp_path) == rows_without_clock(undisturbed[0])
