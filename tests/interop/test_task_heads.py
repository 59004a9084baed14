"""Heads of tasks through `gptjax convert`, there and back, without torch; test_task_head_parity.py holds them to transformers."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from gptjax import cli
from gptjax.adapters import peft
from gptjax.config import Config, TaskConfig, UserError, from_dict, to_json
from gptjax.data.byte_pairs import byte_characters
from gptjax.interop import huggingface, safetensors, task_heads
from gptjax.parallel.mesh import make_mesh
from gptjax.tasks.predict import load_predictor
from gptjax.train.checkpoints import Checkpoints
from gptjax.train.restore import initial_params, load_params
from tests.interop.test_convert import raw, said
from tests.interop.test_huggingface import GPT2, LLAMA, gpt2_shapes, llama_shapes, random_tensors, write
from tests.small import LLAMA as LLAMA_KNOBS
from tests.small import random_params, small, tree_equal

SILENT: Any = lambda line: None  # noqa: E731


def with_tokenizer(folder: pathlib.Path) -> pathlib.Path:
    """Bytes alone, and 256 for the end of a text."""
    pieces = [*byte_characters(), "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


def gpt2_folder(folder: pathlib.Path, head: dict[str, tuple[int, ...]], **values: Any) -> pathlib.Path:
    shapes = gpt2_shapes() | {"transformer.wte.weight": (257, 8), "transformer.wpe.weight": (64, 8)} | head
    return with_tokenizer(write(folder, GPT2 | {"vocab_size": 257, "n_positions": 64} | values, random_tensors(shapes)))


def llama_folder(folder: pathlib.Path, head: dict[str, tuple[int, ...]], prefix: str, **values: Any) -> pathlib.Path:
    shapes = {name: shape for name, shape in llama_shapes().items() if name != "lm_head.weight"}
    shapes["model.embed_tokens.weight"] = (257, 8)
    named = {prefix + name.removeprefix("model."): shape for name, shape in shapes.items()}
    config = LLAMA | {"vocab_size": 257, "max_position_embeddings": 64} | values
    return with_tokenizer(write(folder, config, random_tensors(named | head)))


LABELLED = {"id2label": {"0": "sun", "1": "cat", "2": "dog"}}
FOLDERS: dict[str, Any] = {
    "classification": lambda to: gpt2_folder(to, {"score.weight": (3, 8)}, **LABELLED),
    "regression": lambda to: llama_folder(to, {"score.weight": (1, 8)}, "model."),
    "tagging": lambda to: llama_folder(
        to, {"score.weight": (3, 8), "score.bias": (3,)}, "model.", id2label={0: "O", 1: "B-A", 2: "I-A"}
    ),
    "answers": lambda to: llama_folder(to, {"qa_outputs.weight": (2, 8), "qa_outputs.bias": (2,)}, "transformer."),
}
WRITTEN = {
    "classification": ("GPT2ForSequenceClassification", "single_label_classification", ["sun", "cat", "dog"]),
    "regression": ("LlamaForSequenceClassification", "regression", ["label"]),
    "tagging": ("LlamaForTokenClassification", None, ["O", "B-A", "I-A"]),
    "answers": ("LlamaForQuestionAnswering", None, None),
}


@pytest.fixture(scope="module")
def records(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("records") / "train.jsonl"
    rows = [{"text": f"{word} {number}", "label": word} for number in range(8) for word in ("sun", "cat", "dog")]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, records: pathlib.Path) -> dict[str, tuple[pathlib.Path, pathlib.Path]]:
    """{kind: (a Hugging Face folder, the run's folder made of it)}"""
    base, found = tmp_path_factory.mktemp("heads"), {}
    for kind, folder in FOLDERS.items():
        there, run = folder(base / f"{kind}-there"), base / f"{kind}-run"
        task = [f"--config.task.kind={kind}", f"--config.task.path={records}"]
        assert cli.main(["convert", f"--from={there}", f"--output={run}", *task]) == 0
        found[kind] = there, run
    return found


@pytest.mark.parametrize("kind", FOLDERS)
def test_a_head_goes_there_and_back_bit_for_bit(kind: str, made: Any, tmp_path: pathlib.Path, capsys: Any) -> None:
    there, run = made[kind]
    kernel = np.asarray(load_params(run, SILENT).params["task_heads"]["task"]["kernel"])
    module = "qa_outputs" if kind == "answers" else "score"
    stored = raw(there / "model.safetensors")
    np.testing.assert_array_equal(kernel, np.frombuffer(stored[f"{module}.weight"][2], np.float32).reshape(-1, 8).T)
    assert cli.main(["convert", f"--workdir={run}", "--to=huggingface", f"--output={tmp_path / 'back'}"]) == 0
    assert raw(tmp_path / "back" / "model.safetensors") == stored
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    name, problem, labels = WRITTEN[kind]
    assert (config["architectures"], config.get("problem_type")) == ([name], problem)
    assert labels is None or [config["id2label"][str(number)] for number in range(len(labels))] == labels
    assert labels is None or config["label2id"] == {label: number for number, label in enumerate(labels)}
    assert "pad_token_id" not in config
    said = capsys.readouterr()
    assert name in said.out and ("pad_token_id is not set" in said.err) == ("Sequence" in name)
    assert "nothing around it" in said.err


def test_the_run_predicts_and_is_evaluated_at_once(made: Any, capsys: Any) -> None:
    run = made["classification"][1]
    predictor = load_predictor(run, log=SILENT)
    assert predictor.labels == ("sun", "cat", "dog")
    found = predictor.predict_proba(["cat 1"])
    assert cli.main(["predict", str(run), "cat 1"]) == 0
    (row,) = map(json.loads, capsys.readouterr().out.splitlines())
    np.testing.assert_allclose([row["probabilities"][label] for label in predictor.labels], found[0], atol=1e-12)
    assert cli.main(["evaluate", f"--workdir={run}", "--json"]) == 0
    assert 0 <= json.loads(capsys.readouterr().out)["accuracy"] <= 1
    model = load_params(run, SILENT)
    lines: list[str] = []
    started = initial_params(dataclasses.replace(model.config, init_from=str(run)), make_mesh(model.config.mesh), lines.append)
    tree_equal(started, model.params)
    assert "the head of task is the one that was trained there." in lines


def test_labels_in_another_order_take_their_outputs_with_them(made: Any, records: pathlib.Path, tmp_path: pathlib.Path) -> None:
    there, run = made["classification"]
    task = ["--config.task.kind=multilabel", f"--config.task.path={records}", "--config.task.labels=dog,sun,cat"]
    assert cli.main(["convert", f"--from={there}", f"--output={tmp_path / 'run'}", *task]) == 0
    kernels = [np.asarray(load_params(one, SILENT).params["task_heads"]["task"]["kernel"]) for one in (run, tmp_path / "run")]
    np.testing.assert_array_equal(kernels[0][:, [2, 0, 1]], kernels[1])


def test_a_run_starts_from_a_head_by_its_labels(made: Any, tmp_path: pathlib.Path) -> None:
    """Not by its shape: three other labels want a head of their own, and so does another kind of task."""
    run = made["classification"][1]
    there = load_params(run, SILENT)
    kernel = np.asarray(there.params["task_heads"]["task"]["kernel"])

    def started(folder: pathlib.Path = run, **knobs: Any) -> tuple[np.ndarray, str]:
        task, lines = dataclasses.replace(there.config.task, **knobs), []
        config = dataclasses.replace(there.config, task=task, init_from=str(folder))
        params = initial_params(config, make_mesh(config.mesh), lines.append)
        return np.asarray(params["task_heads"]["task"]["kernel"]), "\n".join(lines)

    found, said = started(labels=("dog", "sun", "cat"))
    np.testing.assert_array_equal(found, kernel[:, [2, 0, 1]])
    assert "the one that was trained there" in said
    for knobs in ({"labels": ("dog", "sun", "cow")}, {"kind": "multilabel"}):
        found, said = started(**knobs)
        assert "the head of task is new." in said and np.abs(found - kernel).max() > 1e-3
    out = tmp_path / "out"
    assert cli.main(["convert", f"--workdir={run}", "--to=huggingface", f"--output={out}"]) == 0
    np.testing.assert_array_equal(started(out)[0], kernel)
    assert "the head of task is new." in started(out, kind="multilabel")[1]  # its config.json says single_label_classification


def test_a_head_keeps_its_type_of_numbers(made: Any, records: pathlib.Path, tmp_path: pathlib.Path, capsys: Any) -> None:
    """A decoder in bfloat16 and its head in float32 go back as they came; rounding one is said."""
    there = shutil.copytree(made["classification"][0], tmp_path / "there")
    shapes = {name: shape for name, (_, shape, _) in raw(there / "model.safetensors").items()}
    arrays = {
        name: array if name == "score.weight" else array.astype(ml_dtypes.bfloat16)
        for name, array in random_tensors(shapes).items()
    }
    write(there, json.loads((there / "config.json").read_text()), arrays)
    words = ["convert", f"--from={there}", "--config.task.kind=classification", f"--config.task.path={records}"]
    assert cli.main([*words, f"--output={tmp_path / 'run'}"]) == 0
    assert "is rounded" not in capsys.readouterr().err
    back = ["convert", f"--workdir={tmp_path / 'run'}", "--to=huggingface", f"--output={tmp_path / 'back'}"]
    assert cli.main(back) == 0
    found = raw(tmp_path / "back" / "model.safetensors")
    assert found == raw(there / "model.safetensors") and {kind for kind, *_ in found.values()} == {"BF16", "F32"}
    capsys.readouterr()
    assert cli.main([*words, f"--output={tmp_path / 'rounded'}", "--dtype=bfloat16"]) == 0
    assert "is rounded to model.param_dtype=bfloat16; --dtype=float32 keeps it" in capsys.readouterr().err


def test_without_a_task_the_head_is_left_behind_and_said_so(made: Any, tmp_path: pathlib.Path, capsys: Any) -> None:
    assert cli.main(["convert", f"--from={made['tagging'][0]}", f"--output={tmp_path / 'run'}"]) == 0
    assert "a head of 3 outputs, is left behind; --config.task.path=FILE and --config.task.kind=tagging keep it." in (
        " ".join(capsys.readouterr().err.split())
    )
    assert "task_heads" not in load_params(tmp_path / "run", SILENT).params


def test_the_decoder_alone_is_written_on_request(made: Any, tmp_path: pathlib.Path) -> None:
    words = ["convert", f"--workdir={made['classification'][1]}", "--to=huggingface", "--task=none"]
    assert cli.main([*words, f"--output={tmp_path / 'out'}"]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]
    assert "score.weight" not in raw(tmp_path / "out" / "model.safetensors")


def run_of(folder: pathlib.Path, config: Config, seed: int = 0) -> dict[str, Any]:
    """The parameters of a run's folder that is written here, without a tokenizer."""
    folder.mkdir()
    params = random_params(config, seed)
    (folder / "config.json").write_text(to_json(config))
    checkpoint = dataclasses.replace(config.checkpoint, asynchronous=False)
    with Checkpoints(folder / "checkpoints", checkpoint, SILENT) as checkpoints:
        checkpoints.save(0, {"params": params}, {}, copied=False)
    return params


def test_of_a_run_of_several_tasks_one_head_is_written(tmp_path: pathlib.Path, capsys: Any) -> None:
    """Its own table to write with stays behind, since the class has none."""
    mixture = {"task.mixture": ("news=classification:x", "tags=tagging:x", "said=completion:x")}
    settings = {"task.mixture_settings": ("news.labels=a|b|c", "tags.labels=O|B-A|I-A")}
    params = run_of(tmp_path / "run", small(LLAMA_KNOBS, mixture, settings, data__packing="padded"))
    words = [f"--workdir={tmp_path / 'run'}", "--to=huggingface", f"--output={tmp_path / 'out'}"]
    assert "has the tasks news, tags, each with a head" in said(capsys, 2, *words)
    assert cli.main(["convert", *words, "--task=tags"]) == 0
    model = huggingface.open_folder(tmp_path / "out")
    assert model.config().model.tied_embeddings and "lm_head.weight" not in model.tensors
    read = model.read(model.config().model)
    tree_equal(read, {name: leaf for name, leaf in params.items() if name not in ("head", "task_heads")})
    found = task_heads.head_of(tmp_path / "out")
    assert found is not None and found.kinds == ("tagging",) and task_heads.labels_of(tmp_path / "out") == ("O", "B-A", "I-A")
    tree_equal(found.params, params["task_heads"]["tags"])
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["architectures"], config["tie_word_embeddings"]) == (["LlamaForTokenClassification"], False)
    assert cli.main(["convert", *words[:2], f"--output={tmp_path / 'plain'}", "--task=said"]) == 0
    assert "lm_head.weight" in raw(tmp_path / "plain" / "model.safetensors")


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_places_ahead_of_a_text_come_with_rows_of_their_own(method: str, made: Any, records: Any, tmp_path: pathlib.Path) -> None:
    """PEFT writes the head of such an adapter under another name, and a task keeps an example in one row."""
    there = made["classification"][0]
    folder = tmp_path / "adapter"
    folder.mkdir()
    values = {"peft_type": f"{method.upper()}_TUNING", "num_virtual_tokens": 3, "modules_to_save": ["classifier", "score"]}
    (folder / peft.CONFIG).write_text(json.dumps(values))
    arrays = random_tensors({"prompt_embeddings": (3, 8 if method == "prompt" else 32), "base_model.score.weight": (3, 8)})
    safetensors.write_file(
        folder / peft.WEIGHTS, [(name, "F32", array.shape, lambda a=array: [a]) for name, array in arrays.items()]
    )
    words = ["convert", f"--from={there}", f"--adapter={folder}", f"--output={tmp_path / 'run'}"]
    assert cli.main([*words, "--config.task.kind=classification", f"--config.task.path={records}"]) == 0
    found = load_params(tmp_path / "run", SILENT)
    assert (found.config.data.packing, found.config.data.seq_len, found.config.task.labels) == (
        "padded",
        61,
        ("sun", "cat", "dog"),
    )
    assert cli.main(["convert", f"--workdir={tmp_path / 'run'}", "--to=peft", f"--output={tmp_path / 'out'}"]) == 0
    out = raw(tmp_path / "out" / peft.WEIGHTS)
    assert out["base_model.score.weight"] == raw(folder / peft.WEIGHTS)["base_model.score.weight"]


# --- adapters -------------------------------------------------------------------------------------------------------------------


def adapter_folder(folder: pathlib.Path, tensors: dict[str, tuple[int, ...]], **values: Any) -> pathlib.Path:
    """LoRA of both layers' c_attn, and `tensors` beside it."""
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(2):
        module = f"base_model.model.transformer.h.{layer}.attn.c_attn"
        shapes |= {f"{module}.lora_A.weight": (2, 8), f"{module}.lora_B.weight": (24, 2)}
    folder.mkdir()
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "modules_to_save": ["classifier", "score"]} | values
    (folder / peft.CONFIG).write_text(json.dumps(config))
    arrays = random_tensors(shapes | tensors)
    safetensors.write_file(
        folder / peft.WEIGHTS, [(name, "F32", array.shape, lambda a=array: [a]) for name, array in arrays.items()]
    )
    return folder


SCORE = {"base_model.model.score.weight": (2, 8)}


def test_a_head_beside_an_adapter_goes_there_and_back(tmp_path: pathlib.Path, records: pathlib.Path, capsys: Any) -> None:
    """The base has a head too, of other labels: the adapter's counts."""
    base = gpt2_folder(tmp_path / "base", {"score.weight": (3, 8)}, **LABELLED)
    adapter, run, out = adapter_folder(tmp_path / "adapter", SCORE), tmp_path / "run", tmp_path / "out"
    words = [f"--from={base}", f"--adapter={adapter}", "--config.task.kind=classification", f"--config.task.path={records}"]
    line = said(capsys, 2, *words, f"--output={run}")
    assert "id2label, which task.labels overrules, has 3 labels (sun, cat, dog), but score of" in line
    assert cli.main(["convert", *words, f"--output={run}", "--config.task.labels=ham,spam"]) == 0
    assert load_predictor(run, log=SILENT).predict_proba(["cat 1"]).shape == (1, 2)
    capsys.readouterr()
    assert cli.main(["convert", f"--workdir={run}", "--to=peft", f"--output={out}"]) == 0
    found = capsys.readouterr()
    assert "GPT2ForSequenceClassification of the base model with num_labels=2 (ham, spam, in this order)" in found.err
    assert raw(out / peft.WEIGHTS) == raw(adapter / peft.WEIGHTS)
    config = json.loads((out / peft.CONFIG).read_text())
    assert (config["task_type"], config["modules_to_save"]) == ("SEQ_CLS", ["classifier", "score"])
    # merged into the decoder, the class has the head that was trained with it
    assert cli.main(["convert", f"--workdir={run}", "--to=huggingface", f"--output={tmp_path / 'merged'}"]) == 0
    merged = raw(tmp_path / "merged" / "model.safetensors")
    assert merged["score.weight"] == raw(adapter / peft.WEIGHTS)["base_model.model.score.weight"]
    assert merged["transformer.h.0.attn.c_attn.weight"] != raw(base / "model.safetensors")["transformer.h.0.attn.c_attn.weight"]


@pytest.mark.parametrize(
    ("values", "tensors", "message"),
    [
        ({"modules_to_save": ["score", "lm_head"]}, SCORE, "modules_to_save has 'lm_head', which has no counterpart here"),
        ({"modules_to_save": ["score"]}, {}, "has no tensor of score, which modules_to_save names"),
        ({"modules_to_save": None}, SCORE, "the tensor base_model.model.score.weight has no place in a gpt2 with LORA"),
        ({}, SCORE | {"base_model.model.classifier.weight": (2, 8)}, "has the heads score and classifier, where one is expected"),
        ({}, {"base_model.model.classifier.weight": (2, 8)}, "has no tensor classifier.bias beside the other one"),
        ({}, {"base_model.model.score.weight": (2,)}, r"has shape \(2,\), where a head has \[outputs, width\]"),
    ],
)
def test_what_is_saved_beside_an_adapter_is_a_head_or_refused(
    tmp_path: pathlib.Path, values: Any, tensors: Any, message: str
) -> None:
    folder = adapter_folder(tmp_path / "adapter", tensors, **values)
    model = from_dict({"model": {"num_layers": 2, "model_dim": 8, "num_heads": 2}, "train": {"duration_steps": 1}}).model
    with pytest.raises(UserError, match=message):
        peft.read_head(folder)
        peft.read(folder, "gpt2", model, {})


# --- refusals -------------------------------------------------------------------------------------------------------------------


def head(kinds: tuple[str, ...], outputs: int) -> task_heads.Head:
    return task_heads.Head(pathlib.Path("there"), "score", {"kernel": np.arange(8 * outputs).reshape(8, outputs)}, {}, kinds)


TEXT = ("classification", "multilabel", "regression")


@pytest.mark.parametrize(
    ("found", "task", "names", "message"),
    [
        (head(("regression",), 1), {"kind": "classification"}, (), "is one for task.kind=regression, not for task.kind=class"),
        (head(("tagging",), 2), {"kind": "answers"}, (), "is one for task.kind=tagging, not for task.kind=answers"),
        (head(("answers",), 3), {"kind": "answers"}, (), "is none for task.kind=answers, which has 2"),
        (head(TEXT, 2), {"kind": "classification"}, (), "nothing says what the 2 outputs of score in there are for: name them"),
        (head(TEXT, 2), {"kind": "multilabel", "labels": ("a", "b", "c")}, ("x", "y"), "task.labels has 3 labels .a, b, c., but"),
        (head(TEXT, 2), {"kind": "classification"}, ("x", "y", "z"), "id2label, which task.labels overrules, has 3 labels"),
        (head(TEXT, 2), {"kind": "classification", "labels": ("y", "b")}, ("x", "y"), "has y at another place than id2label"),
    ],
)
def test_a_head_that_is_not_the_tasks_is_refused(found: task_heads.Head, task: Any, names: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        task_heads.labelled(found, TaskConfig(path="x", **task), names, SILENT)


def test_labels_are_found_renamed_and_ordered() -> None:
    """A folder's own, new names for them, or the fields of numbers."""
    lines: list[str] = []
    task = TaskConfig(kind="classification", path="x")
    assert task_heads.labelled(head(TEXT, 2), task, ("x", "y"), lines.append)[0].labels == ("x", "y")
    renamed = TaskConfig(kind="classification", path="x", labels=("x", "b"))
    found, params = task_heads.labelled(head(TEXT, 2), renamed, ("x", "y"), lines.append)
    assert found.labels == ("x", "b") and lines == ["labels renamed: y is b."]
    np.testing.assert_array_equal(params["kernel"], head(TEXT, 2).params["kernel"])
    numbers = TaskConfig(kind="regression", path="x", label="length, width")
    assert task_heads.labelled(head(TEXT, 2), numbers, (), lines.append)[0].labels == ("length", "width")


def test_of_several_tasks_one_is_named() -> None:
    tasks = {name: TaskConfig(kind=kind, path="x") for name, kind in {"a": "tagging", "b": "answers", "c": "completion"}.items()}
    with pytest.raises(UserError, match="the tasks a, b, each with a head, and a folder has one: name it by --task"):
        task_heads.headed(tasks, "")
    with pytest.raises(UserError, match="--task=d: the run has the tasks a, b, c; --task=none writes its decoder alone"):
        task_heads.headed(tasks, "d")
    with pytest.raises(UserError, match="--task=a: the run has no task"):
        task_heads.headed({}, "a")
    one = {name: tasks[name] for name in ("a", "c")}
    assert [task_heads.headed(tasks, asked) for asked in ("b", "c", "none")] == ["b", "", ""]
    assert (task_heads.headed(one, ""), task_heads.headed({}, "")) == ("a", "")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--from={there}", "--task=x"], "--task belongs to gptjax convert with --workdir"),
        (["--from={there}", "--config.task.kind=classification"], "needs task.path, a file or a glob"),
        (["--from={there}", "--config.task.kind=tagging", "--config.task.path=x"], "not for task.kind=tagging"),
        (
            ["--from={there}", "--config.task.mixture=a=classification:x,b=tagging:x"],
            "a head each for a, b, and a folder has one",
        ),
        (["--from={plain}", "--config.task.kind=classification", "--config.task.path=x"], "there is none in"),
        (["--workdir={run}", "--to=huggingface", "--task=news"], "--task=news: the run has the tasks task"),
    ],
)
def test_refused_in_one_sentence(made: Any, tmp_path: pathlib.Path, capsys: Any, words: list[str], message: str) -> None:
    there, run = made["classification"]
    plain = gpt2_folder(tmp_path / "plain", {})
    names = {"there": there, "run": run, "plain": plain}
    assert message in said(capsys, 2, *(word.format(**names) for word in words), f"--output={tmp_path / 'new'}")
    assert not (tmp_path / "new").exists()
    shutil.rmtree(plain)
