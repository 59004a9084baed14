"""The launch scripts: what they would run, which statuses end or restart a run, and whether signals reach every process."""

import os
import pathlib
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

LAUNCH = pathlib.Path(__file__).resolve().parents[1] / "launch"
SCRIPTS = sorted([*LAUNCH.glob("*.sh"), *LAUNCH.glob("*.sbatch")])

# A stand-in for `gptjax train`: it says who it is, then does what its arguments say.
PROGRAM = """
import os, pathlib, signal, sys, time
rank, folder = os.environ.get("GPTJAX_PROCESS_ID", "0"), pathlib.Path(sys.argv[1])
starts = len(list(folder.glob(f"start.{rank}.*")))
def stop(number, frame):
    (folder / f"stopped.{rank}.{starts}").write_text(signal.Signals(number).name)
    if "deaf" not in sys.argv[2:]:
        os._exit(75 if number == signal.SIGTERM else 130)
signal.signal(signal.SIGTERM, stop)
signal.signal(signal.SIGINT, stop)
(folder / f"start.{rank}.{starts}").write_text(os.environ.get("GPTJAX_COORDINATOR", ""))
print("started", *sys.argv[2:], flush=True)
statuses = dict(word.split("=") for word in sys.argv[2:] if "=" in word)
if rank in statuses:
    while "together" in sys.argv[2:] and len(list(folder.glob(f"start.*.{starts}"))) < 2:
        time.sleep(0.01)
    time.sleep(f"late{rank}" in sys.argv[2:])
    ends = [int(status) for status in statuses[rank].split(",")]
    sys.exit(ends[min(starts, len(ends) - 1)])
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def signals_are_heard():
    """A shell passes on which signals it ignores, and no script can undo that: under nohup, or in the background of a script."""
    ignored = [number for number in (signal.SIGHUP, signal.SIGINT, signal.SIGQUIT) if signal.getsignal(number) is signal.SIG_IGN]
    for number in ignored:
        signal.signal(number, signal.SIG_DFL)
    yield
    for number in ignored:
        signal.signal(number, signal.SIG_IGN)


def program(folder: pathlib.Path, *words: str) -> list[str]:
    """The stand-in's command: `RANK=STATUS,STATUS,...` is how a process ends at each start; the others wait for a minute."""
    return [sys.executable, "-c", PROGRAM, str(folder), *words]


def environment(*first_on_path: pathlib.Path, **extra: str) -> dict[str, str]:
    """This process's environment without another launcher's variables."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("GPTJAX_", "SLURM_", "JAX_"))}
    path = os.pathsep.join([*map(str, first_on_path), kept["PATH"]])
    return kept | {"PATH": path, "PYTHON": sys.executable} | extra


def run(script: str, *arguments: str, env: dict[str, str] | None = None, seconds: float = 30) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [LAUNCH / script, *arguments], env=env or environment(), capture_output=True, text=True, timeout=seconds, check=False
    )


def wait_for(folder: pathlib.Path, pattern: str, number: int) -> None:
    """Returns when `number` files of `folder` match `pattern`."""
    deadline = time.monotonic() + 20
    while len(list(folder.glob(pattern))) < number:
        assert time.monotonic() < deadline, f"no {number} of {pattern} in {sorted(folder.iterdir())}"
        time.sleep(0.02)


def starts(folder: pathlib.Path, rank: int) -> int:
    return len(list(folder.glob(f"start.{rank}.*")))


def stub(folder: pathlib.Path, name: str, text: str) -> None:
    """A command of another system's, on the PATH before the real one."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(f"#!/usr/bin/env bash\n{text}")
    (folder / name).chmod(0o755)


def test_shellcheck_accepts_every_script():
    shellcheck = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    if shellcheck is None:
        pytest.skip("shellcheck is absent (extra: test)")
    assert {script.name for script in SCRIPTS} == {"local.sh", "slurm.sbatch", "tpu_pod.sh"}
    found = subprocess.run([shellcheck, "--severity=style", *SCRIPTS], capture_output=True, text=True, check=False)
    assert found.returncode == 0, found.stdout


@pytest.mark.parametrize("script", [*(script.name for script in SCRIPTS), "render_jobset.py"])
def test_help_and_a_missing_command(script):
    """Every script explains itself, and answers a missing command with one sentence and status 2."""
    assert "--dry-run" in run(script, "--help").stdout
    answer = run(script)
    assert answer.returncode == 2
    assert answer.stdout == ""
    assert answer.stderr.count("\n") == 1
    assert answer.stderr.startswith(f"{script}: ")


# local.sh


def test_local_dry_run_prints_each_process():
    answer = run("local.sh", "--dry-run", "--devices-per-process=4", "--port=5000", "2", "--", "gptjax", "train", "--x=it's a b")
    expected = "env GPTJAX_COORDINATOR=127.0.0.1:5000 GPTJAX_NUM_PROCESSES=2 GPTJAX_PROCESS_ID={} JAX_PLATFORMS=cpu"
    lines = [shlex.split(line) for line in answer.stdout.splitlines()]
    for rank in (0, 1):
        words = [f"[{rank}]", *expected.format(rank).split(), "JAX_NUM_CPU_DEVICES=4", "gptjax", "train", "--x=it's a b"]
        assert lines[rank] == words
    assert len(lines) == 2


def test_local_single_process_gets_no_coordinator():
    leaked = environment(GPTJAX_COORDINATOR="elsewhere:1", GPTJAX_NUM_PROCESSES="8", GPTJAX_PROCESS_ID="3")
    answer = run("local.sh", "1", "--", "bash", "-c", "env | grep -E '^(GPTJAX_|JAX_)'; echo done", env=leaked)
    assert (answer.returncode, answer.stdout) == (0, "[0] done\n")


def test_local_devices_are_jax_devices():
    """The environment means to JAX what local.sh says it means."""
    code = "import jax; print(jax.default_backend(), jax.local_device_count())"
    answer = run("local.sh", "--devices-per-process=3", "1", "--", sys.executable, "-c", code, seconds=60)
    assert answer.stdout == "[0] cpu 3\n", answer.stderr


def test_local_marks_lines_and_shares_a_coordinator(tmp_path):
    answer = run("local.sh", "3", "--", *program(tmp_path, "0=0", "1=0", "2=0"))
    assert answer.returncode == 0
    assert sorted(answer.stdout.splitlines()) == [f"[{rank}] started 0=0 1=0 2=0" for rank in range(3)]
    coordinators = {file.read_text() for file in tmp_path.glob("start.*")}
    assert len(coordinators) == 1
    assert coordinators.pop().startswith("127.0.0.1:")


def test_local_failure_ends_all(tmp_path):
    started = time.monotonic()
    answer = run("local.sh", "3", "--", *program(tmp_path, "1=7"))
    assert answer.returncode == 7
    assert time.monotonic() - started < 20  # the others would have gone on for a minute
    assert starts(tmp_path, 0) == 1


def test_local_kills_what_does_not_end(tmp_path):
    wait_then_fail = f"until [ -e {tmp_path}/start.0.0 ]; do sleep 0.05; done; exit 7"
    command = f'if [ "$GPTJAX_PROCESS_ID" = 1 ]; then {wait_then_fail}; fi; exec "$@"'
    answer = run("local.sh", "--grace=1", "2", "--", "bash", "-c", command, "deaf", *program(tmp_path, "deaf"))
    assert answer.returncode == 7
    assert (tmp_path / "stopped.0.0").read_text() == "SIGTERM"
    assert "killing 1 that did not end within 1 s" in answer.stderr


@pytest.mark.parametrize(("ends", "status", "number"), [("7,75,0", 0, 3), ("7", 7, 3), ("2", 2, 1), ("130", 130, 1)])
def test_local_restarts(tmp_path, ends, status, number):
    """It starts again after a fault and after a stop that saved, at most --restarts times, and never after 2 and 130."""
    answer = run("local.sh", "--restarts=2", "2", "--", *program(tmp_path, f"0={ends}", f"1={ends}", "together"))
    assert answer.returncode == status, answer.stderr
    assert starts(tmp_path, 0) == starts(tmp_path, 1) == number


def test_local_lets_the_others_save(tmp_path):
    """A process that ended with 75 saved after a signal of its own, and the others are saving too: they are not told again."""
    answer = run("local.sh", "2", "--", *program(tmp_path, "0=75", "1=75", "late1", "together"))
    assert answer.returncode == 75
    assert not list(tmp_path.glob("stopped.*"))


@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_local_passes_signals_on(tmp_path, number, status):
    with subprocess.Popen(
        [LAUNCH / "local.sh", "--restarts=3", "2", "--", *program(tmp_path)], env=environment(), stderr=subprocess.PIPE, text=True
    ) as launcher:
        wait_for(tmp_path, "start.*", 2)
        launcher.send_signal(number)
        assert launcher.wait(timeout=20) == status
        assert "restart" not in launcher.stderr.read()
    assert [(tmp_path / f"stopped.{rank}.0").read_text() for rank in (0, 1)] == [number.name] * 2
    assert starts(tmp_path, 0) == starts(tmp_path, 1) == 1  # it was asked to stop, so it does not start again


def test_local_ctrl_c_of_a_terminal_comes_once(tmp_path):
    """Ctrl-C goes to a terminal's whole process group; a process that got it twice would stop without saving."""
    with subprocess.Popen(
        [LAUNCH / "local.sh", "1", "--", *program(tmp_path, "deaf")], env=environment(), start_new_session=True
    ) as launcher:
        wait_for(tmp_path, "start.*", 1)
        os.killpg(launcher.pid, signal.SIGINT)
        wait_for(tmp_path, "stopped.*", 1)
        (tmp_path / "stopped.0.0").unlink()
        time.sleep(0.5)
        assert not (tmp_path / "stopped.0.0").exists()
        launcher.send_signal(signal.SIGINT)  # and a second Ctrl-C does reach it
        wait_for(tmp_path, "stopped.*", 1)
        os.kill(int(subprocess.check_output(["ps", "-o", "pid=", "--ppid", str(launcher.pid)]).split()[0]), signal.SIGKILL)
        assert launcher.wait(timeout=20) == 137


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["0", "--", "true"], "at least 1"),
        (["two", "--", "true"], "not 'two'"),
        (["2", "gptjax", "train"], "'gptjax' stands where '--' should"),
        (["2", "--restart=3", "--", "true"], "no option '--restart=3'"),
        (["2", "--devices-per-process=", "--", "true"], "--devices-per-process takes a whole number"),
        (["--", "true"], "the number of processes is missing"),
    ],
)
def test_local_refuses(arguments, said):
    answer = run("local.sh", *arguments)
    assert (answer.returncode, answer.stdout) == (2, "")
    assert said in answer.stderr


# slurm.sbatch, with stand-ins for Slurm's commands


@pytest.fixture
def slurm(tmp_path):
    """The environment of a job on two nodes. `srun` runs its command as task 1; what was called is in `calls`."""
    folder, calls = tmp_path / "bin", tmp_path / "calls"
    stub(folder, "scontrol", f'echo "scontrol $*" >>{calls}; [ "$1" != show ] || printf "node%s\\n" 7 8')
    stub(folder, "squeue", f'cat {tmp_path}/state 2>/dev/null || echo RUNNING; echo "squeue $*" >>{calls}')
    stub(folder, "scancel", f'echo "scancel $*" >>{calls}; kill -TERM $(cat {tmp_path}/task)')
    skip_options = 'while [[ $1 == --* ]]; do echo "srun $1" >>"$CALLS"; shift; done'
    stub(folder, "srun", f'trap "echo srun got TERM >>{calls}" TERM; {skip_options}; "$@" & echo $! >{tmp_path}/task; wait $!')
    job = {"SLURM_JOB_ID": "20123", "SLURM_JOB_NODELIST": "node[7-8]", "SLURM_JOB_NUM_NODES": "2", "SLURM_NTASKS_PER_NODE": "1"}
    return environment(folder, CALLS=str(calls), SLURM_PROCID="1", SLURM_NTASKS="2", **job)


def called(tmp_path: pathlib.Path, command: str) -> list[str]:
    return [line for line in (tmp_path / "calls").read_text().splitlines() if line.startswith(command)]


def test_slurm_dry_run_without_slurm():
    answer = run("slurm.sbatch", "--dry-run", "--", "gptjax", "train", "--workdir=a b")
    words = shlex.split(answer.stdout)
    assert words[:2] == ["srun", "--ntasks=1"]
    assert words[-4:] == ["gptjax", "gptjax", "train", "--workdir=a b"]  # the first is the name of the shell that starts it
    assert run("slurm.sbatch", "--", "gptjax").returncode == 2


def test_slurm_joins_the_tasks(slurm, tmp_path):
    slurm |= {"SLURM_ARRAY_TASK_ID": "3", "SLURM_CPUS_PER_TASK": "4", "GPTJAX_DISTRIBUTED": "auto"}
    show = "import os, sys; print(sys.argv[1:], *(os.environ[k] for k in os.environ if k.startswith(('GPTJAX_', 'SRUN_'))))"
    command = [sys.executable, "-c", show, "--seed=%a"]
    answer = run("slurm.sbatch", "--", *command, env=slurm)
    assert answer.returncode == 0
    assert set(answer.stdout.split()) == {"['--seed=3']", "node7:10123", "slurm-20123", "2", "1", "4"}
    assert called(tmp_path, "srun --ntasks") == ["srun --ntasks=2"]
    words = shlex.split(run("slurm.sbatch", "--dry-run", "--", *command, env=slurm).stdout)
    assert words[:3] == ["GPTJAX_COORDINATOR=node7:10123", "GPTJAX_NUM_PROCESSES=2", "srun"]
    assert words[-1] == "--seed=3"


@pytest.mark.parametrize(
    ("ends", "state", "status", "number", "requeued"),
    [
        ("75", "RUNNING", 75, 1, True),
        ("75", "COMPLETING", 75, 1, False),  # cancelled
        ("1,1,0", "RUNNING", 0, 3, False),
        ("1", "RUNNING", 1, 3, False),
        ("2", "RUNNING", 2, 1, False),
    ],
)
def test_slurm_restarts_and_requeues(slurm, tmp_path, ends, state, status, number, requeued):
    (tmp_path / "state").write_text(state)
    answer = run("slurm.sbatch", "--restarts=2", "--", *program(tmp_path, f"1={ends}"), env=slurm)
    assert answer.returncode == status, answer.stderr
    assert starts(tmp_path, 1) == number
    assert called(tmp_path, "scontrol requeue") == ["scontrol requeue 20123"] * requeued


def test_slurm_time_limit_saves_and_requeues(slurm, tmp_path):
    """The warning goes to the tasks, not to srun, which would kill them; then the job queues itself again."""
    with subprocess.Popen([LAUNCH / "slurm.sbatch", "--", *program(tmp_path)], env=slurm, stdout=subprocess.DEVNULL) as job:
        wait_for(tmp_path, "start.*", 1)
        job.terminate()
        assert job.wait(timeout=20) == 75
    assert called(tmp_path, "scancel") == ["scancel --signal=TERM 20123"]
    assert called(tmp_path, "srun got") == []
    assert called(tmp_path, "scontrol requeue") == ["scontrol requeue 20123"]


# tpu_pod.sh, with a stand-in for gcloud that has two hosts


@pytest.fixture
def pod(tmp_path):
    """An environment whose `gcloud` runs an ssh command on two hosts, folders of this machine, and answers like the real one."""
    calls = tmp_path / "calls"
    for host in (0, 1):
        (tmp_path / f"host{host}" / "gptjax" / ".venv" / "bin").mkdir(parents=True)
        (tmp_path / f"host{host}" / "gptjax" / ".venv" / "bin" / "activate").touch()
    stub(
        tmp_path / "bin",
        "gcloud",
        f"""
echo "gcloud $*" >>{calls}
[ "$4" = ssh ] || exit 0
for word; do case $word in --command=*) command=${{word#*=}} ;; esac; done
ids=() status=0
for i in 0 1; do
  (cd {tmp_path}/host$i && USER=test{os.getpid()}.$i GPTJAX_PROCESS_ID=$i bash -c "$command") &
  ids+=($!)
done
for id in "${{ids[@]}}"; do wait "$id" || {{ code=$?; [ $status != 0 ] || status=$code; }}; done
exit $status
""",
    )
    yield environment(tmp_path / "bin")
    for host in (0, 1):
        pathlib.Path(f"/tmp/gptjax.test{os.getpid()}.{host}.pid").unlink(missing_ok=True)


def test_pod_dry_run():
    arguments = ["--zone=us-east5-a", "--project=p", "--env=GPTJAX_STUCK_SECONDS=600", "--setup", "--dry-run", "--"]
    answer = run("tpu_pod.sh", "my-pod", *arguments, "gptjax", "train", "--x=it's a b")
    assert answer.returncode == 0, answer.stderr
    archive, copy, install, start = map(shlex.split, answer.stdout.splitlines())
    assert archive[:4] == ["git", "-C", str(LAUNCH.parent), "archive"]
    tail = ["--zone=us-east5-a", "--project=p", "--worker=all"]
    gcloud = ["gcloud", "compute", "tpus", "tpu-vm"]
    assert copy[:5] == [*gcloud, "scp"]
    assert copy[6:] == ["my-pod:gptjax.tar.gz", *tail]
    ssh = [*gcloud, "ssh", "my-pod", *tail]
    assert install[:-1] == start[:-1] == ssh
    assert "-e . 'jax[tpu]'" in install[-1]
    environment_and_command = shlex.split(start[-1].rpartition(" && exec env ")[2])
    assert environment_and_command == ["GPTJAX_DISTRIBUTED=auto", "GPTJAX_STUCK_SECONDS=600", "gptjax", "train", "--x=it's a b"]


@pytest.mark.parametrize(("ends", "status", "number"), [("0", 0, 1), ("2", 2, 1), ("1,0", 0, 2)])
def test_pod_restarts(pod, tmp_path, ends, status, number):
    arguments = ["my-pod", "--restarts=1", "--", *program(tmp_path, f"0={ends}", f"1={ends}")]
    answer = run("tpu_pod.sh", *arguments, env=pod)
    assert answer.returncode == status, answer.stderr
    assert [starts(tmp_path, host) for host in (0, 1)] == [number] * 2


def test_pod_ends_what_was_left_running(pod, tmp_path):
    """A lost connection leaves processes behind; the next start tells them to save before it takes the TPU."""
    arguments = [LAUNCH / "tpu_pod.sh", "my-pod", "--restarts=0", "--"]
    with subprocess.Popen([*arguments, *program(tmp_path)], env=pod, stdout=subprocess.DEVNULL) as lost:
        wait_for(tmp_path, "start.*", 2)
        answer = run("tpu_pod.sh", "my-pod", "--", *program(tmp_path, "0=0", "1=0"), env=pod)
        assert answer.returncode == 0, answer.stderr
        assert lost.wait(timeout=20) == 75
    assert [(tmp_path / f"stopped.{host}.0").read_text() for host in (0, 1)] == ["SIGTERM"] * 2


def test_pod_passes_signals_on(pod, tmp_path):
    with subprocess.Popen(
        [LAUNCH / "tpu_pod.sh", "my-pod", "--", *program(tmp_path)], env=pod, stdout=subprocess.DEVNULL
    ) as launcher:
        wait_for(tmp_path, "start.*", 2)
        launcher.send_signal(signal.SIGINT)
        assert launcher.wait(timeout=20) == 130
    assert [(tmp_path / f"stopped.{host}.0").read_text() for host in (0, 1)] == ["SIGINT"] * 2


def test_pod_setup_copies_the_commit(pod, tmp_path):
    """The archive that is copied is of HEAD, and does not stay behind."""
    answer = run("tpu_pod.sh", "my-pod", "--setup", f"--python={shutil.which('false')}", env=pod | {"TMPDIR": str(tmp_path)})
    assert answer.returncode == 2  # the hosts have no such Python, and say so
    assert answer.stderr.count("is absent or older than 3.11") == 2
    assert "tpu-vm scp" in (tmp_path / "calls").read_text()
    assert not list(tmp_path.glob("*.tar.gz"))
