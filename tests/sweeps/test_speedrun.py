"""Speed-runs: the verdict is Student's, nothing but what is free may be set, and a record's files say what its runs gave."""

from __future__ import annotations

import hashlib
import json
import pathlib

import numpy as np
import pytest
from scipy import stats

from gptjax import cli
from gptjax.config import UserError
from gptjax.sweeps import speedrun
from tests.sweeps.drive import STUB

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]
TEXT = b"To be, or not to be.\n" * 50
RECIPE = "from gptjax import config as schema\n\ndef get_config():\n    config = schema.defaults()\n"


@pytest.fixture
def record(tmp_path) -> pathlib.Path:
    """A record without runs, in a track of a text of our own that asks for a loss of 1.88."""
    values = json.loads((REPOSITORY / "experiments/speedrun/track.json").read_text())
    values |= {"data_sha256": hashlib.sha256(TEXT).hexdigest(), "cores": 1}
    folder = tmp_path / "track/records/mine"
    folder.mkdir(parents=True)
    (tmp_path / "track/track.json").write_text(json.dumps(values))
    (tmp_path / "input.txt").write_bytes(TEXT)
    write_recipe(folder, "train.duration_steps = 40")
    return folder


def write_recipe(folder: pathlib.Path, *lines: str) -> None:
    (folder / "recipe.py").write_text(RECIPE + "".join(f"    config.{line}\n" for line in lines) + "    return config\n")


def speedrun_cli(monkeypatch, capfd, *words: str) -> tuple[int, str]:
    monkeypatch.setattr(speedrun.run, "__defaults__", (*speedrun.run.__defaults__[:-1], STUB))
    status = cli.main(["speedrun", *words])
    said = capfd.readouterr()
    return status, said.out if status < 2 else said.err


def test_verdict_is_students_one_sided_test():
    rng = np.random.default_rng(0)
    for n, mean in ((2, 1.87), (5, 1.86), (20, 1.9)):
        losses = rng.normal(mean, 0.02, n)
        runs = [speedrun.Run(seed, loss, 10.0 + seed) for seed, loss in enumerate(losses)]
        found, expected = speedrun.judge(runs, 1.88), stats.ttest_1samp(losses, 1.88, alternative="less")
        np.testing.assert_allclose(found.p, expected.pvalue, rtol=1e-12)
        times = [one.seconds for one in runs]
        interval = stats.ttest_1samp(times, 0).confidence_interval(0.95)
        np.testing.assert_allclose(found.interval, interval, rtol=1e-12)


@pytest.mark.parametrize(
    ("losses", "p"),
    [((1.0,), 1.0), ((1.0, np.nan), 1.0), ((1.0, np.inf), 1.0), ((1.5, 1.5), 0.0), ((1.88, 1.88), 1.0)],
)
def test_verdict_where_student_says_nothing(losses, p):
    assert speedrun.judge([speedrun.Run(seed, loss, None) for seed, loss in enumerate(losses)], 1.88).p == p


def test_runs_that_were_cut_off_have_no_time():
    runs = [speedrun.Run(0, 1.5, 10.0), speedrun.Run(1, 1.6, None), speedrun.Run(2, 1.7, 14.0)]
    verdict = speedrun.judge(runs, 1.88)
    assert (verdict.runs, verdict.seconds) == (3, 12.0)


def test_record_then_verify_then_list(record, monkeypatch, capfd, tmp_path):
    data, work = f"--data={tmp_path / 'input.txt'}", f"--workdir={tmp_path / 'work'}"
    status, said = speedrun_cli(monkeypatch, capfd, "record", str(record), data, work)
    assert status == 0 and "mean loss 1.2857 is below 1.88" in said
    written = json.loads((record / "record.json").read_text())
    assert [one["loss"] for one in written["runs"]] == [1 + seed / 7 for seed in range(5)]
    assert all(one["seconds"] > 1 for one in written["runs"])  # 40 steps of 0.03 s and a start
    assert len((record / "logs/4.jsonl").read_text().splitlines()) == 40

    work = f"--workdir={tmp_path / 'again'}"
    status, said = speedrun_cli(monkeypatch, capfd, "verify", str(record), data, work)
    assert status == 0 and said.count("as recorded") == 5
    written["runs"][2]["loss"] = 1.25
    (record / "record.json").write_text(json.dumps(written))
    status, said = speedrun_cli(monkeypatch, capfd, "verify", str(record), data, work)  # its runs are there already
    assert status == 0 and "seed 2: loss 1.285714, recorded 1.250000" in said

    track = record.parents[1] / "track.json"
    track.write_text(track.read_text().replace('"target": 1.88', '"target": 1.3'))
    status, said = speedrun_cli(monkeypatch, capfd, "verify", str(record), data, work)
    assert status == 1 and "not shown to be below 1.3" in said
    status, said = speedrun_cli(monkeypatch, capfd, "list", str(track.parent))
    assert status == 0 and "| mine (target not shown) |" in said


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ("evaluate.max_batches = 1", "evaluate.max_batches"),
        ("objective.name = 'masked'", "sets objective.name='masked', which"),
        ("data.drop_duplicates = True", "sets data.drop_duplicates=True, which"),
        ("modle.num_layers = 3", "modle"),
    ],
)
def test_only_what_is_free_may_be_set(record, monkeypatch, capfd, tmp_path, line, sentence):
    write_recipe(record, "train.duration_steps = 40", line)
    if "max_batches" in line:  # what the track fixes is laid over the recipe
        trials = speedrun.trials_of(speedrun.find_track(record), record, tmp_path / "input.txt", 5)
        assert trials[0].config.evaluate.max_batches == 0
        return
    status, said = speedrun_cli(monkeypatch, capfd, "record", str(record), f"--data={tmp_path / 'input.txt'}")
    assert status == 2 and sentence in said and said.count("\n") == 1


def test_what_is_no_record_is_said_in_a_sentence(record, tmp_path):
    track = speedrun.find_track(record)
    with pytest.raises(UserError, match="is no record yet"):
        speedrun.read_record(record)
    with pytest.raises(UserError, match="lies in no track"):
        speedrun.find_track(tmp_path)
    (tmp_path / "other.txt").write_text("another text")
    with pytest.raises(UserError, match="is not the track's text"):
        speedrun.trials_of(track, record, tmp_path / "other.txt", 5)
    with pytest.raises(UserError, match="cannot be read"):
        speedrun.trials_of(track, record, tmp_path / "missing.txt", 5)
    (record / "record.json").write_text(json.dumps({"runs": [{"seed": 1, "loss": 1.0, "seconds": 2.0}]}))
    with pytest.raises(UserError, match="must have the seeds 0, 1, 2"):
        speedrun.read_record(record)


def test_the_repositorys_recipes_set_only_what_is_free(monkeypatch, tmp_path):
    monkeypatch.setattr(speedrun, "_check_data", lambda track, data: None)  # the text is not in the repository
    (tmp_path / "input.txt").write_bytes(TEXT)
    recipes = list(REPOSITORY.glob("experiments/speedrun/records/*/recipe.py"))
    assert recipes
    for path in recipes:
        track = speedrun.find_track(path.parent)
        trials = speedrun.trials_of(track, path.parent, tmp_path / "input.txt", track.seeds)
        assert [trial.config.train.seed for trial in trials] == list(range(track.seeds))


def test_the_repositorys_records_hold():
    """Each record that has runs meets the target beyond chance by them."""
    for path in REPOSITORY.glob("experiments/speedrun/records/*/record.json"):
        track = speedrun.find_track(path.parent)
        runs = speedrun.read_record(path.parent)
        assert speedrun.judge(runs, track.target).holds(track)
        assert all((path.parent / f"logs/{one.seed}.jsonl").is_file() for one in runs)
