"""`gptjax attack`: how far a classifier's answers stand up to small changes of its texts."""

from __future__ import annotations

import argparse
import contextlib
import json
import pathlib
from collections.abc import Iterator
from typing import Any, TextIO

from gptjax.config import UserError
from gptjax.verbs.arguments import add_verb, count, positive, required
from gptjax.verbs.output import log, plain, print_json


def add(verbs: Any) -> None:
    from gptjax.attacks.recipes import RECIPES

    parser = add_verb(
        verbs,
        "attack",
        run,
        "Accuracy of a classification run before and under an attack on its texts.",
        f"""recipes: {", ".join(RECIPES)}

examples:
  gptjax attack runs/spam --data=sms_test.tsv --recipe=deepwordbug --max_examples=200 --out=attacked.jsonl
  gptjax attack runs/spam --data=sms.tsv --columns=label,text --recipe=synonyms --synonyms=words.tsv""",
        uses_devices=True,
    )
    parser.add_argument("run_folder", metavar="RUN", help="the folder of a run that was trained to classify")
    parser.add_argument("--data", metavar="FILES", help="labelled texts; paths and globs with commas between")
    parser.add_argument("--format", default="auto", help="jsonl, csv, tsv or folders; by default, by the files' endings")
    parser.add_argument("--columns", default="", metavar="NAMES", help="of a CSV or TSV file without a header, commas between")
    parser.add_argument("--text_field", default="text", metavar="NAME")
    parser.add_argument("--label_field", default="label", metavar="NAME")
    parser.add_argument("--max_bad", type=count, default=0, metavar="N", help="bad rows of the files that may be skipped")
    parser.add_argument("--recipe", metavar="NAME", help="the attack")
    parser.add_argument("--target", metavar="LABEL", help="the answer that the attack wants; by default, any wrong one")
    parser.add_argument("--synonyms", metavar="FILE", help="lines of a word and its substitutes, tabs between")
    parser.add_argument("--vectors", metavar="FILE", help="word vectors as text, whose nearest words are substitutes")
    parser.add_argument("--max_examples", type=positive, metavar="N", help="attack so many texts, drawn by --seed")
    parser.add_argument("--max_queries", type=count, default=0, metavar="N", help="of the model for one text; 0 is no limit")
    parser.add_argument("--batch_size", type=positive, default=64, metavar="N", help="texts that the model sees at a time")
    parser.add_argument("--seed", type=count, default=0, metavar="N")
    parser.add_argument("--out", metavar="FILE.jsonl", help="write what became of each text, a line each")


def run(arguments: argparse.Namespace) -> int:
    from gptjax.attacks import summary
    from gptjax.attacks.attack import as_json, run_attack
    from gptjax.attacks.recipes import find_recipe
    from gptjax.data.records import read_records
    from gptjax.measures import measured
    from gptjax.parallel import hosts

    recipe = find_recipe(required(arguments, "recipe"))
    lexicon = _lexicon(arguments)
    records = read_records(
        required(arguments, "data"),
        arguments.format,
        max_bad=arguments.max_bad,
        limit_key="--max_bad",
        required=(arguments.text_field, arguments.label_field),
        columns=tuple(filter(None, arguments.columns.split(","))),
        key="--data",
        log=log,
    )
    with _writer(arguments.out if hosts.is_primary() else None) as out:
        from gptjax.tasks.predict import load_predictor

        predictor = load_predictor(arguments.run_folder)
        results = run_attack(
            predictor.predict_proba,
            [str(label) for label in predictor.labels],
            records.records,
            recipe,
            text_field=arguments.text_field,
            label_field=arguments.label_field,
            target=arguments.target,
            seed=arguments.seed,
            max_examples=arguments.max_examples,
            max_queries=arguments.max_queries,
            batch_size=arguments.batch_size,
            lexicon=lexicon,
            log=log,
        )
        if out:
            out.writelines(json.dumps(plain(as_json(result)), ensure_ascii=False) + "\n" for result in results)
    figures = summary.summary(results)
    if arguments.json:
        about = {"recipe": arguments.recipe, "seed": arguments.seed, "target": arguments.target}
        print_json(about | {"figures": measured.as_json(figures)})
    elif hosts.is_primary():
        print("\n".join(filter(None, (summary.table(figures), summary.examples(results)))))
    return 0


def _lexicon(arguments: argparse.Namespace) -> Any:
    from gptjax.attacks.lexicon import read_synonyms, read_vectors

    if arguments.synonyms and arguments.vectors:
        raise UserError("--synonyms and --vectors are two lexicons; give one.")
    if arguments.synonyms:
        return read_synonyms(arguments.synonyms)
    return read_vectors(arguments.vectors) if arguments.vectors else None


@contextlib.contextmanager
def _writer(path: str | None) -> Iterator[TextIO | None]:
    """The file for --out, opened before the work, so that a wrong path costs none of it."""
    if path is None:
        yield None
        return
    try:
        file = pathlib.Path(path).open("w", encoding="utf-8")  # noqa: SIM115 - the block below closes it
    except OSError as error:
        raise UserError(f"--out={path} cannot be written: {error.strerror}.") from None
    with file:
        yield file
