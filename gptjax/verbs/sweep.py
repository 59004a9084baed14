"""`gptjax sweep`: run the trials of a sweep file, or go on with them."""

from __future__ import annotations

import argparse
import dataclasses
import pathlib
import re
import sys
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from gptjax.config import UserError
from gptjax.sweeps.definition import WHERE, Sweep, Trial, describe, load_sweep, make_trials, short_names, varying
from gptjax.sweeps.folder import SweepFolder
from gptjax.sweeps.search import describe_distribution
from gptjax.verbs.arguments import add_verb, count, positive, rate, required
from gptjax.verbs.output import print_json

if TYPE_CHECKING:
    from gptjax.sweeps.driver import Source
    from gptjax.sweeps.resources import Slot
    from gptjax.sweeps.table import LiveTable


def add(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "sweep",
        run,
        "Run the trials of a sweep file; the same command runs what is missing.",
        """example:
  gptjax sweep experiments/learning_rate/sweep.py --workdir=runs/learning_rate --jobs=2

FILE is Python; its get_sweep() returns a gptjax.sweeps.definition.Sweep: a list of points, or a space in which Optuna searches
(Sweep(..., search=Search(trials=30, sampler="tpe", pruner="median")); extra: search). Each trial is a run in DIR/trials/, resumed
like any other. A failed one is recorded with why, and the rest go on; it stays failed until --retry_failed. Ctrl-C and SIGTERM
have the trials save; a trial that outlives a killed driver is waited for by the next one. On the CPU each trial computes with
--cores threads, whatever --jobs is, since another number of threads gives other roundings; GPUs are divided, --devices each.

--where=slurm submits an array job through submitit (extra: slurm) and waits; stopping the driver leaves the jobs in the queue and
the same command waits again; --retries is for this machine. --where=jobset prints a Kubernetes manifest for each missing trial,
for `kubectl apply -f -`.

A search suggests a trial when one can begin; killed and started again it goes on with the trials that it had. Several drivers,
on hosts that share DIR, join one search under names of their own: --worker=NAME, the same one to go on. `gptjax importance DIR`
draws what came of it.

Exit status: 0 all trials are done (or pruned), 1 some are not, 75 and 130 stopped by SIGTERM and Ctrl-C.""",
    )
    parser.add_argument("file", metavar="FILE.py[:ARG]", help="the sweep file")
    parser.add_argument("--workdir", metavar="DIR", help="the sweep's folder")
    parser.add_argument("--list", action="store_true", help="print the trials and run nothing")
    add_running(parser)
    parser.add_argument("--where", choices=WHERE, default="local", help="this machine (default), SLURM, Kubernetes")
    parser.add_argument("--worker", metavar="NAME", default="", help="of a search: this driver's name among several")


def add_running(parser: argparse.ArgumentParser) -> None:
    """The arguments of how trials run, which `run_here` reads."""
    parser.add_argument("--jobs", type=positive, default=1, metavar="N", help="trials at a time (default 1)")
    parser.add_argument("--cores", type=positive, metavar="N", help="CPU cores of each trial (default: what the file says, or 1)")
    parser.add_argument("--devices", type=positive, metavar="N", help="GPUs of each trial (default: what the file says, or 1)")
    parser.add_argument("--timeout", type=rate, metavar="SECONDS", help="for one start of a trial; 0: no limit")
    parser.add_argument("--retries", type=count, metavar="N", help="further starts of a trial that crashed or ran out of memory")
    parser.add_argument("--retry_failed", action="store_true", help="run failed trials again, from their checkpoints")


def run(arguments: argparse.Namespace) -> int:
    sweep = load_sweep(arguments.file)
    if sweep.search is not None:
        return _search(arguments, sweep)
    if arguments.worker:
        raise UserError(f"--worker is for a search, and {arguments.file} lists its trials; one driver runs them.")
    trials = make_trials(sweep, arguments.overrides)
    if arguments.list and not arguments.workdir:
        return _list(trials, arguments.json)
    if arguments.where == "jobset":
        from gptjax.sweeps.jobset import manifests

        print(manifests(sweep, trials, arguments.overrides, required(arguments, "workdir")), end="")
        return 0
    folder = SweepFolder(pathlib.Path(required(arguments, "workdir")).resolve())
    trials = folder.settle_names(trials)
    if arguments.list:
        return _list(trials, arguments.json, folder)
    return run_here(arguments, sweep, folder, trials)


def _list(trials: list[Trial], as_json: bool, folder: SweepFolder | None = None) -> int:
    statuses = [folder.observed(trial.name).status if folder else "waiting" for trial in trials]
    if as_json:
        rows = [
            {"name": trial.name, "hash": trial.hash, "overrides": trial.overrides, "status": status}
            for trial, status in zip(trials, statuses, strict=True)
        ]
        print_json({"trials": rows})
        return 0
    short = short_names(set(varying([trial.overrides for trial in trials])))
    for number, (trial, status) in enumerate(zip(trials, statuses, strict=True), 1):
        print(f"{number:>{len(str(len(trials)))}}  {trial.hash}  {status:<7}  {describe(trial.overrides, short)}".rstrip())
    return 0


def run_here(arguments: argparse.Namespace, sweep: Sweep, folder: SweepFolder, trials: list[Trial]) -> int:
    from gptjax.sweeps.resources import divide
    from gptjax.sweeps.table import LiveTable, as_json, read_rows
    from gptjax.train.run import RunLock

    sweep, about = _as_asked(arguments, sweep)
    table = LiveTable(folder, arguments.jobs)
    is_local = arguments.where == "local"
    slots, shares = divide(arguments.jobs, sweep.cores, sweep.devices) if is_local else ([], "")
    with RunLock(folder.path, table.say):
        _check_cores(folder, sweep.cores)
        folder.write_definition(trials, about)
        if is_local:
            table.say(f"{len(trials)} trials, {shares}.")
            status = _drive(arguments, sweep, folder, trials, slots, table)
        else:
            from gptjax.sweeps.slurm import run_on_slurm

            status = run_on_slurm(folder, sweep, trials, arguments.jobs, arguments.retry_failed, table)
    table.close()
    if arguments.json:
        print_json({"trials": as_json(read_rows(folder)), "all_done": status == 0})
    return status


def _as_asked(arguments: argparse.Namespace, sweep: Sweep) -> tuple[Sweep, dict[str, Any]]:
    """The sweep with what the command line says in place of its own, and what sweep.json keeps of both."""
    names = ("cores", "devices", "timeout", "retries")
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    sweep = dataclasses.replace(sweep, **given)
    about = {"file": arguments.file, "recipe": sweep.recipe, "jobs": arguments.jobs, "where": arguments.where}
    return sweep, about | {name: getattr(sweep, name) for name in names}


def _drive(
    arguments: argparse.Namespace,
    sweep: Sweep,
    folder: SweepFolder,
    trials: list[Trial] | Source,
    slots: list[Slot],
    table: LiveTable,
) -> int:
    from gptjax.sweeps.driver import Driver

    driver = Driver(
        folder,
        trials,
        slots,
        timeout=sweep.timeout,
        retries=sweep.retries,
        retry_failed=arguments.retry_failed,
        say=table.say,
        show=table.show,
    )
    return driver.run()


# --- a search ---


def _search(arguments: argparse.Namespace, sweep: Sweep) -> int:
    if arguments.where != "local":
        raise UserError(
            f"--where={arguments.where} takes trials that are known beforehand; for a search, start drivers there that share "
            f"--workdir, each with a --worker=NAME of its own."
        )
    if arguments.list and not (arguments.workdir and (pathlib.Path(arguments.workdir) / "sweep.json").exists()):
        return _list_space(sweep, arguments.json)
    folder = SweepFolder(pathlib.Path(required(arguments, "workdir")).resolve())
    if arguments.list:
        return _list_suggested(folder, arguments.json)
    if not re.fullmatch(r"[A-Za-z0-9_.-]*", arguments.worker):
        raise UserError(f"--worker={arguments.worker!r} names a folder: letters, digits, '_', '.' and '-' only.")
    from gptjax.sweeps.resources import divide
    from gptjax.sweeps.searcher import Searcher
    from gptjax.sweeps.table import LiveTable, as_json, read_rows
    from gptjax.train.run import RunLock

    sweep, about = _as_asked(arguments, sweep)
    slots, shares = divide(arguments.jobs, sweep.cores, sweep.devices)
    table = LiveTable(folder, arguments.jobs)
    with RunLock(folder.path / "workers" / arguments.worker if arguments.worker else folder.path, table.say):
        _check_cores(folder, sweep.cores)
        searcher = Searcher(
            folder,
            sweep,
            arguments.overrides,
            worker=arguments.worker,
            about=about,
            retry_failed=arguments.retry_failed,
            say=table.say,
        )
        table.say(f"a search of {searcher.study.limit} trials, {shares}.")
        status = _drive(arguments, sweep, folder, searcher, slots, table)
        searcher.write_definition()
    table.close()
    print(searcher.best(), file=sys.stderr)
    if arguments.json:
        print_json({"trials": as_json(read_rows(folder)), "all_done": status == 0})
    return status


def _list_space(sweep: Sweep, as_json: bool) -> int:
    assert sweep.search is not None and isinstance(sweep.space, Mapping)
    space = {key: describe_distribution(distribution) for key, distribution in sweep.space.items()}
    if as_json:
        print_json({"trials": [], "space": space, "search": dataclasses.asdict(sweep.search)})
        return 0
    print(f"{sweep.search.trials} trials, suggested one by one by {sweep.search.sampler} in")
    print("\n".join(f"  {key}  {distribution}" for key, distribution in space.items()))
    return 0


def _list_suggested(folder: SweepFolder, as_json: bool) -> int:
    from gptjax.sweeps.table import search_lines

    definition = folder.read_definition()
    trials = definition["trials"]
    rows = [trial | {"status": folder.observed(trial["name"]).status} for trial in trials]
    if as_json:
        print_json({"trials": rows, "search": definition.get("search", {})})
        return 0
    short = short_names({key for trial in trials for key in trial["overrides"]})
    for row in rows:
        print(f"{row['name'].partition(',')[0]}  {row['hash']}  {row['status']:<7}  {describe(row['overrides'], short)}")
    print("\n".join(search_lines(definition)))
    return 0


def _check_cores(folder: SweepFolder, cores: int) -> None:
    """Trials of one sweep with different numbers of threads could not be compared bit for bit: say so before they are mixed."""
    if not (folder.path / "sweep.json").exists():
        return
    before = folder.read_definition().get("cores", cores)
    if before != cores:
        print(f"the sweep's earlier trials had {before} cores each, these have {cores}: roundings differ.", file=sys.stderr)
