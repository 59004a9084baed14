"""Several processes, on one host or many, as one run: how they meet, what they tell each other, which rows each of them loads.

A run has one process until the environment says otherwise, and then nothing here does anything. With

    GPTJAX_COORDINATOR=HOST:PORT  GPTJAX_NUM_PROCESSES=N  GPTJAX_PROCESS_ID=0 .. N-1

or, where JAX can tell these by itself (SLURM, TPU pods, GKE, Open MPI), with GPTJAX_DISTRIBUTED=auto, `initialise` joins them.
Further: GPTJAX_INIT_TIMEOUT (300), seconds until all must have come; GPTJAX_HEARTBEAT_SECONDS (30) and GPTJAX_STUCK_SECONDS
(300), after which watch.py gives a silent or stuck process up.

Short texts go through the key-value store that process 0 keeps for jax.distributed: it needs no device, no compilation and no
shared folder, and is reachable from threads while the devices are busy.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

import numpy as np

from gptjax.config import UserError
from gptjax.parallel.watch import Watch

_TRIPLE = ("GPTJAX_COORDINATOR", "GPTJAX_NUM_PROCESSES", "GPTJAX_PROCESS_ID")


class HostsError(RuntimeError):
    """The processes of a run did not find each other, through no mistake in the config: starting them again may help."""


@dataclass(frozen=True)
class Settings:
    """What the environment asks for. `coordinator` is "" where JAX finds the cluster by itself."""

    coordinator: str
    num_processes: int
    process_id: int
    init_timeout: float
    heartbeat_seconds: float
    stuck_seconds: float


def settings(environment: Mapping[str, str]) -> Settings | None:
    """None where nobody asks for several processes. Raises `UserError` naming the variable that is missing or wrong."""
    given = [name for name in _TRIPLE if environment.get(name)]
    automatic = environment.get("GPTJAX_DISTRIBUTED", "")
    if automatic not in ("", "auto"):
        raise UserError(f"GPTJAX_DISTRIBUTED={automatic} must be auto, or not set.")
    if automatic and given:
        raise UserError(f"GPTJAX_DISTRIBUTED=auto and {given[0]} are both set; keep one.")
    if given and len(given) < 3:
        missing = [name for name in _TRIPLE if name not in given]
        raise UserError(f"{' and '.join(given)} without {' and '.join(missing)}; several processes need all three.")
    if not given and not automatic:
        return None
    seconds = (
        _number(environment, "GPTJAX_INIT_TIMEOUT", 300),
        _number(environment, "GPTJAX_HEARTBEAT_SECONDS", 30),
        _number(environment, "GPTJAX_STUCK_SECONDS", 300),
    )
    if automatic:
        return Settings("", 0, 0, *seconds)
    coordinator = environment["GPTJAX_COORDINATOR"]
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 2**16:
        raise UserError(f"GPTJAX_COORDINATOR={coordinator} must be HOST:PORT, of the host on which process 0 runs.")
    count = _whole(environment, "GPTJAX_NUM_PROCESSES")
    number = _whole(environment, "GPTJAX_PROCESS_ID")
    if count < 1:
        raise UserError(f"GPTJAX_NUM_PROCESSES={count} must be at least 1.")
    if number >= count:
        raise UserError(f"GPTJAX_PROCESS_ID={number} must be below GPTJAX_NUM_PROCESSES={count}.")
    return Settings(coordinator, count, number, *seconds)


def _whole(environment: Mapping[str, str], name: str) -> int:
    if not environment[name].isdigit():
        raise UserError(f"{name}={environment[name]} must be a whole number.")
    return int(environment[name])


def _number(environment: Mapping[str, str], name: str, default: float) -> float:
    text = environment.get(name, "")
    try:
        value = float(text or default)
    except ValueError:
        value = math.nan
    if not 1 <= value < math.inf:
        raise UserError(f"{name}={text} must be seconds, at least 1.")
    return value


# --- joining and leaving ------------------------------------------------------------------------------------------------------


@dataclass
class _Joined:
    process: int
    count: int
    board: Board
    watch: Watch
    questions: int = 0  # asked so far; every process asks the same ones in the same order


_joined: _Joined | None = None


def initialise() -> None:
    """Joins the processes that the environment names; does nothing where it names none, or if they have joined.

    To be called before JAX looks for devices. Raises `UserError` where ids or counts are wrong, `HostsError` where the
    coordinator is not reached. Where the others don't come within the timeout it ends the process with status 1, because JAX
    would abort it without a word of what was missing.
    """
    global _joined
    asked = settings(os.environ)
    if asked is None or _joined is not None:
        return
    _find_coordinator(asked)
    _keep_output_apart()
    import jax

    # Its handler of SIGTERM would be in the way of the training loop's, and knows nothing of Ctrl-C.
    jax.config.update("jax_enable_preemption_service", False)
    with _deadline(asked):
        jax.distributed.initialize(
            asked.coordinator or None,
            asked.num_processes if asked.coordinator else None,
            asked.process_id if asked.coordinator else None,
            cluster_detection_method="deactivate" if asked.coordinator else None,
            initialization_timeout=math.ceil(asked.init_timeout) + 30,  # ours comes first, and speaks
            # The same of heartbeats: JAX's end of a run is an abort with a stack of C++ functions.
            heartbeat_timeout_seconds=math.ceil(2 * asked.heartbeat_seconds) + 10,
            shutdown_timeout_seconds=3600,  # process 0 may have the last files to write
        )
    from jax._src import distributed  # JAX has no public door to its key-value store

    state = distributed.global_state
    board = Board(state.client)
    process, count = state.process_id, state.num_processes
    watch = Watch(board, process, count, asked.heartbeat_seconds, asked.stuck_seconds, leave=_exit)
    watch.start()
    _joined = _Joined(process, count, board, watch)
    try:
        _check_count(asked, count)
    except UserError as error:
        fail(str(error), 2)


def _keep_output_apart() -> None:
    """What is not Python's goes to standard error from here on: gloo writes to descriptor 1, before a result that is to be read
    by a program, whenever processes connect.
    """
    with contextlib.suppress(OSError, ValueError):  # standard output is closed, or no descriptor
        if sys.stdout.fileno() != 1:
            return
        sys.stdout.flush()
        own = os.dup(1)
        os.dup2(2, 1)
        options: dict[str, Any] = {"encoding": sys.stdout.encoding, "errors": sys.stdout.errors}
        sys.stdout = open(own, "w", buffering=1, closefd=False, **options)  # noqa: SIM115 - for the rest of the process


def _find_coordinator(asked: Settings) -> None:
    """Until somebody listens there (for process 0: nobody must), so that what is wrong can be said."""
    if not asked.coordinator:
        return
    host, _, port = asked.coordinator.rpartition(":")
    host = host.strip("[]")
    who = f"process {asked.process_id} on {socket.gethostname()}"
    if asked.process_id == 0:
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            try:
                probe.bind(("", int(port)))
            except OSError as error:
                raise HostsError(
                    f"GPTJAX_COORDINATOR={asked.coordinator}: {who} cannot listen there ({error.strerror})."
                ) from None
        return
    deadline = time.monotonic() + asked.init_timeout
    while True:
        try:
            with socket.create_connection((host, int(port)), timeout=5):
                return
        except OSError as error:
            if time.monotonic() >= deadline:
                raise HostsError(
                    f"GPTJAX_COORDINATOR={asked.coordinator} could not be reached by {who} in {asked.init_timeout:g} s "
                    f"({error.strerror or error}); is process 0 running there? (GPTJAX_INIT_TIMEOUT)"
                ) from None
        time.sleep(0.2)


@contextlib.contextmanager
def _deadline(asked: Settings) -> Iterator[None]:
    where = asked.coordinator or "the coordinator that JAX found"
    what = f"process {asked.process_id} of {asked.num_processes}" if asked.coordinator else "a process"
    # JAX aborts where two processes have one id, or an id is out of process 0's range; this line then says who it was.
    who = f"{what} on {socket.gethostname()}"
    _say(f"{who} joins {where}.")

    def give_up() -> None:
        _say(f"{who}: not all processes came to {where} in {asked.init_timeout:g} s (GPTJAX_INIT_TIMEOUT).")
        _exit(1)

    timer = threading.Timer(asked.init_timeout, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    except (ValueError, TypeError, RuntimeError) as error:
        raise HostsError(f"{who} could not join {where}: {_first_line(error)}") from error
    finally:
        timer.cancel()


def _check_count(asked: Settings, count: int) -> None:
    told = from_process_0(count)
    if told != count:
        raise UserError(f"GPTJAX_NUM_PROCESSES is {count} in process {process_index()}, but {told} in process 0.")


def leave() -> None:
    """The orderly end: waits for the others, so that none takes this process for dead."""
    global _joined
    if _joined is None:
        return
    _joined.watch.stop()
    import jax

    jax.distributed.shutdown()
    _joined = None


def fail(text: str, status: int) -> None:
    """In a run of several processes: says the sentence here, has the others say it too, and ends this process at once.

    Returns where there is one process only. A process that has failed cannot leave in order: it would wait for the others, who
    wait for it in a collective.
    """
    if _joined is not None:
        _end(_joined, text, status)


def _end(joined: _Joined, text: str, status: int) -> NoReturn:
    _say(f"{joined.watch.name(joined.process)}: {text}")
    joined.watch.announce(text, status)
    _exit(status)


def fail_with_traceback(error: BaseException) -> None:
    """The same for an error that nobody foresaw; where another process was its cause, that one is named."""
    if _joined is None:
        return
    import traceback

    found = _joined.watch.cause()
    if found is not None:
        _say(found[0])
        _exit(found[1])
    traceback.print_exception(error)
    _end(_joined, f"{type(error).__name__}: {_first_line(error)}", 1)


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [""])[0][:300]


def _say(text: str) -> None:
    sys.stdout.flush()
    print(f"gptjax: {text}", file=sys.stderr, flush=True)


def _exit(status: int) -> NoReturn:
    """Without exit handlers, which would wait for processes that are gone."""
    with contextlib.suppress(OSError, ValueError):
        sys.stdout.flush()
        sys.stderr.flush()
    os._exit(status)


# --- who is here, and what they tell each other ---------------------------------------------------------------------------------


def process_index() -> int:
    return 0 if _joined is None else _joined.process


def process_count() -> int:
    return 1 if _joined is None else _joined.count


def is_primary() -> bool:
    """Whether this is the one process that writes and speaks."""
    return process_index() == 0


def moved(what: str, number: int = 0, patience: float = 1.0) -> None:
    """Tells the watch that this process got on: it is now at `what` `number`, which takes at most `patience` times
    GPTJAX_STUCK_SECONDS. To be called at the same points by all processes.
    """
    if _joined is not None:
        _joined.watch.moved(what, number, patience)


class Board:
    """Texts by key, that every process can read and write."""

    def __init__(self, client: Any):
        self._client = client

    def write(self, key: str, text: str, replace: bool = True) -> None:
        self._client.key_value_set(f"gptjax/{key}", text, allow_overwrite=replace)

    def read_all(self, prefix: str) -> dict[str, str]:
        """Every text whose key begins with "PREFIX/", by the rest of its key."""
        found = self._client.key_value_dir_get(f"gptjax/{prefix}/")
        return {key.rpartition("/")[2]: text for key, text in found}

    def wait(self, key: str) -> str:
        """The text, as soon as it is there. It is the watch that ends a wait for a process that is gone."""
        while True:
            try:
                return self._client.blocking_key_value_get(f"gptjax/{key}", 10_000)
            except Exception as error:  # jaxlib's own kind, which has no public name
                if "DEADLINE_EXCEEDED" not in str(error):
                    raise


def _ask() -> tuple[_Joined, str] | None:
    if _joined is None or _joined.count == 1:
        return None
    _joined.questions += 1
    return _joined, f"question/{_joined.questions}"


def from_process_0(value: Any) -> Any:
    """Process 0's `value`, which JSON can hold, on all of them."""
    asked = _ask()
    if asked is None:
        return value
    joined, key = asked
    if joined.process == 0:
        joined.board.write(key, json.dumps(value))
        return value
    return json.loads(joined.board.wait(key))


@contextlib.contextmanager
def process_0_first() -> Iterator[None]:
    """What is inside is done by process 0 and, when it is done there, by the others. An error of process 0 ends them all."""
    asked = _ask()
    if asked is None:
        yield
        return
    joined, key = asked
    if joined.process:
        joined.board.wait(key)
    yield
    if joined.process == 0:
        joined.board.write(key, "done")


def check_same(values: Mapping[str, Any]) -> None:
    """Raises `UserError` naming the first of these values, which JSON can hold, that is another one than in process 0."""
    own = json.loads(json.dumps(values))
    told = from_process_0(own)
    for name, value in own.items():
        if value != told[name]:
            raise UserError(
                f"{name} is {value!r} in process {process_index()} on {socket.gethostname()}, but {told[name]!r} in process 0; "
                "all processes of a run need the same command, the same text and the same versions."
            )


def check_shared(file: Any, patience: float = 30.0) -> None:
    """Raises `UserError` where `file`, which process 0 has just written, does not come to be seen here with the same content."""
    text = from_process_0(file.read_text() if is_primary() else None)
    deadline = time.monotonic() + patience  # network file systems may take seconds
    while True:
        with contextlib.suppress(OSError):
            if file.read_text() == text:
                return
        if time.monotonic() >= deadline:
            raise UserError(
                f"{file}, which process 0 has written, is not seen by process {process_index()} on {socket.gethostname()}; "
                "--workdir must be a folder that all hosts share."
            )
        os.listdir(file.parent)  # has NFS look again
        time.sleep(0.2)


# --- arrays ---------------------------------------------------------------------------------------------------------------------


def batch_rows(sharding: Any, batch_size: int) -> np.ndarray:
    """int64, ascending: the rows of a batch that this process's devices hold.

    Processes between which the mesh splits something else than the batch (heads, say) hold the same rows. On a torus the rows
    of one host need not be neighbours.
    """
    held = sharding.addressable_devices_indices_map((batch_size,)).values()
    parts = sorted({part.indices(batch_size)[:2] for (part,) in held})
    return np.concatenate([np.arange(start, stop) for start, stop in parts])


def place_batch(sharding: Any, batch: Mapping[str, np.ndarray], batch_size: int) -> dict[str, Any]:
    """Global arrays [batch_size, ...] of what each process has of them: its `batch_rows`."""
    import jax

    return {
        name: jax.make_array_from_process_local_data(sharding, array, (batch_size, *array.shape[1:]))
        for name, array in batch.items()
    }


def fetch(tree: Any) -> Any:
    """`jax.device_get`, also of arrays of which other processes hold parts; then all processes must call it."""
    import jax

    def whole(leaf: Any) -> Any:
        if not isinstance(leaf, jax.Array) or leaf.is_fully_addressable or leaf.is_fully_replicated:
            return leaf
        from jax.experimental import multihost_utils

        return multihost_utils.process_allgather(leaf, tiled=True)

    return jax.device_get(jax.tree.map(whole, tree))


class StopVote:
    """After every step, all processes learn whether one of them has been told to stop, and learn it at the same step.

    Each step a number a device goes into a maximum over all devices, which is read one step later: by then it is done, so that
    nobody waits for it. The order of the programs on the devices decides who knows what when, and no clock: a text on the board,
    or JAX's own preemption service, would need a step far enough ahead for all to have read it. One process asks nobody.
    """

    def __init__(self, mesh: Any):
        self._alone = process_count() == 1
        self._pending: Any = None
        if self._alone:
            return
        import jax
        from jax.sharding import NamedSharding, PartitionSpec

        self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._size = mesh.size
        self._maximum = jax.jit(lambda votes: votes.max(), out_shardings=NamedSharding(mesh, PartitionSpec()))
        self._votes: dict[int, Any] = {}  # the array of each number that this process has voted

    def __call__(self, received: int) -> int:
        """Votes 0 or a signal's number; returns the greatest of the step before."""
        if self._alone:
            return received
        if received not in self._votes:
            import jax

            def mine(index: Any) -> np.ndarray:
                return np.full(1, received, np.int32)

            self._votes[received] = jax.make_array_from_callback((self._size,), self._sharding, mine)
        before, self._pending = self._pending, self._maximum(self._votes[received])
        return 0 if before is None else int(before)
