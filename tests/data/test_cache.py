"""The cache is used where it is whole, rebuilt where it is not, and shared by processes that arrive together."""

import concurrent.futures
import errno
import multiprocessing
import os
import pathlib

import numpy as np
import pytest

from gptjax.config import UserError, from_dict
from gptjax.data import cache, pipeline, tokenizers


def config_of(folder: pathlib.Path, **data):
    values = {"source": "text", "path": str(folder / "*.txt"), "eval_fraction": 0.4, "seq_len": 8}
    return from_dict({"data": values | data, "train": {"duration_steps": 1}})


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    for i in range(10):
        (tmp_path / f"doc{i}.txt").write_text(f"document {i} " * (i + 1))
    return tmp_path


def load(folder, **data):
    return pipeline.load_dataset(config_of(folder, **data), log=lambda line: None, cache_dir=folder / "cache")


def entry_of(folder) -> pathlib.Path:
    (entry,) = (path for path in (folder / "cache").iterdir() if not path.name.startswith("read-"))
    return entry


def test_second_load_does_not_tokenize(folder, monkeypatch):
    first = load(folder)
    assert not first.report["from_cache"]
    monkeypatch.setattr(tokenizers.ByteTokenizer, "encode", lambda self, text: pytest.fail("tokenized again"))
    second = load(folder)
    assert second.report["from_cache"]
    np.testing.assert_array_equal(first.train.tokens, second.train.tokens)
    assert first.train.names == second.train.names and first.eval.text_bytes == second.eval.text_bytes


def test_tokens_are_mapped_read_only_in_the_smallest_type(folder):
    dataset = load(folder)
    assert isinstance(dataset.train.tokens.base, np.memmap) and dataset.train.tokens.dtype == np.uint16
    with pytest.raises(ValueError, match="read-only"):
        dataset.train.tokens[0] = 1
    assert load(folder, tokenizer="char").train.tokens.dtype == np.uint8


def test_whatever_shapes_the_tokens_makes_another_entry(folder):
    reports = [
        load(folder),
        load(folder, tokenizer="char"),
        load(folder, add_bos=False),
        load(folder, add_eos=False),
        load(folder, eval_fraction=0.6),
        load(folder, packing="windows"),
        load(folder, add_bos=False, add_eos=False),
    ]
    (folder / "doc3.txt").write_text("changed")
    reports.append(load(folder))
    assert not any(dataset.report["from_cache"] for dataset in reports)
    assert len({dataset.report["cache"] for dataset in reports}) == 8
    assert load(folder, seq_len=9).report["from_cache"]


def damage(entry: pathlib.Path, how: str) -> None:
    file = entry / "train.tokens"
    if how == "truncated":
        file.write_bytes(file.read_bytes()[:-2])
    elif how == "longer":
        (entry / "eval.names").write_bytes((entry / "eval.names").read_bytes() + b" ")
    elif how == "missing":
        (entry / "eval.names").unlink()
    elif how == "no entry.json":
        (entry / "entry.json").unlink()
    elif how == "half an entry.json":
        (entry / "entry.json").write_bytes((entry / "entry.json").read_bytes()[:40])


@pytest.mark.parametrize("how", ["truncated", "longer", "missing", "no entry.json", "half an entry.json"])
def test_damaged_entry_is_rebuilt(folder, how):
    expected = np.array(load(folder).train.tokens)
    damage(entry_of(folder), how)
    rebuilt = load(folder)
    assert not rebuilt.report["from_cache"]
    np.testing.assert_array_equal(rebuilt.train.tokens, expected)
    assert load(folder).report["from_cache"]
    entry_of(folder)  # nothing else is left behind


def _load_in_process(folder: str, barrier_file: str) -> list[int]:
    while not os.path.exists(barrier_file):
        pass
    return np.array(load(pathlib.Path(folder)).train.tokens).tolist()


@pytest.mark.parametrize("damaged", [False, True])
def test_processes_that_write_at_once_all_succeed(folder, damaged):
    expected = load(folder).train.tokens.tolist()
    entry = entry_of(folder)
    if damaged:
        damage(entry, "truncated")
    else:
        for file in entry.iterdir():
            file.unlink()
        entry.rmdir()
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(3, mp_context=context) as pool:
        waiting = [pool.submit(_load_in_process, str(folder), str(folder / "go")) for _ in range(3)]
        (folder / "go").touch()
        assert all(future.result(timeout=60) == expected for future in waiting)
    assert entry_of(folder) == entry


def test_a_writer_that_loses_the_race_takes_the_other_entry(folder, monkeypatch):
    """Another process puts its entry in place between the look-up and the move."""
    expected = load(folder).train.tokens.tolist()
    number = entry_of(folder).stat().st_ino
    real, calls = cache.read_entry, []

    def first_look_finds_nothing(directory):
        calls.append(directory)
        return None if len(calls) == 1 else real(directory)

    monkeypatch.setattr(cache, "read_entry", first_look_finds_nothing)
    assert load(folder).train.tokens.tolist() == expected
    assert len(calls) > 1
    assert entry_of(folder).stat().st_ino == number  # left in place for those that read it


@pytest.mark.parametrize(
    ("number", "message"),
    [(errno.ENOSPC, "the disk that holds the cache .* is full"), (errno.EROFS, "the cache .* cannot be written")],
)
def test_disk_errors_are_one_sentence(folder, monkeypatch, number, message):
    def fail(*args, **kwargs):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(cache, "_write_split", fail)
    with pytest.raises(UserError, match=message):
        load(folder)
    assert list((folder / "cache").iterdir()) == []


def test_entries_that_killed_writers_left_are_removed(folder):
    load(folder)
    entry = entry_of(folder)
    old, new = (entry.parent / f".{entry.name}.{age}" for age in ("old", "new"))
    for left in (old, new):
        left.mkdir()
    os.utime(old, (0, 0))
    damage(entry, "missing")
    load(folder)
    assert not old.exists() and new.exists()


def test_trained_sentencepiece_model_is_kept(folder, monkeypatch):
    for i in range(10):
        (folder / f"doc{i}.txt").write_text("".join(f"line {j * i} of the text, {chr(97 + j % 26)} word\n" for j in range(200)))
    first = load(folder, tokenizer="sentencepiece", tokenizer_vocab_size=300)
    monkeypatch.setattr(pipeline, "train_sentencepiece", lambda *args: pytest.fail("trained again"))
    second = load(folder, tokenizer="sentencepiece", tokenizer_vocab_size=300)
    assert second.report["from_cache"] and second.tokenizer.fingerprint == first.tokenizer.fingerprint


def test_damaged_kept_model_is_made_again(tmp_path):
    path = tmp_path / "model"
    assert cache.cached_bytes(path, lambda: b"made") == b"made"
    assert cache.cached_bytes(path, lambda: b"again") == b"made"
    path.write_bytes(b"X" + path.read_bytes()[1:])
    assert cache.cached_bytes(path, lambda: b"again") == b"again"


def test_cache_folder_comes_from_the_environment(monkeypatch):
    monkeypatch.setenv("GPTJAX_CACHE", "/a")
    monkeypatch.setenv("XDG_CACHE_HOME", "/b")
    assert cache.default_cache_dir() == pathlib.Path("/a")
    monkeypatch.delenv("GPTJAX_CACHE")
    assert cache.default_cache_dir() == pathlib.Path("/b/gptjax")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert cache.default_cache_dir() == pathlib.Path.home() / ".cache" / "gptjax"
