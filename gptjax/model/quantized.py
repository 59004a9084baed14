"""Matrix products in 8 bits, for training: both operands are rounded for the product and nowhere else.

    int8   -127 to 127, products summed exactly in int32
    fp8    e4m3: 3 bits of mantissa, up to 448; products summed in float32

Each vector that is contracted has a scale of its own, found anew for each product: a token's activations, and the weights of one
output channel; its largest magnitude becomes the largest code (dynamic quantisation per token and per channel, as LLM.int8() and
AQT have it). Only the forward product is rounded. The backward pass takes rounding for the identity (straight-through; Bengio et
al., 2013) and its two products are of what was there before, in `dtype`: gradients have a few large values among many small
ones, which 8 bits serve badly (Wortsman et al., 2023, "SwitchBack").

XLA compiles the products to the hardware's own where it has them; elsewhere it converts the operands, in which fp8 loses nothing,
for a product of two such numbers fits into float32. So a model computes the same everywhere, quicker or slower.
"""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp

# The largest code, the type of codes, and that of the sums.
FORMS: dict[str, tuple[float, Any, Any]] = {
    "int8": (127.0, jnp.int8, jnp.int32),
    "fp8": (448.0, jnp.float8_e4m3fn, jnp.float32),
}


def codes(kind: str, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(codes as `x` [..., I], scales [..., 1] in float32) with x = codes * scales, but for rounding to the nearest."""
    top, dtype, _ = FORMS[kind]
    x = x.astype(jnp.float32)
    scale = jnp.max(jnp.abs(x), axis=-1, keepdims=True) / top
    units = jnp.clip(x / jnp.where(scale > 0, scale, 1), -top, top)
    return (jnp.round(units) if dtype == jnp.int8 else units).astype(dtype), scale


def product(kind: str, x_MI: jax.Array, weights_OI: jax.Array) -> jax.Array:
    """[M, O] in float32 of `x_MI`, rounded here, and `codes` of weights, whose scales are still to be multiplied with."""
    codes_MI, scale_M1 = codes(kind, x_MI)
    sums_MO = jax.lax.dot_general(codes_MI, weights_OI, (((1,), (1,)), ((), ())), preferred_element_type=FORMS[kind][2])
    return sums_MO.astype(jnp.float32) * scale_M1


def linear(kind: str, x: jax.Array, kernel: jax.Array, contracted: int, dtype: Any) -> jax.Array:
    """Contracts the last `contracted` axes of `x` with the first of `kernel`, as `primitives.linear` does: in float32."""
    kept = x.shape[: x.ndim - contracted]
    size = math.prod(kernel.shape[:contracted])
    y_MO = _matmul(kind, jnp.dtype(dtype), x.reshape(-1, size), kernel.reshape(size, -1))
    return y_MO.reshape(*kept, *kernel.shape[contracted:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _matmul(kind: str, dtype: Any, x_MI: jax.Array, kernel_IO: jax.Array) -> jax.Array:
    weights_OI, scale_O1 = codes(kind, kernel_IO.T)
    return product(kind, x_MI, weights_OI) * scale_O1[:, 0]


def _forward(kind, dtype, x_MI, kernel_IO):
    return _matmul(kind, dtype, x_MI, kernel_IO), (x_MI, kernel_IO)


def _backward(kind, dtype, residuals, g_MO):
    x_MI, kernel_IO = residuals
    g_MO = g_MO.astype(dtype)
    dx_MI = _dot(g_MO, kernel_IO.astype(dtype), (1, 1)).astype(x_MI.dtype)
    dkernel_IO = _dot(x_MI.astype(dtype), g_MO, (0, 0)).astype(kernel_IO.dtype)
    return dx_MI, dkernel_IO


_matmul.defvjp(_forward, _backward)


def _dot(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    return jax.lax.dot_general(a, b, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=jnp.float32)
