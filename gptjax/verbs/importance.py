"""`gptjax importance`: what a search says of its space."""

from __future__ import annotations

import argparse
import pathlib
import sys
from typing import Any

from gptjax.verbs.arguments import add_verb
from gptjax.verbs.output import print_json


def add(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "importance",
        run,
        "Which knobs of a search mattered: importance, contours over pairs of knobs, course of the best.",
        """example:
  gptjax importance runs/search

DIR is the folder of a sweep with a search, finished or not. Importance is fANOVA's, over the space as it was declared (in
logarithms where it was log_uniform): the share of the variance that each knob by itself explains. A sampler that seeks the best
sees little of the rest of the space: random search gives the surer shares.

Writes importance.png, contour.png and history.png, and their numbers as importance.csv, contour.csv and trials.csv, into DIR
or --output (extra: search).""",
    )
    parser.add_argument("folder", metavar="DIR", help="the sweep's folder")
    parser.add_argument("--output", metavar="DIR", help="where figures and tables go (default: the sweep's folder)")


def run(arguments: argparse.Namespace) -> int:
    from gptjax.sweeps import importance

    folder = pathlib.Path(arguments.folder)
    searched = importance.read_search(folder)
    shares = importance.importances(searched)
    pairs = importance.pairs_of(searched, shares)
    output = pathlib.Path(arguments.output or folder)
    output.mkdir(parents=True, exist_ok=True)
    from gptjax.sweeps.search_plots import draw

    names = draw(output, searched, shares, pairs)
    importance.write_numbers(output, searched, shares, pairs)
    if arguments.json:
        print_json({"metric": searched.metric, "trials": len(searched.complete), "importance": shares})
    else:
        print("\n".join(importance.lines(searched, shares)))
    print(f"wrote {', '.join(names)}, importance.csv, contour.csv, trials.csv into {output}", file=sys.stderr)
    return 0
