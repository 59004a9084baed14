"""Searches: what is suggested follows from the record alone, however often the driver was killed; and how each end is told."""

from __future__ import annotations

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import optuna
import pytest

from gptjax.config import UserError
from gptjax.sweeps import locks
from gptjax.sweeps.definition import Sweep, load_sweep
from gptjax.sweeps.folder import SweepFolder
from gptjax.sweeps.locks import SharedLock
from gptjax.sweeps.search import Search
from gptjax.sweeps.space import choice, integers, log_uniform
from gptjax.sweeps.study import FILE_NAME, Study, open_journal
from gptjax.sweeps.table import read_rows, search_lines
from tests.sweeps import drive_search
from tests.sweeps.drive_search import SPACE, drive, searcher

ROOT = pathlib.Path(__file__).resolve().parents[2]


def record(path: pathlib.Path) -> list[tuple]:
    """All that a search's trials came to, but for times."""
    storage, study = open_journal(path)
    return [
        (trial.number, trial.params, trial.state.name, trial.values, trial.intermediate_values, trial.user_attrs.get("why"))
        for trial in storage.get_all_trials(study)
    ]


def start(path: pathlib.Path, **options) -> subprocess.Popen:
    command = [sys.executable, str(ROOT / "tests/sweeps/drive_search.py"), str(path), json.dumps(options)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, cwd=ROOT, start_new_session=True)


def told(study: Study, number: int, value: float) -> None:
    study.tell(number, optuna.trial.TrialState.COMPLETE, value)


def bowl(params: dict[str, float]) -> float:
    return (np.log10(params["optimizer.learning_rate"]) + 2) ** 2 + 0.3 * (params["model.num_layers"] - 3) ** 2


# --- killed and started again ---


@pytest.mark.parametrize(("sampler", "pruner"), [("tpe", "median"), ("cmaes", "hyperband")])
def test_killed_and_started_again_it_makes_the_trials_of_an_undisturbed_search(tmp_path, sampler, pruner):
    drive(tmp_path / "whole", sampler=sampler, pruner=pruner)
    rng, path = random.Random(0), tmp_path / "killed"
    path.mkdir()
    for kill in range(4):
        running = start(path, sampler=sampler, pruner=pruner, prompt="slow")
        already = len(list(path.glob("trials/*/result.json")))
        deadline = time.monotonic() + 60
        while len(list(path.glob("trials/*/starts"))) <= already and running.poll() is None and time.monotonic() < deadline:
            time.sleep(0.01)
        time.sleep(rng.uniform(0, 0.5))
        running.kill()
        running.wait()
        if kill % 2:  # with what it had started
            for started in path.glob("trials/*/starts"):
                for pid in started.read_text().split():
                    if not (started.parent / "result.json").exists() and pathlib.Path(f"/proc/{pid}").exists():
                        os.kill(int(pid), signal.SIGKILL)
    drive(path, sampler=sampler, pruner=pruner, prompt="slow")
    whole, killed = record(tmp_path / "whole"), record(path)
    assert killed == whole and len(whole) == 12
    assert {row[2] for row in whole} == {"COMPLETE", "PRUNED"}
    assert len(list(path.glob("trials/*"))) == 12


def test_a_line_that_a_kill_cut_off_is_dropped_and_the_trial_asked_again(tmp_path):
    first = Study(tmp_path, Search(5, seed=3), SPACE)
    expected = [first.ask().params for _ in range(2)]
    content = (tmp_path / FILE_NAME).read_bytes()
    (tmp_path / FILE_NAME).write_bytes(content[:-20])
    again = Study(tmp_path, Search(5, seed=3), SPACE)
    assert [trial.params for trial in again.trials()] == expected[:1]
    assert again.ask().params == expected[1]
    (tmp_path / FILE_NAME).write_bytes(b'{"torn\n' + (tmp_path / FILE_NAME).read_bytes())
    with pytest.raises(UserError, match=r"study\.journal is damaged"):
        Study(tmp_path, Search(5, seed=3), SPACE)


@pytest.mark.parametrize("sampler", ["tpe", "random", "cmaes", "grid"])
def test_a_suggestion_follows_from_the_record_whichever_process_makes_it(tmp_path, sampler):
    space = {"model.num_layers": integers(1, 4), "train.seed": integers(0, 5)} if sampler == "grid" else SPACE
    search = Search(24, sampler, seed=2)
    one = Study(tmp_path / "one", search, space)
    for number in range(24):
        other = Study(tmp_path / "two", search, space)  # a new one for each trial
        params = one.ask().params
        assert other.ask().params == params
        for study in (one, other):
            told(study, number, sum(params.values()))
    assert one.ask() is None
    if sampler == "grid":
        assert len({tuple(trial.params.values()) for trial in one.trials()}) == 24
    assert {tuple(t.params.values()) for t in one.trials()} != {
        tuple(t.params.values()) for t in _filled(tmp_path / "seed", Search(24, sampler, seed=3), space, sum)
    } or sampler == "grid"


def _filled(path, search, space, function):
    study = Study(path, search, space)
    while (trial := study.ask()) is not None:
        told(study, trial.number, function(trial.params.values()))
    return study.trials()


def test_our_cmaes_draws_what_its_algorithm_does(tmp_path):
    """Against the package `cmaes` driven by hand, one optimizer kept over all generations."""
    import cmaes

    study = Study(tmp_path, Search(40, "cmaes", seed=5), SPACE)
    optimizer = cmaes.CMA(mean=np.full(2, 0.5), sigma=1 / 6, bounds=np.tile([0.0, 1.0], (2, 1)), n_max_resampling=20)
    solutions = []
    for number in range(40):
        optimizer.reseed_rng(int(np.random.SeedSequence([5, number]).generate_state(1)[0]))
        x, y = optimizer.ask()
        by_hand = {"optimizer.learning_rate": 1e-4 * 4000**x, "model.num_layers": round(0.5 + 6 * y)}
        params = study.ask().params
        assert params == pytest.approx(by_hand, rel=1e-9)
        told(study, number, bowl(params))
        solutions.append((np.array([x, (params["model.num_layers"] - 0.5) / 6]), bowl(params)))
        if len(solutions) == optimizer.population_size:
            optimizer.tell(solutions)
            solutions = []
    assert optimizer.generation >= 6
    assert "pickle" not in (tmp_path / FILE_NAME).read_text() and "optimizer:" not in (tmp_path / FILE_NAME).read_text()


# --- how trials end ---


def test_failures_and_refusals_are_recorded_and_the_rest_go_on(tmp_path):
    space = {"optimizer.learning_rate": log_uniform(1e-2, 10.0), "model.num_heads": choice([2, 3])}  # width 64 is not 3 * n
    assert drive(tmp_path, space=space, sampler="random", trials=14) == 1
    trials = record(tmp_path)
    by_state: dict[str, list] = {}
    for trial in trials:
        by_state.setdefault(trial[2], []).append(trial)
    assert set(by_state) == {"COMPLETE", "FAIL", "PRUNED"} and sum(map(len, by_state.values())) == 14
    assert all(trial[1]["model.num_heads"] == 3 and "num_heads" in trial[5] for trial in by_state["PRUNED"])
    assert all(trial[1]["optimizer.learning_rate"] > 0.5 for trial in by_state["FAIL"])
    assert {trial[5] for trial in by_state["FAIL"]} == {"crash: ValueError: it diverged at once"}

    definition = SweepFolder(tmp_path).read_definition()
    assert len(definition["search"]["refused"]) == len(by_state["PRUNED"])
    assert len(definition["trials"]) == len(list(tmp_path.glob("trials/*"))) == 14 - len(by_state["PRUNED"])
    said = search_lines(definition)
    assert said[0] == f"14 of 14 suggested by random, {len(by_state['PRUNED'])} of them refused by the config's checks"
    assert all("num_heads=3): " in line for line in said[1:]) and len(said) == 1 + len(by_state["PRUNED"])
    assert [row.state.status for row in read_rows(SweepFolder(tmp_path))].count("failed") == len(by_state["FAIL"])

    assert drive(tmp_path, space=space, sampler="random", trials=14) == 1
    assert record(tmp_path) == trials, "nothing was missing"

    healed = (sys.executable, "-S", "-c", (ROOT / "tests/sweeps/stub_search_trial.py").read_text().replace("> 0.5", "> 99"))
    assert drive(tmp_path, space=space, sampler="random", trials=14, retry_failed=True, command=healed) == 0
    merged = searcher(tmp_path, space=space, sampler="random", trials=14).study.trials()
    assert [trial.params for trial in merged] == [trial[1] for trial in trials], "they keep their numbers"
    assert all(trial.state.name != "FAIL" for trial in merged)


def test_a_config_that_is_suggested_twice_is_run_once(tmp_path):
    space = {"model.num_layers": choice([2, 3])}
    assert drive(tmp_path, jobs=2, space=space, sampler="random", trials=6) == 0
    assert len(list(tmp_path.glob("trials/*/starts"))) == 2
    assert all(path.read_text().count("\n") == 1 for path in tmp_path.glob("trials/*/starts"))
    values = {(trial[1]["model.num_layers"], round(trial[3][0], 4)) for trial in record(tmp_path)}
    assert values == {(2, 1.3906), (3, 1.0906)}, "1 + (log10(0.02) + 2)^2, the recipe's rate, and 0.3 for a layer too few"


def test_several_drivers_share_a_search_and_each_goes_on_with_its_own(tmp_path):
    running = [start(tmp_path, worker=name, prompt="slow") for name in "ab"]
    deadline = time.monotonic() + 60
    while len(list(tmp_path.glob("trials/*/starts"))) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    running[0].kill()
    running[0].wait()
    assert running[1].wait(120) == 0
    open_before = [trial for trial in record(tmp_path) if trial[2] == "RUNNING"]
    assert len(open_before) <= 1, "the other one did not take what is the first one's"
    assert drive(tmp_path, worker="a", prompt="slow") == 0
    trials = record(tmp_path)
    assert [trial[0] for trial in trials] == list(range(12)) and {trial[2] for trial in trials} == {"COMPLETE"}


# --- pruning ---


def test_verdicts_are_those_of_optunas_own_loop(tmp_path):
    """The same curves through Optuna's ask, report, should_prune and tell, in one process that never dies."""
    search = Search(30, "random", "hyperband", seed=4, pruner_settings={"min_resource": 1, "max_resource": 9})
    ours = Study(tmp_path, search, SPACE)
    direct = optuna.create_study(
        study_name="search", pruner=optuna.pruners.HyperbandPruner(min_resource=1, max_resource=9), direction="minimize"
    )
    verdicts = []
    for number in range(30):
        params = ours.ask().params
        curve = [(step, bowl(params) + 5 / step) for step in range(1, 9)]
        direct.enqueue_trial(params)
        trial = direct.ask(ours._distributions)
        expected = None
        for step, value in curve:
            trial.report(value, step)
            if trial.should_prune():
                expected = step
                break
        direct.tell(trial, *((None, optuna.trial.TrialState.PRUNED) if expected else (bowl(params),)))
        seen = random.Random(number).randrange(len(curve))  # in two looks
        verdict = ours.judge(number, curve[:seen]) or ours.judge(number, curve, judged=seen)
        assert verdict == expected
        assert ours.judge(number, curve) == expected, "a driver that comes later sees all at once"
        ours.tell(number, *((optuna.trial.TrialState.PRUNED,) if verdict else (optuna.trial.TrialState.COMPLETE, bowl(params))))
        verdicts.append(verdict)
    assert {None, 1, 3} <= set(verdicts), "some go on, some end at each of two rungs"
    assert [t.intermediate_values for t in ours.trials()] == [t.intermediate_values for t in direct.trials]


# --- mistakes ---


def sweep_file(tmp_path: pathlib.Path, space: str, search: str) -> str:
    path = tmp_path / "sweep.py"
    path.write_text(
        "from gptjax.sweeps.definition import Sweep\nfrom gptjax.sweeps.search import Search\n"
        "from gptjax.sweeps.space import *\n\n"
        f"def get_sweep():\n    return Sweep('{drive_search.RECIPE}', {space}, search={search})\n"
    )
    return str(path)


RATE = '{"optimizer.learning_rate": log_uniform(1e-4, 1e-2)}'


@pytest.mark.parametrize(
    ("space", "search", "sentence"),
    [
        ('{"optimizer.learning_rat": log_uniform(1e-4, 1e-2)}', "Search(3)", "did you mean optimizer.learning_rate?"),
        ('{"model.num_layers": uniform(1, 4)}', "Search(3)", "model.num_layers=1.0 must be a whole number"),
        ('{"model.num_layers": integers(0, 4)}', "Search(3)", "model.num_layers=0 must be at least 1"),
        ('{"model.activation": choice(["gelu", "gelo"])}', "Search(3)", "did you mean gelu?"),
        ('{"model.num_layers": [1, 2]}', "Search(3)", "needs uniform, log_uniform, integers or choice"),
        (RATE, "None", "needs Sweep(..., search=Search(trials=...))"),
        ("seeds(3)", "Search(3)", "a search needs a space {key: distribution}"),
        (RATE, "Search(0)", "Search(trials=0) must be a whole number of at least 1"),
        (RATE, "Search(3, 'tep')", "did you mean tpe?"),
        (RATE, "Search(3, 'grid')", "a grid needs points, and optimizer.learning_rate is a range"),
        ('{"model.activation": choice(["gelu", "relu"])}', "Search(3, 'cmaes')", "model.activation is a choice"),
        (RATE, "Search(3, metric='loss')", "must name a figure of the evaluation"),
    ],
)
def test_a_search_that_cannot_be_is_refused_in_one_sentence(tmp_path, space, search, sentence):
    with pytest.raises(UserError) as refused:
        load_sweep(sweep_file(tmp_path, space, search))
    assert sentence in str(refused.value) and "sweep.py" in str(refused.value)


def test_settings_that_optuna_lacks_and_misspelt_overrides_leave_no_folder(tmp_path):
    from gptjax.sweeps.searcher import Searcher

    rate = {"optimizer.learning_rate": log_uniform(1e-4, 1e-2)}
    for search, overrides, sentence in (
        (Search(3, sampler_settings={"startup": 3}), [], "unexpected keyword argument 'startup'"),
        (Search(3, pruner="median", pruner_settings={"n_warmup_steps": -1}), [], "Number of warmup steps cannot be negative"),
        (Search(3, pruner="hyperband"), [], "Hyperband needs evaluations in a run's course"),
        (Search(3), ["train.sed=1"], "did you mean train.seed?"),
    ):
        sweep = Sweep(drive_search.RECIPE, rate, {"evaluate.every_steps": 0}, search=search)
        with pytest.raises(UserError) as refused:
            Searcher(SweepFolder(tmp_path / "x"), sweep, overrides)
        assert sentence in str(refused.value)
        assert not (tmp_path / "x").exists()


def test_another_search_in_the_same_folder_is_refused_and_more_trials_are_not(tmp_path):
    assert drive(tmp_path, trials=3) == 0
    with pytest.raises(UserError, match="would change in sampler from 'tpe' to 'random'"):
        drive(tmp_path, trials=3, sampler="random")
    assert drive(tmp_path, trials=4) == 0
    assert len(record(tmp_path)) == 4


def test_a_dead_holders_lock_is_had_at_once_and_a_silent_hosts_after_a_while(tmp_path, monkeypatch):
    path = tmp_path / "study.journal"
    killed = SharedLock(path)
    killed.acquire()
    os.close(killed._descriptor)  # as the kernel does for a process that dies
    began = time.monotonic()
    again = SharedLock(path)
    again.acquire()
    assert time.monotonic() - began < 1
    again.release()
    assert not (tmp_path / "study.journal.lock").exists()

    (tmp_path / ".study.journal.elsewhere").touch()
    os.link(tmp_path / ".study.journal.elsewhere", tmp_path / "study.journal.lock")
    monkeypatch.setattr(locks, "PATIENCE", 0.3)
    began = time.monotonic()
    again.acquire()
    assert time.monotonic() - began > 0.3
    again.release()
