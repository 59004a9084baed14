"""What a model must beat: simple predictors of each kind of task, which answer in the form that a model does.

`BASELINES` has them all; `kind` says what a function takes and gives:
- classification: (texts, labels, new texts) -> Classified
- multilabel: (texts, sets of labels, new texts) -> sets of labels
- regression: (texts, numbers, new texts) -> numbers
- tagging: (words, tags, new words) -> tags, each a list of sentences
- answers: (questions, contexts) -> answers, cut out of the contexts
- summary: (texts) -> summaries
- text: (inputs, outputs, new inputs) -> outputs
- language: (token lists, new token lists, vocabulary size) -> (nats, tokens) of each new one
"""

from __future__ import annotations

import collections
import dataclasses
import math
import re
from collections.abc import Callable, Collection, Sequence
from typing import Any

import numpy as np
import threadpoolctl

from gptjax.config import UserError
from gptjax.measures import packages
from gptjax.measures.classification import Label
from gptjax.measures.text import mixed_words

_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")
_SENTENCE_END = re.compile(r"[.!?]+[\"')\]]*(?=\s|$)|[。！？]+[”’」』）]*|\n+")


@dataclasses.dataclass(frozen=True)
class Classified:
    """Labels [n], and probabilities [n, classes] of `classes` in this order."""

    labels: list[Label]
    probabilities: np.ndarray
    classes: tuple[Label, ...]


@dataclasses.dataclass(frozen=True)
class Baseline:
    kind: str
    predict: Callable[..., Any]
    about: str


# --- labels and numbers ---


def majority(texts: Sequence[str], labels: Sequence[Label], new: Sequence[str]) -> Classified:
    """The most frequent label, the first in order of those as frequent; probabilities are the shares in training."""
    counts = collections.Counter(labels)
    classes = tuple(sorted(counts))
    shares = np.array([counts[label] for label in classes], np.float64) / len(labels)
    best = classes[int(shares.argmax())]
    return Classified([best] * len(new), np.tile(shares, (len(new), 1)), classes)


def tfidf_logistic(texts: Sequence[str], labels: Sequence[Label], new: Sequence[str]) -> Classified:
    """Logistic regression on TF-IDF of words and pairs of words; of characters and pairs of them where the text is Chinese."""
    vectors, fresh = _tfidf(texts, new)
    model = _logistic(vectors, list(labels))
    probabilities = model.predict_proba(fresh)
    classes = tuple(label.item() if isinstance(label, np.generic) else label for label in model.classes_)
    return Classified([classes[column] for column in probabilities.argmax(axis=1)], probabilities, classes)


def _logistic(vectors: Any, labels: Any) -> Any:
    """Fitted on one thread: the products are small, and several threads that wait for each other are slower than one."""
    model = packages.load("sklearn.linear_model").LogisticRegression(C=10.0, tol=1e-3, max_iter=1000)
    with threadpoolctl.threadpool_limits(1):
        return model.fit(vectors, labels)


def majority_set(texts: Sequence[str], labels: Sequence[Collection[Label]], new: Sequence[str]) -> list[set[Label]]:
    """The labels that more than half of the training texts have."""
    counts = collections.Counter(label for row in labels for label in set(row))
    return [{label for label, count in counts.items() if 2 * count > len(labels)} for _ in new]


def tfidf_logistic_set(texts: Sequence[str], labels: Sequence[Collection[Label]], new: Sequence[str]) -> list[set[Label]]:
    """One logistic regression on TF-IDF a label."""
    vectors, fresh = _tfidf(texts, new)
    chosen: list[set[Label]] = [set() for _ in new]
    for label in sorted({label for row in labels for label in row}):
        truth = np.array([label in row for row in labels])
        flags = [True] * len(new) if truth.all() else _logistic(vectors, truth).predict(fresh)
        for row in np.flatnonzero(flags):
            chosen[row].add(label)
    return chosen


def mean(texts: Sequence[str], numbers: Sequence[float], new: Sequence[str]) -> list[float]:
    """The mean of training."""
    return [float(np.mean(numbers))] * len(new)


def tfidf_ridge(texts: Sequence[str], numbers: Sequence[float], new: Sequence[str]) -> list[float]:
    """Ridge regression on TF-IDF."""
    vectors, fresh = _tfidf(texts, new)
    model = packages.load("sklearn.linear_model").Ridge(alpha=1.0, solver="lsqr")
    return [float(number) for number in model.fit(vectors, np.asarray(numbers, np.float64)).predict(fresh)]


def is_chinese(texts: Sequence[str]) -> bool:
    """More than a tenth of the characters are Chinese ones; words between spaces are then of no use."""
    total = sum(map(len, texts))
    return sum(len(_HAN.findall(text)) for text in texts) > total / 10


def _tfidf(texts: Sequence[str], new: Sequence[str]) -> tuple[Any, Any]:
    """TF-IDF vectors of both, learnt on `texts`."""
    if not len(texts) or not any(text.strip() for text in texts):
        raise UserError("a TF-IDF baseline needs training texts that are not empty.")
    options: dict[str, Any] = (
        {"analyzer": "char", "ngram_range": (1, 2)}
        if is_chinese(texts)
        else {"analyzer": "word", "ngram_range": (1, 2), "token_pattern": r"(?u)\b\w+\b"}
    )
    vectoriser = packages.load("sklearn.feature_extraction.text").TfidfVectorizer(sublinear_tf=True, **options)
    return vectoriser.fit_transform(texts), vectoriser.transform(new)


# --- tags ---


def most_frequent_tag(
    words: Sequence[Sequence[str]], tags: Sequence[Sequence[str]], new: Sequence[Sequence[str]]
) -> list[list[str]]:
    """Each word's most frequent tag in training, the first in order of those as frequent; a new one gets the commonest of all."""
    seen: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for sentence, row in zip(words, tags, strict=True):
        for word, tag in zip(sentence, row, strict=True):
            seen[word][tag] += 1
    overall = sum(seen.values(), collections.Counter())
    usual = {word: _commonest(counts) for word, counts in seen.items()}
    return [[usual.get(word, _commonest(overall)) for word in sentence] for sentence in new]


def outside(words: Sequence[Sequence[str]], tags: Sequence[Sequence[str]], new: Sequence[Sequence[str]]) -> list[list[str]]:
    """O everywhere: what token accuracy is worth."""
    return [["O"] * len(sentence) for sentence in new]


def _commonest(counts: collections.Counter[str]) -> str:
    return min(counts, key=lambda key: (-counts[key], key))


# --- answers, summaries, texts ---


def sentences(text: str) -> list[str]:
    """Sentences by their marks, Western and Chinese; a dot inside a number or word ends none."""
    ends = [0, *(mark.end() for mark in _SENTENCE_END.finditer(text)), len(text)]
    parts = [text[low:high].strip() for low, high in zip(ends, ends[1:], strict=False)]
    return [part for part in parts if part]


def lead_3(texts: Sequence[str]) -> list[str]:
    """The first three sentences: hard to beat on news."""
    return [_lead(text, 3) for text in texts]


def lead_1(texts: Sequence[str]) -> list[str]:
    """The first sentence, for titles and one-line summaries."""
    return [_lead(text, 1) for text in texts]


def _lead(text: str, number: int) -> str:
    return ("" if is_chinese([text]) else " ").join(sentences(text)[:number])


def first_sentence(questions: Sequence[str], contexts: Sequence[str]) -> list[str]:
    """The first sentence of the context, whatever the question."""
    return [_lead(context, 1) for context in contexts]


def overlap_sentence(questions: Sequence[str], contexts: Sequence[str]) -> list[str]:
    """The sentence that shares most with the question, a word weighing more the fewer contexts have it."""
    weight = _rarity(contexts)
    chosen = []
    for question, context in zip(questions, contexts, strict=True):
        asked = set(mixed_words(question))
        parts = sentences(context) or [""]
        chosen.append(max(parts, key=lambda part: sum(weight(word) for word in asked & set(mixed_words(part)))))
    return chosen


def sliding_window(questions: Sequence[str], contexts: Sequence[str], width: int = 3, reach: int = 10) -> list[str]:
    """The `width` words of the context with most of the question within `reach` words, and least of it inside.

    After the sliding window of M. Richardson et al., MCTest, EMNLP 2013, which scores candidate answers by the words around.
    """
    weight = _rarity(contexts)
    return [_window(question, context, weight, width, reach) for question, context in zip(questions, contexts, strict=True)]


def _window(question: str, context: str, weight: Callable[[str], float], width: int, reach: int) -> str:
    asked = set(mixed_words(question))
    spans = [found.span() for found in re.finditer(r"[\u3400-\u4dbf\u4e00-\u9fff]|[^\W\u3400-\u4dbf\u4e00-\u9fff]+", context)]
    if not spans:
        return ""
    words = [context[low:high].lower() for low, high in spans]
    gains = np.cumsum([0.0, *(weight(word) if word in asked else 0.0 for word in words)])
    best, chosen = -math.inf, 0
    for start in range(max(1, len(words) - width + 1)):
        end = min(start + width, len(words))
        around = gains[min(end + reach, len(words))] - gains[max(0, start - reach)]
        score = around - 2 * (gains[end] - gains[start])
        if score > best + 1e-9:  # the first of those alike but for rounding
            best, chosen = score, start
    return context[spans[chosen][0] : spans[min(chosen + width, len(spans)) - 1][1]]


def _rarity(contexts: Sequence[str]) -> Callable[[str], float]:
    counts = collections.Counter(word for context in set(contexts) for word in set(mixed_words(context)))
    total = len(set(contexts))
    return lambda word: math.log(1 + total / (1 + counts[word]))


def nearest_neighbour(inputs: Sequence[str], outputs: Sequence[str], new: Sequence[str]) -> list[str]:
    """The output of the training input that is nearest by TF-IDF, the first of those as near."""
    vectors, fresh = _tfidf(inputs, new)
    chosen: list[str] = []
    for start in range(0, len(new), 256):  # a dense block of 256 similarities at a time
        near = (fresh[start : start + 256] @ vectors.T).toarray()
        chosen += [outputs[int(column)] for column in near.argmax(axis=1)]
    return chosen


# --- language ---


def unigram(train: Sequence[Sequence[int]], new: Sequence[Sequence[int]], vocab_size: int) -> tuple[list[float], list[int]]:
    """Token frequencies with one added to each of `vocab_size` tokens."""
    return ngram(train, new, vocab_size, order=1)


def five_gram(train: Sequence[Sequence[int]], new: Sequence[Sequence[int]], vocab_size: int) -> tuple[list[float], list[int]]:
    """5-grams interpolated down to the unigram by Witten and Bell's weights."""
    return ngram(train, new, vocab_size, order=5)


def ngram(
    train: Sequence[Sequence[int]], new: Sequence[Sequence[int]], vocab_size: int, order: int
) -> tuple[list[float], list[int]]:
    """(nats, tokens) of each new list of token ids under an n-gram model with Witten-Bell interpolation.

    A context c seen N times with T different next tokens gives token t the probability
    (count(c, t) + T * shorter(t)) / (N + T); the unigram has one added to each token (I. Witten and T. Bell, IEEE Transactions
    on Information Theory 1991; S. Chen and J. Goodman, 1999). Contexts do not cross the start of a list.
    """
    follows: dict[tuple[int, ...], collections.Counter[int]] = collections.defaultdict(collections.Counter)
    for tokens in train:
        for place, token in enumerate(tokens):
            for length in range(min(order - 1, place) + 1):
                follows[tuple(tokens[place - length : place])][token] += 1
    totals = {context: (counter.total(), len(counter)) for context, counter in follows.items()}
    seen = totals.get((), (0, 0))[0]
    nats = []
    for tokens in new:
        total = 0.0
        for place, token in enumerate(tokens):
            chance = (follows[()][token] + 1) / (seen + vocab_size)
            for length in range(1, min(order - 1, place) + 1):
                context = tuple(tokens[place - length : place])
                if context not in totals:
                    break  # a longer context was not seen either
                count, kinds = totals[context]
                chance = (follows[context][token] + kinds * chance) / (count + kinds)
            total -= math.log(chance)
        nats.append(total)
    return nats, [len(tokens) for tokens in new]


BASELINES: dict[str, Baseline] = {
    "majority": Baseline("classification", majority, "the most frequent label"),
    "tfidf_logistic": Baseline("classification", tfidf_logistic, "logistic regression on TF-IDF"),
    "majority_set": Baseline("multilabel", majority_set, "the labels of more than half"),
    "tfidf_logistic_set": Baseline("multilabel", tfidf_logistic_set, "logistic regression on TF-IDF, one a label"),
    "mean": Baseline("regression", mean, "the mean of training"),
    "tfidf_ridge": Baseline("regression", tfidf_ridge, "ridge regression on TF-IDF"),
    "most_frequent_tag": Baseline("tagging", most_frequent_tag, "each word's most frequent tag"),
    "outside": Baseline("tagging", outside, "O everywhere"),
    "first_sentence": Baseline("answers", first_sentence, "the first sentence of the context"),
    "overlap_sentence": Baseline("answers", overlap_sentence, "the sentence most like the question"),
    "sliding_window": Baseline("answers", sliding_window, "the words amid most of the question's"),
    "lead_3": Baseline("summary", lead_3, "the first three sentences"),
    "lead_1": Baseline("summary", lead_1, "the first sentence"),
    "nearest_neighbour": Baseline("text", nearest_neighbour, "the output of the nearest training input by TF-IDF"),
    "unigram": Baseline("language", unigram, "token frequencies"),
    "five_gram": Baseline("language", five_gram, "5-grams, Witten-Bell"),
}
