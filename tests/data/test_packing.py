"""Rows hold every predicted token exactly once and never more than they can."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gptjax.data.packing import best_fit, cut, pack


def offsets_of(lengths) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)


LENGTHS = st.lists(st.integers(0, 40), min_size=1, max_size=60)


@given(LENGTHS, st.integers(1, 20))
def test_every_token_but_a_documents_first_is_predicted_once(lengths, seq_len):
    offsets = offsets_of(lengths)
    rows = pack(offsets, seq_len)
    tokens = np.arange(offsets[-1])  # each token is its own place, so that a row shows where it is from
    batch = rows.batch(tokens, np.arange(len(rows)))
    assert all(array.shape == (len(rows), seq_len + 1) and array.dtype == np.int32 for array in batch.values())
    segments = batch["segment_ids"]
    predicted = (segments[:, 1:] == segments[:, :-1]) & (segments[:, 1:] > 0)
    targets = np.sort(batch["tokens"][:, 1:][predicted])
    firsts = set(offsets[:-1].tolist())
    np.testing.assert_array_equal(targets, [t for t in tokens if t not in firsts])
    # The token before each target is the one before it in the text, and from the same document.
    np.testing.assert_array_equal(batch["tokens"][:, :-1][predicted] + 1, batch["tokens"][:, 1:][predicted])


@given(LENGTHS, st.integers(1, 20))
def test_segments_and_positions(lengths, seq_len):
    rows = pack(offsets_of(lengths), seq_len)
    batch = rows.batch(np.arange(sum(lengths)), np.arange(len(rows)))
    for segments, positions in zip(batch["segment_ids"], batch["positions"], strict=True):
        real = segments[segments > 0]
        assert (segments[: len(real)] > 0).all()  # padding only at the end
        assert real[0] == 1 and set(np.diff(real)) <= {0, 1}
        for segment in range(1, real.max() + 1):
            places = positions[segments == segment]
            np.testing.assert_array_equal(places, np.arange(len(places)))
            assert len(places) >= 2
        assert (positions[len(real) :] == 0).all()


@given(st.lists(st.integers(1, 16), min_size=1, max_size=80), st.integers(16, 24))
def test_best_fit_equals_brute_force(lengths, capacity):
    """The room left in the rows is that of placing piece after piece, longest first, in the fullest row that fits."""
    row_of = best_fit(np.asarray(lengths), capacity)
    used = np.bincount(row_of, weights=lengths).astype(int)
    assert used.max() <= capacity
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [room for room in rooms if room >= length]
        if fitting:
            rooms.remove(min(fitting))
        rooms.append((min(fitting) if fitting else capacity) - length)
    assert sorted(capacity - used) == sorted(rooms)


def test_long_documents_overlap_by_one_token():
    starts, lengths, documents = cut(offsets_of([9, 1, 5]), 4)
    assert starts.tolist() == [0, 4, 10] and lengths.tolist() == [5, 5, 5] and documents.tolist() == [0, 0, 2]


def test_a_missing_row_is_padding():
    rows = pack(offsets_of([5, 3]), 4)
    batch = rows.batch(np.arange(8), np.array([-1, 1, -1]))
    assert batch["segment_ids"].tolist() == [[0] * 5, [1, 1, 1, 0, 0], [0] * 5]
    assert batch["tokens"].tolist() == [[0] * 5, [5, 6, 7, 0, 0], [0] * 5]
    assert rows.fill_rate == pytest.approx(8 / 10)


def test_a_million_pieces_take_seconds():
    import time

    rng = np.random.default_rng(0)
    offsets = offsets_of(np.maximum(2, rng.lognormal(5, 1.2, 700_000)).astype(np.int64))
    began = time.process_time()
    rows = pack(offsets, 1024)
    assert time.process_time() - began < 10
    assert rows.fill_rate > 0.999 and len(rows.piece_starts) > 700_000
