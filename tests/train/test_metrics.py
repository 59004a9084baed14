"""metrics.jsonl over kills and resumptions, the rates, the live line, the loss curve."""

import builtins
import dataclasses
import importlib.util
import io
import itertools
import json
import math
import pathlib
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from gptjax import config as config_lib
from gptjax.train import curve, metrics

CONFIG = config_lib.from_dict({"train": {"duration_steps": 100}})


def with_metrics(**knobs) -> config_lib.Config:
    return dataclasses.replace(CONFIG, metrics=dataclasses.replace(CONFIG.metrics, **knobs))


def write_steps(workdir: pathlib.Path, steps, resume_step: int | None = None, log=print) -> None:
    with metrics.MetricsWriter(workdir, CONFIG, resume_step, log) as writer:
        for step in steps:
            writer.write({"step": step, "tokens": step * 8, "train/loss": 1 / step})


def strict_rows(path: pathlib.Path) -> list[dict]:
    """As a reader that knows nothing of this package, and takes standard JSON only, would read it."""

    def refuse(name: str):
        raise AssertionError(f"{name} is no JSON number")

    return [json.loads(line, parse_constant=refuse) for line in path.read_text().splitlines()]


# --- metrics.jsonl ---


def test_rows_are_json_numbers_flushed_at_once(tmp_path):
    with metrics.MetricsWriter(tmp_path / "run", CONFIG) as writer:
        writer.write({"step": 1, "tokens": np.int64(8), "train/loss": jnp.float32(2.5), "learning_rate": np.float64(0.001)})
        assert strict_rows(tmp_path / "run" / "metrics.jsonl") == [
            {"step": 1, "tokens": 8, "train/loss": 2.5, "learning_rate": 0.001}
        ]


def test_non_finite_numbers_stay_valid_json_and_come_back(tmp_path):
    with metrics.MetricsWriter(tmp_path, CONFIG) as writer:
        writer.write({"step": 1, "train/loss": math.nan, "gradient_norm": jnp.inf, "low": -math.inf})
    assert strict_rows(tmp_path / "metrics.jsonl") == [{"step": 1, "train/loss": "nan", "gradient_norm": "inf", "low": "-inf"}]
    (row,) = metrics.read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(row["train/loss"]) and row["gradient_norm"] == math.inf and row["low"] == -math.inf


def test_resume_drops_rows_past_the_checkpoint_and_no_others(tmp_path):
    write_steps(tmp_path, range(1, 11))
    log: list[str] = []
    write_steps(tmp_path, range(7, 13), resume_step=6, log=log.append)
    assert [row["step"] for row in strict_rows(tmp_path / "metrics.jsonl")] == list(range(1, 13))
    assert log == ["dropped 4 rows of metrics.jsonl past step 6: those steps are taken again"]
    assert list(tmp_path.iterdir()) == [tmp_path / "metrics.jsonl"]


def test_a_run_from_the_start_drops_every_row(tmp_path):
    write_steps(tmp_path, range(1, 4))
    write_steps(tmp_path, range(1, 3), resume_step=None)
    assert [row["step"] for row in strict_rows(tmp_path / "metrics.jsonl")] == [1, 2]


def test_any_torn_last_line_is_repaired(tmp_path):
    whole = [json.dumps({"step": step, "tokens": step * 8, "train/loss": 1 / step}) + "\n" for step in (1, 2, 3)]
    path = tmp_path / "metrics.jsonl"
    for length in range(len(whole[2]) + 1):
        path.write_text(whole[0] + whole[1] + whole[2][:length])
        kept = [1, 2, 3] if length >= len(whole[2]) - 1 else [1, 2]
        assert [row["step"] for row in metrics.read_metrics(path)] == kept
        write_steps(tmp_path, [4], resume_step=3)
        assert [row["step"] for row in strict_rows(path)] == [*kept, 4]


def test_damage_elsewhere_is_named_not_repaired(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"st\n{"step": 3}\n')
    with pytest.raises(config_lib.UserError, match="line 2 of .*metrics.jsonl is damaged"):
        metrics.read_metrics(path)
    with pytest.raises(config_lib.UserError, match="line 2"):
        metrics.MetricsWriter(tmp_path, CONFIG, resume_step=3)
    assert path.read_text().count("\n") == 3
    with pytest.raises(config_lib.UserError, match="absent.jsonl does not exist"):
        metrics.read_metrics(tmp_path / "absent.jsonl")


def test_no_step_is_written_twice(tmp_path):
    with metrics.MetricsWriter(tmp_path, CONFIG) as writer:
        writer.write({"step": 5, "tokens": 1, "train/loss": 1.0})
        writer.write({"step": 5, "tokens": 1, "eval/loss": 1.0})
        for row in ({"step": 5, "train/loss": 2.0}, {"step": 5, "eval/loss": 2.0}, {"step": 4, "other": 2.0}):
            with pytest.raises(ValueError, match="already written"):
                writer.write(row)
    with metrics.MetricsWriter(tmp_path, CONFIG, resume_step=5) as writer:
        with pytest.raises(ValueError, match="already written"):
            writer.write({"step": 5, "train/loss": 1.0})
        writer.write({"step": 5, "samples": 3})


# --- TensorBoard and Weights & Biases ---


@pytest.fixture
def without(monkeypatch: pytest.MonkeyPatch):
    """A function that makes a package absent."""
    real_import = builtins.__import__

    def hide(package: str) -> None:
        def importing(name, *args, **kwargs):
            if name.split(".")[0] == package:
                raise ImportError(name)
            return real_import(name, *args, **kwargs)

        monkeypatch.setattr(builtins, "__import__", importing)

    return hide


@pytest.mark.parametrize(("extra", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_an_absent_package_is_refused_at_construction(tmp_path, without, extra, package):
    without(package)
    with pytest.raises(config_lib.UserError, match=rf"metrics.{extra}=True needs the package {package}.*gptjax\[{extra}\]"):
        metrics.MetricsWriter(tmp_path / "run", with_metrics(**{extra: True}))


@pytest.mark.skipif(importlib.util.find_spec("tensorboardX") is None, reason="tensorboardX not installed (extra: tensorboard)")
def test_tensorboard_event_files(tmp_path):
    from tensorboardX.proto import event_pb2

    with metrics.MetricsWriter(tmp_path, with_metrics(tensorboard=True)) as writer:
        writer.write({"step": 3, "tokens": 24, "train/loss": 1.5, "note": "text is left out"})
    (path,) = (tmp_path / "tensorboard").iterdir()
    content, offset, found = path.read_bytes(), 0, {}
    while offset < len(content):  # a record: length (8 bytes), its checksum (4), the event, its checksum (4)
        length = int.from_bytes(content[offset : offset + 8], "little")
        event = event_pb2.Event.FromString(content[offset + 12 : offset + 12 + length])
        found |= {value.tag: (event.step, value.simple_value) for value in event.summary.value}
        offset += length + 16
    assert found == {"tokens": (3, 24.0), "train/loss": (3, 1.5)}


def test_wandb_is_offline_and_inside_the_run(tmp_path, monkeypatch):
    calls: dict[str, list] = {"init": [], "log": [], "finish": []}
    run = types.SimpleNamespace(
        log=lambda values, step: calls["log"].append((step, values)), finish=lambda: calls["finish"].append(True)
    )
    stub = types.ModuleType("wandb")
    stub.init = lambda **arguments: calls["init"].append(arguments) or run
    monkeypatch.setitem(sys.modules, "wandb", stub)
    with metrics.MetricsWriter(tmp_path / "run", with_metrics(wandb=True), resume_step=7) as writer:
        writer.write({"step": 8, "train/loss": math.nan})
    (arguments,) = calls["init"]
    assert arguments["mode"] == "offline" and arguments["dir"] == str(tmp_path / "run") and arguments["group"] == "run"
    assert arguments["config"]["train"]["duration_steps"] == 100
    ((step, values),) = calls["log"]
    assert step == 8 and math.isnan(values["train/loss"]) and calls["finish"] == [True]


# --- rates ---


class Clock:
    def __init__(self):
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now


def test_rate_leaves_out_compilation_and_pauses():
    clock = Clock()
    rate = metrics.Rate(window=1e9, clock=clock)
    clock.now += 60  # compiling
    rate.tick(1, 100)
    assert rate.tokens_per_second is None
    for step in (2, 3):
        clock.now += 2
        rate.tick(step, 100 * step)
    assert rate.tokens_per_second == pytest.approx(50) and rate.steps_per_second == pytest.approx(0.5)
    rate.pause()
    clock.now += 500  # an evaluation, during which step 4, dispatched before it, came to its end
    rate.tick(4, 400)
    assert rate.tokens_per_second == pytest.approx(50)
    clock.now += 2
    rate.tick(5, 500)
    assert rate.tokens_per_second == pytest.approx(50)


def test_rate_forgets_what_is_older_than_the_window():
    clock = Clock()
    rate = metrics.Rate(window=10, clock=clock)
    rate.tick(0, 0)
    for step in range(1, 21):
        clock.now += 10 if step <= 10 else 1
        rate.tick(step, step * 100)
    assert rate.tokens_per_second == pytest.approx(100)


# --- the live line ---


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True

    def screen(self) -> list[str]:
        """What stands on an endlessly tall terminal: carriage return and erase-to-end are obeyed."""
        lines, column = [""], 0
        for piece in self.getvalue().replace("\x1b[K", "\0"):
            if piece == "\n":
                lines.append("")
                column = 0
            elif piece == "\r":
                column = 0
            elif piece == "\0":
                lines[-1] = lines[-1][:column]
            else:
                lines[-1] = lines[-1][:column] + piece + lines[-1][column + 1 :]
                column += 1
        return lines


def live_line(stream, clock=None) -> metrics.LiveLine:
    return metrics.LiveLine(2000, stream, clock or Clock())


@pytest.fixture(autouse=True)
def a_common_terminal(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")


def test_terminal_shows_one_line_that_overwrites_itself():
    stream, clock = Terminal(), Clock()
    live = live_line(stream, clock)
    for step in range(1, 501):
        clock.now += 0.25
        live.step(step, step * 1000, loss=2.0)
    live.checkpoint(400)
    assert stream.screen() == ["step 500/2,000  25%  loss 2.0000  4.00k tokens/s  ETA 6:15  saved 400"]


def test_log_lines_stand_above_the_live_line():
    stream, clock = Terminal(), Clock()
    live = live_line(stream, clock)
    live.step(1, 1000, loss=2.0)
    live("first")
    live.row({"step": 2, "tokens": 2000, "train/loss": 1.5, "eval/loss": 1.75})
    live("second")
    live.close()
    live("after the end")
    screen = stream.screen()
    assert screen[:3] == ["first", "step 2  eval/loss 1.7500", "second"]
    assert screen[3].startswith("step 2/2,000  0%  loss 1.5000  - tokens/s  ETA -  not saved yet")
    assert screen[4:] == ["after the end", ""]


@pytest.mark.parametrize("columns", [1, 10, 20, 40, 60, 100])
def test_the_line_never_wraps(monkeypatch, columns):
    monkeypatch.setenv("COLUMNS", str(columns))
    stream = Terminal()
    live = live_line(stream)
    with live.paused("evaluating"):
        live.step(1999, 10**12, loss=123.456)
    (line,) = stream.screen()
    assert 0 < len(line) <= max(columns - 1, 1)
    assert "step 1,999/2,000"[: columns - 1] in line
    if columns >= 20:  # no part is cut in two
        assert line.split("  ")[-1] in {
            "step 1,999/2,000",
            "100%",
            "loss 123.4560",
            "- tokens/s",
            "ETA -",
            "not saved yet",
            "evaluating",
        }


def test_redrawing_is_throttled():
    stream, clock = Terminal(), Clock()
    live = live_line(stream, clock)
    for step in range(1, 1001):
        clock.now += 0.001
        live.step(step, step)
    assert 5 <= stream.getvalue().count("\r") <= 11


@pytest.mark.parametrize("terminal", [False, True])
def test_without_a_terminal_there_are_plain_lines(monkeypatch, terminal):
    stream: io.StringIO = io.StringIO()
    if terminal:
        monkeypatch.setenv("TERM", "dumb")
        stream = Terminal()
    clock = Clock()
    with live_line(stream, clock) as live:
        for step in range(1, 101):
            clock.now += 0.5
            live.step(step, step * 1000, loss=2.0)
        live.checkpoint(50)
        with live.paused("evaluating"):
            clock.now += 100
        live.row({"step": 100, "tokens": 100_000, "train/loss": 1.5, "eval/loss": 1.75})
        live("a text")
    assert stream.getvalue() == (
        "step 100/2,000  5%  train/loss 1.5000  eval/loss 1.7500  2.00k tokens/s  ETA 15:50  saved 50\na text\n"
    )


def test_activity_is_shown_while_paused_and_gone_after_an_error():
    stream = Terminal()
    live = live_line(stream)
    with pytest.raises(RuntimeError), live.paused("evaluating"):
        assert stream.screen()[-1].endswith("evaluating")
        raise RuntimeError
    assert "evaluating" not in stream.screen()[-1]


def test_numbers_for_people():
    counts = [
        (0.5, "0.5"),
        (999, "999"),
        (999.7, "1.00k"),
        (1000, "1.00k"),
        (12_345, "12.3k"),
        (99_960, "100k"),
        (1.5e6, "1.50M"),
        (3e12, "3.00T"),
    ]
    assert [metrics.format_count(number) for number, _ in counts] == [text for _, text in counts]
    times = [(0, "0:00"), (59.6, "1:00"), (754, "12:34"), (3723, "1:02:03"), (273_900, "3d 04:05")]
    assert [metrics.format_seconds(seconds) for seconds, _ in times] == [text for _, text in times]


# --- the table and the curve ---


def test_parameter_table_counts_boxes_shapes_and_arrays():
    params = {
        "embed": nn.LogicallyPartitioned(jax.ShapeDtypeStruct((50257, 768), jnp.float32), ("vocab", "embed")),
        "blocks": {"norm": {"scale": jnp.ones((12, 768), jnp.bfloat16)}},
    }
    lines = metrics.parameter_table(params).splitlines()
    assert [line.split() for line in lines if not line.startswith("-")] == [
        ["parameter", "shape", "dtype", "count"],
        ["blocks/norm/scale", "12", "x", "768", "bfloat16", "9,216"],
        ["embed", "50257", "x", "768", "float32", "38,597,376"],
        ["total", "154.4", "MB", "38,606,592"],  # 4 * 38,597,376 + 2 * 9,216 bytes
    ]
    assert len({len(line) for line in lines}) == 1


def write_losses(workdir: pathlib.Path, count: int) -> None:
    with metrics.MetricsWriter(workdir, CONFIG) as writer:
        for step in range(1, count + 1):
            row = {"step": step, "tokens": step * 4096, "train/loss": math.nan if step == 3 else 1 + 4 / step}
            writer.write(row | ({"eval/loss": 1.2 + 4 / step} if step % 20 == 0 else {}))


@pytest.mark.parametrize("count", [1, 2, 300])
def test_loss_curve(tmp_path, count):
    image = pytest.importorskip("matplotlib.image")
    write_losses(tmp_path, count)
    path = curve.draw_loss_curve(tmp_path)
    assert path == tmp_path / "loss_curve.png" and sorted(p.name for p in tmp_path.iterdir()) == [
        "loss_curve.png",
        "metrics.jsonl",
    ]
    pixels = image.imread(path)[..., :3]
    assert pixels.shape == (720, 1200, 3)
    red = (pixels[..., 0] > 0.8) & (pixels[..., 1] < 0.5)
    blue = (pixels[..., 2] > 0.6) & (pixels[..., 0] < 0.4)
    assert blue.sum() > 20 and (red.sum() > 100) == (count >= 20)


def test_loss_curve_without_matplotlib_or_rows_is_one_sentence(tmp_path, without):
    pytest.importorskip("matplotlib")
    log: list[str] = []
    with metrics.MetricsWriter(tmp_path, CONFIG) as writer:
        writer.write({"step": 1, "train/loss": math.nan})
    assert curve.draw_loss_curve(tmp_path, log.append) is None
    without("matplotlib")
    assert curve.draw_loss_curve(tmp_path, log.append) is None
    assert "no finite loss" in log[0] and "gptjax[plot]" in log[1] and len(log) == 2


def test_smoothing_is_a_mean_that_keeps_a_straight_line_straight():
    line = tuple(float(x) for x in range(20))
    assert curve._smoothed(line, 4) == pytest.approx(line)
    alternating = tuple(itertools.islice(itertools.cycle([0.0, 1.0]), 21))
    assert curve._smoothed(alternating, 1)[10] == pytest.approx(2 / 3)
