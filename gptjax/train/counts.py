"""Parameters of a model, counted exactly without making them."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.config import Config
from gptjax.train.groups import parameter_path
from gptjax.train.step import init_params

EMBEDDINGS = ("embed/", "head")  # token and position embeddings, and an untied head, as Kaplan et al. (2020) leave them out


def count_parameters(config: Config) -> tuple[int, int]:
    """(all parameters, those besides embeddings and head) of a config whose vocabulary is settled."""
    shapes = jax.eval_shape(lambda: nn.unbox(init_params(config, jnp.uint32(0))))
    total = rest = 0
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes):
        size = math.prod(leaf.shape)
        total += size
        rest += 0 if parameter_path(path).startswith(EMBEDDINGS) else size
    return total, rest
