"""Norms, projections, MLPs, dropout. Axis letters are explained in decoder.py."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from gptjax.config import ModelConfig
from gptjax.model import primitives, quantized
from gptjax.model.kernels import LinearMap
from gptjax.model.parameterization import initial_std
from gptjax.parallel.sharding import constrain, spec

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "gelu": primitives.gelu,
    "gelu_tanh": primitives.gelu_tanh,
    "relu": jax.nn.relu,
    "relu2": primitives.relu2,
    "silu": jax.nn.silu,
    "sigmoid": jax.nn.sigmoid,
    "identity": lambda x: x,
}

PROJECTED = "projected"  # the name of every projection's result, by which remat may keep it


def parameter(module: nn.Module, name: str, initializer: Any, axes: tuple[str, ...], shape: tuple[int, ...], dtype: str) -> Any:
    """A parameter whose dimensions carry logical axis names.

    One that stands there as a `LinearMap` comes back as it is. Raises as `sharding.spec` does, naming the parameter: here, since
    the activations that it makes would fail first.
    """
    stored: Any = module.get_variable("params", name)
    if isinstance(stored, LinearMap):
        return stored
    spec(*axes, array="parameter " + "/".join((*module.path, name)))
    return module.param(name, nn.with_logical_partitioning(initializer, axes), shape, jnp.dtype(dtype))


def linear(
    x: jax.Array, kernel: Any, contracted: int, dtype: str, bias: jax.Array | None, quantization: str = "none"
) -> jax.Array:
    """`primitives.linear`, whose kernel may be a `LinearMap`, or whose product is one of `quantized.FORMS`."""
    if isinstance(kernel, LinearMap):
        y = kernel(x, contracted)
    elif quantization != "none":
        y = quantized.linear(quantization, x, kernel, contracted, dtype)
    else:
        return primitives.linear(x, kernel, contracted, jnp.dtype(dtype), bias)
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(dtype)


class Norm(nn.Module):
    """LayerNorm (Ba et al., 2016) or RMSNorm (Zhang & Sennrich, 2019) over the last axis, in float32; or nothing, "none"."""

    config: ModelConfig
    axis: str = "embed"

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        if c.norm == "none":
            return x_BTD
        width = (x_BTD.shape[-1],)
        scale_D = parameter(self, "scale", nn.initializers.ones, (self.axis,), width, c.param_dtype)
        if c.norm == "rmsnorm":
            return primitives.rms_norm(x_BTD, scale_D, c.norm_epsilon)
        bias_D = parameter(self, "bias", nn.initializers.zeros, (self.axis,), width, c.param_dtype) if c.norm_bias else None
        return primitives.layer_norm(x_BTD, scale_D, bias_D, c.norm_epsilon)


class Projection(nn.Module):
    """A linear map from the last `inputs` axes to new ones, its kernel kept in its true shape: [*in, *out].

    `into_residual` marks the maps that write into the residual stream, which GPT-2 starts smaller: there are 2 of them a
    layer, and a sum of 2L terms of variance 1/(2L) has variance 1.
    """

    config: ModelConfig
    in_axes: tuple[str, ...]
    out_axes: tuple[str, ...]
    out_shape: tuple[int, ...]
    use_bias: bool
    into_residual: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        c = self.config
        std = initial_std(c, "hidden")
        if self.into_residual and c.scaled_residual_init:
            std /= math.sqrt(2 * c.num_layers)
        in_shape = x.shape[-len(self.in_axes) :]
        kernel = parameter(
            self, "kernel", nn.initializers.normal(std), self.in_axes + self.out_axes, in_shape + self.out_shape, c.param_dtype
        )
        bias = None
        if self.use_bias:
            bias = parameter(self, "bias", nn.initializers.zeros, self.out_axes, self.out_shape, c.param_dtype)
        y = linear(x, kernel, len(self.in_axes), c.dtype, bias, c.quantization)
        # "embed" says how parameters are stored; the residual stream is whole on every device.
        y = constrain(y, "batch", "length", *(None if name == "embed" else name for name in self.out_axes))
        return checkpoint_name(y, PROJECTED)


class MLP(nn.Module):
    """Two projections around a non-linearity; gated: GLU variants (Shazeer, 2020), each by its activation."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        c = self.config
        activation = ACTIVATIONS[c.activation]
        up_BTF = Projection(c, ("embed",), ("mlp",), (c.mlp_dim,), c.mlp_bias, name="up")(x_BTD)
        if c.gated_mlp:
            gate_BTF = Projection(c, ("embed",), ("mlp",), (c.mlp_dim,), c.mlp_bias, name="gate")(x_BTD)
            hidden_BTF = activation(gate_BTF) * up_BTF
        else:
            hidden_BTF = activation(up_BTF)
        return Projection(c, ("mlp",), ("embed",), (c.model_dim,), c.mlp_bias, into_residual=True, name="down")(hidden_BTF)
