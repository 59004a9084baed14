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


def test_a_conversation_that_the_template_refuses_is_a_bad_row(tmp_path: pathlib.Path):
    pytest.importorskip("jinja2", reason="extra: chat")
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('Roles must alternate') }}{% endif %}[{{ m.role }}]{{ m.content }}\n{% endfor %}"
        "{% if add_generation_prompt %}[assistant]{% endif %}"
    )

    def turns(*roles: str) -> str:
        return json.dumps({"messages": [{"role": role, "content": f"{role} {n}"} for n, role in enumerate(roles)]})

    good, refused = turns("user", "assistant"), turns("user", "user", "assistant")
    files = {"good": [good] * 3, "bad": [good, refused, good], "worse": [good, '{"messages": 1}', refused, good]}
    for name, lines in files.items():
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines) + "\n")

    def load(train: str, evaluate: str, limit: int, said: Any = lambda line: None) -> Any:
        task = {"kind": "chat", "path": str(tmp_path / f"{train}.jsonl"), "eval_path": str(tmp_path / f"{evaluate}.jsonl")}
        return load_tasks(config_of(**task, chat_template=str(template), max_bad_rows=limit), said)

    because = f"cannot be written: the chat template {template} refuses the conversation: Roles must alternate"
    lines: list[str] = []
    found = load("bad", "worse", 2, lines.append)
    assert [record.line for record in found.records["train"]["task"]] == [1, 3]
    assert [record.line for record in found.records["eval"]["task"]] == [1, 4]
    assert [(one.record, one.part) for one in found.examples["eval"]] == [(0, 0), (1, 0)]
    assert found.report["documents"] == {"train": 2, "eval": 2}
    assert f"data: train: 1 bad row skipped: {tmp_path}/bad.jsonl, line 2 {because}." in lines
    with pytest.raises(UserError, match=f"bad.jsonl, line 2 {because}; task.max_bad_rows=0 lets no bad row"):
        load("good", "bad", 0)
    with pytest.raises(UserError, match="more than task.max_bad_rows=1 bad row, of which the first: .*worse.jsonl, line 2 has"):
        load("good", "worse", 1)


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
