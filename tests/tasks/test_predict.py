"""A fine-tuned model in Python and on the command line: predictions that depend on the text alone."""

from __future__ import annotations

import json

import numpy as np
import pytest

import gptjax
from gptjax.cli import main
from gptjax.config import UserError
from gptjax.tasks.predict import load_predictor
from gptjax.train import loop
from tests.tasks.cases import case, write_records

TEXTS = ["red dog", "", "cat cat", "x" * 80, "北京 stone", "cat sun sun sun sun sun sun"]


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return write_records(tmp_path_factory.mktemp("records") / "records.jsonl", 60)


@pytest.fixture(scope="module")
def runs(records, tmp_path_factory):
    found = {}
    for name, steps in (("classification", 20), ("answers", 1)):
        changes = {"evaluate__every_steps": 0, "checkpoint__every_steps": 0, "train__accumulation_steps": 1}
        config = case(name, records, train__duration_steps=steps, model__residual_dropout=0.0, **changes)
        found[name] = tmp_path_factory.mktemp(name)
        loop.train(config, found[name])
    return found


@pytest.fixture(scope="module")
def predictor(runs):
    return load_predictor(runs["classification"], log=lambda line: None)


def test_what_is_said_of_a_text_hangs_on_that_text_alone(predictor):
    whole = predictor.predict_proba(TEXTS)
    assert whole.shape == (6, 2) and whole.dtype == np.float64 and predictor.labels == ("cat", "none")
    np.testing.assert_allclose(whole.sum(axis=1), 1, atol=1e-12)
    np.testing.assert_array_equal(np.concatenate([predictor.predict_proba([text]) for text in TEXTS]), whole)
    many = predictor.predict_proba(np.asarray(TEXTS[::-1] * 7))  # more than a batch
    np.testing.assert_array_equal(many.reshape(7, 6, 2), np.tile(whole[::-1], (7, 1, 1)))
    np.testing.assert_array_equal(predictor.predict(TEXTS), np.asarray(predictor.labels)[whole.argmax(axis=1)])
    assert predictor.predict_proba([]).shape == (0, 2) and predictor.predict([]).shape == (0,)


def test_it_learnt_and_scikit_learn_can_hold_it(predictor, records):
    metrics = pytest.importorskip("sklearn.metrics")
    rows = [json.loads(line) for line in records.read_text().splitlines()]
    texts, gold = [row["text"] for row in rows], [row["label"] for row in rows]
    assert metrics.roc_auc_score([label == "none" for label in gold], predictor.predict_proba(texts)[:, 1]) > 0.8
    report = metrics.classification_report(gold, predictor.predict(texts), output_dict=True, zero_division=0)
    judged = predictor.predict_records(rows)
    assert report["accuracy"] == np.mean([one.gold == one.predicted for one in judged])


def test_a_local_linear_surrogate_finds_the_word_that_counts(predictor):
    """As LIME does it (Ribeiro et al., 2016): words left out at random, a weighted ridge regression on what is left."""
    words = ["red", "cat", "stone", "dog", "sun"]
    rng = np.random.default_rng(0)
    masks = np.concatenate([np.ones((1, len(words))), rng.integers(0, 2, (80, len(words)))])
    texts = [" ".join(word for word, keep in zip(words, mask, strict=True) if keep) for mask in masks]
    probability = predictor.predict_proba(np.asarray(texts))[:, predictor.labels.index("cat")]
    weights = np.exp(-((1 - masks.mean(axis=1)) ** 2) / 0.25)
    design = np.concatenate([np.ones((len(masks), 1)), masks], axis=1)
    gram = design.T @ (design * weights[:, None]) + 1e-3 * np.eye(len(words) + 1)
    slopes = np.linalg.solve(gram, design.T @ (weights * probability))[1:]
    assert words[int(slopes.argmax())] == "cat"


def test_answers_of_long_contexts(runs):
    predictor = load_predictor(runs["answers"], log=lambda line: None)
    record = {"question": "c?", "context": "red blue Zürich 北京 stone bird cat dog sun and many words more than a row has"}
    (found,) = predictor.predict_records([record])
    assert found.gold is None and found.predicted in record["context"]
    assert predictor.predict([record, record]).tolist() == [found.predicted] * 2
    with pytest.raises(UserError, match="has no probabilities"):
        predictor.predict_proba([record])
    with pytest.raises(UserError, match="predicts records with context, question, not a str"):
        predictor.predict(["a text"])


def test_what_is_no_list_of_texts_is_refused(predictor):
    with pytest.raises(UserError, match="a list of texts or records, not one alone"):
        predictor.predict_proba("red dog")
    with pytest.raises(UserError, match="not a record without 'text'"):
        predictor.predict([{"title": "x"}])
    with pytest.raises(UserError, match=r"record 1 \(from 0\) has the label 'horse'"):
        predictor.predict_records(["x", {"text": "y", "label": "horse"}])


def test_the_verbs(runs, records, tmp_path, capsys):
    folder, out = runs["classification"], tmp_path / "out.jsonl"
    assert main(["predict", str(folder), f"--out={out}"]) == 0
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert rows[0].keys() == {"id", "text", "gold", "predicted", "probabilities"}
    assert all(abs(sum(row["probabilities"].values()) - 1) < 1e-9 for row in rows)
    data = tmp_path / "new.jsonl"
    data.write_text('{"id": 7, "text": "red cat"}\n', encoding="utf-8")
    capsys.readouterr()
    assert main(["predict", str(folder), f"--data={data}"]) == 0
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    assert row["id"] == "7" and "gold" not in row
    assert main(["predict", str(folder), "red", "cat"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 2

    assert main(["evaluate", f"--workdir={folder}", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    accuracy = np.mean([one["gold"] == one["predicted"] for one in rows])
    table = found["tasks"]["task"]
    assert found["accuracy"] == table["measures"]["accuracy"]["value"] == pytest.approx(accuracy)
    assert table["measures"]["accuracy"]["low"] <= accuracy <= table["measures"]["accuracy"]["high"]
    assert set(table["baselines"]) == set(table["differences"]) == {"majority", "tfidf_logistic"}
    assert main(["evaluate", f"--workdir={folder}"]) == 0
    assert "baseline majority:" in capsys.readouterr().out

    for words, sentence in (
        (["generate", f"--workdir={folder}", "--prompt=x"], "ask it by `gptjax predict`"),
        (["predict", str(folder), "x", f"--data={data}"], "two sources of records"),
        (["predict", str(folder), "--config.task.text={title}", f"--data={data}"], "has no field 'title'"),
        (["evaluate", f"--workdir={folder}", "--objective=causal"], "was trained for a task"),
    ):
        assert main(words) == 2
        assert sentence in capsys.readouterr().err
    model = gptjax.load(folder)
    assert model.config.task.labels == ("cat", "none") and "task_heads" in model.params
