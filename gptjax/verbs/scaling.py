"""`gptjax scaling`: plan a family of models, train it, fit the scaling laws to it, and predict a larger run."""

from __future__ import annotations

import argparse
import dataclasses
import math
import pathlib
from typing import Any

from gptjax.config import Config, UserError
from gptjax.sweeps.folder import SweepFolder
from gptjax.verbs.arguments import Parser, add_verb, count, positive, rate, required, share
from gptjax.verbs.output import log, print_json, write_json
from gptjax.verbs.sweep import add_running, run_here

SUMMARY = "Plan a family of models, train it, fit Kaplan's and Chinchilla's scaling laws to it, and predict a larger run."
EXAMPLES = """example:
  gptjax scaling plan experiments/scaling_cpu/family.py
  gptjax scaling run experiments/scaling_cpu/family.py --workdir=runs/scaling --jobs=2
  gptjax scaling predict runs/scaling
  gptjax scaling run experiments/scaling_cpu/family.py --workdir=runs/scaling --held_out
  gptjax scaling fit runs/scaling --out=report

`gptjax scaling plan --help` and so on explain each. A family file is Python; its get_family() returns a
gptjax.scaling.family.Family: shapes, a rule of tokens, a rule of learning rates, and the run that is held out."""


def add(verbs: Any) -> None:
    parser = verbs.add_parser(
        "scaling",
        help=SUMMARY,
        description=SUMMARY,
        epilog=EXAMPLES,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    actions = parser.add_subparsers(dest="action", metavar="ACTION", required=True, parser_class=Parser)
    _add_plan(actions)
    _add_run(actions)
    _add_fit(actions)
    _add_predict(actions)


def _add_plan(actions: Any) -> None:
    parser = add_verb(
        actions,
        "plan",
        plan,
        "Print the runs of a family: parameters, tokens, FLOPs, rates, epochs.",
        """example:
  gptjax scaling plan experiments/scaling_cpu/family.py

FLOPs are counted as in PaLM, parameters exactly, with and without embeddings. The text is tokenized first, to know the vocabulary
and how many tokens there are: a run that would see text a second time is refused (max_epochs of the family).""",
    )
    parser.add_argument("file", metavar="FILE.py[:ARG]", help="the family file")


def _add_run(actions: Any) -> None:
    parser = add_verb(
        actions,
        "run",
        run_family,
        "Train a family as a sweep; the same command runs what is missing.",
        """example:
  gptjax scaling run experiments/scaling_cpu/family.py --workdir=runs/scaling --jobs=2

Trials, failures, Ctrl-C and going on are those of `gptjax sweep`, and `gptjax status DIR` shows how far they are. The held-out
run is trained with --held_out alone, and only once `gptjax scaling predict DIR` has written its prediction down.""",
    )
    parser.add_argument("file", metavar="FILE.py[:ARG]", help="the family file")
    parser.add_argument("--workdir", metavar="DIR", help="the family's folder")
    parser.add_argument("--held_out", action="store_true", help="train the held-out run too")
    add_running(parser)
    parser.set_defaults(where="local")


def _add_fit(actions: Any) -> None:
    parser = add_verb(
        actions,
        "fit",
        fit,
        "Fit the laws to finished runs, or to a table.",
        """example:
  gptjax scaling fit runs/scaling --out=report
  gptjax scaling fit --csv=runs.csv --columns=parameters=N,tokens=D,loss=L

Chinchilla's L = E + A / N^alpha + B / D^beta and Kaplan's L(N, D), by the Huber loss of log L and L-BFGS from a grid of starts;
the best size for a budget by the envelope, by IsoFLOP profiles and by the law; with and without embeddings counted. Intervals
are bootstraps of residuals at Student's levels. A run that is held out is never fitted.

With --out: report.md, fit.json, points.csv and, with the extra plot, figures. A table has a header with parameters and loss,
tokens or flops, and optionally non_embedding and name.""",
    )
    parser.add_argument("folders", nargs="*", metavar="DIR", help="a family's folder, a sweep's or a run's")
    _add_source(parser)
    parser.add_argument("--out", metavar="DIR", help="where report, table and figures are written")


def _add_predict(actions: Any) -> None:
    parser = add_verb(
        actions,
        "predict",
        predict,
        "Predict the held-out run, or any run, or the best run for a budget.",
        """example:
  gptjax scaling predict runs/scaling
  gptjax scaling predict --csv=runs.csv --parameters=7e10 --tokens=1.4e12
  gptjax scaling predict runs/scaling --flops=1e14,1e15

Without numbers it predicts the held-out run of a family's folder and writes that down in DIR/predictions; once that run is
trained, it says how far off the prediction was. A prediction cannot be made after its run was started. Intervals hold what is
not known of the constants and a run's own noise; that the law goes on beyond the runs is assumed.""",
    )
    parser.add_argument("folders", nargs="*", metavar="DIR", help="a family's folder, a sweep's or a run's")
    _add_source(parser)
    parser.add_argument("--parameters", type=numbers, default=(), metavar="N,N", help="of runs to predict, embeddings counted")
    parser.add_argument("--tokens", type=numbers, default=(), metavar="N,N", help="of these runs")
    parser.add_argument(
        "--flops", type=numbers, default=(), metavar="C,C", help="budgets: the best model by the law, with C = 6 N D"
    )


def _add_source(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--csv", metavar="FILE", help="a table of runs, in place of folders")
    parser.add_argument("--columns", default="", metavar="NAME=COLUMN,...", help="what the table calls its columns")
    parser.add_argument("--confidence", type=share, default=0.95, metavar="SHARE", help="of the intervals (default 0.95)")
    parser.add_argument("--resamples", type=positive, default=1000, metavar="N", help="of the bootstrap (default 1000)")
    parser.add_argument("--seed", type=count, default=0, metavar="N", help="of the bootstrap (default 0)")
    parser.add_argument(
        "--huber_delta", type=rate, default=1e-3, metavar="X", help="of the Huber loss in log loss (default 1e-3)"
    )


def numbers(text: str) -> tuple[float, ...]:
    """Numbers above 0, such as 7e10, with commas between."""
    found = tuple(float(part) for part in text.split(","))
    if not all(math.isfinite(number) and number > 0 for number in found):
        raise argparse.ArgumentTypeError(f"{text} must be numbers above 0")
    return found


# --- plan and run ---


def _plan(arguments: argparse.Namespace) -> Any:
    from gptjax.data.pipeline import Mixture, load_dataset
    from gptjax.scaling.family import load_family, make_plan
    from gptjax.sweeps.definition import Sweep, make_trials
    from gptjax.sweeps.space import Space

    family = load_family(arguments.file)
    first = Sweep(family.recipe, Space((dict(family.shapes[0]),)), overrides=family.overrides)
    config = make_trials(first, arguments.overrides)[0].config
    dataset = load_dataset(config, log)
    if isinstance(dataset.train, Mixture):
        raise UserError("gptjax scaling: a mixture has no one number of epochs; plan on a single source.")
    return make_plan(family, arguments.overrides, dataset.tokenizer.vocab_size, dataset.train.num_tokens, counted)


def counted(config: Config) -> Any:
    """The parameters of a config, by shapes alone."""
    from gptjax.scaling.observations import Counted
    from gptjax.train.counts import count_parameters

    return Counted(*count_parameters(config))


def plan(arguments: argparse.Namespace) -> int:
    from gptjax.scaling.prediction import describe
    from gptjax.scaling.report import plan_lines

    found = _plan(arguments)
    if arguments.json:
        held_out = describe(found.held_out) if found.held_out else None
        print_json({"runs": [describe(run) for run in found.runs], "held_out": held_out, "left_out": found.left_out})
    else:
        print("\n".join(plan_lines(found)))
    return 0


def run_family(arguments: argparse.Namespace) -> int:
    from gptjax.scaling import prediction

    folder = SweepFolder(pathlib.Path(required(arguments, "workdir")).resolve())
    found = _plan(arguments)
    trials = folder.settle_names(found.trials(arguments.overrides, held_out=True))
    last = trials[-1] if found.held_out else None
    if arguments.held_out:
        if last is None:
            raise UserError(f"the family {arguments.file} has no held_out run.")
        if prediction.read_prediction(folder.path, last.hash) is None:
            raise UserError(
                f"--held_out: the loss of {last.name} is not predicted yet; run `gptjax scaling predict {arguments.workdir}`."
            )
    folder.path.mkdir(parents=True, exist_ok=True)
    prediction.write_plan(folder, found, last, arguments.file)
    kept = trials if arguments.held_out or last is None else trials[:-1]
    return run_here(arguments, found.sweep(found.runs), folder, kept)


# --- fit and predict ---


def _observations(arguments: argparse.Namespace) -> tuple[Any, list[str]]:
    """(observations, why each other run is left out) of folders or a table; held-out runs are neither."""
    from gptjax.scaling import observations, prediction
    from gptjax.sweeps.groups import read_runs

    if bool(arguments.csv) == bool(arguments.folders):
        raise UserError("gptjax scaling needs either folders or --csv=FILE.")
    if arguments.csv:
        pairs = [part.partition("=") for part in arguments.columns.split(",") if part]
        return observations.read_csv(pathlib.Path(arguments.csv), {name: column for name, _, column in pairs}), []
    if arguments.columns:
        raise UserError("--columns is for --csv.")
    hidden = set().union(*(prediction.held_out_hashes(pathlib.Path(folder)) for folder in arguments.folders))
    runs = [run for run in read_runs(arguments.folders) if run.folder.name.rsplit("-", 1)[-1] not in hidden]
    return observations.of_runs(runs, counted)


def _fits(arguments: argparse.Namespace) -> tuple[Any, list[str]]:
    from gptjax.scaling.laws import Options, fit_all

    if not arguments.confidence < 1:
        raise UserError(f"--confidence={arguments.confidence} must be below 1.")
    if arguments.resamples < 100:
        raise UserError(f"--resamples={arguments.resamples}: quantiles of an interval need at least 100.")
    if not arguments.huber_delta > 0:
        raise UserError("--huber_delta must be above 0.")
    observations, left_out = _observations(arguments)
    options = Options(arguments.confidence, arguments.resamples, arguments.seed, arguments.huber_delta)
    return fit_all(observations, options), left_out


def fit(arguments: argparse.Namespace) -> int:
    from gptjax.scaling import prediction, report

    found, left_out = _fits(arguments)
    text = report.lines(found, left_out)
    predicted = outcome = None
    path = pathlib.Path(arguments.folders[0]) if arguments.folders else None
    if path is not None and (path / prediction.PLAN).exists() and (held_out := prediction.read_plan(path)["held_out"]):
        predicted = prediction.read_prediction(path, held_out["hash"])
        outcome = prediction.outcome(path, predicted) if predicted else None
        text += ["", *report.prediction_lines(predicted, outcome)] if predicted else []
    result = report.as_json(found, left_out) | {"prediction": predicted, "outcome": outcome}
    if arguments.out:
        _write(pathlib.Path(arguments.out), found, text, result)
    if arguments.json:
        print_json(result)
    else:
        print("\n".join(text))
    return 0


def _write(folder: pathlib.Path, found: Any, text: list[str], result: dict[str, Any]) -> None:
    from gptjax.scaling import observations, plots

    try:
        folder.mkdir(parents=True, exist_ok=True)
        observations.write_csv(folder / "points.csv", found.observations)
    except OSError as error:
        raise UserError(f"--out={folder} cannot be written: {error.strerror}.") from None
    write_json(folder / "fit.json", result)
    outcome = result["outcome"]
    try:
        drawn = plots.draw(folder, found, result["prediction"], outcome["loss"] if outcome else None)
    except UserError as error:
        drawn = []
        log(f"no figures: {error}")
    page = ["# Scaling laws", "", *_as_markdown(text), "", *(f"![{name}]({name})" for name in drawn)]
    (folder / "report.md").write_text("\n".join(page) + "\n", encoding="utf-8")
    log(f"wrote {', '.join(['report.md', 'fit.json', 'points.csv', *drawn])} to {folder}.")


def _as_markdown(text: list[str]) -> list[str]:
    """Paragraphs apart from tables."""
    lines: list[str] = []
    for line in text:
        if lines and lines[-1] and line and line.startswith("|") != lines[-1].startswith("|"):
            lines.append("")
        lines.append(line)
    return lines


def predict(arguments: argparse.Namespace) -> int:
    from gptjax.scaling import prediction, report

    if len(arguments.parameters) != len(arguments.tokens):
        raise UserError(
            f"--parameters has {len(arguments.parameters)} numbers and --tokens {len(arguments.tokens)}; give as many."
        )
    asked = arguments.parameters or arguments.flops
    if not asked and (arguments.csv or len(arguments.folders) != 1):
        raise UserError("gptjax scaling predict needs one family's folder, or --parameters and --tokens, or --flops.")
    path = pathlib.Path(arguments.folders[0]) if not asked else None
    if path is not None:
        prediction.read_plan(path)
    found, left_out = _fits(arguments)
    for reason in left_out:
        log(f"left out: {reason}")
    if path is not None:
        predicted = prediction.predict_held_out(path, found)
        outcome = prediction.outcome(path, predicted)
        text, result = report.prediction_lines(predicted, outcome), {"prediction": predicted, "outcome": outcome}
    else:
        text, result = _asked(arguments, found)
    if arguments.json:
        print_json(result)
    else:
        print("\n".join(text))
    return 0


def _asked(arguments: argparse.Namespace, found: Any) -> tuple[list[str], dict[str, Any]]:
    import numpy as np

    from gptjax.scaling import report
    from gptjax.scaling.laws import compute_optimal

    pairs = list(zip(arguments.parameters, arguments.tokens, strict=True))
    best = [compute_optimal(found.main, flops) for flops in arguments.flops]
    text = report.run_lines(found, arguments.parameters, arguments.tokens) if pairs else []
    text += ([""] if pairs and best else []) + (report.optimal_lines(found, arguments.flops) if best else [])
    sizes, tokens = (np.array(column, float) for column in zip(*pairs, *best, strict=True))
    losses = found.main.predict(sizes, tokens, found.options)
    rows = [
        {"parameters": float(size), "tokens": float(length)} | dataclasses.asdict(loss)
        for size, length, loss in zip(sizes, tokens, losses, strict=True)
    ]
    return text, {"predictions": rows}
