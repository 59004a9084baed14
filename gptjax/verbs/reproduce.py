"""`gptjax reproduce`: a run once more from its folder, and whether its numbers come out as they did."""

from __future__ import annotations

import argparse
import pathlib
import signal
import sys
from typing import Any

from gptjax.parallel import hosts
from gptjax.verbs.arguments import add_verb, positive, rate
from gptjax.verbs.output import fault, log, print_json, write_text


def add(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "reproduce",
        run,
        "Run a run once more, from its folder alone, and say whether its losses agree bit for bit, or within what.",
        """examples:
  gptjax reproduce runs/a
  gptjax reproduce runs/a --steps=50 --workdir=/tmp/again --tolerance=1e-5
  gptjax reproduce runs/a --config.data.path=/new/place/text.txt

Every number of metrics.jsonl but clocks is compared (losses, evaluations, gradient norms, learning rates), and the samples and
the final state. Exit status 0: to the bit, or with --tolerance all numbers within that relative difference; 1: not. Versions,
hardware and flags that differ from the run's are listed. The second run has a folder of its own and goes on where it was
interrupted. Of the config only where things lie can be overridden, and what does not shape a run; that data and init_from are
the same is checked by their fingerprints.""",
        uses_devices=True,
    )
    parser.add_argument("folder", metavar="RUN", help="a run's folder, of a run that ended or not")
    parser.add_argument("--workdir", metavar="DIR", help="folder of the second run (default: RUN/reproduction)")
    parser.add_argument("--steps", type=positive, metavar="N", help="only the first N (default: to the last one it logged)")
    parser.add_argument(
        "--tolerance", type=rate, default=0.0, metavar="X", help="relative difference that is agreement still (default 0: none)"
    )


def run(arguments: argparse.Namespace) -> int:
    from gptjax.train.checkpoints import CheckpointError
    from gptjax.train.loop import Interrupted, NonFiniteError
    from gptjax.train.reproduction import exit_status, lines, reproduce

    folder = pathlib.Path(arguments.folder)
    workdir = pathlib.Path(arguments.workdir) if arguments.workdir else None
    try:
        found = reproduce(folder, workdir, arguments.steps, arguments.overrides, arguments.tolerance, log)
    except Interrupted as stopped:
        if hosts.is_primary():
            print(f"gptjax: {stopped}", file=sys.stderr)
        return 75 if stopped.signal_number == signal.SIGTERM else 130
    except (CheckpointError, NonFiniteError) as error:
        return fault(str(error), 1)
    if arguments.json:
        print_json(found.as_json())
    else:
        write_text("\n".join(lines(found)) + "\n")
    return exit_status(found)
