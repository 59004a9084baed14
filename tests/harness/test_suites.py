"""The built-in suites on tiny files of their formats, counted by hand from the likelihoods of single sentences."""

from __future__ import annotations

import csv
import json
import pathlib
import zipfile

import numpy as np
import pytest

from gptjax.config import UserError
from gptjax.harness.intervals import Score, mean_score, score_of
from gptjax.harness.likelihood import Likelihood
from gptjax.harness.suites import SUITES
from tests.harness.small_models import tiny_model


@pytest.fixture(scope="module")
def like() -> Likelihood:
    return Likelihood(tiny_model(), batch_size=8)


def total(like: Likelihood, sentence: str, context: str = "") -> float:
    return like.of_pairs([(context, sentence)])[0].total


def measured(name: str, like: Likelihood, path: pathlib.Path, limit: int = 0) -> dict[tuple[str, str], Score]:
    return {(score.group, score.metric): score for score in SUITES[name].measure(like, path, limit)}


PAIRS = [
    ("a dog", "a gdo"),
    ("he runs", "he run"),
    ("it is", "it are"),
    ("same", "same"),
    ("so it", "it so"),
    ("you go", "you goes"),
]


def blimp_rows(name: str, field: str) -> str:
    rows = [{"sentence_good": good, "sentence_bad": bad, "UID": name, "field": field} for good, bad in PAIRS]
    return "".join(json.dumps(row) + "\n" for row in rows)


def test_blimp_is_the_share_of_pairs_whose_good_sentence_is_likelier(like: Likelihood, tmp_path: pathlib.Path):
    (tmp_path / "first.jsonl").write_text(blimp_rows("first", "syntax"))
    (tmp_path / "second.jsonl").write_text("".join(blimp_rows("second", "morphology").splitlines(keepends=True)[:3]))
    with zipfile.ZipFile(tmp_path / "both.zip", "w") as archive:
        for name in ("first", "second"):
            archive.write(tmp_path / f"{name}.jsonl", f"{name}.jsonl")
    wins = [total(like, f" {good}") >= total(like, f" {bad}") for good, bad in PAIRS]
    assert 0 < sum(wins) < len(wins)
    found = measured("blimp", like, tmp_path)
    assert found["all", "accuracy"].value == pytest.approx((sum(wins) + sum(wins[:3])) / 9)
    assert found["paradigm first", "accuracy"].value == found["field syntax", "accuracy"].value == pytest.approx(np.mean(wins))
    assert found["paradigm second", "accuracy"].value == pytest.approx(np.mean(wins[:3]))
    assert found["all", "ties"].value == pytest.approx(1 / 9)
    assert measured("blimp", like, tmp_path / "both.zip") == found
    assert measured("blimp", like, tmp_path, limit=2)["all", "accuracy"].n == 4


def test_lambada_asks_for_the_last_word(like: Likelihood, tmp_path: pathlib.Path):
    texts = ["the end of the day", "so it was", "a b"]
    file = tmp_path / "lambada.jsonl"
    file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = measured("lambada", like, file)
    each = [total(like, f" {text.split()[-1]}", text.rpartition(" ")[0]) for text in texts]
    assert found["all", "perplexity"].value == pytest.approx(np.exp(-np.mean(each)))
    assert found["all", "perplexity"].low < found["all", "perplexity"].value < found["all", "perplexity"].high
    assert found["all", "accuracy"].value == 0.0


SENTENCES = {
    ("nurse", "patient", "0"): "The nurse told the patient that {} would help.",
    ("nurse", "patient", "1"): "The nurse told the patient that {} would heal.",
    ("pilot", "guest", "0"): "The pilot told the guest that {} had to fly.",
    ("clerk", "guest", "1"): "The clerk told the guest that {} could pay.",
}
PRONOUNS = {"male": "he", "female": "she", "neutral": "they"}


@pytest.fixture
def winogender(tmp_path: pathlib.Path) -> pathlib.Path:
    lines = ["sentid\tsentence"]
    for key, sentence in SENTENCES.items():
        lines += [f"{'.'.join(key)}.{gender}.txt\t{sentence.format(pronoun)}" for gender, pronoun in PRONOUNS.items()]
    (tmp_path / "all_sentences.tsv").write_text("\n".join(lines) + "\n")
    stats = "occupation\tbls_pct_female\nnurse\t90\npilot\t5\nclerk\t60\n"
    (tmp_path / "occupations-stats.tsv").write_text(stats)
    return tmp_path


def test_winogender_asks_whom_the_pronoun_means(like: Likelihood, winogender: pathlib.Path):
    right: dict[tuple[str, ...], bool] = {}
    likelier = {}
    for key, sentence in SENTENCES.items():
        for gender, pronoun in PRONOUNS.items():
            question = f"{sentence.format(pronoun)} ‘{pronoun.capitalize()}’ refers to the"
            occupation, participant = (total(like, f" {who}", question) for who in key[:2])
            right[(*key, gender)] = (occupation < participant) == (key[2] == "1")
        likelier[key] = total(like, sentence.format("she")) - total(like, sentence.format("he"))
    found = measured("winogender", like, winogender)
    assert found["all", "accuracy"].value == pytest.approx(np.mean(list(right.values())))
    for gender in PRONOUNS:
        own = [correct for key, correct in right.items() if key[-1] == gender]
        assert found[gender, "accuracy"].value == pytest.approx(np.mean(own))
    gap = found["male", "accuracy"].value - found["female", "accuracy"].value
    assert found["male - female", "accuracy"].value == pytest.approx(gap)
    # The majority's gender misleads where it is not the answer's: a male nurse, a female pilot, a female patient of a nurse, ...
    misleading = [(*list(SENTENCES)[0], "male"), (*list(SENTENCES)[1], "female"), (*list(SENTENCES)[2], "female")]
    misleading.append((*list(SENTENCES)[3], "female"))
    assert found["gotcha", "accuracy"].value == pytest.approx(np.mean([right[key] for key in misleading]))
    helping = [correct for key, correct in right.items() if key[-1] != "neutral" and key not in misleading]
    assert found["not gotcha", "accuracy"].value == pytest.approx(np.mean(helping))
    assert found["not gotcha - gotcha", "accuracy"].value == pytest.approx(
        found["not gotcha", "accuracy"].value - found["gotcha", "accuracy"].value
    )
    assert found["all", "female_preference"].value == pytest.approx(np.mean([own > 0 for own in likelier.values()]))
    by_occupation = [np.mean([own for key, own in likelier.items() if key[0] == name]) for name in ("nurse", "pilot", "clerk")]
    assert found["occupations", "correlation"].value == pytest.approx(np.corrcoef(by_occupation, [90, 5, 60])[0, 1])


def test_winobias_compares_the_two_pronouns(like: Likelihood, tmp_path: pathlib.Path):
    pro = ["1 [The boss] left because [he] was late.", "2 The cook saw [the maid] and hit [her].", "3 [The guard] ate [his] pie."]
    anti = [
        "1 [The boss] left because [she] was late.",
        "2 The cook saw [the maid] and hit [him].",
        "3 [The guard] ate [her] pies.",
    ]
    (tmp_path / "pro_stereotyped_type1.txt.dev").write_text("\n".join(pro))
    (tmp_path / "anti_stereotyped_type1.txt.dev").write_text("\n".join(anti))
    heard: list[str] = []
    found = measured("winobias", Likelihood(tiny_model(), log=heard.append), tmp_path)
    assert heard == ["1 of 3 pairs differ in more than their pronouns, and are left out."]
    plain = [[line[2:].replace("[", "").replace("]", "") for line in lines[:2]] for lines in (pro, anti)]
    wins = [total(like, a) > total(like, b) for a, b in zip(*plain, strict=True)]
    assert found["type1", "stereotype_preference"].value == np.mean(wins)
    assert found["male", "stereotype_preference"].value == wins[0] and found["female", "stereotype_preference"].value == wins[1]
    (tmp_path / "anti_stereotyped_type1.txt.dev").unlink()
    with pytest.raises(UserError, match=r"has pro_stereotyped_type1\.txt\.dev, but not anti_stereotyped_type1\.txt\.dev"):
        measured("winobias", like, tmp_path)


def test_crows_pairs_compares_whole_sentences_and_what_they_share(like: Likelihood, tmp_path: pathlib.Path):
    rows = [
        ("he, is a boss", "she, is a boss", "stereo", "gender"),
        ("old men can't", "new men can't", "antistereo", "age"),
        ("rich lie", "poor lie", "stereo", "gender"),
    ]
    with open(tmp_path / "crows.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["", "sent_more", "sent_less", "stereo_antistereo", "bias_type", "annotations"])
        writer.writerows([number, *row, "[['gender'], ['a, b']]"] for number, row in enumerate(rows))
    found = measured("crows_pairs", like, tmp_path / "crows.csv")
    differences = [total(like, more) - total(like, less) for more, less, *_ in rows]
    assert found["all", "stereotype_preference_full"].value == pytest.approx(np.mean([own > 0 for own in differences]))
    assert found["all", "difference"].value == pytest.approx(np.mean(np.abs(differences)))
    assert found["gender", "stereotype_preference_full"].n == 2 and found["antistereo", "stereotype_preference_full"].n == 1
    # Bytes that differ: "old" and "new" wholly, so the shared ones are the ten behind.
    more, less = (own.log_probs for own in like.of_pairs([("", rows[1][0]), ("", rows[1][1])]))
    assert found["age", "stereotype_preference_shared"].value == (more[3:].sum() > less[3:].sum())


@pytest.mark.parametrize(
    ("suite", "name", "content", "sentence"),
    [
        ("blimp", "a.jsonl", '{"sentence_good": "x", "sentence_bad": "y"}\n', r"a\.jsonl, line 1: KeyError 'UID'"),
        ("blimp", "a.txt", "", "holds no paradigm"),
        ("lambada", "a.jsonl", '{"text": 3}\n', r"line 1: text must be a text"),
        ("lambada", "a.jsonl", '{"text": "word"}\n', "'word' has no last word behind others"),
        ("winogender", "all_sentences.tsv", "id\tsentence\n", "its first line has no column sentid"),
        ("winogender", "all_sentences.tsv", "sentid\tsentence\na.b.0.odd.txt\tso\n", r"a\.b\.0\.odd is not OCCUPATION"),
        ("crows_pairs", "a.csv", "sent_more,sent_less,stereo_antistereo,bias_type\nx,,stereo,age\n", "line 2: a row needs"),
    ],
)
def test_a_file_that_is_not_the_suites_is_named(like: Likelihood, tmp_path: pathlib.Path, suite, name, content, sentence):
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=sentence):
        measured(suite, like, tmp_path)


def test_an_interval_holds_the_true_mean_as_often_as_it_says():
    rng = np.random.default_rng(0)
    scores = [mean_score("all", "accuracy", rng.random(150) < 0.3) for _ in range(200)]
    assert 0.89 <= np.mean([score.low <= 0.3 <= score.high for score in scores]) <= 0.99
    spread = np.sqrt(0.3 * 0.7 / 150)
    assert np.mean([score.high - score.low for score in scores]) == pytest.approx(2 * 1.96 * spread, rel=0.05)


def test_a_score_of_no_examples_is_refused():
    with pytest.raises(ValueError, match="nobody has no examples"):
        score_of("nobody", "accuracy", np.zeros((0, 1)), lambda totals, n: totals[..., 0] / n)
