"""Fits a law to observations by the Huber loss of the error in log loss, and refits it to resampled ones.

As in Hoffmann et al. (2022, section 3.3): the Huber loss with delta = 1e-3 of log L_predicted - log L, by L-BFGS, from a grid
of starts. Three things that Besiroglu et al. (2024, "Chinchilla scaling: a replication attempt") found wrong in the published
fit are avoided: the losses are added up, not averaged, and divided by delta^2, because L-BFGS takes a small objective's small
changes for the end, and stopped early there; constants are kept to full precision (alpha rounded to two digits biases the
predictions); and the intervals are checked by simulation (theirs would have needed 600,000 runs).

Resamples are refitted from the optimum, all at once, by damped Gauss-Newton steps on the same objective.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import threadpoolctl
from scipy import optimize

from gptjax.scaling.surfaces import Surface

DELTA = 1e-3
TRIED = 8  # pairs of exponents, the best ones by their objective, from whose best start in the grid L-BFGS sets out
# The products are small: threads that wait for each other make them 10 times slower on a busy machine.
_one_thread = threadpoolctl.threadpool_limits.wrap(limits=1)
_CELLS = 2_000_000  # of resamples times observations times constants held at once


@dataclasses.dataclass(frozen=True)
class Fit:
    """`theta` [p] around `centre` (mean log N, mean log D); `residuals` [n] are log L less the law's.

    `agreeing` of `tried` starts ended at this objective; `at_bound` names constants that lie at the edge of what is searched.
    """

    surface: Surface
    theta: np.ndarray
    centre: tuple[float, float]
    objective: float
    residuals: np.ndarray
    agreeing: int
    tried: int
    at_bound: tuple[str, ...]

    def log_loss(self, parameters: np.ndarray, tokens: np.ndarray, theta: np.ndarray | None = None) -> np.ndarray:
        """log L [..., m] of N [m] and D [m]; of other constants theta [..., p] where they are given."""
        x, y = np.log(parameters) - self.centre[0], np.log(tokens) - self.centre[1]
        return self.surface.function(self.theta if theta is None else theta, x, y)[0]

    def constants(self, theta: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """{symbol: value [...]}."""
        values = self.surface.constants(self.theta if theta is None else theta, *self.centre)
        return dict(zip(self.surface.symbols, np.moveaxis(values, -1, 0), strict=True))


def huber(residuals: np.ndarray, delta: float) -> np.ndarray:
    """Sum over the last axis of the Huber loss, in units of delta^2: r^2 / 2 up to 1, |r| - 1/2 beyond (P. Huber, 1964)."""
    size = np.abs(residuals) / delta
    return np.where(size <= 1, 0.5 * size**2, size - 0.5).sum(axis=-1)


@_one_thread
def fit(surface: Surface, parameters: np.ndarray, tokens: np.ndarray, loss: np.ndarray, delta: float = DELTA) -> Fit:
    """The law through N, D, L, each [n]. Raises `ValueError` with fewer observations than constants and one."""
    if len(loss) <= len(surface.low):
        raise ValueError(f"{len(surface.low)} constants need at least {len(surface.low) + 1} runs, and there are {len(loss)}.")
    log_n, log_d, target = np.log(parameters), np.log(tokens), np.log(loss)
    centre = (float(log_n.mean()), float(log_d.mean()))
    x, y = log_n - centre[0], log_d - centre[1]
    grid = surface.starts(float(target.mean()))
    order = np.argsort(_objectives(surface, grid, x, y, np.broadcast_to(target, (len(grid), len(target))), delta))
    starts: dict[tuple[float, float], np.ndarray] = {}
    for start in grid[order]:
        starts.setdefault((start[1], start[3]), start)
    ends = [_descend(surface, start, x, y, target, delta) for start in list(starts.values())[:TRIED]]
    polished, objectives = refit(surface, np.array(ends), x, y, np.broadcast_to(target, (len(ends), len(target))), delta)
    best = int(np.argmin(objectives))
    theta, least = polished[best], float(objectives[best])
    spans = np.array(surface.high) - np.array(surface.low)
    edge = (theta - np.array(surface.low) < 1e-6 * spans) | (np.array(surface.high) - theta < 1e-6 * spans)
    return Fit(
        surface,
        theta,
        centre,
        least,
        target - surface.function(theta, x, y)[0],
        int(np.sum(objectives <= least * (1 + 1e-4) + 1e-9)),
        len(ends),
        tuple(name for name, is_edge in zip(THETA[surface.name], edge, strict=True) if is_edge),
    )


THETA = {"chinchilla": ("A", "alpha", "B", "beta", "E"), "kaplan": ("N_c", "alpha_N", "D_c", "alpha_D")}  # in theta's order


def _descend(surface: Surface, start: np.ndarray, x: np.ndarray, y: np.ndarray, target: np.ndarray, delta: float) -> np.ndarray:
    def value(theta: np.ndarray) -> tuple[float, np.ndarray]:
        predicted, slopes = surface.function(theta, x, y)
        error = (predicted - target) / delta
        return float(huber(error, 1.0)), np.einsum("n,np->p", np.clip(error, -1, 1), slopes) / delta

    bounds = list(zip(surface.low, surface.high, strict=True))
    options = {"maxiter": 2000, "maxfun": 4000, "maxcor": 20, "ftol": 1e-11, "gtol": 1e-8}
    return optimize.minimize(value, start, jac=True, method="L-BFGS-B", bounds=bounds, options=options).x


def _objectives(
    surface: Surface, theta: np.ndarray, x: np.ndarray, y: np.ndarray, target: np.ndarray, delta: float
) -> np.ndarray:
    return huber(target - surface.function(theta, x, y)[0], delta)


@_one_thread
def refit(
    surface: Surface,
    start: np.ndarray,
    x: np.ndarray,
    y: np.ndarray,
    targets: np.ndarray,
    delta: float = DELTA,
    rounds: int = 400,
) -> tuple[np.ndarray, np.ndarray]:
    """(theta [b, p], objective [b]) of targets [b, n] (log losses), each from its start [b, p].

    Iteratively reweighted least squares: the weights min(1, delta / |r|) make a quadratic that lies above the Huber loss and
    touches it, so that a step which lowers it lowers the loss; Levenberg's damping grows where a step does not.
    """
    block = max(1, _CELLS // (targets.shape[1] * len(surface.low)))
    parts = [
        _refit(surface, start[low : low + block], x, y, targets[low : low + block], delta, rounds)
        for low in range(0, len(targets), block)
    ]
    return np.concatenate([theta for theta, _ in parts]), np.concatenate([objective for _, objective in parts])


def _refit(
    surface: Surface, start: np.ndarray, x: np.ndarray, y: np.ndarray, targets: np.ndarray, delta: float, rounds: int
) -> tuple[np.ndarray, np.ndarray]:
    low, high = np.array(surface.low), np.array(surface.high)
    theta, objective = start.copy(), _objectives(surface, start, x, y, targets, delta)
    damping, still = np.full(len(start), 1e-4), np.zeros(len(start), int)
    live = np.arange(len(start))
    for _ in range(rounds):
        predicted, slopes = surface.function(theta[live], x, y)
        residuals = targets[live] - predicted
        weighted = slopes * (delta / np.maximum(np.abs(residuals), delta))[..., None]
        curvature = np.swapaxes(weighted, -1, -2) @ slopes
        gradient = np.einsum("bnp,bn->bp", weighted, residuals)
        diagonal = np.einsum("bpp->bp", curvature)
        diagonal += damping[live, None] * diagonal + 1e-12 * (1 + diagonal.max(axis=-1, keepdims=True))  # a view: in place
        moved = np.clip(theta[live] + np.linalg.solve(curvature, gradient[..., None])[..., 0], low, high)
        reached = _objectives(surface, moved, x, y, targets[live], delta)
        gain = objective[live] - reached
        better = gain > 0
        theta[live[better]], objective[live[better]] = moved[better], reached[better]
        damping[live] = np.clip(np.where(better, damping[live] / 5, damping[live] * 5), 1e-12, 1e12)
        small = gain <= 1e-9 * (1 + np.abs(reached))
        still[live] = np.where(small, still[live] + 1, 0)
        live = live[still[live] < 8]
        if not len(live):
            break
    return theta, objective
