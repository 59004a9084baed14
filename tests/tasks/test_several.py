"""Several tasks in one run: its knobs, whose the rows are, what a row costs, and the promises of a run of all kinds of tasks."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pathlib
import shutil
import signal

import jax
import numpy as np
import pytest

from gptjax import cli, generate
from gptjax.config import UserError, tasks_of, with_tasks
from gptjax.data.pipeline import Mixture, train_batches
from gptjax.parallel.mesh import make_mesh
from gptjax.tasks.load import load_tasks
from gptjax.train import loop
from gptjax.train.metrics import read_metrics
from gptjax.train.reference import FILE, with_reference
from gptjax.train.restore import load_run
from gptjax.train.step import summed_gradients, task_loss
from gptjax.train.task_evaluation import evaluate_tasks
from tests.parallel.run_module import run_module
from tests.small import random_params
from tests.tasks.text_cases import several, write_records

NAMES = ("label", "write", "talk", "prefer")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("several")
    write_records(path)
    return path


@pytest.fixture(scope="module")
def data(folder):
    return load_tasks(several(folder), lambda line: None)


# --- knobs --------------------------------------------------------------------------------------------------------------------


def test_each_task_has_its_settings_and_those_of_all(folder):
    config = several(folder, task__too_long="drop", task__mixture_settings=('label.labels=["a,b", "c|d"]', "talk.turns=last"))
    tasks = tasks_of(config)
    assert tuple(tasks) == NAMES and {one.too_long for one in tasks.values()} == {"drop"}
    assert tasks["label"].labels == ("a,b", "c|d") and tasks["talk"].turns == "last" and tasks["write"].turns == "all"
    settled = tasks | {"label": dataclasses.replace(tasks["label"], labels=("x", "y,z"))}
    assert tasks_of(with_tasks(config, settled)) == settled
    assert with_tasks(with_tasks(config, settled), settled) == with_tasks(config, settled)


@pytest.mark.parametrize(
    ("knobs", "fault"),
    [
        ({"task__mixture": ("a:b",)}, "task.mixture: 'a:b' must be NAME=KIND:PATH, NAME of letters, digits, - and _."),
        ({"task__mixture": ("a=chat:x", "a=chat:y")}, "task.mixture names a twice."),
        ({"task__mixture": ("a=chta:x",)}, "task.mixture: a is of kind 'chta', which is none of .*; did you mean chat?"),
        ({"task__mixture": ("a=chat",), "task__mixture_settings": ()}, "task.mixture: a.kind=chat needs task.mixture: a.path"),
        ({"task__mixture_settings": ("talk.turn=last",)}, "talk.turn is no setting of a task; did you mean turns?"),
        ({"task__mixture_settings": ("tolk.turns=last",)}, "'tolk' is no task; did you mean talk?"),
        ({"task__mixture_settings": ("talk.turns=lst",)}, "talk.turns='lst' must be one of all, last; did you mean last?"),
        ({"task__mixture_settings": ("talk.loss_weight=0",)}, "talk.loss_weight=0.0 must be above 0."),
        ({"task__mixture_weights": ("talk=1",)}, "task.mixture_weights has no weight for label and write and prefer"),
        ({"task__kind": "chat"}, "leave out task.kind and task.path"),
        ({"task__mixture": (), "task__mixture_settings": ("a.b=c",)}, "task.mixture_settings=a.b=c needs task.mixture"),
    ],
)
def test_a_mistake_in_the_knobs_is_told_in_a_sentence(folder, knobs, fault):
    with pytest.raises(UserError, match=fault.replace("?", "[?]").replace("(", "[(]")):
        several(folder, **knobs)


# --- rows ---------------------------------------------------------------------------------------------------------------------


def tasks_of_rows(config, dataset, steps: int) -> np.ndarray:
    batches = train_batches(config, dataset.train)
    rows = [batch["task"] for _, batch in zip(range(steps), batches, strict=False)]
    found = np.concatenate(rows)
    assert ((found == 0) | (found == found.max(axis=1, keepdims=True))).all()  # a row holds examples of one task
    return found.max(axis=1)


@pytest.mark.parametrize(
    ("knobs", "power", "given"),
    [
        ({}, 1.0, None),
        ({"task__mixture_temperature": 2.0}, 0.5, None),
        ({"task__mixture_weights": ("label=1", "write=2", "talk=1", "prefer=0")}, 0.0, [0.25, 0.5, 0.25, 0.0]),
    ],
)
def test_the_rows_are_shared_out_by_size_by_temperature_or_by_weights(folder, knobs, power, given):
    config = several(folder, **knobs)
    dataset = load_tasks(config, lambda line: None)
    assert isinstance(dataset.train, Mixture)
    sizes = np.asarray([len(split.rows) for split in dataset.train.splits.values()], np.float64)
    wanted = np.asarray(given) if given else sizes**power / (sizes**power).sum()
    rows = tasks_of_rows(config, dataset, 100)
    np.testing.assert_allclose([(rows == number).mean() for number in range(1, 5)], wanted, atol=0.01)


def test_another_task_beside_it_changes_no_order_of_a_tasks_rows(folder, data):
    path = folder / "records.jsonl"
    two = several(
        folder,
        task__mixture=(f"write=completion:{path}", f"talk=chat:{path}"),
        task__mixture_settings=("write.completion={texts}", "talk.chat_template=plain"),
    )
    found = []
    for config, dataset in ((several(folder), data), (two, load_tasks(two, lambda line: None))):
        number = list(tasks_of(config)).index("talk") + 1
        batches = train_batches(config, dataset.train)
        rows = [
            row for _, batch in zip(range(20), batches, strict=False) for row in batch["tokens"][batch["task"].max(1) == number]
        ]
        found.append(np.asarray(rows[:12]))
    np.testing.assert_array_equal(*found)


# --- what a row costs -----------------------------------------------------------------------------------------------------------


def test_a_row_costs_the_mean_over_its_tasks_targets_in_the_batch(folder, data):
    """However the batch is split into micro-batches; by the losses of each task as it is alone."""
    config = data.settled(several(folder))
    params = random_params(config)
    batch = next(batch for batch in train_batches(config, data.train) if len(set(batch["task"].max(1))) >= 3)
    whole = dataclasses.replace(config, train=dataclasses.replace(config.train, accumulation_steps=1))
    found = [jax.jit(lambda p, b, c=c: summed_gradients(c, p, b, None, task_loss))(params, batch) for c in (whole, config)]
    (gradients, sums), (split_gradients, split_sums) = found
    wanted = 0.0
    for number, (name, knobs) in enumerate(tasks_of(config).items(), 1):
        rows = batch["task"].max(1) == number
        if not rows.any():
            continue
        weight = float(sums[f"tasks/{name}/weight_sum"])
        wanted += knobs.loss_weight * rows.sum() * float(sums[f"tasks/{name}/nll_sum"]) / weight
        if name == "label":
            assert weight == ((batch["label/label"] > 0) & rows[:, None]).sum() and knobs.loss_weight == 2
        if name == "write":
            assert weight == ((batch["read"] > 0) & rows[:, None]).sum()
    assert float(sums["loss_sum"]) == pytest.approx(wanted, rel=1e-6)
    assert float(sums["weight_sum"]) == pytest.approx(len(batch["task"]), rel=1e-6)
    assert float(split_sums["loss_sum"]) == pytest.approx(wanted, rel=1e-5)
    for a, b in zip(jax.tree.leaves(split_gradients), jax.tree.leaves(gradients), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


# --- promises -------------------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory) -> tuple[pathlib.Path, dict]:
    workdir = tmp_path_factory.mktemp("run")
    return workdir, loop.train(several(folder), workdir)


def without_clock(workdir: pathlib.Path) -> list[dict]:
    clocks = ("seconds", "tokens_per_second")
    return [{key: value for key, value in row.items() if key not in clocks} for row in read_metrics(workdir / "metrics.jsonl")]


def test_the_figures_are_each_tasks_and_their_mean(undisturbed):
    workdir, result = undisturbed
    figures = result["eval"]
    losses = [figures[f"{name}/loss"] for name in NAMES]
    assert figures["loss"] == pytest.approx(np.dot(losses, [2, 1, 1, 1]) / 5)
    assert {"label/accuracy", "write/perplexity", "talk/perplexity", "prefer/accuracy", "prefer/margin"} <= figures.keys()
    assert figures["write/written"] == 2 and 0 <= figures["write/ended"] <= 1
    row = next(row for row in without_clock(workdir) if "train/loss" in row)
    assert all(f"tasks/{name}/{key}" in row for name in NAMES for key in ("nll", "weight"))
    assert set(result["mixture"]) == set(NAMES)
    labels = tasks_of(load_run(workdir, lambda line: None).config)["label"].labels
    assert labels == ("down", "up")


def test_the_first_loss_of_a_preference_is_that_of_the_initial_model(undisturbed):
    """Which differs from itself by nothing."""
    rows = [row for row in without_clock(undisturbed[0]) if row.get("tasks/prefer/weight") and row["step"] == 1]
    for row in rows:
        assert row["tasks/prefer/nll"] == pytest.approx(np.log(2), abs=1e-5)
    with np.load(undisturbed[0] / FILE, allow_pickle=False) as file:
        assert sorted(file.files) == ["eval/prefer/prefer", "train/prefer/prefer"] and (file["eval/prefer/prefer"] > 0).any()


@pytest.mark.parametrize("keeps_file", [True, False])
def test_a_stopped_run_goes_on_bit_for_bit(folder, undisturbed, tmp_path, monkeypatch, keeps_file):
    read = loop._read

    def stop_later(run, step, metrics):
        read(run, step, metrics)
        if step == 1:  # read while step 2 is under way, so that the run ends with step 3
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(loop, "_read", stop_later)
    with pytest.raises(loop.Interrupted):
        loop.train(several(folder), tmp_path)
    monkeypatch.undo()
    if not keeps_file:
        (tmp_path / FILE).unlink()
    again = loop.train(several(folder), tmp_path)
    assert again["state_sha256"] == undisturbed[1]["state_sha256"] and again["eval"] == undisturbed[1]["eval"]
    assert without_clock(tmp_path) == without_clock(undisturbed[0])
    assert (tmp_path / FILE).read_bytes() == (undisturbed[0] / FILE).read_bytes()


def test_packing_leaves_every_records_loss(folder, undisturbed):
    model = load_run(undisturbed[0], lambda line: None)
    found = {}
    for packing in ("packed", "padded"):
        config = several(folder, data__packing=packing)
        dataset = load_tasks(config, lambda line: None, model.tokenizer)
        config, mesh = dataset.settled(config), make_mesh(config.mesh)

        def never():
            raise AssertionError

        dataset = with_reference(config, dataset, undisturbed[0], mesh, never, print)
        figures, judged = evaluate_tasks(config, model.params, dataset, mesh)
        found[packing] = figures, {name: [one.nats / one.weight for one in own] for name, own in judged.items()}
    assert found["packed"][0] == pytest.approx(undisturbed[1]["eval"], abs=1e-12)
    for name in NAMES:
        np.testing.assert_allclose(found["packed"][1][name], found["padded"][1][name], atol=1e-6, rtol=0)


def test_a_mesh_changes_nothing():
    meshes = run_module("several_tasks")
    np.testing.assert_allclose(meshes["eight"]["loss"], meshes["one"]["loss"], rtol=2e-5)
    np.testing.assert_allclose(meshes["eight"]["eval"], meshes["one"]["eval"], rtol=2e-5, atol=1e-6)


def test_a_run_is_written_with_by_its_templates(folder, undisturbed, capsys, monkeypatch, tmp_path):
    workdir = undisturbed[0]

    def say(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = cli.main(["generate", f"--workdir={workdir}", "--max_new_tokens=3", *words])
        return status, *capsys.readouterr()

    status, out, _ = say("--task=write", "--prompt=red sun:", "--json")
    assert status == 0 and json.loads(out)["samples"][0]["prompt"] == "red sun:"
    status, out, _ = say("--task=prefer", '--prompt={"prompt": "a {b}"}', "--json")
    assert status == 0 and json.loads(out)["samples"][0]["prompt"] == "a {b}"
    assert "the run has write, prefer; name one of its tasks by --task=NAME" in say("--task", "--prompt=a")[2]
    assert "the prompt has no field 'prompt' for '{prompt}'" in say("--task=write", '--prompt={"a": 1}')[2]
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\n"))
    status, out, err = say("--chat", "--temperature=0")
    assert status == 0 and "gptjax:" not in err
    model = load_run(workdir, lambda line: None)
    answer = generate(model, "user: hello\nassistant:", max_new_tokens=3, temperature=0)[0]
    assert out == answer.text + "\n"


def test_evaluate_compares_with_the_initial_model_that_the_run_kept(undisturbed, capsys, tmp_path):
    assert cli.main(["evaluate", f"--workdir={undisturbed[0]}", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    wanted = undisturbed[1]["eval"]
    assert {key: figures[key] for key in wanted} == pytest.approx(wanted, abs=1e-12)
    copy = tmp_path / "run"
    shutil.copytree(undisturbed[0], copy)
    (copy / FILE).unlink()
    assert cli.main(["evaluate", f"--workdir={copy}"]) == 2
    assert "has no reference.npz, what its initial model said" in capsys.readouterr().err
