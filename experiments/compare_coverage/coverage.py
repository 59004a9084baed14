"""How often an interval for the mean of n paired differences covers the truth: see README.md.

python experiments/compare_coverage/coverage.py --pairs=1000
"""

import argparse

import numpy as np
from scipy import special

from gptjax.sweeps.statistics import MIN_BOOTSTRAP_PAIRS, RESAMPLES, student, studentised_bootstrap

# Differences of two runs with the same seed, of mean 0.
DIFFERENCES = {
    "normal": lambda rng, shape: rng.standard_normal(shape),
    "heavy tails (Student's t, 3 degrees)": lambda rng, shape: rng.standard_t(3, shape),
    "difference of two skewed (lognormal)": lambda rng, shape: rng.lognormal(0, 1, shape) - rng.lognormal(0, 1, shape),
    "skewed to one side (exponential)": lambda rng, shape: rng.exponential(1, shape) - 1,
}


def percentile(d, rng):
    means = resampled_means(d, rng)
    return np.quantile(means, [0.025, 0.975], axis=1)


def bca(d, rng):
    """Efron 1987: bias-corrected and accelerated."""
    means, mean, n = resampled_means(d, rng), d.mean(axis=1, keepdims=True), d.shape[1]
    below = ((means < mean).mean(axis=1) + (means <= mean).mean(axis=1)) / 2
    bias = special.ndtri(np.clip(below, 1e-6, 1 - 1e-6))
    influence = (d - mean) / (n - 1)  # of leaving one out, on the mean
    acceleration = (influence**3).sum(axis=1) / (6 * (influence**2).sum(axis=1) ** 1.5)
    ends = []
    for z in special.ndtri([0.025, 0.975]):
        shares = special.ndtr(bias + (bias + z) / (1 - acceleration * (bias + z)))
        ends.append([np.quantile(row, share) for row, share in zip(means, shares, strict=True)])
    return np.array(ends)


def resampled_means(d, rng):
    n = d.shape[1]
    counts = rng.multinomial(n, np.full(n, 1 / n), RESAMPLES)
    return d @ counts.T / n


METHODS = {
    "Student": lambda d, rng: student(d)[:2],
    "studentised bootstrap": lambda d, rng: studentised_bootstrap(d, seed=int(rng.integers(2**31))),
    "BCa bootstrap": bca,
    "percentile bootstrap": percentile,
}


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=1000, help="simulated pairs of groups a cell")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    sizes = (3, 4, 5, 6, 8, 10)
    for name, draw in DIFFERENCES.items():
        print(f"\n| {name} | " + " | ".join(f"n = {n}" for n in sizes) + " |\n|---|" + "---|" * len(sizes))
        for method, interval in METHODS.items():
            shares = []
            for n in sizes:
                rng = np.random.default_rng((arguments.seed, n))
                low, high = interval(draw(rng, (arguments.pairs, n)), rng)
                silent = method == "studentised bootstrap" and n < MIN_BOOTSTRAP_PAIRS
                shares.append("(" * silent + f"{((low <= 0) & (high >= 0)).mean():.3f}" + ")" * silent)
            print(f"| {method} | " + " | ".join(shares) + " |")


if __name__ == "__main__":
    main()
