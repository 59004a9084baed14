"""`gptjax coordinates`: whether activations keep their size as the model grows wider."""

from __future__ import annotations

import argparse
import csv
import os
import pathlib
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from gptjax import recipes
from gptjax.config import UserError
from gptjax.verbs.arguments import add_verb, positive, sizes
from gptjax.verbs.output import log, plain, print_json, write_json

if TYPE_CHECKING:
    from gptjax.train.coordinates import Slope

FILES = ("coordinates.csv", "coordinates.json", "coordinates.png")


def add(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "coordinates",
        run,
        "Train a recipe for a few steps at several widths and say whether activations keep their size.",
        """example:
  gptjax coordinates configs/shakespeare_char.py:cpu --config.model.parameterization=mup --config.model.mup_base_dim=64

The recipe is taken to each width with heads of its size, as many as fit, and MLP and experts in proportion; it trains on its own
batches at its peak learning rate, without warm-up. The table has, for each activation and step, the slope of log(mean absolute
value) over log(width), and the same of its change since initialisation. They are to lie within +-0.1, but for those in brackets:
the scale of logits, their change by the first step, and the change of scores, whose random parts shrink with the width by design.
Under muP they do (Yang et al., 2022, appendix D.1).

With --workdir: coordinates.csv, coordinates.json and, with the extra plot, coordinates.png. Exit status 1 where a slope is too
steep.""",
        uses_devices=True,
    )
    parser.add_argument("recipe", metavar="RECIPE", help="FILE.py[:ARG], or a config.json")
    parser.add_argument(
        "--widths", type=sizes, default=(64, 128, 256, 512), metavar="N,N", help="model.model_dim (64,128,256,512)"
    )
    parser.add_argument("--steps", type=positive, default=3, metavar="N", help="training steps (3)")
    parser.add_argument("--seeds", type=positive, default=2, metavar="N", help="train.seed 0 to N - 1, averaged (2)")
    parser.add_argument("--workdir", metavar="DIR", help="where table and plot are written")


def run(arguments: argparse.Namespace) -> int:
    widths = sorted(set(arguments.widths))
    if len(widths) < 2:
        raise UserError("--widths needs at least two widths, for there to be a slope.")
    config = recipes.load_recipe(arguments.recipe, arguments.overrides)
    from gptjax.train.coordinates import TOLERANCE, at_width, measure, slopes
    from gptjax.train.loop import load_data

    by_width = [at_width(config, width) for width in widths]
    dataset = load_data(config, log)
    found = []
    for width, at in zip(widths, by_width, strict=True):
        at = at.with_vocab_size(dataset.tokenizer.vocab_size)
        found.append(measure(at, dataset.train, arguments.steps, range(arguments.seeds)))
        log(f"width {width}: {arguments.steps} steps, {arguments.seeds} seeds.")
    lines = slopes(widths, found)
    failing = [line for line in lines if line.judged and not line.passes]
    result: dict[str, Any] = {
        "passes": not failing,
        "tolerance": TOLERANCE,
        "widths": widths,
        "seeds": arguments.seeds,
        "parameterization": config.model.parameterization,
        "slopes": [vars(line) | {"passes": line.passes} for line in lines],
    }
    if arguments.workdir:
        _write(pathlib.Path(arguments.workdir), result, lines)
    if arguments.json:
        print_json(result)
    else:
        print(describe(lines, widths, TOLERANCE))
    return 1 if failing else 0


def describe(lines: Sequence[Slope], widths: Sequence[int], tolerance: float) -> str:
    """A row for each activation and measure, with the slope after each step; then the verdict."""
    last = max(line.step for line in lines)
    rows = [("activation", "of its", *(f"step {step}" for step in range(last + 1)))]
    for quantity, measure in sorted({(line.quantity, line.measure) for line in lines}):
        by_step = {line.step: line for line in lines if (line.quantity, line.measure) == (quantity, measure)}
        cells = [_cell(by_step[step]) if step in by_step else "" for step in range(last + 1)]
        rows.append((quantity, measure, *cells))
    sizes = [max(map(len, column)) for column in zip(*rows, strict=True)]
    text = ["  ".join(cell.ljust(size) for cell, size in zip(row, sizes, strict=True)).rstrip() for row in rows]
    failing = [line for line in lines if line.judged and not line.passes]
    judged = sum(line.judged for line in lines)
    over = f"over widths {', '.join(map(str, widths))}"
    if not failing:
        steepest = max((line for line in lines if line.judged), key=lambda line: abs(line.slope))
        verdict = f"pass: {judged} slopes {over} within +-{tolerance}; the steepest is {_name(steepest)}."
    else:
        worst = sorted(failing, key=lambda line: -abs(line.slope) if line.slope == line.slope else -float("inf"))
        names = ", ".join(_name(line) for line in worst[:8]) + (f" and {len(worst) - 8} more" if len(worst) > 8 else "")
        verdict = f"fail: {len(failing)} of {judged} slopes {over} beyond +-{tolerance}: {names}."
    return "\n".join([*text, "(in brackets: not judged; *: too steep)", verdict])


def _cell(line: Slope) -> str:
    number = f"{line.slope:+.3f}"
    return f"({number})" if not line.judged else number + ("" if line.passes else "*")


def _name(line: Slope) -> str:
    return f"{line.quantity} ({line.measure}, step {line.step}) {line.slope:+.3f}"


def _write(folder: pathlib.Path, result: dict[str, Any], lines: Sequence[Slope]) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with open(folder / FILES[0], "w", encoding="utf-8", newline="") as file:
            table = csv.writer(file)
            table.writerow(["quantity", "measure", "step", "slope", "judged", *result["widths"]])
            for line in lines:
                table.writerow([line.quantity, line.measure, line.step, line.slope, int(line.judged), *line.values])
    except OSError as error:
        raise UserError(f"--workdir={folder} cannot be written: {error.strerror}.") from None
    write_json(folder / FILES[1], plain(result))
    _draw(folder / FILES[2], result["widths"], lines)


def _draw(path: pathlib.Path, widths: Sequence[int], lines: Sequence[Slope]) -> None:
    """One panel for each kind of activation and measure, its layers together: values over width, a line for each step."""
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        log(f"{path.name} is not drawn: it needs matplotlib, pip install 'gptjax[plot]'.")
        return
    kinds = sorted({line.quantity.partition(".")[0] for line in lines})
    last = max(line.step for line in lines)
    figure = Figure(figsize=(2.6 * len(kinds), 5.2), dpi=100, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    panels = figure.subplots(2, len(kinds), sharex=True, squeeze=False)
    for row, measure in enumerate(("scale", "change")):
        for column, kind in enumerate(kinds):
            axes = panels[row][column]
            for line in lines:
                if line.measure == measure and line.quantity.partition(".")[0] == kind:
                    shade = 0.75 - 0.75 * line.step / last
                    axes.plot(widths, line.values, "-", color=(shade, shade, 1 - shade / 2), linewidth=1, marker=".")
            axes.set(xscale="log", yscale="log", title=f"{kind}: {measure}")
            axes.set_xticks(widths, map(str, widths))
            axes.minorticks_off()
            low, high = axes.get_ylim()
            axes.set_ylim(min(low, high / 10), high)  # a decade at least, or flat lines would look steep
            axes.grid(color="#dddddd", linewidth=0.6)
    for axes in panels[1]:
        axes.set_xlabel("width")
    figure.suptitle(f"mean absolute values; from light to dark: before training to step {last}", fontsize=9)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    canvas.print_figure(temporary, format="png")
    temporary.replace(path)
