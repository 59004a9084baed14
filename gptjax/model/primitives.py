"""The arithmetic that a decoder spends its time in, with backward passes written by hand where that is faster on a CPU.

Every function here has one meaning and up to two forms. The plain form is what JAX would do by itself and is what
accelerators get: their compilers fuse and lay it out well. The written-out form is for XLA's CPU backend, which runs batched
or transposed contractions slowly, keeps more residuals than it needs, and sums over leading axes slowly. `hand_written`
chooses, and nothing else does. experiments/speed/README.md has the measurements.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

_form: str | None = None
_platform: str | None = None
_fixed_order = False


@contextlib.contextmanager
def use_platform(name: str) -> Iterator[None]:
    """Traces what is inside as for the platform "cpu", "gpu" or "tpu", its forms and its attention backend: to compile for
    hardware that is not here.
    """
    global _platform
    if name not in ("cpu", "gpu", "tpu"):
        raise ValueError(f"the platform must be 'cpu', 'gpu' or 'tpu', not {name!r}.")
    before, _platform = _platform, name
    try:
        yield
    finally:
        _platform = before


def platform() -> str:
    """The platform that is traced for: JAX's default, unless `use_platform` says otherwise."""
    return _platform or jax.default_backend()


@contextlib.contextmanager
def use_form(name: str) -> Iterator[None]:
    """Traces what is inside with "plain" or "hand_written" forms, whatever the platform: for tests, and to compile for absent
    hardware.
    """
    global _form
    if name not in ("plain", "hand_written"):
        raise ValueError(f"the form must be 'plain' or 'hand_written', not {name!r}.")
    before, _form = _form, name
    try:
        yield
    finally:
        _form = before


def hand_written() -> bool:
    """Whether to trace the written-out forms: for a CPU, unless `use_form` says otherwise."""
    if _form is not None:
        return _form == "hand_written"
    return platform() == "cpu"


@contextlib.contextmanager
def fixed_order() -> Iterator[None]:
    """What is traced inside sums each row in one order, however many rows there are: generation's results are to have the same
    bits in any batch, and XLA chooses how it reduces by the whole array's size.
    """
    global _fixed_order
    before, _fixed_order = _fixed_order, True
    try:
        yield
    finally:
        _fixed_order = before


# --- linear --------------------------------------------------------------------------------


def linear(x: jax.Array, kernel: jax.Array, contracted: int, dtype: Any, bias: jax.Array | None = None) -> jax.Array:
    """Contracts the last `contracted` axes of `x` with the first of `kernel`: [..., I] x [I, O] -> [..., O], I and O being
    one axis or several.

    Operands are cast to `dtype`, products are summed in float32, and the result has `dtype`; `bias` [O] is added before the
    last cast. The gradients have the types of what they belong to.
    """
    kept = x.ndim - contracted
    if x.shape[kept:] != kernel.shape[:contracted]:
        raise ValueError(f"the last {contracted} axes of {x.shape} cannot be contracted with the first of {kernel.shape}.")
    if not hand_written():
        axes = (tuple(range(kept, x.ndim)), tuple(range(contracted)))
        y = jax.lax.dot_general(x.astype(dtype), kernel.astype(dtype), (axes, ((), ())), preferred_element_type=jnp.float32)
        return (y if bias is None else y + bias.astype(jnp.float32)).astype(dtype)
    size = math.prod(kernel.shape[:contracted])
    y = _matmul(jnp.dtype(dtype), x.reshape(-1, size), kernel.reshape(size, -1), None if bias is None else bias.reshape(-1))
    return y.reshape(*x.shape[:kept], *kernel.shape[contracted:])


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _matmul(dtype: jnp.dtype, x_MI: jax.Array, kernel_IO: jax.Array, bias_O: jax.Array | None) -> jax.Array:
    y_MO = _dot(x_MI.astype(dtype), kernel_IO.astype(dtype), (1, 0))
    return (y_MO if bias_O is None else y_MO + bias_O.astype(jnp.float32)).astype(dtype)


def _matmul_forward(dtype, x_MI, kernel_IO, bias_O):
    return _matmul(dtype, x_MI, kernel_IO, bias_O), (x_MI, kernel_IO, bias_O)


def _matmul_backward(dtype, residuals, g_MO):
    x_MI, kernel_IO, bias_O = residuals
    dx_MI = _dot(g_MO, kernel_IO.astype(dtype), (1, 1)).astype(x_MI.dtype)
    dkernel_IO = _dot(x_MI.astype(dtype), g_MO, (0, 0)).astype(kernel_IO.dtype)
    return dx_MI, dkernel_IO, None if bias_O is None else sum_rows(g_MO).astype(bias_O.dtype)


_matmul.defvjp(_matmul_forward, _matmul_backward)


def _dot(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    return jax.lax.dot_general(a, b, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=jnp.float32)


def sum_rows(x_MO: jax.Array) -> jax.Array:
    """Sum over the first axis in float32, as a product with ones: on a CPU, XLA's reduction over a leading axis takes
    longer.
    """
    return _dot(jnp.ones((1, x_MO.shape[0]), x_MO.dtype), x_MO, (1, 0))[0]


# Of one product in `ordered_sum`, so that its ones are few.
_LONGEST = 1024


def ordered_sum(x: jax.Array) -> jax.Array:
    """Sum over the last axis in float32, [..., 1], by products with ones: they add up in one order for any number of rows but
    one, which is doubled (see model/kernels.py).
    """
    shape, length = x.shape[:-1], x.shape[-1]
    x_MI = x.astype(jnp.float32).reshape(-1, length)
    rows = x_MI.shape[0]
    if rows == 1:
        x_MI = jnp.concatenate([x_MI, x_MI])
    while length > 1:
        pieces = -(-length // _LONGEST)
        width = -(-length // pieces)
        x_MI = jnp.pad(x_MI, ((0, 0), (0, pieces * width - length))).reshape(-1, width)
        x_MI = _dot(x_MI, jnp.ones((8, width)), (1, 1))[:, 0].reshape(-1, pieces)
        length = pieces
    return x_MI[:rows].reshape(*shape, 1)


def row_sum(x: jax.Array) -> jax.Array:
    """Sum over the last axis in float32, [...]; inside `fixed_order` by `ordered_sum`."""
    return ordered_sum(x)[..., 0] if _fixed_order else x.astype(jnp.float32).sum(-1)


# --- norms ---------------------------------------------------------------------------------


def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array | None, epsilon: float) -> jax.Array:
    """Normalises the last axis to mean 0 and variance 1, then scale [D] and bias [D] (Ba et al., 2016); float32 inside,
    result as `x`.
    """
    if _fixed_order:
        return _ordered_norm(True, epsilon, x, scale, bias)
    if hand_written():
        return _norm(True, epsilon, x.reshape(-1, x.shape[-1]), scale, bias).reshape(x.shape)
    x32 = x.astype(jnp.float32)
    centred = x32 - x32.mean(-1, keepdims=True)
    y = centred * jax.lax.rsqrt(jnp.square(centred).mean(-1, keepdims=True) + epsilon) * scale.astype(jnp.float32)
    return (y if bias is None else y + bias.astype(jnp.float32)).astype(x.dtype)


def rms_norm(x: jax.Array, scale: jax.Array, epsilon: float) -> jax.Array:
    """Divides the last axis by its root mean square, then scale [D] (Zhang and Sennrich, 2019); float32 inside, result as
    `x`.
    """
    if _fixed_order:
        return _ordered_norm(False, epsilon, x, scale, None)
    if hand_written():
        return _norm(False, epsilon, x.reshape(-1, x.shape[-1]), scale, None).reshape(x.shape)
    x32 = x.astype(jnp.float32)
    y = x32 * jax.lax.rsqrt(jnp.square(x32).mean(-1, keepdims=True) + epsilon) * scale.astype(jnp.float32)
    return y.astype(x.dtype)


def _ordered_norm(centre: bool, epsilon: float, x: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None) -> jax.Array:
    x32 = x.astype(jnp.float32)
    if centre:
        x32 = x32 - ordered_sum(x32) / x.shape[-1]
    y = x32 * jax.lax.rsqrt(ordered_sum(jnp.square(x32)) / x.shape[-1] + epsilon) * scale_D.astype(jnp.float32)
    return (y if bias_D is None else y + bias_D.astype(jnp.float32)).astype(x.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _norm(centre: bool, epsilon: float, x_MD: jax.Array, scale_D: jax.Array, bias_D: jax.Array | None) -> jax.Array:
    return _norm_forward(centre, epsilon, x_MD, scale_D, bias_D)[0]


def _norm_forward(centre, epsilon, x_MD, scale_D, bias_D):
    x32 = x_MD.astype(jnp.float32)
    mean_M1 = x32.mean(-1, keepdims=True) if centre else jnp.zeros((x_MD.shape[0], 1))
    rstd_M1 = jax.lax.rsqrt(jnp.square(x32 - mean_M1).mean(-1, keepdims=True) + epsilon)
    y_MD = (x32 - mean_M1) * rstd_M1 * scale_D.astype(jnp.float32)
    if bias_D is not None:
        y_MD = y_MD + bias_D.astype(jnp.float32)
    return y_MD.astype(x_MD.dtype), (x_MD, scale_D, bias_D, mean_M1, rstd_M1)


def _norm_backward(centre, epsilon, residuals, g_MD):
    x_MD, scale_D, bias_D, mean_M1, rstd_M1 = residuals
    g_MD, x32 = g_MD.astype(jnp.float32), x_MD.astype(jnp.float32)
    normal_MD = (x32 - mean_M1) * rstd_M1
    scaled_MD = g_MD * scale_D.astype(jnp.float32)
    along_M1 = (scaled_MD * normal_MD).mean(-1, keepdims=True)
    dx_MD = scaled_MD - normal_MD * along_M1
    if centre:
        dx_MD = dx_MD - scaled_MD.mean(-1, keepdims=True)
    dx_MD = (dx_MD * rstd_M1).astype(x_MD.dtype)
    dscale_D = sum_rows(g_MD * normal_MD).astype(scale_D.dtype)
    return dx_MD, dscale_D, None if bias_D is None else sum_rows(g_MD).astype(bias_D.dtype)


_norm.defvjp(_norm_forward, _norm_backward)


# --- activations ---------------------------------------------------------------------------

_SQRT_HALF = math.sqrt(0.5)
_SQRT_2_OVER_PI = math.sqrt(2 / math.pi)


def gelu(x: jax.Array) -> jax.Array:
    """x * Phi(x), exact (Hendrycks and Gimpel, 2016)."""
    return _gelu(x) if hand_written() else jax.nn.gelu(x, approximate=False)


def gelu_tanh(x: jax.Array) -> jax.Array:
    """The tanh approximation of GELU, as in GPT-2."""
    return _gelu_tanh(x) if hand_written() else jax.nn.gelu(x, approximate=True)


@jax.custom_vjp
def _gelu(x: jax.Array) -> jax.Array:
    return x * (0.5 + 0.5 * jax.lax.erf(x * _SQRT_HALF))


def _gelu_backward(x, g):
    density = jnp.exp(-0.5 * x * x) * (1 / math.sqrt(2 * math.pi))
    return (g * (0.5 + 0.5 * jax.lax.erf(x * _SQRT_HALF) + x * density),)


_gelu.defvjp(lambda x: (_gelu(x), x), _gelu_backward)


def _tanh_inner(x: jax.Array) -> jax.Array:
    return jnp.tanh(_SQRT_2_OVER_PI * x * (1 + 0.044715 * x * x))


@jax.custom_vjp
def _gelu_tanh(x: jax.Array) -> jax.Array:
    return 0.5 * x * (1 + _tanh_inner(x))


def _gelu_tanh_backward(x, g):
    t = _tanh_inner(x)
    slope = _SQRT_2_OVER_PI * (1 + 3 * 0.044715 * x * x)
    return (g * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * slope),)


_gelu_tanh.defvjp(lambda x: (_gelu_tanh(x), x), _gelu_tanh_backward)


# --- embedding -----------------------------------------------------------------------------


def embed(table_VD: jax.Array, ids: jax.Array) -> jax.Array:
    """Rows of the table, [..., D]."""
    return jnp.take(table_VD, ids, axis=0)


# --- dropout -------------------------------------------------------------------------------
#
# A mask is a function of (key, global row, element), and costs about as much as reading the activations. One from JAX's
# Threefry costs more on a CPU than the matrix products around it. Here each row of the batch has a key of two 32-bit words,
# made by Threefry from (seed, step, row); purposes and layers are folded in with an integer hash, and so is the element's
# place. The hash is a multiply-and-xor-shift finaliser of MurmurHash3's kind, with the key's second word stirred in half-way,
# so that vectors whose first words are close share nothing. Nothing crosses rows, so any split of the batch over devices or
# micro-batches draws the same mask; all platforms use it.

_GOLDEN = np.uint32(0x9E3779B9)
_M1, _M2 = np.uint32(0x21F0AAAD), np.uint32(0x735A2D97)


def row_keys(key: jax.Array, rows_B: jax.Array) -> jax.Array:
    """uint32 [B, 2]: one key a row.

    `key` is a typed key of (seed, step); `rows_B` are numbers of rows in the whole batch, over all hosts.
    """
    return jax.vmap(lambda row: jax.random.bits(jax.random.fold_in(key, row), (2,), jnp.uint32))(rows_B)


def fold_in(keys: jax.Array, number: jax.Array | int) -> jax.Array:
    """Keys [..., 2] of their own for each `number`: a layer's number, a purpose, or an array of places that broadcasts with
    `keys[..., 0]`.
    """
    number = jnp.asarray(number, jnp.uint32)
    first, second = keys[..., 0], keys[..., 1]
    first = _mix(_mix(first + number * _GOLDEN) ^ second)
    second = _mix(second + first * _M2)
    return jnp.stack([first, second], axis=-1)


def keep(keys: jax.Array, rate: float, size: int, start: int | jax.Array = 0) -> jax.Array:
    """bool [..., size], True with probability 1 - rate: elements start ..

    start + size of a vector for each of `keys` [..., 2].
    """
    place = jax.lax.iota(jnp.uint32, size) + jnp.asarray(start, jnp.uint32)
    h = place * _GOLDEN + keys[..., :1]
    h = (h ^ (h >> 16)) * _M1
    h = h ^ keys[..., 1:]
    h = (h ^ (h >> 15)) * _M2
    return h >= jnp.uint32(_threshold(rate))


def kept_scale(rate: float) -> float:
    """1 / P(kept), with the probability that `keep` really has."""
    return 1 / (1 - _threshold(rate) / 2**32)


def dropout(x: jax.Array, rate: float, keys: jax.Array | None) -> jax.Array:
    """Zeroes elements of `x` [B, ..., D] with probability `rate` and scales the others to keep the mean; `keys` is [B, 2];
    None: no dropout.

    Srivastava et al., 2014. The backward pass draws the mask again, so none is kept.
    """
    return _dropout(rate, x, keys) if rate and keys is not None else x


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _dropout(rate: float, x: jax.Array, keys: jax.Array) -> jax.Array:
    inner = x.shape[1:-1]
    places = jnp.arange(int(np.prod(inner)), dtype=jnp.uint32).reshape(inner)
    vectors = fold_in(keys.reshape(keys.shape[0], *(1,) * len(inner), 2), places[None])
    return jnp.where(keep(vectors, rate, x.shape[-1]), x * jnp.asarray(kept_scale(rate), x.dtype), jnp.zeros((), x.dtype))


def _dropout_forward(rate, x, keys):
    return _dropout(rate, x, keys), keys


def _dropout_backward(rate, keys, g):
    return _dropout(rate, g, keys), None


_dropout.defvjp(_dropout_forward, _dropout_backward)


def _threshold(rate: float) -> int:
    if not 0 <= rate < 1:
        raise ValueError(f"the dropout rate must be in [0, 1), not {rate}.")
    return round(rate * 2**32)


def _mix(h: jax.Array) -> jax.Array:
    h = (h ^ (h >> 16)) * _M1
    h = (h ^ (h >> 15)) * _M2
    return h ^ (h >> 15)
