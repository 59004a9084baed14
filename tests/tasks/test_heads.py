"""Heads of tasks: losses against numpy in float64, tags, windows, answers, and what is refused."""

from __future__ import annotations

import json
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import TaskConfig, UserError
from gptjax.data.tokenizers import ByteTokenizer, Gpt2Tokenizer, SentencePieceTokenizer, Tokenizer
from gptjax.tasks import tags as tags_lib
from gptjax.tasks.base import Encoder
from gptjax.tasks.load import load_tasks
from gptjax.tasks.table import TASKS
from tests.tasks.cases import CASES, case, write_records

BYTES = ByteTokenizer()
KNOBS = {
    "classification": TaskConfig(kind="classification", labels=("x", "y", "z")),
    "multilabel": TaskConfig(kind="multilabel", labels=("x", "y", "z")),
    "regression": TaskConfig(kind="regression", label="u,v", labels=("u", "v")),
    "tagging": TaskConfig(kind="tagging", labels=("O", "B-A", "I-A")),
    "answers": TaskConfig(kind="answers", question="{question}?", unanswerable="yes"),
}


def batch_of(rng: np.random.Generator, kind: str) -> dict[str, np.ndarray]:
    """Two rows of [2 examples, padding] with targets in all of a task's columns."""
    segments = np.asarray([[1] * 4 + [2] * 5 + [0] * 2, [1] * 6 + [2] * 2 + [0] * 3], np.int32)
    at_end = (segments > 0) & (np.diff(segments, axis=1, append=0) != 0)
    read = np.asarray(segments > 0, np.int32) if kind in ("tagging", "answers") else at_end.astype(np.int32)
    found = {"segment_ids": segments, "read": read}
    for name, like in TASKS[kind].columns(KNOBS[kind]).items():
        if name in ("start", "end"):
            found[name] = np.zeros(segments.shape, np.int32)
            for row, places in ((0, (0, 6)), (1, (5, 7))):
                found[name][row, list(places)] = 1
        elif name == "known":
            found[name] = read
        elif like.dtype == np.float32:
            found[name] = (rng.integers(0, 2, (*segments.shape, *like.shape[1:])) * read[..., None]).astype(np.float32)
        else:
            found[name] = (rng.integers(1, 4, segments.shape) * read).astype(np.int32)
    return found


def brute_force(kind: str, logits: np.ndarray, batch: dict[str, np.ndarray]) -> tuple[float, float]:
    """(sum, weight) of a batch's losses, example by example in float64."""
    total = weight = 0.0
    for row, segments in enumerate(batch["segment_ids"]):
        for number in (1, 2):
            own = np.flatnonzero(segments == number)
            x, end = logits[row, own], own[-1]
            if kind == "classification":
                total += np.log(np.exp(x[-1]).sum()) - x[-1, batch["label"][row, end] - 1]
                weight += 1
            elif kind == "multilabel":
                p, y = 1 / (1 + np.exp(-x[-1])), batch["labels"][row, end]
                total += -(y * np.log(p) + (1 - y) * np.log(1 - p)).mean()
                weight += 1
            elif kind == "regression":
                total += ((x[-1] - batch["numbers"][row, end]) ** 2).mean()
                weight += 1
            elif kind == "tagging":
                p = np.exp(x) / np.exp(x).sum(-1, keepdims=True)
                total += -np.log(p[np.arange(len(own)), batch["tag"][row, own] - 1]).sum()
                weight += len(own)
            else:
                for k, name in enumerate(("start", "end")):
                    place = int(batch[name][row, own].argmax())
                    total += (np.log(np.exp(x[:, k]).sum()) - x[place, k]) / 2
                weight += 1
    return total, weight


@pytest.mark.parametrize("kind", KNOBS)
def test_the_loss_of_a_head_against_float64(kind):
    rng = np.random.default_rng(1)
    batch, hidden = batch_of(rng, kind), rng.standard_normal((2, 11, 8))
    model = case_model(8)
    head = {name: rng.standard_normal(parameter.shape) for name, parameter in TASKS[kind].head(KNOBS[kind], model).items()}
    logits = hidden @ head["kernel"] + head.get("bias", 0.0)
    as_float32 = {name: jnp.asarray(value, jnp.float32) for name, value in head.items()}
    found = TASKS[kind].loss(KNOBS[kind], as_float32, jnp.asarray(hidden, jnp.float32), batch, None)
    total, weight = brute_force(kind, logits, batch)
    assert float(found.weight) == weight
    np.testing.assert_allclose([float(found.loss), float(found.nll)], total, rtol=1e-5)


def case_model(width: int):
    from gptjax.config import ModelConfig

    return ModelConfig(model_dim=width, num_heads=2, vocab_size=7)


def test_another_segment_s_huge_logits_leave_an_answer_s_loss():
    from gptjax.tasks.answers import segment_logsumexp

    x = jnp.asarray([[[1.0], [2.0], [500.0], [-500.0]]])
    found = segment_logsumexp(x, jnp.asarray([[1, 1, 2, 0]]))
    np.testing.assert_allclose(found[0, :, 0], [np.logaddexp(1, 2), np.logaddexp(1, 2), 500, -500], rtol=1e-6)


# --- tags ---


def random_tags(rng: np.random.Generator) -> list[str]:
    return [str(rng.choice(["O", "B-A", "I-A", "B-C", "I-C", "E-A", "S-C", "E-C", "S-A"])) for _ in range(rng.integers(1, 9))]


def test_entities_are_those_that_seqeval_finds():
    sequence_labeling = pytest.importorskip("seqeval.metrics.sequence_labeling")
    rng = np.random.default_rng(0)
    for _ in range(500):
        tags = random_tags(rng)
        assert tags_lib.entities(tags) == sequence_labeling.get_entities(tags), tags


def test_schemes_are_converted_there_and_back():
    rng = np.random.default_rng(1)
    for _ in range(200):
        tags = random_tags(rng)
        for scheme in tags_lib.PREFIXES:
            good = tags_lib.converted(tags, scheme)
            assert tags_lib.entities(good) == tags_lib.entities(tags) and not tags_lib.fault(good, scheme)
    words = ["B-A", "B-A", "I-A", "O", "B-C"]
    assert tags_lib.converted(words, "IOB1") == ["I-A", "B-A", "I-A", "O", "I-C"]
    assert tags_lib.converted(words, "IOBES") == ["S-A", "B-A", "E-A", "O", "S-C"]
    assert "word 2, where BIO would have 'B-A'" in tags_lib.fault(["O", "I-A"], "BIO")
    assert "'E-A' at word 1, where BIO has O, B-TYPE, I-TYPE" in tags_lib.fault(["E-A"], "BIO")


# --- tokens, words and characters ---


@pytest.fixture(scope="module")
def tokenizers(shared_data) -> dict[str, Tokenizer]:
    gpt2, pieces = shared_data / "gpt2_bpe", shared_data / "sentencepiece" / "test_model.model"
    return {
        "byte": BYTES,
        "gpt2": Gpt2Tokenizer((gpt2 / "encoder.json").read_bytes(), (gpt2 / "vocab.bpe").read_bytes()),
        "sentencepiece": SentencePieceTokenizer(pieces.read_bytes()),
    }


@pytest.mark.parametrize("name", ["byte", "gpt2", "sentencepiece"])
def test_each_word_s_tokens_say_that_word(name, tokenizers):
    from gptjax.data.alignment import token_spans, trimmed, word_tokens

    tokenizer, words = tokenizers[name], ["I", "saw", "a", "telescope", "with", "girls", "--", "12.5"]
    for join in (" ", ""):
        ids, spans = word_tokens(tokenizer, words, join)
        assert [tokenizer.decode(ids[a:b]).strip() for a, b in spans] == words
        assert (spans[:, 1] > spans[:, 0]).all() and (spans[1:, 0] >= spans[:-1, 1]).all()
    if name != "sentencepiece":  # which cannot write these
        odd = ["Zürich", "北京市", "naïve", "🙂"]
        ids, spans = word_tokens(tokenizer, odd, " ")
        assert [tokenizer.decode(ids[a:b]).strip() for a, b in spans] == odd
    text = "In Zürich, １２ girls saw  the ﬁne 北京."
    ids = tokenizer.encode(text)
    spans = token_spans(tokenizer, text, ids)
    assert spans.shape == (len(ids), 2) and (np.diff(spans[:, 0]) >= 0).all() and spans.min() >= 0 and spans.max() <= len(text)
    wanted = {character for character in range(len(text)) if not text[character].isspace()}
    real = [set(range(a, b)) for a, b in trimmed(text, spans)]
    assert set.union(*real) >= wanted - {text.index("ü")}  # an unknown piece may stand for nothing
    for place, part in enumerate(real):
        if name != "byte" and len(part) > 1 and text[min(part) : max(part) + 1].isascii():
            assert tokenizer.decode(ids[place : place + 1]).strip() == text[min(part) : max(part) + 1]


def encoder(room: int, tokenizer: Tokenizer = BYTES) -> Encoder:
    return Encoder(tokenizer, True, True, room)


@pytest.mark.parametrize("word_token", ["first", "last", "all"])
@pytest.mark.parametrize("join", [" ", ""])
def test_every_word_of_a_long_sentence_is_new_in_one_window(word_token, join):
    knobs = TaskConfig(kind="tagging", labels=("O", "B-A", "I-A"), word_token=word_token, join=join)
    words = ["ab", "cde", "f", "ghij", "kl", "m", "no", "pqr", "stu", "vwx", "y", "z" * 7]
    tags = ["B-A" if number % 3 == 0 else "I-A" if number % 3 == 1 else "O" for number in range(len(words))]
    record = {"words": words, "tags": tags}
    whole = TASKS["tagging"].encode(knobs, record, encoder(200))
    windows = TASKS["tagging"].encode(knobs, record, encoder(14))
    assert len(whole) == 1 and len(windows) > 2 and all(len(window.tokens) <= 14 and not window.cut for window in windows)
    for parts in (whole, windows):
        said = [BYTES.decode(part.tokens[place : place + 1]) for part in parts for place in np.flatnonzero(part.read)]
        assert said == [word[0 if word_token == "first" else -1] for word in words]
        labels = [knobs.labels[part.columns["tag"][place] - 1] for part in parts for place in np.flatnonzero(part.read)]
        assert labels == tags
        count = sum(int((part.columns["tag"] > 0).sum()) for part in parts)
        assert count == (sum(map(len, words)) if word_token == "all" else len(words))
    seen = [BYTES.decode(window.tokens) for window in windows]
    assert all(set(text.replace(" ", "")) <= set("".join(words)) for text in seen)
    (cut,) = TASKS["tagging"].encode(knobs, {"words": ["z" * 40], "tags": ["O"]}, encoder(14))
    assert cut.cut and cut.read.sum() == 1 and len(cut.tokens) == 14


# --- answers ---

CONTEXT = "Der Zürichsee liegt in 北京, naïve girls saw the telescope behind the old stone bridge of the town."


@pytest.mark.parametrize("name", ["byte", "gpt2", "sentencepiece"])
@pytest.mark.parametrize("answer", ["Zürichsee", "北京", "naïve girls", "the telescope", "town.", "Der", "bridge"])
def test_an_answer_is_found_again_in_every_window_that_holds_it(name, answer, tokenizers):
    if name == "sentencepiece" and not answer.isascii():
        pytest.skip("the model has no piece for these characters")
    knobs, tokenizer = KNOBS["answers"], tokenizers[name]
    record = {"question": "Wo", "context": CONTEXT, "answers": [{"text": answer, "answer_start": CONTEXT.index(answer)}]}
    for room in (200, 40, 24):
        windows = TASKS["answers"].encode(knobs, record, encoder(room, tokenizer))
        assert len(windows) == 1 or room < 200
        outputs, held = [], 0
        for window in windows:
            assert len(window.tokens) <= room
            columns = [window.columns[part].astype(np.float32) for part in ("start", "end", "from", "to")]
            assert columns[0].sum() == columns[1].sum() == 1
            held += columns[0][0] == 0
            outputs.append(np.stack([9 * columns[0], 9 * columns[1], *columns], axis=1))
        assert held or room == 24
        judged = TASKS["answers"].judged(knobs, record, outputs)
        if held:
            found = judged.predicted  # the tokens of the answer, which may hold more than it
            assert found == answer or (answer in found and len(found) <= len(answer) + 2), found
            assert CONTEXT[judged.more["answer_start"] :].startswith(found)


def outputs_of(starts: dict[int, float], ends: dict[int, float], spans: list[tuple[int, int]]) -> np.ndarray:
    """A window whose first token is no part of the context, and these logits at the tokens."""
    rows = np.zeros((1 + len(spans), 6), np.float32)
    rows[0, 2:4] = 1
    for column, logits in ((0, starts), (1, ends)):
        for place, value in logits.items():
            rows[place, column] = value
    rows[1:, 4:] = spans
    return rows


def test_the_best_part_of_all_windows_within_its_limit():
    record = {"question": "q", "context": "ab cd ef", "answers": []}
    spans = [(0, 2), (3, 5), (6, 8)]

    def said(*windows: np.ndarray, **knobs: Any) -> str:
        made = TaskConfig(kind="answers", **{"unanswerable": "yes"} | knobs)
        return TASKS["answers"].judged(made, record, windows).predicted

    first, second = outputs_of({2: 3}, {2: 1, 3: 2}, spans), outputs_of({1: 4}, {3: 4}, spans)
    assert said(first) == "cd ef" and said(first, max_answer=4) == "cd"
    assert said(first, second) == "ab cd ef" and said(first, second, max_answer=5) == "cd ef"
    backwards = outputs_of({3: 9}, {1: 9}, spans)
    assert said(backwards) in ("ab", "ab cd", "ef", "ab cd ef", "cd ef")  # never an end before its start
    assert said(backwards, max_answer=2) in ("ab", "ef")
    none = outputs_of({0: 6, 2: 3}, {0: 6, 2: 3}, spans)
    assert said(none) == "" and said(none, unanswerable="no") == "cd" and said(none, null_threshold=6.5) == "cd"
    assert (
        said(none, first) == said(first, none) == "cd"
    )  # the first tokens of the other window say that there is something in it
    assert said(outputs_of({}, {}, [(0, 0)])) == ""  # a context of white space
    character = outputs_of({2: 9}, {1: 9}, [(0, 1), (0, 1)])  # of two tokens
    assert TASKS["answers"].judged(KNOBS["answers"], record, [character]).more["score"] == 9


# --- what is refused ---


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    return write_records(tmp_path_factory.mktemp("records") / "records.jsonl")


def quiet(line: str) -> None: ...


@pytest.mark.parametrize(
    ("name", "changes", "sentence"),
    [
        ("classification", {"task__label": "topic"}, "has no field 'topic'"),
        ("classification", {"task__labels": "cat,dog"}, "has the label 'none', which is none of cat, dog"),
        ("classification", {"task__label": "words"}, "for a label in 'words'"),
        ("classification", {"task__labels": "cat,none,cat"}, "task.labels has 'cat' twice"),
        ("classification", {"task__text": "{text} {title}"}, "has no field 'title'"),
        ("multilabel", {"task__labels": "cat"}, "which is none of cat"),
        ("multilabel", {"task__separator": ""}, "needs a task.separator"),
        ("regression", {"task__label": "text"}, "where a number should be"),
        ("regression", {"task__labels": "a"}, "has 2 numbers in 'length,sunny', where 1 should be"),
        ("tagging", {"task__scheme": "IOB1"}, "where IOB1 would have 'I-"),
        ("tagging", {"task__scheme": "none"}, "needs a task.scheme that it is made of"),
        ("tagging", {"task__tags": "label"}, "not as many tags in 'label'"),
        ("answers", {"task__unanswerable": "no"}, "has no answer, which task.unanswerable=no excludes"),
        ("answers", {"task__context": "question"}, "which does not stand at"),
    ],
)
def test_a_mistake_is_one_sentence(name, changes, sentence, records):
    with pytest.raises(UserError) as error:
        load_tasks(case(name, records, **changes), quiet)
    assert sentence in str(error.value) and str(error.value).endswith("."), str(error.value)


def test_a_field_that_is_no_label_has_more_classes_than_can_be_learnt(tmp_path):
    path = write_records(tmp_path / "many.jsonl", 120)
    with pytest.raises(UserError, match="more classes than can be learnt"):
        load_tasks(case("classification", path, task__label="text", task__text="{text}"), quiet)


def test_a_label_that_no_training_record_has_is_named(records):
    said: list[str] = []
    load_tasks(case("classification", records, task__labels="cat,none,horse"), said.append)
    assert "data: task.labels: no training record has 'horse'." in said


def test_malformed_tags_are_repaired_where_one_says_so(tmp_path):
    path = tmp_path / "tags.jsonl"
    rows = [{"words": [str(n), "b", "c"], "tags": ["O", "I-A", "I-A"]} for n in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    knobs = {"task__train_scheme": "BIO"}
    with pytest.raises(UserError, match="line 1 has the tag 'I-A' at word 2, where BIO would have 'B-A'"):
        load_tasks(case("tagging", path, **knobs), quiet)
    said: list[str] = []
    dataset = load_tasks(case("tagging", path, task__malformed="repair", **knobs), said.append)
    assert dataset.tasks["task"].labels == ("O", "B-A", "I-A")
    assert any("were repaired" in line for line in said)


def test_labels_may_be_numbers_lists_or_separated_text(tmp_path):
    path = tmp_path / "labels.csv"
    path.write_text("text,grade,topics,scores\n" + "".join(f"t{n},{n % 11},a; b,{n};0.5\n" for n in range(40)), encoding="utf-8")
    common = {"task__format": "csv", "task__separator": ";", "task__text": "{text}"}
    tasks = {
        name: load_tasks(case(name, path, task__label=field, **common), quiet).tasks["task"].labels
        for name, field in (("classification", "grade"), ("multilabel", "topics"), ("regression", "scores"))
    }
    assert tasks["classification"] == tuple(map(str, range(11)))  # 10 behind 9
    assert tasks["multilabel"] == ("a", "b") and tasks["regression"] == ("scores_1", "scores_2")


def test_every_case_has_a_line_of_the_table():
    assert {name.partition("/")[0] for name in CASES} >= set(KNOBS)
