"""Figures of a fit as PNG (extra: plot)."""

from __future__ import annotations

import os
import pathlib
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from gptjax.config import UserError
from gptjax.pages.plots import LIGHT as COLOURS
from gptjax.scaling import approaches
from gptjax.scaling.laws import Fits, compute_optimal
from gptjax.scaling.observations import Observations

FILES = ("loss.png", "isoflop.png", "best.png", "errors.png")


def draw(folder: pathlib.Path, fits: Fits, held_out: dict[str, Any] | None = None, measured: float | None = None) -> list[str]:
    """Names of the figures that were drawn. `held_out`: a prediction of prediction.py, `measured` its run's loss.

    Raises `UserError` where matplotlib is absent.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("figures need the package matplotlib, which is not installed: pip install 'gptjax[plot]'.") from None
    drawn = []
    for name, paint in zip(FILES, (_loss, _isoflop, _best, _errors), strict=True):
        figure = Figure(figsize=(7, 4.6), dpi=150, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        axes = figure.add_subplot()
        if not paint(axes, fits, held_out, measured):
            continue
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.set_axisbelow(True)
        for side in ("top", "right"):
            axes.spines[side].set_visible(False)
        temporary = folder / f".{name}.{os.getpid()}.tmp"
        canvas.print_figure(temporary, format="png")
        temporary.replace(folder / name)
        drawn.append(name)
    return drawn


def _shades(values: np.ndarray) -> Callable[[float], tuple[float, float, float]]:
    """Light for small, dark for large, by the logarithm."""
    low, high = np.log(values.min()), np.log(values.max())

    def shade(value: float) -> tuple[float, float, float]:
        share = float((np.log(value) - low) / max(high - low, 1e-9))
        return (0.75 - 0.75 * share, 0.85 - 0.6 * share, 0.95 - 0.45 * share)

    return shade


def _loss(axes: Any, fits: Fits, held_out: dict[str, Any] | None, measured: float | None) -> bool:
    """Loss over FLOPs, a line of the law for each model, and its lowest line; the held-out run's interval."""
    seen, law = fits.observations, fits.main
    shade = _shades(seen.parameters)
    for own in approaches.models(seen.parameters):
        size = float(seen.parameters[own[0]])
        cost = np.exp(np.log(seen.flops[own] / seen.tokens[own]).mean())
        tokens = np.geomspace(seen.tokens[own].min() / 1.5, seen.tokens[own].max() * 1.5, 60)
        axes.plot(tokens * cost, np.exp(law.fit.log_loss(np.full(60, size), tokens)), color=shade(size), linewidth=0.9)
        axes.plot(seen.flops[own], seen.loss[own], "o", color=shade(size), markersize=3.5)
    if held_out:
        _mark(axes, held_out["held_out"]["flops"], held_out["losses"][held_out["law"]], measured)
    axes.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel="evaluation loss (nats per token)")
    axes.set_title("runs, and Chinchilla's law; darker: more parameters", fontsize=9)
    _plain_ticks(axes.yaxis)
    if held_out:
        axes.legend(frameon=False, fontsize=8)
    return True


def _mark(axes: Any, x: float, found: dict[str, float], measured: float | None) -> None:
    bars = [[found["loss"] - found["low"]], [found["high"] - found["loss"]]]
    axes.errorbar([x], [found["loss"]], yerr=bars, fmt="s", color=COLOURS[1], capsize=3, markersize=4, label="predicted")
    if measured is not None:
        axes.plot([x], [measured], "*", color=COLOURS[2], markersize=9, label="measured")


def _plain_ticks(axis: Any) -> None:
    from matplotlib.ticker import MaxNLocator, NullFormatter, StrMethodFormatter

    axis.set_major_locator(MaxNLocator(7))
    axis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axis.set_minor_formatter(NullFormatter())


def _isoflop(axes: Any, fits: Fits, held_out: dict[str, Any] | None, measured: float | None) -> bool:
    """Each budget's runs, its parabola, and the lowest point where it is taken."""
    seen = fits.observations
    try:
        found = approaches.profiles(seen, "total")
    except approaches.NotEnough:
        return False
    best = approaches.isoflop(seen, "total")(np.log(seen.loss)[None])
    shade = _shades(np.array([profile.flops for profile in found]))
    for column, profile in enumerate(found):
        colour = shade(profile.flops)
        losses = np.log(seen.loss[profile.index])
        offsets = np.linspace(profile.design[:, 1].min(), profile.design[:, 1].max(), 80)
        parabola = np.vander(offsets, 3, increasing=True) @ (profile.solve @ losses)
        axes.plot(np.exp(offsets + profile.centre), np.exp(parabola), color=colour, linewidth=1)
        axes.plot(seen.parameters[profile.index], seen.loss[profile.index], "o", color=colour, markersize=3.5)
        axes.annotate(f"{profile.flops:.2g}", (np.exp(offsets[-1] + profile.centre), np.exp(parabola[-1])), fontsize=7)
        if np.isfinite(best.parameters[0, column]):
            axes.plot(np.exp(best.parameters[0, column]), np.exp(best.log_loss[0, column]), "x", color=COLOURS[1], markersize=7)
    axes.set(xscale="log", xlabel="parameters, embeddings counted", ylabel="evaluation loss (nats per token)")
    axes.set_title("IsoFLOP profiles (numbers: FLOPs); crosses: the best size", fontsize=9)
    return True


def _best(axes: Any, fits: Fits, held_out: dict[str, Any] | None, measured: float | None) -> bool:
    """The best size over FLOPs by each approach, and all runs."""
    seen = fits.observations
    axes.plot(seen.flops, seen.parameters, ".", color="#bbbbbb", markersize=4, label="runs")
    budgets = np.geomspace(seen.flops.min(), seen.flops.max() * 3, 50)
    sizes = [compute_optimal(fits.main, float(flops))[0] for flops in budgets]
    axes.plot(budgets, sizes, color=COLOURS[0], linewidth=1.3, label="parametric (C = 6 N D)")
    for approach, colour in zip(("envelope", "IsoFLOP profiles"), COLOURS[1:], strict=False):
        found = next(item for item in fits.approaches if item.name == approach and item.count == "total")
        if found.best is None or found.missing:
            continue
        axes.plot(np.exp(found.best.flops[0]), np.exp(found.best.parameters[0]), "x", color=colour, markersize=5)
        line = np.exp(found.estimates["log_N"].value + found.estimates["a"].value * np.log(budgets))
        axes.plot(budgets, line, color=colour, linewidth=1.3, label=f"{approach}: C^{found.estimates['a'].value:.2f}")
    axes.set(xscale="log", yscale="log", xlabel="training FLOPs", ylabel="parameters, embeddings counted")
    axes.legend(frameon=False, fontsize=8)
    return True


def _errors(axes: Any, fits: Fits, held_out: dict[str, Any] | None, measured: float | None) -> bool:
    """How far each run is from each law, over its FLOPs: what a law misses shows as a pattern."""
    seen: Observations = fits.observations
    names: Sequence[tuple[str, str]] = [
        ("chinchilla", "total"),
        ("kaplan", "non_embedding" if seen.knows_non_embedding else "total"),
    ]
    for (name, count), colour in zip(names, COLOURS, strict=False):
        errors = 100 * np.expm1(fits.laws[name, count].fit.residuals)
        axes.plot(seen.flops, errors, "o", color=colour, markersize=3.5, label=f"{name}, {count.replace('_', '-')} parameters")
    if held_out and measured is not None:
        error = 100 * (measured / held_out["losses"][held_out["law"]]["loss"] - 1)
        axes.plot([held_out["held_out"]["flops"]], [error], "*", color=COLOURS[2], markersize=9, label="held out")
    axes.axhline(0, color="#888888", linewidth=0.8)
    axes.set(xscale="log", xlabel="training FLOPs", ylabel="loss above the law (%)")
    axes.legend(frameon=False, fontsize=8)
    return True
