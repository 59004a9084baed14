"""A step once more: the same bits, its documents' losses against float64, and norms against what checkpoints hold."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import cli
from gptjax.config import Config, UserError
from gptjax.data.origins import step_batch
from gptjax.data.pipeline import steps_per_epoch
from gptjax.parallel.mesh import make_mesh
from gptjax.tasks.load import load_tasks
from gptjax.tasks.losses import task_losses, with_units
from gptjax.train import loop
from gptjax.train.attribution import target_losses
from gptjax.train.checkpoints import Checkpoints
from gptjax.train.documents import documents_of
from gptjax.train.objectives import OBJECTIVES
from gptjax.train.optimizers import Lengths
from gptjax.train.replay import replay
from gptjax.train.replay_report import by_layer, lines
from gptjax.train.run import named_leaves
from gptjax.train.step import (
    abstract_state,
    example_loss,
    head_options,
    hidden_states,
    init_state,
    step_dropout_keys,
    task_inputs,
    within_model,
)
from tests.model.test_decoder import forward_64
from tests.small import random_batch, random_params, small
from tests.tasks import text_cases
from tests.train.runs import quiet, small_run, write_documents

STEPS = 4


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> pathlib.Path:
    documents = write_documents(tmp_path_factory.mktemp("documents") / "documents.jsonl")
    workdir = tmp_path_factory.mktemp("run")
    loop.train(small_run(documents, train__duration_steps=STEPS, evaluate__sample_tokens=0), workdir)
    return workdir


@pytest.fixture(scope="module")
def third(run):
    return replay(run, 3, log=quiet)


@pytest.fixture(scope="module")
def first(run):
    return replay(run, 1, log=quiet)


def params_at(found: Any, step: int) -> Any:
    """Those of a checkpoint."""
    mesh = make_mesh(found.config.mesh)
    wanted = abstract_state(found.config, Lengths(STEPS, 0, 1), mesh)
    with Checkpoints(found.folder / "checkpoints", found.config.checkpoint, quiet, read_only=True) as checkpoints:
        restored = checkpoints.restore(wanted, step)
    assert restored is not None
    return jax.tree.map(np.asarray, restored.state.params)


# --- packed documents ---------------------------------------------------------------------------------------------------------


def test_the_recorded_numbers_come_out_the_same(first, third):
    assert third.from_step == 2 and third.agreement.is_exact and third.agreement.compared == 6
    assert first.from_step == 0 and first.agreement.is_exact


def test_losses_by_document_are_those_of_each_document_alone_in_float64(third):
    params = params_at(third, 2)
    packed = [one for one in third.documents if one.segment > 1]
    assert packed, "some rows hold several documents"
    for one in third.documents:
        ids = np.asarray(one.ids)
        assert one.text.startswith(bytes(number for number in one.ids if number < 256).decode())
        logits = forward_64(third.config.model, params, ids[:-1], np.arange(len(ids) - 1), np.ones(len(ids) - 1))
        top = logits.max(-1)
        nats = top + np.log(np.exp(logits - top[:, None]).sum(-1)) - logits[np.arange(len(ids) - 1), ids[1:]]
        assert one.loss == pytest.approx(nats.sum(), rel=2e-6) and one.nats == pytest.approx(nats.sum(), rel=2e-6)
        assert one.weight == len(nats) and one.mean == pytest.approx(nats.mean(), rel=2e-6)
        np.testing.assert_allclose([target.loss for target in one.targets], nats, rtol=2e-5)
        assert [target.id for target in one.targets] == ids[1:].tolist()
        assert [target.loss for target in one.worst(3)] == sorted((target.loss for target in one.targets), reverse=True)[:3]
    means = [one.mean for one in third.documents]
    assert means == sorted(means, reverse=True)


def test_documents_and_parameters_add_up_to_the_step_s_figures(third):
    assert third.gaps["train/loss"] < 1e-6 and third.gaps["gradient_norm"] < 1e-6
    assert sum(one.weight for one in third.documents) == third.figures["train/weight"]
    assert sum(part["share"] for part in by_layer(third.norms).values()) == pytest.approx(1)


def test_norms_are_those_of_the_checkpoints(first, third):
    """And of the first step of SGD, which is the clipped gradient times the rate."""
    for found, rate in ((third, None), (first, 0.5)):
        step = found.step
        after = named_leaves(params_at(found, step))
        before = named_leaves(params_at(found, step - 1)) if step > 1 else None
        factor = min(1.0, found.config.optimizer.clip_norm / found.figures["gradient_norm"])
        assert {one.name for one in found.norms} == after.keys()
        for one in found.norms:
            here = slice(None) if one.layer is None else one.layer
            if before is not None:
                old, new = (np.float64(leaves[one.name])[here] for leaves in (before, after))
                assert one.parameters == pytest.approx(np.linalg.norm(old), rel=1e-5)
                # A parameter is rounded when it is written: to half of its last bit.
                slack = 2**-23 * np.linalg.norm(old)
                assert one.update == pytest.approx(np.linalg.norm(new - old), rel=1e-5, abs=slack)
            if rate is not None:
                # A shift of all scores changes no attention: the gradient of key biases is nothing but rounding.
                slack = 2**-23 * one.parameters + 1e-9 * found.figures["gradient_norm"]
                assert one.update == pytest.approx(rate * factor * one.gradient, rel=1e-4, abs=slack), one.name
    assert {one.layer for one in third.norms if one.name.startswith("layers/")} == {0, 1}


def test_the_command_prints_and_writes_it(run, tmp_path, capsys):
    out = tmp_path / "step.json"
    assert cli.main(["replay", str(run), "--step=3", "--top=2", f"--out={out}"]) == 0
    told = capsys.readouterr().out
    assert "bit for bit: all 6 numbers that the run wrote down of step 3 came out the same." in told
    assert "and " in told and " more (--top, --json)." in told and "layers/attention/query/kernel" in told
    found = json.loads(out.read_text())
    assert found["recorded"]["exact"] and len(found["documents"]) > 2 and found["documents"][0]["target_losses"]
    assert [layer["part"] for layer in found["layers"]] == ["embed", "final_norm", "layers/0", "layers/1"]


def test_changed_numbers_and_damaged_checkpoints_are_told(run, tmp_path, capsys):
    copy = tmp_path / "copy"
    for path in run.rglob("*"):
        if path.is_file():
            (copy / path.relative_to(run)).parent.mkdir(parents=True, exist_ok=True)
            (copy / path.relative_to(run)).write_bytes(path.read_bytes())
    text = (copy / "metrics.jsonl").read_text()
    loss = next(json.loads(line)["train/loss"] for line in text.splitlines() if '"step": 3' in line)
    (copy / "metrics.jsonl").write_text(text.replace(str(loss), str(loss + 1)))
    (copy / "checkpoints" / "00000002" / "metadata.json").write_text("{")
    assert cli.main(["replay", str(copy), "--step=3"]) == 1
    told = capsys.readouterr().out
    assert "2 steps from the checkpoint of step 1" in told and "NOT the recorded numbers: " in told and "at step 3" in told


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"step": 5}, "--step=5 is more than the 4 steps of "),
        ({"step": 3, "rewinds": 1}, "--rewinds=1: .* went back 0 times"),
        ({"step": 3, "overrides": ["data.path=nowhere.jsonl"]}, "nowhere.jsonl"),
        ({"step": 3, "overrides": ["train.seed=1"]}, "config.train.seed=1 would make another run"),
    ],
)
def test_refusals(run, arguments: dict[str, Any], said: str):
    with pytest.raises(UserError, match=said):
        replay(run, **arguments, log=quiet)
    with pytest.raises(UserError, match="is not a run's folder"):
        replay(run.parent, 1, log=quiet)


# --- every part of the loss ---------------------------------------------------------------------------------------------------

EVERYTHING = {
    "model.prediction_heads": 2,
    "model.num_experts": 4,
    "model.residual_dropout": 0.2,
    "objective.prediction_heads_weight": 0.5,
    "objective.label_smoothing": 0.1,
    "objective.z_loss": 0.01,
    "objective.router_balance_loss": 0.1,
    "train.accumulation_steps": 2,
}


def on_devices(batch: Any) -> Any:
    return {name: jnp.asarray(array) for name, array in batch.items()}


def state_of(config: Config) -> Any:
    mesh = make_mesh(config.mesh)
    return mesh, init_state(config, Lengths(4, 0, 1), mesh, random_params(config))


def test_targets_cost_what_they_add_to_the_loss():
    """The loss of a batch is the sum over its micro-batches; without a target it is less by what that target cost."""
    config = small(EVERYTHING)
    mesh, state = state_of(config)
    batch = on_devices(random_batch(config))
    losses, nll, weights = target_losses(config, mesh, state, batch)
    example = OBJECTIVES["causal"](batch)
    np.testing.assert_array_equal(weights, example.weights)
    keys = step_dropout_keys(config, state.seed, state.step)

    @jax.jit
    def of_micro_batch(part: int, weights: Any) -> Any:
        own = jax.tree.map(lambda x: jnp.take(x, jnp.arange(4) * 2 + part, 0), example._replace(weights=weights))
        return example_loss(config, state.params, own, jax.tree.map(lambda x: jnp.take(x, jnp.arange(4) * 2 + part, 0), keys))

    whole = [of_micro_batch(part, example.weights) for part in range(2)]
    assert (losses * weights).sum() == pytest.approx(sum(float(loss) for loss, _ in whole), rel=2e-6)
    assert (nll * weights).sum() == pytest.approx(sum(float(parts["nll_sum"]) for _, parts in whole), rel=2e-6)
    for row, place in zip(*np.nonzero(weights), strict=True):
        if (row + place) % 9:
            continue
        without, _ = of_micro_batch(row % 2, example.weights.at[row, place].set(0.0))
        assert float(whole[row % 2][0]) - float(without) == pytest.approx(float(losses[row, place]), abs=2e-4)


def test_masked_documents(tmp_path):
    """The predicted tokens are the text's own, and what the model read is told beside it."""
    documents = write_documents(tmp_path / "documents.jsonl")
    config = small_run(documents, objective__name="masked", model__num_layers=1, train__accumulation_steps=1)
    dataset = loop.load_data(config, quiet)
    config = dataset.settled(config)
    mesh, state = state_of(config)
    batch = step_batch(config, dataset.train, 2)
    stage = config.stages(steps_per_epoch(config, dataset.train)).at(2)
    found = documents_of(config, config.at_stage(stage), dataset, mesh, state, on_devices(batch), 2, 0)
    assert sum(one.weight for one in found) == (batch["targets"] >= 0).sum() > 3
    for one in found:
        assert one.shown is not None and (one.weight == 0) == (one.shown == one.text or not one.targets)
        for target in one.targets:
            assert target.id == one.ids[one.positions.index(target.position)]
    assert not math.isnan(found[0].mean)


# --- tasks --------------------------------------------------------------------------------------------------------------------


def test_examples_of_several_tasks_add_up_and_a_classification_is_its_cross_entropy(tmp_path):
    text_cases.write_records(tmp_path)
    config = text_cases.several(tmp_path, data__batch_size=8)
    dataset = load_tasks(config, quiet)
    config = dataset.settled(config)
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, accumulation_steps=1))
    mesh, state = state_of(config)
    batch = step_batch(config, dataset.train, 1)
    stage = config.stages(steps_per_epoch(config, dataset.train)).at(1)
    found = documents_of(config, config.at_stage(stage), dataset, mesh, state, on_devices(batch), 1, 0)
    assert {one.source for one in found} == {"label", "write", "talk", "prefer"}

    @jax.jit
    def whole(params: Any, batch: Any) -> Any:
        hidden, _ = hidden_states(config, params, task_inputs(batch), None)
        filled = with_units(config, params, batch, head_options(config))
        return hidden, task_losses(config, params, hidden, within_model(filled), head_options(config))

    hidden, (loss, parts) = whole(state.params, on_devices(batch))
    assert sum(one.loss for one in found) == pytest.approx(float(loss), rel=2e-6)
    assert sum(one.weight for one in found) == pytest.approx(float(parts["weight_sum"]), rel=2e-6)
    kernel = np.float64(state.params["task_heads"]["label"]["kernel"])
    labelled = [one for one in found if one.source == "label"]
    of_task = sorted({int(row) for row in np.nonzero(batch["task"] == 1)[0]})
    unit = len(of_task) / len(labelled)  # a row counts once, however many examples it has
    for one in labelled:
        logits = np.float64(hidden[one.row, one.positions[-1]]) @ kernel
        wanted = batch["label/label"][one.row, one.positions[-1]]
        nats = np.log(np.exp(logits).sum()) - logits[int(wanted) - 1]
        assert one.loss == pytest.approx(2 * unit * nats, rel=1e-5) and one.weight == pytest.approx(unit)


def test_lines_say_what_cannot_be_told(third):
    silent = dataclasses.replace(third, agreement=dataclasses.replace(third.agreement, compared=0), before={})
    assert any("whether they are the same cannot be told" in line for line in lines(silent, 2))
