"""Records: every format there and back, what is wrong with a row or a file, and what is skipped."""

import collections
import csv
import io
import json
import pathlib
import zipfile

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.config import UserError
from gptjax.data.record_formats import Reading as R
from gptjax.data.record_formats import _csv, _jsonl, _squad, _tsv, plain_feature
from gptjax.data.records import Records, chat_fault, read_records


def write(path: pathlib.Path, content: str | bytes) -> str:
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return str(path)


def values(records: Records) -> list[dict]:
    return [record.values for record in records]


# --- there and back ---

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)
CELL = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\t\r\n\ufeff"), max_size=8)
LEAF = st.none() | st.booleans() | st.integers() | TEXT
JSON = LEAF | st.lists(LEAF, max_size=2) | st.dictionaries(TEXT, LEAF, max_size=2)


def table(cell: st.SearchStrategy) -> st.SearchStrategy:
    return st.integers(1, 4).flatmap(
        lambda width: st.lists(st.lists(cell, min_size=width, max_size=width), min_size=1, max_size=4)
    )


def as_csv(rows: list[list[str]], end: str = "\n", quoting: int = csv.QUOTE_MINIMAL) -> bytes:
    out = io.StringIO()
    csv.writer(out, lineterminator=end, quoting=quoting).writerows(rows)
    return out.getvalue().encode()


@given(st.lists(st.dictionaries(TEXT, JSON, max_size=3), max_size=4), st.sampled_from(["\n", "\r\n", "\n\n  \n"]), st.booleans())
def test_jsonl_round_trip(rows, end, escaped):
    data = end.join(json.dumps(row, ensure_ascii=escaped) for row in rows).encode()
    assert [row for _, row in _jsonl(data, "f", R())] == rows


@given(table(TEXT), st.sampled_from(["\n", "\r\n"]), st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]))
def test_csv_round_trip(rows, end, quoting):
    names = tuple(f"c{i}" for i in range(len(rows[0])))
    if quoting == csv.QUOTE_MINIMAL:  # the csv module's writer does not quote a lone CR, which its reader takes for a row's end
        rows = [[cell.replace("\r", "") for cell in row] for row in rows]
    expected = [dict(zip(names, row, strict=True)) for row in rows]
    assert [row for _, row in _csv(as_csv(rows, end, quoting), "f", R(columns=names))] == expected
    assert [row for _, row in _csv(as_csv([list(names), *rows], end, quoting), "f", R())] == expected


@given(table(CELL), st.sampled_from(["\n", "\r\n"]))
def test_tsv_round_trip(rows, end):
    names = tuple(f"c{i}" for i in range(len(rows[0])))
    data = end.join("\t".join(row) for row in rows).encode()
    expected = [dict(zip(names, row, strict=True)) for row in rows if row != [""]]
    assert [row for _, row in _tsv(data, "f", R(columns=names))] == expected


TOKEN = st.text(
    st.characters(exclude_categories=["Cs", "Cc", "Zs", "Zl", "Zp"], exclude_characters="\ufeff"), min_size=1, max_size=5
)
TOKEN = TOKEN.filter(lambda token: not token.startswith("-DOCSTART-"))


@given(
    st.lists(st.lists(st.tuples(TOKEN, TOKEN), min_size=1, max_size=3), min_size=1, max_size=3),
    st.sampled_from(" \t"),
    st.booleans(),
)
def test_conll_round_trip(tmp_path_factory, sentences, between, document):
    lines = ["-DOCSTART-" + f"{between}-X-" * 2, ""] if document else []
    starts = []
    for sentence in sentences:
        starts.append(len(lines) + 1)
        lines += [*(between.join((word, "NN", tag)) for word, tag in sentence), ""]
    path = tmp_path_factory.getbasetemp() / "x.conll"
    found = read_records(write(path, "\n".join(lines)))
    assert values(found) == [{"words": [w for w, _ in s], "tags": [t for _, t in s]} for s in sentences]
    assert [record.line for record in found] == starts


@given(st.lists(st.tuples(st.text(st.characters(exclude_categories=["Cs"]), min_size=3), st.data()), min_size=1))
def test_squad_round_trip(drawn):
    articles = []
    for number, (context, data) in enumerate(drawn):
        start = data.draw(st.integers(0, len(context) - 1))
        answer = {"text": context[start : start + 3], "answer_start": start}
        articles.append({"title": f"t{number}", "paragraphs": [{"context": context, "qas": [question(f"q{number}", [answer])]}]})
    for indent in (None, 1):
        rows = [row for _, row in _squad(json.dumps({"data": articles}, indent=indent).encode(), "f", R())]
        assert [row["answers"] for row in rows] == [article["paragraphs"][0]["qas"][0]["answers"] for article in articles]
        assert [row["title"] for row in rows] == [article["title"] for article in articles]


# --- what is wrong with a row ---


@pytest.mark.parametrize("cut", range(0, 60, 7))
def test_a_torn_jsonl_file_loses_its_last_line_alone(tmp_path, cut):
    data = "".join(json.dumps({"n": n, "t": "é" * 9}, ensure_ascii=False) + "\n" for n in range(4)).encode()
    path = write(tmp_path / "a.jsonl", data[: len(data) - cut])
    found = read_records(path, max_bad=1)
    whole = data[: len(data) - cut].count(b"}")
    assert [row["n"] for row in values(found)] == list(range(whole))
    if found.skipped:
        assert found.skipped[0].line == whole + 1
        with pytest.raises(UserError, match=f"a.jsonl, line {whole + 1} is not .*; max_bad=0 lets no bad row pass"):
            read_records(path)


@given(st.data())
def test_a_quotation_mark_that_is_never_closed_costs_its_own_line(data):
    before, after = data.draw(st.integers(0, 3)), data.draw(st.integers(0, 3))
    torn = data.draw(st.sampled_from(['x,"y', '"x,y', '"x"z,y', 'x,"', "x", "x,y,z"]))
    rows = [["a,b", f'say "{n}"'] if data.draw(st.booleans()) else ["a\nb", "c"] for n in range(before + after)]
    content = as_csv(rows[:before]) + torn.encode() + b"\n" + as_csv(rows[before:])
    found = [row for _, row in _csv(content, "f", R(columns=("p", "q")))]
    assert [list(row.values()) for row in found if isinstance(row, dict)] == rows
    lines = [line for line, row in _csv(content, "f", R(columns=("p", "q"))) if isinstance(row, str)]
    assert lines == [as_csv(rows[:before]).count(b"\n") + 1]


BAD = {
    "jsonl": [
        (b'{"a": "x"', "is not valid JSON: .* at column"),
        (b'["a"]', "is not a JSON object"),
        (b'{"a": "\xff"}', "is not UTF-8: byte 0xff at offset 7"),
        (b'{"a": NaN}', "NaN is no JSON number"),
        (b'{"a": "\\ud83d"}', "has half of a surrogate pair"),
        (b'{"b": "x"}', "has no field 'a'"),
        (b'{"a": null}', "has null as its field 'a'"),
        (b"[" * 100_000, "is not JSON that can be read"),
        (b'{"a": ' + b"9" * 5000 + b"}", "is not JSON that can be read"),
    ],
    "csv": [
        (b"x", r"has 1 column, not the 2 of a, b"),
        (b"x,y,z", "has 3 columns"),
        (b"x,\xe9", "is not UTF-8: byte 0xe9"),
        (b'"x"y,z', "is not valid CSV"),
    ],
    "tsv": [(b"x", "has 1 column, not the 2 of a, b"), (b"x\ty\tz", "has 3 columns"), (b"x\t\xe9", "is not UTF-8: byte 0xe9")],
}
GOOD = {"jsonl": (b"", b'{"a": "1", "b": "2"}'), "csv": (b"a,b\n", b"1,2"), "tsv": (b"a\tb\n", b"1\t2")}


@pytest.mark.parametrize(("format", "row", "message"), [(name, *bad) for name, rows in BAD.items() for bad in rows])
def test_bad_rows_are_named_skipped_and_counted(tmp_path, format, row, message):
    header, good = GOOD[format]
    path = write(tmp_path / f"a.{format}", header + b"\n".join([good, row, good, row, good]))
    line = 2 + (format != "jsonl")
    with pytest.raises(UserError, match=f"a.{format}, line {line} .*{message}.*max_bad=0"):
        read_records(path, required=["a"])
    with pytest.raises(UserError, match=f"more than max_bad=1 bad row, of which the first: .*a.{format}, line {line} "):
        read_records(path, required=["a"], max_bad=1)
    lines = []
    found = read_records(path, required=["a"], max_bad=2, log=lines.append)
    assert values(found) == [{"a": "1", "b": "2"}] * 3
    assert [bad.line for bad in found.skipped] == [line, line + 2]
    assert len(lines) == 1 and f"3 records of {path}; 2 bad rows skipped: {path}, line {line} " in lines[0]


@pytest.mark.parametrize(
    ("torn", "line", "message"),
    [
        ("EU", 5, "has 1 column, so its word and its tag would be the same"),
        ("EU\tB", 5, "has 2 columns, but the file's first row has 3"),
        ("EU\tNN\t", 5, "has nothing in its tag column -1"),
    ],
)
def test_a_bad_conll_line_costs_its_sentence(tmp_path, torn, line, message):
    path = write(tmp_path / "a.conll", f"a\tX\tO\n\nb\tX\tO\nc\tX\tO\n{torn}\nd\tX\n\n\n  \ne\tX\tB-Y\n")
    with pytest.raises(UserError, match=f"a.conll, line {line} {message}"):
        read_records(path)
    found = read_records(path, max_bad=1)
    assert values(found) == [{"words": ["a"], "tags": ["O"]}, {"words": ["e"], "tags": ["B-Y"]}]
    assert [record.line for record in found] == [1, 10]


def test_conll_columns(tmp_path):
    path = write(tmp_path / "a.txt", "1 EU NN B-ORG\r\n2  rejects   VB O \r\n\r\n")
    assert values(read_records(path, "conll", word_column=1)) == [{"words": ["EU", "rejects"], "tags": ["B-ORG", "O"]}]
    assert values(read_records(path, "conll", word_column=1, tag_column=2))[0]["tags"] == ["NN", "VB"]
    assert values(read_records(path, "conll", word_column=1, tag_column=None)) == [{"words": ["EU", "rejects"]}]
    with pytest.raises(UserError, match="line 1 has 4 columns, so it has no tag column 4"):
        read_records(path, "conll", tag_column=4)


def question(name: str, answers: list, **more) -> dict:
    return {"id": name, "question": "why?", "answers": answers} | more


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (question("z", [{"text": "on", "answer_start": 1}]), "'z', whose answer 'on' does not stand at 1, .* has 'ne'"),
        (question("z", [{"text": "o", "answer_start": -1}]), "'z', whose answer 'o' does not stand at -1"),
        (question("z", [{"text": "One", "answer_start": 0}]), "'z', whose answer 'One' does not stand at 0, .* has 'one'"),
        (question("z", [{"text": "", "answer_start": 0}]), "'z' with an answer that is not a text and its answer_start"),
        (question("z", [{"text": "o", "answer_start": True}]), "'z' with an answer that is not"),
        (question("z", []), "'z' with no answer, and not is_impossible"),
        (question("z", [{"text": "o", "answer_start": 0}], is_impossible=True), "'z', which is_impossible, with answers"),
        (question("z", None), "'z' whose answers are no list"),
        ({"id": "z", "answers": []}, "'z' without a text \"question\""),
        ({"question": "why?"}, r'holds data\[0\].paragraphs\[0\].qas\[1\], which has no text "id"'),
        (question("y", [{"text": "one", "answer_start": 0}]), "has the question 'y' a second time"),
    ],
)
def test_squad(tmp_path, bad, message):
    good = question("y", [{"text": "two", "answer_start": 4, "more": 1}])
    unanswerable = question("n", [], is_impossible=True)
    document = {"version": "v2.0", "data": [{"title": "T", "paragraphs": [{"context": "one two", "qas": [good, bad]}]}]}
    document["data"].append({"paragraphs": [{"context": "three", "qas": [unanswerable]}]})
    path = write(tmp_path / "a.json", json.dumps(document, indent=1))
    with pytest.raises(UserError, match=f"a.json, line [0-9]+ .*{message}"):
        read_records(path)
    found = read_records(path, max_bad=1)
    common = {"question": "why?"}
    assert values(found) == [
        common | {"id": "y", "title": "T", "context": "one two", "is_impossible": False}
        | {"answers": [{"text": "two", "answer_start": 4}]},
        common | {"id": "n", "title": "", "context": "three", "is_impossible": True, "answers": []},
    ]  # fmt: skip
    lines = pathlib.Path(path).read_text().split("\n")
    assert ['"y"' in lines[found[0].line - 1], '"n"' in lines[found[1].line - 1]] == [True, True]


def test_a_check_of_the_callers(tmp_path):
    path = write(tmp_path / "a.csv", "text,label\nx,ham\ny,eggs\n")
    check = {"ham": None, "eggs": "has the label 'eggs', which is none of ham, spam"}
    with pytest.raises(UserError, match="a.csv, line 3 has the label 'eggs', which is none of ham, spam"):
        read_records(path, check=lambda row: check[row["label"]])
    assert len(read_records(path, check=lambda row: check[row["label"]], max_bad=1)) == 1


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([{"role": "user", "content": "hi"}, {"role": "assistant", "content": ""}], None),
        ([], "has no list"),
        ("hi", "has no list"),
        (["hi"], "has a message 1 that is not an object"),
        ([{"role": "user", "content": "hi"}, {"content": "hi"}], "has a message 2 without a text as its role"),
        ([{"role": "user", "content": ["hi"]}], "has a message 1 without a text as its content"),
        ([{"role": "", "content": "hi"}], "has a message 1 with an empty role"),
    ],
)
def test_conversations(messages, message):
    fault = chat_fault({"messages": messages})
    assert fault is None if message is None else str(fault).startswith(message)


# --- what is wrong with a file ---


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", "", "a.csv is empty"),
        ("a.csv", "text,b\n", "a.csv is empty"),
        ("a.jsonl", "\n \n", "a.jsonl is empty"),
        ("a.conll", "\n", "a.conll is empty"),
        ("a.json", "", "a.json is empty"),
        ("a.json", "{", "a.json is not valid JSON: .* at line 1, column 2"),
        ("a.json", "[]", 'a.json is not SQuAD: it is not an object with a list "data"'),
        ("a.json", b'"\xff"', "a.json is not UTF-8: byte 0xff at offset 1"),
        ("a.tsv", "text\tlabel".encode("utf-16"), "a.tsv is UTF-16, not UTF-8"),
        ("a.tsv", "text\ttext\n1\t2", "line 1 names the columns, but 'text' stands in it twice"),
        ("a.tsv", "text\t\n1\t2", "line 1 names the columns, but column 2 has no name"),
        ("a.tsv", "body\tlabel\n1\t2", "line 1 has no column 'text', only 'body', 'label'; name the columns if"),
        ("a.tsv", "texts\tlabel\n1\t2", "line 1 has no column 'text', only 'texts', 'label'; did you mean texts"),
        ("a.tsv", b"t\xe9xt\tlabel\n1\t2", "line 1 should hold the names of the columns, but is not UTF-8: byte 0xe9"),
        ("a.zip", "no", "a.zip is not a zip archive"),
        ("a.txt", "x", "the ending of .*a.txt does not tell its format"),
    ],
)
def test_bad_files(tmp_path, name, content, message):
    with pytest.raises(UserError, match=message):
        read_records(write(tmp_path / name, content), required=["text"], max_bad=9, key="task.path")


def test_other_mistakes(tmp_path):
    path = write(tmp_path / "a.tsv", "text\tlabel\n1\t2")
    with pytest.raises(UserError, match="line 1 holds the very names that the columns are given"):
        read_records(path, columns=["text", "label"])
    with pytest.raises(UserError, match="format='tvs' is none of jsonl, .*; did you mean tsv?"):
        read_records(path, "tvs")
    with pytest.raises(UserError, match="task.path: .*b.tsv does not exist; did you mean a.tsv?"):
        read_records(str(tmp_path / "b.tsv"), key="task.path")
    with pytest.raises(UserError, match="task.path names no file"):
        read_records("", key="task.path")
    other = write(tmp_path / "a.csv", "text,label\n1,2")
    with pytest.raises(UserError, match="a.tsv is tsv and .*a.csv is csv; read files of one format"):
        read_records(f"{path},{other}")
    with pytest.raises(UserError, match="max_bad=-1 must be at least 0"):
        read_records(path, max_bad=-1)
    bad = write(tmp_path / "bad.jsonl", "1\n2\n")
    with pytest.raises(UserError, match="bad.jsonl holds no record: .*bad.jsonl, line 1 is not a JSON object"):
        read_records(bad, max_bad=9)


def test_several_files_marks_and_line_ends(tmp_path):
    write(tmp_path / "a1.csv", b'\xef\xbb\xbftext,label\r\n"x\r\ny",1\r\n')
    write(tmp_path / "a2.csv", "text,label\nz,2")
    found = read_records(f"{tmp_path}/a?.csv")
    assert values(found) == [{"text": "x\r\ny", "label": "1"}, {"text": "z", "label": "2"}]
    assert [record.place for record in found] == [f"{tmp_path}/a1.csv, line 2", f"{tmp_path}/a2.csv, line 2"]
    assert found.summary() == "2 records of 2 files" and found.column("label") == ["1", "2"]


def test_a_huge_field(tmp_path):
    huge = "x" * 3_000_000 + '"\n'
    csv.field_size_limit(131_072)
    found = read_records(write(tmp_path / "a.csv", as_csv([["a", "b"], [huge, "1"]])))
    assert found[0].values == {"a": huge, "b": "1"} and csv.field_size_limit() == 131_072
    found = read_records(write(tmp_path / "a.tsv", f"a\tb\n{huge[:-2]}\t1\n"))
    assert found[0].values == {"a": huge[:-2], "b": "1"}


# --- folders and archives ---


def tree(tmp_path, **files: str) -> tuple[str, str]:
    """The same files in a folder and in an archive, with "__" for "/" in their names."""
    with zipfile.ZipFile(tmp_path / "all.zip", "w") as archive:
        for name, text in files.items():
            path = tmp_path / "all" / name.replace("__", "/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text)
            archive.write(path, path.relative_to(tmp_path))
    return str(tmp_path / "all"), str(tmp_path / "all.zip")


def test_a_folder_a_class(tmp_path):
    for path in tree(tmp_path, set__pos__1="good\nfilm", set__neg__1="bad", set__neg__deep__2=" ", set__README="about"):
        found = read_records(path, max_bad=1)
        assert values(found) == [{"text": "bad", "label": "neg"}, {"text": "good\nfilm", "label": "pos"}]
        assert found[0].file.endswith("/set/neg/1") and found[0].line == 1
        assert str(found.skipped[0]).endswith("/set/neg/deep/2, line 1 holds no text")


def test_a_file_a_class(tmp_path):
    for path in tree(tmp_path, **{"set__plot.tok": "a\n\nb\n", "set__quote.tok": "c", "set__README.txt": "about"}):
        found = read_records(path)
        assert values(found) == [
            {"text": "a", "label": "plot"}, {"text": "b", "label": "plot"}, {"text": "c", "label": "quote"}
        ]  # fmt: skip
        assert [record.line for record in found] == [1, 3, 1]


def test_folders_that_are_not_clear(tmp_path):
    for path in tree(tmp_path, neg__1="bad", loose="what?"):
        with pytest.raises(UserError, match="holds both folders of texts and the file loose beside them"):
            read_records(path)
    (tmp_path / "none").mkdir()
    with pytest.raises(UserError, match="none is empty: it holds no folders or files of texts"):
        read_records(str(tmp_path / "none"))


# --- TFDS ---


def test_tfds(shared_data):
    folder = str(shared_data / "tfds_tiny_shakespeare" / "array_record")
    whole = (shared_data / "tinyshakespeare" / "input.txt").read_text(encoding="utf-8")
    found = read_records(folder, "tfds", tfds_name="tiny_shakespeare", tfds_split="validation+test", required=["text"])
    assert [type(record.values["text"]) for record in found] == [str, str] and whole.endswith("".join(found.column("text")))
    assert (found[1].file, found[1].line) == ("tiny_shakespeare/validation+test", 2)
    with pytest.raises(UserError, match="has no field 'txt'; did you mean text?"):
        read_records(folder, "tfds", tfds_name="tiny_shakespeare", required=["txt"])
    with pytest.raises(UserError, match="needs the name of a prepared data set"):
        read_records(folder, "tfds")


def test_tfds_features_become_plain_python():
    import tensorflow_datasets as tfds

    features = tfds.features.FeaturesDict(
        {
            "label": tfds.features.ClassLabel(names=["ham", "spam"]),
            "tags": tfds.features.Sequence(tfds.features.ClassLabel(names=["O", "B"])),
            "answers": tfds.features.Sequence({"text": tfds.features.Text(), "start": np.int32}),
            "score": np.float32,
        }
    )
    example = {
        "label": np.int64(1),
        "tags": np.asarray([0, 1]),
        "answers": {"text": np.asarray([b"h\xc3\xa9", b""], object), "start": np.asarray([3, 4], np.int32)},
        "score": np.float32(0.5),
    }
    plain = {name: plain_feature(value, features[name]) for name, value in example.items()}
    assert plain == {"label": "spam", "tags": ["O", "B"], "answers": {"text": ["hé", ""], "start": [3, 4]}, "score": 0.5}
    assert {type(plain["score"]), type(plain["answers"]["start"][0])} == {float, int}
    assert plain_feature(np.int64(-1), features["label"]) is None
    with pytest.raises(ValueError, match="is not UTF-8"):
        plain_feature(b"\xff")


# --- real data ---


def test_real_data(shared_data):
    def counts(path: str, **options) -> collections.Counter:
        return collections.Counter(read_records(str(shared_data / path), **options).column("label"))

    assert counts("sms_spam/sms.tsv", columns=["label", "text"]) == {"ham": 4827, "spam": 747}
    assert counts("movie_reviews/movie_reviews.zip") == {"neg": 1000, "pos": 1000}
    assert counts("movie_reviews/subjectivity.zip") == {"plot": 5000, "quote": 5000}
    assert sum(counts("csl/category_*.tsv", columns=["task", "text", "label"]).values()) == 9000
    for language in ("en", "zh"):
        assert len(read_records(str(shared_data / f"xquad/xquad.{language}.json"))) == 1190
    dev = read_records(str(shared_data / "e2e_nlg/devel-fixed.no-ol.csv"), required=["mr", "ref"])
    assert len(dev) == 4299 and dev[-1].values["mr"].startswith("name[")
