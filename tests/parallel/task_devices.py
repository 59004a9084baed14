"""Every kind of task on meshes of eight virtual devices: the loss of a batch, its gradient, and what is said of each place.

One program a case and mesh, of the functions that the training step and the evaluation are made of. Prints one JSON object.
"""

from __future__ import annotations

import json
import pathlib
import tempfile
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import linen as nn

from gptjax.config import Config
from gptjax.data.pipeline import Batch, train_batches
from gptjax.parallel import hosts
from gptjax.parallel.mesh import make_mesh
from gptjax.parallel.sharding import batch_sharding, laid_over, replicated, use_rules
from gptjax.tasks.load import load_tasks
from gptjax.tasks.losses import HEADS, init_heads, task_outputs
from gptjax.train.optimizers import Lengths
from gptjax.train.step import (
    head_options,
    hidden_states,
    state_shardings,
    summed_gradients,
    task_inputs,
    within_model,
)
from tests.parallel.eight_devices import sha256
from tests.small import random_params
from tests.tasks.cases import CASES, case, write_records

MESHES: dict[str, dict[str, int]] = {"one": {"data": 1}, "two": {"data": 2}, "eight": {"data": 2, "fsdp": 2, "tensor": 2}}
PLAIN = {"train__accumulation_steps": 1, "model__residual_dropout": 0.0}


def computed(config: Config, params: Any, batch: Batch) -> dict[str, Any]:
    gradients, sums = summed_gradients(config, params, batch, None)
    hidden_BTD, _ = hidden_states(config, params, task_inputs(batch))
    outputs = task_outputs(config, params, hidden_BTD, within_model(batch), head_options(config))
    weight = sums["weight_sum"]
    return {"loss": jnp.stack([sums["loss_sum"] / weight, optax.tree.norm(gradients) / weight]), "outputs": outputs["task"]}


def run(config: Config, params: Any, batch: Batch) -> dict[str, Any]:
    mesh = make_mesh(config.mesh)
    shardings = state_shardings(config, Lengths.of(config, 1.0), mesh).params
    with use_rules(config.mesh):
        layout = batch_sharding(mesh)
    placed = hosts.place_batch(layout, batch, config.data.batch_size)
    with laid_over(mesh, config.mesh):
        step = jax.jit(lambda params, batch: computed(config, params, batch), out_shardings=replicated(mesh))
        found = jax.device_get(step(jax.device_put(params, shardings), placed))
        heads: Any = {}
        if HEADS in params:
            make = jax.jit(lambda: nn.unbox(init_heads(config, jax.random.key(3))), out_shardings=shardings[HEADS])
            heads = make()
    read = batch["read"][:, :-1] > 0
    return {"heads": sha256(heads), "loss": found["loss"].tolist(), "outputs": found["outputs"][read].tolist()}


def meshes_of(name: str, path: pathlib.Path) -> dict[str, Any]:
    config = case(name, path, **PLAIN)
    dataset = load_tasks(config, lambda line: None)
    config = dataset.settled(config)
    batch = next(train_batches(config, dataset.train, 0, np.arange(config.data.batch_size), 0))
    params = random_params(config, std=0.1)
    found = {}
    for mesh, axes in MESHES.items():
        laid = dataset.settled(case(name, path, **PLAIN, **{f"mesh__{axis}": size for axis, size in axes.items()}))
        found[mesh] = run(laid, params, batch)
    return found


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    with tempfile.TemporaryDirectory() as folder:
        path = write_records(pathlib.Path(folder) / "records.jsonl")
        print(json.dumps({name: meshes_of(name, path) for name in CASES}))
