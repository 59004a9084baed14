"""Classifiers made by hand, which count what they are asked."""

import collections
import math

import numpy as np

from gptjax.attacks.words import split
from gptjax.data.records import Record


class Keywords:
    """Two classes, "ham" and "spam": the sum of the weights of a text's words (in lower case) is the logit of "spam"."""

    labels = ("ham", "spam")

    def __init__(self, weights: dict[str, float], bias: float = -1.0):
        self.weights, self.bias = weights, bias
        self.batches: list[list[str]] = []

    def predict_proba(self, texts: list[str]) -> np.ndarray:
        self.batches.append(list(texts))
        logits = [self.bias + sum(self.weights.get(word.lower(), 0.0) for word in split(text).words) for text in texts]
        spam = 1 / (1 + np.exp(-np.asarray(logits)))
        return np.stack([1 - spam, spam], axis=1)

    @property
    def asked(self) -> int:
        return sum(map(len, self.batches))


def naive_bayes(records: list[Record]) -> Keywords:
    """The multinomial model with one count added to each word, of records of ham and spam."""
    counts = {label: collections.Counter[str]() for label in Keywords.labels}
    texts = collections.Counter(record.values["label"] for record in records)
    for record in records:
        counts[record.values["label"]].update(word.lower() for word in split(record.values["text"]).words)
    words = set(counts["ham"]) | set(counts["spam"])
    totals = {label: sum(counter.values()) + len(words) for label, counter in counts.items()}
    weights = {
        word: math.log((counts["spam"][word] + 1) / totals["spam"]) - math.log((counts["ham"][word] + 1) / totals["ham"])
        for word in words
    }
    return Keywords(weights, math.log(texts["spam"] / texts["ham"]))


def records_of(*pairs: tuple[str, str]) -> list[Record]:
    """Records of (text, label)."""
    return [Record({"text": text, "label": label}, "made.tsv", line) for line, (text, label) in enumerate(pairs, 1)]
