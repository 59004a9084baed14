"""The two laws of loss over parameters N and tokens D, as functions of the logarithms, with their derivatives.

    chinchilla   L = E + A / N**alpha + B / D**beta                                  Hoffmann et al., 2022, equation 2
    kaplan       L = ((N_c / N)**(alpha_N / alpha_D) + D_c / D)**alpha_D             Kaplan et al., 2020, equation 1.5

Kaplan's L(N) = (N_c / N)**alpha_N and L(D) = (D_c / D)**alpha_D are the second one's limits for unlimited data and an unlimited
model; it has no loss that stays. N is what the observations' count says: Hoffmann's has embeddings, Kaplan's has not.

A law is fitted around the data's centre: x = log N - mean, y = log D - mean. There the size of a term and its exponent are
nearly independent, whereas log A and alpha, the values at N = 1, are correlated to 0.99 and more, which is what stops an
optimizer early.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable

import numpy as np

# (theta [..., p], x [n], y [n]) -> (log loss [..., n], its derivatives [..., n, p])
Function = Callable[[np.ndarray, np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Surface:
    """A law: `symbols` are the constants that `constants` (theta [..., p], centre of log N, of log D) gives, in its order."""

    name: str
    formula: str
    count: str  # of observations.COUNTS: how its paper counts N
    symbols: tuple[str, ...]
    function: Function
    low: tuple[float, ...]
    high: tuple[float, ...]
    starts: Callable[[float], np.ndarray]  # mean log loss -> theta [s, p], a grid
    constants: Callable[[np.ndarray, float, float], np.ndarray]


def _weights(terms: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(log of the sum of exponentials [...], each one's share [..., k]) of terms [..., k]."""
    top = terms.max(axis=-1, keepdims=True)
    shares = np.exp(terms - top)
    total = shares.sum(axis=-1, keepdims=True)
    return (top + np.log(total))[..., 0], shares / total


def _chinchilla(theta: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    a, alpha, b, beta, e = (theta[..., index, None] for index in range(5))
    terms = np.stack(np.broadcast_arrays(a - alpha * x, b - beta * y, e), axis=-1)
    log_loss, (of_n, of_d, of_e) = (found := _weights(terms))[0], np.moveaxis(found[1], -1, 0)
    return log_loss, np.stack([of_n, -x * of_n, of_d, -y * of_d, of_e], axis=-1)


def _chinchilla_starts(level: float) -> np.ndarray:
    """All combinations of the terms' shares of the loss at the centre, and of exponents."""
    shares, exponents = np.log([0.03, 0.1, 0.3, 0.6]) + level, (0.1, 0.3, 0.5, 0.8, 1.3)
    floors = np.log([0.05, 0.3, 0.6, 0.9]) + level
    return np.array(list(itertools.product(shares, exponents, shares, exponents, floors)))


def _chinchilla_constants(theta: np.ndarray, log_n: float, log_d: float) -> np.ndarray:
    a, alpha, b, beta, e = np.moveaxis(theta, -1, 0)
    with np.errstate(over="ignore"):
        return np.stack([np.exp(e), np.exp(a + alpha * log_n), alpha, np.exp(b + beta * log_d), beta], axis=-1)


def _kaplan(theta: np.ndarray, x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """theta: log L(N) and alpha_N, log L(D) and alpha_D, at the centre."""
    p, alpha_n, q, alpha_d = (theta[..., index, None] for index in range(4))
    of_size, of_data = (p - alpha_n * x) / alpha_d, q / alpha_d - y
    total, shares = _weights(np.stack(np.broadcast_arrays(of_size, of_data), axis=-1))
    size, data = np.moveaxis(shares, -1, 0)
    return alpha_d * total, np.stack([size, -x * size, data, total - size * of_size - data * q / alpha_d], axis=-1)


def _kaplan_starts(level: float) -> np.ndarray:
    shares, exponents = np.log([0.5, 0.7, 0.85, 0.95, 1.0]) + level, (0.03, 0.08, 0.15, 0.3, 0.6)
    return np.array(list(itertools.product(shares, exponents, shares, exponents)))


def _kaplan_constants(theta: np.ndarray, log_n: float, log_d: float) -> np.ndarray:
    p, alpha_n, q, alpha_d = np.moveaxis(theta, -1, 0)
    with np.errstate(over="ignore", divide="ignore"):
        return np.stack([np.exp(log_n + p / alpha_n), alpha_n, np.exp(log_d + q / alpha_d), alpha_d], axis=-1)


SURFACES = {
    "chinchilla": Surface(
        "chinchilla",
        "L = E + A / N^alpha + B / D^beta",
        "total",
        ("E", "A", "alpha", "B", "beta"),
        _chinchilla,
        (-30.0, 0.0, -30.0, 0.0, -30.0),
        (30.0, 5.0, 30.0, 5.0, 30.0),
        _chinchilla_starts,
        _chinchilla_constants,
    ),
    "kaplan": Surface(
        "kaplan",
        "L = ((N_c / N)^(alpha_N / alpha_D) + D_c / D)^alpha_D",
        "non_embedding",
        ("N_c", "alpha_N", "D_c", "alpha_D"),
        _kaplan,
        (-30.0, 0.0, -30.0, 1e-3),
        (30.0, 5.0, 30.0, 5.0),
        _kaplan_starts,
        _kaplan_constants,
    ),
}
