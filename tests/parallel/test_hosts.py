"""Several processes of one run: how they are asked for, what the watch says, and that accidents change nothing in the end."""

from __future__ import annotations

import importlib.util
import json
import math
import pathlib
import socket
import types
from typing import Any

import numpy as np
import pytest

from gptjax.config import MeshConfig, UserError
from gptjax.parallel import hosts
from gptjax.parallel.mesh import make_mesh
from gptjax.parallel.watch import Judge, Watch

pytestmark = pytest.mark.usefixtures("unoptimised")

ROOT = pathlib.Path(__file__).resolve().parents[2]
THREE = {"GPTJAX_COORDINATOR": "a:1", "GPTJAX_NUM_PROCESSES": "2", "GPTJAX_PROCESS_ID": "1"}


def test_nobody_asks_for_several_processes():
    assert hosts.settings({}) is None
    assert hosts.settings({"GPTJAX_HEARTBEAT_SECONDS": "5"}) is None
    assert (hosts.process_index(), hosts.process_count(), hosts.is_primary()) == (0, 1, True)
    assert hosts.from_process_0({"a": 1}) == {"a": 1}
    assert hosts.StopVote(None)(15) == 15


def test_the_environment_is_read():
    asked = hosts.settings({**THREE, "GPTJAX_INIT_TIMEOUT": "7"})
    assert asked == hosts.Settings("a:1", 2, 1, init_timeout=7, heartbeat_seconds=30, stuck_seconds=300)
    automatic = hosts.settings({"GPTJAX_DISTRIBUTED": "auto"})
    assert automatic is not None and automatic.coordinator == ""


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"GPTJAX_PROCESS_ID": ""}, "without GPTJAX_PROCESS_ID; several processes need all three"),
        ({"GPTJAX_DISTRIBUTED": "yes"}, "GPTJAX_DISTRIBUTED=yes must be auto"),
        ({"GPTJAX_DISTRIBUTED": "auto"}, "GPTJAX_DISTRIBUTED=auto and GPTJAX_COORDINATOR are both set"),
        ({"GPTJAX_COORDINATOR": "a"}, "GPTJAX_COORDINATOR=a must be HOST:PORT"),
        ({"GPTJAX_COORDINATOR": "a:99999"}, "must be HOST:PORT"),
        ({"GPTJAX_NUM_PROCESSES": "two"}, "GPTJAX_NUM_PROCESSES=two must be a whole number"),
        ({"GPTJAX_NUM_PROCESSES": "0", "GPTJAX_PROCESS_ID": "0"}, "GPTJAX_NUM_PROCESSES=0 must be at least 1"),
        ({"GPTJAX_PROCESS_ID": "2"}, "GPTJAX_PROCESS_ID=2 must be below GPTJAX_NUM_PROCESSES=2"),
        ({"GPTJAX_HEARTBEAT_SECONDS": "nan"}, "GPTJAX_HEARTBEAT_SECONDS=nan must be seconds"),
    ],
)
def test_a_wrong_environment_is_said_in_one_sentence(changes: dict[str, str], complaint: str):
    with pytest.raises(UserError, match=complaint):
        hosts.settings({**THREE, **changes})


def test_a_coordinator_that_is_not_there_is_named(monkeypatch):
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # and does not listen
        address = f"127.0.0.1:{closed.getsockname()[1]}"
        for name, value in {**THREE, "GPTJAX_COORDINATOR": address, "GPTJAX_INIT_TIMEOUT": "1"}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(
            hosts.HostsError, match=rf"{address} could not be reached by process 1 on .* in 1 s \(Connection refused"
        ):
            hosts.initialise()


def test_a_coordinator_s_port_that_is_taken_is_named(monkeypatch):
    with socket.socket() as other:
        other.bind(("", 0))
        other.listen()
        address = f"127.0.0.1:{other.getsockname()[1]}"
        for name, value in {**THREE, "GPTJAX_COORDINATOR": address, "GPTJAX_PROCESS_ID": "0"}.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(hosts.HostsError, match=f"{address}: process 0 on .* cannot listen there"):
            hosts.initialise()


def test_a_process_without_a_device_in_the_mesh_is_refused():
    devices = [types.SimpleNamespace(process_index=process) for process in (0, 0, 1, 1)]
    with pytest.raises(UserError, match="the mesh takes 2 of 4 devices and none of process 1's"):
        make_mesh(MeshConfig(data=2), devices)


def test_rows_are_those_that_the_devices_hold():
    """Of 8 rows over 4 parts: parts 0 and 2, of which two devices hold the first; a layout that keeps the batch whole."""
    held = {0: (slice(4, 6),), 1: (slice(0, 2),), 2: (slice(0, 2),)}
    sharding = types.SimpleNamespace(addressable_devices_indices_map=lambda shape: held)
    assert hosts.batch_rows(sharding, 8).tolist() == [0, 1, 4, 5]
    whole = types.SimpleNamespace(addressable_devices_indices_map=lambda shape: {0: (slice(None),)})
    assert hosts.batch_rows(whole, 3).tolist() == [0, 1, 2]


# --- the watch ------------------------------------------------------------------------------------------------------------------


def beats(*rows: tuple[int, int, str], patience: float = 1.0, **more: Any) -> dict[str, str]:
    """Texts of processes 0, 1, ... from (beat, moves, at)."""
    return {
        str(process): json.dumps(
            {"host": f"h{process}", "pid": 7, "beat": beat, "moves": moves, "at": at, "patience": patience} | more
        )
        for process, (beat, moves, at) in enumerate(rows)
    }


def test_the_silent_process_is_named():
    judge = Judge(3, heartbeat_seconds=5, stuck_seconds=100)
    for second in range(10):
        rows = [(second, second, "step 3"), (min(second, 3), 3, "step 3"), (second, second, "step 3")]
        verdict = judge.verdict(beats(*rows), 1.0)
        assert (verdict is None) == (second < 8)  # unchanged since second 3
        if verdict:
            assert verdict.startswith("process 1 on h1 (pid 7) has given no sign of life for 5 s (GPTJAX_HEARTBEAT_SECONDS)")
            return
    pytest.fail("nobody was missed")


def test_a_process_that_never_came_is_silent_and_one_that_left_is_not():
    judge = Judge(2, heartbeat_seconds=2, stuck_seconds=math.inf)
    told = [judge.verdict({"0": beats((n, n, ""))["0"]}, 1.0) for n in range(3)]
    assert told[:1] == [None] and str(told[2]).startswith("process 1 has given no sign of life")
    judge = Judge(2, heartbeat_seconds=2, stuck_seconds=math.inf)
    for n in range(5):
        left = beats((0, 0, ""), (0, 0, ""), left=True)["1"]
        assert judge.verdict({**beats((n, n, "")), "1": left}, 1.0) is None


def test_the_process_that_lags_is_named_when_nothing_moves():
    judge = Judge(3, heartbeat_seconds=5, stuck_seconds=4)
    rows = [(0, 9, "step 8"), (0, 8, "step 7"), (0, 9, "step 8")]
    said = [judge.verdict(beats(*[(second, *rest) for _, *rest in rows]), 1.0) for second in range(6)]
    assert said[:4] == [None] * 4
    assert said[4] is not None and said[4].startswith("process 1 on h1 (pid 7) is stuck at step 7 while others wait at step 8;")
    judge = Judge(2, heartbeat_seconds=5, stuck_seconds=4)
    said = [judge.verdict(beats((second, 9, "step 8"), (second, 9, "step 8")), 1.0) for second in range(6)]
    assert "all of them are at step 8" in str(said[4])


def test_some_places_take_longer_and_the_start_as_long_as_it_takes():
    for patience, told in ((1.0, True), (10.0, False), (math.inf, False)):
        judge = Judge(1, heartbeat_seconds=500, stuck_seconds=4)
        said = [judge.verdict(beats((second, 1, "x"), patience=patience), 1.0) for second in range(20)]
        assert any(said) == told


class Board(dict[str, str]):
    """In place of jax.distributed's."""

    def write(self, key: str, text: str, replace: bool = True) -> None:
        self[key] = text if replace or key not in self else self[key]

    def read_all(self, prefix: str) -> dict[str, str]:
        return {key.rpartition("/")[2]: text for key, text in self.items() if key.startswith(prefix + "/")}


def test_what_one_process_announces_the_others_say_and_take_its_status(capsys):
    board, statuses = Board(), []
    watches = [Watch(board, process, 2, 1.0, 100.0, leave=statuses.append) for process in range(2)]
    watches[1].announce("its disk is full.", 2)
    watches[0].moved("step", 3, 1.0)
    watches[0].start()
    watches[0]._threads[0].join(timeout=20)
    watches[0].stop()
    assert statuses == [2]
    said = capsys.readouterr().err
    assert said.startswith("gptjax: process 0 on ") and "ends: process 1 on " in said and "its disk is full." in said
    assert json.loads(board["beat/0"])["left"] is True


def test_the_cause_of_an_error_is_looked_for_among_the_others():
    board = Board()
    watches = [Watch(board, process, 2, 1.0, 100.0, leave=lambda status: None) for process in range(2)]
    watches[1]._publish()  # and then no more
    found = watches[0].cause()
    assert found is not None and "process 1 on" in found[0] and "no sign of life for 1 s" in found[0] and found[1] == 1
    watches[1].start()
    watches[1].stop()
    board.pop("verdict/0")
    assert watches[0].cause() is None


# --- real processes -------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def campaign() -> Any:
    spec = importlib.util.spec_from_file_location("hosts_campaign", ROOT / "experiments/hosts/hosts.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(__import__("sys").modules, "hosts_campaign", module)  # where its dataclass looks itself up
        spec.loader.exec_module(module)
        yield module


@pytest.fixture(scope="module")
def launcher(campaign: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return campaign.Launcher(tmp_path_factory.mktemp("hosts"), heartbeat=3.0)


@pytest.fixture(scope="module")
def undisturbed(campaign: Any, launcher: Any) -> str:
    campaign.check(launcher.start("undisturbed", 2), [0, 0])
    return launcher.state("undisturbed")


def test_one_then_four_then_two_processes_take_each_document_once(campaign: Any, launcher: Any, undisturbed: str):
    """On other axes too: at last both processes hold the same rows, and half of the heads each."""
    campaign.check(launcher.start("elastic", 1, "term:4", victim=0), [75])
    campaign.check(launcher.start("elastic", 4, "term:8", victim=2), [75] * 4)
    last = {"mesh.data": 1, "mesh.tensor": 2, "evaluate.sample_tokens": 3}
    campaign.check(launcher.start("elastic", 2, **last), [0, 0])
    assert launcher.documents("elastic") == [f"train {number:04d}" for number in range(campaign.DOCUMENTS)]
    assert campaign.largest_difference(launcher.losses("undisturbed"), launcher.losses("elastic")) < 1e-5
    assert len(list((launcher.folder / "elastic" / "samples").iterdir())) == 1


def test_accidents_end_all_processes_and_change_nothing_in_the_end(campaign: Any, launcher: Any, undisturbed: str):
    killed = campaign.check(launcher.start("accidents", 2, "kill:4"), [1, -9])
    stopped = campaign.check(launcher.start("accidents", 2, "stop:7"), [1, -9])
    for ended in (killed, stopped):
        assert "process 1 on" in ended.errors[0] and "no sign of life" in ended.errors[0]
    told = campaign.check(launcher.start("accidents", 2, "term:10"), [75, 75])
    assert all("SIGTERM" in text for text in told.errors)
    campaign.check(launcher.start("accidents", 2), [0, 0])
    assert launcher.state("accidents") == undisturbed
    np.testing.assert_array_equal(launcher.losses("accidents")["train/loss"], launcher.losses("undisturbed")["train/loss"])
