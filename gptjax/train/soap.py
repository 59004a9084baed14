"""SOAP (Vyas et al., 2024): Adam in the eigenbasis of Shampoo's factors, for matrices that may be stacked."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

# Iterations that make the first basis, where the paper takes an eigendecomposition.
_FIRST_ITERATIONS = 10
# Added to the factor, whose mean eigenvalue is made 1, in each iteration; the eigenvectors stay what they are. Directions in
# which no gradient has been seen yet would otherwise be made of rounding errors alone, and differ from mesh to mesh.
_SHIFT = 1e-2

# (how many leading axes count matrices, how many axes after them are inputs) of a parameter's path
MatrixAxes = Callable[[tuple[Any, ...]], tuple[int, int]]


class SoapState(NamedTuple):
    """`mu` and `nu` have the parameters' shapes; factors and bases are [*stacked, n, n], none for a side that is too long."""

    step: jax.Array
    mu: Any  # average of gradients
    nu: Any  # average of squared gradients, in the eigenbasis
    left: Any  # average of G G^T
    right: Any  # average of G^T G
    left_basis: Any  # a column an eigenvector
    right_basis: Any


def scale_by_soap(
    matrix_axes: MatrixAxes, beta1: float, beta2: float, epsilon: float, refresh_every: int, max_dim: int
) -> optax.GradientTransformation:
    """Gradients of matrices to Adam's direction in the eigenbases of averages of G G^T and G^T G.

    Every matrix of a stacked parameter (a layer's, an expert's) has bases of its own; all is float32. A side longer than
    `max_dim` keeps its own axes. As in the authors' code, the first gradient only gives the bases and moves nothing, and Adam's
    corrections count from the second. Every `refresh_every` updates a basis goes through one step of orthogonal iteration (a
    product and a QR), which is also how the first one is found: in several steps from the axes themselves.
    """

    def as_matrices(path: tuple[Any, ...], leaf: Any) -> Any:
        stacked, inputs = matrix_axes(path)
        outputs = stacked + inputs
        return leaf.reshape(*leaf.shape[:stacked], math.prod(leaf.shape[stacked:outputs]), math.prod(leaf.shape[outputs:]))

    def init(params: Any) -> SoapState:
        def square(side: int, of: Callable[[tuple[int, ...]], jax.Array]) -> Any:
            def make(path: tuple[Any, ...], leaf: jax.Array) -> Any:
                shape = as_matrices(path, leaf).shape
                size = shape[side]
                return of((*shape[:-2], size, size)) if size <= max_dim else optax.MaskedNode()

            return jax.tree_util.tree_map_with_path(make, params)

        def identity(shape: tuple[int, ...]) -> jax.Array:
            return jnp.broadcast_to(jnp.eye(shape[-1], dtype=jnp.float32), shape)

        def zeros() -> Any:
            return jax.tree.map(jnp.zeros_like, params)

        return SoapState(
            jnp.int32(0),
            zeros(),
            zeros(),
            square(-2, jnp.zeros),
            square(-1, jnp.zeros),
            square(-2, identity),
            square(-1, identity),
        )

    def update(updates: Any, state: SoapState, params: Any = None) -> tuple[Any, SoapState]:
        del params
        count = state.step
        # The first gradient moves no average but the factors'.
        keep1, keep2 = jnp.where(count > 0, beta1, 1.0), jnp.where(count > 0, beta2, 1.0)
        number = jnp.maximum(count, 1).astype(jnp.float32)
        correct1, correct2 = 1 - beta1**number, 1 - beta2**number
        iterations = jnp.where(count == 0, _FIRST_ITERATIONS, jnp.where(count % refresh_every == 0, 1, 0))

        def one(path: tuple[Any, ...], gradient: jax.Array, *parts: Any) -> tuple[Any, ...]:
            matrix, mu, nu = (as_matrices(path, x) for x in (gradient, *parts[:2]))
            left, right, *bases = parts[2:]
            mu = keep1 * mu + (1 - keep1) * matrix
            nu = keep2 * nu + (1 - keep2) * jnp.square(_rotate(matrix, bases, into=True))
            scaled = _rotate(mu / correct1, bases, into=True) / (jnp.sqrt(nu / correct2) + epsilon)
            direction = _rotate(scaled, bases, into=False)
            left = _average(left, beta2, matrix, "...mn,...kn->...mk")
            right = _average(right, beta2, matrix, "...mn,...mk->...nk")
            bases = [_refresh(*pair, iterations) for pair in zip((left, right), bases, strict=True)]
            return tuple(x.reshape(gradient.shape) for x in (direction, mu, nu)) + (left, right, *bases)

        leaves, tree = jax.tree_util.tree_flatten_with_path(updates)
        structure: Any = tree
        columns = [structure.flatten_up_to(tree) for tree in state[1:]]
        rows = [one(path, gradient, *parts) for (path, gradient), *parts in zip(leaves, *columns, strict=True)]
        found = zip(*rows, strict=True) if rows else [()] * len(state)  # where no matrix is trained
        direction, *trees = (structure.unflatten(column) for column in found)
        return direction, SoapState(count + 1, *trees)

    return optax.GradientTransformation(init, update)


def factor_sharding(shape: tuple[int, ...], like: tuple[int, ...], parameter: NamedSharding) -> NamedSharding:
    """Where state [*stacked, n, n] of a parameter of shape `like` lies: layers and experts as the parameter's, and then, over
    the axis fsdp, whole layers where they divide (so that each device refreshes the bases of its own), else rows. Other
    state that is not shaped as its parameter is small, and whole on every device.
    """
    mesh, stacked = parameter.mesh, len(shape) - 2
    if stacked < 1 or shape[-1] != shape[-2] or shape[:stacked] != like[:stacked]:
        return NamedSharding(mesh, PartitionSpec())
    entries = [*parameter.spec, *(None,) * len(shape)][:stacked]
    axes = [() if entry is None else (entry,) if isinstance(entry, str) else tuple(entry) for entry in entries] + [(), ()]
    parts = mesh.shape["fsdp"]
    if not any("fsdp" in some for some in axes):
        if shape[0] % (parts * math.prod(mesh.shape[axis] for axis in axes[0])) == 0:
            axes[0] += ("fsdp",)
        elif shape[-1] % parts == 0:
            axes[-2] = ("fsdp",)
    return NamedSharding(mesh, PartitionSpec(*(some or None for some in axes)))


def _product(equation: str, *arrays: jax.Array) -> jax.Array:
    return jnp.einsum(equation, *arrays, precision=jax.lax.Precision.HIGHEST)


def _rotate(matrix: jax.Array, bases: Any, into: bool) -> jax.Array:
    """[..., m, n] in the eigenbases, or back from them; a side without a basis stays."""
    left, right = bases
    if not isinstance(left, optax.MaskedNode):
        matrix = _product("...mk,...mn->...kn" if into else "...km,...mn->...kn", left, matrix)
    if not isinstance(right, optax.MaskedNode):
        matrix = _product("...mn,...nk->...mk" if into else "...mn,...kn->...mk", matrix, right)
    return matrix


def _average(factor: Any, decay: float, matrix: jax.Array, equation: str) -> Any:
    if isinstance(factor, optax.MaskedNode):
        return factor
    return decay * factor + (1 - decay) * _product(equation, matrix, matrix)


def _refresh(factor: Any, basis: Any, iterations: jax.Array) -> Any:
    if isinstance(factor, optax.MaskedNode):
        return basis
    mean = jnp.trace(factor, axis1=-2, axis2=-1)[..., None, None] / factor.shape[-1]
    scaled = factor / jnp.maximum(mean, jnp.finfo(jnp.float32).tiny)

    def iterate(_: Any, basis: jax.Array) -> jax.Array:
        return jnp.linalg.qr(_product("...mk,...kn->...mn", scaled, basis) + _SHIFT * basis)[0]

    return jax.lax.fori_loop(0, iterations, iterate, basis)
