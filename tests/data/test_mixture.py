"""A mixture's rows are a function of (seed, row): in the given shares, each source's in its own order, epoch after epoch."""

import collections
import dataclasses
import fractions
import itertools
import json
import pathlib
import random

import numpy as np
import pytest

from gptjax.config import UserError, from_dict
from gptjax.data import mixture, pipeline
from gptjax.data.mixture import Shares
from gptjax.data.order import epoch_order

NAMES = ("a", "b", "c")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    """Documents of three sources, whose every character tells the source: digits, small and capital letters."""
    folder = tmp_path_factory.mktemp("sources")
    rng = random.Random(0)
    for source, letters, documents in (("a", "0123456789", 40), ("b", "abcdefghij", 15), ("c", "ABCDEFGHIJ", 25)):
        (folder / source).mkdir()
        for i in range(documents):
            (folder / source / f"doc{i:02}.txt").write_text("".join(rng.choices(letters, k=rng.randint(20, 200))))
    return folder


def make(folder, weights=("a=5", "b=2", "c=1"), names=NAMES, seed=0, steps=100, settings=(), **data):
    values = {
        "mixture": tuple(f"{name}=text:{folder}/{name}/*.txt" for name in names),
        "mixture_weights": weights,
        "mixture_settings": settings,
        "eval_fraction": 0.3,
        "seq_len": 16,
        "batch_size": 8,
        "prefetch": 0,
    }
    config = from_dict({"data": values | data, "train": {"seed": seed, "duration_steps": steps}})
    return config, pipeline.load_dataset(config, log=lambda line: None)


def take(iterator, count):
    return list(itertools.islice(iterator, count))


def sources_of(batches) -> list[str]:
    """The source of each row, by its characters."""
    kinds = []
    for row in np.concatenate([batch["tokens"] for batch in batches]):
        letters = bytes(byte for byte in row.tolist() if 0 < byte < 256)
        kinds.append("a" if letters.isdigit() else "b" if letters.islower() else "c")
    return kinds


PACKINGS = pytest.mark.parametrize("packing", ["packed", "windows"])

# --- whose a row is -----------------------------------------------------------------------------------------------------------

LEVEL = [((0.0, 5.0),), ((0.0, 2.0),), ((0.0, 0.0),), ((0.0, 1.0),)]
MOVING = [((0.0, 0.7), (0.5, 0.7), (0.8, 0.2)), ((0.0, 0.3), (0.5, 0.1), (0.5, 0.4)), ((0.25, 0.0), (1.0, 0.5))]


@pytest.mark.parametrize("weights", [LEVEL, MOVING], ids=["level", "moving"])
def test_rows_agree_with_the_sequence_in_fractions(weights):
    """Every row's source by exact fractions, from the shares at it; and how many came before, by counting."""
    shares = Shares.of(weights, 2000, first=123456789 << 32)
    before = collections.Counter()
    sources, places = shares.assign(np.arange(2500))
    for row in range(2500):
        bounds = shares.bounds[max(level for level, start in enumerate(shares.starts) if start <= row)]
        place = fractions.Fraction((123456789 << 32) + row * 5700357409661599243, 2**63) % 1
        source = max(k for k in range(len(weights)) if fractions.Fraction(bounds[k], 2**63) <= place)
        assert (sources[row], places[row]) == (source, before[source])
        if row % 97 == 0:
            assert shares.rows_before(row) == tuple(before[k] for k in range(len(weights)))
        before[source] += 1


def test_the_golden_ratio():
    ratio = fractions.Fraction(mixture._GOLDEN, 2**63)
    assert abs(ratio**2 + ratio - 1) < fractions.Fraction(1, 2**60)


def test_level_counts_are_within_a_few_rows_of_the_shares():
    for seed in range(2):
        shares = Shares.of(LEVEL, 10**6, first=(seed * 7919 + 1) << 40)
        sources, _ = shares.assign(np.arange(10**6))
        for source, share in enumerate((5 / 8, 2 / 8, 0, 1 / 8)):
            off = np.cumsum(sources == source) - share * np.arange(1, 10**6 + 1)
            assert np.abs(off).max() < (6 if share else 1e-9)
        window = np.lib.stride_tricks.sliding_window_view(sources[:100_000] == 0, 64).sum(1)
        assert np.abs(window - 40).max() <= 3  # any batch of 64


def test_moving_counts_follow_the_schedule():
    """Against numpy's own interpolation at every row; a stair is a 256th of its slope."""
    rows = 200_000
    shares = Shares.of(MOVING, rows, first=1 << 50)
    at = (np.arange(rows) + 0.5) / rows
    wanted = np.stack(
        [
            np.interp(at, [0.5, 0.8], [0.7, 0.2]),
            np.where(at < 0.5, np.interp(at, [0, 0.5], [0.3, 0.1]), 0.4),
            np.interp(at, [0.25, 1], [0, 0.5]),
        ]
    )
    wanted /= wanted.sum(0)
    for row in range(0, rows, 1999):
        np.testing.assert_allclose(shares.at(row), wanted[:, row], atol=2e-3)
    sources, _ = shares.assign(np.arange(rows))
    for source in range(3):
        assert np.abs(np.cumsum(sources == source) - np.cumsum(wanted[source])).max() < 25
    assert shares.at(10 * rows) == shares.at(rows)  # past the end all stays


def test_a_far_row_is_reached_at_once():
    import time

    began = time.process_time()
    shares = Shares.of(MOVING, 10**6 * 512, first=99)
    assert sum(shares.rows_before(10**6 * 512)) == 10**6 * 512 and sum(shares.rows_before(10**15)) == 10**15
    assert time.process_time() - began < 1


# --- batches ------------------------------------------------------------------------------------------------------------------

SCHEDULE = ("a=0.9@0", "a=0.1@1", "b=0.1@0", "b=0.5@0.5", "b=0@0.5", "c=0.3")


@PACKINGS
def test_starts_shares_and_batch_sizes_give_the_same_rows(folder, packing):
    config, dataset = make(folder, SCHEDULE, packing=packing)
    whole = take(pipeline.train_batches(config, dataset.train), 110)  # past the schedule's end
    for start in (1, 64, 103):
        for step, batch in enumerate(take(pipeline.train_batches(config, dataset.train, start), 5), start):
            for name in batch:
                np.testing.assert_array_equal(batch[name], whole[step][name])
    for rows in (np.array([0, 3, 4]), np.array([6]), np.arange(8)):
        part = take(pipeline.train_batches(config, dataset.train, 20, rows), 10)
        for step, batch in enumerate(part, 20):
            assert {array.dtype for array in batch.values()} == {np.dtype(np.int32)}
            np.testing.assert_array_equal(batch["tokens"], whole[step]["tokens"][rows])
    larger, again = make(folder, SCHEDULE, packing=packing, batch_size=16, steps=50)
    tokens = np.concatenate([batch["tokens"] for batch in take(pipeline.train_batches(larger, again.train), 55)])
    np.testing.assert_array_equal(tokens, np.concatenate([batch["tokens"] for batch in whole]))


@PACKINGS
def test_each_source_is_visited_as_if_it_were_alone(folder, packing):
    """The rows of a source, in order, are those of a run on it alone under the same name, whatever else is in the mixture; and
    the reported counts are those of the rows.
    """
    config, dataset = make(folder, SCHEDULE, packing=packing)
    batches = take(pipeline.train_batches(config, dataset.train), 90)
    kinds = np.array(sources_of(batches))
    tokens = np.concatenate([batch["tokens"] for batch in batches])
    figures = pipeline.mixture_figures(config, dataset.train, 8 * 90)
    for name in NAMES:
        alone, one = make(folder, (), names=(name,), packing=packing)
        own = tokens[kinds == name]
        assert figures[name]["rows"] == len(own) > 50
        assert figures[name]["epochs"] == len(own) / (pipeline.steps_per_epoch(alone, one.train) * 8) > 0.5
        expected = np.concatenate([batch["tokens"] for batch in take(pipeline.train_batches(alone, one.train), 90)])
        np.testing.assert_array_equal(own, expected[: len(own)])


def test_each_epoch_of_a_source_has_every_row_once(folder):
    config, dataset = make(folder)
    tokens = np.concatenate([batch["tokens"] for batch in take(pipeline.train_batches(config, dataset.train), 150)])
    kinds = np.array(sources_of([{"tokens": tokens}]))
    orders = []
    for name, split in dataset.train.splits.items():
        everything = sorted(row.tobytes() for row in split.rows.batch(split.tokens, np.arange(len(split.rows)))["tokens"])
        own = [row.tobytes() for row in tokens[kinds == name]]
        assert len(own) // len(everything) >= 1
        for epoch in range(len(own) // len(everything)):
            orders.append(own[epoch * len(everything) : (epoch + 1) * len(everything)])
            assert sorted(orders[-1]) == everything
    assert len(orders) >= 5 and len({tuple(order) for order in orders}) == len(orders)


def test_no_weights_mean_the_rows_of_each(folder):
    config, dataset = make(folder, ())
    rows = np.array([len(split.rows) for split in dataset.train.splits.values()])
    np.testing.assert_allclose(dataset.train.shares.at(0), rows / rows.sum(), atol=1e-12)
    assert pipeline.steps_per_epoch(config, dataset.train) == rows.sum() / 8
    config, dataset = make(folder, ("a=1", "b=0", "c=1@0", "c=0@0.5"))
    assert pipeline.steps_per_epoch(config, dataset.train) == (rows[0] + rows[2]) / 8
    assert "b" not in sources_of(take(pipeline.train_batches(config, dataset.train), 100))


def test_orders_of_sources_are_their_own():
    orders = [epoch_order(0, 0, 1000, source) for source in ("", "a", "b")]
    for one, other in itertools.combinations(orders, 2):
        assert (one == other).sum() < 10


def test_seed_changes_whose_rows_come_first(folder):
    kinds = [
        sources_of(take(pipeline.train_batches(*(made := make(folder, seed=seed))[:1], made[1].train), 10)) for seed in (0, 1)
    ]
    assert kinds[0] != kinds[1]


@PACKINGS
def test_documents_of_a_batch_are_named_with_their_source(folder, packing):
    config, dataset = make(folder, packing=packing)
    # With each token its own place in the text, a batch tells where every one of its tokens is from.
    first, splits, names = 0, {}, []
    for name, split in dataset.train.splits.items():
        places = np.arange(first, first + split.num_tokens, dtype=np.uint32)
        names += list(np.repeat([f"{name}:{document}" for document in split.names], np.diff(split.offsets)))
        splits[name], first = dataclasses.replace(split, tokens=places), first + split.num_tokens
    numbered = dataclasses.replace(dataset.train, splits=splits)
    for step in range(20):
        batch = next(pipeline.train_batches(config, numbered, step))
        there = batch["tokens"][batch["segment_ids"] > 0]
        assert pipeline.batch_documents(config, numbered, step) == list(dict.fromkeys(names[place] for place in np.sort(there)))


# --- sources and tokenizers ---------------------------------------------------------------------------------------------------


def test_a_new_source_leaves_the_others_in_the_cache(folder, tmp_path):
    def load(names):
        config, _ = make(folder, (), names=names)
        return pipeline.load_dataset(config, log=lambda line: None, cache_dir=tmp_path)

    two, three = load(NAMES[:2]).report, load(NAMES).report
    found = {name: report["from_cache"] for name, report in three["sources"].items()}
    assert found == {"a": True, "b": True, "c": False} and not two["from_cache"] and not three["from_cache"]
    assert three["documents"]["train"] == sum(report["documents"]["train"] for report in three["sources"].values())
    single = {"source": "text", "path": f"{folder}/c/*.txt", "eval_fraction": 0.3, "seq_len": 16}
    alone = from_dict({"data": single, "train": {"duration_steps": 1}})
    assert pipeline.load_dataset(alone, log=lambda line: None, cache_dir=tmp_path).report["from_cache"]


def test_characters_of_all_sources_whatever_the_weights(folder):
    _, dataset = make(folder, ("a=1", "b=0", "c=0"), tokenizer="char")
    assert dataset.tokenizer.decode(range(dataset.tokenizer.vocab_size)) == "0123456789ABCDEFGHIJabcdefghij"


def test_a_source_has_settings_of_its_own(tmp_path):
    for name, field in (("x", "text"), ("y", "body")):
        lines = [json.dumps({field: f"{name} line {n}", "other": "no"}) for n in range(20)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    (tmp_path / "held.jsonl").write_text(json.dumps({"body": "held out"}))
    values = {
        "mixture": (f"x=jsonl:{tmp_path}/x.jsonl", f"y=jsonl:{tmp_path}/y.jsonl"),
        "mixture_settings": ("y.text_field=body", f"y.eval_path={tmp_path}/held.jsonl", "x.split_by=tail", "x.eval_fraction=0.5"),
    }
    config = from_dict({"data": values, "train": {"duration_steps": 1}})
    dataset = pipeline.load_dataset(config, log=lambda line: None)
    assert dataset.report["sources"]["y"]["documents"] == {"train": 20, "eval": 1}
    assert len(dataset.eval["x"].names) == 10


ERRORS = {
    "no source of that kind": (
        {"mixture": ["a=txt:x"]},
        "the source of a is 'txt', but it must be one of .*; did you mean text?",
    ),
    "no name": ({"mixture": ["text:x"]}, "'text:x' must be NAME=SOURCE or NAME=SOURCE:PATH"),
    "twice": ({"mixture": ["a=stdlib", "a=stdlib"]}, "data.mixture names a twice"),
    "stdlib has no path": ({"mixture": ["a=stdlib:x"]}, "gives a path to stdlib"),
    "no path": ({"mixture": ["a=text"]}, "a=text needs a path"),
    "no data set": ({"mixture": ["a=tfds"]}, "a=tfds needs the data set's name"),
    "no mixture": ({"mixture_weights": ["a=1"]}, "data.mixture_weights=a=1 needs data.mixture"),
    "settings alone": ({"mixture_settings": ["a.path=x"]}, "data.mixture_settings=a.path=x needs data.mixture"),
    "unknown weight": ({"mixture_weights": ["code=1", "prosa=1"]}, "'prosa' is no source; did you mean prose?"),
    "missing weight": ({"mixture_weights": ["code=1"]}, "has no weight for prose"),
    "negative": ({"mixture_weights": ["code=-1", "prose=1"]}, "'code=-1' must not be negative"),
    "not a number": ({"mixture_weights": ["code=nan", "prose=1"]}, "'nan' is not a finite number"),
    "two without a place": ({"mixture_weights": ["code=1", "code=2", "prose=1"]}, "gives code a second weight"),
    "one without a place": ({"mixture_weights": ["code=1@0.5", "code=2", "prose=1"]}, "gives code a second weight"),
    "past the end": ({"mixture_weights": ["code=1@1.5", "prose=1"]}, "its place from 0, the run's start, to 1"),
    "three at a place": ({"mixture_weights": ["code=1@0.5"] * 3 + ["prose=1"]}, "the third weight of code at the same place"),
    "all zero": ({"mixture_weights": ["code=1@0", "code=0@0.5", "prose=0"]}, "at 0.5 of the run all weights are 0"),
    "zero before a step": (
        {"mixture_weights": ["code=1@0.2", "code=0@0.5", "code=1@0.5", "prose=0"]},
        "at 0.5 of the run all weights are 0",
    ),
    "no setting": ({"mixture_settings": ["code.pth=x"]}, "code.pth is no setting of a source; did you mean path?"),
    "not a setting": ({"mixture_settings": ["path=x"]}, "'path=x' must be NAME.SETTING=VALUE"),
    "setting of nobody": ({"mixture_settings": ["cod.path=x"]}, "'cod' is no source; did you mean code?"),
    "setting twice": ({"mixture_settings": ["prose.path=x"]}, "prose.path is given twice"),
    "bad choice": ({"mixture_settings": ["prose.split_by=tale"]}, "prose.split_by is 'tale'.*did you mean tail?"),
    "bad fraction": ({"mixture_settings": ["prose.eval_fraction=1"]}, "must be above 0 and below 1"),
}


@pytest.mark.parametrize("case", ERRORS)
def test_mistakes_are_answered_at_the_door(case):
    data, message = ERRORS[case]
    two = {"mixture": ["code=stdlib", "prose=text:x.txt"]} if case not in ("no mixture", "settings alone") else {}
    with pytest.raises(UserError, match=message.replace("?", r"\?")) as error:
        from_dict({"data": two | data, "train": {"duration_steps": 1}})
    assert str(error.value).count("\n") == 0 and str(error.value).endswith((".", "?"))


def test_a_source_without_text_is_named(folder, tmp_path):
    (tmp_path / "a").mkdir()
    for n in range(30):
        (tmp_path / "a" / f"{n}.txt").write_text("")
    with pytest.raises(UserError, match="^data.mixture, source a: no document of the train split is left after cleaning"):
        make(tmp_path, (), names=("a",))
    with pytest.raises(UserError, match="^data.mixture, source b: data.path: no file matches"):
        make(tmp_path, (), names=("b",))
