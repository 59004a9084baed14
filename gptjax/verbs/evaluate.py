"""`gptjax evaluate`: the loss over a whole split, tasks of lm-evaluation-harness, built-in suites, few-shot tables."""

from __future__ import annotations

import argparse
import functools
import pathlib
from typing import Any

from gptjax.config import Config, ObjectiveConfig, UserError, from_json, tasks_of
from gptjax.config.objective import loss_refusal
from gptjax.parallel import hosts
from gptjax.verbs import scoring
from gptjax.verbs.arguments import add_run, add_verb, run_config
from gptjax.verbs.output import log, print_json


def add(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "evaluate",
        run,
        "Loss, perplexity and bits per byte over the whole evaluation split, or a task's measures beside a baseline's; "
        "or scores of tasks, suites or few-shot prompts.",
        """examples:
  gptjax evaluate --workdir=runs/shakespeare --config.evaluate.batch_size=64 --json
  gptjax evaluate --workdir=runs/ul2 --objective=causal
  gptjax evaluate runs/a --tasks=lambada_openai,arc_easy --num_fewshot=5
  gptjax evaluate runs/a --tasks=mine --include_path=task_files --limit=100
  gptjax evaluate runs/a --suite=blimp --data=blimp.zip
  gptjax evaluate runs/a --few_shot=reviews.json""",
        uses_devices=True,
    )
    parser.add_argument("folder", nargs="?", metavar="RUN", help="short for --workdir=RUN")
    add_run(parser)
    scoring.add_arguments(parser)
    parser.add_argument(
        "--objective",
        choices=ObjectiveConfig.__dataclass_fields__["name"].metadata["choices"],
        help="whose loss it is, of those that the model was trained for; by default the run's own",
    )
    parser.add_argument(
        "--weights",
        choices=("bfloat16", "int8"),
        help="also the loss with weights stored as generation may store them, and what that costs",
    )


def run(arguments: argparse.Namespace) -> int:
    if arguments.folder is not None:
        if arguments.workdir:
            raise UserError(f"{arguments.folder} and --workdir={arguments.workdir} are both given; keep one.")
        arguments.workdir = arguments.folder
    if scoring.is_asked_for(arguments):
        return scoring.run(arguments)
    if arguments.objective:
        arguments.overrides = [*arguments.overrides, f"objective.name={arguments.objective}"]
    workdir, config = run_config(arguments)
    if tasks_of(config):
        return _tasks(arguments, workdir, config)
    from gptjax.data.mixture import describe
    from gptjax.data.reserved import text_tokenizer
    from gptjax.generate.weights import check, rounded
    from gptjax.parallel.mesh import make_mesh
    from gptjax.train.evaluate import by_source, evaluate
    from gptjax.train.loop import load_data
    from gptjax.train.restore import load_run

    model = load_run(workdir, log, arguments.step, config)
    trained = from_json(workdir / "config.json").objective
    if refusal := loss_refusal(trained, config.objective):
        raise UserError(f"{workdir}: {refusal}")
    dataset = load_data(config, log, own=model.tokenizer)
    if dataset.text_tokenizer.encoding_fingerprint != text_tokenizer(model.tokenizer).encoding_fingerprint:
        raise UserError(
            f"the tokenizer that data.tokenizer={config.data.tokenizer} gives is not the one that {workdir} was trained with."
        )
    mesh = make_mesh(config.mesh)
    if arguments.weights:
        check(config.model, arguments.weights)
    name = config.objective.name
    figures: dict[str, Any] = evaluate(config, model.params, dataset, mesh) | {"objective": name, "step": model.step}
    if arguments.weights:
        stored = rounded(model.params, config.model, arguments.weights)
        figures[arguments.weights] = _beside(figures, evaluate(config, stored, dataset, mesh))
    if arguments.json:
        print_json(figures)
    elif hosts.is_primary():
        kind = "" if name == "causal" else f"{name} "
        bits = f"{figures['bits_per_byte']:.4f} bits per byte " if "bits_per_byte" in figures else ""
        print(
            f"step {figures['step']}: {kind}loss {figures['loss']:.4f} nats a token, "
            f"perplexity {figures['perplexity']:.3f}, {bits}over {figures['tokens']} tokens ({figures['bytes']} bytes)"
        )
        if sources := by_source(figures):
            print(describe(sources))
        if arguments.weights:
            other = figures[arguments.weights]
            print(
                f"weights in {arguments.weights}: loss {other['loss']:.4f} ({other['loss_difference']:+.6f}), "
                f"perplexity {other['perplexity']:.3f} ({other['perplexity_difference']:+.5f})"
            )
    return 0


def _tasks(arguments: argparse.Namespace, workdir: pathlib.Path, config: Config) -> int:
    """The measures of a run's tasks with their intervals (95 %, by resampling records), and those of baselines."""
    from gptjax.measures.bootstrap import Bootstrap
    from gptjax.measures.measured import as_json
    from gptjax.parallel.mesh import make_mesh
    from gptjax.tasks.report import reports
    from gptjax.train.loop import load_data
    from gptjax.train.reference import with_reference
    from gptjax.train.restore import load_run
    from gptjax.train.task_evaluation import evaluate_tasks

    for name in ("objective", "weights"):
        if getattr(arguments, name):
            raise UserError(f"--{name} is of models of text, and {workdir} was trained for a task.")
    model = load_run(workdir, log, arguments.step, config)
    dataset = load_data(config, log, own=model.tokenizer)
    mesh = make_mesh(config.mesh)
    dataset = with_reference(config, dataset, workdir, mesh, functools.partial(_no_reference, workdir), log)  # type: ignore[arg-type]
    figures, judged = evaluate_tasks(config, model.params, dataset, mesh)
    found = reports(config, dataset, judged, Bootstrap())
    if arguments.json:
        tables = {
            name: {
                "measures": as_json(report.measured),
                "baselines": {baseline: as_json(measured) for baseline, measured in report.baselines.items()},
                "differences": {baseline: as_json(measured) for baseline, measured in report.ahead.items()},
            }
            for name, report in found.items()
        }
        print_json(figures | {"step": model.step, "tasks": tables})
    elif hosts.is_primary():
        for name, report in found.items():
            loss = figures[f"{name}/loss"] if len(found) > 1 else figures["loss"]
            print(f"step {model.step}: {name if len(found) > 1 else tasks_of(config)[name].kind}: loss {loss:.4f}")
            print("\n".join(report.lines()))
    return 0


def _no_reference(workdir: pathlib.Path) -> Any:
    raise UserError(f"{workdir} has no reference.npz, what its initial model said: a preference cannot be judged without it.")


def _beside(figures: dict[str, Any], others: dict[str, Any]) -> dict[str, Any]:
    """Loss and perplexity of `others`, and how much higher they are than those of `figures`."""
    names = ("loss", "perplexity")
    return {name: others[name] for name in names} | {f"{name}_difference": others[name] - figures[name] for name in names}
