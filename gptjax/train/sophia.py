"""Sophia (Liu et al., 2023): momentum over an estimate of the curvature's diagonal, each element clipped at 1."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class SophiaState(NamedTuple):
    """Both trees have the parameters' shapes."""

    step: jax.Array
    mu: Any  # average of gradients
    curvature: Any  # average of the estimates


def curvature_is_due(updates: jax.Array, estimate_every: int) -> jax.Array:
    """Whether update number `updates` = 0, 1, ... brings an estimate."""
    return updates % estimate_every == 0


def scale_by_sophia(
    beta1: float, beta2: float, gamma: float, epsilon: float, estimate_every: int
) -> optax.GradientTransformationExtraArgs:
    """Gradients to clip(momentum / max(gamma * curvature, epsilon), -1, 1).

    `update` takes `curvature`, a tree like the gradients, which is read only where `curvature_is_due`. No average is corrected
    for its start at 0, as in the paper's Algorithm 3.
    """

    def init(params: Any) -> SophiaState:
        return SophiaState(jnp.int32(0), jax.tree.map(jnp.zeros_like, params), jax.tree.map(jnp.zeros_like, params))

    def update(updates: Any, state: SophiaState, params: Any = None, *, curvature: Any) -> tuple[Any, SophiaState]:
        del params
        keep = jnp.where(curvature_is_due(state.step, estimate_every), beta2, 1.0)
        mu = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * g, state.mu, updates)
        smooth = jax.tree.map(lambda h, new: keep * h + (1 - keep) * new, state.curvature, curvature)
        direction = jax.tree.map(lambda m, h: jnp.clip(m / jnp.maximum(gamma * h, epsilon), -1.0, 1.0), mu, smooth)
        return direction, SophiaState(state.step + 1, mu, smooth)

    return optax.GradientTransformationExtraArgs(init, update)
