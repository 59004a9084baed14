"""Documents to rows of at most `seq_len + 1` tokens: a row predicts `seq_len` tokens, each from the ones before it.

A longer document is cut into pieces that overlap by one token, so that every token but a document's first is predicted exactly
once. Pieces go into rows best-fit decreasing: the longest first, each into the fullest row that still has room, which leaves few
gaps (Johnson 1973; for language models Ding et al. 2024, "Fewer Truncations Improve Language Modeling").
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np


@dataclass(frozen=True)
class Rows:
    """P pieces in R rows; the pieces of row r are `row_offsets[r]` to `row_offsets[r + 1]`, in the order of the text."""

    capacity: int
    row_offsets: np.ndarray  # int64 [R + 1]
    piece_starts: np.ndarray  # int64 [P], index of the piece's first token in the split's tokens
    piece_lengths: np.ndarray  # int64 [P], tokens, at least 2 where pieces overlap
    piece_documents: np.ndarray  # int64 [P]

    def __len__(self) -> int:
        return len(self.row_offsets) - 1

    @property
    def fill_rate(self) -> float:
        """Share of the rows' places that hold a token."""
        return float(self.piece_lengths.sum() / max(1, len(self) * self.capacity))

    def cut_into(self, parts: np.ndarray, part_offsets: np.ndarray) -> Rows:
        """The same rows with each piece, a whole document, cut into its parts, which are segments of their own: those of document
        d are of `parts[part_offsets[d] : part_offsets[d + 1]]` tokens.
        """
        own, piece = _ranges(part_offsets[self.piece_documents], part_offsets[self.piece_documents + 1])
        lengths = parts[own]
        ends = np.cumsum(lengths)
        first = np.searchsorted(piece, np.arange(len(self.piece_starts)))
        in_piece = ends - lengths - (ends - lengths)[first][piece]
        counts = np.concatenate([[0], np.cumsum(np.bincount(piece, minlength=len(self.piece_starts)))])
        starts = self.piece_starts[piece] + in_piece
        return Rows(self.capacity, counts[self.row_offsets], starts, lengths, self.piece_documents[piece])

    def documents(self, rows: np.ndarray) -> np.ndarray:
        """Indices of the documents in the rows, sorted, each once."""
        return np.unique(self.piece_documents[_ranges(self.row_offsets[rows], self.row_offsets[rows + 1])[0]])

    def batch(
        self, tokens: np.ndarray, rows: np.ndarray, columns: Mapping[str, np.ndarray] | None = None
    ) -> dict[str, np.ndarray]:
        """int32 [len(rows), capacity] `tokens`, `segment_ids` (1, 2, ... in a row; 0: padding), `positions` (from 0 in a piece),
        and each of `columns`, which have a value [...] for each token and here 0 for padding.

        A row number of -1 gives a row of padding.
        """
        real = np.flatnonzero(rows >= 0)
        begins, ends = self.row_offsets[rows[real]], self.row_offsets[rows[real] + 1]
        pieces, row = _ranges(begins, ends)
        lengths = self.piece_lengths[pieces]
        before = np.cumsum(lengths) - lengths  # tokens of this batch before each piece
        first = np.cumsum(ends - begins) - (ends - begins)  # each row's first piece among `pieces`
        in_row = before - before[first][row]
        target, _ = _ranges(real[row] * self.capacity + in_row, real[row] * self.capacity + in_row + lengths)
        positions = np.arange(len(target)) - np.repeat(before, lengths)
        out = {name: np.zeros((len(rows), self.capacity), np.int32) for name in ("tokens", "segment_ids", "positions")}
        source = np.repeat(self.piece_starts[pieces], lengths) + positions
        out["tokens"].reshape(-1)[target] = tokens[source]
        out["segment_ids"].reshape(-1)[target] = np.repeat(np.arange(len(pieces)) - first[row] + 1, lengths)
        out["positions"].reshape(-1)[target] = positions
        for name, column in (columns or {}).items():
            out[name] = np.zeros((len(rows), self.capacity, *column.shape[1:]), column.dtype)
            out[name].reshape(-1, *column.shape[1:])[target] = column[source]
        return out


def _ranges(begins: np.ndarray, ends: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The numbers of all the ranges one after another, and for each the range that it is from."""
    lengths = ends - begins
    which = np.repeat(np.arange(len(lengths)), lengths)
    return np.arange(len(which)) + (begins - (np.cumsum(lengths) - lengths))[which], which


def pack(
    offsets: np.ndarray,
    seq_len: int,
    *,
    overlap: int = 1,
    capacity: int | None = None,
    sizes: np.ndarray | None = None,
    alone: bool = False,
) -> Rows:
    """Rows of the documents whose tokens lie between successive `offsets` (int64 [documents + 1]). Deterministic.

    `overlap`: tokens that successive pieces of a document share, of `seq_len` more each. `sizes`: the room that a piece of n
    tokens takes in a row of `capacity`, by n; None: n, and rows as long as the longest piece. `alone`: each piece has a row.
    """
    capacity = capacity or seq_len + overlap
    starts, lengths, documents = cut(offsets, seq_len, overlap)
    row_of = np.arange(len(lengths)) if alone else best_fit(lengths if sizes is None else sizes[lengths], capacity)
    # Rows in the order of their first piece, so that without shuffling a run reads the text from front to back.
    count = int(row_of.max()) + 1 if len(row_of) else 0
    first = np.full(count, len(row_of))
    np.minimum.at(first, row_of, np.arange(len(row_of)))
    rank = np.empty(count, np.int64)
    rank[np.argsort(first, kind="stable")] = np.arange(count)
    row_of = rank[row_of]
    order = np.argsort(row_of, kind="stable")
    row_offsets = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=count))]).astype(np.int64)
    return Rows(capacity, row_offsets, starts[order], lengths[order], documents[order])


def cut(offsets: np.ndarray, seq_len: int, overlap: int = 1) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """int64 start, length and document of the pieces, each of at most `seq_len + overlap` tokens.

    A document of n tokens has n - overlap to predict; a document that has none has no piece.
    """
    predicted = np.maximum(np.diff(offsets) - overlap, 0)
    counts = -(-predicted // seq_len)
    documents = np.repeat(np.arange(len(counts)), counts)
    number = np.arange(len(documents)) - (np.cumsum(counts) - counts)[documents]
    starts = offsets[:-1][documents] + number * seq_len
    lengths = np.minimum(seq_len, predicted[documents] - number * seq_len) + overlap
    return starts.astype(np.int64), lengths.astype(np.int64), documents.astype(np.int64)


def best_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """int64 row of each piece, best-fit decreasing.

    All pieces of one length are placed together: rows with the same room left are interchangeable, so the rows are kept by their
    room, and the work grows with the number of different lengths and rooms rather than with the number of pieces.
    """
    order = np.argsort(-lengths, kind="stable")
    row_of = np.empty(len(lengths), np.int64)
    by_room: dict[int, list[np.ndarray]] = {}
    rooms = 0  # bit r is set where some row has exactly r left
    rows_used, begin = 0, 0
    sizes, counts = np.unique(lengths, return_counts=True)
    for length, count in zip(sizes[::-1].tolist(), counts[::-1].tolist(), strict=True):
        pieces, begin = order[begin : begin + count], begin + count
        while len(pieces):
            fitting = rooms >> length
            if fitting:
                room = length + (fitting & -fitting).bit_length() - 1
                rows = np.concatenate(by_room.pop(room))
                rooms ^= 1 << room
            else:
                room = capacity
                rows = np.arange(rows_used, rows_used - (-len(pieces) // (capacity // length)))
                rows_used += len(rows)
            each = room // length  # the fullest row that fits stays the fullest until it is full
            taken = np.repeat(rows, each)[: len(pieces)]
            row_of[pieces[: len(taken)]] = taken
            pieces = pieces[len(taken) :]
            full, rest = divmod(len(taken), each)
            parts = [(room - each * length, rows[:full]), (room - rest * length, rows[full : full + 1]), (room, rows[full + 1 :])]
            for left, some in parts:
                if left and len(some):
                    by_room.setdefault(left, []).append(some)
                    rooms |= 1 << left
    return row_of


def shortened(batch: dict[str, np.ndarray], seq_len: int) -> dict[str, np.ndarray]:
    """Rows [B, n * seq_len + 1] cut into pieces, [B * n, seq_len + 1], that overlap by one token: each token that had one before
    it in its segment still has, and is predicted once. A segment that is cut goes on as another one, from position 0.

    Of an array without a place for each token, a row's value is that of all its pieces.
    """
    length = batch["tokens"].shape[1] - 1
    pieces = length // seq_len
    if pieces == 1:
        return batch
    columns = np.arange(pieces)[:, None] * seq_len + np.arange(seq_len + 1)

    def cut_row(array: np.ndarray) -> np.ndarray:
        if array.ndim < 2 or array.shape[1] != length + 1:
            return np.repeat(array, pieces, axis=0)
        return array[:, columns].reshape(-1, seq_len + 1, *array.shape[2:])

    out = {name: cut_row(array) for name, array in batch.items()}
    segments, positions = out["segment_ids"], out["positions"]
    first = segments[:, :1]
    out["segment_ids"] = np.where(segments > 0, segments - np.maximum(first, 1) + 1, 0)
    out["positions"] = np.where(segments == first, positions - positions[:, :1], positions)
    return out
