"""Families with planted constants."""

from __future__ import annotations

import numpy as np

from gptjax.scaling.observations import Observations

# Besiroglu et al. (2024), table 1: Hoffmann et al.'s runs, fitted again.
PUBLISHED = {"E": 1.8172, "A": 482.01, "alpha": 0.3478, "B": 2085.43, "beta": 0.3658}
BEST = PUBLISHED["beta"] / (PUBLISHED["alpha"] + PUBLISHED["beta"])  # of N_opt ~ C^a


def loss(parameters: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    p = PUBLISHED
    return p["E"] + p["A"] / parameters ** p["alpha"] + p["B"] / tokens ** p["beta"]


def best_size(flops: np.ndarray) -> np.ndarray:
    """Where the loss is lowest with 6 N D = flops (Hoffmann et al., equation 4)."""
    p = PUBLISHED
    factor = (p["alpha"] * p["A"] / (p["beta"] * p["B"])) ** (1 / (p["alpha"] + p["beta"]))
    return factor * (flops / 6) ** BEST


def family(models: int = 8, budgets: int = 3, span: float = 6.0, noise: float = 0.0, seed: int = 0) -> Observations:
    """The same sizes at each budget of C = 6 N D, a factor `span` to both sides of the best one at the middle budget."""
    flops = np.geomspace(6e18, 1.5e20, budgets)
    sizes = best_size(np.sqrt(flops[0] * flops[-1])) * np.geomspace(1 / span, span, models)
    parameters, spent = np.tile(sizes, budgets), np.repeat(flops, models)
    tokens = spent / 6 / parameters
    losses = loss(parameters, tokens) * np.exp(np.random.default_rng(seed).normal(0, noise, len(tokens)))
    names = tuple(f"run {index}" for index in range(len(tokens)))
    return Observations(names, parameters, np.full(len(tokens), np.nan), tokens, spent, losses)
