"""Token ids to vectors. Axis letters: see decoder.py."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.config import ModelConfig
from gptjax.model import primitives
from gptjax.model.kernels import LinearMap
from gptjax.model.layers import linear, parameter
from gptjax.model.parameterization import initial_std
from gptjax.model.positions import sinusoids
from gptjax.parallel.sharding import constrain

TRANSPOSED_FACTOR = "transposed_factor"  # what generation adds to the embedding's parameters


class Embedding(nn.Module):
    """Tokens, and learned or sinusoidal positions where the config has them, to vectors. E: width of a factorised table,
    `embedding_dim`.
    """

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        normal = nn.initializers.normal(initial_std(c, "embedding"))
        width = c.embedding_dim or c.model_dim
        self.tokens = parameter(self, "tokens", normal, ("table_rows", "table_width"), (c.vocab_size, width), c.param_dtype)
        if c.position == "learned":
            self.positions = parameter(
                self, "positions", normal, ("positions", "embed"), (c.max_seq_len, c.model_dim), c.param_dtype
            )
        if c.embedding_dim:  # a sum of E products with a variance of 1 / E: vectors start as wide as without it
            unit = nn.initializers.normal(c.embedding_dim**-0.5)
            shape = (c.embedding_dim, c.model_dim)
            self.factor = parameter(self, "factor", unit, ("table_factor", "embed"), shape, c.param_dtype)

    def __call__(self, tokens_BT: jax.Array, positions_BT: jax.Array) -> jax.Array:
        dtype = jnp.promote_types(self.config.param_dtype, self.config.dtype)  # a sum of bfloat16 tables must not round to them
        c = self.config
        x_BTD = _look_up(self.tokens, tokens_BT).astype(dtype)
        if c.embedding_dim:
            x_BTD = constrain(linear(x_BTD, self.factor, 1, c.dtype, None), "batch", "length", None).astype(dtype)
        if c.token_scale != 1:
            x_BTD = x_BTD * c.token_scale
        if c.position == "learned":
            x_BTD = x_BTD + _look_up(self.positions, positions_BT).astype(dtype)
        if c.position == "sinusoidal":
            x_BTD = x_BTD + sinusoids(positions_BT, c.model_dim)
        return x_BTD.astype(c.dtype)

    def to_table(self, hidden_BTD: jax.Array) -> jax.Array:
        """[B, T, E]: vectors as wide as the table of tokens, through the transposed factor."""
        # Generation keeps the transposed factor ready: generate/weights.py.
        ready: Any = self.get_variable("params", TRANSPOSED_FACTOR)
        return linear(hidden_BTD, self.factor.T if ready is None else ready, 1, self.config.dtype, None)


def _look_up(table_VD: Any, ids_BT: jax.Array) -> jax.Array:
    """[B, T, D], each device looking up its own rows in its own part of the width."""
    if isinstance(table_VD, LinearMap):
        return constrain(table_VD.rows(ids_BT), "batch", "length", None)
    x_BTD = primitives.embed(constrain(table_VD, None, "lookup_width"), ids_BT)
    return constrain(x_BTD, "batch", "length", "lookup_width")
