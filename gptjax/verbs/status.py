"""`gptjax status`: the table of a sweep's trials, from any shell."""

from __future__ import annotations

import argparse
import pathlib
import shutil
import sys
from typing import Any

from gptjax.sweeps.folder import SweepFolder
from gptjax.verbs.arguments import add_verb
from gptjax.verbs.output import print_json


def add(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "status",
        run,
        "The trials of a sweep: how far each is, and why some failed.",
        """example:
  gptjax status runs/learning_rate

It reads state files and metrics only, disturbs nothing, and needs no driver to be alive.""",
    )
    parser.add_argument("folder", metavar="DIR", help="the sweep's folder")


def run(arguments: argparse.Namespace) -> int:
    from gptjax.sweeps.table import as_json, estimate, lines, read_rows, search_lines, to_come

    folder = SweepFolder(pathlib.Path(arguments.folder))
    definition = folder.read_definition()
    jobs, more = definition["jobs"], to_come(definition)
    rows = read_rows(folder)
    if arguments.json:
        refused = {"refused": definition["search"]["refused"], "to_come": more} if "search" in definition else {}
        print_json({"trials": as_json(rows), "seconds_left": estimate(rows, jobs, more)} | refused)
        return 0
    width = shutil.get_terminal_size().columns - 1 if sys.stdout.isatty() else 10**6
    print("\n".join([*lines(rows, jobs, width, more=more), *search_lines(definition)]))
    return 0
