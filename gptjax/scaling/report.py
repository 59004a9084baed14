"""What was fitted, in words and tables: the same text on the terminal and in report.md; and as JSON."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from gptjax.scaling.intervals import Estimate
from gptjax.scaling.laws import Approach, Fits, compute_optimal
from gptjax.scaling.surfaces import SURFACES

COUNTED = {"total": "with embeddings", "non_embedding": "without embeddings"}
# N_opt ~ C^a as published: Kaplan et al., 2020 (section 6.1); Hoffmann et al., 2022 (table 2); Besiroglu et al., 2024.
PUBLISHED = "Published a: 0.73 (Kaplan); 0.50, 0.49, 0.46 (Chinchilla's approaches 1, 2, 3), 0.51 when corrected (Besiroglu)."


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    """A Markdown table whose columns stand straight in a terminal too."""
    cells = [list(head), *map(list, rows)]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    lines = ["| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)) + " |" for row in cells]
    return [lines[0], "|" + "|".join("-" * (width + 2) for width in widths) + "|", *lines[1:]]


def between(estimate: Estimate | None) -> list[str]:
    if estimate is None:
        return ["-", "-"]
    return [f"{estimate.value:.4g}", f"{estimate.low:.4g} to {estimate.high:.4g}"]


def lines(fits: Fits, left_out: Sequence[str] = ()) -> list[str]:
    """Laws, approaches, and what a budget should be spent on."""
    seen, share = fits.observations, fits.options.confidence
    text = [
        f"{len(seen)} runs: {_range(seen.parameters)} parameters, {_range(seen.tokens)} tokens, {_range(seen.flops)} FLOPs, "
        f"loss {seen.loss.min():.4f} to {seen.loss.max():.4f}. Intervals: {share:.0%}, {fits.options.resamples} resamples.",
        *(f"left out: {reason}" for reason in left_out),
    ]
    for (name, count), law in fits.laws.items():
        text += ["", f"{name}, parameters {COUNTED[count]}: {SURFACES[name].formula}"]
        text += table(("", "value", f"{share:.0%} interval"), [(key, *between(law.estimates[key])) for key in law.estimates])
        text += [_quality(law.fit)]
    text += ["", "Best model for a budget, N_opt ~ C^a and D_opt ~ C^b:", *_approaches(fits.approaches, share), PUBLISHED]
    frontier = _frontier(fits.approaches)
    text += [frontier] if frontier else []
    return text


def _range(values: np.ndarray) -> str:
    return f"{values.min():.3g} to {values.max():.3g}"


def _quality(fit: Any) -> str:
    spread = float(np.sqrt(np.mean(fit.residuals**2)))
    worst = float(np.abs(fit.residuals).max())
    bound = f"; at the edge of what is searched: {', '.join(fit.at_bound)}" if fit.at_bound else ""
    starts = f"{fit.agreeing} of {fit.tried} starts ended at this optimum"
    return f"Errors of the loss: {spread:.2%} (root mean square), {worst:.2%} at most; {starts}{bound}."


def _approaches(found: Sequence[Approach], share: float) -> list[str]:
    rows = []
    notes = []
    for approach in found:
        a, b = (approach.estimates.get(key) for key in "ab")
        rows.append((approach.name, COUNTED[approach.count], *between(a), *between(b)))
        if approach.missing:
            notes.append(f"{approach.name}, {COUNTED[approach.count]}: none, {approach.missing}")
        elif approach.failed > 0:
            notes.append(f"{approach.name}, {COUNTED[approach.count]}: {approach.failed:.1%} of the resamples had no answer.")
    return [*table(("approach", "parameters", "a", f"{share:.0%} interval", "b", f"{share:.0%} interval"), rows), *notes]


def _frontier(found: Sequence[Approach]) -> str:
    for approach in found:
        alpha = approach.estimates.get("alpha_C")
        if alpha is not None:
            return f"Kaplan's L ~ C^-alpha_C along the best models ({approach.name}): alpha_C = {alpha}; published 0.050."
    return ""


def optimal_lines(fits: Fits, budgets: Sequence[float]) -> list[str]:
    """A budget's best parameters and tokens, by Chinchilla's law and C = 6 N D, and the loss to expect."""
    rows = []
    for flops in budgets:
        size, tokens = compute_optimal(fits.main, flops)
        (loss,) = fits.main.predict(np.array([size]), np.array([tokens]), fits.options)
        rows.append((f"{flops:.3g}", f"{size:.4g}", f"{tokens:.4g}", f"{tokens / size:.3g}", *between(loss)))
    return table(("FLOPs", "parameters", "tokens", "tokens/parameter", "loss", f"{fits.options.confidence:.0%} interval"), rows)


def run_lines(fits: Fits, sizes: Sequence[float], tokens: Sequence[float]) -> list[str]:
    """Predictions of runs that are named by parameters (embeddings counted) and tokens."""
    found = fits.main.predict(np.array(sizes, float), np.array(tokens, float), fits.options)
    rows = [(f"{n:.4g}", f"{d:.4g}", *between(loss)) for n, d, loss in zip(sizes, tokens, found, strict=True)]
    return table(("parameters", "tokens", "loss", f"{fits.options.confidence:.0%} interval"), rows)


def prediction_lines(prediction: dict[str, Any], outcome: dict[str, Any] | None) -> list[str]:
    """The held-out run's prediction, and what came of it."""
    run = prediction["held_out"]
    text = [
        f"held-out run {run['name']}: {run['parameters']:,} parameters, {run['tokens']:,} tokens, {run['flops']:.3g} FLOPs; "
        f"predicted {prediction['made']} from {len(prediction['fitted_to'])} runs."
    ]
    rows = []
    for law, found in prediction["losses"].items():
        measured = [f"{outcome['errors'][law]:+.2%}"] if outcome else []
        mark = " (the prediction)" if law == prediction["law"] else ""
        rows.append((law + mark, f"{found['loss']:.4f}", f"{found['low']:.4f} to {found['high']:.4f}", *measured))
    head = ("law", "loss", f"{prediction['confidence']:.0%} interval", *(["measured is off by"] if outcome else []))
    text += table(head, rows)
    if outcome is None:
        return [*text, "it has not been trained yet: gptjax scaling run FAMILY.py --workdir=DIR --held_out"]
    where = "inside" if outcome["inside"] else "outside"
    return [*text, f"measured: {outcome['loss']:.4f}, {outcome['error']:+.2%} of the prediction, {where} its interval."]


def plan_lines(plan: Any) -> list[str]:
    """The runs of a plan."""
    rows = []
    for kind, run in [("", run) for run in plan.runs] + ([("held out", plan.held_out)] if plan.held_out else []):
        point = run.point
        size = (str(point.get("model.model_dim", "")), str(point.get("model.num_layers", "")), str(point["train.seed"]))
        counted = (f"{run.counted.total:,}", f"{run.counted.non_embedding:,}")
        length = (f"{run.tokens:,}", f"{run.steps:,}", f"{run.tokens / run.counted.total:.3g}", f"{run.epochs:.3f}")
        rows.append((*size, *counted, *length, f"{run.flops:.3g}", f"{run.rate:.3g}", kind))
    head = (
        "width",
        "layers",
        "seed",
        "parameters",
        "no embeddings",
        "tokens",
        "steps",
        "tokens/par.",
        "epochs",
        "FLOPs",
        "rate",
        "",
    )
    total = sum(run.flops for run in plan.runs)
    tail = f"{len(plan.runs)} runs, {total:.3g} FLOPs"
    if plan.held_out:
        times = plan.held_out.flops / max(run.flops for run in plan.runs)
        tail += f"; the held-out one {plan.held_out.flops:.3g}, {times:.3g} times the largest"
    return [*table(head, rows), *(f"left out: {reason}" for reason in plan.left_out), tail + "."]


def as_json(fits: Fits, left_out: Sequence[str] = ()) -> dict[str, Any]:
    def numbers(estimates: dict[str, Estimate]) -> dict[str, list[float]]:
        return {key: [item.value, item.low, item.high] for key, item in estimates.items()}

    laws = [
        {
            "law": name,
            "parameters": count,
            "formula": SURFACES[name].formula,
            "constants": numbers(law.estimates),
            "rms_error": float(np.sqrt(np.mean(law.fit.residuals**2))),
            "objective": law.fit.objective,
            "at_bound": list(law.fit.at_bound),
        }
        for (name, count), law in fits.laws.items()
    ]
    found = [
        {"approach": item.name, "parameters": item.count, "missing": item.missing, "failed": item.failed}
        | {"estimates": numbers(item.estimates)}
        for item in fits.approaches
    ]
    options = {"confidence": fits.options.confidence, "resamples": fits.options.resamples, "huber_delta": fits.options.delta}
    runs = [{key: value if _is_plain(value) else None for key, value in row.items()} for row in fits.observations.rows()]
    return {"runs": runs, "left_out": list(left_out), "options": options, "laws": laws, "approaches": found}


def _is_plain(value: str | float) -> bool:
    return isinstance(value, str) or math.isfinite(value)
