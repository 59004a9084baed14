"""Files of a task to its records: columns, splits, changed copies."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest

from gptjax.config import Config, UserError, from_dict
from gptjax.tasks.load import load_tasks


def config_of(**task: Any) -> Config:
    data = {"seq_len": 64, "batch_size": 2}
    return from_dict({"task": task, "data": data, "train": {"duration_steps": 1}, "model": {"max_seq_len": 64}})


@pytest.fixture
def texts(tmp_path: pathlib.Path) -> str:
    rows = [{"text": f"a text of several words, number {n}", "label": "odd" if n % 2 else "even"} for n in range(40)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(tmp_path / "texts.jsonl")


def test_changed_copies_of_training_records_are_trained_on_beside_them(texts: str):
    knobs = {"kind": "classification", "path": texts}
    plain = load_tasks(config_of(**knobs), log=lambda line: None).records
    half = load_tasks(config_of(**knobs, augment="typo", augment_share=0.5), log=lambda line: None).records
    assert half["eval"] == plain["eval"]
    before, after = plain["train"]["task"], half["train"]["task"]
    assert after[: len(before)] == before and len(after) == len(before) + round(len(before) / 2)
    own = {record.line: record.values for record in before}
    for copy in after[len(before) :]:
        assert copy.values["label"] == own[copy.line]["label"] and copy.values["text"] != own[copy.line]["text"]
    again = load_tasks(config_of(**knobs, augment="typo", augment_share=0.5), log=lambda line: None).records
    assert again == half


def test_the_columns_of_words_and_tags_are_chosen(tmp_path: pathlib.Path):
    pytest.importorskip("seqeval", reason="extra: evaluate")
    path = tmp_path / "a.conll"
    path.write_text("0 Ann NNP B-PER x\n1 sings VBZ O y\n\n")
    knobs = {"kind": "tagging", "path": str(path), "eval_path": str(path), "word_column": 1, "tag_column": 3}
    found = load_tasks(config_of(**knobs), log=lambda line: None)
    assert found.records["train"]["task"][0].values == {"words": ["Ann", "sings"], "tags": ["B-PER", "O"]}


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"kind": "classification", "augment": "typpo"}, "task.augment=typpo is none of .*did you mean typo"),
        ({"kind": "classification", "augment": "synonym"}, "synonym needs a lexicon"),
        ({"kind": "completion", "augment": "typo"}, "task.augment=typo changes texts as a whole, which completion"),
        ({"kind": "classification", "format": "tfds"}, "task.format=tfds needs task.tfds_name"),
    ],
)
def test_a_mistake_is_one_sentence(texts: str, knobs: dict[str, Any], sentence: str):
    with pytest.raises(UserError, match=sentence):
        load_tasks(config_of(path=texts, **knobs), log=lambda line: None)
