"""`gptjax convert` from the command line: folders that appear whole, or not at all."""

from __future__ import annotations

import dataclasses
import errno
import gc
import json
import pathlib
import shutil
import tracemalloc
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from gptjax import cli
from gptjax.config import UserError
from gptjax.data.byte_pairs import byte_characters
from gptjax.interop import llama2c, safetensors, tensors, verify
from gptjax.interop.formats import open_model
from gptjax.parallel.mesh import make_mesh
from gptjax.train import manifest
from gptjax.train.restore import initial_params, load_params, load_run
from tests.interop.test_huggingface import GPT2, LLAMA, gpt2_shapes, leaves, llama_shapes, random_tensors, write

safetensors_numpy = pytest.importorskip("safetensors.numpy")


def hugging_face_folder(folder: pathlib.Path, dtype: Any = ml_dtypes.bfloat16) -> pathlib.Path:
    """A GPT-2 with a tokenizer of bytes alone; the norms of the first block stay float32."""
    shapes = gpt2_shapes() | {"transformer.wte.weight": (257, 8)}
    made = {name: array if ".0.ln_" in name else array.astype(dtype) for name, array in random_tensors(shapes).items()}
    write(folder, GPT2 | {"vocab_size": 257}, made)
    pieces = [*byte_characters(), "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({piece: i for i, piece in enumerate(pieces)}))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    return folder


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, pathlib.Path]:
    """(a Hugging Face folder, the run's folder made of it)"""
    base = tmp_path_factory.mktemp("converted")
    there, made = hugging_face_folder(base / "there"), base / "run"
    assert cli.main(["convert", f"--from={there}", f"--output={made}"]) == 0
    return there, made


def said(capsys: pytest.CaptureFixture[str], status: int, *words: str) -> str:
    capsys.readouterr()
    assert cli.main(["convert", *words]) == status
    (line,) = capsys.readouterr().err.strip().splitlines()
    return line


def test_a_run_is_made_that_loads_through_the_usual_door(converted: tuple[pathlib.Path, pathlib.Path], capsys: Any) -> None:
    there, made = converted
    assert sorted(path.name for path in made.iterdir()) == ["checkpoints", "config.json", "tokenizer"]
    assert sorted(path.name for path in made.parent.iterdir()) == ["run", "there"]  # nothing is left beside it
    model = load_run(made, lambda line: None)
    assert (model.step, model.tokenizer.kind, model.tokenizer.bos_id) == (0, "huggingface", 256)
    assert model.tokenizer.files()["vocab.json"] == (there / "vocab.json").read_bytes()
    assert cli.main(["generate", f"--workdir={made}", "--prompt=ab", "--greedy", "--max_new_tokens=3", "--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["samples"][0]["tokens"]) == 3


def test_training_does_not_go_on_in_its_folder(converted: tuple[pathlib.Path, pathlib.Path], tmp_path: Any, capsys: Any) -> None:
    made = converted[1]
    (tmp_path / "text.txt").write_text("to be or not to be " * 200)
    options = [
        "--config.data.source=text",
        f"--config.data.path={tmp_path / 'text.txt'}",
        "--config.data.seq_len=6",
        "--config.data.split_by=tail",
    ]
    assert (
        cli.main(
            [
                "train",
                f"--config={made / 'config.json'}",
                f"--workdir={made}",
                "--allow_changes=data.source,data.path,data.seq_len,data.split_by",
                *options,
            ]
        )
        == 2
    )
    assert "holds the parameters of a converted model and no state to go on from" in capsys.readouterr().err


def test_it_is_evaluated_on_a_text_with_its_own_tokenizer(
    converted: tuple[pathlib.Path, pathlib.Path], tmp_path: Any, capsys: Any
) -> None:
    (tmp_path / "text.txt").write_text("to be or not to be " * 20)
    data = ["--config.data.source=text", f"--config.data.path={tmp_path}/text.txt", "--config.data.split_by=tail"]
    assert cli.main(["evaluate", f"--workdir={converted[1]}", *data, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["loss"] > 1


def test_it_is_a_starting_point_of_a_run(converted: tuple[pathlib.Path, pathlib.Path]) -> None:
    model = load_params(converted[1], lambda line: None)
    config = dataclasses.replace(model.config, init_from=str(converted[1]))
    started = initial_params(config, make_mesh(config.mesh), lambda line: None)
    assert all(np.array_equal(a, b) for a, b in zip(leaves_of(started), leaves_of(model.params), strict=True))


def test_it_goes_back_bit_for_bit(converted: tuple[pathlib.Path, pathlib.Path], tmp_path: pathlib.Path) -> None:
    there, made = converted
    assert (
        cli.main(["convert", f"--workdir={made}", "--to=huggingface", f"--output={tmp_path / 'back'}", "--max_shard_size=2KB"])
        == 0
    )
    back = tmp_path / "back"
    index = json.loads((back / "model.safetensors.index.json").read_text())
    read = {name: array for file in set(index["weight_map"].values()) for name, array in raw(back / file).items()}
    assert index["metadata"]["total_size"] == sum(len(content) for _, _, content in read.values())
    assert read == raw(there / "model.safetensors")
    assert {kind for kind, _, _ in read.values()} == {"BF16", "F32"}
    for name in ("vocab.json", "merges.txt"):
        assert (back / name).read_bytes() == (there / name).read_bytes()
    config = json.loads((back / "config.json").read_text())
    assert {name: config[name] for name in ("model_type", "n_embd", "eos_token_id")} == {
        "model_type": "gpt2",
        "n_embd": 8,
        "eos_token_id": 256,
    }

    again = tmp_path / "again"
    assert cli.main(["convert", f"--from={back}", f"--output={again}"]) == 0
    one, other = (load_params(folder, lambda line: None) for folder in (made, again))
    assert all(np.array_equal(a, b) for a, b in zip(leaves_of(one.params), leaves_of(other.params), strict=True))


def raw(path: pathlib.Path) -> dict[str, tuple[str, tuple[int, ...], bytes]]:
    """By the format's description: the header's length, the header, the bytes."""
    content = path.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:start])
    header.pop("__metadata__", None)
    return {
        name: (
            entry["dtype"],
            tuple(entry["shape"]),
            content[start + entry["data_offsets"][0] : start + entry["data_offsets"][1]],
        )
        for name, entry in header.items()
    }


def leaves_of(params: Any) -> list[np.ndarray]:
    import jax

    return [np.asarray(leaf) for leaf in jax.tree.leaves(params)]


def test_the_package_safetensors_reads_what_is_written(tmp_path: pathlib.Path) -> None:
    rng = np.random.default_rng(0)
    made = {"a": rng.normal(size=(3, 5)).astype(np.float32), "b.c": rng.normal(size=7).astype(np.float16)}
    kinds = {"a": "F32", "b.c": "F16"}
    safetensors.write_file(
        tmp_path / "x", [(name, kinds[name], array.shape, lambda a=array: [a]) for name, array in made.items()]
    )
    read = safetensors_numpy.load_file(tmp_path / "x")
    assert read.keys() == made.keys()
    for name, array in made.items():
        np.testing.assert_array_equal(read[name], array)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_another_type_of_weights_is_rounded_to(
    converted: tuple[pathlib.Path, pathlib.Path], tmp_path: pathlib.Path, dtype: str
) -> None:
    assert (
        cli.main(["convert", f"--workdir={converted[1]}", "--to=huggingface", f"--output={tmp_path / 'x'}", f"--dtype={dtype}"])
        == 0
    )
    found = raw(tmp_path / "x" / "model.safetensors")
    assert {kind for kind, _, _ in found.values()} == {{"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]}
    assert json.loads((tmp_path / "x" / "config.json").read_text())["torch_dtype"] == dtype
    kind = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}[dtype]
    expected = np.frombuffer(raw(converted[0] / "model.safetensors")["transformer.wpe.weight"][2], ml_dtypes.bfloat16).astype(
        np.float32
    )
    np.testing.assert_array_equal(np.frombuffer(found["transformer.wpe.weight"][2], kind), expected.astype(kind))


def test_knobs_may_be_laid_over_what_the_model_says(tmp_path: pathlib.Path) -> None:
    there = write(
        tmp_path / "there",
        LLAMA | {"head_dim": 4, "num_attention_heads": 2, "num_key_value_heads": 1},
        random_tensors(llama_shapes()),
    )
    longer = ["--config.model.max_seq_len=24", "--config.model.rope_scaling=linear", "--config.model.rope_scaling_factor=4"]
    assert cli.main(["convert", f"--from={there}", f"--output={tmp_path / 'run'}", *longer, "--dtype=bfloat16"]) == 0
    model = load_params(tmp_path / "run", lambda line: None).config.model
    assert (model.max_seq_len, model.rope_scaling_factor, model.param_dtype) == (24, 4.0, "bfloat16")
    assert cli.main(["convert", f"--workdir={tmp_path / 'run'}", "--to=huggingface", f"--output={tmp_path / 'back'}"]) == 0
    config = json.loads((tmp_path / "back" / "config.json").read_text())
    assert config["rope_scaling"] == {"rope_type": "linear", "factor": 4.0} and config["max_position_embeddings"] == 24


def test_reading_holds_one_copy(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layout that is transposed, in pieces of 64 KiB: beside the model of 6 MB, some pieces are held."""
    monkeypatch.setattr(tensors, "CHUNK_BYTES", 2**16)
    sizes = {"vocab_size": 2000, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 1, "head_dim": 64}
    shapes = {"model.embed_tokens.weight": (2000, 256), "lm_head.weight": (2000, 256), "model.norm.weight": (256,)}
    block = {
        "input_layernorm": (256,),
        "post_attention_layernorm": (256,),
        "self_attn.q_proj": (256, 256),
        "self_attn.o_proj": (256, 256),
    }
    block |= {"self_attn.k_proj": (128, 256), "self_attn.v_proj": (128, 256)}
    block |= {"mlp.gate_proj": (512, 256), "mlp.up_proj": (512, 256), "mlp.down_proj": (256, 512)}
    shapes |= {f"model.layers.0.{name}.weight": shape for name, shape in block.items()}
    model = open_model(write(tmp_path / "m", LLAMA | sizes, random_tensors(shapes)))
    config = model.config().model
    model.check(config)
    size = sum(np.prod(shape) for shape in shapes.values()) * 4
    thresholds = gc.get_threshold()
    gc.set_threshold(700, 10, 10)  # Python's own: what traces leave behind is not to count for long
    tracemalloc.start()
    params = model.read(config)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    gc.set_threshold(*thresholds)
    assert sum(leaf.nbytes for leaf in leaves(params).values()) == size
    assert size < peak < 1.15 * size


# --- refusals -------------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--from={there}"], "gptjax convert needs --output"),
        (["--output={new}"], "needs either --from, a model of another format, or --workdir"),
        (["--from={there}", "--workdir={run}", "--output={new}"], "needs either --from"),
        (["--workdir={run}", "--output={new}"], "gptjax convert needs --to"),
        (["--workdir={there}/nowhere", "--to=huggingface", "--output={new}"], "nowhere is not a run's folder"),
        (["--from={there}/nowhere", "--output={new}"], "nowhere does not exist"),
        (["--from={there}", "--output={run}"], "run exists and is not an empty folder; take another name"),
        (["--from={there}", "--output={there}/config.json"], "config.json exists and is not an empty folder"),
        (["--from={there}", "--step=1", "--output={new}"], "--step belongs to gptjax convert with --workdir"),
        (["--from={there}", "--dtype=float16", "--output={new}"], "--dtype=float16 is for --to=huggingface"),
        (["--workdir={run}", "--to=huggingface", "--tokenizer=x", "--output={new}"], "--tokenizer belongs to"),
        (["--workdir={run}", "--to=huggingface", "--step=7", "--output={new}"], "has no checkpoint of step 7"),
        (["--workdir={run}", "--to=huggingface", "--max_shard_size=big", "--output={new}"], "'big' must be a size such as 500MB"),
        (["--from={there}", "--tokenizer={there}/none.json", "--output={new}"], "none.json does not exist"),
        (["--from={there}", "--tokenizer={there}/merges.txt", "--output={new}"], "merges.txt holds no tokenizer"),
        (["--from={there}/model.safetensors", "--output={new}"], "is one file of a Hugging Face folder; name the folder"),
        (["--from={there}/merges.txt", "--output={new}"], "merges.txt has 14 bytes, too few for the header of a llama2.c file"),
        (["--from={there}", "--config.model.num_heads=3", "--output={new}"], "num_heads=3 does not divide"),
        (["--from={there}", "--config.model.mlp_dim=16", "--output={new}"], "has shape (8, 32), but its config asks for (8, 16)"),
    ],
)  # fmt: skip
def test_refused_in_one_sentence(
    converted: tuple[pathlib.Path, pathlib.Path], tmp_path: pathlib.Path, capsys: Any, words: list[str], message: str
) -> None:
    there, made = converted
    names = {"there": there, "run": made, "new": tmp_path / "new"}
    assert message in said(capsys, 2, *(word.format(**names) for word in words))
    assert not list(tmp_path.iterdir())


def test_a_model_that_cannot_be_expressed_is_refused_by_its_knob(
    converted: tuple[pathlib.Path, pathlib.Path], tmp_path: pathlib.Path, capsys: Any
) -> None:
    changed = shutil.copytree(converted[1], tmp_path / "run")
    config = json.loads((changed / "config.json").read_text())
    config["model"]["attention_softcap"] = 5.0
    (changed / "config.json").write_text(json.dumps(config))
    line = said(capsys, 2, f"--workdir={changed}", "--to=huggingface", f"--output={tmp_path / 'new'}")
    assert "nearest, gpt2, cannot do model.attention_softcap=5.0" in line
    assert not (tmp_path / "new").exists()


def test_a_tokenizer_with_more_ids_than_rows_is_refused_or_left_out(tmp_path: pathlib.Path, capsys: Any) -> None:
    there = hugging_face_folder(tmp_path / "there")
    write(there, GPT2, random_tensors(gpt2_shapes()))  # 11 rows
    assert "the tokenizer has 257 ids, but the model's embedding has 11 rows" in said(
        capsys, 2, f"--from={there}", f"--output={tmp_path}/new"
    )
    assert cli.main(["convert", f"--from={there}", "--tokenizer=none", f"--output={tmp_path}/new"]) == 0
    with pytest.raises(UserError, match="there is no tokenizer in"):
        load_run(tmp_path / "new", lambda line: None)


@pytest.mark.parametrize("content", [b"PK\x03\x04 a zip archive of pickles", b"\x80\x02 a pickle"])
def test_a_pickle_is_refused_with_the_way_to_safetensors(tmp_path: pathlib.Path, capsys: Any, content: bytes) -> None:
    (tmp_path / "model.pt").write_bytes(content * 3)
    line = said(capsys, 2, f"--from={tmp_path}/model.pt", f"--output={tmp_path}/new")
    assert "is a pickle, which can run any code" in line and "safe_serialization=True" in line


def test_a_full_disk_leaves_nothing(
    converted: tuple[pathlib.Path, pathlib.Path], tmp_path: pathlib.Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, made = converted
    into, out = (
        [f"--from={there}", f"--output={tmp_path}/new"],
        [f"--workdir={made}", "--to=huggingface", f"--output={tmp_path}/new"],
    )

    def full(*_: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(2**30, 2**30, 1000))
        for words in (into, out):
            assert "but its disk has 0.00 GB free" in said(capsys, 2, *words)
    with monkeypatch.context() as patch:
        patch.setattr(safetensors, "write_file", full)
        assert "No space left on device; nothing is left of" in said(capsys, 1, *out)
    with monkeypatch.context() as patch:
        patch.setattr(manifest, "write", full)  # behind the arrays, the last step of a checkpoint
        capsys.readouterr()
        assert cli.main(["convert", *into]) == 1
        assert "could not be saved" in capsys.readouterr().err.splitlines()[-1]
    assert not list(tmp_path.iterdir())


def test_verify_without_transformers_names_the_extra(
    converted: tuple[pathlib.Path, pathlib.Path], tmp_path: pathlib.Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent() -> Any:
        raise ImportError("no", name="transformers")

    monkeypatch.setattr(verify, "_packages", absent)
    for words in ([f"--from={converted[0]}"], [f"--workdir={converted[1]}", "--to=huggingface"]):
        line = said(capsys, 2, *words, f"--output={tmp_path}/new", "--verify")
        assert "transformers is missing: pip install 'gptjax[parity]'" in line
    assert not list(tmp_path.iterdir())


@pytest.mark.parity
def test_verify_writes_the_largest_error_and_keeps_nothing_where_it_is_large(
    converted: tuple[pathlib.Path, pathlib.Path], tmp_path: pathlib.Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    there, made = converted
    for words, name in (([f"--from={there}"], "in"), ([f"--workdir={made}", "--to=huggingface"], "out")):
        assert cli.main(["convert", *words, f"--output={tmp_path / name}", "--verify", "--json"]) == 0
        found = json.loads((tmp_path / name / "verify.json").read_text())
        assert 0 < found["largest_error"] < 1e-5 < 0.1 < found["largest_logit"]
        assert json.loads(capsys.readouterr().out)["verify"] == found
    monkeypatch.setattr(verify, "compare", lambda *_: {"largest_error": 0.1, "largest_logit": 3.0})
    line = said(capsys, 1, f"--from={there}", f"--output={tmp_path / 'bad'}", "--verify")
    assert "logits differ by up to 0.1 (they reach 3)" in line and not (tmp_path / "bad").exists()


# --- llama2.c -------------------------------------------------------------------------------------------------------------------


def test_llama2c_files_that_are_none(tmp_path: pathlib.Path, shared_data: pathlib.Path) -> None:
    whole = (shared_data / "stories260K" / "stories260K.bin").read_bytes()
    versioned = (shared_data / "stories260K" / "checkpoint_v1.bin").read_bytes()
    cases = [
        (whole[:20], "too few for the header"),
        (whole[:-4], "but its header speaks of"),
        (whole + b"\0" * 4, "but its header speaks of"),
        (b"\0" * 100, "makes no sense"),
        (whole[:12] + (7).to_bytes(4, "little") + whole[16:], "makes no sense"),  # 64 over 7 heads
        (versioned[:4] + (2).to_bytes(4, "little") + versioned[8:], "of version 2; read are 0 and 1"),
    ]
    for content, message in cases:
        (tmp_path / "model").write_bytes(content)
        with pytest.raises(UserError, match=message):
            open_model(tmp_path / "model")


def test_llama2c_tokenizers_that_are_none(tmp_path: pathlib.Path, shared_data: pathlib.Path) -> None:
    whole = (shared_data / "stories260K" / "tok512.bin").read_bytes()
    for content, size, message in [
        (whole[:-1], 512, "is truncated: it has 511 pieces of 512"),
        (whole + b"\0", 512, "holds 1 bytes more than 512 pieces take"),
        (whole[:4] + b"\0" * 4 + b"\xff" * 4, 512, "is truncated: it has 0 pieces"),
    ]:
        (tmp_path / "tok.bin").write_bytes(content)
        with pytest.raises(UserError, match=message):
            llama2c.read_tokenizer(tmp_path / "tok.bin", size)
