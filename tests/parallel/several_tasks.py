"""A run of several tasks on meshes of eight virtual devices: two steps and an evaluation. Prints one JSON object."""

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
from gptjax.train.reference import with_reference
from gptjax.train.step import init_state, make_train_step
from gptjax.train.task_evaluation import evaluate_tasks
from tests.tasks.text_cases import several, write_records

MESHES: dict[str, dict[str, int]] = {"one": {"data": 1}, "eight": {"data": 2, "fsdp": 2, "tensor": 2}}


def run(config: Config, folder: pathlib.Path) -> dict[str, Any]:
    dataset = load_tasks(config, lambda line: None)
    config = dataset.settled(config)
    lengths, mesh = Lengths.of(config, 1.0), make_mesh(config.mesh)
    state, step = init_state(config, lengths, mesh), make_train_step(config, lengths, mesh)
    folder.mkdir()
    dataset = with_reference(config, dataset, folder, mesh, lambda: state.params, lambda line: None)
    found: dict[str, Any] = {"loss": []}
    with use_rules(config.mesh):
        layout = batch_sharding(mesh)
    batches = train_batches(config, dataset.train, 0, np.arange(config.data.batch_size), 0)
    for _, batch in zip(range(2), batches, strict=False):
        state, metrics = step(state, hosts.place_batch(layout, batch, config.data.batch_size))
        found["loss"] += [float(metrics["loss"]), float(metrics["gradient_norm"])]
    figures, judged = evaluate_tasks(config, state.params, dataset, mesh)
    return found | {"eval": [one.nats / one.weight for own in judged.values() for one in own]}


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    with tempfile.TemporaryDirectory() as place:
        folder = pathlib.Path(place)
        write_records(folder)
        knobs: dict[str, Any] = {"data__batch_size": 8, "evaluate__batch_size": 8}
        made = {
            name: run(several(folder, **knobs, **{f"mesh__{axis}": size for axis, size in axes.items()}), folder / name)
            for name, axes in MESHES.items()
        }
    print(json.dumps(made))
