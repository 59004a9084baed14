"""What holds for every kind of task: a killed run goes on bit for bit, a mesh changes nothing, nor does the packing of rows."""

from __future__ import annotations

import os
import pathlib
import signal

import numpy as np
import pytest

from gptjax.config import UserError
from gptjax.parallel.mesh import make_mesh
from gptjax.tasks.load import load_tasks
from gptjax.train import loop
from gptjax.train.metrics import read_metrics
from gptjax.train.restore import load_run
from gptjax.train.task_evaluation import evaluate_tasks, judge
from tests.parallel.run_module import run_module
from tests.tasks.cases import CASES, case, write_records


@pytest.fixture(scope="module")
def records(tmp_path_factory) -> pathlib.Path:
    return write_records(tmp_path_factory.mktemp("records") / "records.jsonl")


@pytest.fixture(scope="module")
def runs(records, tmp_path_factory):
    """(name of a case) -> (folder of its undisturbed run, result), run once."""
    done: dict[str, tuple[pathlib.Path, dict]] = {}

    def run(name: str) -> tuple[pathlib.Path, dict]:
        if name not in done:
            folder = tmp_path_factory.mktemp(name)
            done[name] = folder, loop.train(case(name, records), folder)
        return done[name]

    return run


def without_clock(workdir: pathlib.Path) -> list[dict]:
    clocks = ("seconds", "tokens_per_second")
    return [{key: value for key, value in row.items() if key not in clocks} for row in read_metrics(workdir / "metrics.jsonl")]


@pytest.mark.parametrize("name", CASES)
def test_a_stopped_run_goes_on_bit_for_bit(name, records, runs, tmp_path, monkeypatch):
    folder, result = runs(name)
    read = loop._read

    def stop_later(run, step, metrics):
        read(run, step, metrics)
        if step == 1:  # read while step 2 is under way, so that the run ends with step 3
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop, "_read", stop_later)
    with pytest.raises(loop.Interrupted):
        loop.train(case(name, records), tmp_path)
    monkeypatch.undo()
    again = loop.train(case(name, records), tmp_path)
    assert again["state_sha256"] == result["state_sha256"] and again["eval"] == result["eval"]
    assert without_clock(tmp_path) == without_clock(folder)


@pytest.mark.parametrize("name", CASES)
def test_packing_and_batch_size_leave_every_record_s_loss(name, records, runs):
    """Batches of 8 rows that hold several examples, against 4 rows of one each."""
    folder, result = runs(name)
    model = load_run(folder, lambda line: None)
    losses = {}
    for packing, rows in (("packed", 8), ("padded", 4)):
        config = case(name, records, data__packing=packing, evaluate__batch_size=rows)
        dataset = load_tasks(config, lambda line: None, model.tokenizer)
        config = dataset.settled(config)
        figures, judged = evaluate_tasks(config, model.params, dataset, make_mesh(config.mesh))
        losses[packing, rows] = np.asarray([one.nats / one.weight for one in judged["task"]])
        if (packing, rows) == ("packed", 8):
            assert figures == {key: pytest.approx(value, abs=1e-12) for key, value in result["eval"].items()}
            assert len(dataset.eval.rows) < len(dataset.examples["eval"])  # some rows hold several
    np.testing.assert_allclose(losses["packed", 8], losses["padded", 4], atol=1e-6, rtol=0)


def test_all_records_are_judged_once_and_in_order(records, runs):
    model = load_run(runs("tagging")[0], lambda line: None)
    config = model.config
    dataset = load_tasks(config, lambda line: None, model.tokenizer)
    args = dataset.examples["eval"], dataset.records["eval"], make_mesh(config.mesh)
    judged = judge(config, model.params, dataset.eval, *args)["task"]
    assert [one.record for one in judged] == [record.values for record in dataset.records["eval"]["task"]]
    few = judge(config, model.params, dataset.eval, *args, 1)["task"]
    assert 0 < len(few) < len(judged)


@pytest.fixture(scope="module")
def meshes() -> dict:
    """What every case computes on 1, 2 and 8 devices."""
    return run_module("task_devices")


@pytest.mark.parametrize("name", CASES)
def test_a_mesh_changes_nothing(name, meshes):
    one = meshes[name]["one"]
    for mesh in ("two", "eight"):
        other = meshes[name][mesh]
        assert other["heads"] == one["heads"]
        np.testing.assert_allclose(other["loss"], one["loss"], rtol=2e-5)
        np.testing.assert_allclose(other["outputs"], one["outputs"], rtol=2e-5, atol=2e-6)


def test_labels_of_a_new_record_are_checked_before_anything_is_compiled(records, tmp_path):
    other = tmp_path / "other.jsonl"
    other.write_text('{"text": "a", "label": "none"}\n{"text": "b", "label": "horse"}\n', encoding="utf-8")
    with pytest.raises(UserError, match="line 2 has the label 'horse', which is none of cat, none"):
        load_tasks(case("classification", records, task__eval_path=other), lambda line: None)
