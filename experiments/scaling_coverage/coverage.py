"""How often the intervals of `gptjax scaling` cover the truth, on simulated families whose constants are known: see README.md.

python experiments/scaling_coverage/coverage.py --simulations=200 --resamples=400
"""

from __future__ import annotations

import argparse

import numpy as np

from gptjax.scaling import fitting, intervals
from gptjax.scaling.fitting import Fit
from gptjax.scaling.laws import APPROACHES, Law, Options
from gptjax.scaling.observations import Observations
from gptjax.scaling.surfaces import SURFACES

# Hoffmann et al.'s data as Besiroglu et al. (2024) fit them.
E, A, ALPHA, B, BETA = 1.8172, 482.01, 0.3478, 2085.43, 0.3658
BEST = BETA / (ALPHA + BETA)
NEW = (3e9, 1e11)  # parameters and tokens of a run to predict, beyond all of the family


def loss(parameters: np.ndarray, tokens: np.ndarray) -> np.ndarray:
    return E + A / parameters**ALPHA + B / tokens**BETA


def family(models: int, budgets: int, span: float) -> tuple[np.ndarray, np.ndarray]:
    """(parameters, tokens) of the same sizes at each budget, a factor `span` to both sides of the best one at the middle."""
    flops = np.geomspace(6e18, 1.5e20, budgets)
    factor = (ALPHA * A / (BETA * B)) ** (1 / (ALPHA + BETA))
    sizes = factor * (np.sqrt(flops[0] * flops[-1]) / 6) ** BEST * np.geomspace(1 / span, span, models)
    return np.tile(sizes, budgets), np.repeat(flops, models) / 6 / np.tile(sizes, budgets)


def simulate(models: int, budgets: int, span: float, noise: float, simulations: int, resamples: int, heavy: bool) -> None:
    parameters, tokens = family(models, budgets, span)
    rng = np.random.default_rng(0)
    shape = (simulations, len(tokens) + 1)
    draws = rng.standard_t(3, shape) / 3**0.5 if heavy else rng.normal(size=shape)
    targets = np.log(loss(parameters, tokens)) + noise * draws[:, 1:]
    surface = SURFACES["chinchilla"]
    centre = (float(np.log(parameters).mean()), float(np.log(tokens).mean()))
    x, y = np.log(parameters) - centre[0], np.log(tokens) - centre[1]
    truth = np.array([np.log(A) - ALPHA * centre[0], ALPHA, np.log(B) - BETA * centre[1], BETA, np.log(E)])
    # From the truth, not from a grid: that the grid finds the same optimum is for the tests.
    theta, objective = fitting.refit(surface, np.tile(truth, (simulations, 1)), x, y, targets)
    expected = {"E": E, "A": A, "alpha": ALPHA, "B": B, "beta": BETA}
    hits: dict[str, list[bool]] = {}
    errors: dict[str, list[float]] = {}
    missing: dict[str, int] = {}
    for number in range(simulations):
        options = Options(resamples=resamples, seed=number)
        residuals = targets[number] - surface.function(theta[number], x, y)[0]
        fit = Fit(surface, theta[number], centre, float(objective[number]), residuals, 1, 1, ())
        resampled = intervals.resample(fit, parameters, tokens, resamples, number)
        law = Law(fit, resampled, "total", intervals.estimates(fit, resampled, options.confidence))
        for name, value in expected.items():
            hits.setdefault(name, []).append(law.estimates[name].low <= value <= law.estimates[name].high)
        (new,) = law.predict(np.array([NEW[0]]), np.array([NEW[1]]), options)
        coming = float(loss(np.array(NEW[0]), np.array(NEW[1])) * np.exp(noise * draws[number, 0]))
        hits.setdefault("a new run", []).append(new.low <= coming <= new.high)
        names = tuple(map(str, range(len(tokens))))
        unknown, flops = np.full(len(tokens), np.nan), 6 * parameters * tokens
        runs = Observations(names, parameters, unknown, tokens, flops, np.exp(targets[number]))
        for key, make in APPROACHES.items():
            approach = make(runs, law, options)
            if approach.missing:
                missing[key] = missing.get(key, 0) + 1
                continue
            found = approach.estimates["a"]
            hits.setdefault(f"a, {key}", []).append(found.low <= BEST <= found.high)
            errors.setdefault(key, []).append(found.value - BEST)
    kind = "heavy tails" if heavy else "normal"
    size = f"{models} models, {budgets} budgets, sizes {span:g}x both ways"
    print(f"{size}, noise {noise:.1%} ({kind}), {simulations} simulations")
    print("  covered:", ", ".join(f"{name} {np.mean(values):.3f}" for name, values in hits.items()))
    print(
        "  a is off by:", ", ".join(f"{name} {np.mean(values):+.4f} +- {np.std(values):.4f}" for name, values in errors.items())
    )
    print("  without an answer:", missing or "none", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("--simulations", type=int, default=200)
    parser.add_argument("--resamples", type=int, default=400)
    parser.add_argument("--only", type=int, default=-1, help="number of a family below, counted from 0")
    arguments = parser.parse_args()
    families = [(8, 3, 6.0, 0.004, False), (8, 3, 6.0, 0.004, True), (9, 5, 4.0, 0.002, False)]
    for number, (models, budgets, span, noise, heavy) in enumerate(families):
        if arguments.only in (-1, number):
            simulate(models, budgets, span, noise, arguments.simulations, arguments.resamples, heavy)
