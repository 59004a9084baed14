"""What the analysis finds in predictions of which the faults are known."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest

from gptjax.analysis.findings import analyse, findings_json
from gptjax.analysis.predictions import Prediction, TrainText, read_predictions, read_train, write_predictions
from gptjax.analysis.slices import difference, mean_score, slices
from gptjax.config import UserError
from gptjax.measures.bootstrap import Bootstrap

QUICK = Bootstrap(resamples=100)


def make(number: int = 200) -> list[Prediction]:
    """Half spam; texts with a digit are wrong half the time, others one time in ten; the surest mistake is number 6."""
    found = []
    for i in range(number):
        gold = "spam" if i % 2 else "ham"
        digit = i % 4 < 2
        wrong = (i // 4) % 2 == 0 if digit else (i // 4) % 10 == 9
        predicted = ({"spam": "ham", "ham": "spam"}[gold]) if wrong else gold
        sure = 0.99 if i == 8 else 0.6 + (i % 7) / 100
        text = f"message {'7' if digit else 'x'} " + "word " * (i % 5)
        other = "ham" if predicted == "spam" else "spam"
        found.append(Prediction(str(i), text + chr(0x4E00 + i), gold, predicted, {predicted: sure, other: 1 - sure}))
    return found


def test_slices_find_the_part_that_is_worse():
    found = {part.name: part for part in slices(make())}
    digit = found["a digit"]
    assert digit.part.n == 100 and digit.part.value == 0.5 and digit.stands_out
    assert digit.difference.value == pytest.approx(0.5 - 0.9, abs=0.021)
    assert not found["ham"].stands_out and found["ham"].family == "gold label"
    lengths = [part for part in slices(make()) if part.family == "length"]
    assert sum(part.part.n for part in lengths) == 200 and lengths[0].name.startswith("11 to ")
    assert "Chinese characters" not in found  # in every text: no part
    with pytest.raises(UserError, match=r"the pattern 'x', '\(', is no regular expression"):
        slices(make(), {"x": "("})


def test_the_difference_of_two_shares_is_newcombes():
    # R. Newcombe, Statistics in Medicine 1998, 17, 873-890, table II, method 10: 56/70 - 48/80 and 9/10 - 3/10
    for (a, m), (b, n), expected in (((56, 70), (48, 80), (0.0524, 0.3339)), ((9, 10), (3, 10), (0.1705, 0.8090))):
        parts = [mean_score(np.array([1.0] * hits + [0.0] * (total - hits))) for hits, total in ((a, m), (b, n))]
        gap = difference(*parts)
        assert (gap.low, gap.high) == pytest.approx(expected, abs=5e-5)
    scores = mean_score(np.array([0.5, 0.7, 0.9]))
    assert (scores.value, scores.low) == pytest.approx((0.7, 0.7 - 4.302653 * 0.2 / 3**0.5), rel=1e-5)


def test_findings():
    findings = analyse(make(), bootstrap=QUICK)
    names = [measured.name for measured in findings.summary]
    assert names == ["accuracy", "macro F1", "accuracy of always ham", "expected calibration error", "Brier score"]
    wrong = sum(row.predicted != row.gold for row in make())
    assert findings.wrong == wrong and findings.summary[0].value == 1 - wrong / 200
    assert findings.worst[0].id == "8" and len(findings.worst) == 30
    sureness = [prediction.confidence or 0 for prediction in findings.worst]
    assert sureness == sorted(sureness, reverse=True)
    labels, matrix = findings.confusion
    assert labels == ["ham", "spam"] and matrix.sum() == 200 and np.trace(matrix) == 200 - wrong
    recall = {row.label: row.recall.value for row in findings.labels}
    assert recall == {"ham": matrix[0, 0] / 100, "spam": matrix[1, 1] / 100}
    assert sum(row.n for row in findings.bins) == 200 and findings.leak is None


def test_a_leak_is_found_with_its_score():
    predictions = make()
    right = [row for row in predictions if row.predicted == row.gold][:20]
    train = [TrainText(row.text.upper() + "!", row.gold) for row in right[:12]]
    train += [TrainText(row.text + " word word word " + row.text, "ham") for row in right[12:]] + [TrainText("quite other words")]
    predictions[0] = Prediction("0", predictions[8].text, "ham", "ham", {"ham": 0.9, "spam": 0.1})
    leak = analyse(predictions, train, threshold=0.95, bootstrap=QUICK).leak
    assert leak is not None and leak.repeated_in_test == 1 and leak.train_texts == 21
    assert leak.leaked.n >= 12 and leak.exact >= 12 and leak.leaked.n + leak.clean.n == 200
    assert leak.leaked.value > leak.clean.value
    same = sum(train[match.train].gold == predictions[match.test].gold for match in leak.matches)
    assert leak.same_label == same >= 12


def test_answers_and_scores_have_no_confusion():
    rows = [Prediction(str(i), f"question {i}?", ("a", "b"), "b" if i % 2 else "c", score=i / 20) for i in range(20)]
    findings = analyse(rows, bootstrap=QUICK)
    assert findings.summary[0].name == "mean score" and findings.summary[0].value == pytest.approx(9.5 / 20)
    assert findings.scored and findings.confusion[0] == [] and findings.labels == [] and findings.worst[0].id == "0"
    plain = analyse([Prediction("1", "t", ("a", "b"), "b"), Prediction("2", "t", ("a",), "b")], bootstrap=QUICK)
    assert plain.summary[0].value == 0.5 and not plain.scored and plain.slices == []


def test_predictions_come_back_as_written(tmp_path: pathlib.Path):
    rows = [Prediction("1", "é\u2028\n", "spam", "ham", {"spam": 0.25, "ham": 0.75}), Prediction("x", "", "1", "1", {"1": 1.0})]
    write_predictions(tmp_path / "p.jsonl", rows)
    assert read_predictions(tmp_path / "p.jsonl") == rows
    (tmp_path / "q.jsonl").write_text(
        '\n{"text": "t", "gold": 1, "predicted": true}\n{"text": "u", "gold": ["a"], "predicted": "a"}'
    )
    first, second = read_predictions(tmp_path / "q.jsonl")
    assert (first.id, first.gold, first.predicted) == ("2", "1", "true") and second.gold == ("a",) and second.points == 1
    (tmp_path / "t.txt").write_text("one\n\ntwo\n")
    assert read_train(tmp_path / "t.txt") == [TrainText("one"), TrainText("two")]
    (tmp_path / "t.jsonl").write_text('{"text": "one", "gold": 3}\n{"text": "two"}\n')
    assert read_train(tmp_path / "t.jsonl") == [TrainText("one", "3"), TrainText("two")]


@pytest.mark.parametrize(
    ("line", "complaint"),
    [
        ("{", "p.jsonl:2 is not JSON: .* at column 2"),
        ("[1]", "p.jsonl:2 is not a JSON object"),
        ('{"text": "t", "gold": "a"}', "p.jsonl:2 has no 'predicted'; it has 'text', 'gold'"),
        ('{"text": 3, "gold": "a", "predicted": "a"}', "p.jsonl:2: 'text' is not a string"),
        ('{"text": "t", "gold": null, "predicted": "a"}', "p.jsonl:2: None is neither a string nor a number"),
        ('{"text": "t", "gold": [], "predicted": "a"}', "holds one or more strings"),
        ('{"text": "t", "gold": "a", "predicted": "a", "probabilities": {"a": 0.5}}', "p.jsonl:2: the probabilities sum to 0.5"),
        ('{"text": "t", "gold": "a", "predicted": "a", "probabilities": {"a": NaN}}', "an object of labels and numbers"),
        ('{"text": "t", "gold": "a", "predicted": "a", "probabilities": {"a": 1}}', "1 of 2 lines have probabilities"),
        ('{"text": "t", "gold": "a", "predicted": "a", "score": 2}', "p.jsonl:2: 'score' is a number from 0 to 1, not 2"),
    ],
)
def test_a_bad_line_is_named(tmp_path: pathlib.Path, line: str, complaint: str):
    path = tmp_path / "p.jsonl"
    path.write_text('{"text": "t", "gold": "a", "predicted": "b"}\n' + line + "\n")
    with pytest.raises(UserError, match=complaint):
        read_predictions(path)


def test_files_that_are_not_there_or_empty_are_named(tmp_path: pathlib.Path):
    with pytest.raises(UserError, match="none.jsonl cannot be read: No such file"):
        read_predictions(tmp_path / "none.jsonl")
    (tmp_path / "empty.jsonl").touch()
    with pytest.raises(UserError, match="has no predictions"):
        read_predictions(tmp_path / "empty.jsonl")
    (tmp_path / "latin.jsonl").write_bytes(b'{"text": "\xe9"}')
    with pytest.raises(UserError, match="is not UTF-8 at byte 10"):
        read_train(tmp_path / "latin.jsonl")


def test_json_of_findings_is_json():
    found = findings_json(analyse(make(), [TrainText("x y z")], bootstrap=QUICK))
    text = json.dumps(found)
    assert found["n"] == 200 and found["leak"]["leaked"] == 0 and '"a digit"' in text
