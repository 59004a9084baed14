"""Objectives: what rows show and what is predicted, against plain rewritings document by document; who sees whom; the loss."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax import config as c
from gptjax.config import UserError
from gptjax.config.objective import parts
from gptjax.data.corruption import CHOSEN, CUT_A, CUT_B, CUT_OUT, INSTEAD, KEPT, ORDER, PART, RANDOM, SHOWN, corruption_of
from gptjax.data.pipeline import eval_batches, load_dataset, train_batches
from gptjax.data.reserved import ReservedTokenizer, num_spans, reserve
from gptjax.data.tokenizers import ByteTokenizer, load_tokenizer
from gptjax.model.decoder import Decoder
from gptjax.train.objectives import OBJECTIVES, batch_arrays
from gptjax.train.step import example_loss, hidden_states, summed_gradients
from tests.small import Letters, as_shown, packed_row, random_batch, random_params, small

NAMES = ("masked", "prefix", "infill", "span", "mixture")
MIXED = ("R/2/0.3=1", "X/3/0.5=2", "S=1", "causal=0.5", "infill=1")
BOS, EOS = 30, 31


def config_of(name: str, seq_len: int = 24, **knobs: Any) -> c.Config:
    sizes = {"model.vocab_size": 80, "model.max_seq_len": 64, "data.seq_len": seq_len, "objective.mixture": MIXED}
    return small(sizes, objective__name=name, **knobs)


@functools.cache
def corruption(name: str, seq_len: int = 24, ends: bool = True, **knobs: Any) -> Any:
    text = Letters(32)
    text.bos_id, text.eos_id = (BOS, EOS) if ends else (None, None)
    config = config_of(name, seq_len, **knobs)
    return corruption_of(config, reserve(text, config.objective, seq_len))


def row_of(corrupted: Any, documents: list[list[int]]) -> dict[str, np.ndarray]:
    return packed_row([np.asarray(document, np.int32) for document in documents], corrupted.capacity)


# --- the same in plain lists ------------------------------------------------------------------------------------------


def t5_noise(length: int, rate: float, mean: float, cut_keys: Any, kept_keys: Any) -> list[tuple[bool, int]]:
    """For each token whether it is cut out and its span, as T5's paper and code draw it: two random compositions, alternating."""
    cut = min(max(round(length * rate), 1), length - 1)
    spans = min(max(round(cut / mean), 1), length - cut)

    def composition(total: int, keys: Any) -> list[int]:
        starts = sorted(sorted(range(1, total), key=lambda place: keys[place])[: spans - 1])
        return [b - a for a, b in itertools.pairwise([0, *starts, total])]

    out = []
    for span, (stays, goes) in enumerate(zip(composition(length - cut, kept_keys), composition(cut, cut_keys), strict=True)):
        out += [(False, span)] * stays + [(True, span)] * goes
    return out


def plain_document(corrupted: Any, document: list[int], drawn: Any) -> tuple[list[int], list[bool]]:
    """(tokens, whether each is seen both ways) of one document, by lists; `drawn` [len, channels]."""
    ids, objective = corrupted.ids, corrupted.objective
    every = parts(objective)
    shares, at = np.cumsum([part.weight for part in every]), drawn[0, PART]
    number = next(i for i, share in enumerate(shares) if at * shares[-1] < share)
    part, front = every[number], [] if ids.paradigms[number] is None else [ids.paradigms[number]]
    n = len(document)
    if part.method == "prefix":
        size = 1 + int(drawn[0, SHOWN] * (n - 1))
        return front + document, [True] * (len(front) + size) + [False] * (n - size)
    if part.method == "span":
        noise = t5_noise(n, part.span_rate, part.span_mean_length, drawn[:, CUT_OUT], drawn[:, KEPT])
        shown, hidden, last = list(front), [], -1
        for token, (gone, span) in zip(document, noise, strict=True):
            if gone and span != last:
                shown.append(ids.sentinels[span])
                hidden.append(ids.sentinels[span])
                last = span
            (hidden if gone else shown).append(token)
        hidden.append(ids.sentinels[last + 1])
        return shown + hidden, [True] * len(shown) + [False] * len(hidden)
    tokens = list(document)
    if part.method == "infill" and drawn[0, SHOWN] < objective.infill_rate:
        before, after, end = [], [], ids.gap[3]
        if tokens and tokens[0] == corrupted.bos_id:
            before = [tokens.pop(0)]
        if tokens and tokens[-1] == corrupted.eos_id:
            after = [tokens.pop()]
        if end is not None:
            after = [end, *after]
        elif not after and corrupted.eos_id is not None:
            after = [corrupted.eos_id]
        a, b = sorted(int(drawn[0, channel] * (len(tokens) + 1)) for channel in (CUT_A, CUT_B))
        first, middle, rest = tokens[:a], tokens[a:b], tokens[b:]
        pre, suf, mid = ids.gap[:3]
        if drawn[0, ORDER] < objective.infill_spm_rate:
            tokens = [pre, suf, *rest, mid, *first, *middle]
        else:
            tokens = [pre, *first, suf, *rest, mid, *middle]
        tokens = before + tokens + after
    return front + tokens, [False] * (len(front) + len(tokens))


def plain_row(corrupted: Any, documents: list[list[int]], uniform: Any) -> dict[str, list[int]]:
    """A row of T inputs with targets, weights, positions, segments and prefix, document after document."""
    out: dict[str, list[Any]] = {name: [] for name in ("inputs", "targets", "weights", "positions", "segment_ids", "prefix")}
    place = 0
    for number, document in enumerate(documents, 1):
        drawn = uniform[place : place + len(document)]
        place += len(document)
        if corrupted.objective.name == "masked":
            o = corrupted.objective
            for position, (token, u) in enumerate(zip(document, drawn, strict=True)):
                hit = token in corrupted.text_ids and u[CHOSEN] < o.mask_rate
                seen = token
                if hit and u[INSTEAD] < o.mask_token_rate:
                    seen = corrupted.ids.mask
                elif hit and u[INSTEAD] >= 1 - o.mask_random_rate:
                    seen = corrupted.text_ids[int(u[RANDOM] * len(corrupted.text_ids))]
                for name, value in zip(out, (seen, token if hit else 0, hit, position, number, True), strict=True):
                    out[name].append(value)
            continue
        tokens, both = plain_document(corrupted, document, drawn)
        for position, token in enumerate(tokens):
            last = position + 1 == len(tokens)
            target = 0 if last else tokens[position + 1]
            weight = not last and not both[position + 1]
            for name, value in zip(out, (token, target, weight, position, number, both[position]), strict=True):
                out[name].append(value)
    length = corrupted.seq_len
    return {name: (values + [0] * length)[:length] for name, values in out.items()}


def drawn_documents(rng: np.random.Generator, corrupted: Any) -> list[list[int]]:
    """Documents that fill a row, some with begin and end of text."""
    documents, left = [], corrupted.capacity
    while True:
        size = int(rng.integers(2, max(3, corrupted.longest + 1)))
        if corrupted.grown[size] > left:
            return documents or drawn_documents(rng, corrupted)
        document = rng.integers(0, BOS, size).tolist()
        if corrupted.bos_id is not None:
            document[0] = BOS if rng.random() < 0.7 else document[0]
            document[-1] = EOS if rng.random() < 0.7 else document[-1]
        documents.append(document)
        left -= int(corrupted.grown[size])


VARIANTS = [*((name, {}) for name in NAMES), ("infill", {"infill_rate": 0.9, "ends": False}), ("span", {"span_rate": 0.5})]


def variant(name: str, knobs: dict[str, Any]) -> Any:
    knobs = dict(knobs)
    ends = knobs.pop("ends", True)
    return corruption(name, ends=ends, **{f"objective__{key}": value for key, value in knobs.items()})


@pytest.mark.parametrize(("name", "knobs"), VARIANTS)
def test_every_objective_equals_a_plain_rewriting(name: str, knobs: dict[str, Any]) -> None:
    corrupted, rng = variant(name, knobs), np.random.default_rng(1)
    for _ in range(60):
        documents = [drawn_documents(rng, corrupted) for _ in range(3)]
        rows = [row_of(corrupted, one) for one in documents]
        batch = {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}
        uniform = rng.random((3, corrupted.capacity, 5))
        shown = corrupted.shown(batch, uniform)
        assert set(shown) == set(batch_arrays(config_of(name)))
        assert all(x.dtype == np.int32 and x.shape == (3, corrupted.seq_len + 1) for x in shown.values())
        example = OBJECTIVES[name](shown)
        for row, one in enumerate(documents):
            expected = plain_row(corrupted, one, uniform[row])
            counted = np.asarray(expected["weights"], bool)
            np.testing.assert_array_equal(np.asarray(example.weights[row]), counted)
            np.testing.assert_array_equal(np.asarray(example.targets[row])[counted], np.asarray(expected["targets"])[counted])
            for key in ("inputs", "positions", "segment_ids"):
                np.testing.assert_array_equal(np.asarray(getattr(example, key)[row]), expected[key], err_msg=key)
            both = np.zeros(corrupted.seq_len) if example.prefix is None else np.asarray(example.prefix[row])
            np.testing.assert_array_equal(both, expected["prefix"])


# --- nothing is lost, and documents never mix -------------------------------------------------------------------------


def original(corrupted: Any, tokens: list[int]) -> list[int]:
    """The document that was shown as these tokens."""
    ids = corrupted.ids
    if tokens and tokens[0] in [i for i in ids.paradigms if i is not None]:
        tokens = tokens[1:]
    if ids.gap and ids.gap[0] in tokens:
        pre, suf, mid, end = ids.gap
        tokens = [token for token in tokens if token != end]
        head, tail = tokens[: tokens.index(pre)], []
        if corrupted.eos_id is not None and tokens[-1] == corrupted.eos_id:
            tokens, tail = tokens[:-1], [corrupted.eos_id]
        at_suf, at_mid = tokens.index(suf), tokens.index(mid)
        first, rest, middle = tokens[len(head) + 1 : at_suf], tokens[at_suf + 1 : at_mid], tokens[at_mid + 1 :]
        return head + first + middle + rest + tail
    if set(tokens) & set(ids.sentinels):
        bar = next(place for place, token in enumerate(tokens) if tokens.index(token) < place and token in ids.sentinels)
        spans: dict[int, list[int]] = {}
        for token in tokens[bar:]:
            if token in ids.sentinels:
                here = spans.setdefault(token, [])
            else:
                here.append(token)
        return [token for seen in tokens[:bar] for token in spans.get(seen, [seen])]
    return tokens


@pytest.mark.parametrize("name", NAMES)
@given(data=st.data())
@settings(max_examples=60, deadline=None)
def test_no_token_is_lost_and_documents_never_mix(name: str, data: Any) -> None:
    corrupted = corruption(name, data.draw(st.sampled_from([12, 24, 50])))
    documents, left = [], corrupted.capacity
    for size in data.draw(st.lists(st.integers(2, corrupted.longest), min_size=1, max_size=8)):
        if corrupted.grown[size] <= left:
            documents.append(data.draw(st.lists(st.integers(0, BOS - 1), min_size=size, max_size=size)))
            left -= int(corrupted.grown[size])
    batch = row_of(corrupted, documents)
    shown = corrupted.train(batch, data.draw(st.integers(0, 9)), np.asarray([data.draw(st.integers(0, 2**40))]))
    example = OBJECTIVES[name](shown)
    tokens, segments = shown["tokens"][0], shown["segment_ids"][0]
    if name == "masked":
        tokens = np.where(shown["targets"][0] >= 0, shown["targets"][0], tokens)
    for number, document in enumerate(documents, 1):
        assert original(corrupted, tokens[segments == number].tolist()) == document
        np.testing.assert_array_equal(shown["positions"][0][segments == number], np.arange((segments == number).sum()))
    assert segments.max() == len(documents)
    weights = np.asarray(example.weights[0])
    assert set(np.unique(weights)) <= {0.0, 1.0}
    counted = np.flatnonzero(weights)
    ahead = 0 if name == "masked" else 1
    assert (segments[counted] > 0).all() and (segments[counted + ahead] == segments[counted]).all()
    if example.prefix is not None:
        assert not np.asarray(example.prefix[0])[np.asarray(example.segment_ids[0]) == 0].any()


def test_a_document_is_shown_as_the_numbers_of_its_row_say() -> None:
    """Whatever rows are beside it: half a batch is half of the batch. Another step, row or seed shows something else."""
    corrupted, rng = corruption("mixture"), np.random.default_rng(0)
    rows = [row_of(corrupted, drawn_documents(rng, corrupted)) for _ in range(8)]
    batch = {key: np.concatenate([row[key] for row in rows]) for key in rows[0]}
    whole = corrupted.train(batch, 3, np.arange(40, 48))
    for share in (np.arange(4), np.array([1, 6])):
        part = corrupted.train({key: x[share] for key, x in batch.items()}, 3, 40 + share)
        for key, x in part.items():
            np.testing.assert_array_equal(x, whole[key][share])
    for other in (corrupted.train(batch, 4, np.arange(40, 48)), corrupted.train(batch, 3, np.arange(48, 56))):
        assert (other["tokens"] != whole["tokens"]).any(axis=1).mean() > 0.5
    evaluated = corrupted.evaluation(batch, np.arange(8))
    np.testing.assert_array_equal(corrupted.evaluation(batch, np.arange(8))["tokens"], evaluated["tokens"])


def test_masks_are_80_10_10_within_3_sigma() -> None:
    rows, length = 400, 512
    corrupted = corruption("masked", length, model__max_seq_len=length)
    tokens = np.random.default_rng(2).integers(0, BOS, (rows, length)).astype(np.int32)
    positions = np.broadcast_to(np.arange(length, dtype=np.int32), tokens.shape)
    batch = {"tokens": tokens, "segment_ids": np.ones_like(tokens), "positions": positions}
    shown = corrupted.train(batch, 0, np.arange(rows))
    seen, targets = shown["tokens"][:, :-1], shown["targets"][:, :-1]
    hit = targets >= 0
    masked, kept = seen[hit] == corrupted.ids.mask, seen[hit] == tokens[hit]
    text = len(corrupted.text_ids)
    counts = {
        "predicted": (hit.sum(), hit.size, 0.15),
        "masked": (masked.sum(), hit.sum(), 0.8),
        # A random token is the same one once in so many times.
        "random": ((~masked & ~kept).sum(), hit.sum(), 0.1 * (1 - 1 / text)),
        "kept": (kept.sum(), hit.sum(), 0.1 + 0.1 / text),
    }
    for what, (count, total, share) in counts.items():
        sigma = (total * share * (1 - share)) ** 0.5
        assert abs(count - total * share) < 3 * sigma, (what, count, total * share, sigma)
    np.testing.assert_array_equal(targets[hit], tokens[hit])
    np.testing.assert_array_equal(seen[~hit], tokens[~hit])
    others = np.bincount(seen[hit][~masked & ~kept], minlength=text)[:BOS]
    assert (abs(others - others.mean()) < 4.5 * others.mean() ** 0.5).all()


def test_rates_of_infill_prefix_and_mixture() -> None:
    """Within 4 sigma over some thousand documents; a prefix is as likely to have any length."""
    rows, size = 3000, 10
    rng = np.random.default_rng(3)

    def shown(name: str, **knobs: Any) -> Any:
        corrupted = corruption(name, **knobs)
        made = [row_of(corrupted, [rng.integers(0, BOS, size).tolist()]) for _ in range(3)]
        batch = {key: np.repeat(np.concatenate([row[key] for row in made]), rows // 3, axis=0) for key in made[0]}
        return corrupted, corrupted.train(batch, 0, np.arange(rows))

    def near(count: int, total: int, share: float) -> bool:
        return abs(count - total * share) <= 4 * (total * share * (1 - share)) ** 0.5

    corrupted, out = shown("infill", objective__infill_rate=0.7, objective__infill_spm_rate=0.2)
    gapped, spm = (out["tokens"][:, 0] == corrupted.ids.gap[0]), out["tokens"][:, 1] == corrupted.ids.gap[1]
    empty_prefix = 0.8 * (2 * (1 / 11) - 1 / 121)  # in PSM either cut is at 0
    assert near(gapped.sum(), rows, 0.7)
    assert near((gapped & spm).sum(), gapped.sum(), 0.2 + empty_prefix)
    _, out = shown("prefix")
    sizes = np.bincount(out["prefix"].sum(1), minlength=size)
    assert sizes[0] == 0 and all(near(count, rows, 1 / 9) for count in sizes[1:size])
    corrupted, out = shown("mixture")
    for number, share in ((0, 1 / 5.5), (1, 2 / 5.5), (2, 1 / 5.5)):
        assert near((out["tokens"][:, 0] == corrupted.ids.paradigms[number]).sum(), rows, share)


def test_spans_of_t5() -> None:
    """Cut-out tokens and spans of T5's own example figures: 512 tokens, 15 % in spans of 3, are 77 tokens in 26 spans."""
    cut, spans = num_spans(np.array([512, 114, 2, 1]), 0.15, 3.0)
    assert cut.tolist() == [77, 17, 1, 0] and spans.tolist() == [26, 6, 1, 0]


# --- who sees whom, and the loss --------------------------------------------------------------------------------------


@functools.cache
def model_of(name: str) -> Any:
    config = config_of(name, model__num_layers=1, data__batch_size=4)
    return config, random_params(config)


@functools.cache
def compiled(name: str) -> Any:
    """(nats a row [B], weights) and the gradient of a place's hidden vector by all tokens' vectors."""
    config, params = model_of(name)

    def forward(batch: Any) -> tuple[Any, Any, Any]:
        example = OBJECTIVES[name](batch)
        hidden_BTD, _ = hidden_states(config, params, example)
        logits = jnp.einsum("BTD,VD->BTV", hidden_BTD, params["embed"]["tokens"])
        nll = -jnp.take_along_axis(jax.nn.log_softmax(logits), example.targets[..., None], -1)[..., 0]
        loss_sum, sums = example_loss(config, params, example, None)
        return nll * example.weights, loss_sum, sums["weight_sum"]

    return jax.jit(forward)


@pytest.mark.parametrize("name", NAMES)
def test_a_token_costs_the_same_packed_and_alone(name: str) -> None:
    config, _ = model_of(name)
    batch = as_shown(config, random_batch(dataclasses.replace(config, objective=c.ObjectiveConfig()), seed=3, rows=4))
    nll, loss_sum, weight = (np.asarray(x) for x in compiled(name)(batch))
    assert weight == (nll > 0).sum() > 4
    np.testing.assert_allclose(nll.sum(), loss_sum, rtol=1e-5)
    segments = batch["segment_ids"]
    found = np.zeros_like(nll)
    for number in range(1, segments.max() + 1):
        alone = {key: np.full_like(x, -1 if key == "targets" else 0) for key, x in batch.items()}
        for row in range(4):
            mine = np.flatnonzero(segments[row] == number)
            for key, x in batch.items():
                alone[key][row, : len(mine)] = x[row, mine]
            alone["segment_ids"][row, : len(mine)] = 1
        by_itself = np.asarray(compiled(name)(alone)[0])
        for row in range(4):
            mine = np.flatnonzero(segments[row][:-1] == number)
            found[row, mine] = by_itself[row, : len(mine)]
    np.testing.assert_allclose(found, nll, rtol=2e-5, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_tokens_see_what_the_objective_lets_them(name: str) -> None:
    """A place's output depends on exactly the places of its document that are not later, or that are of the prefix."""
    config, params = model_of(name)
    batch = as_shown(config, random_batch(dataclasses.replace(config, objective=c.ObjectiveConfig()), seed=5, rows=1))
    example = OBJECTIVES[name](batch)
    length = example.inputs.shape[1]

    def outputs(noise_TD: Any) -> Any:
        table = jnp.concatenate([params["embed"]["tokens"], params["embed"]["tokens"][example.inputs[0]] + noise_TD])
        own = {**params, "embed": {**params["embed"], "tokens": table}}
        places = example._replace(inputs=config.model.vocab_size + jnp.arange(length)[None])
        wide = dataclasses.replace(config, model=dataclasses.replace(config.model, vocab_size=config.model.vocab_size + length))
        return hidden_states(wide, own, places)[0][0]

    jacobian = jax.jit(jax.jacobian(lambda noise: outputs(noise)[:, 3]))(jnp.zeros((length, config.model.model_dim)))
    sees = np.abs(np.asarray(jacobian)).max(-1) > 0
    segments, order = np.asarray(example.segment_ids[0]), np.arange(length)
    prefix = np.zeros(length, bool) if example.prefix is None else np.asarray(example.prefix[0])
    real = segments > 0
    both = real if name == "masked" else prefix
    may = (segments[:, None] == segments) & ((order[:, None] >= order) | both)
    np.testing.assert_array_equal(sees[real], may[real])
    # What is predicted is never seen: the target of a place stands where that place does not look.
    if name != "masked":
        for place in np.flatnonzero(np.asarray(example.weights[0])[:-1]):
            assert not sees[place, place + 1]


@pytest.mark.parametrize("name", ["masked", "mixture"])
def test_accumulation_changes_nothing(name: str) -> None:
    config, params = model_of(name)
    batch = as_shown(config, random_batch(dataclasses.replace(config, objective=c.ObjectiveConfig()), seed=7))
    split = dataclasses.replace(config, train=dataclasses.replace(config.train, accumulation_steps=2))
    whole, sums = jax.jit(lambda p: summed_gradients(config, p, batch, None))(params)
    halves, half_sums = jax.jit(lambda p: summed_gradients(split, p, batch, None))(params)
    assert sums["weight_sum"] == half_sums["weight_sum"] > 0
    np.testing.assert_allclose(sums["loss_sum"], half_sums["loss_sum"], rtol=2e-6)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(whole))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(halves), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6 * largest)


@pytest.mark.parity
def test_masked_loss_is_that_of_transformers() -> None:
    """BertForMaskedLM's own loss function on the same logits: CrossEntropyLoss, -100 where nothing is predicted."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    config, params = model_of("masked")
    batch = as_shown(config, random_batch(dataclasses.replace(config, objective=c.ObjectiveConfig()), seed=9))
    example = OBJECTIVES["masked"](batch)
    logits, _ = Decoder(config.model).apply(
        {"params": params}, example.inputs, example.positions, example.segment_ids, example.prefix
    )
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1, "intermediate_size": 8}
    bert = transformers.BertForMaskedLM(transformers.BertConfig(vocab_size=config.model.vocab_size, **sizes))
    ours = torch.tensor(np.array(logits))
    bert.cls.forward = lambda hidden: ours  # its head replaced by our logits
    labels = np.where(batch["targets"][:, :-1] >= 0, batch["targets"][:, :-1], -100)
    inputs = torch.tensor(np.array(example.inputs)).long()
    theirs = bert(input_ids=inputs, labels=torch.tensor(labels).long()).loss.item()
    loss_sum, sums = example_loss(config, params, example, None)
    assert float(loss_sum / sums["weight_sum"]) == pytest.approx(theirs, rel=1e-6)


# --- the data -----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def texts(tmp_path_factory: Any) -> Any:
    folder = tmp_path_factory.mktemp("texts")
    rng = np.random.default_rng(0)
    for number in range(30):
        words = [str(word) for word in rng.integers(0, 1000, rng.integers(3, 60))]
        (folder / f"{number:02}.txt").write_text(" ".join(words))
    return folder


def dataset_of(texts: Any, name: str, packing: str) -> tuple[c.Config, Any]:
    data = {"source": "text", "path": str(texts / "*.txt"), "eval_fraction": 0.3, "seq_len": 40, "batch_size": 8, "prefetch": 0}
    values = {"data": data | {"packing": packing}, "objective": {"name": name}, "train": {"seed": 5, "duration_steps": 1}}
    config = c.from_dict(values)
    return config, load_dataset(config, log=lambda line: None)


@pytest.mark.parametrize("packing", ["packed", "windows"])
@pytest.mark.parametrize("name", NAMES)
def test_batches_are_a_function_of_the_step_and_evaluation_of_the_row(texts: Any, name: str, packing: str) -> None:
    config, dataset = dataset_of(texts, name, packing)
    split, corrupted = dataset.train, dataset.train.corruption
    batches = list(itertools.islice(train_batches(config, split), 4))
    assert {key: x.shape for key, x in batches[0].items()} == dict.fromkeys(batch_arrays(config), (8, 41))
    resumed = next(train_batches(config, split, 3))
    halves = [next(train_batches(config, split, 3, share)) for share in (np.arange(4), np.arange(4, 8))]
    for key, x in batches[3].items():
        np.testing.assert_array_equal(resumed[key], x)
        np.testing.assert_array_equal(np.concatenate([half[key] for half in halves]), x)
    sizes = (2, 5)
    by_size = [
        {key: np.concatenate([batch[key] for batch in eval_batches(config, dataset.eval, size)]) for key in batches[0]}
        for size in sizes
    ]
    rows = min(len(one["tokens"]) for one in by_size)
    for key in batches[0]:
        np.testing.assert_array_equal(by_size[0][key][:rows], by_size[1][key][:rows])
    # All of the split's text is shown, but for what pieces share and documents that have nothing to predict.
    shown = by_size[0]
    if packing == "packed" and name in ("infill", "span", "masked"):
        tokens = shown["tokens"] if name != "masked" else np.where(shown["targets"] >= 0, shown["targets"], shown["tokens"])
        text = []
        for row, segments in zip(tokens, shown["segment_ids"], strict=True):
            for number in range(1, segments.max() + 1):
                text.append(original(corrupted, row[segments == number].tolist()))
        starts, lengths = dataset.eval.rows.piece_starts, dataset.eval.rows.piece_lengths
        pieces = [dataset.eval.tokens[a : a + n].tolist() for a, n in zip(starts, lengths, strict=True)]
        assert text == pieces
        assert sum(lengths) >= dataset.eval.num_tokens


def test_tokens_of_an_objective_are_kept_with_the_tokenizer(tmp_path: Any) -> None:
    objective = config_of("mixture").objective
    tokenizer = reserve(ByteTokenizer(), objective, 24)
    assert isinstance(tokenizer, ReservedTokenizer)
    assert tokenizer.vocab_size == 257 + 4 + 5 + 3  # gap; 4 spans in 25 tokens, and an end; R, X, S
    ids = [tokenizer.token_id(name) for name in tokenizer.names]
    assert ids == list(range(257, tokenizer.vocab_size))
    tokenizer.save(tmp_path)
    again = load_tokenizer(tmp_path)
    assert again.encoding_fingerprint == tokenizer.encoding_fingerprint != ByteTokenizer().encoding_fingerprint
    assert again.special_tokens() == tokenizer.special_tokens() and again.decode([65, *ids, 66]) == "AB"
    assert again.encode_special("a[X]").tolist() == [97, tokenizer.token_id("[X]")]
    assert again.encode("[X]").tolist() == [91, 88, 93]
    assert reserve(tokenizer, objective, 24) is tokenizer  # it has them
    with pytest.raises(UserError, match=r"objective.name=masked needs the tokens \[MASK\].*was not trained"):
        corruption_of(config_of("masked"), tokenizer)


@pytest.mark.parametrize(
    ("knobs", "message"),
    [
        ({"objective__name": "masked", "model__attention": "xla"}, "objective.name=masked .* model.attention=xla cannot do"),
        ({"objective__name": "mixture", "objective__mixture": ()}, "objective.mixture is empty"),
        ({"objective__name": "mixture", "objective__mixture": ("Q=1",)}, "objective.mixture has 'Q=1'"),
        ({"objective__name": "mixture", "objective__mixture": ("R=1",)}, "R and X take a mean length"),
        ({"objective__name": "mixture", "objective__mixture": ("R/3/1.5=1",)}, "a rate above 0 and below 1"),
        ({"objective__name": "mixture", "objective__mixture": ("S=0",)}, "weight must be above 0"),
        ({"objective__name": "mixture", "objective__mixture": ("S",)}, "none of R, X, S"),
        ({"objective__name": "span", "data__seq_len": 8}, "objective.name=span .* data.seq_len=8 is too short"),
        ({"objective__name": "masked", "objective__mask_token_rate": 0.95}, "mask_token_rate=0.95 and .*mask_random_rate=0.1"),
    ],
)
def test_what_cannot_be_is_refused(knobs: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        small(**knobs)
    if "model__attention" in knobs:
        assert small(objective__name="infill", model__attention="xla").objective.name == "infill"


def test_parts_written_as_text_survive_json() -> None:
    config = config_of("mixture")
    assert c.from_dict(json.loads(c.to_json(config))).objective.mixture == MIXED
