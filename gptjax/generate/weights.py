"""Parameters as decoding reads them, prepared once a model: each layer's own arrays, kernels as `model.kernels.Kernel`."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.config import ModelConfig, UserError
from gptjax.model import quantized
from gptjax.model.embedding import TRANSPOSED_FACTOR
from gptjax.model.kernels import CONTRACTED, LONGEST_INT8, Kernel

WEIGHTS = ("float32", "bfloat16", "int8")


def prepare(params: Any, config: ModelConfig, weights: str = "") -> Any:
    """The tree that generation wants in place of the model's parameters, for `forward` and all that stands on it.

    `weights`: what kernels, embedding and head are stored as, "float32", "bfloat16" or "int8"; "": config.dtype. Operands of
    their products have that type, but activations against int8 weights stay float32; norms, biases, learned positions, routers
    and experts are as they were, further prediction heads are left out. What is prepared already comes back as it is. May be
    traced.

    Where config.quantization is given, projections are stored as it has them, and `weights` must be "".

    int8 is symmetric and for each output channel (each row of embedding and head): weight = scale * q, q from -127 to 127.
    The factor of a factorised embedding, which multiplies in both directions, stays float32 then.

    Raises `UserError` for other `weights`, for any with config.quantization, and for int8 with experts or with channels too
    long to sum.
    """
    if is_prepared(params):
        return params
    if "adapters" in params:
        raise UserError(
            "the parameters have adapters beside them; gptjax.adapters.merge.for_writing makes of them what generation takes."
        )
    if weights and config.quantization != "none":
        raise UserError(
            f"weights={weights} would round products otherwise than model.quantization={config.quantization} has trained them; "
            "leave it out."
        )
    weights = weights or config.dtype
    check(config, weights)
    # One compiled call, so that no more than one copy of each leaf is ever made.
    return _prepare(params, config, weights)


def is_prepared(params: Any) -> bool:
    return "0" in params["layers"]


def check(config: ModelConfig, weights: str) -> None:
    """Raises `UserError` as `prepare` does."""
    if weights not in WEIGHTS:
        raise UserError(f"weights={weights} must be one of {', '.join(WEIGHTS)}.")
    if weights != "int8":
        return
    if config.num_experts:
        raise UserError(f"weights=int8 is for dense MLPs, but model.num_experts={config.num_experts}; choose bfloat16.")
    longest = max(
        config.model_dim, config.mlp_dim, config.num_heads * config.head_dim, config.kv_latent_dim, config.query_latent_dim
    )
    if longest > LONGEST_INT8:
        raise UserError(
            f"weights=int8 sums at most {LONGEST_INT8} products exactly, but a kernel has {longest}; choose bfloat16."
        )


@functools.partial(jax.jit, static_argnames=("config", "weights"))
def _prepare(params: Any, config: ModelConfig, weights: str) -> Any:
    layers = {
        str(n): _kernels(jax.tree.map(lambda leaf, n=n: leaf[n], params["layers"]), weights, config.quantization)
        for n in range(config.num_layers)
    }
    embed = params["embed"] | {"tokens": _kernel(params["embed"]["tokens"].T, 1, weights)}
    if config.embedding_dim:
        factor, kept_as = params["embed"]["factor"], "float32" if weights == "int8" else weights
        embed |= {"factor": _kernel(factor, 1, kept_as), TRANSPOSED_FACTOR: _kernel(factor.T, 1, kept_as)}
    prepared = {name: leaf for name, leaf in params.items() if name != "prediction_heads"} | {"layers": layers, "embed": embed}
    if not config.tied_embeddings:
        prepared["head"] = _kernel(params["head"], 1, weights)
    return prepared


def _kernels(tree: dict[str, Any], weights: str, quantization: str) -> dict[str, Any]:
    """A layer's parameters; experts and their router, which are no projections, stay as they are."""
    prepared = {}
    for name, leaf in tree.items():
        if name == "kernel":
            raise ValueError("a kernel outside of a projection")
        if isinstance(leaf, dict) and "kernel" in leaf:
            leaf = leaf | {"kernel": _kernel(leaf["kernel"], CONTRACTED.get(name, 1), weights, quantization)}
        elif isinstance(leaf, dict) and name != "experts":
            leaf = _kernels(leaf, weights, quantization)
        prepared[name] = leaf
    return prepared


def _kernel(kernel: jax.Array, contracted: int, weights: str, quantization: str = "none") -> Kernel:
    """[*in, *out] to a `Kernel`."""
    inputs, out_shape = math.prod(kernel.shape[:contracted]), kernel.shape[contracted:]
    kernel_OI = kernel.reshape(inputs, -1).T
    if quantization != "none":
        codes_OI, scale_O1 = quantized.codes(quantization, kernel_OI)
        return Kernel(codes_OI, scale_O1[:, 0], out_shape, quantization)
    if weights != "int8":
        return Kernel(kernel_OI.astype(weights), None, out_shape)
    return Kernel(*quantised(kernel_OI), out_shape)


def quantised(kernel_OI: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(int8 [O, I], scale [O] float32); a weight is off by at most half a scale, which is its row's largest |weight| / 127."""
    kernel_OI = kernel_OI.astype(jnp.float32)
    scale_O = jnp.max(jnp.abs(kernel_OI), axis=1) / 127
    units_OI = kernel_OI / jnp.where(scale_O > 0, scale_O, 1)[:, None]
    return jnp.clip(jnp.round(units_OI), -127, 127).astype(jnp.int8), scale_O


@functools.partial(jax.jit, static_argnames=("config", "weights"))
def rounded(params: Any, config: ModelConfig, weights: str) -> Any:
    """The model's own tree in float32, each weight replaced by what `prepare` stores: for a loss with such weights."""
    check(config, weights)
    prepared = prepare(params, config, weights)

    def plain(stored: Any, like: jax.Array) -> jax.Array:
        if not isinstance(stored, Kernel):
            return stored
        return stored.rows(jnp.arange(stored.weights_OI.shape[0])).T.reshape(like.shape)

    def back(stored: Any, like: Any) -> Any:
        return jax.tree.map(plain, stored, like, is_leaf=lambda leaf: isinstance(leaf, Kernel))

    like = jax.tree.map(lambda leaf: leaf[0], params["layers"])
    layers = [back(prepared["layers"][str(n)], like) for n in range(config.num_layers)]
    embed = params["embed"] | {"tokens": prepared["embed"]["tokens"].rows(jnp.arange(config.vocab_size))}
    if config.embedding_dim:
        embed["factor"] = plain(prepared["embed"]["factor"], params["embed"]["factor"])
    whole = prepared | {"layers": jax.tree.map(lambda *leaves: jnp.stack(leaves), *layers), "embed": embed}
    if not config.tied_embeddings:
        whole["head"] = plain(prepared["head"], params["head"])
    return whole
