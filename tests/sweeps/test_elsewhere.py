"""The same trials on SLURM, by submitit or what stands for it here, and on Kubernetes, as manifests."""

from __future__ import annotations

import dataclasses
import io
import os
import pathlib
import signal
import sys
import threading
import time
import types

import pytest
import yaml

from gptjax import cli, recipes
from gptjax.config import UserError
from gptjax.sweeps import attempt
from gptjax.sweeps.definition import Sweep, make_trials
from gptjax.sweeps.folder import State, SweepFolder
from gptjax.sweeps.jobset import manifests
from gptjax.sweeps.slurm import TrialJob, run_on_slurm
from gptjax.sweeps.space import grid, seeds
from gptjax.sweeps.table import LiveTable
from tests.sweeps.drive import RECIPE, STUB, prepare

ROOT = pathlib.Path(__file__).resolve().parents[2]
SWEEP = Sweep(RECIPE, seeds(2), cores=3, slurm={"timeout_min": 2})


@dataclasses.dataclass
class Job:
    """Of submitit's: its state is what SLURM says."""

    folder: pathlib.Path
    job_id: str
    state: str = "COMPLETED"
    ends_at: float = 0.0

    def done(self, force_check: bool = False) -> bool:
        return self.job_id not in Queue.live


class Queue:
    """Stands for submitit: `submit_array` runs each job at once, but for those told otherwise by `ends`."""

    live: set[str] = set()
    submitted: list[list[str]] = []
    settings: dict[str, object] = {}
    ends: dict[str, str] = {}  # trial's name to the state that SLURM ends it with, before it has said a word

    def __init__(self, folder: pathlib.Path, cluster: str):
        assert cluster == "slurm"
        self.folder = folder

    def update_parameters(self, **settings: object) -> None:
        if "slurm_partitoin" in settings:
            raise NameError("Unknown argument slurm_partitoin.\nValid arguments are ...")
        Queue.settings = settings

    def submit_array(self, jobs: list[TrialJob]) -> list[Job]:
        Queue.submitted.append([job.name for job in jobs])
        made = []
        for number, job in enumerate(jobs):
            state = Queue.ends.get(job.name, "COMPLETED")
            if job.name not in Queue.ends:
                job()
            made.append(Job(self.folder, f"{len(Queue.submitted)}_{number}", state))
        return made


@pytest.fixture
def queue(monkeypatch):
    Queue.live, Queue.submitted, Queue.ends = set(), [], {}
    helpers = types.SimpleNamespace(DelayedSubmission=lambda job: job)
    fake = types.SimpleNamespace(AutoExecutor=Queue, SlurmJob=Job, LocalJob=Job, helpers=helpers)
    monkeypatch.setitem(sys.modules, "submitit", fake)
    return Queue


def on_slurm(folder: SweepFolder, trials, sweep: Sweep = SWEEP, retry_failed: bool = False, **options) -> tuple[int, str]:
    said = io.StringIO()
    table = LiveTable(folder, 2, said)
    status = run_on_slurm(folder, sweep, trials, 2, retry_failed, table, command=STUB, interval=0.02, **options)
    return status, said.getvalue()


def test_one_array_of_what_is_missing(tmp_path, queue):
    folder, trials = prepare(tmp_path, ["ok", "crash", "ok"])
    (folder.trial(trials[2].name) / "result.json").write_text('{"eval": {"loss": 1.5}}')
    status, said = on_slurm(folder, trials)
    assert status == 1 and queue.submitted == [[trials[0].name, trials[1].name]]
    assert queue.settings["slurm_array_parallelism"] == 2 and queue.settings["cpus_per_task"] == 3
    assert [folder.observed(trial.name).status for trial in trials] == ["done", "failed", "done"]
    assert folder.state(trials[1].name).why == "ValueError: seed 1 is unlucky" and "2 jobs submitted, 0 in the queue" in said
    assert on_slurm(folder, trials)[0] == 1 and len(queue.submitted) == 1, "nothing is missing"
    assert on_slurm(folder, trials, retry_failed=True)[0] == 1 and queue.submitted[1] == [trials[1].name]


@pytest.mark.parametrize(
    ("said", "status", "kind"),
    [
        ("OUT_OF_MEMORY", "failed", "memory"),
        ("TIMEOUT", "failed", "timeout"),
        ("CANCELLED by 0", "stopped", ""),
        ("FAILED", "failed", "crash"),
    ],
)
def test_what_slurm_says_counts_where_the_trial_could_not_speak(tmp_path, queue, said, status, kind):
    folder, trials = prepare(tmp_path, ["ok"])
    queue.ends = {trials[0].name: said}
    assert on_slurm(folder, trials)[0] == 1
    state = folder.state(trials[0].name)
    assert (state.status, state.kind) == (status, kind) and f"SLURM ended job 1_0 with {said.split()[0]}" in state.why


def test_the_driver_may_go_and_come_back_while_jobs_wait(tmp_path, queue):
    folder, trials = prepare(tmp_path, ["ok", "ok"])
    queue.ends = {trial.name: "PENDING" for trial in trials}
    queue.live = {"1_0", "1_1"}
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGTERM)).start()
    status, said = on_slurm(folder, trials)
    assert status == 75 and "2 jobs stay in the queue" in said
    assert [folder.state(trial.name).status for trial in trials] == ["queued", "queued"]

    def run_them() -> None:
        for trial in trials:
            TrialJob(folder.path, trial.name, 0.0, STUB)()

    running = threading.Thread(target=run_them)
    running.start()
    status, said = on_slurm(folder, trials)
    running.join()
    assert status == 0 and len(queue.submitted) == 1 and "0 jobs submitted, 2 in the queue already" in said


def test_before_a_job_is_preempted_its_trial_saves(tmp_path, queue):
    folder, trials = prepare(tmp_path, ["ok"])
    job = TrialJob(folder.path, trials[0].name, 0.0, STUB)
    ended: list[str] = []
    running = threading.Thread(target=lambda: ended.append(job()))
    running.start()
    metrics = folder.trial(trials[0].name) / "metrics.jsonl"
    deadline = time.monotonic() + 60
    while not (metrics.exists() and metrics.read_text().count("\n") > 3):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    job._attempt.stop()
    running.join()
    again = job.checkpoint()
    assert ended == ["stopped"] and isinstance(again, TrialJob) and (again.name, again.command) == (job.name, STUB)
    assert again() == "done" and folder.state(trials[0].name).starts == 2


def test_the_jobs_name_lets_a_requeued_one_take_its_folder_back(tmp_path, queue, monkeypatch):
    monkeypatch.setenv("SLURM_ARRAY_JOB_ID", "17")
    monkeypatch.setenv("SLURM_ARRAY_TASK_ID", "3")
    folder, trials = prepare(tmp_path, ["crash"])
    seen: list[dict] = []
    start = attempt.subprocess.Popen
    monkeypatch.setattr(attempt.subprocess, "Popen", lambda *words, **more: seen.append(more["env"]) or start(*words, **more))
    assert TrialJob(folder.path, trials[0].name, 0.0, STUB)() == "failed"
    assert seen[0]["GPTJAX_JOB"] == "slurm-17_3" and folder.state(trials[0].name).job == "slurm-17_3"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"timeout_min": 2, "nodes": 2}, "nodes=2, but a trial is one process; launch/slurm.sbatch"),
        ({"timeout_min": 2, "slurm_partitoin": "a"}, "Unknown argument"),
        ({}, r"time limit in minutes: Sweep\(slurm="),
    ],
)
def test_settings_that_slurm_cannot_take(tmp_path, queue, settings, sentence):
    folder, trials = prepare(tmp_path, ["ok"])
    with pytest.raises(UserError, match=sentence):
        on_slurm(folder, trials, dataclasses.replace(SWEEP, slurm=settings))


def test_without_submitit_the_extra_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "submitit", None)
    folder, trials = prepare(tmp_path, ["ok"])
    with pytest.raises(UserError, match=r"pip install 'gptjax\[slurm\]'"):
        on_slurm(folder, trials)


@pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")  # it leaves its processes to end by themselves
def test_submitit_itself(tmp_path):
    """The real package, with its executor that starts processes here in place of SLURM."""
    pytest.importorskip("submitit", reason="submitit is not installed (extra: slurm)")
    folder, trials = prepare(tmp_path, ["ok", "crash"])
    status, _ = on_slurm(folder, trials, cluster="local")
    assert status == 1 and [folder.observed(trial.name).status for trial in trials] == ["done", "failed"]
    assert on_slurm(folder, trials, cluster="local")[0] == 1
    with pytest.raises(UserError, match="--where=slurm: "):  # there is no SLURM here
        on_slurm(folder, trials)


# --- Kubernetes ---

JOBSET = {"name": "lr", "image": "registry.example/gptjax:1", "topology": "v5e:2x4", "env": ["A=1", "B=2"]}


def test_a_manifest_for_each_trial():
    sweep = Sweep(RECIPE, grid({"optimizer.learning_rate": [0.1, 0.2]}), {"optimizer.no_decay": ("norm", "bias")}, jobset=JOBSET)
    trials = make_trials(sweep, ["train.duration_steps=7"])
    made = list(yaml.safe_load_all(manifests(sweep, trials, ["train.duration_steps=7"], "gs://bucket/sweeps/lr/")))
    assert [manifest["metadata"]["name"] for manifest in made] == [f"lr-{trial.hash}" for trial in trials]
    for manifest, trial in zip(made, trials, strict=True):
        (container,) = manifest["spec"]["replicatedJobs"][0]["template"]["spec"]["template"]["spec"]["containers"]
        command = container["command"]
        assert command[:2] == ["gptjax", "train"] and command[-1] == f"--workdir=/gcs/sweeps/lr/trials/{trial.name}"
        overrides = [word.removeprefix("--config.") for word in command if word.startswith("--config.")]
        assert recipes.load_recipe(RECIPE, overrides) == trial.config
        assert {entry["name"]: entry.get("value") for entry in container["env"]}["B"] == "2"


def test_done_trials_have_none_where_the_volume_is_mounted_here_too(tmp_path):
    sweep = Sweep(RECIPE, seeds(2), jobset=JOBSET | {"volume": f"runs:{tmp_path}"})
    trials = make_trials(sweep)
    assert manifests(sweep, trials, [], str(tmp_path)).count("kind: JobSet") == 2
    folder = SweepFolder(tmp_path)
    (folder.trial(trials[0].name) / "result.json").write_text('{"eval": {"loss": 1.5}}')
    (folder.trial(trials[1].name) / "run.lock").write_text("{}")
    assert manifests(sweep, trials, [], str(tmp_path)).count("kind: JobSet") == 1
    assert [folder.observed(trial.name).status for trial in trials] == ["done", "running"]


@pytest.mark.parametrize(
    ("jobset", "sentence"),
    [
        ({}, "--where=jobset needs a name"),
        (JOBSET | {"topology": "v5q:2x4"}, "--where=jobset: --topology=v5q:2x4: there is no TPU 'v5q'"),
        (JOBSET | {"colour": "red"}, "--where=jobset: unrecognized arguments: --colour=red"),
    ],
)
def test_the_renderers_sentence_is_passed_on(jobset, sentence):
    sweep = Sweep(RECIPE, seeds(1), jobset=jobset)
    with pytest.raises(UserError) as refused:
        manifests(sweep, make_trials(sweep), [], "gs://bucket/lr")
    assert str(refused.value).startswith(sentence)


def test_the_verb_prints_manifests(tmp_path, capsys):
    path = tmp_path / "sweep.py"
    path.write_text(
        "from gptjax.sweeps.definition import Sweep\nfrom gptjax.sweeps.space import seeds\n"
        f"def get_sweep(): return Sweep({RECIPE!r}, seeds(3), jobset={JOBSET!r})\n"
    )
    assert cli.main(["sweep", str(path), "--workdir=gs://bucket/lr", "--where=jobset", "--config.model.num_layers=2"]) == 0
    assert len(list(yaml.safe_load_all(capsys.readouterr().out))) == 3
    assert not State().is_alive()
