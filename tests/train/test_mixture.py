"""A run on a mixture from the command line: stopped and resumed like any other, evaluated by source, an axis of a sweep."""

from __future__ import annotations

import json
import math
import os
import pathlib
import signal

import pytest

from gptjax import cli
from gptjax.config import from_json
from gptjax.data.pipeline import load_dataset, mixture_figures
from gptjax.sweeps.definition import Sweep, make_trials
from gptjax.sweeps.space import grid
from gptjax.train import loop
from gptjax.train.metrics import read_metrics

RECIPE = str(pathlib.Path(__file__).resolve().parents[2] / "configs/stdlib_tiny.py")
WEIGHTS = "squares=0.8@0,squares=0.2@1,words=0.5"
SETTINGS = [
    f"--config.{setting}"
    for setting in (
        "model.num_layers=1",
        "model.model_dim=16",
        "model.num_heads=2",
        "model.max_seq_len=16",
        "data.seq_len=16",
        "data.batch_size=4",
        "data.split_by=tail",
        f"data.mixture_weights={WEIGHTS}",
        "data.mixture_settings=words.eval_fraction=0.2",
        "train.duration_steps=12",
        "optimizer.warmup_steps=0",
        "metrics.every_steps=1",
        "checkpoint.every_steps=5",
        "evaluate.every_steps=6",
        "evaluate.max_batches=2",
        "evaluate.batch_size=8",
        "evaluate.sample_tokens=0",
    )
]


@pytest.fixture(scope="module")
def command(tmp_path_factory) -> list[str]:
    folder = tmp_path_factory.mktemp("text")
    (folder / "squares.txt").write_text(" ".join(str(n * n) for n in range(500)), encoding="utf-8")
    (folder / "words.txt").write_text("the quick brown fox jumps over the lazy dog. " * 40, encoding="utf-8")
    mixture = f"squares=text:{folder}/squares.txt,words=text:{folder}/words.txt"
    return [f"--config={RECIPE}", *SETTINGS, f"--config.data.mixture={mixture}"]


@pytest.fixture(scope="module")
def finished(command, tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("finished")
    assert cli.main(["train", f"--workdir={workdir}", *command]) == 0
    return workdir


def rows_without_clock(workdir: pathlib.Path) -> list[dict]:
    clocks = ("seconds", "tokens_per_second")
    return [{key: value for key, value in row.items() if key not in clocks} for row in read_metrics(workdir / "metrics.jsonl")]


def test_rows_say_what_was_taken_of_each_source(finished):
    rows = read_metrics(finished / "metrics.jsonl")
    trained = [row for row in rows if "train/loss" in row]
    for row in trained:
        assert row["mixture/squares/rows"] + row["mixture/words/rows"] == 4 * row["step"]
        share = 0.8 - 0.6 * row["step"] / 12
        assert math.isclose(row["mixture/squares/weight"], share / (share + 0.5), abs_tol=0.01)
        assert math.isclose(row["mixture/squares/weight"] + row["mixture/words/weight"], 1)
    wanted = sum((0.8 - 0.6 * n / 48) / (1.3 - 0.6 * n / 48) for n in range(48))
    assert abs(trained[-1]["mixture/squares/rows"] - wanted) < 3
    result = json.loads((finished / "result.json").read_text())
    config = from_json(finished / "config.json")
    dataset = load_dataset(config, log=lambda line: None)
    assert result["mixture"] == mixture_figures(config, dataset.train, 4 * 12)


def test_each_source_is_evaluated_and_all_together(finished, capsys):
    assert cli.main(["evaluate", f"--workdir={finished}", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    result = json.loads((finished / "result.json").read_text())["eval"]
    assert figures.items() >= (result | {"step": 12}).items()
    last = read_metrics(finished / "metrics.jsonl")[-1]
    assert {key.removeprefix("eval/"): value for key, value in last.items() if key.startswith("eval/")} == result
    config = from_json(finished / "config.json")
    splits = load_dataset(config, log=lambda line: None).eval
    for name, split in splits.items():
        # a packed document's every token but its first is a target
        assert figures[f"{name}/tokens"] == split.num_tokens - len(split.names)
        assert math.isclose(figures[f"{name}/perplexity"], math.exp(figures[f"{name}/loss"]))
    for total in ("tokens", "bytes"):
        assert figures[total] == sum(figures[f"{name}/{total}"] for name in splits)
    nats = sum(figures[f"{name}/loss"] * figures[f"{name}/tokens"] for name in splits)
    assert math.isclose(figures["loss"], nats / figures["tokens"], rel_tol=1e-12)
    assert abs(figures["squares/loss"] - figures["words/loss"]) > 1e-3
    assert cli.main(["evaluate", f"--workdir={finished}"]) == 0
    table = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in table] == ["source", "squares", "words"]
    assert table[1].split()[1] == f"{figures['squares/loss']:.4f}"


def test_a_stopped_run_goes_on_bit_for_bit(command, finished, tmp_path, monkeypatch):
    read = loop._read

    def stop(run, step, metrics):
        read(run, step, metrics)
        if step == 7:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop, "_read", stop)
    assert cli.main(["train", f"--workdir={tmp_path}", *command]) == 75
    monkeypatch.undo()
    assert cli.main(["train", f"--workdir={tmp_path}", *command]) == 0
    ours, theirs = (json.loads((folder / "result.json").read_text()) for folder in (tmp_path, finished))
    for key in ("state_sha256", "eval", "mixture"):
        assert ours[key] == theirs[key]
    assert rows_without_clock(tmp_path) == rows_without_clock(finished)


def test_weights_are_an_axis_of_a_sweep():
    points = grid({"data.mixture_weights": [("a=1", "b=1"), ("a=1@0", "a=0.5@1", "b=1")]})
    sweep = Sweep(space=points, recipe=RECIPE, overrides={"data.mixture": ("a=stdlib", "b=stdlib")})
    trials = make_trials(sweep, [])
    assert [trial.config.data.mixture_weights for trial in trials] == [("a=1", "b=1"), ("a=1@0", "a=0.5@1", "b=1")]
    assert len({trial.name for trial in trials}) == 2
