"""Exact match and F1 of answers to questions, 0 to 100, as the field's evaluation scripts count them.

Three ways to normalise and cut an answer into tokens, in the table NORMALISERS:
- squad: lower case, no ASCII punctuation, no English articles, words between white space (P. Rajpurkar et al., EMNLP 2016).
  XQuAD is scored so too. Chinese without spaces is one token by it: F1 is then hardly more than exact match.
- mlqa: Unicode punctuation goes, articles only in English; a Chinese character is a token of its own, the rest words between
  white space: mixed segmentation (P. Lewis et al., ACL 2020).
- cmrc: mixed segmentation with the Chinese punctuation of CMRC; F1 is of the longest common run of tokens, not of a bag of
  them (Y. Cui et al., EMNLP 2019). Its script cuts Latin text by NLTK; here a word is a run of letters and digits, and a mark
  that is left a token.
"""

from __future__ import annotations

import collections
import dataclasses
import re
import string
import unicodedata
from collections.abc import Callable, Sequence

from gptjax.config import UserError
from gptjax.measures.bootstrap import Bootstrap, mean_of
from gptjax.measures.measured import Measured, measure

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_HAN = re.compile(r"[\u4e00-\u9fa5]")
_CMRC_PUNCTUATION = frozenset("-:_*^/\\~`+=，。：？！“”；’《》·、「」（）－～『』")
_CMRC_TOKEN = re.compile(r"[\u4e00-\u9fa5]|[^\W\u4e00-\u9fa5]+(?:[.,'][^\W\u4e00-\u9fa5]+)*|[^\w\s]")  # 3.5 is one


def squad_tokens(text: str) -> list[str]:
    kept = "".join(character for character in text.lower() if character not in string.punctuation)
    return _ARTICLES.sub(" ", kept).split()


def mlqa_tokens(text: str, language: str = "zh") -> list[str]:
    """Of `language` en or zh, the two of which the rules are here."""
    if language not in ("en", "zh"):
        raise UserError(f"language={language!r} has no rules here; there are en and zh.")
    kept = "".join(character for character in text.lower() if not _is_punctuation(character))
    return _ARTICLES.sub(" ", kept).split() if language == "en" else mixed_segmentation(kept)


def cmrc_whole(text: str) -> str:
    return "".join(character for character in text.lower().strip() if character not in _CMRC_PUNCTUATION)


def cmrc_tokens(text: str) -> list[str]:
    return _CMRC_TOKEN.findall(cmrc_whole(text))


def mixed_segmentation(text: str) -> list[str]:
    """Each Chinese character alone, and what stands between them cut at white space."""
    return _HAN.sub(lambda found: f" {found.group()} ", text).split()


def _is_punctuation(character: str) -> bool:
    return character in string.punctuation or unicodedata.category(character).startswith("P")


def bag_f1(predicted: Sequence[str], gold: Sequence[str]) -> float:
    """F1 of the tokens as bags; 0 where they share none."""
    same = sum((collections.Counter(predicted) & collections.Counter(gold)).values())
    return 2 * same / (len(predicted) + len(gold)) if same else 0.0


def run_f1(predicted: Sequence[str], gold: Sequence[str]) -> float:
    """F1 of the longest run of tokens that both have; 0 where they share none."""
    longest, previous = 0, [0] * (len(gold) + 1)
    for token in predicted:
        current = [0] * (len(gold) + 1)
        for index, other in enumerate(gold):
            if token == other:
                current[index + 1] = previous[index] + 1
                longest = max(longest, current[index + 1])
        previous = current
    return 2 * longest / (len(predicted) + len(gold)) if longest else 0.0


@dataclasses.dataclass(frozen=True)
class Normaliser:
    tokens: Callable[[str], list[str]]
    f1: Callable[[Sequence[str], Sequence[str]], float]
    whole: Callable[[str], object]  # what is compared for exact match


def _mlqa_english(text: str) -> list[str]:
    return mlqa_tokens(text, "en")


NORMALISERS = {
    "squad": Normaliser(squad_tokens, bag_f1, squad_tokens),
    "mlqa-en": Normaliser(_mlqa_english, bag_f1, _mlqa_english),
    "mlqa-zh": Normaliser(mlqa_tokens, bag_f1, mlqa_tokens),
    "cmrc": Normaliser(cmrc_tokens, run_f1, cmrc_whole),
}


def scores(golds: Sequence[str], predicted: str, normaliser: str = "squad", version: int = 1) -> tuple[float, float]:
    """(exact match, F1), 0 to 1, of one answer: the best over the gold answers.

    `version` 2 is SQuAD v2's: no gold answer, or none with a token, means that the right answer is the empty one; two empty
    answers agree in F1 as well.
    """
    rules = _rules(normaliser)
    if version == 2:
        golds = [gold for gold in golds if rules.tokens(gold)] or [""]
    guess, whole = rules.tokens(predicted), rules.whole(predicted)
    exact = any(rules.whole(gold) == whole for gold in golds)
    best = 0.0
    for truth in map(rules.tokens, golds):
        empty = version == 2 and not (guess and truth)
        best = max(best, float(guess == truth) if empty else rules.f1(guess, truth))
    return float(exact), best


def _rules(name: str) -> Normaliser:
    if name not in NORMALISERS:
        raise UserError(f"normaliser={name!r} is none of {', '.join(NORMALISERS)}.")
    return NORMALISERS[name]


def squad(
    golds: Sequence[Sequence[str]],
    predicted: Sequence[str],
    normaliser: str = "squad",
    bootstrap: Bootstrap | None = None,
) -> list[Measured]:
    """Exact match and F1 of SQuAD v1.1, 0 to 100; golds [n] of one or more answers each.

    Raises `UserError` where a question has no gold answer (that is v2's), or the lengths differ.
    """
    _check(golds, predicted)
    empty = [number for number, answers in enumerate(golds) if not answers]
    if empty:
        raise UserError(f"question {empty[0]} (from 0) has no gold answer; such data is measured by squad_v2.")
    return _averages(golds, predicted, normaliser, 1, bootstrap)


def squad_v2(
    golds: Sequence[Sequence[str]],
    predicted: Sequence[str],
    no_answer: Sequence[float] | None = None,
    threshold: float = 1.0,
    normaliser: str = "squad",
    bootstrap: Bootstrap | None = None,
) -> list[Measured]:
    """Exact match and F1 of SQuAD v2, 0 to 100: of all, of those with and of those without an answer.

    `no_answer` [n] is the probability that there is none; above `threshold` the prediction counts as empty, as in the official
    script, whose threshold is 1 unless it is told another. Golds [n] are empty where there is no answer.
    """
    _check(golds, predicted)
    answers = list(predicted)
    if no_answer is not None:
        if len(no_answer) != len(answers):
            raise UserError(f"there are {len(answers)} predictions, but {len(no_answer)} no-answer probabilities.")
        answers = ["" if chance > threshold else text for text, chance in zip(answers, no_answer, strict=True)]
    rules = _rules(normaliser)
    has = [any(rules.tokens(gold) for gold in answers_) for answers_ in golds]
    results = _averages(golds, answers, normaliser, 2, bootstrap)
    for name, wanted in (("with an answer", True), ("without an answer", False)):
        chosen = [number for number, flag in enumerate(has) if flag is wanted]
        if chosen:
            part = _averages([golds[i] for i in chosen], [answers[i] for i in chosen], normaliser, 2, bootstrap)
            results += [dataclasses.replace(result, name=f"{result.name} {name}") for result in part]
    return results


def best_threshold(
    golds: Sequence[Sequence[str]], predicted: Sequence[str], no_answer: Sequence[float], normaliser: str = "squad"
) -> tuple[float, float]:
    """(threshold, F1 0 to 100) of the no-answer probability that gives the highest F1: found on the data it is measured on."""
    _check(golds, predicted)
    rules = _rules(normaliser)
    has = [any(rules.tokens(gold) for gold in answers) for answers in golds]
    gains = [scores(gold, text, normaliser, 2)[1] for gold, text in zip(golds, predicted, strict=True)]
    total = best = float(len(has) - sum(has))  # all answers empty
    chosen = float("-inf")
    order = sorted(range(len(has)), key=lambda number: no_answer[number])
    for place, number in enumerate(order):
        total += gains[number] - (0.0 if has[number] else 1.0)
        tied = place + 1 < len(order) and no_answer[order[place + 1]] == no_answer[number]
        if not tied and total > best:  # a threshold cannot part two equal probabilities
            best, chosen = total, float(no_answer[number])
    return chosen, 100 * best / len(has)


def _averages(
    golds: Sequence[Sequence[str]], predicted: Sequence[str], normaliser: str, version: int, bootstrap: Bootstrap | None
) -> list[Measured]:
    pairs = [scores(gold, text, normaliser, version) for gold, text in zip(golds, predicted, strict=True)]
    note = f"SQuAD v{'1.1' if version == 1 else '2'}, normalised as {normaliser}"
    return [
        measure(name, mean_of([100 * pair[place] for pair in pairs]), bootstrap, note)
        for place, name in enumerate(("exact match", "F1"))
    ]


def _check(golds: Sequence[Sequence[str]], predicted: Sequence[str]) -> None:
    if len(golds) != len(predicted) or not len(golds):
        raise UserError(f"there are {len(golds)} questions, but {len(predicted)} predictions.")
    for number, answers in enumerate(golds):
        if isinstance(answers, str):
            raise UserError(f"the gold answers of question {number} are one string; they are a list of strings.")
