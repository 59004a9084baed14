"""Chinchilla's first two approaches: the best size for a budget, without a law of the loss (Hoffmann et al., 2022, sections
3.1, 3.2).

Both end in power laws of the best model's parameters and tokens, N_opt ~ C^a and D_opt ~ C^b. Each is a function of many
resamples at once, log losses [b, n], and answers NaN for a resample that has no answer.

Envelope (approach 1). Each model's loss over its runs' FLOPs is a curve (a cubic spline through log loss over log C). The lower
envelope of all curves changes from one model to another at corners; a corner is where two sizes cost the same, so its best size
is taken to lie between the two, at their geometric mean, and the corners' N over C are regressed. (Hoffmann et al. regress the
best model at 1,500 budgets, a staircase, whose slope falls short by one part in k^2 over k steps.) Only where
both models have runs on both sides of a corner is it one: a curve that ends leaves the next best, not the best.

IsoFLOP profiles (approach 2). Runs of one budget (within 15 %) are fitted by a parabola of log loss over log N; its lowest
point is the best size. A budget whose lowest point lies outside its sizes, or whose parabola opens downwards, is left out. The
parabola is an approximation: where sizes of a budget lie far to one side of the best one its vertex is off.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import numpy as np
from scipy import interpolate

from gptjax.scaling.observations import Observations

MIN_MODELS = 4  # of an envelope, and of a budget's parabola, which has three constants
MIN_POINTS = 3  # corners or budgets of a power law
SAME_BUDGET = 1.15
BUDGETS = 1500  # at which the envelope is looked at


@dataclasses.dataclass(frozen=True)
class Best:
    """Of each resample b the best size and tokens at some budgets, as logarithms [b, k]; NaN where there is none."""

    flops: np.ndarray
    parameters: np.ndarray
    tokens: np.ndarray
    log_loss: np.ndarray


class NotEnough(Exception):
    """Says in a sentence why these runs do not do for an approach."""


def power_laws(best: Best) -> dict[str, np.ndarray]:
    """{"a", "b", and the logarithms of the factors} [b] of N_opt ~ C^a, D_opt ~ C^b, L ~ C^-alpha_C, by least squares."""
    a, of_n = _line(best.flops, best.parameters)
    b, of_d = _line(best.flops, best.tokens)
    c, of_loss = _line(best.flops, best.log_loss)
    return {"a": a, "log_N": of_n, "b": b, "log_D": of_d, "alpha_C": -c, "log_L": of_loss}


def _line(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(slope, intercept) [b] of each row over the points that are finite; NaN with fewer than MIN_POINTS."""
    use = np.isfinite(x) & np.isfinite(y)
    count = use.sum(axis=1)
    x, y = np.where(use, x, 0.0), np.where(use, y, 0.0)
    with np.errstate(divide="ignore", invalid="ignore"):
        mean_x, mean_y = x.sum(axis=1) / count, y.sum(axis=1) / count
        off = np.where(use, x - mean_x[:, None], 0.0)
        slope = np.where(count >= MIN_POINTS, (off * y).sum(axis=1) / (off**2).sum(axis=1), np.nan)
    return slope, mean_y - slope * mean_x


# --- approach 1: the envelope ---


def envelope(observations: Observations, count: str) -> Callable[[np.ndarray], Best]:
    """log losses [b, n] to the envelope's corners. Raises `NotEnough`."""
    sizes = observations.sizes(count)
    members = models(sizes)
    curves = [(index, *_curve(np.log(observations.flops[index]))) for index in members]
    curves = [(index, at, merge) for index, at, merge in curves if len(at) > 1]
    if len(curves) < MIN_MODELS:
        raise NotEnough(
            f"{len(curves)} models have runs of two lengths or more, and an envelope needs {MIN_MODELS}: give each model several."
        )
    grid = np.linspace(min(at[0] for _, at, _ in curves), max(at[-1] for _, at, _ in curves), BUDGETS)
    log_sizes = np.array([np.log(sizes[index[0]]) for index, _, _ in curves])
    # FLOPs a token are a constant of the model
    log_costs = np.array([np.log(observations.flops[index] / observations.tokens[index]).mean() for index, _, _ in curves])

    def find(log_losses: np.ndarray) -> Best:
        heights = np.full((len(curves), len(log_losses), BUDGETS), np.inf)
        for number, (index, at, merge) in enumerate(curves):
            inside = (grid >= at[0]) & (grid <= at[-1])
            heights[number][:, inside] = interpolate.CubicSpline(at, log_losses[:, index] @ merge, axis=1)(grid[inside])
        return _corners(heights, grid, log_sizes, log_costs)

    return find


def models(sizes: np.ndarray) -> list[np.ndarray]:
    """The runs of each model as indices, in ascending order of size; sizes [n] that are alike to 0.1 % are one model's."""
    labels = np.round(np.log(sizes), 3)
    return [np.flatnonzero(labels == label) for label in np.unique(labels)]


def _curve(log_flops: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(the distinct budgets of one model [m], the matrix [n, m] that takes means over runs of one budget, such as seeds)."""
    distinct, which = np.unique(np.round(log_flops, 6), return_inverse=True)
    merge = np.zeros((len(log_flops), len(distinct)))
    merge[np.arange(len(log_flops)), which] = 1
    return distinct, merge / merge.sum(axis=0)


def _corners(heights: np.ndarray, grid: np.ndarray, log_sizes: np.ndarray, log_costs: np.ndarray) -> Best:
    """heights [k, b, g], infinite where a model has no run, k in ascending order of size."""
    there = np.isfinite(heights[:, 0, :])
    winner = heights.argmin(axis=0)
    before, after = winner[:, :-1], winner[:, 1:]
    both = there[:, :-1] & there[:, 1:]
    points = np.arange(len(grid) - 1)
    is_corner = (before != after) & both[before, points] & both[after, points]
    where = np.where(is_corner, 0.0, np.nan)
    middle = (grid[:-1] + grid[1:]) / 2
    cost = (log_costs[before] + log_costs[after]) / 2
    least = heights.min(axis=0)
    found = Best(
        where + middle,
        where + (log_sizes[before] + log_sizes[after]) / 2,
        where + middle - cost,
        where + (least[:, :-1] + least[:, 1:]) / 2,
    )
    return _packed(found, is_corner)


def _packed(best: Best, kept: np.ndarray) -> Best:
    """The columns [b, g] that are kept in any row, so that what follows is small."""
    used = kept.any(axis=0)
    return Best(*(array[:, used] for array in (best.flops, best.parameters, best.tokens, best.log_loss)))


# --- approach 2: IsoFLOP profiles ---


def budgets(observations: Observations, count: str) -> list[np.ndarray]:
    """Runs of one budget, as indices; only budgets with MIN_MODELS sizes."""
    order = np.argsort(observations.flops, kind="stable")
    groups: list[list[int]] = []
    for index in order:
        if groups and observations.flops[index] <= SAME_BUDGET * observations.flops[groups[-1][0]]:
            groups[-1].append(int(index))
        else:
            groups.append([int(index)])
    sizes = observations.sizes(count)
    return [np.array(group) for group in groups if len(np.unique(sizes[group])) >= MIN_MODELS]


@dataclasses.dataclass(frozen=True)
class Profile:
    """One budget's runs and its parabola, log loss = c0 + c1 * u + c2 * u^2 with u = log N - centre, as a linear map of
    losses."""

    index: np.ndarray
    flops: float
    design: np.ndarray  # [m, 3]
    solve: np.ndarray  # [3, m]
    centre: float


def profiles(observations: Observations, count: str) -> list[Profile]:
    """Of each budget; raises `NotEnough`."""
    found = []
    for index in budgets(observations, count):
        log_n = np.log(observations.sizes(count)[index])
        design = np.vander(log_n - log_n.mean(), 3, increasing=True)
        flops = float(np.exp(np.log(observations.flops[index]).mean()))
        found.append(Profile(index, flops, design, np.linalg.pinv(design), float(log_n.mean())))
    if len(found) < MIN_POINTS:
        raise NotEnough(
            f"{len(found)} budgets have {MIN_MODELS} models (FLOPs within {SAME_BUDGET - 1:.0%}), and {MIN_POINTS} are needed."
        )
    return found


def isoflop(observations: Observations, count: str) -> Callable[[np.ndarray], Best]:
    """log losses [b, n] to the vertices of the budgets' parabolas. Raises `NotEnough`."""
    of_budgets = profiles(observations, count)

    def find(log_losses: np.ndarray) -> Best:
        columns = [_vertex(profile, observations, log_losses) for profile in of_budgets]
        flops, sizes, tokens, least = (np.stack(part, axis=1) for part in zip(*columns, strict=True))
        return Best(flops, sizes, tokens, least)

    return find


def _vertex(profile: Profile, observations: Observations, log_losses: np.ndarray) -> tuple[np.ndarray, ...]:
    c0, c1, c2 = profile.solve @ log_losses[:, profile.index].T
    offsets = profile.design[:, 1]
    with np.errstate(divide="ignore", invalid="ignore"):
        at = -c1 / (2 * c2)
        valid = (c2 > 0) & (at >= offsets.min()) & (at <= offsets.max())
    at = np.where(valid, at, np.nan)
    order = np.argsort(offsets)
    # FLOPs a token follow the size, between the models that are there
    costs = np.log(observations.flops[profile.index] / observations.tokens[profile.index])
    cost = np.interp(at, offsets[order], costs[order])
    flops = np.where(valid, np.log(profile.flops), np.nan)
    return flops, at + profile.centre, flops - cost, c0 + c1 * at + c2 * at**2


def profile_residuals(observations: Observations, count: str) -> tuple[np.ndarray, np.ndarray, int]:
    """(fitted log losses [n], residuals [m] of the m runs that stand in a budget, constants fitted)."""
    fitted = np.log(observations.loss).copy()
    residuals = []
    of_budgets = profiles(observations, count)
    for profile in of_budgets:
        losses = np.log(observations.loss[profile.index])
        fitted[profile.index] = profile.design @ (profile.solve @ losses)
        residuals.append(losses - fitted[profile.index])
    return fitted, np.concatenate(residuals), 3 * len(of_budgets)
