"""`gptjax analyze`: what predictions get wrong, and where, as one page."""

from __future__ import annotations

import argparse
import pathlib
import sys
from typing import Any

from gptjax.config import UserError
from gptjax.verbs.arguments import add_verb, positive, share
from gptjax.verbs.output import print_json


def add(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "analyze",
        run,
        "Analyze predictions: confusion, slices, worst examples, calibration and train-test leaks, as one HTML page.",
        """example:
  gptjax analyze predictions.jsonl --train=train.jsonl --out=page.html
  gptjax analyze predictions.jsonl --pattern='a price=[$£€]\\d' --json

PREDICTIONS has a JSON object a line:
  {"id": "17", "text": "...", "gold": "spam", "predicted": "ham", "probabilities": {"ham": 0.93, "spam": 0.07}}
id and probabilities may be left out; gold may be a list of strings, any of which is right; a "score" from 0 to 1 on every line
takes the place of right and wrong. --train has objects with "text" and perhaps "gold", or is a .txt of a text a line; a test
text counts as leaked where the Jaccard similarity of 5-character shingles with a training text reaches --similarity.

The page needs no network and no script; it follows the reader's light or dark, and prints.""",
    )
    parser.add_argument("predictions", metavar="PREDICTIONS.jsonl", help="texts, gold and predicted labels, probabilities")
    parser.add_argument("--train", metavar="FILE", help="training texts, for the leak report (.jsonl or .txt)")
    parser.add_argument("--out", metavar="FILE.html", help="the page (default: PREDICTIONS.html, beside the file)")
    parser.add_argument("--title", metavar="TEXT", help="of the page (default: the file's name)")
    parser.add_argument(
        "--pattern", action="append", default=[], metavar="NAME=REGEX", help="one more slice: the texts that REGEX is found in"
    )
    parser.add_argument("--similarity", type=share, default=0.8, metavar="SHARE", help="of a leaked text (default 0.8)")
    parser.add_argument("--resamples", type=positive, default=1000, metavar="N", help="of the intervals (default 1000)")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the resamples (default 0)")


def run(arguments: argparse.Namespace) -> int:
    from gptjax.analysis.findings import analyse, findings_json
    from gptjax.analysis.page import page
    from gptjax.analysis.predictions import read_predictions, read_train
    from gptjax.analysis.slices import PATTERNS
    from gptjax.measures.bootstrap import Bootstrap
    from gptjax.measures.measured import table

    if arguments.resamples < 2:
        raise UserError(f"--resamples={arguments.resamples} must be at least 2.")
    patterns = PATTERNS | dict(_pattern(text) for text in arguments.pattern)
    path = pathlib.Path(arguments.predictions)
    out = pathlib.Path(arguments.out or path.with_suffix(".html"))
    if out == path:
        raise UserError(f"--out={out} is the file of predictions.")
    predictions = read_predictions(path)
    train = read_train(arguments.train) if arguments.train else None
    bootstrap = Bootstrap(resamples=arguments.resamples, seed=arguments.seed)
    findings = analyse(predictions, train, patterns, arguments.similarity, bootstrap)
    try:
        out.write_text(page(arguments.title or path.name, findings, predictions, train), encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"--out={out} cannot be written: {error.strerror}.") from None
    print(f"wrote {out}", file=sys.stderr)
    if arguments.json:
        print_json(findings_json(findings))
    else:
        print("\n".join(table(findings.summary)))
    return 0


def _pattern(text: str) -> tuple[str, str]:
    name, equals, pattern = text.partition("=")
    if not (name and equals and pattern):
        raise UserError(f"--pattern={text} is not NAME=REGEX.")
    return name, pattern
