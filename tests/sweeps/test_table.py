"""What is said of trials: why each failed, how far each is, and from where any shell reads it."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import socket
import time
import types

import pytest

from gptjax import cli, recipes
from gptjax.config import UserError
from gptjax.sweeps.folder import State, SweepFolder
from gptjax.sweeps.outcome import judge, read_log
from gptjax.sweeps.table import LiveTable, estimate, latest_metrics, lines, read_rows, summary
from gptjax.train.run import start_time
from tests.sweeps.drive import RECIPE, prepare

TRACEBACK = [
    "Traceback (most recent call last):",
    '  File "a.py", line 3, in f',
    "ValueError: the first one",
    "",
    "The above exception was the direct cause of the following exception:",
    "",
    "Traceback (most recent call last):",
    '  File "a.py", line 5, in g',
    "jax.errors.TracerBoolConversionError: Attempted boolean conversion of traced array",
    "--------------------",
    "For simplicity, JAX has removed its internal frames from the traceback of the following exception.",
]


@pytest.mark.parametrize(
    ("status", "log", "more", "expected"),
    [
        (0, [], {"finished": True}, ("done", "", "")),
        (-9, [], {"finished": True}, ("done", "", "")),
        (2, ["going on", "gptjax: data.path=x does not exist."], {}, ("failed", "config", "data.path=x does not exist.")),
        (
            1,
            ["gptjax: the gradient was not finite in 2 steps"],
            {},
            ("failed", "nonfinite", "the gradient was not finite in 2 steps"),
        ),
        (1, TRACEBACK, {}, ("failed", "crash", TRACEBACK[8])),
        (1, ["MemoryError: no"], {}, ("failed", "memory", "MemoryError: no")),
        (-6, ["terminate called after throwing an instance of 'std::bad_alloc'"], {}, None),
        (-9, [], {}, ("failed", "memory", "killed by SIGKILL, which its driver did not send: most likely out of memory.")),
        (-11, ["step 3"], {}, ("failed", "crash", "killed by SIGSEGV: step 3")),
        (-9, [], {"timeout": 5.0}, ("failed", "timeout", "it ran longer than 5 s.")),
        (-15, [], {"stopped_by_us": True}, ("stopped", "", "it was told to stop.")),
        (75, ["gptjax: stopped by SIGTERM and saved"], {}, ("stopped", "", "stopped by SIGTERM and saved")),
        (0, [], {}, ("failed", "crash", "it ended with status 0, but left no result.json.")),
        (None, TRACEBACK, {}, ("failed", "crash", TRACEBACK[8])),
        (None, ["step 3"], {}, ("stopped", "", "it ended unseen, after its driver had died; the next start goes on.")),
    ],
)
def test_why_a_trial_ended(status, log, more, expected):
    outcome = judge(status, log, **({"finished": False} | more))
    assert (outcome.kind == "memory") if expected is None else dataclasses.astuple(outcome) == expected


def test_the_sentence_of_a_run_that_diverges_is_known_by_its_beginning(monkeypatch):
    from gptjax.train import loop

    monkeypatch.setattr(loop, "batch_documents", lambda *_: ["a.txt"])
    config = recipes.load_recipe(RECIPE, ["train.max_nonfinite_steps=2"])
    run = types.SimpleNamespace(config=config, dataset=types.SimpleNamespace(train=None), line=lambda text: None)
    run.watch = types.SimpleNamespace(skipped_rows=0)
    with pytest.raises(loop.NonFiniteError) as ended:
        loop._check_finite(run, 5, 2)
    outcome = judge(1, ["step 4", f"gptjax: {ended.value}"], finished=False)
    assert outcome.kind == "nonfinite" and outcome.why == str(ended.value)


def test_only_the_latest_start_is_looked_at(tmp_path):
    path = tmp_path / "trial.log"
    assert read_log(path) == []
    path.write_text("--- start 1, x\ngptjax: the gradient was not finite\n--- start 2, y\nstep 3\n")
    assert read_log(path) == ["step 3"]


def fill(tmp_path) -> tuple[SweepFolder, list[str]]:
    """Done, failed, half-way, waiting."""
    folder, trials = prepare(tmp_path, ["a", "b", "c", "d"])
    names = [trial.name for trial in trials]
    (folder.trial(names[0]) / "result.json").write_text(json.dumps({"eval": {"loss": 1.25}}))
    own = {"host": socket.gethostname(), "pid": os.getpid(), "process": start_time(os.getpid())}
    folder.write_state(names[0], State("done", seconds=20.0, loss=1.25))
    folder.write_state(names[1], State("failed", "timeout", "it ran longer than 5 s.", seconds=5.0))
    folder.write_state(names[2], State("running", started=time.time() - 10, **own))
    rows = [{"step": 10, "train/loss": 2.5, "seconds": 10.0}, {"step": 10, "eval/loss": 2.25}]
    (folder.trial(names[2]) / "metrics.jsonl").write_text("\n".join(map(json.dumps, rows)) + '\n{"step": 11, "tr')
    return folder, names


def test_the_table_is_read_from_the_folders(tmp_path):
    folder, _ = fill(tmp_path)
    rows = read_rows(folder)
    assert [row.state.status for row in rows] == ["done", "failed", "running", "waiting"]
    assert [row.loss for row in rows] == [1.25, None, 2.25, None]
    assert rows[2].progress == 0.25 and rows[2].remaining == pytest.approx(30), "10 of 40 steps in 10 s"
    # one is done in 20 s, one will be in 40: 30 left and 30 for the one that waits, one or two at a time
    assert estimate(rows, 1) == pytest.approx(60, abs=1) and estimate(rows, 2) == pytest.approx(30, abs=1)
    assert summary(rows, 1).startswith("1 of 4 done, 1 running, 1 waiting, 1 failed (1 timeout); about 1:0")
    text = "\n".join(lines(rows, 1))
    assert "failed (timeout)" in text and "it ran longer than 5 s." in text and "2.2500" in text and "25%" in text
    assert len(lines(rows, 1, width=60, most=2)) == 5 and max(map(len, lines(rows, 1, width=60))) <= 60


def test_status_from_another_shell(tmp_path, capsys):
    folder, names = fill(tmp_path)
    assert cli.main(["status", str(tmp_path)]) == 0
    assert "1 of 4 done, 1 running" in capsys.readouterr().out
    assert cli.main(["status", str(tmp_path), "--json"]) == 0
    trials = json.loads(capsys.readouterr().out)["trials"]
    assert [trial["status"] for trial in trials] == ["done", "failed", "running", "waiting"]
    state = folder.state(names[2])
    folder.write_state(names[2], dataclasses.replace(state, process="another start of this number"))
    assert folder.observed(names[2]).status == "stopped"
    assert cli.main(["status", str(tmp_path / "trials")]) == 2
    assert "is not a sweep's folder" in capsys.readouterr().err


def test_a_damaged_state_is_named(tmp_path):
    folder, names = fill(tmp_path)
    (folder.trial(names[1]) / "trial.json").write_text("{")
    with pytest.raises(UserError, match="trial.json is not valid JSON"):
        read_rows(folder)


def test_the_last_values_of_a_long_file(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step, "train/loss": 1 / (step + 1)}) + "\n" for step in range(5000)))
    assert latest_metrics(path) == {"step": 4999, "train/loss": 1 / 5000}


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_the_live_table_draws_over_itself_on_a_terminal_only(tmp_path, monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    folder, _ = fill(tmp_path)
    terminal = Terminal()
    table = LiveTable(folder, 1, terminal, interval=0.0)
    table.show()
    height = terminal.getvalue().count("\n")
    table.show()
    assert f"\x1b[{height}F\x1b[J" in terminal.getvalue()
    plain = io.StringIO()
    table = LiveTable(folder, 1, plain, interval=0.0)
    table.show()
    assert plain.getvalue() == ""
    table.close()
    assert "1 of 4 done" in plain.getvalue() and "\x1b" not in plain.getvalue()
