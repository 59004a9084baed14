import dataclasses
import json
import os
import pathlib
import signal
import socket
import subprocess
import sys
import textwrap

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import config as config_lib
from gptjax.config import UserError
from gptjax.train import run

ROOT = pathlib.Path(__file__).parents[2]


def make_config(**changes):
    values = config_lib.defaults()
    values.train.duration_steps = 10
    for key, value in changes.items():
        group, leaf = key.split("__")
        values[group][leaf] = value
    return config_lib.from_dict(values)


def python(code, *arguments, **options):
    """Starts `code` in a process of its own, which prints a line when it is ready."""
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, **options)


# --- files --------------------------------------------------------------------------------------------------------------------


def test_write_json_leaves_the_old_file_where_it_fails(tmp_path):
    path = tmp_path / "x.json"
    run.write_json(path, {"a": 1})
    with pytest.raises(ValueError):
        run.write_json(path, {"a": float("nan")})
    with pytest.raises(TypeError):
        run.write_json(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["x.json"]


def test_write_atomically_cleans_up_after_a_full_disk(tmp_path, monkeypatch):
    path = tmp_path / "x"
    path.write_bytes(b"old")

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError):
        run.write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["x"]


def test_result(tmp_path):
    assert run.read_result(tmp_path) is None
    run.write_result(tmp_path, {"steps": 3, "eval": {"loss": 1.5}})
    assert run.read_result(tmp_path) == {"steps": 3, "eval": {"loss": 1.5}}
    (tmp_path / "result.json").write_text("{")
    with pytest.raises(UserError, match="result.json is not valid JSON"):
        run.read_result(tmp_path)


# --- lock ---------------------------------------------------------------------------------------------------------------------

HOLD = """
    import pathlib, sys, time
    from gptjax.train.run import RunLock
    with RunLock(pathlib.Path(sys.argv[1])):
        print("locked", flush=True)
        time.sleep(60)
"""


def test_a_second_run_is_refused_by_name_and_a_killed_one_recovered(tmp_path):
    holder = python(HOLD, tmp_path)
    assert holder.stdout.readline() == "locked\n"
    refusal = f"in use by a live run, process {holder.pid} on {socket.gethostname()}"
    with pytest.raises(UserError, match=refusal), run.RunLock(tmp_path):
        pass
    holder.kill()
    holder.wait()
    holder.stdout.close()
    lines = []
    with run.RunLock(tmp_path, lines.append):
        assert len(lines) == 1 and f"process {holder.pid} " in lines[0]
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
    assert not (tmp_path / "run.lock").exists()
    with run.RunLock(tmp_path, lines.append):
        assert len(lines) == 1


def test_the_same_process_cannot_lock_twice(tmp_path):
    with run.RunLock(tmp_path):
        with pytest.raises(UserError, match=f"process {os.getpid()} "), run.RunLock(tmp_path):
            pass
        with pytest.raises(UserError, match="live run"), run.RunLock(tmp_path):  # the refusal above has not let go of the first
            pass


def test_a_reused_process_number_is_told_apart(tmp_path):
    lock = {"host": socket.gethostname(), "pid": os.getpid(), "started": "another start"}
    (tmp_path / "run.lock").write_text(json.dumps(lock))
    lines = []
    with run.RunLock(tmp_path, lines.append):
        assert "recovered" in lines[0]


def test_a_live_process_is_refused_even_where_flock_is_granted_to_everybody(tmp_path):
    lock = {"host": socket.gethostname(), "pid": os.getppid(), "started": run.start_time(os.getppid())}
    (tmp_path / "run.lock").write_text(json.dumps(lock))
    with pytest.raises(UserError, match=f"live run, process {os.getppid()}"), run.RunLock(tmp_path):
        pass


def test_another_host_is_refused_with_the_way_out(tmp_path):
    path = tmp_path / "run.lock"
    path.write_text(json.dumps({"host": "elsewhere", "pid": 3, "started": "x"}))
    with pytest.raises(UserError, match=f"process 3 on elsewhere.* remove {path}"), run.RunLock(tmp_path):
        pass
    path.unlink()
    with run.RunLock(tmp_path):
        pass


@pytest.mark.parametrize(("theirs", "ours", "goes_on"), [("7", "7", True), ("7", "8", False), ("7", "", False), ("", "", False)])
def test_an_earlier_start_of_the_same_job_on_another_host_is_over(tmp_path, monkeypatch, theirs, ours, goes_on):
    monkeypatch.setenv("GPTJAX_JOB", ours)
    (tmp_path / "run.lock").write_text(json.dumps({"host": "elsewhere", "pid": 3, "started": "x", "job": theirs}))
    said: list[str] = []
    if not goes_on:
        with pytest.raises(UserError, match="process 3 on elsewhere"), run.RunLock(tmp_path, said.append):
            pass
        return
    with run.RunLock(tmp_path, said.append):
        assert json.loads((tmp_path / "run.lock").read_text())["job"] == ours
    assert said == [f"recovered the lock on {tmp_path} that process 3 on elsewhere left, an earlier start of job 7."]


def test_a_file_that_its_holder_removed_before_we_locked_it_is_no_lock(tmp_path, monkeypatch):
    flock, calls = run.fcntl.flock, []

    def flock_late(descriptor, operation):
        if not calls:
            (tmp_path / "run.lock").unlink()
        calls.append(descriptor)
        flock(descriptor, operation)

    monkeypatch.setattr(run.fcntl, "flock", flock_late)
    with run.RunLock(tmp_path):
        assert len(calls) == 2 and json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()
        with pytest.raises(UserError, match="live run"), run.RunLock(tmp_path):
            pass


@pytest.mark.parametrize("content", [b"", b"\0\0\0", b"{", b"[]", b'{"host": 1}'])
def test_a_torn_lock_is_taken(tmp_path, content):
    (tmp_path / "run.lock").write_bytes(content)
    with run.RunLock(tmp_path):
        assert json.loads((tmp_path / "run.lock").read_text())["pid"] == os.getpid()


def test_without_flock_the_file_is_the_lock(tmp_path, monkeypatch):
    def no_flock(descriptor, operation):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(run.fcntl, "flock", no_flock)
    lines = []
    with run.RunLock(tmp_path, lines.append):
        assert "no flock" in lines[0]
        with pytest.raises(UserError, match="no flock .* remove"), run.RunLock(tmp_path):
            pass
    with run.RunLock(tmp_path):
        pass


def test_a_forked_worker_does_not_keep_the_lock_of_its_killed_parent(tmp_path):
    parent = python(
        """
        import os, pathlib, sys, time
        from gptjax.train.run import RunLock
        with RunLock(pathlib.Path(sys.argv[1])):
            child = os.fork()
            if child == 0:
                print(os.getpid(), flush=True)
            time.sleep(60)
        """,
        tmp_path,
    )
    child = int(parent.stdout.readline())
    parent.kill()
    parent.wait()
    parent.stdout.close()
    try:
        with run.RunLock(tmp_path):
            pass
    finally:
        os.kill(child, signal.SIGKILL)


RACE = """
    import json, os, pathlib, socket, sys, time
    from gptjax.config import UserError
    from gptjax.train.run import RunLock

    many, folder = 12, pathlib.Path(sys.argv[1])
    for attempt in range(20):
        (folder / "run.lock").write_text(json.dumps({"host": socket.gethostname(), "pid": 2**22 + 1, "started": "x"}))
        start, told, end = os.pipe(), os.pipe(), os.pipe()
        for _ in range(many):
            if os.fork() == 0:
                os.close(start[1]), os.close(end[1])
                os.read(start[0], 1)  # returns in all of them at once, when the parent closes its end
                try:
                    with RunLock(folder):
                        os.write(told[1], b"won\\n")
                        os.read(end[0], 1)
                except UserError as error:
                    os.write(told[1], f"{error}\\n".encode())
                os._exit(0)
        os.close(start[1])
        lines = []
        while len(lines) < many:
            lines += os.read(told[0], 2**16).decode().splitlines()
        os.close(end[1])
        for _ in range(many):
            os.wait()
        losers = {line.split("live run, ")[1] for line in lines if line != "won"}
        print(lines.count("won"), len(losers), str(2**22 + 1) in losers.pop(), flush=True)
"""


def test_of_many_who_recover_exactly_one_wins(tmp_path):
    output, _ = python(RACE, tmp_path).communicate(timeout=60)
    assert output.splitlines() == ["1 1 False"] * 20


# --- config -------------------------------------------------------------------------------------------------------------------


def test_config_is_written_then_compared(tmp_path):
    lines = []
    run.check_config(tmp_path / "new", make_config(), [], lines.append)
    assert config_lib.from_json(tmp_path / "new" / "config.json") == make_config()
    run.check_config(tmp_path / "new", make_config(), [], lines.append)
    assert lines == []


def test_a_change_that_shapes_the_run_is_refused_unless_allowed(tmp_path):
    run.check_config(tmp_path, make_config(), [], print)
    changed = make_config(optimizer__learning_rate=0.5, model__num_layers=2, checkpoint__keep_last=7)
    with pytest.raises(UserError) as refusal:
        run.check_config(tmp_path, changed, ["model.num_layers"], print)
    text = str(refusal.value)
    assert "optimizer.learning_rate from 0.001 to 0.5" in text
    assert "--allow_changes=model.num_layers,optimizer.learning_rate" in text
    assert "model.num_layers from" not in text and "keep_last" not in text
    assert config_lib.from_json(tmp_path / "config.json") == make_config()
    lines = []
    run.check_config(tmp_path, changed, ["model.num_layers", "optimizer.learning_rate"], lines.append)
    assert config_lib.from_json(tmp_path / "config.json") == changed
    assert len(lines) == 3 and any("checkpoint.keep_last from 2 to 7" in line for line in lines)


def test_a_change_that_does_not_shape_the_run_is_taken(tmp_path):
    run.check_config(tmp_path, make_config(), [], print)
    run.check_config(tmp_path, make_config(metrics__every_steps=3), [], print)
    assert config_lib.from_json(tmp_path / "config.json").metrics.every_steps == 3


def test_an_unknown_allowed_key_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(UserError, match="optimizer.learning_rat; did you mean optimizer.learning_rate"):
        run.check_config(tmp_path, make_config(), ["optimizer.learning_rat"], print)


def test_a_key_that_an_older_version_did_not_write_had_its_default(tmp_path):
    run.check_config(tmp_path, make_config(), [], print)
    path = tmp_path / "config.json"
    values = json.loads(path.read_text())
    del values["objective"]["z_loss"], values["mesh"]
    path.write_text(json.dumps(values))
    run.check_config(tmp_path, make_config(), [], print)
    assert json.loads(path.read_text())["objective"]["z_loss"] == 0.0
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match="objective.z_loss from 0.0 to 0.1"):
        run.check_config(tmp_path, make_config(objective__z_loss=0.1), [], print)


@pytest.mark.parametrize("content", ["", "{", '{"model": {"num_layrs": 3}}'])
def test_a_config_that_cannot_be_read_is_named(tmp_path, content):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match="config.json"):
        run.check_config(tmp_path, make_config(), [], print)


# --- hash ---------------------------------------------------------------------------------------------------------------------


def make_state():
    return {
        "w": jnp.arange(16, dtype=jnp.float32).reshape(4, 4),
        "half": jnp.arange(8, dtype=jnp.bfloat16),
        "step": jnp.int32(3),
        "key": jax.random.key(1),
        "empty": jnp.zeros((0, 3)),
    }


def test_state_sha256_is_pinned():
    # From an independent spelling of the same bytes: the hash is published in result.json and must not drift.
    import hashlib

    digest = hashlib.sha256()
    digest.update(b"step\nint32\n[]\n" + (3).to_bytes(4, "little"))
    assert run.state_sha256({"step": jnp.int32(3)}) == digest.hexdigest()


def test_state_sha256_sees_every_change():
    state = make_state()
    seen = {run.state_sha256(state), run.state_sha256(make_state())}
    assert len(seen) == 1
    flipped = np.arange(16, dtype=np.float32).reshape(4, 4)
    flipped[0, 0] = -0.0
    for change in [
        {"w": jnp.asarray(flipped)},
        {"w": state["w"].reshape(2, 8)},
        {"half": state["half"].at[7].set(6)},
        {"half": state["half"].astype(jnp.float32)},
        {"step": jnp.uint32(3)},
        {"key": jax.random.key(2)},
        {"key": jax.random.key_data(state["key"])},
        {"empty": jnp.zeros((3, 0))},
        {"more": jnp.zeros(())},
    ]:
        seen.add(run.state_sha256(state | change))
    assert len(seen) == 10


def test_state_sha256_is_independent_of_sharding():
    code = """
        import jax, jax.numpy as jnp
        jax.config.update("jax_num_cpu_devices", 8)
        from gptjax.config import MeshConfig
        from gptjax.parallel.mesh import make_mesh
        from gptjax.train.run import state_sha256
        state = {"w": jnp.arange(64.0).reshape(16, 4), "half": jnp.arange(8, dtype=jnp.bfloat16)}
        state["key"] = jax.random.split(jax.random.key(1), 8)
        mesh = make_mesh(MeshConfig(data=8))
        print(state_sha256(state))
        print(state_sha256(jax.device_put(state, jax.NamedSharding(mesh, jax.P("data")))))
        print(state_sha256(jax.device_put(state, jax.NamedSharding(mesh, jax.P()))))
    """
    output, _ = python(code).communicate(timeout=60)
    lines = output.split()
    state = {"w": jnp.arange(64.0).reshape(16, 4), "half": jnp.arange(8, dtype=jnp.bfloat16)}
    state["key"] = jax.random.split(jax.random.key(1), 8)
    assert lines == [run.state_sha256(state)] * 3


def test_named_leaves_writes_fields_keys_and_places_alike():
    import optax

    state = dataclasses.make_dataclass("S", ["params", "opt"])
    jax.tree_util.register_dataclass(state, ["params", "opt"], [])
    tree = state({"b": {"w": 1}}, (optax.EmptyState(), optax.ScaleByAdamState(2, {"w": 3}, {"w": 4})))
    assert run.named_leaves(tree) == {"opt/1/count": 2, "opt/1/mu/w": 3, "opt/1/nu/w": 4, "params/b/w": 1}
    with pytest.raises(ValueError, match="same path"):
        run.named_leaves({"a/b": 1, "a": {"b": 2}})


# --- environment --------------------------------------------------------------------------------------------------------------


def test_environment():
    found = run.environment()
    json.dumps(found)
    assert found["versions"]["jax"] == jax.__version__ and found["versions"]["orbax-checkpoint"] != "unknown"
    assert found["hardware"]["platform"] == "cpu" and found["hardware"]["cpu_cores"] >= 1


def git(folder, *arguments):
    identity = ["-c", "user.name=x", "-c", "user.email=x@x", "-c", "commit.gpgsign=false"]
    subprocess.run(["git", *identity, *arguments], cwd=folder, check=True, capture_output=True)


def test_git_commit_is_that_of_the_repository_that_tracks_the_package(tmp_path):
    package = tmp_path / "package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    assert run._git(package) == ("unknown", "unknown")
    git(tmp_path, "init")
    (tmp_path / "other").write_text("")
    git(tmp_path, "add", "other")
    git(tmp_path, "commit", "-m", "x")
    assert run._git(package) == ("unknown", "unknown")  # inside a repository that does not track it
    git(tmp_path, "add", "package")
    git(tmp_path, "commit", "-m", "x")
    commit, dirty = run._git(package)
    assert len(commit) == 40 and dirty is False
    (package / "new.py").write_text("")
    assert run._git(package) == (commit, True)


def test_git_may_be_absent(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")
    assert run._git(pathlib.Path(run.__file__).parent) == ("unknown", "unknown")
