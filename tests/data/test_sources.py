"""Sources, what is held out of them, and cleaning."""

import json
import pathlib
import shutil

import pytest

from gptjax.config import DataConfig, UserError
from gptjax.data import sources
from gptjax.data.cleaning import clean, clean_text
from gptjax.data.sources import Document, documents, find_files, name_hash, open_sources


def texts(source) -> list[str]:
    return [document.text for document in documents(source)]


def names(source) -> list[str]:
    return [document.name for document in documents(source)]


def write(folder: pathlib.Path, **files: str) -> pathlib.Path:
    for name, text in files.items():
        (folder / f"{name}.txt").write_text(text, encoding="utf-8")
    return folder


def test_standard_library():
    sources = open_sources(DataConfig())
    found = names(sources["train"]) + names(sources["eval"])
    assert 600 < len(found) < 1000 and len(set(found)) == len(found)
    assert 9e6 < sum(len(text) for split in sources.values() for text in texts(split)) < 16e6
    assert "json/decoder.py" in found and "random.py" in found
    assert not any(part in ("test", "tests", "idle_test", "site-packages") for name in found for part in name.split("/"))
    assert 0.05 < len(sources["eval"]) / len(found) < 0.15


def test_hash_split_depends_on_the_name_alone(tmp_path):
    write(tmp_path, **{f"doc{i}": f"text {i}" for i in range(100)})
    config = DataConfig(source="text", path=str(tmp_path / "doc*.txt"), eval_fraction=0.3)
    before = open_sources(config)
    write(tmp_path, **{f"doc{i}": f"text {i}" for i in range(100, 150)})
    after = open_sources(config)
    for split in before:
        assert set(names(before[split])) <= set(names(after[split]))
    assert all(name_hash(name) < 0.3 for name in names(after["eval"]))
    assert all(name_hash(name) >= 0.3 for name in names(after["train"]))
    assert name_hash("doc1.txt") == 0.6546968996909458  # it must never change: runs would train on what they held out


def test_hash_split_of_one_file_says_what_to_do(tmp_path):
    write(tmp_path, only="text")
    with pytest.raises(UserError, match="data.split_by=tail"):
        open_sources(DataConfig(source="text", path=str(tmp_path / "only.txt")))


def test_hash_split_with_an_empty_side(tmp_path):
    write(tmp_path, a="1", b="2")
    with pytest.raises(UserError, match="leaves none of the 2 documents to the eval split"):
        open_sources(DataConfig(source="text", path=str(tmp_path / "*.txt"), eval_fraction=1e-9))


@pytest.mark.parametrize("fraction", [0.1, 0.3, 0.5, 0.9])
@pytest.mark.parametrize("lengths", [[100], [10, 20, 30], [1, 1, 1, 97], [6, 6]])
def test_tail_split(tmp_path, lengths, fraction):
    parts = [chr(ord("a") + i) * n for i, n in enumerate(lengths)]
    write(tmp_path, **{f"d{i}": part for i, part in enumerate(parts)})
    config = DataConfig(source="text", path=str(tmp_path / "*.txt"), split_by="tail", eval_fraction=fraction)
    sources = clean(open_sources(config), config).splits
    whole, cut = "".join(parts), int((1 - fraction) * sum(lengths))
    assert "".join(texts(sources["train"])) == whole[:cut]
    assert "".join(texts(sources["eval"])) == whole[cut:]


def test_tail_split_is_nanogpts(shared_data):
    path = shared_data / "tinyshakespeare" / "input.txt"
    sources = open_sources(DataConfig(source="text", path=str(path), split_by="tail", eval_fraction=0.1))
    data = path.read_text(encoding="utf-8")
    n = len(data)
    assert texts(sources["train"]) == [data[: int(n * 0.9)]] and len(texts(sources["train"])[0]) == 1_003_854
    assert "".join(texts(sources["eval"])) == data[int(n * 0.9) :]


def test_eval_path(tmp_path):
    write(tmp_path, a="1", b="2", held="3")
    config = DataConfig(source="text", path=f"{tmp_path}/a.txt, {tmp_path}/b.txt", eval_path=f"{tmp_path}/held.txt")
    sources = open_sources(config)
    assert (texts(sources["train"]), texts(sources["eval"])) == (["1", "2"], ["3"])


def test_files_are_found_once_and_named_below_the_glob(tmp_path):
    (tmp_path / "sub").mkdir()
    write(tmp_path, a="1")
    write(tmp_path / "sub", b="2")
    found = find_files(f"{tmp_path}/**/*.txt,{tmp_path}/a.txt", "data.path")
    assert [name for name, _ in found] == ["a.txt", "sub/b.txt"]


def test_missing_files(tmp_path):
    write(tmp_path, input="1")
    with pytest.raises(UserError, match="data.path: .*inptu.txt does not exist; did you mean input.txt"):
        find_files(str(tmp_path / "inptu.txt"), "data.path")
    with pytest.raises(UserError, match=r"no file matches .*\*.md"):
        find_files(str(tmp_path / "*.md"), "data.path")
    with pytest.raises(UserError, match="is a folder; write a glob"):
        find_files(str(tmp_path), "data.path")
    with pytest.raises(UserError, match="names no file"):
        find_files(" , ", "data.path")


def test_file_that_is_not_utf8(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"good")
    (tmp_path / "b.txt").write_bytes(b"ab\xff")
    config = DataConfig(source="text", path=str(tmp_path / "*.txt"), split_by="tail")
    with pytest.raises(UserError, match="b.txt is not UTF-8: byte 0xff at offset 2"):
        open_sources(config)


def jsonl(tmp_path, *lines: str, **knobs) -> dict:
    path = tmp_path / "data.jsonl"
    path.write_text("\n".join(lines), encoding="utf-8")
    config = DataConfig(source="jsonl", path=str(path), split_by="tail", eval_fraction=0.5, **knobs)
    return open_sources(config)


def test_jsonl(tmp_path):
    lines = [json.dumps({"body": text}) for text in ("one", "zwei", "三")]
    sources = jsonl(tmp_path, lines[0], "", lines[1], "   ", lines[2], "", text_field="body")
    assert "".join(texts(sources["train"]) + texts(sources["eval"])) == "onezwei三"
    assert names(sources["eval"])[-1] == "data.jsonl:5"


def test_jsonl_over_several_files_is_random_access(tmp_path):
    for file in range(3):
        (tmp_path / f"{file}.jsonl").write_text("\n".join(json.dumps({"text": f"{file}{line}"}) for line in range(4)))
    config = DataConfig(source="jsonl", path=str(tmp_path / "*.jsonl"), eval_path=str(tmp_path / "0.jsonl"))
    source = open_sources(config)["train"]
    assert len(source) == 12
    assert [source[i].text for i in (11, 0, 4, 7)] == ["23", "00", "10", "13"]
    with pytest.raises(IndexError):
        source[12]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"text": "a"', "data.jsonl, line 2 is not valid JSON"),
        ('["a"]', "line 2 is not a JSON object"),
        ('{"texts": "a"}', "line 2 has no field 'text'; did you mean texts?"),
        ('{"text": 3}', "line 2 has a field 'text' that is not a text"),
    ],
)
def test_bad_jsonl_lines_are_named(tmp_path, line, message):
    with pytest.raises(UserError, match=message.replace("?", r"\?")):
        jsonl(tmp_path, '{"text": "fine"}', line)


# --- TFDS ---


def tfds_config(folder: pathlib.Path, **knobs) -> DataConfig:
    return DataConfig(**{"source": "tfds", "name": "tiny_shakespeare", "path": str(folder)} | knobs)


def test_tfds(shared_data):
    folder = shared_data / "tfds_tiny_shakespeare" / "array_record"
    sources = open_sources(tfds_config(folder, eval_split="validation+test"))
    data = (shared_data / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    assert "".join(texts(sources["train"]) + texts(sources["eval"])) == data
    assert names(sources["eval"]) == ["validation+test:0", "validation+test:1"]


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"name": "tiny_shakespear"}, r"tiny_shakespear is not prepared under .*; did you mean tiny_shakespeare\?"),
        ({"name": "tiny_shakespeare:9.0.0"}, "tiny_shakespeare:9.0.0 is not prepared"),
        ({"path": "/nowhere"}, "is not prepared under /nowhere; data.path names another folder"),
        ({"path": __file__}, "is a file, which data.source=tfds cannot read; set data.source=text"),
        ({"eval_split": "valid"}, "no records for the split 'valid': its splits are train, validation, test"),
        ({"text_field": "txt"}, r"no field 'txt'; did you mean text\?"),
    ],
)
def test_tfds_mistakes(shared_data, knobs, message):
    with pytest.raises(UserError, match=message):
        open_sources(tfds_config(shared_data / "tfds_tiny_shakespeare" / "array_record", **knobs))


@pytest.fixture
def copied_tfds(shared_data, tmp_path) -> pathlib.Path:
    shutil.copytree(shared_data / "tfds_tiny_shakespeare" / "array_record", tmp_path / "d", copy_function=shutil.copyfile)
    for path in (tmp_path / "d").rglob("*"):
        path.chmod(0o755 if path.is_dir() else 0o644)
    return tmp_path / "d"


@pytest.mark.parametrize("size", [0, 100_000, 400_000, 458_751])
def test_truncated_array_record_is_noticed(copied_tfds, size):
    (file,) = copied_tfds.rglob("*-train.array_record*")
    file.write_bytes(file.read_bytes()[:size])
    with pytest.raises(UserError, match=f"{file.name} (is damaged or missing|holds 0 of its 1 records)"):
        open_sources(tfds_config(copied_tfds))


def test_array_record_with_fewer_records_than_its_index_says(copied_tfds):
    (file,) = copied_tfds.rglob("*-train.array_record*")
    sources._check_records(str(file), 1)
    with pytest.raises(UserError, match="holds 1 of its 2 records"):
        sources._check_records(str(file), 2)


def test_missing_array_record_is_noticed(copied_tfds):
    (file,) = copied_tfds.rglob("*-test.array_record*")
    file.unlink()
    with pytest.raises(UserError, match=f"{file.name} is damaged or missing"):
        open_sources(tfds_config(copied_tfds, eval_split="validation+test"))


def test_flipped_bit_in_an_array_record_is_noticed(copied_tfds):
    (file,) = copied_tfds.rglob("*-train.array_record*")
    content = bytearray(file.read_bytes())
    content[200_000] ^= 1
    file.write_bytes(content)
    with pytest.raises(UserError, match="the TFDS record train:0 is damaged"):
        texts(open_sources(tfds_config(copied_tfds))["train"])


# --- cleaning ---


class Texts(list):
    def __getitem__(self, index):
        return Document(f"{index}", super().__getitem__(index))


def test_cleaning_options():
    text = "e\u0301\ufb01\x00\x0b\x1b\r\n\tx\x7f\x85"
    assert clean_text(text, DataConfig()) == text
    assert clean_text(text, DataConfig(drop_control_characters=True)) == "e\u0301\ufb01\n\tx"
    assert clean_text("e\u0301\ufb01", DataConfig(unicode_form="NFC")) == "\xe9\ufb01"
    assert clean_text("e\u0301\ufb01", DataConfig(unicode_form="NFKC")) == "\xe9fi"
    assert clean_text("a\ud800b", DataConfig()) == "a\ufffdb"


def test_what_is_dropped_is_counted():
    sources = {"train": Texts(["same", "", "a\x00", "same", "a"]), "eval": Texts(["a", "other", "same", "\x01"])}
    config = DataConfig(drop_duplicates=True, drop_control_characters=True)
    cleaned = clean(sources, config)
    assert texts(cleaned.splits["train"]) == ["same", "a"]
    assert texts(cleaned.splits["eval"]) == ["other"]  # no held-out document is a copy of one trained on
    assert cleaned.report == {
        "changed_documents": 2, "dropped_characters": 2, "empty_documents": 2, "duplicate_documents": 4
    }  # fmt: skip
    kept = clean(sources, DataConfig())
    assert texts(kept.splits["train"]) == ["same", "a\x00", "same", "a"] and kept.report["duplicate_documents"] == 0


def test_digest_depends_on_texts_names_and_splits():
    def digest(train, held):
        return clean({"train": Texts(train), "eval": Texts(held)}, DataConfig()).digest

    made = [digest(["ab", "c"], ["d"]), digest(["a", "bc"], ["d"]), digest(["ab"], ["c", "d"]), digest(["c", "ab"], ["d"])]
    assert len(set(made)) == 4 and made[0] == digest(["ab", "c"], ["d"])


def test_nothing_left_of_a_split():
    with pytest.raises(UserError, match="no document of the eval split is left after cleaning: 1 were read"):
        clean({"train": Texts(["a"]), "eval": Texts(["a"])}, DataConfig(drop_duplicates=True))
