"""`gptjax predict`: what a fine-tuned model says of records, as a file."""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
from typing import Any

from gptjax.config import UserError
from gptjax.parallel import hosts
from gptjax.verbs.arguments import add_verb, count
from gptjax.verbs.output import log, plain, write_text


def add(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "predict",
        run,
        "What a fine-tuned model says of texts, of a file's records, or of the run's own evaluation split: a JSON object a line.",
        """examples:
  gptjax predict runs/spam "Free entry to win" "See you at six"
  gptjax predict runs/spam --data=new.tsv --config.task.columns=label,text --out=predictions.jsonl
  gptjax predict runs/spam --out=predictions.jsonl""",
        uses_devices=True,
    )
    parser.add_argument("workdir", metavar="RUN", help="a run's folder")
    parser.add_argument("texts", nargs="*", metavar="TEXT", help="texts; neither these nor --data: the evaluation split")
    parser.add_argument("--data", metavar="FILE", help="records, read as the run's own were")
    parser.add_argument("--format", default="", help="of --data; by default the run's, or where that is auto by the file's name")
    parser.add_argument("--task", default="", metavar="NAME", help="of a run with several")
    parser.add_argument("--out", metavar="FILE.jsonl", help="where to write; by default standard output")
    parser.add_argument("--step", type=count, metavar="N", help="a checkpoint's step; by default the newest intact one")
    parser.set_defaults(config=None)


def run(arguments: argparse.Namespace) -> int:
    from gptjax.tasks.predict import predictor_of
    from gptjax.tasks.table import TASKS
    from gptjax.train.restore import load_run
    from gptjax.verbs.arguments import run_config

    if arguments.texts and arguments.data:
        raise UserError("texts and --data are two sources of records; give one.")
    workdir, config = run_config(arguments)
    predictor = predictor_of(load_run(workdir, log, arguments.step, config), arguments.task)
    task, knobs = TASKS[predictor.knobs.kind], predictor.knobs
    names, records = _records(arguments, predictor)
    lines = []
    for name, judged in zip(names, predictor.predict_records(records), strict=True):
        row = {"id": str(judged.record.get("id", name)), "text": task.text(knobs, judged.record)} | task.row(knobs, judged)
        lines.append(json.dumps(plain(row), ensure_ascii=False, allow_nan=False))
    text = "\n".join(lines) + "\n"
    if not arguments.out:
        write_text(text)
    elif hosts.is_primary():
        try:
            pathlib.Path(arguments.out).write_text(text, encoding="utf-8")
        except OSError as error:
            raise UserError(f"--out={arguments.out} cannot be written: {error.strerror}.") from None
        print(f"{len(lines)} predictions in {arguments.out}.", file=sys.stderr)
    return 0


def _records(arguments: argparse.Namespace, predictor: Any) -> tuple[list[str], list[Any]]:
    """(names, records) of what is to be predicted."""
    from gptjax.tasks.load import load_tasks, read
    from gptjax.tasks.table import TASKS

    knobs = predictor.knobs
    if arguments.texts:
        return [str(number) for number in range(1, len(arguments.texts) + 1)], arguments.texts
    if arguments.data:
        found = read(knobs, arguments.data, "--data", TASKS[knobs.kind].given(knobs), log, arguments.format).records
    else:
        found = load_tasks(predictor.config, log, predictor.tokenizer).records["eval"][predictor.task]
    return [f"{record.file}:{record.line}" for record in found], [record.values for record in found]
