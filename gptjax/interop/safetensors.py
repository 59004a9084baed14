"""Safetensors files, read and written without the package of that name.

A file is the length of its header (8 bytes, little-endian), the header (JSON: each tensor's dtype, shape and place), and the
tensors one after the other. Reading by seeking keeps memory free of the file, which a memory map would count in; writing goes
tensor by tensor.
"""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np

from gptjax.config import UserError
from gptjax.interop.tensors import ENCODINGS, Stored, Tensors

INDEX = "model.safetensors.index.json"
_LARGEST_HEADER = 100 * 2**20  # the format's own limit


def read_json(path: pathlib.Path) -> dict[str, Any]:
    """Raises `UserError` where the file is no JSON object."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a JSON object.")
    return values


# --- reading --------------------------------------------------------------------------------------------------------------------


def open_folder(folder: pathlib.Path) -> Tensors:
    """The tensors of a folder's one file or shards. Raises `UserError` where there are none, or a file is not whole."""
    stored: dict[str, Stored] = {}
    for path in _weight_files(folder):
        for name, tensor in read_header(path).items():
            if name in stored:
                raise UserError(f"the tensor {name} is both in {stored[name].path} and in {path}.")
            stored[name] = tensor
    return Tensors(folder, stored)


def read_header(path: pathlib.Path) -> dict[str, Stored]:
    """Where each tensor of one file lies, all of it checked against the file's size."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or not 2 <= length <= min(size - 8, _LARGEST_HEADER):
            raise UserError(
                f"{path} cannot be read as safetensors: it begins with a header's length of {length} bytes, "
                f"but the file has {size}."
            )
        content = file.read(length)
    try:
        header = json.loads(content)
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        found = [_entry(name, entry) for name, entry in entries.items()]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as safetensors: its header is damaged ({type(error).__name__}).") from None
    stored = {}
    for name, kind, shape, start, end in found:
        tensor = Stored(path, 8 + length + start, shape, kind)
        if not 0 <= start <= end or min(shape, default=1) < 0:
            raise UserError(f"{path} cannot be read as safetensors: the place of its tensor {name} makes no sense.")
        if kind in ENCODINGS and tensor.num_bytes != end - start:
            raise UserError(
                f"{path}: the tensor {name} {shape} of type {kind} takes {tensor.num_bytes} bytes, not {end - start}."
            )
        if 8 + length + end > size:
            raise UserError(f"{path} is truncated: its tensor {name} ends at byte {8 + length + end} of {size}.")
        stored[name] = tensor
    return stored


def _entry(name: str, entry: dict[str, Any]) -> tuple[str, str, tuple[int, ...], int, int]:
    start, end = map(int, entry["data_offsets"])
    return name, str(entry["dtype"]), tuple(map(int, entry["shape"])), start, end


def _weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    single, index = folder / "model.safetensors", folder / INDEX
    if single.is_file():
        return [single]
    if index.is_file():
        shards = read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise UserError(f"{index} has no weight_map of tensors to files.")
        files = [folder / name for name in sorted(set(shards.values()))]
        for path in files:
            if path.parent != folder or not path.is_file():
                raise UserError(f"{index} names the file {path.name}, which is not in {folder}.")
        return files
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.bin.index.json") for path in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{folder} holds {pickles[0]}, a pickle, which can run any code when read; convert it to safetensors first: "
            "transformers' save_pretrained(folder, safe_serialization=True) writes it."
        )
    raise UserError(f"{folder} has neither model.safetensors nor {INDEX}.")


# --- writing --------------------------------------------------------------------------------------------------------------------

# name, kind, shape, and what makes the tensor's numbers, in arrays one after the other, when its turn comes
Write = tuple[str, str, tuple[int, ...], Callable[[], Iterable[np.ndarray]]]


def write_folder(folder: pathlib.Path, tensors: Sequence[Write], max_shard_bytes: int) -> list[str]:
    """Writes model.safetensors, or shards of at most so many bytes (a larger tensor has one of its own) and their index.

    Returns the files' names. Raises OSError where the disk refuses.
    """
    shards = list(_shards(tensors, max_shard_bytes))
    if len(shards) == 1:
        write_file(folder / "model.safetensors", tensors)
        return ["model.safetensors"]
    files = [f"model-{number:05d}-of-{len(shards):05d}.safetensors" for number in range(1, len(shards) + 1)]
    for file, shard in zip(files, shards, strict=True):
        write_file(folder / file, shard)
    where = {name: file for file, shard in zip(files, shards, strict=True) for name, *_ in shard}
    index = {"metadata": {"total_size": sum(map(num_bytes, tensors))}, "weight_map": dict(sorted(where.items()))}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    return [*files, INDEX]


def num_bytes(tensor: Write) -> int:
    """Of one tensor in the file."""
    _, kind, shape, _ = tensor
    return math.prod(shape) * ENCODINGS[kind].block_bytes


def _shards(tensors: Sequence[Write], limit: int) -> Iterator[list[Write]]:
    shard: list[Write] = []
    for tensor in tensors:
        if shard and sum(map(num_bytes, shard)) + num_bytes(tensor) > limit:
            yield shard
            shard = []
        shard.append(tensor)
    yield shard


def write_file(path: pathlib.Path, tensors: Sequence[Write]) -> None:
    """One file; arrays are made when they are written and let go after."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # transformers asks for it
    at = 0
    for tensor in tensors:
        name, kind, shape, _ = tensor
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [at, at + num_bytes(tensor)]}
        at += num_bytes(tensor)
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # tensors begin at a multiple of 8 bytes
    with open(path, "xb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, kind, shape, make in tensors:
            left = math.prod(shape)
            for array in make():
                assert array.dtype == ENCODINGS[kind].dtype, name
                left -= array.size
                file.write(array.reshape(-1).view(np.uint8).data)
            assert left == 0, name
