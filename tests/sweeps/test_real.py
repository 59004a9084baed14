"""A small real sweep: the same bits one at a time and two at a time; and what the verb says of mistakes."""

from __future__ import annotations

import json
import pathlib

import pytest

from gptjax import cli

ROOT = pathlib.Path(__file__).resolve().parents[2]
SWEEP = """
from gptjax.sweeps.definition import Sweep
from gptjax.sweeps.space import seeds

TINY = {
    "model.num_layers": 1, "model.model_dim": 16, "model.num_heads": 2, "model.max_seq_len": 32,
    "data.seq_len": 32, "data.batch_size": 4, "data.source": "text", "data.path": "%(text)s", "data.split_by": "tail",
    "optimizer.name": "adamw", "optimizer.warmup_steps": 0, "train.duration_steps": 4, "metrics.every_steps": 2,
    "evaluate.sample_tokens": 0, "evaluate.every_steps": 2, "evaluate.batch_size": 16,
}

def get_sweep():
    return Sweep("%(recipe)s", seeds(2), TINY)
"""


@pytest.fixture
def sweep_file(tmp_path, monkeypatch) -> str:
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    # What the first trial compiles, the others read: the processes of this test would otherwise spend their time on it.
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path / "compiled"))
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
    monkeypatch.setenv("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "-1")
    text, path = tmp_path / "words.txt", tmp_path / "sweep.py"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 60, encoding="utf-8")
    path.write_text(SWEEP % {"text": text, "recipe": ROOT / "configs/stdlib_tiny.py"})
    return str(path)


def test_two_at_a_time_give_the_bits_of_one_at_a_time(tmp_path, sweep_file, capsys):
    assert cli.main(["sweep", sweep_file, f"--workdir={tmp_path / 'one'}", "--json"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert one["all_done"] and [trial["status"] for trial in one["trials"]] == ["done", "done"]
    assert cli.main(["sweep", sweep_file, f"--workdir={tmp_path / 'two'}", "--jobs=2"]) == 0
    assert "2 of 2 done" in capsys.readouterr().err

    results = [
        {path.parent.name: json.loads(path.read_text()) for path in (tmp_path / name).glob("trials/*/result.json")}
        for name in ("one", "two")
    ]
    assert {name: result["state_sha256"] for name, result in results[0].items()} == {
        name: result["state_sha256"] for name, result in results[1].items()
    }
    assert all(result["hardware"]["cpu_cores"] == 1 for both in results for result in both.values())

    assert cli.main(["compare", str(tmp_path / "two"), "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)["reports"]
    losses = [result["eval"]["loss"] for _, result in sorted(results[1].items())]
    assert [run["value"] for group in report["groups"] for run in group["runs"]] == losses and losses[0] != losses[1]


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["{file}"], "needs --workdir"),
        (["{file}x", "--workdir=x"], "the sweep file {file}x does not exist"),
        (["{file}", "--workdir=x", "--config.model.num_layer=2"], "did you mean model.num_layers?"),
        (["{file}", "--workdir=x", "--cores=4096"], "--cores=4096: this process may use only"),
        (["{file}", "--workdir=x", "--jobs=0"], "0 must be at least 1"),
    ],
)
def test_a_mistake_is_said_before_anything_runs(sweep_file, capsys, monkeypatch, tmp_path, words, sentence):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["sweep", *(word.format(file=sweep_file) for word in words)]) == 2
    err = capsys.readouterr().err
    assert sentence.format(file=sweep_file) in err and err.count("\n") == 1
    assert not (tmp_path / "x").exists()


def test_list_runs_nothing_and_says_what_is_done(sweep_file, capsys, tmp_path):
    assert cli.main(["sweep", sweep_file, "--list"]) == 0
    listed = capsys.readouterr().out.splitlines()
    assert len(listed) == 2 and listed[0].endswith("waiting  seed=0")
    assert cli.main(["sweep", sweep_file, "--list", f"--workdir={tmp_path / 'x'}", "--json"]) == 0
    assert [trial["status"] for trial in json.loads(capsys.readouterr().out)["trials"]] == ["waiting", "waiting"]
    assert not (tmp_path / "x").exists()
