"""Tasks that write and preferences: what is learnt of a record, and what it costs, against float64 arithmetic on logits."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import TaskConfig, UserError
from gptjax.data.pipeline import eval_batches
from gptjax.data.tokenizers import ByteTokenizer
from gptjax.model.decoder import Decoder, output_table
from gptjax.tasks.base import Encoded, Encoder
from gptjax.tasks.load import load_tasks
from gptjax.tasks.losses import task_losses
from gptjax.tasks.table import TASKS
from gptjax.train.loss import token_nll
from gptjax.train.step import head_options, task_loss
from tests.small import random_params
from tests.tasks.text_cases import alone, write_records

EOS = 256


def encoder(room: int = 200) -> Encoder:
    return Encoder(ByteTokenizer(), True, True, room)


def learnt(example: Encoded) -> tuple[str, str]:
    """(all of it, what of it is learnt), ends of text as /."""
    text = "".join("/" if token == EOS else chr(token) for token in example.tokens)
    return text, "".join(char if read else "_" for char, read in zip(text, example.read, strict=True))


# --- completions ------------------------------------------------------------------------------------------------------------


def test_of_a_completion_the_written_part_is_learnt_and_each_right_text_is_an_example():
    knobs = TaskConfig(kind="completion", prompt="{a}=", completion="{b}!")
    found = TASKS["completion"].encode(knobs, {"a": "1", "b": ["x", {"text": "yz"}, "x"]}, encoder())
    assert [learnt(one) for one in found] == [("/1=x!/", "___x!/"), ("/1=yz!/", "___yz!/")]
    assert not any(one.cut for one in found)


@pytest.mark.parametrize(("room", "text", "read"), [(6, "/=xyz/", "__xyz/"), (5, "/xyz/", "_xyz/"), (4, "/xyz", "_xyz")])
def test_where_there_is_no_room_the_prompt_loses_its_beginning_then_the_completion_its_end(room, text, read):
    knobs = TaskConfig(kind="completion", prompt="{a}=", completion="{b}")
    (one,) = TASKS["completion"].encode(knobs, {"a": "123", "b": "xyz"}, encoder(room))
    assert learnt(one) == (text, read) and one.cut


@pytest.mark.parametrize(
    ("kind", "record", "fault"),
    [
        ("completion", {"prompt": "a", "completion": " \n"}, "has an empty completion"),
        ("completion", {"prompt": "a", "completion": []}, "has no text in its list 'completion'"),
        ("completion", {"prompt": "a", "completion": [1]}, "has something else than texts in its list 'completion'"),
        ("chat", {"messages": [{"role": "user", "content": "a"}]}, "has no turn of 'assistant' to learn"),
        ("chat", {"messages": []}, 'has no list "messages" with a message in it'),
        ("chat", {"messages": [{"role": "assistant", "content": ""}]}, "has an empty turn of 'assistant'"),
        ("preference", {"chosen": "a", "rejected": "b"}, "has no field 'prompt'"),
        ("preference", {"prompt": "", "chosen": "a", "rejected": ""}, "has an empty rejected completion"),
        ("preference", {"prompt": "", "chosen": "a", "rejected": "a"}, "has the same completion as chosen and rejected"),
        (
            "preference",
            {"chosen": [{"role": "user", "content": "a"}], "rejected": [{"role": "assistant", "content": "a"}]},
            "has a chosen conversation that ends with a turn of 'user', not of 'assistant'",
        ),
    ],
)
def test_a_bad_record_is_told_in_a_sentence(kind, record, fault):
    assert TASKS[kind].check(TaskConfig(kind=kind), record) == fault


def test_a_record_without_its_field_is_named(tmp_path):
    (tmp_path / "records.jsonl").write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a"}\n')
    with pytest.raises(UserError, match=r"records.jsonl, line 2 has no field 'completion'"):
        load_tasks(alone("completion", tmp_path, task__completion="{completion}"), lambda line: None)


# --- conversations ----------------------------------------------------------------------------------------------------------

TALK = [
    {"role": "system", "content": "s"},
    {"role": "user", "content": "u1"},
    {"role": "assistant", "content": "a1"},
    {"role": "user", "content": "u2"},
    {"role": "assistant", "content": "a2"},
    {"role": "user", "content": "left out"},
]


@pytest.mark.parametrize(
    ("turns", "room", "text", "answers"),
    [
        ("all", 200, "/system: s\nuser: u1\nassistant: a1/\nuser: u2\nassistant: a2/", [" a1/", " a2/"]),
        ("last", 200, "/system: s\nuser: u1\nassistant: a1/\nuser: u2\nassistant: a2/", [" a2/"]),
        ("all", 40, "/system: s\nuser: u2\nassistant: a2/", [" a2/"]),
        ("all", 17, "r: u2\nassistant: a2/"[-17:], [" a2/"]),
    ],
)
def test_of_a_conversation_the_assistants_turns_are_learnt_and_whole_turns_lost(turns, room, text, answers):
    knobs = TaskConfig(kind="chat", chat_template="plain", turns=turns)
    (one,) = TASKS["chat"].encode(knobs, {"messages": TALK}, encoder(room))
    whole, read = learnt(one)
    assert whole == text and [part for part in read.split("_") if part] == answers
    assert one.cut == (room < 200)


def test_the_prompt_of_an_answer_is_what_stood_before_it_in_training():
    knobs = TaskConfig(kind="chat", chat_template="plain", max_new_tokens=8)
    (one,) = TASKS["chat"].encode(knobs, {"messages": TALK}, encoder())
    request = TASKS["chat"].request(knobs, {"messages": TALK}, encoder())
    assert request.references == ("a2",)
    np.testing.assert_array_equal(request.ids, one.tokens[: len(request.ids)])
    assert one.read[len(request.ids) :].all() and not one.read[len(request.ids) - 1]
    few = TASKS["chat"].request(knobs, {"messages": TALK}, encoder(48))
    assert bytes(few.ids[1:].astype(np.uint8)) == b"system: s\nuser: u2\nassistant:"


def test_conversations_that_differ_in_their_last_turn_are_a_pair_and_lose_the_same_turns():
    knobs = TaskConfig(kind="preference", chat_template="plain")
    worse = [*TALK[:4], {"role": "assistant", "content": "bad"}]
    record = {"prompt": TALK[:4], "chosen": TALK[4:5], "rejected": worse}
    assert TASKS["preference"].check(knobs, record) == ""
    for room, front in ((200, "/system: s\nuser: u1\nassistant: a1/\nuser: u2\n"), (80, "/system: s\nuser: u2\n")):
        (one,) = TASKS["preference"].encode(knobs, record, encoder(room))
        text, read = learnt(one)
        assert text == f"{front}assistant: a2/{front}assistant: bad/" and one.cut == (room == 80)
        assert [part for part in read.split("_") if part] == [" a2/", " bad/"]
        assert one.parts == (text.index("a2/") + 3, len(text) - text.index("a2/") - 3)
        assert [int(side) for side in one.columns["side"] if side] == [1] * 4 + [-1] * 5


def test_a_pair_shares_its_room():
    knobs = TaskConfig(kind="preference")
    (one,) = TASKS["preference"].encode(knobs, {"prompt": "0123456789", "chosen": "ab", "rejected": "c"}, encoder(15))
    assert learnt(one)[0] == "/6789ab/" + "/6789c/" and one.cut and one.parts == (8, 7)
    (one,) = TASKS["preference"].encode(knobs, {"prompt": "0123", "chosen": "abcdefghijkl", "rejected": "c"}, encoder(12))
    assert learnt(one)[0] == "/abcde" + "/c/" and one.cut


# --- what it costs ----------------------------------------------------------------------------------------------------------


@functools.cache
def forward(config: Any) -> Any:
    return jax.jit(lambda params, tokens: Decoder(config).apply({"params": params}, tokens)[0])


def nats_alone(config: Any, params: Any, tokens: np.ndarray) -> np.ndarray:
    """float64 [n] of each token, the first 0, of a sequence that stands alone; logits by the decoder, all else here."""
    padded = np.zeros((1, 128), np.int32)
    padded[0, : len(tokens)] = tokens
    logits = np.asarray(forward(config.model)(params, padded), np.float64)[0, : len(tokens)]
    log_p = logits - np.log(np.exp(logits - logits.max(-1, keepdims=True)).sum(-1, keepdims=True)) - logits.max(-1, keepdims=True)
    return np.concatenate([[0.0], -log_p[np.arange(len(tokens) - 1), tokens[1:]]])


def pair_loss(h: float, beta: float, smoothing: float = 0.0, ipo: bool = False) -> float:
    if ipo:
        return (h - 0.5 / beta) ** 2
    return (1 - smoothing) * np.log1p(np.exp(-beta * h)) + smoothing * np.log1p(np.exp(beta * h))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts")
    write_records(path)
    return path


@pytest.mark.parametrize(
    ("kind", "knobs"),
    [
        ("completion", {}),
        ("chat", {}),
        ("preference", {}),
        ("preference", {"task__preference_smoothing": 0.2}),
        ("preference", {"task__preference_loss": "ipo"}),
    ],
)
@pytest.mark.parametrize("packing", ["packed", "padded"])
def test_the_loss_of_a_batch_is_that_of_its_examples_alone(folder, kind, knobs, packing):
    config = alone(kind, folder, data__packing=packing, evaluate__batch_size=12, **knobs)
    data = load_tasks(config, lambda line: None)
    params = random_params(config)
    batch = dict(next(eval_batches(config, data.eval, 12)))
    rng = np.random.default_rng(0)
    reference = rng.uniform(1, 6, 5000).astype(np.float32)  # 50 of each example
    assert (packing == "packed") == (len(data.eval.rows) < len(data.examples["eval"]))  # some rows hold several
    if kind == "preference":
        reads = batch["read"] > 0
        batch["task/reference"] = np.zeros(batch["read"].shape, np.float32)
        for number in np.unique(batch["example"][reads]):  # the same for an example wherever it stands
            own = reads & (batch["example"] == number)
            batch["task/reference"][own] = reference[50 * (number - 1) :][: own.sum()]
    loss, sums = jax.jit(functools.partial(task_loss, config, dropout_keys=None))(params, batch=batch)
    wanted, weight = 0.0, 0
    for number in np.unique(batch["example"][batch["example"] > 0]):
        example = data.examples["eval"][number - 1]
        record = data.records["eval"]["task"][example.record].values
        encode = Encoder(data.tokenizer, config.data.add_bos, config.data.add_eos, config.data.seq_len)
        one = TASKS[kind].encode(config.task, record, encode)[example.part]
        ends = np.cumsum(one.parts or (len(one.tokens),))
        nats = np.concatenate([nats_alone(config, params, part) for part in np.split(one.tokens, ends[:-1])])
        if kind == "preference":
            gain = reference[50 * (number - 1) :][: one.read.sum()].astype(np.float64) - nats[one.read > 0]
            side = one.columns["side"][one.read > 0]
            ipo = config.task.preference_loss == "ipo"
            wanted += pair_loss(float((gain * side).sum()), 0.5, config.task.preference_smoothing, ipo)
            weight += 1
        else:
            wanted += float((nats * one.read).sum())
            weight += int(one.read.sum())
    assert weight >= 3 and float(sums["weight_sum"]) == weight
    assert float(loss) == pytest.approx(wanted, rel=2e-6 if kind != "preference" else 2e-5)


def test_nats_of_tokens_are_differentiated_as_plain_logits_are():
    rng = np.random.default_rng(1)
    hidden, table = rng.standard_normal((2, 7, 8)), rng.standard_normal((11, 8))
    targets, weights = rng.integers(0, 11, (2, 7)), rng.standard_normal((2, 7))

    def plain(hidden, table):
        logits = 3.0 * jnp.tanh(hidden @ table.T / 3.0)
        nats = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
        return (weights * nats**2).sum()

    def chunked(hidden, table):
        nats = token_nll(hidden, table, jnp.asarray(targets), transposed=True, chunk=4, softcap=3.0)
        return (weights * nats**2).sum()

    arrays = tuple(jnp.asarray(x, jnp.float32) for x in (hidden, table))
    for ours, wanted in zip(*(jax.jit(jax.grad(f, (0, 1)))(*arrays) for f in (chunked, plain)), strict=True):
        np.testing.assert_allclose(ours, wanted, rtol=2e-5, atol=2e-5)


@pytest.mark.parity
@pytest.mark.parametrize("knobs", [{"task__preference_smoothing": 0.1}, {"task__preference_loss": "ipo"}])
def test_the_gradient_of_a_preference_is_torchs(folder, knobs):
    torch = pytest.importorskip("torch")
    config = alone("preference", folder, **knobs)
    data = load_tasks(config, lambda line: None)
    batch = {name: array[:, :-1] for name, array in next(eval_batches(config, data.eval, 4)).items()}
    rng = np.random.default_rng(2)
    batch["task/reference"] = rng.uniform(1, 6, batch["read"].shape).astype(np.float32) * batch["read"]
    params = random_params(config)
    hidden = rng.standard_normal((*batch["read"].shape, config.model.model_dim)).astype(np.float32)
    loss = jax.jit(jax.grad(lambda x: task_losses(config, params, x, batch, head_options(config))[0]))
    ours = loss(jnp.asarray(hidden))

    x = torch.tensor(hidden, dtype=torch.float64, requires_grad=True)
    table = torch.tensor(np.asarray(output_table(params, config.model)))
    log_p = torch.log_softmax(x @ table.double().T, -1)
    total = torch.zeros((), dtype=torch.float64)
    for number in np.unique(batch["example"][batch["example"] > 0]):
        h = torch.zeros((), dtype=torch.float64)
        for row, place in np.argwhere((batch["example"] == number) & (batch["read"] > 0)):
            gain = log_p[row, place - 1, batch["tokens"][row, place]] + float(batch["task/reference"][row, place])
            h = h + int(batch["task/side"][row, place]) * gain
        if config.task.preference_loss == "ipo":
            total = total + (h - 1.0) ** 2
        else:
            sigmoid = torch.nn.functional.logsigmoid
            total = total - 0.9 * sigmoid(0.5 * h) - 0.1 * sigmoid(-0.5 * h)
    total.backward()
    np.testing.assert_allclose(ours, x.grad.numpy(), rtol=1e-3, atol=1e-5 * float(x.grad.abs().max()))
