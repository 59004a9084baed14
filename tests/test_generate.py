"""`gptjax generate`: streaming, many prompts, a conversation; and the same from Python. The model is random and tiny."""

from __future__ import annotations

import dataclasses
import io
import json
import pathlib
from typing import Any

import numpy as np
import pytest

import gptjax
from gptjax import cli
from gptjax.config import Config, UserError
from gptjax.data.tokenizers import CharTokenizer
from gptjax.generate.timing import Speed, covered
from gptjax.train.restore import TrainedModel
from gptjax.verbs import chat, generate, output
from tests.generate.small_models import GPT2_LIKE, model_config, random_params

TOKENIZER = CharTokenizer("abcdefghijklmnopqrstuvwxyz é:/\n")
SIZE = {"max_seq_len": 32, "vocab_size": TOKENIZER.vocab_size, "num_layers": 1}
CONFIG = dataclasses.replace(Config(), model=model_config(**SIZE, **GPT2_LIKE))
MODEL = TrainedModel(CONFIG, random_params(CONFIG.model, seed=1), TOKENIZER, step=7)
TEMPLATE = "{% for m in messages %}{{ m.role[0] }}:{{ m.content }}\n{% endfor %}a:"
# Prompts of up to 16 tokens or of 32, one row, two or four, and always somebody who listens: few compilations in all.
NEW = 6
SIZES = [f"--max_new_tokens={NEW}", "--workdir=anywhere"]


@pytest.fixture(autouse=True)
def model(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(generate, "_load", lambda arguments: MODEL)


def say(capsys: Any, *argv: str) -> tuple[int, str, str]:
    status = cli.main(["generate", *SIZES, *argv])
    return status, *capsys.readouterr()


def stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))


def test_what_is_streamed_is_what_is_printed_and_said_in_json(capsys, monkeypatch):
    plain = say(capsys, "--prompt=é the")
    written: list[str] = []
    monkeypatch.setattr(generate, "write_text", lambda text: (written.append(text), output.write_text(text)))
    streamed = say(capsys, "--prompt=é the", "--stream")
    assert plain[:2] == streamed[:2] and plain[0] == 0 and plain[1].startswith("é the")
    assert len(written) == NEW + 2 and written[0] == "é the", "it should come in pieces"
    for _, _, err in (plain, streamed):
        assert "prefill 5 tokens in" in err and "decode 5 tokens in" in err
    stdin(monkeypatch, "é the".encode())
    status, out, _ = say(capsys, "--prompt=-", "--json")
    (sample,) = json.loads(out)["samples"]
    assert status == 0 and sample["prompt"] + sample["text"] + "\n" == plain[1]
    assert len(sample["log_probs"]) == len(sample["tokens"]) == NEW and sample["finish_reason"] == "length"
    speed = json.loads(out)["speed"]
    assert speed["decoded_tokens"] == NEW - 1 and speed["decode_tokens_per_second"] > 0 and speed["compile_seconds"] < 1


def test_ctrl_c_leaves_what_was_written(capsys, monkeypatch):
    whole = say(capsys, "--prompt=the", "--stream")[1]

    def write(text: str, count: list[int] = [0]) -> None:  # noqa: B006 - counts the calls
        count[0] += 1
        if count[0] == 4:
            raise KeyboardInterrupt
        output.write_text(text)

    monkeypatch.setattr(generate, "write_text", write)
    status, out, err = say(capsys, "--prompt=the", "--stream")
    assert status == 130 and "stopped." in err
    assert len(out) == 3 + 2 + 1 and whole.startswith(out.removesuffix("\n")) and len(out) < len(whole)


def test_a_file_of_prompts(capsys, tmp_path):
    prompts = ["the", "x" * 20, "fox", "é", "y" * 31, "the"]
    lines = [json.dumps({"prompt": prompt, "id": f"n{i}"}) for i, prompt in enumerate(prompts)]
    (tmp_path / "p.jsonl").write_text("\n".join(lines) + "\n")
    out = tmp_path / "out.jsonl"
    arguments = [f"--prompts={tmp_path / 'p.jsonl'}", "--batch_size=4", "--num_return_sequences=2"]
    status, printed, err = say(capsys, *arguments, f"--output={out}", "--json")
    records = [json.loads(line) for line in out.read_text().splitlines()]
    assert status == 0 and [(r["id"], r["sample"]) for r in records] == [(f"n{i}", s) for i in range(6) for s in (0, 1)]
    assert json.loads(printed)["answered"] == 6 and "6 prompts answered;" in err
    assert [r["prompt"] for r in records[::2]] == prompts
    # Each is what it would be alone, whatever its batch and order; the same prompts are the same.
    assert records[0]["tokens"] == records[10]["tokens"] != records[1]["tokens"]
    for number in (0, 2):
        alone = gptjax.generate(MODEL, prompts[number], max_new_tokens=NEW, num_return_sequences=2, speed=Speed())
        assert [list(c.tokens) for c in alone] == [records[2 * number]["tokens"], records[2 * number + 1]["tokens"]]
        np.testing.assert_allclose(alone[0].log_probs, records[2 * number]["log_probs"], atol=1e-5)
    (tmp_path / "p.txt").write_text("".join(f"{prompt}\r\n" for prompt in prompts))
    status, printed, _ = say(capsys, f"--prompts={tmp_path / 'p.txt'}", *arguments[1:])
    same = [json.loads(line) for line in printed.splitlines()]
    assert [r["tokens"] for r in same] == [r["tokens"] for r in records] and same[2]["id"] == 2


def test_broken_lines_are_named_and_the_others_answered(capsys, tmp_path, monkeypatch):
    lines = [
        b'{"prompt": "the", "id": 5}',
        b"{",
        b'{"prompt": 3}',
        b'["the"]',
        b'{"prompt": "\\ud800"}',
        b'{"prompt": "\xff"}',
        b'{"id": "\\udfff", "prompt": "a"}',
        b'{"prompt": "%s"}' % (b"x" * 33),
        b'{"prompt": "the", "messages": []}',
        b'{"messages": [{"role": "user", "content": "hi"}], "id": "m"}',
        b"",
        b'{"prompt": "fox"}',
    ]
    (tmp_path / "template").write_text(TEMPLATE)
    stdin(monkeypatch, b"\n".join(lines) + b"\n")
    status, out, err = say(capsys, "--prompts=-", "--batch_size=1", f"--chat_template={tmp_path / 'template'}")
    records = [json.loads(line) for line in out.splitlines()]
    assert status == 2 and len(records) == len(lines)
    assert [number for number, record in enumerate(records, 1) if "text" in record] == [1, 10, 12]
    assert [records[i]["id"] for i in (0, 9, 11)] == [5, "m", 12]
    for number, record in enumerate(records, 1):
        if "error" in record:
            assert record["error"].startswith(f"standard input:{number}: ") and record["error"].endswith(".")
    assert "9 of 12 prompts were refused, the first: standard input:2: the line is not valid JSON" in err
    (message,) = [record for record in records if record["id"] == "m"]
    hi = [{"role": "user", "content": "hi"}]
    (direct,) = gptjax.generate(MODEL, hi, chat_template=TEMPLATE, max_new_tokens=NEW, speed=Speed())
    assert list(direct.tokens) == message["tokens"] and message["prompt"] == hi


def converse(
    capsys: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path, said: bytes, *more: str
) -> tuple[int, str, str]:
    (tmp_path / "template").write_text(TEMPLATE)
    stdin(monkeypatch, said)
    return say(capsys, "--chat", f"--chat_template={tmp_path / 'template'}", "--greedy", *more)


def answer(prompt: str) -> str:
    return gptjax.generate(MODEL, prompt, max_new_tokens=NEW, do_sample=False, speed=Speed())[0].text


def test_a_conversation_goes_on_from_what_was_said(capsys, monkeypatch, tmp_path):
    pytest.importorskip("jinja2", reason="extra: chat")
    first = answer("u:hi\na:")
    second = answer(f"u:hi\na:{first}\nu:so\na:")
    told = answer("s:be\nu:hi\na:")
    said = b"hi\n\nso\n/reset\nhi\n/system  be\n/nonsense\n//x\n/reset\nhi\n\xff\n" + b"x" * 40 + b"\nhi\n/exit\nhi\n"
    status, out, err = converse(capsys, monkeypatch, tmp_path, said)
    slash = answer(f"s:be\nu:hi\na:{first}\nu:/x\na:")
    assert status == 0 and out.startswith(f"{first}\n{second}\n{first}\n{slash}\n{told}\n")
    assert "there is no command /nonsense" in err and "byte 0xff, which is not UTF-8" in err
    assert "this alone makes a prompt of" in err and "model.max_seq_len=32" in err
    assert "decode " in err


def test_the_oldest_turns_are_dropped_with_a_note(capsys, monkeypatch, tmp_path):
    pytest.importorskip("jinja2", reason="extra: chat")
    status, out, err = converse(capsys, monkeypatch, tmp_path, b"one\ntwo\nthree\n", "--system=be")
    assert status == 0 and "was dropped: the context of 32 tokens is full" in err
    first = answer("s:be\nu:one\na:")
    assert out.startswith(first)


def test_ctrl_c_stops_the_answer_and_twice_ends(capsys, monkeypatch, tmp_path):
    pytest.importorskip("jinja2", reason="extra: chat")
    first = answer("u:hi\na:")
    shown: list[str] = []

    def write(text: str) -> None:
        if len(shown) == 3:
            shown.append("")
            raise KeyboardInterrupt
        shown.append(text)
        output.write_text(text)

    monkeypatch.setattr(chat, "write_text", write)
    status, out, err = converse(capsys, monkeypatch, tmp_path, b"hi\nso\n")
    part = out.split("\n")[0]
    assert status == 0 and "Ctrl-C once more" in err and first.startswith("".join(shown[:3])) and len(part) < len(first)
    monkeypatch.setattr(chat, "_read_line", lambda is_terminal: (_ for _ in ()).throw(KeyboardInterrupt))
    status, _, err = converse(capsys, monkeypatch, tmp_path, b"")
    assert status == 130 and "Ctrl-C once more" in err


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["--prompt=a", "--prompts=b"], "--prompt and --prompts are both given"),
        (["--chat", "--json"], "leave out --json"),
        (["--chat"], "--chat_template=FILE"),
        (["--system=x"], "--system belongs to --chat"),
        (["--output=x"], "--output belongs to --prompts"),
        (["--prompts=nofile.jsonl"], "does not exist"),
        (["--prompt=a", "--stream", "--json"], "--stream shows one text"),
        (["--prompt=a", "--chat_template=nofile"], "cannot be read"),
        (["--prompt=a\udcff"], "the byte 0xff, which is not UTF-8"),
    ],
)
def test_mistakes(capsys, tmp_path, argv, sentence):
    status, out, err = say(capsys, *argv)
    assert status == 2 and out == "" and sentence in err and err.count("\n") == 1


def test_from_python():
    heard: dict[int, str] = {}

    def stream(number: int, text: str) -> None:
        heard[number] = heard.get(number, "") + text

    speed = Speed()
    prompts = ["the", [4, 5]]
    made = gptjax.generate(MODEL, prompts, max_new_tokens=NEW, seed=3, stream=stream, speed=speed)
    assert [heard[i] for i in range(2)] == [completion.text for completion in made]
    assert made[1].prompt == "ab" and speed.prompt_tokens == 5 and speed.decoded_tokens == 2 * NEW - 2
    with pytest.raises(UserError, match="temperature=-1"):
        gptjax.generate(MODEL, "a", temperature=-1)
    with pytest.raises(UserError, match="no chat template"):
        gptjax.generate(MODEL, [{"role": "user", "content": "x"}])


def test_overlapping_times_count_once():
    assert covered([(0.0, 2.0), (1.0, 3.0), (1.2, 1.3), (5.0, 6.0)]) == pytest.approx(4.0)
