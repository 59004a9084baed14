"""Adapters on eight virtual devices. Prints one JSON object."""

from __future__ import annotations

import json
from typing import Any

import jax

from gptjax.parallel.mesh import check_divides, make_mesh
from gptjax.train.optimizers import Lengths
from gptjax.train.run import named_leaves
from gptjax.train.step import init_state, make_train_step
from tests.adapters.cases import case
from tests.parallel.eight_devices import sha256
from tests.small import random_batch

MESHES: dict[str, dict[str, dict[str, int]]] = {
    "lora": {"one": {"data": 1}, "eight": {"data": 2, "fsdp": 2, "tensor": 2}},
    "int8": {"one": {"data": 1}, "eight": {"stage": 2, "fsdp": 2, "tensor": 2}},
    "prefix": {"one": {"data": 1}, "eight": {"data": 2, "fsdp": 2, "tensor": 2}},
}


def run(name: str, axes: dict[str, int]) -> dict[str, Any]:
    more = {"optimizer__epsilon": 1e-3, "train__accumulation_steps": 1 if axes == {"data": 1} else 2}
    config = case(name, **more, **{f"mesh__{axis}": size for axis, size in axes.items()} | {"mesh__data": axes.get("data", 1)})
    lengths, mesh = Lengths.of(config, 1.0), make_mesh(config.mesh)
    check_divides(config, mesh)
    state, step = init_state(config, lengths, mesh), make_train_step(config, lengths, mesh)
    found: dict[str, Any] = {"init": sha256(state.params["adapters"]), "loss": []}
    for seed in range(2):
        state, metrics = step(state, random_batch(config, seed))
        found["loss"] += [float(metrics["loss"]), float(metrics["gradient_norm"])]
    leaves = named_leaves(state.params["adapters"])
    found["shapes"] = {path: list(leaf.addressable_shards[0].data.shape) for path, leaf in leaves.items()}
    return found


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    print(json.dumps({name: {mesh: run(name, axes) for mesh, axes in meshes.items()} for name, meshes in MESHES.items()}))
