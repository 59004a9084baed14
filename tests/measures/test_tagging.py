"""Entities, against seqeval and hand-drawn cases."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
from seqeval import metrics
from seqeval.scheme import IOB2, IOBES

from gptjax.config import UserError
from gptjax.measures import tagging
from gptjax.measures.bootstrap import Bootstrap, draw_counts

# the example of seqeval's own README
GOLD = [["O", "O", "O", "B-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]
GUESS = [["O", "O", "B-MISC", "I-MISC", "I-MISC", "I-MISC", "O"], ["B-PER", "I-PER", "O"]]


def random_tags(rng: np.random.Generator, sentences: int = 30) -> list[list[str]]:
    tags = ["O", "O", "B-PER", "I-PER", "B-LOC", "I-LOC"]
    return [[tags[i] for i in rng.integers(0, 6, 8)] for _ in range(sentences)]


def test_the_published_example():
    precision, recall, f1 = tagging.entity_scores(GOLD, GUESS, bootstrap=Bootstrap(resamples=50))
    assert (precision.value, recall.value, f1.value) == (0.5, 0.5, 0.5)
    assert f1.note.startswith("seqeval, lenient mode, BIO, micro average") and f1.name == "entity F1"
    assert tagging.token_accuracy(GOLD, GUESS).value == pytest.approx(8 / 10)
    text = tagging.report(GOLD, GUESS, digits=2).text
    assert text == metrics.classification_report(GOLD, GUESS) and "MISC       0.00      0.00      0.00         1" in text


@pytest.mark.parametrize("mode", ["lenient", "strict"])
@pytest.mark.parametrize("average", ["micro", "macro", "weighted"])
def test_scores_are_seqevals_and_resamples_agree(mode: str, average: str):
    rng = np.random.default_rng(1)
    gold, guess = random_tags(rng), random_tags(rng)
    guess[:20] = gold[:20]
    options = {"average": average, "zero_division": 0} | ({"mode": "strict", "scheme": IOB2} if mode == "strict" else {})
    functions = (metrics.precision_score, metrics.recall_score, metrics.f1_score)
    measured = tagging.entity_scores(gold, guess, mode, average=average)
    counts = np.concatenate(list(draw_counts(30, 4, seed=2)))
    for result, function in zip(measured, functions, strict=True):
        assert result.value == pytest.approx(function(gold, guess, **options))
        assert result.statistic is not None and result.statistic.value() == pytest.approx(result.value)
        for row, score in zip(counts.astype(int), result.statistic.resampled(counts), strict=True):
            drawn = [[tags[i] for i, times in enumerate(row) for _ in range(times)] for tags in (gold, guess)]
            assert score == pytest.approx(function(*drawn, **options))


def test_modes_and_schemes_by_hand():
    stray = [["O", "I-PER", "I-PER", "O"]]
    assert tagging.entities(stray, "lenient") == [{("PER", 1, 2)}]
    assert tagging.entities(stray, "strict") == [set()]
    assert tagging.entities(stray, "strict", "IOB1") == [{("PER", 1, 2)}]
    touching = [["I-PER", "B-PER", "I-LOC"]]
    assert tagging.entities(touching, "strict", "IOB1") == [{("PER", 0, 0), ("PER", 1, 1), ("LOC", 2, 2)}]
    full = [["S-PER", "B-LOC", "I-LOC", "E-LOC", "B-PER"]]
    assert tagging.entities(full, "strict", "IOBES") == [{("PER", 0, 0), ("LOC", 1, 3)}]
    score = tagging.entity_scores(full, [["S-PER", "B-LOC", "E-LOC", "O", "O"]], "strict", "IOBES")[2]
    assert score.value == pytest.approx(
        metrics.f1_score(full, [["S-PER", "B-LOC", "E-LOC", "O", "O"]], mode="strict", scheme=IOBES)
    )


def test_no_entity_found_is_zero_without_a_warning():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert [m.value for m in tagging.entity_scores([["B-PER"]], [["O"]])] == [0.0, 0.0, 0.0]
    with pytest.raises(UserError, match="no entity"):
        tagging.report([["O"]], [["O"]])


def test_mistakes_are_named():
    with pytest.raises(UserError, match="predicted tag 'S-PER' of word 1 in sentence 0"):
        tagging.entity_scores([["O", "O"]], [["O", "S-PER"]])
    with pytest.raises(UserError, match="sentence 1 .* has 2 tags, but 1"):
        tagging.token_accuracy([["O"], ["O", "O"]], [["O"], ["O"]])
    with pytest.raises(UserError, match="scheme='BILOU'"):
        tagging.entity_scores([["O"]], [["O"]], scheme="BILOU")
    with pytest.raises(UserError, match="mode='conll'"):
        tagging.entity_scores([["O"]], [["O"]], mode="conll")
