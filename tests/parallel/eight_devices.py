"""Run by test_mesh.py in a process of its own: meshes of 1 and of 8 virtual devices. Prints one JSON object."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import jax
import numpy as np

from gptjax.config import UserError
from gptjax.parallel.mesh import check_divides, make_mesh
from gptjax.train.optimizers import Lengths
from gptjax.train.step import init_state, make_train_step
from tests.small import random_batch, small


def sha256(tree: Any) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


# A short form of experiments/meshes: every axis alone or in pairs, and all that there are together.
MESHES: dict[str, dict[str, int]] = {
    "one": {"data": 1},
    "data": {"data": 8},
    "fsdp": {"fsdp": 8, "data": 1},
    "tensor": {"tensor": 8, "data": 1},
    "fsdp and tensor": {"fsdp": 2, "tensor": 4, "data": 1},
    "data, fsdp, tensor": {"fsdp": 2, "tensor": 2, "data": -1},
}


def run(**axes: int) -> dict[str, Any]:
    knobs = {"model.num_layers": 2, "model.residual_dropout": 0.2, "model.embedding_dropout": 0.2, "model.attention_dropout": 0.2}
    knobs |= {"model.num_heads": 8, "model.vocab_size": 23, "objective.loss_chunk": 24} | {
        f"mesh.{k}": v for k, v in axes.items()
    }
    config = small(knobs, data__batch_size=16, train__accumulation_steps=2, optimizer__epsilon=1e-3)
    lengths, mesh = Lengths.of(config, 1.0), make_mesh(config.mesh)
    check_divides(config, mesh)
    state, step = init_state(config, lengths, mesh), make_train_step(config, lengths, mesh)
    found: dict[str, Any] = {"init": sha256(state.params), "loss": [], "gradient_norm": []}
    for seed in range(3):
        state, metrics = step(state, random_batch(config, seed))
        for name in ("loss", "gradient_norm"):
            found[name].append(float(metrics[name]))
    found["params"] = [np.asarray(leaf).ravel()[:50].tolist() for leaf in jax.tree.leaves(state.params)]
    found["compilations"] = step.compiled._cache_size()
    found["devices"] = len(state.params["embed"]["tokens"].sharding.device_set)
    found["bytes"] = max(
        sum(s.data.nbytes for leaf in jax.tree.leaves(state.params) for s in leaf.addressable_shards if s.device == device)
        for device in mesh.devices.flat
    )
    return found


OBJECTIVE_MESHES = {"one": {"data": 1}, "eight": {"data": 2, "tensor": 2, "stage": 2}}


def objective_loss(**axes: int) -> list[float]:
    """[loss, gradient norm] of a step with documents seen both ways and not, side by side."""
    knobs = {"objective.name": "mixture", "model.vocab_size": 32, "model.num_heads": 4, "optimizer.epsilon": 1e-3}
    config = small(knobs, **{f"mesh__{name}": size for name, size in axes.items()})
    lengths, mesh = Lengths.of(config, 1.0), make_mesh(config.mesh)
    _, metrics = make_train_step(config, lengths, mesh)(init_state(config, lengths, mesh), random_batch(config, 2))
    return [float(metrics[name]) for name in ("loss", "gradient_norm")]


def refusal(**knobs: Any) -> str:
    try:
        config = small({key.replace("__", "."): value for key, value in knobs.items()})
        check_divides(config, make_mesh(config.mesh))
    except UserError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    refused = [
        refusal(data__batch_size=12),
        refusal(mesh__data=9),
        refusal(mesh__data=4, data__batch_size=12),
        refusal(mesh__tensor=8),
        refusal(mesh__data=1, mesh__fsdp=3, mesh__tensor=4),
        refusal(mesh__data=-1, mesh__fsdp=3),
        refusal(mesh__context=8, mesh__data=1),
    ]
    objective = {name: objective_loss(**axes) for name, axes in OBJECTIVE_MESHES.items()}
    meshes = {name: run(**axes) for name, axes in MESHES.items()}
    print(json.dumps({"meshes": meshes, "refused": refused, "objective": objective}))
