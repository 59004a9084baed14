"""A run is a folder: who may write there, which config it was started with, where it ran and what came of it.

The folder holds `run.lock` while the run lives, `config.json` from the start and `result.json` at the end. On several hosts,
process 0 alone calls what writes here.
"""

from __future__ import annotations

import contextlib
import difflib
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import pathlib
import platform
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import Any

import gptjax
from gptjax import config as config_lib
from gptjax.config import Config, UserError

# --- files that are either the old one or the new one -------------------------------------------------------------------------


def write_atomically(path: pathlib.Path, content: bytes) -> None:
    """Replaces `path`: whatever the moment of a crash, the file is the old one or the new one, whole and on the disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)


def sync(path: pathlib.Path) -> None:
    """Has the disk hold what `path`, a file or a folder's list of names, holds now."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_json(path: pathlib.Path, obj: Any) -> None:
    """Replaces `path` by `obj` as JSON, atomically. NaN and infinities, which JSON does not have, raise ValueError."""
    write_atomically(path, (json.dumps(obj, indent=2, ensure_ascii=False, allow_nan=False) + "\n").encode())


def write_result(workdir: pathlib.Path, result: dict[str, Any]) -> None:
    """Writes `result.json`, which marks the run as finished."""
    write_json(workdir / "result.json", result)


def read_result(workdir: pathlib.Path) -> dict[str, Any] | None:
    """What a finished run wrote; None where the run has not finished. Raises `UserError` where the file is not JSON."""
    path = workdir / "result.json"
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from None


# --- one live run a folder ----------------------------------------------------------------------------------------------------

_held: set[int] = set()  # descriptors of this process's locks


def _drop_in_child() -> None:
    # A flock lives as long as any copy of its descriptor: a forked worker that outlives its killed parent would go on holding it.
    for descriptor in _held:
        with contextlib.suppress(OSError):
            os.close(descriptor)
    _held.clear()


os.register_at_fork(after_in_child=_drop_in_child)


class RunLock:
    """Context manager: at most one live process has the run's folder.

    `run.lock` names host, process and the process's start. What excludes others is the kernel's lock (flock) on that file,
    which dies with its holder, so recovering after `kill -9` is the same atomic act as taking the lock: of many who try, one
    wins. Because file systems shared between hosts may keep flock to one host, a file that another host left is refused, with
    the sentence how to remove it; unless both have the same GPTJAX_JOB, a name under which a scheduler never has two starts of
    a job alive at once.

    Raises `UserError` where the folder is taken.
    """

    def __init__(self, workdir: pathlib.Path, log: Callable[[str], None] = lambda line: None):
        self.path = pathlib.Path(workdir) / "run.lock"
        self._log = log
        self._descriptor: int | None = None

    def __enter__(self) -> RunLock:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = self._lock_file()
        try:
            self._settle_with_the_one_before(_read_lock(descriptor))
            own = {"host": socket.gethostname(), "pid": os.getpid(), "started": start_time(os.getpid()), "job": _job()}
            content = json.dumps(own) + "\n"
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, content.encode(), 0)
            os.fsync(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        _held.add(descriptor)
        self._descriptor = descriptor
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        descriptor, self._descriptor = self._descriptor, None
        if descriptor is None or descriptor not in _held:  # not in _held: a forked child, whose parent still has the lock
            return
        _held.discard(descriptor)
        self.path.unlink(missing_ok=True)  # before the lock goes, so that nobody's newer file is removed
        os.close(descriptor)

    def _lock_file(self) -> int:
        """A descriptor of the file that is at `self.path` now, locked."""
        while True:
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o644)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                # Whoever held the lock may have removed the file between our opening and our locking it: then ours is no lock.
                if os.path.samestat(os.fstat(descriptor), os.stat(self.path)):
                    return descriptor
            except BlockingIOError:
                holder = _read_live_lock(descriptor)
                os.close(descriptor)
                raise UserError(f"{self.path.parent} is in use by a live run, {_who(holder)}.") from None
            except FileNotFoundError:
                pass
            except OSError as error:
                os.close(descriptor)
                if error.errno not in (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP):
                    raise
                return self._open_without_flock(error)
            os.close(descriptor)

    def _open_without_flock(self, error: OSError) -> int:
        """Some network file systems have no flock. Then the file's being there is the lock, and only a person can recover it."""
        descriptor = os.open(self.path, os.O_RDWR)
        holder = _read_lock(descriptor)
        if holder:
            os.close(descriptor)
            raise UserError(
                f"{self.path.parent} is locked by {_who(holder)}, and its file system has no flock to tell whether that run is "
                f"alive; if it is not, remove {self.path}."
            ) from error
        self._log(f"the file system of {self.path} has no flock ({error.strerror}): two runs started at once would both go on.")
        return descriptor

    def _settle_with_the_one_before(self, holder: dict[str, Any]) -> None:
        if not holder:
            return
        if holder["host"] != socket.gethostname() and holder["job"] and holder["job"] == _job():
            self._log(f"recovered the lock on {self.path.parent} that {_who(holder)} left, an earlier start of job {_job()}.")
            return
        if holder["host"] != socket.gethostname():
            raise UserError(
                f"{self.path.parent} is locked by {_who(holder)}, whose processes are not seen from {socket.gethostname()}; "
                f"if no run is alive there, remove {self.path}."
            )
        if is_alive(holder["pid"], holder["started"]):  # a mount on which flock is granted to everybody
            raise UserError(f"{self.path.parent} is in use by a live run, {_who(holder)}.")
        self._log(f"recovered the lock on {self.path.parent} that {_who(holder)} left when it died.")


def _who(holder: dict[str, Any]) -> str:
    return f"process {holder['pid']} on {holder['host']}" if holder else "a process that has not yet written its name"


def _read_lock(descriptor: int) -> dict[str, Any]:
    """The lock's content; {} where it is empty or torn."""
    with contextlib.suppress(ValueError, TypeError, KeyError):
        content = json.loads(os.pread(descriptor, 4096, 0))
        names = {name: str(content[name]) for name in ("host", "started")}
        return names | {"pid": int(content["pid"]), "job": str(content.get("job", ""))}
    return {}


def _job() -> str:
    return os.environ.get("GPTJAX_JOB", "")


def _read_live_lock(descriptor: int, patience: float = 1.0) -> dict[str, Any]:
    """The same of a lock that is held: its holder may not yet have written over a dead name."""
    deadline = time.monotonic() + patience
    while True:
        holder = _read_lock(descriptor)
        settled = holder and (holder["host"] != socket.gethostname() or is_alive(holder["pid"], holder["started"]))
        if settled or time.monotonic() >= deadline:
            return holder
        time.sleep(0.02)


def start_time(pid: int) -> str:
    """When the process was started, in words that only it has; '' where there is no such process (or it is a zombie)."""
    try:
        boot = pathlib.Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        # Fields 3 and 22: state, and start in clock ticks since boot. Field 2, a name in brackets, may hold blanks and brackets.
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        return "" if fields[0] in "ZX" else f"{boot}:{fields[19]}"
    except (FileNotFoundError, ProcessLookupError):
        if os.path.exists("/proc/self/stat"):
            return ""
    shown = subprocess.run(["ps", "-o", "lstart=", "-p", str(pid)], capture_output=True, text=True, check=False)
    return shown.stdout.strip()


def is_alive(pid: int, started: str) -> bool:
    """Whether the process that was started then still runs: another one that was given the same number is not it."""
    return bool(started) and start_time(pid) == started


# --- the config that the run was started with ---------------------------------------------------------------------------------


def check_config(workdir: pathlib.Path, config: Config, allow_changes: Sequence[str], log: Callable[[str], None]) -> None:
    """Writes `config.json` at the first start; later refuses a config that would make another run of this one.

    Knobs that do not shape the run may change freely, the others where `allow_changes` names them; then `config.json` is
    written anew. A knob that the file lacks, being written by an older version, had its default. Raises `UserError` naming each
    key with both values.
    """
    known = list(config_lib.flatten(Config()))
    for key in allow_changes:
        if key not in known:
            near = difflib.get_close_matches(key, known, n=1, cutoff=0.0)
            raise UserError(f"--allow_changes names the unknown config key {key}; did you mean {near[0]}?")
    path = workdir / "config.json"
    text = config_lib.to_json(config).encode()
    if not path.exists():
        workdir.mkdir(parents=True, exist_ok=True)
        write_atomically(path, text)
        return
    try:
        before = config_lib.from_json(path)
    except UserError as error:
        raise error if str(path) in str(error) else UserError(f"{path} cannot be read: {error}") from None
    shaping = config_lib.differences(before, config, shaping_only=True)
    refused = [key for key in shaping if key not in allow_changes]
    if refused:
        changes = ", ".join(f"{key} from {shaping[key][0]!r} to {shaping[key][1]!r}" for key in refused)
        allow = ",".join([*allow_changes, *refused])
        raise UserError(
            f"{workdir} is the folder of a run with another config, which this one would change in {changes}; "
            f"take another --workdir, or go on with --allow_changes={allow}."
        )
    for key, (old, new) in config_lib.differences(before, config).items():
        log(f"config changed: {key} from {old!r} to {new!r}.")
    if path.read_bytes() != text:
        write_atomically(path, text)


# --- what a state is, and where it was made -----------------------------------------------------------------------------------


def named_leaves(tree: Any) -> dict[str, Any]:
    """{"params/blocks/mlp/kernel": leaf, ...}, sorted by name. A field, a key and a place in a tuple are written alike."""
    import jax

    with_paths = jax.tree_util.tree_leaves_with_path(tree)
    leaves = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in with_paths}
    if len(leaves) != len(with_paths):
        raise ValueError("two leaves of the tree have the same path; a key must not hold '/'.")
    return dict(sorted(leaves.items()))


def state_sha256(state: Any) -> str:
    """One hash of names, dtypes, shapes and bytes of all leaves, whatever their shardings.

    Leaves are fetched one at a time and let go, so that no second copy of the state is made.
    """
    digest = hashlib.sha256()
    for name, leaf in named_leaves(state).items():
        values, dtype, shape = _host_values(leaf)
        digest.update(f"{name}\n{dtype}\n{list(shape)}\n".encode())
        digest.update(memoryview(values.reshape(-1).view("uint8")))
    return digest.hexdigest()


def _host_values(leaf: Any) -> tuple[Any, str, tuple[int, ...]]:
    """(contiguous numpy values, dtype, shape); a typed PRNG key has the values of its data and its own dtype and shape."""
    import jax
    import numpy as np

    if not isinstance(leaf, jax.Array):
        values = np.ascontiguousarray(leaf)
        return values, str(values.dtype), np.shape(leaf)
    dtype, shape = str(leaf.dtype), leaf.shape
    if jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    if not leaf.is_fully_addressable:
        from jax.experimental import multihost_utils

        return np.ascontiguousarray(multihost_utils.process_allgather(leaf, tiled=True)), dtype, shape
    # numpy's view of an array is kept inside the array for good; of a copy on the host, it goes with the copy.
    with contextlib.suppress(RuntimeError):  # JAX_PLATFORMS may have left the CPU out
        leaf = jax.device_put(leaf, jax.local_devices(backend="cpu")[0])
    return np.ascontiguousarray(leaf), dtype, shape


_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "grain", "numpy")


def environment() -> dict[str, Any]:
    """{"versions", "git_commit", "git_dirty", "hardware", "flags"} of this process; "unknown" where it cannot be told.

    Starts JAX's backend.
    """
    import jax

    commit, dirty = _git(pathlib.Path(gptjax.__file__).parent)
    devices = jax.devices()
    return {
        "versions": {"python": platform.python_version(), "gptjax": gptjax.__version__}
        | {package: _version(package) for package in _PACKAGES},
        "git_commit": commit,
        "git_dirty": dirty,
        "hardware": {
            "platform": devices[0].platform,
            "device_kind": devices[0].device_kind,
            "device_count": len(devices),
            "process_count": jax.process_count(),
            "cpu_model": _cpu_model(),
            "cpu_cores": len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        },
        "flags": _flags(),
    }


_COMPILERS = ("XLA_FLAGS", "LIBTPU_INIT_ARGS", "NVIDIA_TF32_OVERRIDE")
_NUMERICS = (
    "default_matmul_precision",
    "default_prng_impl",
    "disable_most_optimizations",
    "enable_x64",
    "threefry_partitionable",
)


def _flags() -> dict[str, Any]:
    """What XLA and JAX were told that may change numbers."""
    import jax

    settings = {f"jax_{name}": jax.config.values.get(f"jax_{name}") for name in _NUMERICS}
    return {name: os.environ.get(name, "") for name in _COMPILERS} | settings


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _git(package: pathlib.Path) -> tuple[str, bool | str]:
    """(commit, whether the package differs from it) of the repository that tracks the package."""

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(package), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    try:
        # An installed copy may lie inside somebody else's repository, in its .venv: that commit says nothing about us.
        git("ls-files", "--error-unmatch", "__init__.py")
        return git("rev-parse", "HEAD"), bool(git("status", "--porcelain", "--", "."))
    except (OSError, subprocess.SubprocessError):
        return "unknown", "unknown"


def _cpu_model() -> str:
    with contextlib.suppress(OSError):
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine() or "unknown"
