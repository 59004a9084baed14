"""A run of several objectives from the command line: trained, evaluated under each, written with, and what is refused."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from gptjax import cli
from gptjax.config import UserError, from_dict
from gptjax.data.reserved import reserve
from gptjax.data.tokenizers import ByteTokenizer, CharTokenizer, load_tokenizer
from gptjax.train import restore
from gptjax.train.step import init_params
from tests.small import random_params, small

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
    # What is drawn is the row's, not the batch's.
    status, out, _ = say(capsys, "evaluate", f"--workdir={workdir}", "--json", "--config.evaluate.batch_size=3")
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
    status, _, err = say(capsys, "convert", f"--workdir={workdir}", f"--output={tmp_path / 'out'}", "--to=huggingface")
    assert status == 2 and "objective.name=mixture, whose tokens see later ones" in err


def test_a_model_of_text_alone_is_trained_on() -> None:
    """Rows of its tokens are kept; those of the new objective's are added, to the embedding and to the head."""
    objective = from_dict({"objective": {"name": "infill"}, "data": {"seq_len": 32}, "train": {"duration_steps": 1}}).objective
    ours = reserve(ByteTokenizer(), objective, 32)
    knobs = {"model__tied_embeddings": False, "objective__name": "infill", "model__num_layers": 1}
    config, before = (small(model__vocab_size=size, **knobs) for size in (ours.vocab_size, 257))
    params = random_params(before)
    wanted = jax.eval_shape(lambda: nn.unbox(init_params(config, jnp.uint32(0))))
    said: list[str] = []
    restore._check_same_tokenizer(pathlib.Path("there"), ByteTokenizer(), ours, said.append)
    grown = restore._with_new_tokens(config, params, wanted, said.append)
    restore._check_fit(pathlib.Path("there"), grown, wanted)
    assert said == ["4 tokens of objective.name=infill are new: their rows are random."] * 2
    for whole, kept in ((grown["embed"]["tokens"], params["embed"]["tokens"]), (grown["head"].T, params["head"].T)):
        np.testing.assert_array_equal(whole[:257], kept)
        assert whole.shape[0] == 261 and jnp.abs(whole[257:]).min(1).max() > 0
    np.testing.assert_array_equal(grown["final_norm"]["scale"], params["final_norm"]["scale"])
    with pytest.raises(UserError, match="was trained with another tokenizer"):
        restore._check_same_tokenizer(pathlib.Path("there"), CharTokenizer("abc"), ours, said.append)
