"""A run as a whole: resumed runs equal undisturbed ones, one compilation, and every way to end."""

from __future__ import annotations

import importlib.util
import json
import os
import pathlib
import signal
import sys
from typing import Any

import pytest

from gptjax import config as config_lib
from gptjax import recipes
from gptjax.config import Config, UserError
from gptjax.train import evaluate as evaluate_lib
from gptjax.train import loop
from gptjax.train import step as step_lib
from gptjax.train.metrics import read_metrics

ROOT = pathlib.Path(__file__).resolve().parents[2]
STEPS_TO_KILL = 100


@pytest.fixture(scope="module")
def text_file(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("text") / "numbers.txt"
    path.write_text(" ".join(str(n * n) for n in range(4000)), encoding="utf-8")
    return path


def tiny(text_file: pathlib.Path, **changes) -> Config:
    """A run of 12 steps that touches everything a state may hold."""
    values = config_lib.defaults()
    settings = {
        "data.source": "text",
        "data.path": str(text_file),
        "data.split_by": "tail",
        "data.seq_len": 16,
        "data.batch_size": 4,
        "data.packing": "windows",
        "model.num_layers": 2,
        "model.model_dim": 16,
        "model.num_heads": 2,
        "model.max_seq_len": 16,
        "model.residual_dropout": 0.1,
        "optimizer.ema_decay": 0.9,
        "optimizer.warmup_steps": 2,
        "train.duration_steps": 12,
        "train.accumulation_steps": 2,
        "metrics.every_steps": 1,
        "checkpoint.every_steps": 5,
        "evaluate.every_steps": 4,
        "evaluate.max_batches": 2,
        "evaluate.batch_size": 8,
        "evaluate.sample_tokens": 3,
        "evaluate.sample_prompt": "1",
    } | {key.replace("__", "."): value for key, value in changes.items()}
    for key, value in settings.items():
        recipes.apply_override(values, f"{key}={value}")
    return config_lib.from_dict(values)


@pytest.fixture(scope="module")
def undisturbed(text_file, tmp_path_factory) -> tuple[pathlib.Path, dict]:
    workdir = tmp_path_factory.mktemp("undisturbed")
    return workdir, loop.train(tiny(text_file), workdir)


def stop_after(monkeypatch, step: int, number: signal.Signals) -> None:
    """Sends this process the signal while it reads the metrics of `step`."""
    read = loop._read

    def wrapped(run, at, metrics):
        read(run, at, metrics)
        if at == step:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(loop, "_read", wrapped)


def rows_without_clock(workdir: pathlib.Path) -> list[dict]:
    clocks = ("seconds", "tokens_per_second")
    return [{key: value for key, value in row.items() if key not in clocks} for row in read_metrics(workdir / "metrics.jsonl")]


def test_the_folder_of_a_finished_run(undisturbed):
    workdir, result = undisturbed
    assert json.loads((workdir / "result.json").read_text()) == result
    assert result["steps"] == 12 and result["tokens"] == 12 * 4 * 16 and len(result["state_sha256"]) == 64
    assert {"versions", "git_commit", "hardware", "seconds"} <= result.keys()
    rows = read_metrics(workdir / "metrics.jsonl")
    assert [row["step"] for row in rows if "train/loss" in row] == list(range(1, 13))
    assert [row["step"] for row in rows if "eval/loss" in row] == [4, 8, 12]
    assert rows[-1]["eval/loss"] == result["eval"]["loss"]
    assert sorted(path.name for path in (workdir / "samples").iterdir()) == ["00000004.txt", "00000008.txt", "00000012.txt"]
    assert (workdir / "loss_curve.png").is_file() and (workdir / "config.json").is_file()
    assert not (workdir / "run.lock").exists()


def test_a_mixture_of_experts_reports_its_routing(text_file, tmp_path):
    experts = {"model__num_experts": 4, "model__expert_capacity_factor": 0.5, "objective__router_balance_loss": 0.01}
    loop.train(tiny(text_file, train__duration_steps=2, evaluate__every_steps=0, optimizer__warmup_steps=0, **experts), tmp_path)
    for row in read_metrics(tmp_path / "metrics.jsonl")[:2]:
        # two layers, 4 rows of 16 tokens, 2 experts each; 4 of 8 places an expert on even shares
        assert row["moe/dropped_fraction"] == row["moe/dropped"] / (2 * 4 * 16 * 2) >= 0.5
        assert 0.9 < row["moe/load_balance"] < 4 and 0 < row["moe/router_z"] < 10 and 1 <= row["moe/busiest"] <= 2
        assert abs(row["train/loss"] - row["train/nll"] - 0.01 * row["moe/load_balance"]) < 1e-5


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("step", [1, 7])
def test_a_stopped_run_goes_on_bit_for_bit(text_file, undisturbed, tmp_path, monkeypatch, number, step):
    stop_after(monkeypatch, step, number)
    with pytest.raises(loop.Interrupted) as stopped:
        loop.train(tiny(text_file), tmp_path)
    assert stopped.value.signal_number == number
    monkeypatch.undo()
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    result = loop.train(tiny(text_file), tmp_path)
    assert result["state_sha256"] == undisturbed[1]["state_sha256"]
    assert result["eval"] == undisturbed[1]["eval"]
    assert rows_without_clock(tmp_path) == rows_without_clock(undisturbed[0])


@pytest.mark.parametrize(
    ("processes", "error", "after"),
    [(2, ValueError, signal.SIG_IGN), (1, ValueError, signal.SIG_DFL), (2, loop.Interrupted, signal.SIG_DFL)],
)
def test_a_process_of_several_that_failed_hears_no_sigterm_until_it_has_said_why(monkeypatch, processes, error, after):
    monkeypatch.setattr(loop.hosts, "process_count", lambda: processes)
    with pytest.raises(error), loop.StopSignals():
        raise error(15, 3)
    assert signal.signal(signal.SIGTERM, signal.SIG_DFL) == after


def test_a_run_that_lost_its_last_checkpoint_repeats_the_same_steps(text_file, undisturbed, tmp_path, monkeypatch, capsys):
    stop_after(monkeypatch, 10, signal.SIGTERM)
    with pytest.raises(loop.Interrupted):
        loop.train(tiny(text_file), tmp_path)
    monkeypatch.undo()
    newest = max((tmp_path / "checkpoints").iterdir())
    victim = newest / "metadata.json"
    content = bytearray(victim.read_bytes())
    content[len(content) // 2] ^= 1
    victim.write_bytes(bytes(content))
    result = loop.train(tiny(text_file), tmp_path)
    said = capsys.readouterr().err
    assert "is damaged" in said and "going on from the checkpoint of step 10" in said
    assert result["state_sha256"] == undisturbed[1]["state_sha256"]
    assert rows_without_clock(tmp_path) == rows_without_clock(undisturbed[0])


def test_a_run_an_evaluation_and_a_resumption_compile_the_step_once(text_file, tmp_path, monkeypatch):
    traced = {"train": 0, "eval": 0}
    train_body, eval_body = step_lib._step, evaluate_lib._sums

    def counted(name, body):
        def wrapped(*arguments):
            traced[name] += 1
            return body(*arguments)

        return wrapped

    monkeypatch.setattr(step_lib, "_step", counted("train", train_body))
    monkeypatch.setattr(evaluate_lib, "_sums", counted("eval", eval_body))
    config = tiny(text_file, train__seed=7)  # a config of its own: compiled functions are kept by config
    with monkeypatch.context() as patch:
        stop_after(patch, 5, signal.SIGTERM)
        with pytest.raises(loop.Interrupted):
            loop.train(config, tmp_path)
    loop.train(config, tmp_path)
    assert traced == {"train": 1, "eval": 1}


def test_a_finished_run_answers_with_its_result(text_file, undisturbed, capsys):
    workdir, result = undisturbed
    assert loop.train(tiny(text_file), workdir) == result
    assert "finished run of 12 steps" in capsys.readouterr().err


def test_a_changed_config_is_refused_unless_its_key_is_allowed(text_file, undisturbed):
    workdir, _ = undisturbed
    with pytest.raises(UserError, match=r"optimizer.learning_rate from 0.001 to 0.002.*--allow_changes=optimizer.learning_rate"):
        loop.train(tiny(text_file, optimizer__learning_rate=0.002), workdir)
    loop.train(tiny(text_file, metrics__every_steps=3), workdir)  # shapes nothing


def test_a_finished_run_is_made_longer_by_an_allowed_change(text_file, tmp_path):
    constant = {"optimizer__schedule": "constant"}  # then the first steps don't depend on the length
    loop.train(tiny(text_file, train__duration_steps=8, **constant), tmp_path / "a")
    longer = loop.train(tiny(text_file, **constant), tmp_path / "a", ["train.duration_steps"])
    assert longer["state_sha256"] == loop.train(tiny(text_file, **constant), tmp_path / "b")["state_sha256"]


def test_gradients_that_stay_non_finite_end_the_run_with_step_and_documents(text_file, tmp_path):
    config = tiny(text_file, optimizer__learning_rate=1e38, optimizer__clip_norm=0, train__max_nonfinite_steps=3)
    with pytest.raises(loop.NonFiniteError, match=r"3 steps in a row, the last one step \d+ with the documents .*numbers.txt"):
        loop.train(config, tmp_path)
    assert not (tmp_path / "run.lock").exists()


def test_a_run_starts_from_another_run(text_file, undisturbed, tmp_path):
    """With a learning rate of 0 it ends where the other one ended: at its average, which is what evaluation uses."""
    workdir, result = undisturbed
    config = tiny(text_file, init_from=workdir, optimizer__learning_rate=0.0, train__duration_steps=2)
    assert loop.train(config, tmp_path)["eval"]["loss"] == pytest.approx(result["eval"]["loss"], abs=1e-6)
    with pytest.raises(UserError, match="layers/.* is .* there and .* in this config's model"):
        loop.train(tiny(text_file, init_from=workdir, model__num_layers=3), tmp_path / "other")


@pytest.fixture(scope="module")
def kill() -> Any:
    """experiments/resume/kill.py"""
    spec = importlib.util.spec_from_file_location("kill", ROOT / "experiments/resume/kill.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "kill", module)  # where its dataclass looks itself up
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def undisturbed_processes(kill: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, tuple[str, float]]:
    folder = tmp_path_factory.mktemp("kills")
    return folder, kill.undisturbed(folder, STEPS_TO_KILL)


@pytest.mark.parametrize("which", [signal.SIGKILL, signal.SIGTERM])
def test_killed_runs_end_with_the_undisturbed_state(kill, undisturbed_processes, which):
    """The short form of experiments/resume/kill.py, in real processes."""
    folder, known = undisturbed_processes
    outcome = kill.campaign(folder, kills=2, which=which, steps=STEPS_TO_KILL, seed=1, known=known)
    assert len(outcome.kill_steps) == 2 and outcome.hashes and outcome.differing == 0
    if which == signal.SIGTERM:
        assert set(outcome.exit_statuses) == {75} and set(outcome.steps_lost) == {0}
