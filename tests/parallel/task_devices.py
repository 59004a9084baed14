"""Every kind of task on meshes of eight virtual devices: two steps and an evaluation. Prints one JSON object."""

from __future__ import annotations

import json
import pathlib
import tempfile
from typing import Any

import jax
import numpy as np

from gptjax.config import Config
from gptjax.data.pipeline import train_batches
from gptjax.parallel import hosts
from gptjax.parallel.mesh import make_mesh
from gptjax.parallel.sharding import batch_sharding, use_rules
from gptjax.tasks.load import load_tasks
from gptjax.train.optimizers import Lengths
from gptjax.train.step import init_state, make_train_step
from gptjax.train.task_evaluation import judge
from tests.parallel.eight_devices import sha256
from tests.tasks.cases import CASES, case, write_records

MESHES: dict[str, dict[str, int]] = {"one": {"data": 1}, "two": {"data": 2}, "eight": {"data": 2, "fsdp": 2, "tensor": 2}}


def run(config: Config) -> dict[str, Any]:
    dataset = load_tasks(config, lambda line: None)
    config = dataset.settled(config)
    lengths, mesh = Lengths.of(config, 1.0), make_mesh(config.mesh)
    state, step = init_state(config, lengths, mesh), make_train_step(config, lengths, mesh)
    found: dict[str, Any] = {"init": sha256(state.params), "loss": []}
    with use_rules(config.mesh):
        layout = batch_sharding(mesh)
    batches = train_batches(config, dataset.train, 0, np.arange(config.data.batch_size), 0)
    for _, batch in zip(range(2), batches, strict=False):
        state, metrics = step(state, hosts.place_batch(layout, batch, config.data.batch_size))
        found["loss"] += [float(metrics["loss"]), float(metrics["gradient_norm"])]
    judged = judge(config, state.params, dataset.eval, dataset.examples["eval"], dataset.records["eval"], mesh)
    return found | {"eval": [one.nats / one.weight for one in judged["task"]]}


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    with tempfile.TemporaryDirectory() as folder:
        path = write_records(pathlib.Path(folder) / "records.jsonl")
        made = {
            mesh: {name: run(case(name, path, **{f"mesh__{axis}": size for axis, size in axes.items()})) for name in CASES}
            for mesh, axes in MESHES.items()
        }
    print(json.dumps(made))
