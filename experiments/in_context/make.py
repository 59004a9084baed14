"""Episodes in which letters stand for labels by a rule that only the episode itself tells.

    python experiments/in_context/make.py --out=runs/in_context/data

The letters a to h are of four kinds, fixed for good: ae, bf, cg, dh. An episode draws which of the labels
0, 1, 2, 3 each kind has, one each (24 ways), and is a line of pairs of a letter and its label: "c3a0g3...". Whoever has seen a
kind's label once knows it; before, nothing tells it. Which letters are of one kind stands nowhere: it is learnt in training.

Writes train.jsonl (an episode a line) and test_K.jsonl for K = 0, 1, 2, 4, 8: {"prompt", "completion"}, each kind among the K
examples as often as the others, as far as K allows: for K = 8 twice.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import random

KINDS, LETTERS, PAIRS, SHOTS = 4, "abcdefgh", 24, (0, 1, 2, 4, 8)


def letter(rng: random.Random, kind: int) -> str:
    return LETTERS[kind + KINDS * rng.randrange(len(LETTERS) // KINDS)]


def labels(rng: random.Random) -> list[str]:
    return rng.sample([str(label) for label in range(KINDS)], KINDS)


def pairs(rng: random.Random, of_kind: list[str], kinds: list[int]) -> list[str]:
    return [letter(rng, kind) + of_kind[kind] for kind in kinds]


def shuffled_kinds(rng: random.Random, count: int) -> list[int]:
    """Each kind as often as the others, as far as the count allows, in random order."""
    whole, rest = divmod(count, KINDS)
    kinds = list(range(KINDS)) * whole + rng.sample(range(KINDS), rest)
    rng.shuffle(kinds)
    return kinds


def episode(rng: random.Random) -> str:
    """In every other episode some kinds come more often than others: a model that has learnt to repeat the labels that are
    frequent is on its way, and where all kinds come alike there is nothing to be learnt before all of it is.
    """
    power = rng.choice((0, 2))
    shares = [rng.expovariate(1.0) ** power for _ in range(KINDS)]
    return "".join(pairs(rng, labels(rng), rng.choices(range(KINDS), shares, k=PAIRS)))


def test(rng: random.Random, shots: int) -> dict[str, str]:
    of_kind = labels(rng)
    query = rng.randrange(KINDS)
    shown = pairs(rng, of_kind, shuffled_kinds(rng, shots))
    return {"prompt": "".join([*shown, letter(rng, query)]), "completion": of_kind[query]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--episodes", type=int, default=60_000)
    parser.add_argument("--tests", type=int, default=1000, help="of each number of shots")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(f"train {arguments.seed}")
    lines = [episode(rng) for _ in range(arguments.episodes)]
    (arguments.out / "train.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    for shots in SHOTS:
        rng = random.Random(f"test {shots} {arguments.seed}")
        rows = [test(rng, shots) for _ in range(arguments.tests)]
        (arguments.out / f"test_{shots}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


if __name__ == "__main__":
    main()
