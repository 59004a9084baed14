"""Perturbed texts to train on, and the verb."""

import json
import sys
import types

import pytest

from gptjax.attacks.augment import adversarial, copied
from gptjax.attacks.words import STOP_WORDS, split
from gptjax.cli import main
from gptjax.config import UserError
from tests.attacks.classifiers import Keywords

TEXTS = [f"alpha bravo charlie delta echo foxtrot the golf hotel india {word}" for word in ["one", "two", "three", "four"]]


# --- training data ---


def test_adversarial_is_a_function_of_its_arguments():
    made = {adversarial(TEXTS[0], 0, step) for step in range(20)}
    assert len(made) > 15 and TEXTS[0] not in made
    assert adversarial(TEXTS[0], 0, 3) == adversarial(TEXTS[0], 0, 3) != adversarial(TEXTS[0], 1, 3)
    assert adversarial("win free prize", 7, 1, "keyboard", 1.0) == "ein ftee prizs"  # any machine, any version of Python
    for text in made:
        pairs = list(zip(TEXTS[0].split(), text.split(), strict=True))
        assert sum(old != new for old, new in pairs) == 1 and all(old == new for old, new in pairs if old in STOP_WORDS)


@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_adversarial_changes_the_share_asked_for(share):
    changed = adversarial(TEXTS[0], 0, 0, "swap_letters", share)
    pairs = zip(split(TEXTS[0]).words, split(changed).words, strict=True)
    assert sum(old != new for old, new in pairs) == min(10, int(share * 11))  # "the" stays


def test_what_cannot_be_changed_stays():
    for text in ("", "...", "the 24", "win"):
        assert adversarial(text, 0, 0, "swap_words", 1.0) == text
    assert adversarial("win", 0, 0, "delete_word", 1.0) == "win"  # nothing would be left
    assert adversarial("Win it", 0, 0, "synonym", 1.0, {"win": ("gain",)}) == "Gain it"
    with pytest.raises(UserError, match="the perturbation synonym needs a lexicon"):
        adversarial("win", 0, 0, "synonym")


def test_copies_are_of_the_share_asked_for():
    assert copied(10, 0, 1.0) == list(range(10)) and len(copied(10, 0, 0.25)) == 2
    picks = copied(100, 0, 0.3)
    assert picks == sorted(set(picks)) == copied(100, 0, 0.3) != copied(100, 1, 0.3) and len(picks) == 30


# --- the verb ---

ROWS = [("win a free prize", "spam"), ("lunch today", "ham"), ("win win lunch", "spam"), ("win the day", "ham")]


@pytest.fixture
def model(monkeypatch) -> Keywords:
    """A classifier in the place of a run's; the run is called "run"."""
    made = Keywords({"win": 2.0, "free": 1.5, "lunch": -2.0})
    module = types.ModuleType("gptjax.tasks.predict")
    module.load_predictor = lambda path: {"run": made}[str(path)]
    monkeypatch.setitem(sys.modules, "gptjax.tasks.predict", module)
    if "gptjax.tasks" not in sys.modules:
        monkeypatch.setitem(sys.modules, "gptjax.tasks", types.ModuleType("gptjax.tasks"))
    return made


@pytest.fixture
def data(tmp_path) -> str:
    path = tmp_path / "data.tsv"
    path.write_text("body\tlabel\n" + "".join(f"{text}\t{label}\n" for text, label in ROWS))
    return str(path)


def test_the_verb(model, data, tmp_path, capsys):
    out = tmp_path / "out.jsonl"
    options = ["--text_field=body", "--recipe=deepwordbug", f"--data={data}", f"--out={out}", "--json", "--batch_size=3"]
    assert main(["attack", "run", *options]) == 0
    printed = json.loads(capsys.readouterr().out)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["original"] for line in lines] == [text for text, _ in ROWS]
    assert [line["outcome"] for line in lines] == ["succeeded", "failed", "succeeded", "skipped"]
    assert printed["recipe"] == "deepwordbug" and printed["figures"]["accuracy before"]["value"] == 0.75
    assert printed["figures"]["accuracy under attack"]["value"] == 0.25
    assert printed["figures"]["queries"]["n"] == 3 and max(map(len, model.batches)) <= 3
    assert main(["attack", "run", *options[:3], "--max_examples=2", "--target=ham"]) == 0
    captured = capsys.readouterr()
    assert "accuracy before " in captured.out and ", n=2" in captured.out and f"4 records of {data}" in captured.err


def test_lexicons_of_the_verb(model, data, tmp_path, capsys):
    words = tmp_path / "words.tsv"
    words.write_text("win\tgain\n")
    options = ["attack", "run", "--text_field=body", "--recipe=synonyms", f"--data={data}"]
    assert main([*options, f"--synonyms={words}"]) == 0
    assert "line 4: spam becomes ham: 'win' to 'gain'" in capsys.readouterr().out
    assert main(options) == 2
    assert "needs a lexicon" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"--recipe": "deepwordbugs"}, "did you mean deepwordbug?"),
        ({"--recipe": ""}, "gptjax attack needs --recipe"),
        ({"--data": ""}, "gptjax attack needs --data"),
        ({"--data": "/nowhere.tsv"}, "--data: /nowhere.tsv does not exist"),
        ({"--text_field": "bod"}, "has no column 'bod'"),
        ({"--out": "/nowhere/out.jsonl"}, "--out=/nowhere/out.jsonl cannot be written: No such file or directory"),
        ({"--target": "eggs"}, "target='eggs' is none of the labels ham, spam"),
        ({"--synonyms": "a", "--vectors": "b"}, "are two lexicons; give one"),
    ],
)
def test_mistakes_of_the_verb(model, data, capsys, change, message):
    options = {"--recipe": "typos", "--data": data, "--text_field": "body"} | change
    assert main(["attack", "run", *(f"{key}={value}" for key, value in options.items())]) == 2
    assert message in capsys.readouterr().err
