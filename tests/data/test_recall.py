"""An unchanged corpus is not read again; whatever changes about it, it is."""

import json
import os
import pathlib
import shutil

import pytest

from gptjax.config import UserError, from_dict
from gptjax.data import pipeline, recall


@pytest.fixture
def corpus(tmp_path, monkeypatch) -> pathlib.Path:
    """Files that count as settled the moment they are written."""
    monkeypatch.setattr(recall, "_SETTLED_SECONDS", -1.0)
    for n in range(12):
        (tmp_path / f"{n:02}.txt").write_text(f"document {n} " * 3)
        (tmp_path / f"{n:02}.jsonl").write_text("\n".join(json.dumps({"text": f"line {n}.{i}"}) for i in range(5)))
    return tmp_path


def load(corpus, source="text", **data):
    ending = {"text": "txt"}.get(source, source)
    values = {"source": source, "path": f"{corpus}/*.{ending}", "eval_fraction": 0.3, "seq_len": 8, **data}
    config = from_dict({"data": values, "train": {"duration_steps": 1}})
    return pipeline.load_dataset(config, log=lambda line: None, cache_dir=corpus / "cache")


def no_reading(monkeypatch) -> None:
    def refuse(path):
        raise AssertionError(f"{path} was read")

    monkeypatch.setattr("gptjax.data.sources.read_bytes", refuse)
    monkeypatch.setattr("gptjax.data.sources._map", refuse)


@pytest.mark.parametrize("tokenizer", ["byte", "char"])
@pytest.mark.parametrize("source", ["text", "jsonl"])
def test_an_unchanged_corpus_is_not_read(corpus, monkeypatch, source, tokenizer):
    first = load(corpus, source, tokenizer=tokenizer, drop_duplicates=True)
    assert not first.report["files_unread"]
    no_reading(monkeypatch)
    second = load(corpus, source, tokenizer=tokenizer, drop_duplicates=True)
    assert second.report["files_unread"] and second.tokenizer.fingerprint == first.tokenizer.fingerprint
    for a, b in ((first.train, second.train), (first.eval, second.eval)):
        assert a.names == b.names and a.tokens.tobytes() == b.tokens.tobytes()
    told = ("seconds", "files_unread", "from_cache")
    assert {k: v for k, v in first.report.items() if k not in told} == {k: v for k, v in second.report.items() if k not in told}


def rewrite(corpus):
    """Another text of the same length, with the old time of modification: ctime alone tells."""
    about = os.stat(corpus / "03.txt")
    (corpus / "03.txt").write_text("document X " * 3)
    os.utime(corpus / "03.txt", ns=(about.st_atime_ns, about.st_mtime_ns))


def replace(corpus):
    (corpus / "new").write_text("document Y " * 3)
    os.replace(corpus / "new", corpus / "03.txt")


CHANGES = {
    "rewritten": rewrite,
    "replaced": replace,
    "added": lambda corpus: (corpus / "99.txt").write_text("one more"),
    "removed": lambda corpus: (corpus / "03.txt").unlink(),
    "renamed": lambda corpus: os.rename(corpus / "03.txt", corpus / "98.txt"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_corpus_is_read(corpus, change):
    first = load(corpus)
    CHANGES[change](corpus)
    second = load(corpus)
    assert not second.report["files_unread"] and second.report["cache"] != first.report["cache"]


@pytest.mark.parametrize("knob", [{"split_by": "tail"}, {"unicode_form": "NFC"}, {"verify_files": True}])
def test_another_reading_or_a_wish_to_verify_reads(corpus, knob):
    load(corpus)
    assert not load(corpus, **knob).report["files_unread"]


def test_other_names_of_the_same_files_read(corpus):
    """Names are relative to a glob's fixed folder, and decide what is held out."""
    load(corpus)
    letters, last = corpus.name[:-1], corpus.name[-1]
    second = load(corpus, path=f"{corpus.parent}/{letters}[{last}]/*.txt")
    assert not second.report["files_unread"] and "/" in second.train.names[0]


def test_files_changed_just_now_are_read_again(corpus, monkeypatch):
    monkeypatch.setattr(recall, "_SETTLED_SECONDS", 3600.0)
    load(corpus)
    assert not load(corpus).report["files_unread"]


def test_other_code_reads_again(corpus, monkeypatch):
    load(corpus)
    monkeypatch.setattr(recall, "_code", lambda: "another version")
    assert not load(corpus).report["files_unread"]


def test_tokens_that_are_gone_are_made_again(corpus):
    first = load(corpus)
    shutil.rmtree(first.report["cache"])
    second = load(corpus)
    assert second.report["files_unread"] and not second.report["from_cache"]
    assert second.train.tokens.tobytes() == first.train.tokens.tobytes()


def test_files_that_deceive_are_noticed_where_they_are_read(corpus, monkeypatch):
    """Where inode, size and times are all as they were, only what has to be read anew tells."""
    kept = recall._look
    monkeypatch.setattr(recall, "_look", lambda config, files: ("0" * 32, kept(config, files)[1]))
    first = load(corpus)
    rewrite(corpus)
    shutil.rmtree(first.report["cache"])
    with pytest.raises(UserError, match="another text than when they were last read.*data.verify_files=True"):
        load(corpus)
    assert load(corpus, verify_files=True).report["cache"] != first.report["cache"]


def test_a_damaged_note_is_as_good_as_none(corpus):
    load(corpus)
    (note,) = (corpus / "cache").glob("read-*.json")
    note.write_bytes(note.read_bytes()[:-1])
    assert not load(corpus).report["files_unread"]
    assert load(corpus).report["files_unread"]


def test_a_cache_that_cannot_be_written_serves_all_the_same(corpus, monkeypatch):
    first = load(corpus, tokenizer="char")
    for note in [*(corpus / "cache").glob("read-*"), *(corpus / "cache").glob("characters-*")]:
        note.unlink()

    def refuse(path, content):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("gptjax.data.cache.write_atomically", refuse)
    second = load(corpus, tokenizer="char")
    assert second.report["from_cache"] and second.tokenizer.fingerprint == first.tokenizer.fingerprint


def test_each_source_of_a_mixture_by_itself(corpus):
    mixture = (f"a=text:{corpus}/0*.txt", f"b=text:{corpus}/1*.txt")
    load(corpus, mixture=mixture, split_by="tail")
    (corpus / "11.txt").write_text("changed")
    sources = load(corpus, mixture=mixture, split_by="tail").report["sources"]
    assert {name: report["files_unread"] for name, report in sources.items()} == {"a": True, "b": False}
