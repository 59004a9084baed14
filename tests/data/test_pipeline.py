"""The batch of a step depends on (seed, step) alone; an epoch and an evaluation see everything once."""

import ast
import dataclasses
import itertools
import pathlib
import random
import subprocess
import sys

import numpy as np
import pytest

from gptjax.config import UserError, from_dict
from gptjax.data import pipeline
from gptjax.data.order import epoch_order

NUM_DOCUMENTS = 40


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """Documents of 1 to 200 characters; each character of a document tells the document and roughly the place."""
    folder = tmp_path_factory.mktemp("documents")
    rng = random.Random(0)
    for i in range(NUM_DOCUMENTS):
        text = "".join(chr(ord("0") + (i * 7 + place) % 75) for place in range(rng.randint(1, 200)))
        (folder / f"doc{i:02}.txt").write_text(text)
    return folder


def make(folder, seed=0, **data):
    values = {
        "source": "text",
        "path": str(folder / "*.txt"),
        "eval_fraction": 0.3,
        "seq_len": 16,
        "batch_size": 8,
        "prefetch": 0,
    }
    config = from_dict({"data": values | data, "train": {"seed": seed, "duration_steps": 1}})
    return config, pipeline.load_dataset(config, log=lambda line: None)


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def assert_same(a, b):
    assert a.keys() == b.keys() == {"tokens", "segment_ids", "positions"}
    for name in a:
        assert a[name].dtype == np.int32
        np.testing.assert_array_equal(a[name], b[name])


PACKINGS = pytest.mark.parametrize("packing", ["packed", "windows"])


@PACKINGS
@pytest.mark.parametrize("processes", [2, 4])
def test_any_number_of_processes_gives_the_same_global_batch(folder, packing, processes):
    config, dataset = make(folder, packing=packing)
    whole = take(pipeline.train_batches(config, dataset.train), 40)
    each = np.arange(config.data.batch_size).reshape(processes, -1)
    shares = [take(pipeline.train_batches(config, dataset.train, 0, rows), 40) for rows in each]
    for step, batch in enumerate(whole):
        parts = [share[step] for share in shares]
        assert_same(batch, {name: np.concatenate([part[name] for part in parts]) for name in batch})


@PACKINGS
def test_starting_at_every_step_gives_the_same_later_batches(folder, packing):
    config, dataset = make(folder, packing=packing, batch_size=32)
    steps = 20
    assert pipeline.steps_per_epoch(config, dataset.train) * 3 < steps
    whole = take(pipeline.train_batches(config, dataset.train), steps)
    for start in range(steps):
        for step, batch in enumerate(take(pipeline.train_batches(config, dataset.train, start), steps - start), start):
            assert_same(batch, whole[step])


@PACKINGS
def test_reading_ahead_changes_nothing(folder, packing):
    config, dataset = make(folder, packing=packing)
    ahead, _ = make(folder, packing=packing, prefetch=5)
    expected = take(pipeline.train_batches(config, dataset.train, 3), 50)
    for a, b in zip(expected, take(pipeline.train_batches(ahead, dataset.train, 3), 50), strict=True):
        assert_same(a, b)


@PACKINGS
def test_a_far_step_is_reached_at_once(folder, packing):
    import time

    config, dataset = make(folder, packing=packing)
    near = next(pipeline.train_batches(config, dataset.train))  # imports Grain
    began = time.process_time()
    far = next(pipeline.train_batches(config, dataset.train, 10**9))
    assert time.process_time() - began < 0.5
    assert (far["tokens"] != near["tokens"]).any()


@PACKINGS
def test_seed_changes_the_order(folder, packing):
    batches = []
    for seed in (0, 1):
        config, dataset = make(folder, packing=packing, seed=seed)
        batches.append(next(pipeline.train_batches(config, dataset.train))["tokens"])
    assert (batches[0] != batches[1]).any()


def epochs_of(config, split, count) -> list[list[bytes]]:
    """The rows of the first epochs, as bytes."""
    size = len(split.rows)
    rows = np.concatenate(
        [batch["tokens"] for batch in take(pipeline.train_batches(config, split), -(-size * count // config.data.batch_size))]
    )
    return [[row.tobytes() for row in rows[e * size : (e + 1) * size]] for e in range(count)]


def test_each_epoch_visits_every_row_once_in_an_order_of_its_own(folder):
    config, dataset = make(folder)
    assert len(dataset.train.rows) % config.data.batch_size  # so that batches run over the ends of epochs
    everything = [
        row.tobytes() for row in dataset.train.rows.batch(dataset.train.tokens, np.arange(len(dataset.train.rows)))["tokens"]
    ]
    epochs = epochs_of(config, dataset.train, 3)
    for epoch in epochs:
        assert sorted(epoch) == sorted(everything)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    config, dataset = make(folder, shuffle=False)
    assert epochs_of(config, dataset.train, 2) == [everything, everything]


def test_orders_look_random():
    """The mean displacement of a random order of n is n / 3; two orders share one place on average."""
    n = 10_000
    orders = [epoch_order(seed, epoch, n) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert abs(np.abs(order - np.arange(n)).mean() / n - 1 / 3) < 0.01
    for a, b in itertools.combinations(orders, 2):
        assert (a == b).sum() < 10


def tokens_by_hand(split, folder, delimiters) -> list[int]:
    out = []
    for name in split.names:
        before, after = delimiters
        out += [*before, *(folder / name).read_bytes(), *after]
    return out


def test_packed_documents_stand_between_begin_and_end(folder):
    _, dataset = make(folder)
    assert dataset.train.tokens.tolist() == tokens_by_hand(dataset.train, folder, ([256], [256]))
    _, dataset = make(folder, add_bos=False)
    assert dataset.train.tokens.tolist() == tokens_by_hand(dataset.train, folder, ([], [256]))
    _, dataset = make(folder, add_eos=False)
    assert dataset.train.tokens.tolist() == tokens_by_hand(dataset.train, folder, ([256], []))


def test_windows_share_the_delimiter(folder):
    _, dataset = make(folder, packing="windows")
    assert dataset.train.tokens.tolist() == [*tokens_by_hand(dataset.train, folder, ([256], [])), 256]
    assert dataset.train.offsets[-1] == dataset.train.num_tokens
    _, dataset = make(folder, packing="windows", add_bos=False, add_eos=False)
    assert dataset.train.tokens.tolist() == tokens_by_hand(dataset.train, folder, ([], []))


def test_windows_are_pieces_of_the_text(folder):
    config, dataset = make(folder, packing="windows")
    tokens, seq_len = dataset.train.tokens.tolist(), config.data.seq_len
    every = {tuple(tokens[start : start + seq_len + 1]) for start in range(len(tokens) - seq_len)}
    seen = set()
    for batch in take(pipeline.train_batches(config, dataset.train), 3000):
        seen |= set(map(tuple, batch["tokens"].tolist()))
        assert (batch["segment_ids"] == 1).all() and (batch["positions"] == np.arange(seq_len + 1)).all()
    assert seen == every  # none runs over the end, and after 130 epochs none of about 2,800 is missing


def test_an_epoch_of_windows_is_a_random_order_of_consecutive_pieces(folder):
    """Against numpy's Philox by hand: a phase and an order for each (seed, epoch); no token is a target twice in an epoch."""
    config, dataset = make(folder, packing="windows", seed=5, batch_size=1)
    tokens, seq_len = dataset.train.tokens.tolist(), config.data.seq_len
    count = int(pipeline.steps_per_epoch(config, dataset.train))
    assert count == (len(tokens) - seq_len) // seq_len
    phases = set()
    for epoch in (0, 1, 7):
        draw = [
            np.random.Philox(key=np.array([5, use], np.uint64), counter=np.array([0, 0, epoch, 0], np.uint64)) for use in (1, 2)
        ]
        order = np.argsort(draw[0].random_raw(count), kind="stable")
        phase = int(draw[1].random_raw() % (len(tokens) - count * seq_len))
        phases.add(phase)
        batches = take(pipeline.train_batches(config, dataset.train, epoch * count), count)
        for row, batch in zip(order.tolist(), batches, strict=True):
            start = phase + row * seq_len
            assert batch["tokens"][0].tolist() == tokens[start : start + seq_len + 1]
    assert len(phases) > 1


def weighted_targets(batches) -> np.ndarray:
    """The predicted tokens of all batches, sorted."""
    found = []
    for batch in batches:
        segments = batch["segment_ids"]
        predicted = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
        found.append(batch["tokens"][:, 1:][predicted])
    return np.concatenate(found)


@PACKINGS
@pytest.mark.parametrize("batch_size", [1, 3, 8, 1000])
def test_evaluation_covers_the_split_once_for_any_batch_size(folder, packing, batch_size):
    config, dataset = make(folder, packing=packing)
    split = dataset.eval
    batches = list(pipeline.eval_batches(config, split, batch_size))
    assert len(batches) == pipeline.num_eval_batches(config, split, batch_size)
    assert {batch["tokens"].shape for batch in batches} == {(batch_size, 17)}
    targets = weighted_targets(batches)
    if packing == "windows":
        np.testing.assert_array_equal(targets, split.tokens[1:])
    else:
        expected = np.delete(np.asarray(split.tokens), split.offsets[:-1])
        np.testing.assert_array_equal(np.sort(targets), np.sort(expected))


@PACKINGS
def test_evaluation_by_several_processes(folder, packing):
    config, dataset = make(folder, packing=packing)
    whole = list(pipeline.eval_batches(config, dataset.eval, 12))
    shares = [list(pipeline.eval_batches(config, dataset.eval, 12, rows)) for rows in np.arange(12).reshape(4, 3)]
    assert {len(share) for share in shares} == {len(whole)}
    for batch, *parts in zip(whole, *shares, strict=True):
        assert_same(batch, {name: np.concatenate([part[name] for part in parts]) for name in batch})


def test_a_share_need_not_be_of_neighbours(folder):
    config, dataset = make(folder)
    whole, rows = next(pipeline.train_batches(config, dataset.train, 5)), np.array([0, 3, 4, 7])
    assert_same(
        {name: array[rows] for name, array in whole.items()}, next(pipeline.train_batches(config, dataset.train, 5, rows))
    )


@pytest.mark.parametrize("share", [[], [3, 2], [7, 8], [-1]])
def test_a_share_is_some_of_the_rows_in_order(folder, share):
    config, dataset = make(folder)
    with pytest.raises(ValueError, match="a batch of 8 rows"):
        pipeline.train_batches(config, dataset.train, 0, np.array(share, np.int64))


@PACKINGS
def test_documents_of_a_batch_are_named(folder, packing):
    config, dataset = make(folder, packing=packing)
    document_of = np.repeat(np.arange(len(dataset.train.names)), np.diff(dataset.train.offsets))
    # With each token its own place in the text, a batch tells where every one of its tokens is from.
    split = dataclasses.replace(dataset.train, tokens=np.arange(dataset.train.num_tokens, dtype=np.uint32))
    for step in range(50):
        batch = next(pipeline.train_batches(config, split, step))
        assert {array.dtype for array in batch.values()} == {np.dtype(np.int32)}
        places = batch["tokens"][batch["segment_ids"] > 0]
        assert pipeline.batch_documents(config, split, step) == [split.names[d] for d in np.unique(document_of[places])]


def test_steps_per_epoch(folder):
    config, dataset = make(folder)
    assert pipeline.steps_per_epoch(config, dataset.train) == len(dataset.train.rows) / 8
    config, dataset = make(folder, packing="windows")
    assert pipeline.steps_per_epoch(config, dataset.train) == (dataset.train.num_tokens - 16) // 16 / 8


def test_windows_need_a_whole_window(folder):
    with pytest.raises(UserError, match="data.packing=windows needs at least 1001"):
        make(folder, packing="windows", seq_len=1000, path=str(folder / "doc0*.txt"), eval_fraction=0.6)


def test_report(folder):
    config, dataset = make(folder)
    report = dataset.report
    assert report["documents"] == {"train": len(dataset.train.names), "eval": len(dataset.eval.names)}
    assert sum(report["documents"].values()) == NUM_DOCUMENTS
    sizes = {
        name: sum((folder / n).stat().st_size for n in split.names)
        for name, split in (("train", dataset.train), ("eval", dataset.eval))
    }
    assert report["bytes"] == sizes
    assert report["tokens"]["train"] == sizes["train"] + 2 * len(dataset.train.names)
    assert 0.9 < report["fill_rate"]["train"] <= 1 and set(report["cleaning"].values()) == {0}


def test_characters_of_tinyshakespeare(shared_data):
    """nanoGPT's numbers: 65 characters, 1,003,854 training and 111,540 validation tokens."""
    data = {"source": "text", "path": str(shared_data / "tinyshakespeare" / "input.txt"), "split_by": "tail", "tokenizer": "char"}
    config = from_dict({"data": data | {"packing": "windows", "seq_len": 64}, "train": {"duration_steps": 1}})
    dataset = pipeline.load_dataset(config, log=lambda line: None)
    assert dataset.tokenizer.vocab_size == 65
    assert (dataset.train.num_tokens, dataset.eval.num_tokens) == (1_003_854, 111_540)
    assert dataset.train.tokens.dtype == np.uint8


def test_no_jax():
    """Neither the sources nor loading a data set may import jax (Grain does, when batches are iterated)."""
    package = pathlib.Path(pipeline.__file__).parent
    for path in package.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not any(name.split(".")[0] in ("jax", "flax", "tensorflow") for name in names), path
    code = "import sys; from gptjax.data import pipeline; sys.exit(any(m in sys.modules for m in ('jax', 'grain', 'tensorflow')))"
    assert subprocess.run([sys.executable, "-c", code], cwd=package.parents[1], check=False).returncode == 0
