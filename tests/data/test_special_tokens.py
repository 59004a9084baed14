"""What Hugging Face's files say beside a tokenizer, and folders without a tokenizer.json."""

from __future__ import annotations

import json
import pathlib
import shutil
from typing import Any

import numpy as np
import pytest

from gptjax.config import DataConfig, UserError
from gptjax.data.tokenizers import HuggingFaceTokenizer, load_tokenizer, make_tokenizer, tokenizer_of_folder

package = pytest.importorskip("tokenizers", reason="extra: huggingface")


def write(folder: pathlib.Path, **files: Any) -> pathlib.Path:
    """A folder with a byte-level tokenizer.json of 256 bytes and <|endoftext|>, and files by name."""
    alphabet = sorted(package.pre_tokenizers.ByteLevel.alphabet())
    made = package.Tokenizer(package.models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    made.pre_tokenizer, made.decoder = package.pre_tokenizers.ByteLevel(add_prefix_space=False), package.decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    folder.mkdir(exist_ok=True)
    made.save(str(folder / "tokenizer.json"))
    for name, content in files.items():
        (folder / f"{name}.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


END = {"content": "<|endoftext|>", "special": True}


def huggingface(folder: pathlib.Path) -> Any:
    return make_tokenizer(DataConfig(tokenizer="huggingface", tokenizer_path=str(folder)), {})


def test_ends_are_as_the_files_say(tmp_path):
    cases = [
        ({}, "<|endoftext|>", "<|endoftext|>"),  # nothing is said: by the usual names
        ({"tokenizer_config": {"model_max_length": 8}}, "<|endoftext|>", "<|endoftext|>"),
        ({"tokenizer_config": {"bos_token": None, "eos_token": "<|endoftext|>"}}, None, "<|endoftext|>"),
        ({"special_tokens_map": {"eos_token": {"content": "!"}}}, None, "!"),
        ({"tokenizer_config": {"bos_token": "?"}, "special_tokens_map": {"bos_token": "!"}}, "!", None),
        (
            {
                "tokenizer_config": {
                    "bos_token": "?",
                    "added_tokens_decoder": {"256": {"content": "<|endoftext|>", "special": True}},
                },
                "special_tokens_map": {"bos_token": "!"},
            },
            "?",
            None,
        ),
    ]
    for number, (files, bos, eos) in enumerate(cases):
        tokenizer = huggingface(write(tmp_path / str(number), **files))
        assert [tokenizer.name_of(tokenizer.bos_id), tokenizer.name_of(tokenizer.eos_id)] == [bos, eos], files
        if bos == "!":
            assert tokenizer.special_tokens()["!"] == tokenizer.bos_id  # a token that is named is special
            assert tokenizer.decode([tokenizer.bos_id]) == ""


def test_added_tokens_get_the_ids_that_the_files_give(tmp_path):
    decoder = {
        "257": {"content": "<|user|>", "special": True},
        "258": {"content": "<think>", "special": False},
    }
    tokenizer = huggingface(write(tmp_path / "a", tokenizer_config={"added_tokens_decoder": decoder}))
    assert tokenizer.vocab_size == 259 and tokenizer.special_tokens() == {"<|endoftext|>": 256, "<|user|>": 257}
    assert 257 not in tokenizer.encode("a<|user|>") and tokenizer.decode(tokenizer.encode("a<|user|>b")) == "a<|user|>b"
    assert tokenizer.encode_special("a<|user|>b").tolist()[1:2] == [257]
    assert tokenizer.encode("<think>").tolist() == [258] and tokenizer.decode([258, 257]) == "<think>"
    assert list(tokenizer.token_bytes()[[256, 257, 258]]) == [0, 0, len("<think>")]
    older = huggingface(
        write(tmp_path / "b", added_tokens={"<|user|>": 257, "<think>": 258}, special_tokens_map={"eos_token": "<|user|>"})
    )
    assert older.eos_id == 257 and older.encode("<think>").tolist() == [258]
    with pytest.raises(UserError, match="'<x>' is to have the id 300, but 257 is next"):
        huggingface(write(tmp_path / "c", added_tokens={"<x>": 300}))
    with pytest.raises(UserError, match="eos_token is '<none>', which is not in the vocabulary"):
        huggingface(write(tmp_path / "d", tokenizer_config={"eos_token": "<none>"}))
    with pytest.raises(UserError, match="tokenizer_config.json is not valid JSON"):
        huggingface(write(tmp_path / "e", tokenizer_config="{"))


def test_whether_texts_begin_with_a_token(tmp_path):
    assert huggingface(write(tmp_path / "a")).adds_bos is False
    assert huggingface(write(tmp_path / "b", tokenizer_config={"bos_token": "!", "add_bos_token": True})).adds_bos is True
    assert huggingface(write(tmp_path / "c", tokenizer_config={"bos_token": None, "add_bos_token": True})).adds_bos is False
    folder = write(tmp_path / "d")
    made = package.Tokenizer.from_file(str(folder / "tokenizer.json"))
    made.post_processor = package.processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", 256)])
    made.save(str(folder / "tokenizer.json"))
    assert huggingface(folder).adds_bos is True and 256 not in huggingface(folder).encode("a")


def test_all_files_travel_and_count_as_far_as_they_decide_ids(tmp_path):
    folder = write(tmp_path / "a", tokenizer_config={"eos_token": "!", "chat_template": "x"}, added_tokens={"<a>": 257})
    tokenizer = huggingface(folder)
    tokenizer.save(tmp_path / "saved")
    loaded = load_tokenizer(tmp_path / "saved")
    assert loaded.fingerprint == tokenizer.fingerprint and loaded.eos_id == tokenizer.eos_id
    assert loaded.chat_templates() == {"default": "x"} and loaded.special_tokens() == tokenizer.special_tokens()
    write(folder, tokenizer_config={"eos_token": "!", "chat_template": "y"})
    other = huggingface(folder)
    assert other.fingerprint != tokenizer.fingerprint and other.encoding_fingerprint == tokenizer.encoding_fingerprint
    write(folder, tokenizer_config={"eos_token": "?", "chat_template": "y"})
    assert huggingface(folder).encoding_fingerprint != tokenizer.encoding_fingerprint


def test_runs_of_before_still_load(tmp_path):
    """Their descriptor names tokenizer.json alone, and their fingerprint covers only that."""
    import hashlib

    content = (write(tmp_path / "a") / "tokenizer.json").read_bytes()
    saved = tmp_path / "saved"
    saved.mkdir()
    (saved / "tokenizer.json").write_bytes(content)
    digest = hashlib.sha256(b"huggingface" + hashlib.sha256(b"tokenizer.json").digest() + hashlib.sha256(content).digest())
    descriptor = {"kind": "huggingface", "vocab_size": 257, "files": ["tokenizer.json"], "fingerprint": digest.hexdigest()}
    (saved / "descriptor.json").write_text(json.dumps(descriptor))
    assert load_tokenizer(saved).eos_id == 256
    # A path to the file itself means that file alone, as it did.
    alone = make_tokenizer(DataConfig(tokenizer="huggingface", tokenizer_path=str(tmp_path / "a" / "tokenizer.json")), {})
    assert alone.fingerprint == digest.hexdigest()


def test_gpt2s_two_files_make_a_tokenizer(tmp_path, shared_data):
    for theirs, name in {"encoder.json": "vocab.json", "vocab.bpe": "merges.txt"}.items():
        shutil.copy(shared_data / "gpt2_bpe" / theirs, tmp_path / name)
    own = make_tokenizer(DataConfig(tokenizer="gpt2", tokenizer_path=str(shared_data / "gpt2_bpe")), {})
    same = make_tokenizer(DataConfig(tokenizer="gpt2", tokenizer_path=str(tmp_path)), {})
    assert same.fingerprint == own.fingerprint
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>"}))
    read = huggingface(tmp_path)
    text = "Hello, naïve world <|endoftext|> 中文 don't\n\n  x"
    np.testing.assert_array_equal(read.encode(text), own.encode(text))
    assert (read.bos_id, read.eos_id) == (own.bos_id, own.eos_id) and read.has_ids_of(own) and own.has_ids_of(read)
    assert own.encode_special("a<|endoftext|>").tolist()[-1] == 50256


def test_a_sentencepiece_model_in_a_folder(tmp_path, shared_data):
    shutil.copy(shared_data / "sentencepiece" / "test_model.model", tmp_path / "tokenizer.model")
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"add_bos_token": True, "chat_template": "x"}))
    plain = make_tokenizer(
        DataConfig(tokenizer="sentencepiece", tokenizer_path=str(shared_data / "sentencepiece" / "test_model.model")), {}
    )
    size = plain.vocab_size
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<|im_end|>": size}))
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "<|im_end|>"}))
    for kind in ("sentencepiece", "huggingface"):
        tokenizer = make_tokenizer(DataConfig(tokenizer=kind, tokenizer_path=str(tmp_path)), {})
        assert tokenizer.kind == "sentencepiece" and tokenizer.eos_id == size and tokenizer.vocab_size == size + 1
        assert tokenizer.adds_bos is True and tokenizer.chat_templates() == {"default": "x"}
        assert tokenizer.encode("I saw it<|im_end|>").tolist() == plain.encode("I saw it<|im_end|>").tolist()
        ids = tokenizer.encode_special("I saw it<|im_end|>").tolist()
        assert ids == [*plain.encode("I saw it"), size] and tokenizer.decode(ids) == "I saw it"
        assert tokenizer.token_bytes()[size] == 0 and not tokenizer.has_ids_of(plain)
    (tmp_path / "added_tokens.json").write_text(json.dumps({"<think>": size}))
    (tmp_path / "special_tokens_map.json").unlink()
    with pytest.raises(UserError, match="'<think>' is not special"):
        tokenizer_of_folder(tmp_path)


def test_folders_that_hold_none(tmp_path):
    assert tokenizer_of_folder(tmp_path) is None
    with pytest.raises(UserError, match="tokenizer.json does not exist"):
        huggingface(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="tokenizer.json hold no tokenizer"):
        tokenizer_of_folder(tmp_path)


def test_a_lone_surrogate_is_refused_by_every_kind(tmp_path, shared_data):
    kinds = [huggingface(write(tmp_path / "a")), make_tokenizer(DataConfig(tokenizer="byte"), {})]
    assert isinstance(kinds[0], HuggingFaceTokenizer)
    for kind, path in (("gpt2", "gpt2_bpe"), ("sentencepiece", "sentencepiece/test_model.model")):
        kinds.append(make_tokenizer(DataConfig(tokenizer=kind, tokenizer_path=str(shared_data / path)), {}))
    for tokenizer in kinds:
        with pytest.raises(UserError, match=r"U\+D83E, half a character, at character 1"):
            tokenizer.encode("a\ud83e")
        with pytest.raises(UserError, match="byte 0xff, which is not UTF-8, at character 0"):
            tokenizer.encode(b"\xff".decode(errors="surrogateescape"))
