"""Built-in suites, which need a model and the suite's files. `SUITES` is the table of them.

Each gives scores by group with bootstrap intervals. `limit` takes the first so many examples of each file or paradigm; 0: all.
"""

from __future__ import annotations

import csv
import difflib
import io
import json
import pathlib
import re
import zipfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptjax.config import UserError
from gptjax.harness.intervals import Score, gap_score, mean_score, score_of
from gptjax.harness.likelihood import Likelihood


@dataclass(frozen=True)
class Suite:
    """`measure`: (likelihood, the path of its data, limit) -> scores, the overall ones first. Raises `UserError`."""

    measure: Callable[[Likelihood, pathlib.Path, int], list[Score]]
    summary: str
    data: str  # what the path is


# --- files --------------------------------------------------------------------------------------------------------------------


def _files(path: pathlib.Path, suffix: str) -> Iterator[tuple[str, str]]:
    """(name, text) of a file, or of the files with that ending in a folder or zip archive, in the order of their names."""
    try:
        if path.suffix == ".zip" and path.is_file():
            with zipfile.ZipFile(path) as archive:
                for name in sorted(name for name in archive.namelist() if name.endswith(suffix)):
                    yield f"{path}/{name}", archive.read(name).decode()
        else:
            places = sorted(path.rglob(f"*{suffix}")) if path.is_dir() else [path]
            for place in places:
                yield str(place), place.read_text(encoding="utf-8")
    except OSError as error:
        raise UserError(f"--data={path} cannot be read: {error.strerror or error}.") from None
    except (UnicodeDecodeError, zipfile.BadZipFile) as error:
        raise UserError(f"--data={path} cannot be read: {error}.") from None


def _json_lines(name: str, text: str, fields: Sequence[str], limit: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(text.splitlines(), 1):
        if not line.strip():
            continue
        if limit and len(rows) == limit:
            break
        try:
            row = json.loads(line)
            missing = [field for field in fields if not isinstance(row[field], str)]
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(f"{name}, line {number}: {type(error).__name__} {error}; it needs {', '.join(fields)}.") from None
        if missing:
            raise UserError(f"{name}, line {number}: {missing[0]} must be a text.")
        rows.append(row)
    return rows


def _table(name: str, text: str, fields: Sequence[str], dialect: str, limit: int = 0) -> list[dict[str, str]]:
    """Rows by the names in the first line."""
    quoting: Any = csv.QUOTE_NONE if dialect == "excel-tab" else csv.QUOTE_MINIMAL
    reader = csv.DictReader(io.StringIO(text, newline=""), dialect=dialect, quoting=quoting)
    absent = [field for field in fields if field not in (reader.fieldnames or [])]
    if absent:
        raise UserError(f"{name}: its first line has no column {absent[0]}.")
    rows = []
    for row in reader:
        if any(not row[field] for field in fields):
            raise UserError(f"{name}, line {reader.line_num}: a row needs {', '.join(fields)}.")
        rows.append(row)
    return rows[:limit] if limit else rows


def _nothing(path: pathlib.Path, what: str) -> UserError:
    return UserError(f"--data={path} holds {what}.")


def _totals(like: Likelihood, sentences: Sequence[str]) -> np.ndarray:
    """Log-probabilities [n] of whole sentences."""
    return np.array([scored.total for scored in like.of_pairs([("", sentence) for sentence in sentences])])


# --- BLiMP --------------------------------------------------------------------------------------------------------------------


def blimp(like: Likelihood, path: pathlib.Path, limit: int = 0) -> list[Score]:
    """Minimal pairs (Warstadt et al., 2020): how often the good sentence is likelier than the bad one; overall, by field, by
    phenomenon and by paradigm.

    A sentence stands behind a blank, and a tie counts for the good one, both as in lm-evaluation-harness; `ties` says how many.
    """
    rows = [
        row
        for name, text in _files(path, ".jsonl")
        for row in _json_lines(name, text, ("sentence_good", "sentence_bad", "UID"), limit)
    ]
    if not rows:
        raise _nothing(path, "no paradigm: a .jsonl file of pairs, a folder or a zip archive of such files")
    totals = _totals(like, [f" {row[kind]}" for row in rows for kind in ("sentence_good", "sentence_bad")]).reshape(-1, 2)
    correct = (totals[:, 0] >= totals[:, 1]).astype(float)
    scores = [mean_score("all", "accuracy", correct)]
    for kind, key in (("field", "field"), ("phenomenon", "linguistics_term"), ("paradigm", "UID")):
        for group, members in _grouped([row.get(key) for row in rows]).items():
            scores.append(mean_score(f"{kind} {group}", "accuracy", correct[members]))
    return [*scores, mean_score("all", "ties", (totals[:, 0] == totals[:, 1]).astype(float))]


def _grouped(keys: Sequence[Any]) -> dict[Any, list[int]]:
    """{key: where it stands}, in the order of their first places; None is no key."""
    groups: dict[Any, list[int]] = defaultdict(list)
    for number, key in enumerate(keys):
        if key is not None:
            groups[key].append(number)
    return groups


# --- LAMBADA ------------------------------------------------------------------------------------------------------------------


def lambada(like: Likelihood, path: pathlib.Path, limit: int = 0) -> list[Score]:
    """The last word of a passage (Paperno et al., 2016): how often greedy decoding writes it, and its perplexity a word."""
    rows = [row for name, text in _files(path, ".jsonl") for row in _json_lines(name, text, ("text",), limit)]
    if not rows:
        raise _nothing(path, 'no passage: lines of {"text": ...}')
    cuts = [row["text"].rpartition(" ") for row in rows]
    if short := [row["text"] for row, (before, _, word) in zip(rows, cuts, strict=True) if not before or not word]:
        raise UserError(f"--data={path}: {short[0][:60]!r} has no last word behind others.")
    scored = like.of_pairs([(before, f" {word}") for before, _, word in cuts])
    log_probs = np.array([[one.total] for one in scored])
    return [
        mean_score("all", "accuracy", [float(one.is_greedy) for one in scored]),
        score_of("all", "perplexity", log_probs, lambda totals, n: np.exp(-totals[..., 0] / n)),
    ]


# --- WinoGender ---------------------------------------------------------------------------------------------------------------

_PRONOUNS = {
    "male": ("he", "his", "him"),
    "female": ("she", "her", "hers"),
    "neutral": ("they", "their", "them"),
}


def winogender(like: Likelihood, path: pathlib.Path, limit: int = 0) -> list[Score]:
    """Whom a pronoun means, by its gender (Rudinger et al., 2018).

    `accuracy`: how often the right one of occupation and participant is likelier behind "SENTENCE 'Pronoun' refers to the", the
    question of lm-evaluation-harness; by gender, the gap of male and female, and, where the statistics of occupations stand
    beside the sentences, for "gotcha" sentences, in which the occupation's majority has the other gender than the answer needs.
    `female_preference`: how often the sentence with the female pronoun is likelier than the male one. `correlation` (Pearson's,
    over occupations) is of how much likelier it is with the share of women in the occupation.
    """
    name, text = _winogender_file(path)
    rows = [
        [*row["sentid"].split(".")[:4], row["sentence"]] for row in _table(name, text, ("sentid", "sentence"), "excel-tab", limit)
    ]
    if wrong := next((row for row in rows if len(row) < 5 or row[3] not in _PRONOUNS), None):
        raise UserError(f"{name}: {'.'.join(wrong[:-1])} is not OCCUPATION.PARTICIPANT.ANSWER.GENDER.txt.")
    correct = _pronoun_answers(like, rows)
    genders = np.array([row[3] for row in rows])
    scores = [mean_score("all", "accuracy", correct)]
    scores += [mean_score(gender, "accuracy", correct[genders == gender]) for gender in _PRONOUNS if gender in genders]
    places = {tuple(row[:4]): number for number, row in enumerate(rows)}
    pairs = np.array(
        [(n, places[(*key[:3], "female")]) for key, n in places.items() if key[3] == "male" and (*key[:3], "female") in places]
    )
    if len(pairs) == 0:
        return scores
    male, female = pairs.T
    scores.append(gap_score("male - female", "accuracy", correct[male], correct[female]))
    share_of_women = _occupations(pathlib.Path(name).parent)
    if share_of_women:
        scores += _gotcha(rows, correct, share_of_women)
    totals = _totals(like, [rows[number][4] for number in pairs.ravel()]).reshape(-1, 2)
    likelier = totals[:, 1] - totals[:, 0]
    scores.append(mean_score("all", "female_preference", (likelier > 0).astype(float)))
    if share_of_women:
        scores += _correlation([rows[number][0] for number in male], likelier, share_of_women)
    return scores


def _winogender_file(path: pathlib.Path) -> tuple[str, str]:
    for name, text in _files(path, "all_sentences.tsv"):
        return name, text
    raise _nothing(path, "no all_sentences.tsv")


def _pronoun_answers(like: Likelihood, rows: Sequence[Sequence[str]]) -> np.ndarray:
    """Whether each question is answered rightly, [n] of 0 and 1."""
    pairs = []
    for occupation, participant, _, gender, sentence in rows:
        words = re.findall(r"[a-z]+", sentence.lower())
        pronoun = next((word for word in words if word in _PRONOUNS[gender]), None)
        if pronoun is None:
            raise UserError(f"{sentence!r} has no {gender} pronoun.")
        question = f"{sentence} ‘{pronoun.capitalize()}’ refers to the"
        pairs += [(question, f" {occupation}"), (question, f" {participant}")]
    totals = np.array([scored.total for scored in like.of_pairs(pairs)]).reshape(-1, 2)
    answers = np.array([int(row[2]) for row in rows])  # 0: the occupation, 1: the participant
    return (totals.argmax(-1) == answers).astype(float)


def _occupations(folder: pathlib.Path) -> dict[str, float]:
    """{occupation: percent of women in it} by the Bureau of Labor Statistics; {} where the file is not there."""
    found = sorted(folder.glob("*occupations-stats.tsv"))
    if not found:
        return {}
    rows = _table(str(found[0]), found[0].read_text(encoding="utf-8"), ("occupation", "bls_pct_female"), "excel-tab")
    return {row["occupation"]: float(row["bls_pct_female"]) for row in rows}


def _gotcha(rows: Sequence[Sequence[str]], correct: np.ndarray, share_of_women: Mapping[str, float]) -> list[Score]:
    """Accuracy where the majority's gender misleads, and where it helps, and the gap."""
    kinds = []
    for occupation, _, answer, gender, _ in rows:
        majority = "female" if share_of_women.get(occupation, 0.0) > 50 else "male"
        is_known = occupation in share_of_women and gender != "neutral"
        kinds.append((gender == majority) == (answer == "1") if is_known else None)
    groups = {kind: np.array([own is kind for own in kinds]) for kind in (True, False)}
    if not all(group.any() for group in groups.values()):
        return []
    both = np.stack([groups[False] * correct, groups[False], groups[True] * correct, groups[True]], 1).astype(float)

    def gap(totals: np.ndarray, n: int) -> np.ndarray:
        right, of_right, wrong, of_wrong = np.moveaxis(totals, -1, 0)
        return right / np.maximum(of_right, 1) - wrong / np.maximum(of_wrong, 1)

    return [
        mean_score("gotcha", "accuracy", correct[groups[True]]),
        mean_score("not gotcha", "accuracy", correct[groups[False]]),
        score_of("not gotcha - gotcha", "accuracy", both[groups[True] | groups[False]], gap),
    ]


def _correlation(occupations: Sequence[str], likelier: np.ndarray, share_of_women: Mapping[str, float]) -> list[Score]:
    groups = [(share_of_women[key], likelier[own].mean()) for key, own in _grouped(occupations).items() if key in share_of_women]
    if len(groups) < 3:
        return []
    x, y = np.array(groups).T

    def pearson(totals: np.ndarray, n: int) -> np.ndarray:
        sx, sy, sxx, syy, sxy = np.moveaxis(totals, -1, 0) / n
        return (sxy - sx * sy) / np.sqrt(np.maximum((sxx - sx * sx) * (syy - sy * sy), 1e-300))

    x, y = x - x.mean(), y - y.mean()  # so that the sums lose no digits
    return [score_of("occupations", "correlation", np.stack([x, y, x * x, y * y, x * y], 1), pearson)]


# --- WinoBias -----------------------------------------------------------------------------------------------------------------


def winobias(like: Likelihood, path: pathlib.Path, limit: int = 0) -> list[Score]:
    """How often a sentence is likelier with the pronoun that the occupation's stereotype suggests than with the other (Zhao et
    al., 2018); 0.5 without bias. Of type 1 only the world tells whom the pronoun means, of type 2 the syntax does. By type and
    by the gender of the stereotype. Pairs that differ in more than their pronouns are left out.
    """
    files = dict(_files(path, ""))
    texts = {pathlib.PurePath(name).name: text for name, text in files.items()}
    pairs: list[tuple[str, str, str, str]] = []
    seen = 0
    for name, text in texts.items():
        if not name.startswith("pro_stereotyped_type"):
            continue
        other = "anti" + name.removeprefix("pro")
        if other not in texts:
            raise UserError(f"--data={path} has {name}, but not {other}.")
        kind = name.removeprefix("pro_stereotyped_").partition(".")[0]
        lines = [own.splitlines()[: limit or None] for own in (text, texts[other])]
        if len(lines[0]) != len(lines[1]):
            raise UserError(f"--data={path}: {name} has {len(lines[0])} lines and {other} {len(lines[1])}; they go in pairs.")
        found = [_winobias_pair(*own) for own in zip(*lines, strict=True)]
        pairs += [(kind, *pair) for pair in found if pair]
        seen += len(found)
    if not pairs:
        raise _nothing(path, "no pro_stereotyped_type1.txt.* and the like")
    if len(pairs) < seen:
        like.log(f"{seen - len(pairs)} of {seen} pairs differ in more than their pronouns, and are left out.")
    totals = _totals(like, [sentence for pair in pairs for sentence in pair[2:]]).reshape(-1, 2)
    likelier = (totals[:, 0] > totals[:, 1]).astype(float)
    scores = [mean_score("all", "stereotype_preference", likelier)]
    for column, names in ((0, sorted({pair[0] for pair in pairs})), (1, ["male", "female"])):
        for name in names:
            own = np.array([pair[column] == name for pair in pairs])
            if own.any():
                scores.append(mean_score(name, "stereotype_preference", likelier[own]))
    return scores


def _winobias_pair(pro: str, anti: str) -> tuple[str, str, str] | None:
    """(gender of the stereotype, the sentence with its pronoun, the sentence with the other); None where more differs."""
    sentences = [re.sub(r"[\[\]]", "", re.sub(r"^\s*\d+\s+", "", line)).strip() for line in (pro, anti)]
    words = [re.findall(r"\w+", sentence.lower()) for sentence in sentences]
    changed = [pair for pair in zip(*words, strict=False) if pair[0] != pair[1]]
    genders = {word: gender for gender in ("male", "female") for word in _PRONOUNS[gender]}
    if len(words[0]) != len(words[1]) or not changed or any(word not in genders for pair in changed for word in pair):
        return None
    return genders[changed[0][0]], sentences[0], sentences[1]


# --- CrowS-Pairs --------------------------------------------------------------------------------------------------------------


def crows_pairs(like: Likelihood, path: pathlib.Path, limit: int = 0) -> list[Score]:
    """How often the more stereotyping sentence of a pair is likelier (Nangia et al., 2020); 0.5 without bias. Overall, by what
    the pair is about, and for stereotypes and anti-stereotypes.

    `full`: by the log-probability of the whole sentence, as in lm-evaluation-harness. `shared`: of the tokens that both sentences
    have, after all before them: their pseudo-log-likelihood, as far as a model that reads from the left has one. `difference` is
    the mean size of the difference in the former, in nats.
    """
    fields = ("sent_more", "sent_less", "stereo_antistereo", "bias_type")
    rows = [row for name, text in _files(path, ".csv") for row in _table(name, text, fields, "excel", limit)]
    if not rows:
        raise _nothing(path, "no pair")
    pairs = [like.encode_pair("", row[field]) for row in rows for field in fields[:2]]
    scored = like.of_ids(pairs)
    full, shared = np.zeros((2, len(rows), 2))
    for number in range(len(rows)):
        (_, first), (_, second) = pairs[2 * number : 2 * number + 2]
        own = scored[2 * number : 2 * number + 2]
        same = difflib.SequenceMatcher(None, first.tolist(), second.tolist(), autojunk=False).get_matching_blocks()
        for side, starts in enumerate(([block.a for block in same], [block.b for block in same])):
            places = [place for start, block in zip(starts, same, strict=True) for place in range(start, start + block.size)]
            full[number, side], shared[number, side] = own[side].total, own[side].log_probs[places].sum(dtype=np.float64)
    scores = []
    groups = {"all": list(range(len(rows)))} | _grouped([row["bias_type"] for row in rows])
    groups |= _grouped([row["stereo_antistereo"] for row in rows])
    for group, members in groups.items():
        for metric, totals in (("full", full), ("shared", shared)):
            preferred = totals[members, 0] > totals[members, 1]
            scores.append(mean_score(group, f"stereotype_preference_{metric}", preferred.astype(float)))
    return [*scores, mean_score("all", "difference", np.abs(full[:, 0] - full[:, 1]))]


SUITES: dict[str, Suite] = {
    "blimp": Suite(blimp, "grammatical minimal pairs", "a zip archive or a folder of .jsonl paradigms"),
    "lambada": Suite(lambada, "the last word of passages", 'a file of {"text": ...} lines'),
    "winogender": Suite(
        winogender, "pronouns and occupations", "all_sentences.tsv, or the folder of it and occupations-stats.tsv"
    ),
    "winobias": Suite(winobias, "stereotyped pronouns", "the folder of pro_ and anti_stereotyped_type1.txt.dev and the like"),
    "crows_pairs": Suite(crows_pairs, "stereotyping sentence pairs", "crows_pairs_anonymized.csv"),
}
