"""`gptjax report`: what a sweep's runs say, as one page to hand on, and as Markdown, PNG and CSV."""

from __future__ import annotations

import argparse
import pathlib
import sys
from typing import Any

from gptjax.config import Config, UserError
from gptjax.verbs.arguments import add_verb
from gptjax.verbs.compare import add_comparison, check_confidence
from gptjax.verbs.output import print_json


def add(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "report",
        run,
        "Report on runs as one HTML page, and as Markdown with PNGs and CSV: question, answer, curves, what it hangs on, cost.",
        """example:
  gptjax report runs/learning_rate
  gptjax report experiments/learning_rate --target=1.5
  gptjax report runs/a runs/b --out=a_and_b --baseline=1

DIR is a sweep's folder, a run's, one that holds such, or an experiment's (README.md and sweep.py), whose runs are in it, in
runs/NAME or in another DIR. The question is the README's paragraph that begins with "Question", or its first; the README is that
of the folder or the one beside the sweep file.

The answer, and every comparison, is what `gptjax compare` says of the same runs: no winner where the interval holds zero. The
page needs no network and no script; it follows the reader's light or dark, and prints. Its figures are drawn again as PNGs for
the Markdown (extra: plot); the CSV files hold every number unrounded.""",
    )
    parser.add_argument("folders", nargs="+", metavar="DIR", help="a sweep's folder, a run's, an experiment's")
    parser.add_argument("--out", metavar="FOLDER", help="of the report (default: DIR/report)")
    parser.add_argument(
        "--formats", default="html,markdown,csv", metavar="NAMES", help="which to write (default html,markdown,csv)"
    )
    parser.add_argument("--readme", default="", metavar="FILE", help="the README that asks the question")
    parser.add_argument("--title", default="", metavar="TEXT", help="of the page (default: the README's)")
    add_comparison(parser)


def run(arguments: argparse.Namespace) -> int:
    from gptjax.report.build import Wanted, build
    from gptjax.report.sources import find_sources
    from gptjax.report.write import check_formats, write_report

    check_confidence(arguments.confidence)
    formats = [name for name in arguments.formats.split(",") if name]
    check_formats(formats)
    out = _out(arguments)
    wanted = Wanted(
        arguments.metric,
        arguments.target,
        arguments.higher_is_better,
        arguments.baseline,
        arguments.confidence,
        arguments.title,
    )
    contents = build(find_sources(arguments.folders, arguments.readme), wanted, _adapter_weights)
    files = write_report(contents, out, formats, _adapter_weights)
    print(
        f"wrote {files[-1] if files else 'nothing'}" + (f" and {len(files) - 1} files beside it" if len(files) > 1 else ""),
        file=sys.stderr,
    )
    if arguments.json:
        from gptjax.sweeps.compare import as_json

        reports = [as_json(report) for report in contents.reports]
        print_json({"answer": contents.answer, "files": [str(path) for path in files], "reports": reports})
    else:
        print(contents.answer)
    return 0


def _out(arguments: argparse.Namespace) -> pathlib.Path:
    if not arguments.out and len(arguments.folders) > 1:
        raise UserError("gptjax report of several folders needs --out=FOLDER.")
    out = pathlib.Path(arguments.out) if arguments.out else pathlib.Path(arguments.folders[0]) / "report"
    if out.exists() and not out.is_dir():
        raise UserError(f"--out={out} is a file, and must be a folder.")
    return out


def _adapter_weights(config: Config) -> int | None:
    """Of a run with adapters, whose shapes JAX works out; it is imported for such runs only."""
    from gptjax.adapters.attach import adapter_weights

    return adapter_weights(config)
