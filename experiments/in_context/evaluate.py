"""Accuracy over the number of examples in the context: the label that the model finds most likely, of all labels.

python experiments/in_context/evaluate.py runs/in_context/run --data=runs/in_context/data
"""

from __future__ import annotations

import argparse
import json
import pathlib

import numpy as np

import gptjax
from gptjax.harness.intervals import mean_score, table
from gptjax.harness.likelihood import Likelihood


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("run", type=pathlib.Path)
    parser.add_argument("--data", type=pathlib.Path, required=True)
    arguments = parser.parse_args()
    likelihood = Likelihood(gptjax.load(arguments.run), batch_size=64)
    scores = []
    for path in sorted(arguments.data.glob("test_*.jsonl"), key=lambda path: int(path.stem.removeprefix("test_"))):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        labels = sorted({row["completion"] for row in rows})
        found = likelihood.of_pairs([(row["prompt"], label) for row in rows for label in labels])
        best = np.asarray([one.total for one in found]).reshape(len(rows), len(labels)).argmax(1)
        right = [labels[at] == row["completion"] for at, row in zip(best, rows, strict=True)]
        scores.append(mean_score(f"k={path.stem.removeprefix('test_')}", "accuracy", np.asarray(right, float)))
    print(table(scores))


if __name__ == "__main__":
    main()
