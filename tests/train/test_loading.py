"""Models are loaded from runs and Hugging Face folders with their own tokenizer, and refused with another."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys
import types

import pytest

import gptjax
from gptjax.config import Config, UserError
from gptjax.data.tokenizers import ByteTokenizer, CharTokenizer
from gptjax.train import loop, restore
from gptjax.train.restore import _check_own_tokenizer, _check_same_tokenizer


def test_importing_the_package_is_light():
    code = "import sys, gptjax, gptjax.generate; assert callable(gptjax.generate); sys.exit('jax' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_hugging_face_folder_writes_what_was_published(tmp_path, shared_data):
    package = pytest.importorskip("tokenizers", reason="extra: huggingface")
    folder = tmp_path / "model"
    shutil.copytree(shared_data / "tiny_random_gpt2", folder)
    # The published model has 1000 ids and no tokenizer; any that reads them will do.
    alphabet = sorted(package.pre_tokenizers.ByteLevel.alphabet())
    pieces = alphabet + [left + right for left in alphabet[:32] for right in alphabet[:32]][: 1000 - 256]
    made = package.Tokenizer(package.models.BPE(vocab={piece: i for i, piece in enumerate(pieces)}, merges=[]))
    made.pre_tokenizer, made.decoder = package.pre_tokenizers.ByteLevel(add_prefix_space=False), package.decoders.ByteLevel()
    with pytest.raises(UserError, match="has no tokenizer"):
        gptjax.load(folder)
    made.save(str(folder / "tokenizer.json"))
    (folder / "generation_config.json").write_text(json.dumps({"eos_token_id": [998, 999]}))
    model = gptjax.load(folder)
    assert model.eos_ids == (998, 999) and model.tokenizer.vocab_size == 1000 and not model.config.data.add_bos
    with pytest.raises(UserError, match="step=3"):
        gptjax.load(folder, step=3)
    with pytest.raises(UserError, match="is not a folder"):
        gptjax.load(tmp_path / "absent")
    case = json.loads((folder / "expected.json").read_text())["greedy"]
    new = case["max_length"] - len(case["input"][0])
    completions = gptjax.generate(model, case["input"], max_new_tokens=new, do_sample=False)
    assert [prompt + list(made.tokens) for prompt, made in zip(case["input"], completions, strict=True)] == case["expected"]


def test_a_run_with_another_tokenizer_is_refused(tmp_path):
    ours, other = CharTokenizer("abc"), CharTokenizer("abd")
    _check_own_tokenizer(tmp_path, ours, {"tokenizer": ours.encoding_fingerprint})
    _check_own_tokenizer(tmp_path, ours, {})  # checkpoints of before don't say
    with pytest.raises(UserError, match="is not the tokenizer that the checkpoint was made with"):
        _check_own_tokenizer(tmp_path, ours, {"tokenizer": other.encoding_fingerprint})


def test_initial_parameters_want_the_tokenizer_that_they_were_trained_with(tmp_path):
    said: list[str] = []
    _check_same_tokenizer(tmp_path, ByteTokenizer(), ByteTokenizer(), said.append)
    assert said == []
    _check_same_tokenizer(tmp_path, None, ByteTokenizer(), said.append)
    assert "has no tokenizer" in said[0]
    with pytest.raises(UserError, match="init_from=.* was trained with another tokenizer .char, 3 ids. than this run's .byte"):
        _check_same_tokenizer(tmp_path, CharTokenizer("abc"), ByteTokenizer(), said.append)
    with pytest.raises(UserError, match="another tokenizer"):
        _check_same_tokenizer(tmp_path, CharTokenizer("abc"), CharTokenizer("abd"), said.append)


def test_where_initial_parameters_come_from_is_asked_for_its_tokenizer(tmp_path, monkeypatch):
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.json").write_text("{}")
    CharTokenizer("abc").save(tmp_path / "tokenizer")
    found = types.SimpleNamespace(params={}, metadata={}, config=Config())
    monkeypatch.setattr(restore, "load_params", lambda folder, log: found)
    config = dataclasses.replace(Config(), init_from=str(tmp_path))
    with pytest.raises(UserError, match="another tokenizer"):
        restore.initial_params(config, None, print, ByteTokenizer())  # type: ignore[arg-type]


def test_going_on_with_another_tokenizer_is_refused_once_there_is_a_checkpoint(tmp_path: pathlib.Path):
    loop._keep_tokenizer(tmp_path, CharTokenizer("abc"))
    loop._keep_tokenizer(tmp_path, CharTokenizer("abd"))  # nothing has been trained yet
    (tmp_path / "checkpoints" / "00000001").mkdir(parents=True)
    (tmp_path / "checkpoints" / "00000001" / "manifest.json").touch()
    loop._keep_tokenizer(tmp_path, CharTokenizer("abd"))
    with pytest.raises(UserError, match="was trained with another tokenizer"):
        loop._keep_tokenizer(tmp_path, CharTokenizer("abc"))
