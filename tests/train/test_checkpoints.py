import json
import os
import pathlib
import random
import shutil
import subprocess
import sys
import textwrap
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import struct

from gptjax.config import CheckpointConfig, UserError
from gptjax.train import manifest
from gptjax.train.checkpoints import Checkpoints, CheckpointsDamaged, CheckpointsFailing
from gptjax.train.run import state_sha256

ROOT = pathlib.Path(__file__).parents[2]


@struct.dataclass
class State:
    step: jax.Array
    params: dict
    opt_state: tuple
    key: jax.Array


def make_state(step=0, size=300):
    params = {
        "blocks": {
            "kernel": jnp.arange(size, dtype=jnp.float32).reshape(-1, 3) + step,
            "scale": jnp.full((4,), step, jnp.bfloat16),
        },
        "count": jnp.full((), step, jnp.int32),
    }
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3, mask={"kernel": True, "scale": False}))
    return State(jnp.int32(step), params, optimizer.init(params["blocks"]), jax.random.key(step))


def abstract(state):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)


def assert_same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        if jax.dtypes.issubdtype(x.dtype, jax.dtypes.prng_key):
            x, y = jax.random.key_data(x), jax.random.key_data(y)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def open_checkpoints(folder, lines=None, **config):
    return Checkpoints(folder, CheckpointConfig(**config), (lines if lines is not None else []).append)


def save_all(checkpoints, *steps):
    for step in steps:
        checkpoints.save(step, make_state(step), {"step": step})
    checkpoints.wait()


def restore(folder, lines=None, **options):
    return open_checkpoints(folder, lines).restore(abstract(make_state()), **options)


def flip_bit(path, position=None):
    content = bytearray(path.read_bytes())
    content[len(content) // 2 if position is None else position] ^= 1 << 4
    path.write_bytes(content)


def files(folder):
    return sorted(path for path in folder.rglob("*") if path.is_file())


def python(code, *arguments):
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JAX_PLATFORMS": "cpu"}
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment)


# --- round trips ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("asynchronous", [True, False])
def test_round_trip(tmp_path, asynchronous):
    lines = []
    with open_checkpoints(tmp_path, lines, asynchronous=asynchronous) as checkpoints:
        assert checkpoints.last_saved_step is None
        assert checkpoints.restore(abstract(make_state())) is None
        checkpoints.save(7, make_state(7), {"data": {"step": 7}})
        assert asynchronous or checkpoints.last_saved_step == 7
        checkpoints.wait()
        assert checkpoints.last_saved_step == 7
        assert len(lines) == 1 and lines[0].startswith("checkpoint 7:")
    again = open_checkpoints(tmp_path, lines)
    assert again.last_saved_step == 7
    restored = again.restore(abstract(make_state()))
    assert restored.step == 7 and restored.metadata == {"data": {"step": 7}}
    assert_same(restored.state, make_state(7))
    again.save(7, make_state(8), {})  # the step is there already
    again.wait()
    assert len(lines) == 1
    assert_same(restore(tmp_path).state, make_state(7))


def test_poll_reports_once_and_does_not_wait(tmp_path):
    lines = []
    checkpoints = open_checkpoints(tmp_path, lines)
    checkpoints.poll()
    checkpoints.save(1, make_state(1), {})
    deadline = time.monotonic() + 30
    while not lines and time.monotonic() < deadline:
        checkpoints.poll()
    checkpoints.poll()
    assert len(lines) == 1 and checkpoints.last_saved_step == 1


@pytest.mark.parametrize("size", [1, 1000, 300_000, 5_000_000])
def test_buffers_may_be_donated_as_soon_as_save_returns(tmp_path, size):
    step = jax.jit(lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0)
    state = {"w": jnp.zeros((size,)), "half": jnp.zeros((size,), jnp.bfloat16), "count": jnp.int32(0)}
    shape = abstract(state)
    with open_checkpoints(tmp_path) as checkpoints:
        for number in range(1, 3):
            state = step(state)
            value = int(state["count"])
            checkpoints.save(number, state, {"value": value})
            for _ in range(20):
                state = step(state)
            state["w"].block_until_ready()
            restored = checkpoints.restore(shape)
            assert restored.metadata == {"value": value}
            for leaf in jax.tree.leaves(restored.state):
                assert np.all(np.asarray(leaf, np.float32) == value)


def test_a_part_is_restored(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        save_all(checkpoints, 3)
    params = abstract(make_state()).params
    restored = open_checkpoints(tmp_path).restore({"params": params}, partial=True)
    assert_same(restored.state, {"params": make_state(3).params})
    with pytest.raises(UserError, match="holds key, which"):
        open_checkpoints(tmp_path).restore({"params": params})


SHARDED = """
    import pathlib, sys
    import jax, jax.numpy as jnp
    jax.config.update("jax_num_cpu_devices", 8)
    from gptjax.config import CheckpointConfig, MeshConfig
    from gptjax.parallel.mesh import make_mesh
    from gptjax.train.checkpoints import Checkpoints
    from gptjax.train.run import state_sha256

    def shape(devices):
        mesh = make_mesh(MeshConfig(data=devices))
        split, whole = jax.NamedSharding(mesh, jax.P("data")), jax.NamedSharding(mesh, jax.P())
        place = lambda x: split if x.shape and x.shape[0] % 8 == 0 else whole
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place(x)), state)

    state = {
        "split": jnp.arange(64.0).reshape(16, 4),
        "half": jnp.arange(48, dtype=jnp.bfloat16).reshape(8, 6),
        "whole": jnp.arange(60_000.0).reshape(3, -1),
        "keys": jax.random.split(jax.random.key(1), 8),
        "key": jax.random.key(5),
        "step": jnp.int32(9),
    }
    state = jax.tree.map(lambda x, like: jax.device_put(x, like.sharding), state, shape(8))
    checkpoints = Checkpoints(pathlib.Path(sys.argv[1]), CheckpointConfig(), lambda line: None)
    checkpoints.save(9, state, {})
    print(state_sha256(state))
    for devices in (8, 4, 1):
        wanted = shape(devices)
        restored = checkpoints.restore(wanted).state
        assert all(restored[name].sharding == wanted[name].sharding for name in state)
        print(state_sha256(restored))
"""


def test_saved_on_8_devices_and_restored_on_4_and_1(tmp_path):
    output, _ = python(SHARDED, tmp_path).communicate(timeout=60)
    hashes = output.split()
    assert len(hashes) == 4 and len(set(hashes)) == 1
    # And in another process, on one device, without saying where the arrays should go.
    shape = {
        "split": jax.ShapeDtypeStruct((16, 4), jnp.float32),
        "half": jax.ShapeDtypeStruct((8, 6), jnp.bfloat16),
        "whole": jax.ShapeDtypeStruct((3, 20_000), jnp.float32),
        "keys": jax.ShapeDtypeStruct((8,), jax.random.key(0).dtype),
        "key": jax.ShapeDtypeStruct((), jax.random.key(0).dtype),
        "step": jax.ShapeDtypeStruct((), jnp.int32),
    }
    assert state_sha256(open_checkpoints(tmp_path).restore(shape).state) == hashes[0]


# --- damage --------------------------------------------------------------------------------------------------------------------


def test_one_flipped_bit_in_any_file_is_named_and_the_one_before_is_used(tmp_path):
    original = tmp_path / "original"
    with open_checkpoints(original) as checkpoints:
        save_all(checkpoints, 1, 2)
    names = [path.relative_to(original) for path in files(original / "00000002")]
    assert pathlib.Path("00000002/manifest.json") in names and len(names) > 5
    for number, name in enumerate(names):
        if not (original / name).stat().st_size:
            continue
        copy = tmp_path / str(number)
        shutil.copytree(original, copy)
        flip_bit(copy / name)
        lines = []
        restored = restore(copy, lines)
        assert restored.step == 1
        assert_same(restored.state, make_state(1))
        assert len(lines) == 1 and "checkpoint 2 is damaged" in lines[0]
        assert name.relative_to("00000002").as_posix() in lines[0]
        shutil.rmtree(copy)


def test_any_flipped_bit_of_the_manifest_is_detected(tmp_path, monkeypatch):
    (tmp_path / "a").write_text("x")
    monkeypatch.setattr(manifest.os, "fsync", lambda descriptor: None)
    manifest.write(tmp_path)
    content = (tmp_path / "manifest.json").read_bytes()
    assert manifest.first_fault(tmp_path) is None
    for bit in range(0, 8 * len(content), 3):  # every byte, those of white space too
        flipped = bytearray(content)
        flipped[bit // 8] ^= 1 << bit % 8
        (tmp_path / "manifest.json").write_bytes(flipped)
        assert "manifest.json" in manifest.first_fault(tmp_path)


def test_missing_extra_and_cut_files_are_damage(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        save_all(checkpoints, 1)
    folder = tmp_path / "00000001"
    (folder / "arrays" / "extra").write_text("")
    assert manifest.first_fault(folder) == "arrays/extra is not in manifest.json"
    (folder / "arrays" / "extra").unlink()
    assert manifest.first_fault(folder) is None
    os.truncate(folder / "metadata.json", 5)
    assert "metadata.json has 5 bytes" in manifest.first_fault(folder)
    (folder / "metadata.json").unlink()
    assert manifest.first_fault(folder) == "metadata.json is missing"


def test_where_every_checkpoint_is_damaged_nothing_starts_afresh(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        save_all(checkpoints, 1, 2)
    for step in (1, 2):
        flip_bit(tmp_path / f"{step:08d}" / "metadata.json")
    lines = []
    with pytest.raises(CheckpointsDamaged, match="no checkpoint .* is intact"):
        restore(tmp_path, lines)
    assert len(lines) == 2


def test_a_given_step_is_that_step_or_an_error(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        save_all(checkpoints, 1, 2)
    assert restore(tmp_path, step=1).step == 1
    with pytest.raises(UserError, match="no checkpoint of step 5; it has 1, 2"):
        restore(tmp_path, step=5)
    flip_bit(tmp_path / "00000002" / "metadata.json")
    with pytest.raises(CheckpointsDamaged, match="checkpoint 2 "):
        restore(tmp_path, step=2)


def test_another_shape_dtype_or_leaf_is_refused_by_name(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        save_all(checkpoints, 1)
    shape = abstract(make_state())
    blocks = shape.params["blocks"]

    def restore_with(changed):
        params = shape.params | {"blocks": changed}
        open_checkpoints(tmp_path).restore(shape.replace(params=params))

    with pytest.raises(UserError, match=r"params/blocks/kernel as float32\[100, 3\], but .* bfloat16\[100, 3\]"):
        restore_with(blocks | {"kernel": jax.ShapeDtypeStruct((100, 3), jnp.bfloat16)})
    with pytest.raises(UserError, match=r"params/blocks/scale as bfloat16\[4\], but .* bfloat16\[5\]"):
        restore_with(blocks | {"scale": jax.ShapeDtypeStruct((5,), jnp.bfloat16)})
    with pytest.raises(UserError, match="lacks params/blocks/more"):
        restore_with(blocks | {"more": jax.ShapeDtypeStruct((5,), jnp.bfloat16)})
    with pytest.raises(UserError, match="holds params/blocks/scale"):
        restore_with({"kernel": blocks["kernel"]})


# --- keeping -------------------------------------------------------------------------------------------------------------------


def test_keep_last_and_keep_every(tmp_path):
    with open_checkpoints(tmp_path, keep_last=2, keep_every_steps=30) as checkpoints:
        save_all(checkpoints, *range(10, 80, 10))
        assert checkpoints.steps() == [30, 60, 70]
        save_all(checkpoints, 80)
        assert checkpoints.steps() == [30, 60, 70, 80]
    assert sorted(os.listdir(tmp_path)) == ["00000030", "00000060", "00000070", "00000080"]


def test_a_damaged_checkpoint_pushes_out_no_good_one(tmp_path):
    with open_checkpoints(tmp_path, keep_last=3) as checkpoints:
        save_all(checkpoints, 1, 2, 3)
    flip_bit(tmp_path / "00000003" / "metadata.json")
    lines = []
    checkpoints = open_checkpoints(tmp_path, lines, keep_last=3)
    checkpoints.restore(abstract(make_state()))
    save_all(checkpoints, 4)
    assert checkpoints.steps() == [1, 2, 4]
    # Not looked at before either: the newest is intact, one further back is not.
    flip_bit(tmp_path / "00000002" / "metadata.json")
    checkpoints = open_checkpoints(tmp_path, lines, keep_last=3)
    save_all(checkpoints, 5)
    assert checkpoints.steps() == [1, 4, 5]
    assert "checkpoint 2 is damaged" in lines[-2]


def test_a_damaged_checkpoint_is_replaced_when_the_run_comes_to_it_again(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        save_all(checkpoints, 1, 2)
    flip_bit(tmp_path / "00000002" / "metadata.json")
    checkpoints = open_checkpoints(tmp_path)
    assert checkpoints.restore(abstract(make_state())).step == 1
    save_all(checkpoints, 2)
    assert restore(tmp_path).step == 2
    assert sorted(os.listdir(tmp_path)) == ["00000001", "00000002"]


def test_what_a_killed_save_left_is_cleaned_up(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        save_all(checkpoints, 1, 2)
    shutil.copytree(tmp_path / "00000002", tmp_path / "00000003")
    (tmp_path / "00000003" / "manifest.json").unlink()
    (tmp_path / "00000001").rename(tmp_path / "00000001.deleted")
    shutil.copytree(tmp_path / "00000003", tmp_path / "00000004")
    shutil.copytree(tmp_path / "00000002", tmp_path / "00000004.replaced")
    before = sorted(os.listdir(tmp_path))
    reader = Checkpoints(tmp_path, CheckpointConfig(), print, read_only=True)
    assert reader.last_saved_step == 2 and sorted(os.listdir(tmp_path)) == before
    lines = []
    assert open_checkpoints(tmp_path, lines).steps() == [2, 4]
    assert any("removed checkpoint 3" in line for line in lines) and any("put back checkpoint 4" in line for line in lines)
    assert sorted(os.listdir(tmp_path)) == ["00000002", "00000004"]


def test_a_reader_changes_nothing(tmp_path):
    reader = Checkpoints(tmp_path / "none", CheckpointConfig(), print, read_only=True)
    assert reader.restore(abstract(make_state())) is None and reader.last_saved_step is None
    with pytest.raises(ValueError, match="to be read"):
        reader.save(1, make_state(), {})
    assert os.listdir(tmp_path) == []


def test_a_leaf_that_is_no_jax_array_is_refused_by_name(tmp_path):
    with pytest.raises(TypeError, match="params/w is a int"):
        open_checkpoints(tmp_path).save(1, {"params": {"w": 3}}, {})


# --- failure -------------------------------------------------------------------------------------------------------------------


def test_a_failed_save_is_reported_at_once_and_ends_the_run_after_some(tmp_path, monkeypatch):
    lines = []
    checkpoints = open_checkpoints(tmp_path, lines, max_failures=2, keep_last=1)
    save_all(checkpoints, 1)

    def full(folder):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write", full)
        save_all(checkpoints, 2)
    assert "checkpoint 2 could not be saved (1 in a row)" in lines[-1] and "No space left" in lines[-1]
    assert "checkpoint 1 is kept" in lines[-1] and checkpoints.last_saved_step == 1
    assert os.listdir(tmp_path) == ["00000001"]
    save_all(checkpoints, 3)
    assert os.listdir(tmp_path) == ["00000003"]
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write", full)
        save_all(checkpoints, 4)
        checkpoints.save(5, make_state(5), {})
        with pytest.raises(CheckpointsFailing, match="2 checkpoints in a row .*No space left.*checkpoint 3 is kept"):
            checkpoints.wait()
    assert restore(tmp_path).step == 3


def test_a_failure_before_the_writing_begins_counts_too(tmp_path):
    lines = []
    folder = tmp_path / "checkpoints"
    checkpoints = open_checkpoints(folder, lines, max_failures=1)
    folder.rmdir()
    folder.write_text("a file in its place")
    with pytest.raises(CheckpointsFailing):
        checkpoints.save(1, make_state(1), {})
    assert "there is no older one" in lines[-1]


def test_a_replaced_checkpoint_is_put_back_where_its_successor_fails(tmp_path, monkeypatch):
    with open_checkpoints(tmp_path) as checkpoints:
        save_all(checkpoints, 1, 2)
    checkpoints = open_checkpoints(tmp_path)
    assert checkpoints.restore(abstract(make_state()), step=1).step == 1

    def full(folder):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(manifest, "write", full)
    save_all(checkpoints, 2)
    assert restore(tmp_path).step == 2


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    if not shutil.which("mount") or subprocess.run(["mount", "-t", "tmpfs", "-o", "size=3m", "tmpfs", folder]).returncode:
        pytest.skip("mounting a small tmpfs is not permitted here")
    yield folder
    subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk(small_disk):
    lines = []
    checkpoints = open_checkpoints(small_disk / "checkpoints", lines, max_failures=2)
    small = {"w": jnp.ones((300_000,))}  # 1.2 MB: two fit
    large = {"w": jnp.ones((900_000,))}
    checkpoints.save(1, small, {})
    checkpoints.save(2, large, {})
    checkpoints.wait()
    assert "checkpoint 2 could not be saved (1 in a row)" in lines[-1]
    assert os.listdir(checkpoints.directory) == ["00000001"]
    checkpoints.save(3, small, {})
    checkpoints.wait()
    assert lines[-1].startswith("checkpoint 3:")
    for step in (4, 5):
        checkpoints.save(step, large, {})
    with pytest.raises(CheckpointsFailing):
        checkpoints.wait()
    assert checkpoints.restore(abstract(small)).step == 3
    assert checkpoints.steps() == [1, 3]


# --- kill ----------------------------------------------------------------------------------------------------------------------

SAVE_FOR_EVER = """
    import pathlib, sys
    import jax.numpy as jnp
    from gptjax.config import CheckpointConfig
    from gptjax.train.checkpoints import Checkpoints
    checkpoints = Checkpoints(pathlib.Path(sys.argv[1]), CheckpointConfig(keep_last=1), lambda line: None)
    step = checkpoints.last_saved_step or 0
    while True:
        step += 1
        checkpoints.save(step, {"w": jnp.full((200_000,), step, jnp.float32)}, {"step": step})
        print(step, flush=True)
"""


def test_kill_at_any_moment_leaves_a_good_checkpoint(tmp_path):
    rng = random.Random(0)
    shape = {"w": jax.ShapeDtypeStruct((200_000,), jnp.float32)}
    reached = 0
    for _ in range(3):
        process = python(SAVE_FOR_EVER, tmp_path)
        for _ in range(3):  # returning from the second save means that the first is complete
            started = int(process.stdout.readline())
        time.sleep(rng.uniform(0, 0.3))
        process.kill()
        process.wait()
        process.stdout.close()
        restored = Checkpoints(tmp_path, CheckpointConfig(), print, read_only=True).restore(shape)
        assert restored.step >= started - 1 > reached and restored.metadata == {"step": restored.step}
        assert np.all(np.asarray(restored.state["w"]) == restored.step)
        reached = restored.step


def test_metadata_is_plain_json(tmp_path):
    with open_checkpoints(tmp_path) as checkpoints:
        save_all(checkpoints, 1)
    about = json.loads((tmp_path / "00000001" / "metadata.json").read_text())
    assert about["step"] == 1 and about["metadata"] == {"step": 1}
    assert about["leaves"]["params/blocks/kernel"] == ["float32", [100, 3]]
