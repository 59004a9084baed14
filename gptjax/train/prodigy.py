"""Prodigy (Mishchenko & Defazio, 2023): Adam whose rate is an estimate, from below, of the distance to the solution."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax


class ProdigyState(NamedTuple):
    """Trees have the parameters' shapes."""

    step: jax.Array
    mu: Any
    nu: Any
    gradient_sum: Any  # s
    start: Any  # the first parameters
    inner_product: jax.Array  # r
    distance: jax.Array  # d


def prodigy(
    rate: Callable[[Any], Any],
    beta1: float,
    beta2: float,
    epsilon: float,
    initial: float,
    rate_multipliers: Callable[[Any], Any],
    weight_decay: Callable[[Any], Any],
) -> optax.GradientTransformation:
    """The paper's Algorithm 4, with decoupled decay: updates are -rate * d * (direction + decay * parameter).

    d is one number for the whole model. `rate_multipliers` and `weight_decay` give trees of numbers for parameters. A
    parameter whose rate is f times the others' is measured as f times a variable of its own: its distance is divided by f and
    its gradient multiplied, so that their product stays and the sum of gradients counts f-fold. The scale of the numerator and
    the denominator of d cancels, so both are kept in units of the initial d, squared.
    """

    def init(params: Any) -> ProdigyState:
        def zeros() -> Any:
            return jax.tree.map(jnp.zeros_like, params)

        start = jax.tree.map(jnp.copy, params)
        return ProdigyState(jnp.int32(0), zeros(), zeros(), zeros(), start, jnp.float32(0), jnp.float32(initial))

    def update(updates: Any, state: ProdigyState, params: Any = None) -> tuple[Any, ProdigyState]:
        d, gamma = state.distance, rate(state.step)
        multipliers = rate_multipliers(params)
        keep = math.sqrt(beta2)
        weight = (1 - keep) * gamma * jnp.square(d / initial)
        mu = jax.tree.map(lambda m, g: beta1 * m + (1 - beta1) * d * g, state.mu, updates)
        nu = jax.tree.map(lambda v, g: beta2 * v + (1 - beta2) * jnp.square(d * g), state.nu, updates)
        moved = optax.tree.vdot(updates, jax.tree.map(jnp.subtract, state.start, params))
        inner_product = keep * state.inner_product + weight * moved
        total = jax.tree.map(lambda s, g, f: keep * s + weight * f * g, state.gradient_sum, updates, multipliers)
        norm = optax.tree.norm(total, ord=1)
        estimate = jnp.where(norm > 0, inner_product / jnp.where(norm > 0, norm, 1.0), 0.0)

        def move(m: jax.Array, v: jax.Array, p: jax.Array, f: Any, decay: Any) -> jax.Array:
            return -gamma * d * f * (m / (jnp.sqrt(v) + d * epsilon) + decay * p)

        steps = jax.tree.map(move, mu, nu, params, multipliers, weight_decay(params))
        return steps, ProdigyState(state.step + 1, mu, nu, total, state.start, inner_product, jnp.maximum(d, estimate))

    return optax.GradientTransformation(init, update)
