"""`gptjax evaluate` with a suite and with few-shot prompts: what it prints, and options that don't go together."""

from __future__ import annotations

import json
import pathlib
import sys

import pytest

from gptjax import cli
from gptjax.verbs import scoring
from tests.harness.small_models import tiny_model

PAIR = {"sentence_good": "a dog", "sentence_bad": "a gdo", "UID": "letters", "field": "spelling"}


@pytest.fixture
def folder(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.setattr(scoring, "_load", lambda arguments: tiny_model())
    (tmp_path / "letters.jsonl").write_text(json.dumps(PAIR) + "\n")
    (tmp_path / "items.tsv").write_text("1\tab\n0\tcd\n1\tef\n")
    asked = {"data": "items.tsv", "columns": ["label", "text"], "template": "{text}:{label}"}
    asked |= {"verbalizer": {"1": "y", "0": "n"}, "shots": [0, 1], "seeds": [3, 4]}
    (tmp_path / "asked.json").write_text(json.dumps(asked))
    return tmp_path


def say(capsys: pytest.CaptureFixture[str], *argv: str) -> tuple[int, str, str]:
    status = cli.main(["evaluate", "runs/a", *argv])
    return status, *capsys.readouterr()


def test_a_suite_is_a_table_or_one_object(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    asked = ("--suite=blimp", f"--data={folder / 'letters.jsonl'}", "--score_batch_size=8")
    status, out, _ = say(capsys, *asked)
    lines = [line.split() for line in out.splitlines()]
    assert status == 0 and lines[0] == ["group", "metric", "value", "95%", "interval", "n"]
    assert [line[0] for line in lines[1:]] == ["all", "field", "paradigm", "all"]
    status, out, _ = say(capsys, *asked, "--json")
    found = json.loads(out)
    assert found["suite"] == "blimp" and found["step"] == 0
    assert found["scores"][2].keys() == {"group", "metric", "value", "low", "high", "n"}
    assert f"{found['scores'][0]['value']:.4f}" == lines[1][2]


def test_few_shot_prompts_are_a_table_or_one_object(folder: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    asked = (f"--few_shot={folder / 'asked.json'}", "--score_batch_size=8")
    status, out, _ = say(capsys, *asked)
    assert status == 0 and out.splitlines()[0].split()[:3] == ["shots", "calibration", "accuracy"]
    assert out.splitlines()[-1] == "always the commonest label: 0.6667"
    status, out, _ = say(capsys, *asked, "--json")
    found = json.loads(out)
    assert [(row["shots"], len(row["accuracies"])) for row in found["table"]] == [(0, 1), (1, 2)]
    assert found["majority"] == pytest.approx(2 / 3)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        (["--suite=blimp", "--tasks=a"], "--tasks and --suite are both given; keep one."),
        (["--data=a"], "--data belongs to --suite."),
        (["--tasks=a", "--data=a"], "--data belongs to --suite."),
        (["--limit=3"], "--limit belongs to --tasks, --suite or --few_shot."),
        (["--suite=blimp", "--weights=int8"], "--weights is of the loss; leave it out with --suite."),
        (["--suite=blmp", "--data=a"], "did you mean blimp?"),
        (["--suite=lambada"], 'needs --data=PATH, a file of {"text": ...} lines.'),
        (["--suite=lambada", "--data=nowhere"], "--data=nowhere does not exist"),
        (["--few_shot=nowhere.json"], "--few_shot=nowhere.json cannot be read: No such file or directory."),
        (["--workdir=runs/b"], "runs/a and --workdir=runs/b are both given; keep one."),
    ],
)
def test_options_that_do_not_go_together_are_refused(capsys: pytest.CaptureFixture[str], options: list[str], sentence: str):
    status, out, err = say(capsys, *options)
    assert (status, out) == (2, "") and sentence in err and err.count("\n") == 1


def test_without_lm_eval_the_extra_is_named(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lm_eval.api.model", None)
    monkeypatch.delitem(sys.modules, "gptjax.harness.lm_eval_model", raising=False)
    status, _, err = say(capsys, "--tasks=lambada_openai")
    assert status == 2 and "need the extra harness: pip install 'gptjax[harness]'" in err
