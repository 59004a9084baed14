"""`gptjax replay`: one step of a run once more: its documents, what each cost, and where the gradient was large."""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

from gptjax.config import UserError
from gptjax.parallel import hosts
from gptjax.verbs.arguments import add_verb, count, positive, required
from gptjax.verbs.output import log, print_json, write_json, write_text


def add(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "replay",
        run,
        "Take one step of a run once more: its documents decoded, loss by document, gradient norms by layer.",
        """examples:
  gptjax replay runs/a --step=1207
  gptjax replay runs/a --step=1207 --rewinds=0 --out=step.json

The state before the step is that of the nearest checkpoint before it, trained forward; the numbers in metrics.jsonl show whether
it is the same to the bit. Documents come dearest first, each with its dearest targets (@PLACE in the row). Norms are of the mean
loss's gradient before clipping, of the update, and of the parameters before it. Nothing in RUN is changed.

Of a run that went back from spikes, a step is the one that was taken last. --rewinds=K follows the first K rewinds only: 0 shows
a spike as it was before the run first went back. Exit status 1 where recorded numbers differ.""",
        uses_devices=True,
    )
    parser.add_argument("folder", metavar="RUN", help="a run's folder")
    parser.add_argument("--step", type=positive, metavar="N", help="the step, from 1")
    parser.add_argument("--rewinds", type=count, metavar="K", help="follow the first K of the run's rewinds (default: all)")
    parser.add_argument("--top", type=positive, default=20, metavar="N", help="documents to show (default 20)")
    parser.add_argument("--spots", type=count, default=3, metavar="N", help="dearest targets of each to show (default 3)")
    parser.add_argument("--out", metavar="FILE.json", help="everything, token by token, as --json prints it")


def run(arguments: argparse.Namespace) -> int:
    from gptjax.train.replay import replay
    from gptjax.train.replay_report import as_json, lines

    step = required(arguments, "step")
    out = pathlib.Path(arguments.out) if arguments.out else None
    if out is not None and not out.resolve().parent.is_dir():
        raise UserError(f"--out={out} cannot be written: there is no folder {out.parent}.")
    found = replay(pathlib.Path(arguments.folder), int(step), arguments.rewinds, arguments.overrides, log)
    if out is not None and hosts.is_primary():
        write_json(out, as_json(found))
        log(f"wrote {out}.")
    if arguments.json:
        print_json(as_json(found))
    else:
        write_text("\n".join(lines(found, arguments.top, arguments.spots)) + "\n")
    return 1 if found.agreement.differing else 0
