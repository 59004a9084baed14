"""Adversarial training, against the same computed by a model that has a table row for each place of the batch.

In such a model the gradient for the table is that for the embeddings, place by place, and a moved table is a moved batch: the
second pass needs nothing of train/adversarial.py.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from gptjax.config import UserError
from gptjax.data.pipeline import train_batches
from gptjax.tasks.load import load_tasks
from gptjax.train.adversarial import nudges
from gptjax.train.step import hidden_states, summed_gradients, task_inputs
from tests.small import random_params, small, tree_close
from tests.tasks.cases import case, write_records

gradients_of = jax.jit(summed_gradients, static_argnums=0)
PLAIN = {"model__residual_dropout": 0.0, "train__accumulation_steps": 1, "data__seq_len": 64, "model__max_seq_len": 80}
TWO = ("label=classification:{path}", "tag=tagging:{path}", "plain=regression:{path}")
# The third has no adversarial loss.
SETTINGS = ("label.adversarial_norm=0.3", "tag.adversarial_norm=0.1", "label.adversarial_weight=0.5", "plain.label=length")


@pytest.fixture(scope="module")
def path(tmp_path_factory):
    return write_records(tmp_path_factory.mktemp("records") / "records.jsonl")


def batch_of(config: Any) -> tuple[Any, dict[str, np.ndarray]]:
    dataset = load_tasks(config, lambda line: None)
    config = dataset.settled(config)
    batch = next(train_batches(config, dataset.train, 0, np.arange(config.data.batch_size), 0))
    return config, {name: np.asarray(array) for name, array in batch.items()}


def of_example(slopes: np.ndarray, own: np.ndarray, segments: np.ndarray, norms: np.ndarray) -> np.ndarray:
    """Example by example, in float64."""
    moved = np.zeros(slopes.shape)
    for row in range(len(slopes)):
        for segment in set(segments[row].tolist()):
            places = segments[row] == segment
            g, e = slopes[row][places].astype(np.float64), own[row][places].astype(np.float64)
            if (length := np.sqrt((g**2).sum())) > 0:
                moved[row][places] = norms[row][places][:, None] * np.sqrt((e**2).sum()) * g / length
    return moved


def a_row_for_each_place(config: Any, params: Any, batch: Any) -> tuple[Any, Any, Any]:
    """(config, params, batch) of a model that has one, and no adversarial loss."""
    size = batch["tokens"].size
    task = dataclasses.replace(config.task, adversarial_norm=0.0)
    if config.task.mixture:
        kept = tuple(item for item in config.task.mixture_settings if "adversarial" not in item)
        task = dataclasses.replace(task, mixture_settings=kept)
    wide = dataclasses.replace(config, task=task, model=dataclasses.replace(config.model, vocab_size=size))
    table = np.asarray(params["embed"]["tokens"])[batch["tokens"]].reshape(size, -1)
    return (
        wide,
        params | {"embed": params["embed"] | {"tokens": table}},
        batch | {"tokens": np.arange(size, dtype=np.int32).reshape(batch["tokens"].shape)},
    )


def test_the_loss_and_its_gradient(path):
    config, batch = batch_of(case("classification", path, **PLAIN, task__adversarial_norm=0.3, task__adversarial_weight=0.5))
    params = random_params(config)
    found, sums = gradients_of(config, params, batch, None)
    wide, spread, places = a_row_for_each_place(config, params, batch)
    first, of_first = gradients_of(wide, spread, places, None)
    shape = (*batch["tokens"].shape, config.model.model_dim)
    slopes, own = (np.asarray(tree["embed"]["tokens"]).reshape(shape) for tree in (first, spread))
    assert batch["segment_ids"].max() > 1  # some rows hold several examples
    moved = own + of_example(slopes, own, batch["segment_ids"], np.full(shape[:2], 0.3))
    nudged = spread | {"embed": spread["embed"] | {"tokens": moved.reshape(-1, shape[2]).astype(np.float32)}}
    second, of_second = gradients_of(wide, nudged, places, None)
    assert of_second["nll_sum"] > of_first["nll_sum"] * 1.05  # the moved examples are harder
    np.testing.assert_allclose(sums["nll_sum"], of_first["nll_sum"], rtol=1e-5)
    np.testing.assert_allclose(sums["adversarial/nll_sum"], of_second["nll_sum"], rtol=1e-5)
    np.testing.assert_allclose(sums["loss_sum"], of_first["nll_sum"] + 0.5 * of_second["nll_sum"], rtol=1e-5)
    assert sums["adversarial/weight_sum"] == sums["weight_sum"] == of_first["weight_sum"]
    wanted = jax.tree.map(lambda a, b: np.asarray(a) + 0.5 * np.asarray(b), first, second)
    table = np.zeros_like(params["embed"]["tokens"])
    np.add.at(table, batch["tokens"].ravel(), wanted["embed"]["tokens"])
    tree_close(found, wanted | {"embed": wanted["embed"] | {"tokens": table}}, rtol=2e-4, atol=2e-5)


def test_tasks_of_a_mixture_have_their_own_norm_and_weight(path):
    mixture = {"task.mixture": tuple(item.format(path=path) for item in TWO), "task.mixture_settings": SETTINGS}
    sizes = {"model.vocab_size": 257, "data.batch_size": 16, "model.num_layers": 1, "model.max_seq_len": 64, "data.seq_len": 64}
    config, batch = batch_of(small(sizes, mixture, data__eval_fraction=0.3))
    assert set(np.unique(batch["task"])) == {0, 1, 2, 3}
    params = random_params(config)
    _, sums = gradients_of(config, params, batch, None)
    wide, spread, places = a_row_for_each_place(config, params, batch)
    first, of_first = gradients_of(wide, spread, places, None)
    shape = (*batch["tokens"].shape, config.model.model_dim)
    slopes, own = (np.asarray(tree["embed"]["tokens"]).reshape(shape) for tree in (first, spread))
    norms = np.asarray([0, 0.3, 0.1, 0])[batch["task"]]
    moved = spread["embed"]["tokens"] + of_example(slopes, own, batch["segment_ids"], norms).reshape(-1, shape[2])
    nudged = spread | {"embed": spread["embed"] | {"tokens": moved.astype(np.float32)}}
    _, of_second = gradients_of(wide, nudged, places, None)
    # A target of a task counts as many rows as the task has in the batch over its targets there.
    more = 0.0
    for number, (name, weight) in enumerate({"label": 0.5, "tag": 1.0}.items(), 1):
        rows = (batch["task"] == number).any(axis=1).sum()
        more += weight * rows * float(of_second[f"tasks/{name}/nll_sum"] / of_second[f"tasks/{name}/weight_sum"])
    np.testing.assert_allclose(sums["loss_sum"], of_first["loss_sum"] + more, rtol=1e-5)
    np.testing.assert_allclose(sums["nll_sum"], of_first["nll_sum"], rtol=1e-5)


def test_beside_an_adapter(path):
    """A frozen decoder gets no gradient, but its embeddings show where to move."""
    config, batch = batch_of(case("classification", path, **PLAIN, adapter__method="lora", task__adversarial_norm=0.3))
    params = random_params(config)
    params = params | {"adapters": jax.tree.map(np.zeros_like, params["adapters"])}  # as merged: they change nothing
    found, sums = gradients_of(config, params, batch, None)
    wide, spread, places = a_row_for_each_place(config, params, batch)
    wide = dataclasses.replace(wide, adapter=dataclasses.replace(wide.adapter, method="none"))
    decoder = {name: part for name, part in spread.items() if name != "adapters"}
    first, _ = gradients_of(wide, decoder, places, None)
    shape = (*batch["tokens"].shape, config.model.model_dim)
    slopes, own = (np.asarray(tree["embed"]["tokens"]).reshape(shape) for tree in (first, decoder))
    moved = own + of_example(slopes, own, batch["segment_ids"], np.full(shape[:2], 0.3))
    nudged = decoder | {"embed": decoder["embed"] | {"tokens": moved.reshape(-1, shape[2]).astype(np.float32)}}
    _, of_second = gradients_of(wide, nudged, places, None)
    np.testing.assert_allclose(sums["adversarial/nll_sum"], of_second["nll_sum"], rtol=1e-5)
    assert not np.asarray(found["embed"]["tokens"]).any() and np.asarray(found["task_heads"]["task"]["kernel"]).any()


def test_places_ahead_of_a_row_are_not_moved(path):
    knobs = {"adapter__method": "prompt", "adapter__prompt_length": 3, "data__packing": "padded"}
    config, batch = batch_of(case("classification", path, **PLAIN, **knobs))
    params = random_params(config)
    wide, spread, places = a_row_for_each_place(config, params, batch)
    shape = (*batch["tokens"].shape, config.model.model_dim)
    by = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    moved = spread["embed"]["tokens"] + by.reshape(-1, shape[2])
    wanted, _ = hidden_states(wide, spread | {"embed": spread["embed"] | {"tokens": moved}}, task_inputs(places))
    found, _ = hidden_states(config, params, task_inputs(batch), nudges_BTE=by[:, :-1])
    np.testing.assert_allclose(found, wanted, rtol=1e-5, atol=1e-5)


def test_an_example_without_a_gradient_stays():
    own, segments = np.ones((1, 4, 2), np.float32), np.asarray([[1, 1, 2, 0]])
    slopes = np.asarray([[[3.0, 4.0], [0, 0], [0, 0], [0, 0]]], np.float32)
    moved = nudges(slopes, own, segments, np.full((1, 4), 0.5, np.float32))
    np.testing.assert_allclose(moved, [[[0.6, 0.8], [0, 0], [0, 0], [0, 0]]], rtol=1e-6)  # 0.5 * |e| = 0.5 * 2


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"task.adversarial_norm": 0.1}, "task.adversarial_norm=0.1 needs a task, but task.kind=none"),
        ({"task.adversarial_norm": 0.1, "task.kind": "preference", "task.path": "x"}, "task.kind=preference compares with"),
    ],
)
def test_what_cannot_be(knobs, said):
    with pytest.raises(UserError, match=said):
        small(knobs)
