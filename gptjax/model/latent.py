"""Multi-head latent attention (DeepSeek-AI, 2024, "DeepSeek-V2", section 2.1). Axis letters: see decoder.py; C: width of the
latent that keys and values are made of, R: of the rotary part of queries and keys, W: of what is cached, or of both parts.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from gptjax.config import ModelConfig
from gptjax.model import primitives
from gptjax.model.attention import attend_rows
from gptjax.model.cache import Cache
from gptjax.model.kernels import Kernel
from gptjax.model.layers import PROJECTED, Norm, Projection, linear, parameter
from gptjax.model.positions import rotate
from gptjax.model.rows import Rows
from gptjax.parallel.sharding import constrain


class Up(nn.Module):
    """From a latent to each head's vector, [C, N, H], without a bias: the same map forwards, and taken into the other operand."""

    config: ModelConfig
    inputs: int

    def setup(self) -> None:
        c, axes = self.config, ("latent", "heads", "head_dim")
        shape = (self.inputs, c.num_heads, c.head_dim)
        self.kernel = parameter(self, "kernel", nn.initializers.normal(c.init_std), axes, shape, c.param_dtype)

    def __call__(self, latent_BTC: jax.Array) -> jax.Array:
        y_BTNH = linear(latent_BTC, self.kernel, 1, self.config.dtype, None)
        return checkpoint_name(constrain(y_BTNH, "batch", "length", "heads", "head_dim"), PROJECTED)

    def into_queries(self, q_BTNH: jax.Array) -> jax.Array:
        """[B, T, N, C]: what meets a latent as `q_BTNH` meets the key that is made of it."""
        kernel_NCH = self._heads_first().swapaxes(1, 2)
        if primitives.hand_written():  # for the sake of the order of sums, see kernels.py: this CPU's product would undo the turn
            kernel_NCH = jax.lax.optimization_barrier(kernel_NCH)
        return self._by_head(q_BTNH, kernel_NCH)

    def out_of_latents(self, mixed_BTNC: jax.Array) -> jax.Array:
        """[B, T, N, H]: each head's own part of a mean of latents is the mean of its values."""
        return self._by_head(mixed_BTNC, self._heads_first())

    def _by_head(self, x_BTNI: jax.Array, kernel_NOI: jax.Array) -> jax.Array:
        """[B, T, N, O]"""
        batch, length, heads, width = x_BTNI.shape
        x_NMI = jnp.moveaxis(x_BTNI, 2, 0).reshape(heads, -1, width).astype(kernel_NOI.dtype)
        if batch * length == 1:  # as in kernels.py: a product of one row would take another road
            x_NMI = jnp.concatenate([x_NMI, x_NMI], axis=1)
        y_NMO = jnp.einsum("NMI,NOI->NMO", x_NMI, kernel_NOI, preferred_element_type=jnp.float32)
        y_NBTO = y_NMO[:, : batch * length].astype(self.config.dtype).reshape(heads, batch, length, -1)
        return constrain(jnp.moveaxis(y_NBTO, 0, 2), "batch", "length", "heads", None)

    def _heads_first(self) -> jax.Array:
        """[N, H, C] in the type that products have."""
        c, kernel = self.config, self.kernel
        if not isinstance(kernel, Kernel):
            return jnp.moveaxis(kernel, 0, 2).astype(c.dtype)
        weights_OI = kernel.weights_OI
        if kernel.scale_O is not None:
            weights_OI = weights_OI.astype(jnp.float32) * kernel.scale_O[:, None]
        return weights_OI.reshape(c.num_heads, c.head_dim, -1)


class LatentAttention(nn.Module):
    """Causal attention whose keys and values are made of one vector of `kv_latent_dim` numbers a token, beside which all heads
    share one rotary key: a query and a key of a head are H numbers that know no place, and R that turn.

    The cache holds the latent and the rotary key alone. Over it, the map from the latent to the keys goes into the queries, and
    that to the values behind the mean of the latents, so that no key or value is ever made (their section 2.1.2); without a
    cache they are made, and any backend attends to them.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, rows: Rows, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
        c = self.config
        key_up, value_up = (Up(c, c.kv_latent_dim, name=name) for name in ("key_up", "value_up"))
        has_bias = c.attention_bias and c.attention_output_bias
        output = Projection(c, ("heads", "head_dim"), ("embed",), (c.model_dim,), has_bias, into_residual=True, name="output")

        q_BTNH, turned_q_BTNR = jnp.split(self._queries(x_BTD), [c.head_dim], axis=-1)
        latent_BTC = self._latent(x_BTD, c.kv_latent_dim, "kv_latent")
        turned_k_BT1R = x_BTD[:, :, None, :0]
        if c.rotary_head_dim:
            turned_k_BTR = Projection(c, ("embed",), ("latent",), (c.rotary_head_dim,), c.attention_bias, name="rotary_key")(
                x_BTD
            )
            turned_k_BT1R = turned_k_BTR[:, :, None]
        if rows.angles is not None:
            turned_q_BTNR, turned_k_BT1R = rotate(turned_q_BTNR, rows.angles), rotate(turned_k_BT1R, rows.angles)

        if cache is not None:
            q_BTNW = jnp.concatenate([key_up.into_queries(q_BTNH), turned_q_BTNR], axis=-1)
            k_BT1W = jnp.concatenate([latent_BTC[:, :, None], turned_k_BT1R], axis=-1)
            mixed_BTNW, cache = attend_rows(self, q_BTNW, k_BT1W, None, rows, cache, width=c.query_dim)
            return output(value_up.out_of_latents(mixed_BTNW[..., : c.kv_latent_dim])), cache

        k_BTNH, v_BTNH = key_up(latent_BTC), value_up(latent_BTC)
        # Backends take queries, keys and values of one width: values are filled up with zeros, which give zeros.
        turned_k_BTNR = jnp.broadcast_to(turned_k_BT1R, turned_q_BTNR.shape)
        q_BTNW, k_BTNW, v_BTNW = (
            jnp.concatenate(parts, axis=-1)
            for parts in ((q_BTNH, turned_q_BTNR), (k_BTNH, turned_k_BTNR), (v_BTNH, jnp.zeros_like(turned_k_BTNR)))
        )
        out_BTNW, _ = attend_rows(self, q_BTNW, k_BTNW, v_BTNW, rows, None)
        return output(out_BTNW[..., : c.head_dim]), None

    def _queries(self, x_BTD: jax.Array) -> jax.Array:
        """[B, T, N, H + R]"""
        c = self.config
        axes, shape = ("heads", "head_dim"), (c.num_heads, c.query_dim)
        if not c.query_latent_dim:
            return Projection(c, ("embed",), axes, shape, c.attention_bias, name="query")(x_BTD)
        latent_BTC = self._latent(x_BTD, c.query_latent_dim, "query_latent")
        return Projection(c, ("latent",), axes, shape, False, name="query_up")(latent_BTC)

    def _latent(self, x_BTD: jax.Array, width: int, name: str) -> jax.Array:
        c = self.config
        latent_BTC: Any = Projection(c, ("embed",), ("latent",), (width,), c.attention_bias, name=name)(x_BTD)
        return Norm(c, "latent", name=f"{name}_norm")(latent_BTC)
