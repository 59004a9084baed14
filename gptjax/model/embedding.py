"""Token ids to vectors. Axis letters: see decoder.py."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.config import ModelConfig
from gptjax.model import primitives
from gptjax.model.kernels import Kernel
from gptjax.model.layers import parameter
from gptjax.model.parameterization import initial_std
from gptjax.parallel.sharding import constrain


class Embedding(nn.Module):
    """Tokens, and learned positions where the config has them, to vectors."""

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        normal = nn.initializers.normal(initial_std(c, "embedding"))
        self.tokens = parameter(self, "tokens", normal, ("table_rows", "table_width"), (c.vocab_size, c.model_dim), c.param_dtype)
        if c.position == "learned":
            self.positions = parameter(
                self, "positions", normal, ("positions", "embed"), (c.max_seq_len, c.model_dim), c.param_dtype
            )

    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        dtype = jnp.promote_types(self.config.param_dtype, self.config.dtype)  # a sum of bfloat16 tables must not round to them
        x_BTD = _look_up(self.tokens, tokens_BT).astype(dtype)
        if self.config.position == "learned":
            x_BTD = x_BTD + _look_up(self.positions, positions_BT).astype(dtype)
        return x_BTD.astype(self.config.dtype)


def _look_up(table_VD: Any, ids_BT: jax.Array) -> jax.Array:
    """[B, T, D], each device looking up its own rows in its own part of the width."""
    if isinstance(table_VD, Kernel):
        return constrain(table_VD.rows(ids_BT), "batch", "length", None)
    x_BTD = primitives.embed(constrain(table_VD, None, "lookup_width"), ids_BT)
    return constrain(x_BTD, "batch", "length", "lookup_width")
