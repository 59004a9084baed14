"""Public data sets as training and test files of one form each, and the text that the small GPT is pre-trained on.

    python experiments/fine_tuning/prepare.py --data=DIR --out=runs/fine_tuning/data

DIR holds sms_spam, movie_reviews, csl, xquad, e2e_nlg and dialogue (README.md says where they are from). What is tested on is in
no training file and not in the text of pre-training: records are divided by a hash of what belongs together (a message, a review,
an article, a meaning), so that equal ones are on one side.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import io
import json
import pathlib
import re
import zipfile
from collections.abc import Callable, Iterable, Iterator

Record = dict[str, object]
TEST_SHARE = 0.2


def is_test(key: str) -> bool:
    digest = hashlib.blake2b(" ".join(key.lower().split()).encode(), digest_size=8).digest()
    return int.from_bytes(digest) < TEST_SHARE * 2**64


def sms(data: pathlib.Path) -> Iterator[tuple[bool, Record]]:
    for line in (data / "sms_spam" / "sms.tsv").read_text(encoding="utf-8").splitlines():
        label, _, text = line.partition("\t")
        yield is_test(text), {"text": text, "label": label}


def movie_reviews(data: pathlib.Path) -> Iterator[tuple[bool, Record]]:
    with zipfile.ZipFile(data / "movie_reviews" / "movie_reviews.zip") as archive:
        for name in sorted(archive.namelist()):
            if name.endswith(".txt") and name.count("/") == 2:
                text = " ".join(archive.read(name).decode("utf-8", "replace").split())
                yield is_test(text), {"text": text, "label": name.split("/")[1]}


def subjectivity(data: pathlib.Path) -> Iterator[tuple[bool, Record]]:
    with zipfile.ZipFile(data / "movie_reviews" / "subjectivity.zip") as archive:
        for name, label in (("plot.tok.gt9.5000", "objective"), ("quote.tok.gt9.5000", "subjective")):
            for text in archive.read(f"subjectivity/{name}").decode("latin-1").splitlines():
                if text.strip():
                    yield is_test(text), {"text": text.strip(), "label": label}


def csl(data: pathlib.Path) -> Iterator[tuple[bool, Record]]:
    """The division is the data set's own."""
    for part, test in (("train", False), ("dev", True)):
        for line in (data / "csl" / f"category_{part}.tsv").read_text(encoding="utf-8").splitlines():
            _, title, category = line.split("\t")
            yield test, {"text": title, "label": category}


def articles(data: pathlib.Path, language: str) -> Iterator[tuple[bool, dict]]:
    """Articles of SQuAD's development set, whole; the same ones are tested on in both languages."""
    found = json.loads((data / "xquad" / f"xquad.{language}.json").read_text(encoding="utf-8"))["data"]
    for number, article in enumerate(found):
        yield number % 4 == 3, article


def meanings(data: pathlib.Path) -> Iterator[tuple[bool, Record]]:
    with open(data / "e2e_nlg" / "devel-fixed.no-ol.csv", encoding="utf-8", newline="") as file:
        references: dict[str, list[str]] = {}
        for row in csv.DictReader(file):
            references.setdefault(row["mr"], []).append(row["ref"])
    for meaning, texts in references.items():
        yield is_test(meaning), {"meaning": meaning, "texts": texts}


def conversations(data: pathlib.Path, language: str = "english") -> Iterator[tuple[bool, Record]]:
    """The files are lists of lists of turns, in a part of YAML small enough to be read by hand."""
    for path in sorted((data / "dialogue" / language).glob("*.yml")):
        turns: list[str] = []
        found = []
        lines = path.read_text(encoding="utf-8").splitlines()
        for line in lines[lines.index("conversations:") + 1 :]:
            if begins := re.match(r"- - (.*)", line):
                found.append(turns)
                turns = [begins[1]]
            elif goes_on := re.match(r"  - (.*)", line):
                turns.append(goes_on[1])
            elif turns and line.startswith("    "):
                turns[-1] += " " + line.strip()
        for conversation in [*found[1:], turns]:
            texts = [text.strip().strip("'\"").strip() for text in conversation]
            if len(texts) > 1 and all(texts):
                roles = ("user", "assistant")
                messages = [{"role": roles[n % 2], "content": text} for n, text in enumerate(texts)]
                yield is_test(texts[0]), {"messages": messages}


def tagged(record: Record) -> Iterator[tuple[list[str], list[str]]]:
    """(words, BIO tags) of each text of a meaning: where a slot's value stands in the text word by word, it is an entity of the
    slot's kind. Values that are said in other words have no tag, so these labels are not a person's.
    """
    slots = dict(re.findall(r"(name|near|food|area|priceRange|eatType)\[([^\]]*)\]", str(record["meaning"])))
    for text in record["texts"]:  # type: ignore[attr-defined]
        words = re.findall(r"\w+(?:[-'£]\w+)*|£|\S", text)
        tags = ["O"] * len(words)
        lower = [word.lower() for word in words]
        for slot, value in sorted(slots.items(), key=lambda item: -len(item[1])):
            wanted = [word.lower() for word in re.findall(r"\w+(?:[-'£]\w+)*|£|\S", value)]
            for at in range(len(words) - len(wanted) + 1):
                if lower[at : at + len(wanted)] == wanted and all(tag == "O" for tag in tags[at : at + len(wanted)]):
                    tags[at : at + len(wanted)] = [f"B-{slot}"] + [f"I-{slot}"] * (len(wanted) - 1)
        yield words, tags


# --- files -------------------------------------------------------------------------------------------------------------------


def write_lines(path: pathlib.Path, lines: Iterable[str]) -> None:
    kept = list(lines)
    path.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    print(f"{path}: {len(kept):,} records")


def divided(records: Iterable[tuple[bool, Record]]) -> dict[str, list[Record]]:
    parts: dict[str, list[Record]] = {"train": [], "test": []}
    for test, record in records:
        parts["test" if test else "train"].append(record)
    return parts


def write_jsonl(out: pathlib.Path, name: str, parts: dict[str, list[Record]]) -> None:
    for part, records in parts.items():
        write_lines(out / f"{name}_{part}.jsonl", (json.dumps(record, ensure_ascii=False) for record in records))


SIMPLE: dict[str, Callable[[pathlib.Path], Iterator[tuple[bool, Record]]]] = {
    "sms_spam": sms,
    "movie_reviews": movie_reviews,
    "subjectivity": subjectivity,
    "csl": csl,
    "dialogue": conversations,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--data", type=pathlib.Path, required=True)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    arguments = parser.parse_args()
    data, out = arguments.data, arguments.out
    out.mkdir(parents=True, exist_ok=True)
    texts: list[str] = []  # to pre-train on
    for name, read in SIMPLE.items():
        parts = divided(read(data))
        write_jsonl(out, name, parts)
        texts += [_plain(record) for record in parts["train"]]
    e2e = divided(meanings(data))
    write_jsonl(out, "e2e", e2e)
    texts += [f"{record['meaning']}\n{text}" for record in e2e["train"] for text in record["texts"]]  # type: ignore[attr-defined]
    for part, records in e2e.items():
        rows = (pair for record in records for pair in tagged(record))
        text = io.StringIO()
        for words, tags in rows:
            text.write("".join(f"{word} {tag}\n" for word, tag in zip(words, tags, strict=True)) + "\n")
        (out / f"slots_{part}.conll").write_text(text.getvalue(), encoding="utf-8")
    for language in ("en", "zh"):
        found: dict[bool, list[dict]] = {False: [], True: []}
        for test, article in articles(data, language):
            found[test].append(article)
        for test, part in ((False, "train"), (True, "test")):
            squad = {"version": "1.1", "data": found[test]}
            (out / f"xquad_{language}_{part}.json").write_text(json.dumps(squad, ensure_ascii=False), encoding="utf-8")
        texts += [p["context"] for article in found[False] for p in article["paragraphs"]]
    write_lines(out / "pretrain.jsonl", (json.dumps({"text": text}, ensure_ascii=False) for text in texts))


def _plain(record: Record) -> str:
    if "messages" in record:
        return "\n".join(message["content"] for message in record["messages"])  # type: ignore[attr-defined]
    return str(record["text"])


if __name__ == "__main__":
    main()
