"""A run of several objectives from the command line: trained, evaluated under each, written with, and what is refused."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import pytest

from gptjax import cli
from gptjax.data.tokenizers import load_tokenizer

KNOBS = {
    "model.num_layers": 1,
    "model.model_dim": 16,
    "model.num_heads": 2,
    "model.max_seq_len": 32,
    "data.seq_len": 32,
    "data.batch_size": 4,
    "data.source": "text",
    "data.split_by": "tail",
    "train.duration_steps": 3,
    "optimizer.warmup_steps": 0,
    "evaluate.batch_size": 8,
    "evaluate.sample_tokens": 0,
    "objective.mixture": "S=1,X/3/0.5=1,causal=1",
}
RECIPE = str(pathlib.Path(__file__).resolve().parents[2] / "configs/stdlib_tiny.py")


@pytest.fixture(scope="module")
def workdir(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "words.txt").write_text("the quick brown fox jumps over the lazy dog. " * 100, encoding="utf-8")
    knobs = [f"--config.{key}={value}" for key, value in KNOBS.items()] + [f"--config.data.path={folder / 'words.txt'}"]
    command = ["train", f"--config={RECIPE}", f"--workdir={folder / 'run'}", *knobs, "--config.objective.name=mixture"]
    assert cli.main(command) == 0
    return folder / "run"


def say(capsys: Any, *words: str) -> tuple[int, str, str]:
    capsys.readouterr()
    status = cli.main(list(words))
    out, err = capsys.readouterr()
    return status, out, err.strip().splitlines()[-1] if err.strip() else ""


def test_evaluate_names_the_objective_and_gives_the_runs_figures(workdir: pathlib.Path, capsys: Any) -> None:
    result = json.loads((workdir / "result.json").read_text())["eval"]
    assert "bits_per_byte" not in result
    for rows in (3, 8):  # what is drawn is the row's, not the batch's
        status, out, _ = say(capsys, "evaluate", f"--workdir={workdir}", "--json", f"--config.evaluate.batch_size={rows}")
        figures = json.loads(out)
        assert status == 0 and figures["objective"] == "mixture" and figures["tokens"] == result["tokens"]
        assert figures["loss"] == pytest.approx(result["loss"], rel=1e-6)
    status, out, _ = say(capsys, "evaluate", f"--workdir={workdir}")
    assert status == 0 and out.startswith("step 3: mixture loss ") and "bits" not in out


def test_evaluate_under_other_objectives(workdir: pathlib.Path, capsys: Any) -> None:
    status, out, _ = say(capsys, "evaluate", f"--workdir={workdir}", "--objective=causal")
    assert status == 0 and out.startswith("step 3: loss ") and "bits per byte" in out
    status, out, _ = say(capsys, "evaluate", f"--workdir={workdir}", "--objective=prefix", "--json")
    assert status == 0 and json.loads(out)["objective"] == "prefix"
    status, _, err = say(capsys, "evaluate", f"--workdir={workdir}", "--objective=masked")
    assert status == 2 and "objective.name=mixture has no loss with objective.name=masked" in err
    status, _, err = say(capsys, "evaluate", f"--workdir={workdir}", "--objective=infill")
    assert status == 2 and "was not trained for objective.name=infill" in err


def test_the_folder_knows_the_tokens_and_generate_what_to_do(workdir: pathlib.Path, capsys: Any, tmp_path: pathlib.Path) -> None:
    tokenizer = load_tokenizer(workdir / "tokenizer")
    assert tokenizer.special_tokens()["[S]"] < tokenizer.vocab_size
    status, out, _ = say(capsys, "generate", f"--workdir={workdir}", "--prompt=the ", "--max_new_tokens=4", "--json")
    assert status == 0 and all(token < tokenizer.vocab_size for token in json.loads(out)["samples"][0]["tokens"])
    status, _, err = say(capsys, "generate", f"--workdir={workdir}", "--prompt=the ", "--infill_suffix=fox")
    assert status == 2 and "no tokens for filling in" in err
    status, _, err = say(capsys, "convert", f"--from={workdir}", f"--output={tmp_path / 'out'}", "--to=huggingface")
    assert status == 2 and "objective.name=mixture, whose tokens see later ones" in err
