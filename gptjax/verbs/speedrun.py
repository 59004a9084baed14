"""`gptjax speedrun`: run a record of a speed-run, verify one, list them."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
from typing import Any

from gptjax.config import UserError
from gptjax.verbs.arguments import add_verb, positive, required
from gptjax.verbs.output import log, print_json


def add(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "speedrun",
        run,
        "Train to a given validation loss in the least time: make a record, verify one, list them.",
        """example:
  gptjax speedrun verify experiments/speedrun/records/NAME --data=input.txt
  gptjax speedrun record experiments/speedrun/records/MINE --data=input.txt
  gptjax speedrun list experiments/speedrun

RECORD is a folder with a recipe.py inside a track, a folder with a track.json. `record` runs its seeds and writes record.json
and logs/ into it. `verify` runs the same seeds again, in a folder of its own, and says whether the mean loss is below the target
beyond chance, whether the losses are those recorded, and how the times compare. What counts is the time of the whole process,
so leave the machine alone meanwhile. The same command goes on with runs that are missing; one that was cut off has no time.

Exit status: 0 the target is met beyond chance (list: always), 1 it is not, or a run failed.""",
    )
    parser.add_argument("action", choices=("record", "verify", "list"))
    parser.add_argument("folder", metavar="RECORD", help="a record's folder; for list, the track's")
    parser.add_argument("--data", metavar="FILE", help="the track's text")
    parser.add_argument("--seeds", type=positive, metavar="N", help="seeds 0 to N - 1 (default: the record's or track's)")
    parser.add_argument(
        "--workdir", metavar="DIR", help="folder of the runs (default runs/speedrun/NAME, for verify NAME.verify)"
    )


def run(arguments: argparse.Namespace) -> int:
    from gptjax.sweeps import speedrun

    folder = pathlib.Path(arguments.folder)
    if arguments.overrides:
        raise UserError(
            f"gptjax speedrun takes no --config.{arguments.overrides[0]}: what a record sets stands in its recipe.py."
        )
    if arguments.action == "list":
        track = speedrun.find_track(folder / "records")
        if arguments.json:
            print_json({"records": {name: dataclasses.asdict(own) for name, own in speedrun.records_of(track)}})
        else:
            print(f"{track.question}\n\n{speedrun.write_table(track)}")
        return 0
    return _measure(arguments, folder)


def _measure(arguments: argparse.Namespace, folder: pathlib.Path) -> int:
    from gptjax.sweeps import speedrun
    from gptjax.sweeps.folder import SweepFolder
    from gptjax.sweeps.table import LiveTable

    track = speedrun.find_track(folder)
    claimed = speedrun.read_record(folder) if arguments.action == "verify" else []
    count = arguments.seeds or max(len(claimed), track.seeds)
    if count < track.seeds:
        raise UserError(f"--seeds={count} must be at least {track.seeds}, the track's.")
    trials = speedrun.trials_of(track, folder, pathlib.Path(required(arguments, "data")), count)
    name = folder.resolve().name + (".verify" if claimed else "")
    workdir = pathlib.Path(arguments.workdir or f"runs/speedrun/{name}")
    table = LiveTable(SweepFolder(workdir.resolve()), 1)
    status, runs = speedrun.run(track, trials, workdir, table.say, table.show)
    table.close()
    if status:
        log(f"{len(runs)} of {count} runs are done; the same command runs the others.")
        return status
    verdict = speedrun.judge(runs, track.target)
    if arguments.action == "record":
        speedrun.write_record(folder, runs, workdir, trials)
    if arguments.json:
        about = {"runs": [dataclasses.asdict(one) for one in runs], "claimed": [dataclasses.asdict(one) for one in claimed]}
        print_json({**about, "verdict": dataclasses.asdict(verdict), "holds": verdict.holds(track)})
    else:
        print("\n".join(_lines(track, runs, claimed, verdict)))
    return 0 if verdict.holds(track) else 1


def _lines(track: Any, runs: list[Any], claimed: list[Any], verdict: Any) -> list[str]:
    from gptjax.sweeps import speedrun

    before = {one.seed: one for one in claimed}
    lines = []
    for one in runs:
        own = before.get(one.seed)
        seconds = "cut off" if one.seconds is None else f"{one.seconds:.1f} s"
        same = "" if own is None else ", as recorded" if own.loss == one.loss else f", recorded {own.loss:.6f}"
        lines.append(f"seed {one.seed}: loss {one.loss:.6f}{same}, {seconds}")
    low, high = verdict.interval
    lines.append(f"mean time {verdict.seconds:.1f} s (95 % interval {low:.1f} to {high:.1f})")
    if claimed:
        lines.append(f"recorded: {speedrun.judge(claimed, track.target).seconds:.1f} s; times of other hardware differ")
    relation = "below" if verdict.holds(track) else "not shown to be below"
    lines.append(f"mean loss {verdict.loss:.4f} is {relation} {track.target} (p = {verdict.p:.2g}, asked for {track.p})")
    return lines
