"""Baselines: by hand on small cases, and above chance on real data where that is there."""

from __future__ import annotations

import itertools
import json
import math
import os
import pathlib

import numpy as np
import pytest

from gptjax.config import UserError
from gptjax.measures import answers, baselines, classification
from gptjax.measures.bootstrap import Bootstrap
from gptjax.measures.measured import difference

SHARED = pathlib.Path(
    os.environ.get("GPTJAX_SHARED_DATA", pathlib.Path(__file__).resolve().parents[2].parent / "shared" / "data")
)


def shared(name: str) -> pathlib.Path:
    if not (SHARED / name).is_file():
        pytest.skip(f"{SHARED / name} is not here")
    return SHARED / name


def test_the_table_holds_one_of_every_kind():
    kinds = {baseline.kind for baseline in baselines.BASELINES.values()}
    assert kinds == {"classification", "multilabel", "regression", "tagging", "answers", "summary", "text", "language"}


def test_majority_and_its_probabilities():
    guess = baselines.majority(["a"] * 5, ["x", "y", "y", "z", "z"], ["new", "texts"])
    assert guess.labels == ["y", "y"] and guess.classes == ("x", "y", "z")
    assert guess.probabilities.tolist() == [[0.2, 0.4, 0.4]] * 2


def test_tfidf_beats_the_majority_on_sms_spam():
    rows = [line.split("\t", 1) for line in shared("sms_spam/sms.tsv").read_text(encoding="utf-8").splitlines()]
    order = np.random.default_rng(0).permutation(len(rows))
    train, new = ([rows[i] for i in part] for part in (order[:1000], order[1000:2000]))
    guess = baselines.tfidf_logistic([t for _, t in train], [label for label, _ in train], [t for _, t in new])
    gold = [label for label, _ in new]
    assert guess.classes == ("ham", "spam") and np.allclose(guess.probabilities.sum(axis=1), 1)
    spam = classification.f1_of(gold, guess.labels, "spam", Bootstrap())
    most = classification.f1_of(gold, baselines.majority([""], ["ham"], [t for _, t in new]).labels, "spam", Bootstrap())
    assert spam.value > 0.85 and most.value == 0
    assert difference(spam, most, Bootstrap()).low > 0.8  # type: ignore[operator]


def test_chinese_titles_are_cut_by_character():
    lines = shared("csl/category_train.tsv").read_text(encoding="utf-8").splitlines()[:900]
    rows = [line.split("\t")[1:] for line in lines]
    texts, labels = [row[0] for row in rows], [row[1] for row in rows]
    assert baselines.is_chinese(texts)
    guess = baselines.tfidf_logistic(texts[:600], labels[:600], texts[600:])
    most = baselines.majority(texts[:600], labels[:600], texts[600:])
    scores = [classification.accuracy(labels[600:], found.labels).value for found in (guess, most)]
    assert scores[0] > scores[1] + 0.15


def test_sets_and_numbers():
    texts = ["red apple", "red car", "blue car", "green apple", "red apple pie", "blue car park"] * 4
    labels = [{word for word in text.split() if word in ("red", "car")} for text in texts]
    assert baselines.tfidf_logistic_set(texts, labels, ["red red", "car car", "green"]) == [{"red"}, {"car"}, set()]
    assert baselines.majority_set(texts, [{"red"}, {"red", "car"}, set()], ["x"]) == [{"red"}]
    assert baselines.tfidf_logistic_set(texts, [{"all"}] * len(texts), ["x"]) == [{"all"}]
    numbers = [float(len(text)) if "red" in text else 0.0 for text in texts]
    high, low = baselines.tfidf_ridge(texts, numbers, ["red apple", "blue car"])
    assert high > 5 > low and baselines.mean(texts, [1.0, 2.0], ["x", "y"]) == [1.5, 1.5]
    with pytest.raises(UserError, match="that are not empty"):
        baselines.tfidf_logistic(["", " "], ["a", "b"], ["x"])


def test_tags():
    words, tags = [["Paris", "is", "Paris"], ["is", "May"]], [["B-LOC", "O", "B-PER"], ["O", "O"]]
    new = [["May", "Paris", "unseen"]]
    assert baselines.most_frequent_tag(words, tags, new) == [["O", "B-LOC", "O"]]
    assert baselines.outside(words, tags, new) == [["O", "O", "O"]]


def test_sentences_and_leads():
    text = 'It cost $3.5 million. "Really?" he asked. Yes! No'
    assert baselines.sentences(text) == ["It cost $3.5 million.", '"Really?"', "he asked.", "Yes!", "No"]
    assert baselines.lead_3([text]) == ['It cost $3.5 million. "Really?" he asked.']
    assert baselines.lead_3(["我来了。你好！“走吧。”再见。"]) == ["我来了。你好！“走吧。”"]
    assert baselines.lead_1(["one\ntwo", ""]) == ["one", ""]


def test_answers_are_cut_out_of_the_context():
    context = "The tower is tall. It was built by Gustave Eiffel in the year 1889 in Paris. Many visit it."
    question = "In which year was it built in Paris?"
    assert baselines.first_sentence([question], [context]) == ["The tower is tall."]
    assert baselines.overlap_sentence([question], [context]) == ["It was built by Gustave Eiffel in the year 1889 in Paris."]
    found = baselines.sliding_window([question], [context], width=2, reach=3)[0]
    assert found in context and len(found.split()) == 2 and found == "by Gustave"  # amid It, was, built, and in the
    assert baselines.sliding_window(["?"], ["..."]) == [""] and baselines.sliding_window(["a"], ["one"]) == ["one"]


@pytest.mark.parametrize(("language", "normaliser"), [("en", "squad"), ("zh", "mlqa-zh")])
def test_overlap_beats_the_first_sentence_on_xquad(language: str, normaliser: str):
    data = json.loads(shared(f"xquad/xquad.{language}.json").read_text(encoding="utf-8"))["data"]
    rows = [
        (qa["question"], part["context"], [answer["text"] for answer in qa["answers"]])
        for article in data[:12]
        for part in article["paragraphs"]
        for qa in part["qas"]
    ]
    questions, contexts, golds = ([row[i] for row in rows] for i in range(3))
    names = ("first_sentence", "overlap_sentence", "sliding_window")
    guesses = {name: baselines.BASELINES[name].predict(questions, contexts) for name in names}
    assert all(g in c or not g for g, c in zip(guesses["sliding_window"], contexts, strict=True))
    f1 = {name: answers.squad(golds, guess, normaliser)[1].value for name, guess in guesses.items()}
    assert f1["overlap_sentence"] > f1["first_sentence"] + 5, f1


def test_nearest_neighbour():
    inputs, outputs = ["name[Eagle] food[French]", "name[Mill] food[Thai]"], ["Eagle is French.", "Mill is Thai."]
    assert baselines.nearest_neighbour(inputs, outputs, ["food[Thai] near[Mill]", "Eagle"]) == [
        "Mill is Thai.",
        "Eagle is French.",
    ]


@pytest.mark.parametrize("order", [1, 2, 5])
def test_an_ngram_model_sums_to_one_over_all_texts(order: int):
    train = [[0, 1, 1, 2], [1, 2, 0, 1, 1, 2]]
    texts = [list(tokens) for tokens in itertools.product(range(4), repeat=3)]  # token 3 is never seen
    nats, sizes = baselines.ngram(train, texts, 4, order)
    assert sum(math.exp(-value) for value in nats) == pytest.approx(1) and set(sizes) == {3}


def test_an_ngram_by_hand():
    # after 0 came 1 twice of twice; the unigram of 1 is (5 + 1) / (10 + 4)
    nats, _ = baselines.ngram([[0, 1, 1, 2], [1, 2, 0, 1, 1, 2]], [[0, 1]], 4, 2)
    first, second = 3 / 14, (2 + 1 * 6 / 14) / (2 + 1)
    assert nats[0] == pytest.approx(-math.log(first * second))
    assert baselines.unigram([[0]], [[0, 1]], 2)[0][0] == pytest.approx(-math.log(2 / 3 * 1 / 3))
