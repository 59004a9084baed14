"""Latent attention on eight virtual devices: training and generation where a mesh shares out heads. Prints one JSON object."""

from __future__ import annotations

import json
from typing import Any

import jax
import numpy as np

from gptjax.generate.decode import generate_tokens
from gptjax.generate.settings import GenerationConfig
from gptjax.model.attention import Cache
from gptjax.parallel.mesh import check_divides, make_mesh
from gptjax.parallel.sharding import laid_over
from gptjax.train.optimizers import Lengths
from gptjax.train.step import init_state, make_train_step
from tests.model.test_latent import LATENT
from tests.parallel.eight_devices import sha256
from tests.small import random_batch, small

MESHES = {"one": {"data": 1}, "tensor": {"data": 2, "fsdp": 2, "tensor": 2}}
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3]]


def run(**axes: int) -> dict[str, Any]:
    knobs = {"model.num_layers": 1, "model.max_seq_len": 12, "model.attention_dropout": 0.2, "optimizer.epsilon": 1e-3}
    config = small(LATENT, knobs, {f"mesh.{axis}": size for axis, size in axes.items()})
    lengths, mesh = Lengths.of(config, 1.0), make_mesh(config.mesh)
    check_divides(config, mesh)
    state, step = init_state(config, lengths, mesh), make_train_step(config, lengths, mesh)
    found: dict[str, Any] = {"init": sha256(state.params), "loss": []}
    for seed in range(2):
        state, metrics = step(state, random_batch(config, seed))
        found["loss"] += [float(metrics["loss"]), float(metrics["gradient_norm"])]
    settings = GenerationConfig(max_new_tokens=10, do_sample=False)  # past the context, with rows that 4 parts do not divide
    with laid_over(mesh, config.mesh):
        key_up = state.params["layers"]["attention"]["key_up"]["kernel"]
        cache = jax.jit(lambda: Cache.empty(config.model, 3, 9))()
        found["shapes"] = [list(x.addressable_shards[0].data.shape) for x in (key_up, cache.keys)]
        made = generate_tokens(state.params, config.model, PROMPTS, settings=settings, seed=1, eos_ids=(), vocab_size=23)
    return found | {
        "tokens": [row.tolist() for row in made.tokens],
        "log_probs": [np.asarray(x).tolist() for x in made.log_probs],
    }


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    print(json.dumps({name: run(**axes) for name, axes in MESHES.items()}))
