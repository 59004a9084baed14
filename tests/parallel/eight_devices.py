"""Run by test_mesh.py in a process of its own: one mesh of 1 and one of 8 virtual devices. Prints one JSON object."""

from __future__ import annotations

import hashlib
import json
from typing import Any

import jax
import numpy as np

from gptjax.config import MeshConfig, UserError
from gptjax.parallel.mesh import make_mesh
from gptjax.train.optimizers import Lengths
from gptjax.train.step import init_state, make_train_step
from tests.small import random_batch, small


def sha256(tree: Any) -> str:
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(tree):
        digest.update(np.asarray(leaf).tobytes())
    return digest.hexdigest()


def run(size: int) -> dict[str, Any]:
    knobs = {"model.num_layers": 1, "model.residual_dropout": 0.2, "model.embedding_dropout": 0.2, "model.attention_dropout": 0.2}
    config = small(knobs, data__batch_size=16, train__accumulation_steps=2, mesh__data=size, optimizer__epsilon=1e-3)
    lengths, mesh = Lengths.of(config, 1.0), make_mesh(config.mesh, batch_size=8)
    state, step = init_state(config, lengths, mesh), make_train_step(config, lengths, mesh)
    found: dict[str, Any] = {"init": sha256(state.params), "loss": [], "gradient_norm": []}
    for seed in range(3):
        state, metrics = step(state, random_batch(config, seed))
        for name in ("loss", "gradient_norm"):
            found[name].append(float(metrics[name]))
    found["params"] = [np.asarray(leaf).ravel()[:50].tolist() for leaf in jax.tree.leaves(state.params)]
    found["compilations"] = step.compiled._cache_size()
    found["devices"] = len(state.params["embed"]["tokens"].sharding.device_set)
    return found


def refusal(mesh: MeshConfig, rows: int) -> str:
    try:
        make_mesh(mesh, rows)
    except UserError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    refused = [refusal(MeshConfig(data=-1), 12), refusal(MeshConfig(data=9), 18), refusal(MeshConfig(data=4), 12)]
    print(json.dumps({"one": run(1), "eight": run(8), "refused": refused}))
