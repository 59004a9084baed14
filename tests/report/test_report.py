"""`gptjax report`: what it finds, what it says and never says, and the files that it writes."""

from __future__ import annotations

import csv
import io
import json
import pathlib
import re

import numpy as np
import pytest

from gptjax import cli
from gptjax import config as config_lib
from gptjax.config import UserError
from gptjax.report.build import Wanted, build
from gptjax.report.cost import cost_of
from gptjax.report.environment import environment
from gptjax.report.question import read_question
from gptjax.report.results import answer
from gptjax.report.samples import MOST_CHARACTERS, samples
from gptjax.report.sources import find_sources
from gptjax.sweeps.compare import compare
from gptjax.sweeps.folder import State
from gptjax.sweeps.groups import group_runs, read_runs
from gptjax.train.flops import flops_per_token
from tests.analysis.test_page import read
from tests.sweeps.drive import prepare
from tests.sweeps.test_compare import make_groups, make_run

README = "# Which rate?\n\nSome words.\n\nQuestion: does `rate` matter,\nand by **how much**?\n\n    gptjax sweep x\n"
MEANS = {1e-3: 1.90, 2e-3: 1.80, 3e-3: 1.8001}


@pytest.fixture
def runs(tmp_path: pathlib.Path) -> pathlib.Path:
    """A folder of 12 runs: 3 rates, 4 seeds, a sample in the first."""
    folder = tmp_path / "runs"
    make_groups(folder, MEANS, seeds=4)
    for one in folder.iterdir():
        result = json.loads((one / "result.json").read_text())
        about = {"versions": {"jax": "0.10.2"}, "git_commit": "abc", "git_dirty": False, "hardware": {"device_count": 2}}
        (one / "result.json").write_text(json.dumps(result | {"tokens": 4000} | about))
    (folder / "0.001-0" / "samples").mkdir()
    (folder / "0.001-0" / "samples" / "00000020.txt").write_text("earlier")
    (folder / "0.001-0" / "samples" / "00000040.txt").write_text("<b>To be</b> ```or``` not |" + "x" * 2 * MOST_CHARACTERS)
    return folder


def no_adapters(config: config_lib.Config) -> int | None:
    raise AssertionError("no run here has adapters")


# --- which runs, and what was asked ---


@pytest.mark.parametrize(
    ("text", "title", "question"),
    [
        (README, "Which rate?", "Question: does `rate` matter, and by **how much**?"),
        ("# A\n\n**Question.** Is it so?\n", "A", "**Question.** Is it so?"),
        ("# A\n\nWords.\n\n## Question\n\nIs it\nso?\n\nNo.\n", "A", "Is it so?"),
        ("# A\n```\n# not a title\n\nQuestion: no\n```\n\nThe first words.\n\nMore.", "A", "The first words."),
        (
            "<!-- Question: hidden -->\n\n| a | b |\n|---|---|\n\nQuestions of taste come later.",
            "folder",
            "Questions of taste come later.",
        ),
        ("", "folder", ""),
    ],
)
def test_the_question_of_a_readme(tmp_path, text, title, question):
    path = tmp_path / "folder" / "README.md"
    path.parent.mkdir()
    path.write_text(text)
    found = read_question(path)
    assert (found.title, found.text) == (title, question)


def test_runs_are_found_from_any_folder_around_them(runs, tmp_path, monkeypatch):
    (runs / "README.md").write_text(README)
    found = find_sources([str(runs)])
    assert len(found.runs) == 12 and found.questions[0].title == "Which rate?"
    assert len(find_sources([str(runs / "0.001-0")]).runs) == 1
    folder, _ = prepare(tmp_path / "sweep", ["a"] * 3)
    definition = folder.read_definition() | {"file": "experiments/learning_rate/sweep.py:short"}
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps(definition))
    monkeypatch.chdir(tmp_path)
    of_sweep, of_trials = find_sources(["sweep"]), find_sources(["sweep/trials"])
    assert of_sweep.folders == of_trials.folders == ("sweep",) and len(of_sweep.runs) == 3
    # The README beside the sweep file, which is found from the repository's root too.
    assert of_sweep.questions[0].title.startswith("Which learning rate") and of_sweep.arguments == ("short",)
    assert find_sources(["sweep"], str(runs / "README.md")).questions[0].title == "Which rate?"


def test_an_experiments_folder_finds_its_runs(runs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    experiment = tmp_path / "experiments" / "rate"
    experiment.mkdir(parents=True)
    (experiment / "README.md").write_text(README)
    (experiment / "sweep.py").write_text("")
    with pytest.raises(UserError, match="no runs, and there are none in runs/rate; name the sweep's folder as well"):
        find_sources(["experiments/rate"])
    both = find_sources(["experiments/rate", "runs"])
    assert len(both.runs) == 12 and [one.title for one in both.questions] == ["Which rate?"]
    (tmp_path / "runs").rename(tmp_path / "elsewhere")
    (tmp_path / "runs").mkdir()
    (tmp_path / "elsewhere").rename(tmp_path / "runs" / "rate")
    assert len(find_sources(["experiments/rate"]).runs) == 12


# --- the answer ---


def test_the_answer_claims_no_more_than_compare(runs):
    report = compare(group_runs(read_runs([str(path) for path in sorted(runs.iterdir())])))
    said = answer(report)
    losses = [json.loads((runs / f"0.002-{seed}" / "result.json").read_text())["eval"]["loss"] for seed in range(4)]
    assert said.startswith(
        f"2 (learning_rate=0.002) has the lowest mean eval/loss, {np.mean(losses):.4f} (4 seeds, 95% interval "
    )
    assert said.endswith("It is better than 1 (learning_rate=0.001); it is not shown to be better than 3 (learning_rate=0.003).")
    assert answer(report, higher_is_better=True).startswith("No winner. 1 (learning_rate=0.001) has the highest mean")


@pytest.mark.parametrize("seed", range(6))
def test_a_group_is_called_better_only_where_compare_names_it(tmp_path, seed):
    draw = np.random.default_rng(seed)
    for rate in range(1, 5):
        for number in range(int(draw.integers(2, 6))):
            loss = 1.8 + 0.002 * float(draw.normal()) + 0.004 * float(draw.integers(0, 2))
            make_run(tmp_path / f"{rate}-{number}", number, loss, rate=rate / 1000, finished=bool(draw.random() < 0.9))
    report = compare(group_runs(read_runs([str(path) for path in sorted(tmp_path.iterdir())])))
    said = answer(report)
    best = next(group for group in report.groups if f"{group.title} has the lowest mean" in said)
    beaten = {c.a.title if c.winner is c.b else c.b.title for c in report.comparisons if c.winner is best}
    claimed = said.partition("not shown")[0].partition("better than ")[2]
    assert ("all 3 others" in claimed and len(beaten) == 3) or beaten == {g.title for g in report.groups if g.title in claimed}
    assert said.startswith("No winner.") == (not beaten)


def test_one_group_and_no_group_with_enough_seeds(tmp_path):
    one = make_groups(tmp_path / "one", {1e-3: 1.9}, seeds=3)
    assert "one group of runs, and nothing to compare it with" in answer(compare(group_runs(read_runs(one))))
    few = make_groups(tmp_path / "few", {1e-3: 1.9, 2e-3: 0.5}, seeds=2)
    sources = find_sources(few)
    page = build(sources, Wanted(), no_adapters).page
    assert "No winner" in str(page) and "1 pair of groups has fewer than 3 seeds in common, and is not compared" in str(page)


# --- cost, environment, samples ---


def test_cost_counts_tokens_by_what_they_cost(tmp_path):
    (run,) = read_runs([str(make_run(tmp_path / "a", 0, 1.5))])
    each = flops_per_token(run.config.model, run.config.data.seq_len)
    spent = cost_of(run, no_adapters)  # result.json says nothing of tokens: the last row does
    assert (spent.tokens, spent.seconds, spent.device_seconds) == (4000, 80, 80) and spent.flops == pytest.approx(4000 * each)
    rows = (tmp_path / "a" / "metrics.jsonl").read_text().splitlines()
    rows = [json.dumps(json.loads(row) | ({"seq_len": 64} if json.loads(row)["step"] <= 20 else {})) for row in rows]
    (tmp_path / "a" / "metrics.jsonl").write_text("\n".join(rows) + "\n")
    shorter = flops_per_token(run.config.model, 64)
    assert cost_of(run, no_adapters).flops == pytest.approx(2000 * shorter + 2000 * each) and shorter < each
    (tmp_path / "a" / "result.json").write_text(
        json.dumps({"eval": {}, "tokens": 8000, "seconds": 10, "hardware": {"device_count": 4}})
    )
    (run,) = read_runs([str(tmp_path / "a")])
    assert cost_of(run, no_adapters).device_seconds == 40


def test_runs_of_unlike_versions_are_pointed_out(runs):
    def warnings():
        return [block.text for block in environment(find_sources([str(runs)]).runs) if getattr(block, "kind", "") == "warning"]

    assert warnings() == []
    result = json.loads((runs / "0.001-0" / "result.json").read_text())
    (runs / "0.001-0" / "result.json").write_text(json.dumps(result | {"versions": {"jax": "0.12.0"}, "git_dirty": True}))
    assert warnings() == [
        "The runs were not all made alike: jax and commit differ. A difference between groups may come from that."
    ]


def test_samples_are_the_last_of_the_lowest_seed(runs):
    note, quote = samples(tuple(group_runs(find_sources([str(runs)]).runs)))
    assert quote.title == "1 learning_rate=0.001, seed 0, step 40" and "2 groups without a sample" in note.text
    assert quote.text.startswith("<b>To be</b>") and quote.text.endswith("[cut here, of 1,427 characters]")


# --- the files ---


def test_the_verb_writes_a_page_and_the_same_as_markdown_and_csv(runs, capsys):
    (runs / "README.md").write_text(README)
    assert cli.main(["report", str(runs), "--target=2", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert [report["metric"] for report in found["reports"]] == ["eval/loss", "tokens_to_loss", "time_to_loss"]
    out = runs / "report"
    assert sorted(map(str, found["files"])) == sorted(str(path) for path in out.rglob("*.*") if path.is_file())
    text = (out / "report.html").read_text()
    page = read(text)
    for words in (found["answer"], "does rate matter, and by how much?", "<b>To be</b> ```or``` not |", "no winner"):
        assert words in page.text
    for heading in ("Question and answer", "Tokens to loss", "Curves", "What it hangs on", "Configs", "Samples", "Runs", "Cost"):
        assert f">{heading}</h2>" in text
    assert "<b>To" not in text and len(re.findall(r'<div class="(wide|narrow)"><svg', text)) == 2 * text.count("<figure")
    shown = (out / "report.md").read_text()
    pictures = re.findall(r"!\[[^\n]*\]\((figures/[a-z_]+\.png)\)", shown)
    assert len(pictures) == text.count("<figure") and all((out / name).read_bytes().startswith(b"\x89PNG") for name in pictures)
    assert "| knob | values | share |" in shown and "````text\n<b>To be</b>" in shown
    rows = list(csv.DictReader(io.StringIO((out / "tables" / "runs.csv").read_text())))
    losses = {(row["label"], int(row["seed"])): float(row["eval/loss"]) for row in rows}
    assert losses["learning_rate=0.002", 3] == json.loads((runs / "0.002-3" / "result.json").read_text())["eval"]["loss"]
    assert {row["optimizer.learning_rate"] for row in rows} == {"0.001", "0.002", "0.003"}
    curves = list(csv.DictReader(io.StringIO((out / "tables" / "curves.csv").read_text())))
    ends = [float(row["mean"]) for row in curves if row["curve"] == "eval/loss" and row["tokens"] == "4000"]
    assert ends == pytest.approx([np.mean([losses[f"learning_rate={rate:g}", seed] for seed in range(4)]) for rate in MEANS])
    before = text
    assert cli.main(["report", str(runs), "--target=2", "--formats=html"]) == 0  # its own folder is no run
    assert (out / "report.html").read_text() == before


def test_failed_and_waiting_trials_are_shown(tmp_path, capsys):
    folder, trials = prepare(tmp_path / "sweep", ["a"] * 5)
    for trial in trials[:3]:
        own = folder.trial(trial.name)
        config = folder.requested(trial.name).with_vocab_size(65)
        (own / "config.json").write_text(config_lib.to_json(config))
        (own / "result.json").write_text(json.dumps({"eval": {"loss": 1.5 + trials.index(trial) / 100}}))
    folder.write_state(trials[3].name, State("failed", "nonfinite", "the gradient was not finite."))
    assert cli.main(["report", str(tmp_path / "sweep"), "--formats=html", "--title=T"]) == 0
    page = read((tmp_path / "sweep" / "report" / "report.html").read_text()).text
    assert "2 runs without a result: 1 failed (nonfinite), 1 waiting" in page and "the gradient was not finite." in page
    assert "5 runs in 1 group" in page  # the vocabulary's size, which those lack, parts nobody
    assert "there are no curves" in page and "The runs wrote no samples" in page


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "nowhere does not exist."),
        (["{tmp}/empty"], "empty holds no run and no sweep: no config.json and no sweep.json."),
        (["{tmp}/runs", "{tmp}/runs"], "several folders needs --out=FOLDER"),
        (["{tmp}/runs", "--formats=html,pdf"], "--formats names 'pdf'; it may name html, markdown, csv"),
        (["{tmp}/runs", "--readme=none.md"], "none.md cannot be read: No such file"),
        (["{tmp}/runs", "--out={tmp}/runs/0.001-0/config.json"], "is a file, and must be a folder"),
        (["{tmp}/runs", "--metric=accuracy"], "no run has the metric accuracy"),
        (["{tmp}/runs", "--baseline=9"], "--baseline=9: the groups are numbered 1 to 3"),
        (["{tmp}/runs", "--confidence=1"], "must be below 1"),
    ],
)
def test_a_mistake_is_one_sentence(runs, tmp_path, capsys, arguments, sentence):
    (tmp_path / "empty").mkdir()
    assert cli.main(["report", *(word.format(tmp=tmp_path) for word in arguments)]) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1
    assert not (runs / "report").exists()


def test_without_matplotlib_it_says_so_before_anything(runs, monkeypatch, capsys):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert cli.main(["report", str(runs)]) == 2
    err = capsys.readouterr().err
    assert "pip install 'gptjax[plot]'" in err and "--formats=html,csv" in err and not (runs / "report").exists()
    assert cli.main(["report", str(runs), "--formats=html,csv"]) == 0
