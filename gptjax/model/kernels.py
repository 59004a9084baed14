"""Linear maps as decoding wants them: [O, I], so that a product of few rows reads the weights once, in order; float32, bfloat16
or int8.

A row's result has the same bits whatever rows stand beside it. XLA's CPU backend hands products with the weights' contracted axis
innermost to one family of kernels that sums in one order for any number of rows but one; a single row takes the road of a
matrix-vector product, with another order, and is doubled to keep it off. The sums of int8 weights are of whole numbers, which
have no order.
"""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
from flax import struct

from gptjax.model import primitives, quantized

# A digit of an activation goes from -127 to 127, and stands for 1 / 254 of the digit before: rounding leaves half a unit.
DIGITS, BASE = 3, 254

# |digit * weight| summed over I must stay below 2**31.
LONGEST_INT8 = 2**31 // 127**2


# Axes of a projection's kernel that are contracted; the others are its output.
CONTRACTED = {"output": 2}


class LinearMap:
    """What may stand in a kernel's or a table's place: whoever makes one says what the product is."""

    def __call__(self, x: jax.Array, contracted: int = 1) -> jax.Array:
        """The last `contracted` axes of `x` to the map's own, in float32."""
        raise NotImplementedError

    def rows(self, ids: jax.Array) -> jax.Array:
        """Rows of a table, [..., I] in float32."""
        raise NotImplementedError


@struct.dataclass
class Kernel(LinearMap):
    """A linear map from I = prod(in_shape) to O = prod(out_shape)."""

    weights_OI: jax.Array
    scale_O: jax.Array | None  # float32; of int8 weights, which stand for weights * scale
    out_shape: tuple[int, ...] = struct.field(pytree_node=False)
    quantization: str = struct.field(pytree_node=False, default="none")  # of `quantized.FORMS`: inputs are rounded to it too

    def __call__(self, x: jax.Array, contracted: int = 1) -> jax.Array:
        """Contracts the last axes of `x` [..., *in_shape]: [..., *out_shape] in float32, where products are summed too.

        `x` is rounded to the weights' type; against int8 weights only by 1.3e-7 of the largest |x| of its row, at most, unless
        the model was trained with such products (`model.quantization`).
        """
        kept = x.shape[: x.ndim - contracted]
        x_MI = x.reshape(math.prod(kept), self.weights_OI.shape[1])
        if self.quantization != "none":
            y_MO = self._quantized(x_MI)
        else:
            y_MO = self._float(x_MI) if self.scale_O is None else self._int8(x_MI)
        if self.scale_O is not None:
            y_MO = y_MO * self.scale_O
        return y_MO.reshape(*kept, *self.out_shape)

    def rows(self, ids: jax.Array) -> jax.Array:
        """Rows of the weights, [..., I] in float32: an embedding's."""
        rows = primitives.embed(self.weights_OI, ids).astype(jnp.float32)
        return rows if self.scale_O is None else rows * self.scale_O[ids][..., None]

    def _float(self, x_MI: jax.Array) -> jax.Array:
        rows = x_MI.shape[0]
        if rows == 1:
            x_MI = jnp.concatenate([x_MI, x_MI])
        return _product(x_MI.astype(self.weights_OI.dtype), self.weights_OI, jnp.float32)[:rows]

    def _quantized(self, x_MI: jax.Array) -> jax.Array:
        rows = x_MI.shape[0]
        if rows == 1:
            x_MI = jnp.concatenate([x_MI, x_MI])
        return quantized.product(self.quantization, x_MI, self.weights_OI)[:rows]

    def _int8(self, x_MI: jax.Array) -> jax.Array:
        x_MI = x_MI.astype(jnp.float32)
        if not primitives.hand_written():  # accelerators' compilers convert the weights on their way into the product
            return _product(x_MI, self.weights_OI.astype(jnp.float32), jnp.float32)
        unit_M1, digits_JMI = in_digits(x_MI)
        sums_JMO = _product(digits_JMI.reshape(-1, x_MI.shape[1]), self.weights_OI, jnp.int32)
        sums_JMO = sums_JMO.reshape(DIGITS, x_MI.shape[0], -1).astype(jnp.float32)
        total_MO = sums_JMO[-1]
        for sums_MO in sums_JMO[-2::-1]:
            total_MO = sums_MO + total_MO / BASE
        return total_MO * unit_M1


def _product(x_MI: jax.Array, weights_OI: jax.Array, dtype: jnp.dtype) -> jax.Array:
    return jax.lax.dot_general(x_MI, weights_OI, (((1,), (1,)), ((), ())), preferred_element_type=dtype)


def in_digits(x_MI: jax.Array) -> tuple[jax.Array, jax.Array]:
    """(unit [M, 1], digits [J, M, I] int8) with x = unit * (digits[0] + digits[1] / 254 + digits[2] / 254**2), but for an error
    of at most 0.5 / 254**2 units. A unit is a power of two, above the row's largest |x| / 127 and at most twice that.
    """
    largest_M1 = jnp.maximum(jnp.max(jnp.abs(x_MI), axis=-1, keepdims=True), jnp.finfo(jnp.float32).tiny * 2**8)
    _, exponent_M1 = jnp.frexp(largest_M1 / 127)
    unit_M1 = jnp.ldexp(jnp.float32(1), exponent_M1)
    rest_MI, digits = x_MI / unit_M1, []
    for _ in range(DIGITS):
        digits.append(jnp.round(rest_MI))
        rest_MI = (rest_MI - digits[-1]) * BASE
    return unit_M1, jnp.stack(digits).astype(jnp.int8)
