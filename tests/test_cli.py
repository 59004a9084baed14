"""The command line: what is printed where, and every exit status."""

from __future__ import annotations

import json
import pathlib
import shutil
import subprocess
import sys

import pytest

import gptjax
from gptjax import cli
from gptjax.data.tokenizers import CharTokenizer

ROOT = pathlib.Path(__file__).resolve().parents[1]
RECIPE = str(ROOT / "configs/stdlib_tiny.py")
TINY = [
    f"--config.{setting}"
    for setting in (
        "model.num_layers=1",
        "model.model_dim=16",
        "model.num_heads=2",
        "model.max_seq_len=32",
        "data.seq_len=32",
        "data.batch_size=4",
        "data.source=text",
        "data.split_by=tail",
        "train.duration_steps=3",
        "optimizer.warmup_steps=0",
        "evaluate.sample_tokens=4",
        "evaluate.batch_size=16",
    )
]


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[pathlib.Path, list[str]]:
    """A finished run's folder and the command that made it."""
    folder = tmp_path_factory.mktemp("cli")
    text = folder / "words.txt"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 100, encoding="utf-8")
    command = ["train", f"--config={RECIPE}", f"--workdir={folder / 'run'}", *TINY, f"--config.data.path={text}"]
    assert cli.main(command) == 0
    return folder / "run", command


def say(capsys, *argv: str) -> tuple[int, str, str]:
    status = cli.main(list(argv))
    return status, *capsys.readouterr()


def test_train_prints_its_result_as_one_json_object(run, capsys):
    workdir, command = run
    status, out, err = say(capsys, *command, "--json")
    assert status == 0 and json.loads(out) == json.loads((workdir / "result.json").read_text())
    assert "finished run" in err


def test_evaluate_tells_what_smaller_weights_cost(run, capsys):
    workdir = run[0]
    command = ["evaluate", f"--workdir={workdir}", "--config.evaluate.batch_size=16", "--weights=int8"]
    status, out, _ = say(capsys, *command, "--json")
    assert status == 0
    figures = json.loads(out)
    cost = figures["int8"]
    assert cost["loss_difference"] == cost["loss"] - figures["loss"] != 0
    assert abs(cost["loss_difference"]) < 0.01
    assert cost["perplexity_difference"] == cost["perplexity"] - figures["perplexity"]


def test_evaluate_gives_the_figures_of_the_run_for_any_batch_size(run, capsys):
    workdir, _ = run
    expected = json.loads((workdir / "result.json").read_text())["eval"]
    for rows in (1, 7, 16):
        status, out, _ = say(capsys, "evaluate", f"--workdir={workdir}", "--json", f"--config.evaluate.batch_size={rows}")
        figures = json.loads(out)
        assert status == 0 and figures["step"] == 3
        assert figures["tokens"] == expected["tokens"] and figures["bytes"] == expected["bytes"]
        assert figures["loss"] == pytest.approx(expected["loss"], rel=1e-6)
        assert figures["bits_per_byte"] == pytest.approx(expected["bits_per_byte"], rel=1e-6)


def test_generate_prints_samples_and_json(run, capsys):
    workdir, _ = run
    status, out, _ = say(capsys, "generate", f"--workdir={workdir}", "--prompt=the ", "--max_new_tokens=5", "--greedy")
    assert status == 0 and out.startswith("the ")
    arguments = [
        "generate",
        f"--workdir={workdir}",
        "--prompt=the ",
        "--max_new_tokens=5",
        "--num_return_sequences=2",
        "--seed=3",
        "--json",
    ]
    first, second = (json.loads(say(capsys, *arguments)[1]) for _ in range(2))
    assert first["samples"] == second["samples"] and len(first["samples"]) == 2
    assert all(len(sample["tokens"]) <= 5 and sample["prompt"] == "the " for sample in first["samples"])


def test_generate_reads_a_prompt_from_a_file(run, capsys, tmp_path):
    workdir, _ = run
    (tmp_path / "prompt.txt").write_text("fox ", encoding="utf-8")
    status, out, _ = say(
        capsys, "generate", f"--workdir={workdir}", f"--prompt_file={tmp_path / 'prompt.txt'}", "--max_new_tokens=2"
    )
    assert status == 0 and out.startswith("fox ")


def test_a_run_with_another_tokenizer_is_refused_by_every_verb(run, capsys, tmp_path):
    workdir, command = run
    swapped = tmp_path / "swapped"
    shutil.copytree(workdir, swapped)
    CharTokenizer("the quick brown").save(swapped / "tokenizer")
    train = [word for word in command if not word.startswith("--workdir")]
    for argv in (
        ["generate", f"--workdir={swapped}", "--prompt=the"],
        ["evaluate", f"--workdir={swapped}"],
        [*train, f"--workdir={tmp_path / 'new'}", f"--config.init_from={swapped}"],
    ):
        status, _, err = say(capsys, *argv)
        assert status == 2 and "is not the tokenizer that the checkpoint was made with" in err.splitlines()[-1]
    assert gptjax.load(workdir).step == 3


def test_a_prompt_that_is_too_long_is_refused_with_the_limit(run, capsys):
    status, _, err = say(capsys, "generate", f"--workdir={run[0]}", f"--prompt={'x' * 40}")
    assert status == 2 and "model.max_seq_len=32" in err


def test_config_prints_json_that_is_a_recipe_itself(capsys, tmp_path):
    status, out, _ = say(capsys, "config", RECIPE, "--config.model.num_layers=3")
    assert status == 0 and json.loads(out)["model"]["num_layers"] == 3
    (tmp_path / "config.json").write_text(out)
    assert say(capsys, "config", str(tmp_path))[1] == out


def test_config_shows_the_difference_of_two(capsys):
    recipe = str(ROOT / "configs/gpt2_124m.py")
    status, out, _ = say(capsys, "config", recipe, f"{recipe}:medium", "--json")
    assert status == 0
    assert json.loads(out) == {
        "model.num_layers": [12, 24],
        "model.model_dim": [768, 1024],
        "model.num_heads": [12, 16],
        "model.num_kv_heads": [12, 16],
        "model.mlp_dim": [3072, 4096],
    }
    assert "model.num_layers    12 -> 24" in say(capsys, "config", recipe, f"{recipe}:medium")[1]


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["train", "--workdir=x"], "needs --config"),
        (["train", f"--config={RECIPE}"], "needs --workdir"),
        (["train", "--config=configs/stdlib_tin.py", "--workdir=x"], "does not exist; did you mean"),
        (["train", f"--config={RECIPE}", "--workdir=x", "--config.model.num_layer=2"], "did you mean model.num_layers?"),
        (["train", f"--config={RECIPE}", "--workdir=x", "--config.model.num_heads=3"], "does not divide model.model_dim"),
        (["train", f"--config={RECIPE}", "--workdir=x", "--config.optimizer.learning_rate=-1"], "must be at least 0"),
        (["train", f"--config={RECIPE}", "--workdir=x", "--config.data.seq_len=4096"], "longer than model.max_seq_len"),
        (["train", f"--config={RECIPE}", "--workdir=x", "--config.train.duration_tokens=5"], "are both given"),
        (["train", f"--config={RECIPE}", "--workdirs=x"], "did you mean --workdir?"),
        (["evaluate", "--workdir=nowhere"], "not a run's folder"),
        (["generate", "--workdir=nowhere", "--prompt=a"], "not a run's folder"),
        (["generate", "--workdir=nowhere", "--temperature=nan"], "must be a finite number"),
        (["generate", "--workdir=nowhere", "--prompt_file=nofile"], "does not exist"),
        (["config"], "takes one recipe"),
        (["trian"], "invalid choice"),
    ],
)
def test_a_mistake_gets_one_sentence_and_status_2(capsys, monkeypatch, argv, sentence):
    monkeypatch.chdir(ROOT)
    status, out, err = say(capsys, *argv)
    assert status == 2 and out == ""
    assert sentence in err and err.startswith("gptjax: ") and err.count("\n") == 1
    assert not pathlib.Path("x").exists()


def test_a_mistake_in_the_data_is_said_before_anything_is_compiled(capsys, tmp_path):
    missing = ["--config.data.source=text", f"--config.data.path={tmp_path / 'missing.txt'}"]
    status, _, err = say(capsys, "train", f"--config={RECIPE}", f"--workdir={tmp_path / 'run'}", *missing)
    assert status == 2 and "missing.txt" in err.splitlines()[-1]


def test_overriding_the_model_of_a_trained_run_is_refused(run, capsys):
    status, _, err = say(capsys, "evaluate", f"--workdir={run[0]}", "--config.model.num_layers=2")
    assert status == 2 and "was trained with 1" in err


@pytest.mark.parametrize("verb", ["train", "evaluate", "generate", "config", "sweep", "status", "compare", "attack"])
def test_every_verb_has_help_with_an_example(verb, capsys):
    with pytest.raises(SystemExit) as stopped:
        cli.main([verb, "--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0 and "example" in out and f"gptjax {verb} " in out


def test_help_and_config_do_not_import_jax():
    code = f"import sys; from gptjax import cli; cli.main(['config', {RECIPE!r}]); sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)
