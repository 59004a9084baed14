"""Run by test_optimizers.py in a process of its own: the update rules on 1 and on 8 virtual devices. Prints one JSON object."""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np
import optax

from gptjax.config import Config
from gptjax.parallel.mesh import make_mesh
from gptjax.train.groups import parameter_path
from gptjax.train.optimizers import Lengths, make_optimizer, make_schedule
from gptjax.train.step import init_state, make_train_step, state_shardings
from tests.small import random_batch, random_params, small

MESHES: dict[str, dict[str, int]] = {"one": {"data": 1}, "eight": {"data": 2, "fsdp": 2, "tensor": 2}}
COMMON = {"model.mlp_dim": 32, "optimizer.epsilon": 1e-4, "optimizer.schedule": "constant", "optimizer.learning_rate": 1e-2}
RULES: dict[str, dict[str, Any]] = {
    # A basis of directions in which a wide matrix has had no gradient amplifies rounding; a small epsilon would do so again.
    "soap": {"optimizer.soap_refresh_every": 1, "optimizer.epsilon": 0.1},
    "sophia": {"optimizer.sophia_estimate_every": 2, "optimizer.freeze_layers": ("0",)},
    "prodigy": {"optimizer.learning_rate": 1.0, "optimizer.prodigy_initial_rate": 1e-2, "optimizer.freeze": ("positions",)},
    "ademamix": {"optimizer.groups": ("embed=lr:0.5",), "optimizer.cautious": True},
}


def run(name: str, axes: dict[str, int]) -> dict[str, Any]:
    """Parameters after a few updates by random gradients and, where the rule needs the model, after as many training steps."""
    axes_knobs = {f"mesh.{axis}": size for axis, size in axes.items()}
    # with more devices the rows are split otherwise, too
    config = small(COMMON, RULES[name], axes_knobs, optimizer__name=name, train__accumulation_steps=2 if len(axes) > 1 else 1)
    lengths, mesh = Lengths.of(config, 1.0), make_mesh(config.mesh)
    state = init_state(config, lengths, mesh, random_params(config))
    step: Any = make_train_step(config, lengths, mesh) if name == "sophia" else update_step(config, lengths, mesh)
    for seed in range(3):
        state, _ = step(state, random_batch(config, seed) if name == "sophia" else random_params(config, seed + 1))
    layout = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state.opt_state):
        part = next((part for part in ("mu", "left", "right_basis") if f"/{part}/" in parameter_path(path)), "")
        if part and parameter_path(path).endswith("up/kernel"):
            layout[part] = [list(leaf.shape), list(leaf.sharding.shard_shape(leaf.shape))]
    params = {parameter_path(path): np.asarray(x).tolist() for path, x in jax.tree_util.tree_leaves_with_path(state.params)}
    return {"params": params, "layout": layout}


def update_step(config: Config, lengths: Lengths, mesh: Any) -> Any:
    """(state, gradients) -> (state, None), laid out as a training step is."""
    shardings = state_shardings(config, lengths, mesh)
    optimizer = make_optimizer(config, make_schedule(config.optimizer, lengths), lengths.total)

    def step(state: Any, gradients: Any) -> Any:
        updates, opt_state = optimizer.update(gradients, state.opt_state, state.params)
        return state.replace(params=optax.apply_updates(state.params, updates), opt_state=opt_state), None

    return jax.jit(step, in_shardings=(shardings, shardings.params), out_shardings=(shardings, None))


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    print(json.dumps({name: {mesh: run(name, axes) for mesh, axes in MESHES.items()} for name in RULES}))
