"""Generation on eight virtual devices: ids under several meshes, and how the cache lies. Prints one JSON object."""

from __future__ import annotations

import json
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.config import MeshConfig
from gptjax.generate import weights
from gptjax.generate.decode import generate_tokens
from gptjax.generate.settings import GenerationConfig
from gptjax.model.attention import Cache
from gptjax.model.decoder import Decoder
from gptjax.parallel.mesh import make_mesh
from gptjax.parallel.sharding import laid_over, parameter_shardings
from tests.generate.small_models import FAMILIES, model_config, random_params

CONFIG = model_config(vocab_size=40, num_layers=2, max_seq_len=32, **FAMILIES["llama"])
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5, 8, 9, 7, 9, 3]]
MESHES = {"tensor": {"tensor": 2, "data": 2, "fsdp": 2}, "others": {"data": 1, "context": 2, "stage": 2, "tensor": 2}}


def tokens(params: Any, greedy: bool) -> list[list[int]]:
    settings = GenerationConfig(max_new_tokens=8, do_sample=not greedy)
    made = generate_tokens(params, CONFIG, PROMPTS, settings=settings, seed=1, eos_ids=(), vocab_size=40, samples=[0, 1, 2])
    return [row.tolist() for row in made.tokens]


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    params = random_params(CONFIG)
    boxed = jax.eval_shape(lambda: Decoder(CONFIG).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    found: dict[str, Any] = {"alone": [tokens(params, greedy) for greedy in (True, False)]}
    for name, axes in MESHES.items():
        mesh_config = MeshConfig(**axes)
        mesh = make_mesh(mesh_config)
        with laid_over(mesh, mesh_config):
            placed = jax.device_put(params, parameter_shardings(boxed, mesh))
            prepared = weights.prepare(placed, CONFIG)
            found[name] = [tokens(prepared, greedy) for greedy in (True, False)]
            cache = jax.jit(lambda: Cache.empty(CONFIG, 3, 20))()
            found[f"{name} cache"] = [list(cache.keys.shape), list(cache.keys.addressable_shards[0].data.shape)]
    print(json.dumps(found))


if __name__ == "__main__":
    main()
