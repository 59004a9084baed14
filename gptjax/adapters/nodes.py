"""What stands in a kernel's or a table's place where an adapter changes it. The decoder knows them as `LinearMap`s only.

Each is a pytree, so that layers can be stacked in it, scanned, and laid over a mesh as kernels are. Kernels are [*in, *out]; R is
the rank of an update.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from gptjax.model import primitives
from gptjax.model.kernels import LinearMap
from gptjax.parallel.sharding import constrain


@struct.dataclass
class Int8:
    """A frozen kernel, codes * scale: codes from -127 to 127, a scale for each output."""

    codes: jax.Array  # int8 [*in, *out]
    scale: jax.Array  # float32 [*out]

    @property
    def ndim(self) -> int:
        return self.codes.ndim


def in_int8(kernel: jax.Array, contracted: int) -> Int8:
    """A kernel, each weight off by at most half a scale: its output's largest |weight| / 127."""
    kernel = kernel.astype(jnp.float32)
    scale = jnp.max(jnp.abs(kernel), axis=tuple(range(contracted))) / 127
    codes = jnp.round(kernel / jnp.where(scale > 0, scale, 1))
    return Int8(jnp.clip(codes, -127, 127).astype(jnp.int8), scale)


def product(x: jax.Array, base: Any, contracted: int, dtype: Any) -> jax.Array:
    """`primitives.linear` in float32, by a kernel as it is or as `Int8`; operands of the product have `dtype`."""
    if isinstance(base, Int8):  # codes are whole numbers of 8 bits, which bfloat16 holds
        return primitives.linear(x, base.codes.astype(dtype), contracted, dtype).astype(jnp.float32) * base.scale
    return primitives.linear(x, base, contracted, dtype).astype(jnp.float32)


def plain(base: Any) -> jax.Array:
    """The kernel's numbers in float32."""
    return base.codes.astype(jnp.float32) * base.scale if isinstance(base, Int8) else base.astype(jnp.float32)


@struct.dataclass
class Frozen(LinearMap):
    """An `Int8` kernel that no adapter changes."""

    base: Any
    dtype: str = struct.field(pytree_node=False)

    def __call__(self, x: jax.Array, contracted: int = 1) -> jax.Array:
        return product(x, self.base, contracted, jnp.dtype(self.dtype))

    def merged(self, contracted: int) -> jax.Array:
        return plain(self.base)


@struct.dataclass
class LowRank(LinearMap):
    """x W + scale * (x A) B (LoRA, Hu et al., 2021); with a magnitude, its columns as long as that says (DoRA, Liu et al., 2024).

    With keys, A reads x with elements dropped; DoRA then adds to x W what it changes of the dropped x's product, as PEFT does.
    W + scale A B is never made. The length of its columns, which DoRA divides by, follows from products of rank R:
    |w + s a|^2 = |w|^2 + 2 s w.a + s^2 a.a with a = A b. No gradient goes through it, as in section 4.3 of the paper.
    """

    base: Any
    a: jax.Array  # float32 [*in, R]
    b: jax.Array  # float32 [R, *out]
    magnitude: jax.Array | None  # float32 [*out]
    scale: float = struct.field(pytree_node=False)
    dtype: str = struct.field(pytree_node=False)
    keys: jax.Array | None = None  # uint32 [B, 2], of the rows of x [B, ..., *in]; None: no dropout
    dropout: float = struct.field(pytree_node=False, default=0.0)

    def __call__(self, x: jax.Array, contracted: int = 1) -> jax.Array:
        dtype = jnp.dtype(self.dtype)
        dropped = primitives.dropout(x, self.dropout, self.keys)
        low = primitives.linear(dropped, self.a, contracted, dtype)
        update = self.scale * primitives.linear(low, self.b, 1, dtype).astype(jnp.float32)
        y = product(x, self.base, contracted, dtype)
        if self.magnitude is None:
            return y + update
        ratio = self.magnitude / self.lengths(contracted)
        if self.keys is None:
            return (y + update) * ratio
        return y + (ratio - 1) * product(dropped, self.base, contracted, dtype) + ratio * update

    def lengths(self, contracted: int) -> jax.Array:
        """float32 [*out]: the columns' lengths of W + scale A B, which carry no gradient."""
        base, a, b = jax.lax.stop_gradient((self.base, self.a, self.b))
        inputs = tuple(range(contracted))
        squares = jnp.square(base.codes.astype(jnp.float32) if isinstance(base, Int8) else base.astype(jnp.float32))
        own = squares.sum(inputs) * (jnp.square(base.scale) if isinstance(base, Int8) else 1.0)
        across = (b * product(jnp.moveaxis(a, -1, 0), base, contracted, jnp.float32)).sum(0)
        gram_RR = jnp.tensordot(a, a, (inputs, inputs))
        update = (b * jnp.tensordot(gram_RR, b, 1)).sum(0)
        return jnp.sqrt(own + 2 * self.scale * across + self.scale**2 * update)

    def merged(self, contracted: int) -> jax.Array:
        whole = plain(self.base) + self.scale * jnp.tensordot(self.a, self.b, 1)
        return whole if self.magnitude is None else whole * (self.magnitude / self.lengths(contracted))


@struct.dataclass
class Rescaled(LinearMap):
    """A kernel whose inputs or outputs are multiplied by learned factors (IA3, Liu et al., 2022)."""

    base: Any
    inputs: jax.Array | None  # float32 [*in]
    outputs: jax.Array | None  # float32 [*out]
    dtype: str = struct.field(pytree_node=False)

    def __call__(self, x: jax.Array, contracted: int = 1) -> jax.Array:
        x = x if self.inputs is None else (x * self.inputs).astype(x.dtype)
        y = product(x, self.base, contracted, jnp.dtype(self.dtype))
        return y if self.outputs is None else y * self.outputs

    def merged(self, contracted: int) -> jax.Array:
        whole = plain(self.base)
        if self.inputs is not None:
            whole = whole * self.inputs.reshape(*self.inputs.shape, *(1,) * (whole.ndim - contracted))
        return whole if self.outputs is None else whole * self.outputs


@struct.dataclass
class Prefixed(LinearMap):
    """A map of rows [B, P + T, D] that gives learned vectors in place of the first P (prefix tuning, Li and Liang, 2021)."""

    base: Any
    first: jax.Array  # float32 [P, *out]
    dtype: str = struct.field(pytree_node=False)

    def __call__(self, x: jax.Array, contracted: int = 1) -> jax.Array:
        y = product(x, self.base, contracted, jnp.dtype(self.dtype))
        first = jnp.broadcast_to(self.first, (y.shape[0], *self.first.shape))
        return jnp.concatenate([first, y[:, self.first.shape[0] :]], axis=1)


@struct.dataclass
class Extended(LinearMap):
    """A table of tokens with learned rows behind it, whose ids go on where the tokens' end (prompt tuning, Lester et al., 2021).

    As an output table it has its tokens alone.
    """

    table_VD: jax.Array
    more_PD: jax.Array
    dtype: str = struct.field(pytree_node=False)

    def __call__(self, x: jax.Array, contracted: int = 1) -> jax.Array:
        dtype = jnp.dtype(self.dtype)
        table_VD = self.table_VD.astype(dtype)
        return jnp.einsum("...D,VD->...V", x.astype(dtype), table_VD, preferred_element_type=jnp.float32)

    def rows(self, ids: jax.Array) -> jax.Array:
        size = self.table_VD.shape[0]
        own = primitives.embed(constrain(self.table_VD, None, "lookup_width"), jnp.minimum(ids, size - 1))
        more = primitives.embed(self.more_PD, jnp.clip(ids - size, 0, self.more_PD.shape[0] - 1))
        return jnp.where((ids < size)[..., None], own, more).astype(jnp.float32)
