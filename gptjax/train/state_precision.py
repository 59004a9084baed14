"""Optimizer state in fewer bits: moments are stored rounded between steps, and updated in float32.

    bfloat16   the upper half of each float32
    int8       a code a number, and a float32 scale for each block of 256 along the last axis (Dettmers et al., 2022): the block's
               largest magnitude. A code stands for scale * (code / 255)**4 of what is never negative, such as second moments, and
               for +-scale * (code / 127)**2 of the rest. So what divides, the root of a second moment, keeps five orders of
               magnitude within a block, and never becomes 0 where it was not.

Rounding is stochastic, up or down in proportion, so that the mean of what is stored is what was to be stored: a decay of 0.999
changes a moment by less than half a step of either form, and rounding to the nearest would leave it where it is for good. The
random bits are a function of (step, parameter, element), and so the same on any mesh.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax.sharding import NamedSharding, PartitionSpec

from gptjax.model import primitives

BLOCK = 256

# The fields of optimizers' states that are moments, and whether they can be negative. All others stay as they are: what has few
# elements, and what sums up small changes over the whole run, such as an average of parameters.
MOMENTS = {"mu": True, "trace": True, "m1": True, "m2": True, "nu": False}


@struct.dataclass
class Blocks:
    """An array [..., D] in 8 bits."""

    codes: jax.Array  # [..., D], int8 of a moment that can be negative, else uint8
    scales: jax.Array  # float32 [..., number of blocks]


class Stored(NamedTuple):
    """The state of an optimizer whose moments are stored in fewer bits."""

    step: jax.Array  # int32: updates so far
    inner: Any


def num_blocks(width: int) -> int:
    return -(-width // BLOCK)


def placed(shape: tuple[int, ...], sharding: Any) -> list[tuple[tuple[Any, ...], tuple[int, ...], Any]]:
    """(path below the parameter's, shape, sharding) of what `Blocks` hold of a moment that lies as `sharding` says: codes as it
    does, scales by its leading axes.
    """
    if not shape:
        return []
    codes, scales = (jax.tree_util.GetAttrKey(name) for name in ("codes", "scales"))
    leading = NamedSharding(sharding.mesh, PartitionSpec(*sharding.spec[: len(shape) - 1]))
    return [((codes,), shape, sharding), ((scales,), (*shape[:-1], num_blocks(shape[-1])), leading)]


def in_dtype(inner: optax.GradientTransformation, dtype: str) -> optax.GradientTransformation:
    """`inner`, its moments stored as `dtype`: "float32" (as they are), "bfloat16" or "int8"."""
    if dtype == "float32":
        return inner
    store = {"bfloat16": _to_bfloat16, "int8": _to_blocks}[dtype]
    inner = optax.with_extra_args_support(inner)

    def stored(state: Any, step: jax.Array) -> Stored:
        leaves, structure = jax.tree_util.tree_flatten_with_path(state)
        kept = []
        for number, (path, leaf) in enumerate(leaves):
            signed = _signed(path) if leaf.ndim else None
            kept.append(leaf if signed is None else store(leaf, signed, _bits(step, number, leaf.shape)))
        return Stored(step, jax.tree.unflatten(structure, kept))

    def update(updates: Any, state: Stored, params: Any = None, **extra: Any) -> tuple[Any, Stored]:
        loaded = jax.tree.map(_load, state.inner, is_leaf=lambda node: isinstance(node, Blocks))
        updates, new = inner.update(updates, loaded, params, **extra)
        return updates, stored(new, state.step + 1)

    return optax.GradientTransformationExtraArgs(lambda params: stored(inner.init(params), jnp.int32(0)), update)


def _signed(path: tuple[Any, ...]) -> bool | None:
    """Whether the leaf belongs to a moment that can be negative; None where it is no moment's."""
    fields = [key.name for key in path if isinstance(key, jax.tree_util.GetAttrKey)]
    return next((MOMENTS[name] for name in reversed(fields) if name in MOMENTS), None)


def _load(leaf: Any) -> jax.Array:
    if isinstance(leaf, Blocks):
        return _from_blocks(leaf)
    return leaf.astype(jnp.float32) if leaf.dtype == jnp.bfloat16 else leaf


def _bits(step: jax.Array, number: int, shape: tuple[int, ...]) -> jax.Array:
    """uint32, of their own for each step, leaf and element."""
    keys = primitives.fold_in(primitives.fold_in(jnp.zeros(2, jnp.uint32), number + 1), step)
    place = jnp.zeros(shape, jnp.uint32)
    for axis, size in enumerate(shape):
        place = place * jnp.uint32(size) + jax.lax.broadcasted_iota(jnp.uint32, shape, axis)
    return primitives.fold_in(keys, place)[..., 0]


# --- bfloat16 ---------------------------------------------------------------------------------------------------------------


def _to_bfloat16(x: jax.Array, signed: bool, bits: jax.Array) -> jax.Array:
    del signed
    raised = jax.lax.bitcast_convert_type(x, jnp.uint32) + (bits & jnp.uint32(0xFFFF))
    return jax.lax.bitcast_convert_type(raised & jnp.uint32(0xFFFF0000), jnp.float32).astype(jnp.bfloat16)


# --- int8 -------------------------------------------------------------------------------------------------------------------


def _form(signed: bool) -> tuple[int, int, Any]:
    """(largest code, power, type)."""
    return (127, 2, jnp.int8) if signed else (255, 4, jnp.uint8)


def _power(x: jax.Array, power: int) -> jax.Array:
    """x**2 or x**4, by products: the same bits everywhere."""
    return x * x if power == 2 else (x * x) * (x * x)


def _root(x: jax.Array, power: int) -> jax.Array:
    return jnp.sqrt(x) if power == 2 else jnp.sqrt(jnp.sqrt(x))


def _in_blocks(x: jax.Array) -> jax.Array:
    """[..., D] to [..., blocks, block], zeros at the end."""
    blocks = num_blocks(x.shape[-1])
    padded = jnp.pad(x, [(0, 0)] * (x.ndim - 1) + [(0, blocks * BLOCK - x.shape[-1])])
    return padded.reshape(*x.shape[:-1], blocks, BLOCK)


def _spread(scales: jax.Array, width: int) -> jax.Array:
    """[..., blocks] to [..., D]."""
    return jnp.repeat(scales, BLOCK, axis=-1)[..., :width]


def _to_blocks(x: jax.Array, signed: bool, bits: jax.Array) -> Blocks:
    top, power, dtype = _form(signed)
    scales = jnp.max(jnp.abs(_in_blocks(x)), axis=-1)
    share = jnp.abs(x) / _spread(jnp.where(scales > 0, scales, 1.0), x.shape[-1])
    lower = jnp.clip(jnp.floor(top * _root(share, power)), 0, top - 1)
    below, above = _power(lower / top, power), _power((lower + 1) / top, power)
    chance = (share - below) / (above - below)
    code = lower + ((bits >> 8).astype(jnp.float32) * 2.0**-24 < chance)
    code = code * jnp.sign(x) if signed else jnp.where(x > 0, jnp.maximum(code, 1), 0)
    return Blocks(code.astype(dtype), scales)


def _from_blocks(x: Blocks) -> jax.Array:
    top, power, _ = _form(x.codes.dtype == jnp.int8)
    codes = x.codes.astype(jnp.float32)
    return jnp.sign(codes) * _power(codes / top, power) * _spread(x.scales, codes.shape[-1])
