"""Tensors that lie in files: where each is, in which encoding, and reading some rows of it at a time.

A format's reader only finds out where its tensors lie; bytes are read here, and never more at once than `CHUNK_BYTES` (or one
row), so that what is read takes hardly more memory than the place it is read into.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from gptjax.config import UserError

CHUNK_BYTES = 16 * 2**20


@dataclasses.dataclass(frozen=True)
class Encoding:
    """How numbers are written: `block_bytes` for each `block` of them along the last axis."""

    block: int
    block_bytes: int
    decode: Callable[[np.ndarray], np.ndarray]  # uint8 [blocks, block_bytes] to [blocks, block]
    dtype: np.dtype  # of what `decode` gives


def _plain(dtype: Any) -> Encoding:
    kind = np.dtype(dtype)
    return Encoding(1, kind.itemsize, lambda raw: raw.view(kind), kind)


def _half(raw: np.ndarray, start: int) -> np.ndarray:
    """The float16 at `start` of each block, [blocks, 1] in float32."""
    return np.ascontiguousarray(raw[:, start : start + 2]).view("<f2").astype(np.float32)


def _nibbles(raw: np.ndarray) -> np.ndarray:
    """4-bit numbers: the low halves of all bytes, then the high halves."""
    return np.concatenate([raw & 15, raw >> 4], axis=1).astype(np.float32)


# GGUF's block formats: 32 numbers q with a scale d (float16), and for Q4_1 an offset m (float16).
ENCODINGS: dict[str, Encoding] = {
    "F64": _plain("<f8"),
    "F32": _plain("<f4"),
    "F16": _plain("<f2"),
    "BF16": _plain(ml_dtypes.bfloat16),
    "Q8_0": Encoding(32, 34, lambda raw: _half(raw, 0) * raw[:, 2:].view(np.int8), np.dtype(np.float32)),  # d * q
    "Q4_0": Encoding(32, 18, lambda raw: _half(raw, 0) * (_nibbles(raw[:, 2:]) - 8), np.dtype(np.float32)),  # d * (q - 8)
    "Q4_1": Encoding(32, 20, lambda raw: _half(raw, 0) * _nibbles(raw[:, 4:]) + _half(raw, 2), np.dtype(np.float32)),  # d * q + m
}


@dataclasses.dataclass(frozen=True)
class Stored:
    """One tensor of a file."""

    path: pathlib.Path
    offset: int
    shape: tuple[int, ...]
    kind: str  # an encoding's name; another name can be listed, but not read

    @property
    def num_bytes(self) -> int:
        """Raises KeyError for a kind that is not in `ENCODINGS`."""
        encoding = ENCODINGS[self.kind]
        return math.prod(self.shape) // encoding.block * encoding.block_bytes


class Tensors(Mapping[str, Stored]):
    """The tensors of a model by name, from one file or several."""

    def __init__(self, source: pathlib.Path, stored: dict[str, Stored]) -> None:
        self.source, self._stored = source, stored

    def __getitem__(self, name: str) -> Stored:
        return self._stored[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._stored)

    def __len__(self) -> int:
        return len(self._stored)

    def check_kind(self, name: str) -> None:
        """Raises `UserError` where the tensor is in an encoding that cannot be read."""
        stored = self[name]
        if stored.kind not in ENCODINGS:
            raise UserError(f"{stored.path}: the tensor {name} is of type {stored.kind}; read are {', '.join(ENCODINGS)}.")
        block = ENCODINGS[stored.kind].block
        if block > 1 and (not stored.shape or stored.shape[-1] % block):
            raise UserError(
                f"{stored.path}: the rows of {name} {stored.shape} are not whole blocks of {block}, as {stored.kind} is."
            )

    def rows(self, name: str, start: int, stop: int) -> np.ndarray:
        """Rows [start, stop) of the tensor's first axis, decoded: a new array. Raises `UserError` where the file ends early."""
        stored = self[name]
        encoding = ENCODINGS[stored.kind]
        row = math.prod(stored.shape[1:]) // encoding.block * encoding.block_bytes
        raw = np.empty(((stop - start) * row // encoding.block_bytes, encoding.block_bytes), np.uint8)
        try:
            with open(stored.path, "rb") as file:
                file.seek(stored.offset + start * row)
                read = file.readinto(raw.reshape(-1).data) if raw.size else 0
        except OSError as error:
            raise UserError(f"{stored.path} cannot be read: {error.strerror}.") from None
        if read != raw.size:
            raise UserError(f"{stored.path} ends within the tensor {name}.")
        return encoding.decode(raw).reshape(stop - start, *stored.shape[1:])

    def chunks(self, name: str, step: int = 1) -> Iterator[tuple[int, int]]:
        """(start, stop) over the first axis, each a multiple of `step` rows and, beyond that, of at most `CHUNK_BYTES`."""
        stored = self[name]
        total = stored.shape[0]
        size = math.prod(stored.shape[1:]) * ENCODINGS[stored.kind].dtype.itemsize
        count = max(1, CHUNK_BYTES // max(1, size * step)) * step
        yield from ((start, min(start + count, total)) for start in range(0, total, count))

    def equal(self, name: str, other: str) -> bool:
        """Whether two tensors of the same shape hold the same numbers."""
        if self[name].shape != self[other].shape:
            return False
        return all(np.array_equal(self.rows(name, *chunk), self.rows(other, *chunk)) for chunk in self.chunks(name))
