"""`gptjax compare`: which of several groups of runs is better, and whether the runs show it."""

from __future__ import annotations

import argparse
import pathlib
import sys
from typing import Any

from gptjax.config import UserError
from gptjax.verbs.arguments import add_verb, count, share
from gptjax.verbs.output import print_json


def add(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "compare",
        run,
        "Compare groups of runs, paired by seed: difference, interval, p-value, effect, and the seeds that would settle it.",
        """example:
  gptjax compare runs/learning_rate --plot=curves.png
  gptjax compare runs/before runs/after --metric=eval/bits_per_byte --target=1.9

DIR is a run's folder or a sweep's. Runs that differ in nothing but the seed are one group. The interval is Student's on the
paired differences; from 5 seeds on a studentised bootstrap stands beside it, and both must exclude zero, and p be small after
Holm's correction for the number of comparisons, before a winner is named. The effect is the mean difference in standard
deviations.

Metrics: eval/NAME of the last evaluation, a number of result.json such as seconds, a column of metrics.jsonl (its last value);
with --target also tokens_to_loss and time_to_loss. A group with runs that have no figure is not named the winner.""",
    )
    parser.add_argument("folders", nargs="+", metavar="DIR", help="a run's folder or a sweep's")
    add_comparison(parser)
    parser.add_argument("--plot", metavar="FILE.png", help="draws the curves with bands (extra: plot)")


def add_comparison(parser: argparse.ArgumentParser) -> None:
    """The arguments that say what is compared, and how."""
    parser.add_argument(
        "--metric", default="eval/loss", metavar="NAME", help="figure of each run (default eval/loss, the last one)"
    )
    parser.add_argument("--higher_is_better", action="store_true", help="of the metric; losses and times are better lower")
    parser.add_argument("--target", type=float, metavar="LOSS", help="also compare tokens and seconds until eval/loss is this")
    parser.add_argument(
        "--baseline", type=count, default=0, metavar="N", help="compare with this group only (default: all pairs)"
    )
    parser.add_argument("--confidence", type=share, default=0.95, metavar="SHARE", help="of the intervals (default 0.95)")


def check_confidence(confidence: float) -> None:
    """Raises `UserError` where no interval has it."""
    if not confidence < 1:
        raise UserError(f"--confidence={confidence} must be below 1.")


def run(arguments: argparse.Namespace) -> int:
    from gptjax.sweeps import compare as comparing
    from gptjax.sweeps.groups import TO_LOSS, group_runs, read_runs

    check_confidence(arguments.confidence)
    groups = group_runs(read_runs(arguments.folders))
    metrics = [arguments.metric, *(name for name in TO_LOSS if arguments.target is not None and name != arguments.metric)]
    reports = [
        comparing.compare(
            groups,
            metric,
            target=arguments.target,
            higher_is_better=arguments.higher_is_better and metric == arguments.metric,
            baseline=arguments.baseline,
            confidence=arguments.confidence,
        )
        for metric in metrics
    ]
    if arguments.plot:
        from gptjax.sweeps.curves import draw_curves

        draw_curves(pathlib.Path(arguments.plot), groups, arguments.confidence, arguments.target)
        print(f"drew {arguments.plot}", file=sys.stderr)
    if arguments.json:
        print_json({"reports": [comparing.as_json(report) for report in reports]})
    else:
        print("\n\n".join("\n".join(comparing.lines(report)) for report in reports))
    return 0
