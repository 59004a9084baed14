"""A run once more from its folder: the same bits, or the first number that differs; and what is refused."""

from __future__ import annotations

import json
import math
import pathlib
import shutil
from typing import Any

import pytest

from gptjax import cli
from gptjax.config import Config, UserError
from gptjax.train import loop
from gptjax.train.agreement import agreement
from gptjax.train.metrics import read_metrics
from gptjax.train.provenance import Change, changes, starts_of
from gptjax.train.reproduction import exit_status, lines, reaching, reproduce
from gptjax.train.rewind import Rewind
from tests.tasks.cases import case, write_records
from tests.train.runs import quiet, small_run, write_documents

STEPS = 6


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    return write_documents(tmp_path_factory.mktemp("documents") / "documents.jsonl")


@pytest.fixture(scope="module")
def run(folder, tmp_path_factory) -> pathlib.Path:
    workdir = tmp_path_factory.mktemp("run")
    loop.train(small_run(folder, train__duration_steps=STEPS), workdir)
    return workdir


@pytest.fixture
def copy(run, tmp_path) -> pathlib.Path:
    """The run's folder, to be changed."""
    return pathlib.Path(shutil.copytree(run, tmp_path / "copy"))


# --- comparing ----------------------------------------------------------------------------------------------------------------

ROWS = [
    {"step": 1, "tokens": 8, "train/loss": 2.5, "seconds": 1.0},
    {"step": 2, "train/loss": math.nan, "mfu": None},
    {"step": 2, "eval/loss": 2.25},
]


def test_equal_rows_agree_whatever_the_clock_said():
    other = [dict(row) | ({"seconds": 9.0} if "seconds" in row else {}) for row in ROWS]
    found = agreement(ROWS, other)
    assert found.is_exact and found.compared == 4 and found.largest == 0 and found.holds(0)
    assert (found.first_step, found.last_step) == (1, 2)
    assert not agreement([], ROWS).is_exact and not agreement([], ROWS).holds(1), "nothing was compared"


@pytest.mark.parametrize(
    ("row", "changed", "relative"),
    [
        (0, {"train/loss": math.nextafter(2.5, 3)}, 2**-51 / 2.5),
        (2, {"eval/loss": 2.0}, 1 / 9),
        (1, {"train/loss": 3.0}, math.inf),
        (0, {"tokens": 9}, 1 / 9),
    ],
)
def test_one_number_that_differs_is_found(row: int, changed: dict[str, Any], relative: float):
    other = [dict(one) | (changed if number == row else {}) for number, one in enumerate(ROWS)]
    found = agreement(ROWS, other)
    (one,) = found.differing
    assert (one.step, one.key) == (ROWS[row]["step"], next(iter(changed)))
    assert one.relative == pytest.approx(relative, rel=1e-6) and found.largest == one.relative
    assert not found.is_exact and found.holds(1.0) == math.isfinite(relative)


def test_a_number_that_was_not_computed_anew_is_no_agreement():
    found = agreement(ROWS, ROWS[:2])
    assert found.missing == ((2, "eval/loss"),) and not found.is_exact and not found.holds(1)
    assert agreement(ROWS, ROWS[:2], last=1).is_exact


def test_minus_zero_is_another_number():
    assert not agreement([{"step": 1, "x": 0.0}], [{"step": 1, "x": -0.0}]).is_exact


def test_what_differs_between_environments():
    then = {"versions": {"jax": "0.1", "numpy": "2"}, "hardware": {"cpu_cores": 2}, "git_dirty": True}
    now = {"versions": {"jax": "0.2", "numpy": "2", "optax": "1"}, "hardware": {"cpu_cores": 4}, "git_dirty": True, "flags": {}}
    assert changes(then, now) == [
        Change("versions.jax", "0.1", "0.2"),
        Change("hardware.cpu_cores", 2, 4),
        Change("versions.optax", None, "1"),
    ]


def test_a_prefix_reaches_past_the_spikes_that_changed_it():
    rewinds = [Rewind(27, 26, 24, 9.0, 3.0, 16), Rewind(31, 30, 26, 9.0, 3.0, 40)]
    assert [reaching(rewinds, step) for step in (24, 25, 26, 27, 28, 31, 32)] == [24, 31, 31, 31, 31, 31, 32]
    assert reaching(rewinds[:1], 25) == 27


# --- runs ---------------------------------------------------------------------------------------------------------------------


def test_a_run_is_reproduced_to_the_bit_and_nothing_in_its_folder_changes(run, capsys):
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert cli.main(["reproduce", str(run), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["exact"] and told["steps"] == told["of_steps"] == STEPS
    assert [change for change in told["environment"] if not change["name"].startswith("git_")] == []
    assert told["state_sha256"]["now"] == json.loads((run / "result.json").read_text())["state_sha256"]
    assert {"train/loss", "gradient_norm", "learning_rate", "eval/loss"} <= set(told["numbers"]["keys"])
    # tokens and 6 figures at each step; 5 more of the evaluations at steps 2, 4 and 6
    assert told["numbers"]["compared"] == 7 * STEPS + 5 * 3 and told["samples"] == {"compared": 3, "same": 3}
    after = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and "reproduction" not in path.parts}
    assert after == before
    assert cli.main(["reproduce", str(run)]) == 0, "what is done is compared again"
    assert "bit for bit: every number is the recorded one." in capsys.readouterr().out


def test_a_changed_number_is_named_and_a_tolerance_accepts_it(run, copy, capsys):
    rows = read_metrics(copy / "metrics.jsonl")
    row = next(row for row in rows if row["step"] == 3)
    was, row["train/loss"] = row["train/loss"], row["train/loss"] * (1 + 1e-4)
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    again = ["reproduce", str(copy), "--steps=4"]
    assert cli.main(again) == 1
    told = capsys.readouterr().out
    assert f"first difference: train/loss at step 3: {row['train/loss']!r} recorded, {was!r} now (relative 0.0001)" in told
    assert "not bit for bit: within a relative difference of 0.0001, at 1 of 38 numbers." in told
    assert cli.main([*again, "--tolerance=2e-4"]) == 0 and cli.main([*again, "--tolerance=1e-5"]) == 1


class Killed(Exception):
    pass


def test_a_killed_reproduction_goes_on(run, tmp_path, monkeypatch):
    taken = []
    read = loop._read

    def watched(one: Any, step: int, metrics: Any) -> None:
        taken.append(step)
        if len(taken) == 4:
            raise Killed
        read(one, step, metrics)

    monkeypatch.setattr(loop, "_read", watched)
    with pytest.raises(Killed):
        reproduce(run, tmp_path / "again", log=quiet)
    assert not json.loads((tmp_path / "again" / "reproduction.json").read_text())["ended"]
    found = reproduce(run, tmp_path / "again", log=quiet)
    assert found.is_exact and exit_status(found) == 0
    assert taken == [1, 2, 3, 4, 4, 5, 6], "from the checkpoint of step 3"
    assert json.loads((tmp_path / "again" / "reproduction.json").read_text())["ended"]


def test_a_prefix_and_then_the_rest(run, tmp_path, monkeypatch):
    found = reproduce(run, tmp_path / "again", steps=3, log=quiet)
    assert found.is_exact and found.steps == 3 and found.states is None and found.agreement.last_step == 3
    monkeypatch.setattr(loop, "initial_params", None)  # the rest begins where the prefix ended
    found = reproduce(run, tmp_path / "again", log=quiet)
    assert found.is_exact and found.states is not None and found.agreement.last_step == STEPS


def test_a_run_that_has_not_ended_and_is_older_than_provenance(copy, tmp_path):
    """Killed behind step 5: it is reproduced to the last number that it wrote down."""
    rows = read_metrics(copy / "metrics.jsonl")
    (copy / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows if row["step"] <= 5))
    (copy / "result.json").unlink()
    (copy / "provenance.json").unlink()
    found = reproduce(copy, log=quiet)
    assert found.is_exact and found.steps == 5 and found.of_steps is None
    assert any("does not say which data it had" in line for line in lines(found))
    assert any("the run's is not known" in line for line in lines(found))


# --- what is refused ----------------------------------------------------------------------------------------------------------


def refused(folder: pathlib.Path, said: str, **arguments: Any) -> None:
    with pytest.raises(UserError, match=said):
        reproduce(folder, log=quiet, **arguments)


def test_refusals(run, copy, tmp_path):
    refused(tmp_path, "is not a run's folder: it has no config.json")
    refused(run, "--steps=7 is more than the 6 steps that .*metrics.jsonl has rows of", steps=7)
    refused(run, "config.model.num_layers=3 would make another run: .* had 2", overrides=["model.num_layers=3"])
    refused(run, "copy holds something else than a reproduction; take another --workdir", workdir=copy)
    refused(run, "holds something else than a reproduction", workdir=run)
    (copy / "metrics.jsonl").unlink()
    refused(copy, "metrics.jsonl does not exist")
    (tmp_path / "of").mkdir()
    (tmp_path / "of" / "reproduction.json").write_text(json.dumps({"of": "/another/run"}))
    refused(run, "of holds the reproduction of /another/run; take another --workdir", workdir=tmp_path / "of")


def test_other_data_are_refused_by_their_fingerprint(run, folder, tmp_path):
    other = tmp_path / "documents.jsonl"
    other.write_text(folder.read_text().replace("a", "b", 1))
    print_now = starts_of(run)[0]["data"]["data"][:12]
    said = f"was trained on other data: the fingerprint of data was {print_now} and is "
    refused(run, said, workdir=tmp_path / "other", overrides=[f"data.path={other}"])
    refused(run, "nowhere.jsonl", workdir=tmp_path / "none", overrides=["data.path=nowhere.jsonl"])
    shutil.copy(folder, other)  # the same text elsewhere is the same data
    found = reproduce(run, tmp_path / "moved", steps=1, overrides=[f"data.path={other}"], log=quiet)
    assert found.is_exact


# --- a fine-tuned run ---------------------------------------------------------------------------------------------------------


def fine_tuned(run: pathlib.Path, records: pathlib.Path) -> Config:
    knobs = {"model__num_layers": 2, "model__num_heads": 4, "model__residual_dropout": 0.0, "data__add_bos": False}
    return case("classification", records, init_from=run, train__duration_steps=3, evaluate__every_steps=0, **knobs)


def test_a_fine_tuned_run_is_reproduced_from_what_it_began_with(run, copy, tmp_path):
    records = write_records(tmp_path / "records.jsonl")
    workdir = tmp_path / "tuned"
    loop.train(fine_tuned(copy, records), workdir)
    assert starts_of(workdir)[0]["init_from"]["step"] == STEPS
    found = reproduce(workdir, log=quiet)
    assert found.is_exact and found.states is not None

    shutil.rmtree(copy / "checkpoints" / f"{STEPS:08d}")  # an older one is the newest now
    said = r"init_from=.*copy holds other parameters now \(step 5, sha256 .*\) than .*tuned began with \(step 6, sha256 "
    refused(workdir, said, workdir=tmp_path / "b")
    shutil.rmtree(copy)
    refused(workdir, "init_from=.*copy, whose parameters .*tuned began with, is not there any more", workdir=tmp_path / "c")
    records.write_text(records.read_text().replace("red", "rod", 1))
    refused(workdir, "was trained on other data: the fingerprint of ", workdir=tmp_path / "d", overrides=[f"init_from={run}"])


def test_starts_are_noted_where_they_differ(run, copy, monkeypatch):
    assert [start["from_step"] for start in starts_of(run)] == [0]
    longer = small_run(pathlib.Path(json.loads((run / "config.json").read_text())["data"]["path"]), train__duration_steps=7)
    loop.train(longer, copy, allow_changes=["train.duration_steps"])
    first, second = starts_of(copy)
    assert second["from_step"] == STEPS and second["config_changes"] == {"train.duration_steps": [STEPS, 7]}
    assert {name: first[name] for name in ("data", "versions", "flags")} == {
        name: second[name] for name in ("data", "versions", "flags")
    }
