"""Few-shot tables: which examples are drawn, how prompts read, and scores and calibrations against single likelihoods."""

from __future__ import annotations

import dataclasses
import functools
import json
import pathlib
from typing import Any

import numpy as np
import pytest

from gptjax.config import UserError
from gptjax.data.records import read_records
from gptjax.harness import few_shot
from gptjax.harness.few_shot import FewShot, draw, examples_for, label_scores, load, read_experiment, run
from gptjax.harness.likelihood import Likelihood
from tests.harness.small_models import tiny_model

ITEMS = [(f"{word}", number % 3 == 0) for number, word in enumerate(["ab", "cd", "ef", "gh", "ij", "kl", "mn", "op", "qr"])]


@pytest.fixture(scope="module")
def like() -> Likelihood:
    return Likelihood(tiny_model(), batch_size=8)


@pytest.fixture
def experiment(tmp_path: pathlib.Path) -> FewShot:
    rows = [json.dumps({"text": text, "label": int(label)}) + "\n" for text, label in ITEMS]
    (tmp_path / "items.jsonl").write_text("".join(rows))
    asked = {
        "data": "items.jsonl",
        "template": "{text}:{label}",
        "verbalizer": {"1": "yes", "0": ["no", "nay"]},
        "separator": ";",
        "shots": [0, 2],
        "seeds": [0, 1],
        "calibration": ["none", "contextual", "pmi"],
    }
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    return read_experiment(tmp_path / "asked.json")


@functools.cache
def word_score(like: Likelihood, prompt: str, word: str) -> float:
    return like.of_pairs([(prompt, word)])[0].total


def brute_scores(like: Likelihood, prompt: str) -> np.ndarray:
    """Of the labels 1 and 0."""
    yes, no, nay = (word_score(like, prompt, word) for word in ("yes", "no", "nay"))
    return np.array([yes, np.log(np.exp(no) + np.exp(nay))])


def test_the_table_is_what_single_likelihoods_give(like: Likelihood, experiment: FewShot):
    cells, majority = run(like, experiment)
    assert majority == pytest.approx(6 / 9)
    assert [(cell.shots, cell.calibration) for cell in cells] == [(k, how) for k in (0, 2) for how in experiment.calibration]
    records = [record.values for record in read_records(experiment.data)]
    truth = np.array([0 if record["label"] == 1 else 1 for record in records])
    for cell in cells:
        for seed, correct in zip(experiment.seeds, cell.correct, strict=False):
            for number, record in enumerate(records):
                order = draw(experiment, records, seed)
                examples = examples_for(experiment, records, order, cell.shots, number, record)
                start = "".join(f"{own['text']}:{'yes' if own['label'] else 'no'};" for own in examples)
                scores = brute_scores(like, f"{start}{record['text']}:")
                if cell.calibration == "contextual":
                    free = [np.exp(brute_scores(like, f"{start}{text}:")) for text in ("N/A", "[MASK]", "")]
                    scores = scores - np.log(np.mean([own / own.sum() for own in free], axis=0))
                elif cell.calibration == "pmi":
                    scores = scores - brute_scores(like, ":")
                assert abs(scores[0] - scores[1]) > 1e-4, "too close to tell"
                assert correct[number] == (scores.argmax() == truth[number])
        assert len(cell.accuracies) == (2 if cell.shots else 1)
        assert cell.accuracy == pytest.approx(np.mean(cell.correct)) and cell.low <= cell.accuracy <= cell.high


def test_scores_are_of_the_word_a_token_or_a_byte(like: Likelihood, experiment: FewShot):
    one = dataclasses.replace(experiment, verbalizer={"1": "yes", "0": "näh"})
    whole, token, byte = (label_scores(like, dataclasses.replace(one, score=score), ["a:"])[0] for score in few_shot.SCORES)
    np.testing.assert_allclose(byte, whole / [3, 4])
    np.testing.assert_allclose(token, whole / [3, 4])  # a token is a byte here
    assert whole[1] == pytest.approx(word_score(like, "a:", "näh"))


def test_examples_are_a_function_of_the_seed_and_never_the_tested_record(experiment: FewShot):
    records = [record.values for record in read_records(experiment.data)]
    seen = set()
    for seed in range(5):
        order = draw(experiment, records, seed)
        assert order == draw(experiment, records, seed) and sorted(order) == list(range(9))
        seen.add(tuple(order[:4]))
        assert [records[number]["label"] for number in order[:6]] in ([0, 1] * 3, [1, 0] * 3)
        for number, record in enumerate(records):
            more, fewer = (examples_for(experiment, records, order, shots, number, record) for shots in (4, 2))
            assert record not in more and more[:2] == fewer
    assert len(seen) == 5
    unbalanced = draw(dataclasses.replace(experiment, balanced=False), records, 0)
    assert unbalanced == np.random.default_rng(0).permutation(9).tolist()


def test_a_record_of_another_file_that_reads_the_same_is_no_example(experiment: FewShot):
    pool = [{"text": "ab", "label": 1}, {"text": "cd", "label": 0}, {"text": "ef", "label": 1}]
    found = examples_for(experiment, pool, [0, 1, 2], 2, None, {"text": "ab", "label": 0})
    assert [own["text"] for own in found] == ["cd", "ef"]
    with pytest.raises(UserError, match=r"shots=3: the pool has only 2 records that read otherwise"):
        examples_for(experiment, pool, [0, 1, 2], 3, None, {"text": "ab"})


def test_a_prompt_is_instruction_examples_and_question(experiment: FewShot):
    told = dataclasses.replace(experiment, instruction="Say yes or no.", separator="\n")
    prompt = told.prompt([{"text": "a {text}", "label": 1}], {"text": "b"})
    assert prompt == "Say yes or no.\na {text}:yes\nb:"


def test_limit_draws_the_same_records_for_all(like: Likelihood, experiment: FewShot):
    cells, _ = run(like, dataclasses.replace(experiment, limit=4, calibration=("none",)))
    assert {cell.items for cell in cells} == {4}


@pytest.mark.parametrize(("name", "text"), [("a.tsv", '1\tsay "so"\n'), ("a.csv", '1,"say ""so"""\n'), ("a.jsonl", "")])
def test_records_are_read_from_each_format(experiment: FewShot, tmp_path: pathlib.Path, name: str, text: str):
    (tmp_path / name).write_text(text or json.dumps({"label": "1", "text": 'say "so"'}))
    changed = dataclasses.replace(
        experiment, data=str(tmp_path / name), pool="", columns=("label", "text") if text else (), shots=(0,)
    )
    assert [values for _, values in load(changed)[0]] == [{"label": "1", "text": 'say "so"'}]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"template": "{label}: {text}"}, r"template='\{label\}: \{text\}' must end with its one \{label\}"),
        ({"template": "so {label}"}, "has no field of the records"),
        ({"verbalizer": {"1": "yes"}}, "verbalizer must have a word for each of at least two labels"),
        ({"verbalizer": {"1": "yes", "0": 3}}, r"asked\.json: verbalizer=.* must be Mapping"),
        ({"score": "word"}, "score=word is none of sum, token, byte"),
        ({"calibration": ["wrong"]}, "calibration=wrong is none of none, contextual, pmi"),
        ({"shots": 4}, r"asked\.json: shots=4 must be tuple\[int, \.\.\.\]"),
        ({"shot": [4]}, r"asked\.json: shot is none of"),
        ({"data": "none.jsonl"}, r"none\.jsonl"),
        ({"template": "{txt} {label}"}, "line 1 has no field .txt"),
        ({"verbalizer": {"1": "yes", "2": "no"}}, "line 2 has the label 0, which has no word in verbalizer"),
        ({"shots": [9]}, "shots=9 needs a pool of at least one record more, but there are 9"),
    ],
)
def test_a_mistake_in_an_experiment_is_named(experiment: FewShot, tmp_path: pathlib.Path, changes: dict[str, Any], sentence: str):
    asked = json.loads((tmp_path / "asked.json").read_text()) | changes
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    with pytest.raises(UserError, match=sentence):
        few_shot.load(read_experiment(tmp_path / "asked.json"))
