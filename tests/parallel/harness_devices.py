"""Likelihoods on eight virtual devices, under several meshes. Prints one JSON object."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp

from gptjax.config import MeshConfig, UserError
from gptjax.harness.likelihood import Likelihood
from gptjax.parallel.mesh import make_mesh
from gptjax.parallel.sharding import laid_over, parameter_shardings
from gptjax.train.step import init_params
from tests.harness.small_models import tiny_config, tiny_model

MESHES = {
    "tensor": {"data": 2, "tensor": 2, "fsdp": 2},
    "context": {"data": 2, "context": 4},
    "stage": {"data": 1, "stage": 2},
}
PAIRS = [("", "a text without a context"), ("the quick brown", " fox jumps over"), ("a", "b"), ("so it is ", "and so it was")]


def totals(axes: dict[str, int]) -> list[float]:
    config = dataclasses.replace(tiny_config(), mesh=MeshConfig(**axes))
    mesh = make_mesh(config.mesh)
    boxed = jax.eval_shape(lambda: init_params(config, jnp.uint32(0)))
    with laid_over(mesh, config.mesh):
        params = jax.device_put(tiny_model().params, parameter_shardings(boxed, mesh))
    like = Likelihood(dataclasses.replace(tiny_model(), config=config, params=params), batch_size=3)
    return [scored.total for scored in like.of_pairs(PAIRS)]


def main() -> None:
    jax.config.update("jax_num_cpu_devices", 8)
    found: dict[str, object] = {name: totals(axes) for name, axes in ({"alone": {"data": 1}} | MESHES).items()}
    try:
        totals({"data": 1, "context": 5})
    except UserError as error:
        found["refused"] = str(error)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
