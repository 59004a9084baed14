"""The page: whole HTML, nothing from outside, nothing unescaped, and what is cut is said."""

from __future__ import annotations

import html.parser
import json
import pathlib
import re

import pytest

from gptjax.analysis.findings import analyse
from gptjax.analysis.page import MOST_CHARACTERS, page
from gptjax.analysis.predictions import Prediction, TrainText, write_predictions
from gptjax.cli import main
from gptjax.measures.bootstrap import Bootstrap
from tests.analysis.test_findings import QUICK, make

EMPTY = {"meta", "link", "line", "circle", "rect", "path"}


class Balanced(html.parser.HTMLParser):
    """Fails where an element is closed that is not open; `text` is what a reader sees."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: set[str] = set()
        self.text = ""

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in EMPTY:
            self.open.append(tag)
        assert not any(name.startswith("on") or name == "src" for name, _ in attrs)
        assert all((value or "").startswith("#") or value == "data:," for name, value in attrs if name == "href")

    def handle_endtag(self, tag: str) -> None:
        if tag not in EMPTY:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text += data if self.open[-1:] != ["style"] else ""


def read(text: str) -> Balanced:
    parser = Balanced()
    parser.feed(text)
    parser.close()
    assert parser.open == [] and "script" not in parser.tags and "@import" not in text and "url(" not in text
    assert not re.search(r"\bnan\b", parser.text)
    return parser


def test_the_page_is_whole_and_says_what_was_found():
    predictions = make()
    train = [TrainText(row.text, row.gold) for row in predictions[:30]]
    findings = analyse(predictions, train, threshold=1.0, bootstrap=QUICK)
    text = page("Spam & ham", findings, predictions, train)
    found = read(text)
    for heading in ("Summary", "Confusion", "Labels", "Slices", "Worst examples", "Calibration", "Leak report"):
        assert heading in found.text
    assert "Spam & ham" in found.text and "a digit" in found.text and "30 of 200 test texts (15.00 %)" in found.text
    assert "svg" in found.tags and "The 20 most similar of 30 pairs" in found.text
    assert page("x", analyse(predictions, bootstrap=QUICK), predictions) == page(
        "x", analyse(predictions, bootstrap=QUICK), predictions
    )


def test_what_a_stranger_wrote_is_escaped():
    evil = "<script>alert('&\"')</script>"
    rows = [Prediction(evil, evil, evil, "b" + evil, {evil: 0.2, "b" + evil: 0.8}), Prediction("2", "x", evil, evil, {evil: 1.0})]
    train = [TrainText(evil, evil)]
    text = page(evil, analyse(rows, train, {evil: "script"}, bootstrap=QUICK), rows, train)
    assert "<script" not in text and text.count("&lt;script&gt;") > 10
    read(text)


def test_what_is_cut_is_said():
    labels = [f"label {i:03}" for i in range(60)]
    rows = [Prediction(str(i), "a" * 900, labels[i % 60], labels[(i * i) % 60]) for i in range(240)]
    found = read(page("many", analyse(rows, bootstrap=Bootstrap(resamples=20)), rows))
    assert "The 24 most frequent of 60 labels; the other 36 stand together" in found.text
    assert "The 40 most frequent of 60 labels." in found.text and "cut here, of 900 characters" in found.text
    assert "a" * (MOST_CHARACTERS + 1) not in found.text and "have no probabilities" in found.text
    assert "30 of the " in found.text and "No training texts were given" in found.text


def test_free_answers_have_a_page_too():
    rows = [Prediction(str(i), f"question {i}?", ("a", "b"), "b", score=i / 20) for i in range(20)]
    found = read(page("answers", analyse(rows, bootstrap=QUICK), rows))
    assert "there is no matrix" in found.text and "a | b" in found.text and "by rising score" in found.text
    one = [Prediction("1", "alone", "a", "a")]
    assert "Nothing is wrong." in read(page("one", analyse(one, bootstrap=QUICK), one)).text


def test_the_verb_writes_the_page(tmp_path: pathlib.Path, capsys: pytest.CaptureFixture[str]):
    path, train = tmp_path / "p.jsonl", tmp_path / "train.txt"
    write_predictions(path, make())
    train.write_text("\n".join(row.text for row in make()[:5]), encoding="utf-8")
    command = ["analyze", str(path), f"--train={train}", "--pattern=seven=7", "--resamples=50"]
    assert main(command) == 0
    shown = capsys.readouterr()
    assert shown.out.splitlines()[1].startswith("accuracy") and "wrote" in shown.err
    assert "seven" in read((tmp_path / "p.html").read_text(encoding="utf-8")).text
    assert main([*command, "--json", f"--out={tmp_path / 'q.html'}"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["leak"]["exact"] >= 5 and found["summary"]["accuracy"]["n"] == 200
    assert (tmp_path / "q.html").read_text(encoding="utf-8") == (tmp_path / "p.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["none.jsonl"], "none.jsonl cannot be read"),
        (["p.jsonl", "--pattern=x"], "--pattern=x is not NAME=REGEX"),
        (["p.jsonl", "--out=p.jsonl"], "is the file of predictions"),
        (["p.jsonl", "--out=no/such/folder.html"], "cannot be written"),
        (["p.jsonl", "--resamples=1"], "--resamples=1 must be at least 2"),
    ],
)
def test_mistakes_end_with_a_sentence(
    tmp_path: pathlib.Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    complaint: str,
):
    monkeypatch.chdir(tmp_path)
    write_predictions("p.jsonl", make(8))
    assert main(["analyze", *arguments]) == 2
    assert complaint in capsys.readouterr().err
