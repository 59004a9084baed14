"""Which numbers of a file's tensors are which of our parameters: one row of a table each, read in both directions.

A row names the axes of both sides by letters (model/decoder.py), and what lies in another order is only that:

    Row("layers/attention/query/kernel", "DNH", "h.{}.attn.c_attn.weight", "D 3NH", part=0)

says that our query kernel [D, N, H] is the first third of the outputs of a matrix [D, 3*N*H], layer by layer. `p` and `h` are a
head's two halves (p = 2, h = H / 2), by which formats that keep rotary pairs side by side differ; `3` is the axis along which
query, key and value are fused.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gptjax.config import ModelConfig, UserError
from gptjax.interop.safetensors import Write
from gptjax.interop.tensors import CHUNK_BYTES, ENCODINGS, Tensors
from gptjax.model.decoder import Decoder


@dataclasses.dataclass(frozen=True)
class Row:
    """One of our parameters, and the tensor (or the part of it) that it is in a file."""

    path: str
    ours: str
    name: str  # `{}` stands for the layer
    theirs: str  # a blank between the file's axes
    part: int = 0

    @property
    def stacked(self) -> bool:
        return "{}" in self.name

    @property
    def letters(self) -> str:
        return self.theirs.replace(" ", "")


def sizes(config: ModelConfig) -> dict[str, int]:
    """What each letter stands for."""
    c = config
    found = {"D": c.model_dim, "N": c.num_heads, "K": c.num_kv_heads, "H": c.head_dim, "F": c.mlp_dim, "V": c.vocab_size}
    return found | {"S": c.max_seq_len, "p": 2, "h": c.head_dim // 2, "3": 3}


def shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """{"layers/mlp/up/kernel": shape, ...} of our parameters."""
    init = functools.partial(Decoder(config).init, jax.random.key(0))
    abstract = nn.unbox(jax.eval_shape(lambda: init(jnp.zeros((1, 1), jnp.int32))["params"]))
    return {"/".join(str(key.key) for key in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)}


def file_shape(row: Row, config: ModelConfig) -> tuple[int, ...]:
    """Of the whole tensor, the other parts of a fused one too."""
    size = sizes(config)
    return tuple(math.prod(size[letter] for letter in axis) for axis in row.theirs.split())


def _in_file_order(row: Row, config: ModelConfig, parameter: np.ndarray) -> np.ndarray:
    """A view of one layer of our parameter with an axis for each letter of the row's part, in the file's order."""
    size = sizes(config)
    split = parameter.reshape([size[letter] for letter in row.ours])
    return split.transpose([row.ours.index(letter) for letter in row.letters if letter != "3"])


def _layers(row: Row, config: ModelConfig) -> Sequence[int | None]:
    return range(config.num_layers) if row.stacked else (None,)


def _name(row: Row, layer: int | None) -> str:
    return row.name if layer is None else row.name.format(layer)


# --- in -------------------------------------------------------------------------------------------------------------------------


def check(rows: Sequence[Row], config: ModelConfig, tensors: Tensors, ignored: Callable[[str], bool]) -> None:
    """Raises `UserError` for a tensor that is missing, of another shape or type, or left over; nothing is read yet."""
    assert {row.path for row in rows} == set(shapes(config)), "the table and the decoder disagree"
    used = set()
    for row in rows:
        for layer in _layers(row, config):
            name, shape = _name(row, layer), file_shape(row, config)
            if name not in tensors:
                raise UserError(f"{tensors.source} has no tensor {name}.")
            if tensors[name].shape != shape:
                raise UserError(
                    f"{tensors.source}: the tensor {name} has shape {tensors[name].shape}, but its config asks for {shape}."
                )
            tensors.check_kind(name)
            used.add(name)
    for name in sorted(set(tensors) - used):
        if not ignored(name):
            raise UserError(f"{tensors[name].path}: the tensor {name} has no place in this architecture.")


def kinds(rows: Sequence[Row], config: ModelConfig, tensors: Tensors) -> dict[str, str]:
    """The encoding of every tensor that holds parameters."""
    return {name: tensors[name].kind for row in rows for layer in _layers(row, config) for name in [_name(row, layer)]}


def fill(rows: Sequence[Row], config: ModelConfig, tensors: Tensors) -> Any:
    """Our parameters in `config.param_dtype`, a tree of numpy arrays, read piece by piece into their place."""
    flat = {path: _aligned(shape, np.dtype(config.param_dtype)) for path, shape in shapes(config).items()}
    for row in rows:
        for layer in _layers(row, config):
            _fill_one(row, config, tensors, _name(row, layer), flat[row.path] if layer is None else flat[row.path][layer])
    return nested(flat)


def _fill_one(row: Row, config: ModelConfig, tensors: Tensors, name: str, parameter: np.ndarray) -> None:
    target = _in_file_order(row, config, parameter)
    letters, size = row.letters, sizes(config)
    first = row.theirs.split()[0]
    step = math.prod(
        size[letter] for letter in first[1:]
    )  # rows of the file's first axis that one index of its first letter takes
    for start, stop in tensors.chunks(name, step):
        chunk = tensors.rows(name, start, stop)
        place, chunk = slice(start // step, stop // step), chunk.reshape(-1, *(size[letter] for letter in letters[1:]))
        if letters[0] == "3":
            if place.start <= row.part < place.stop:
                target[...] = chunk[row.part - place.start]
            continue
        target[place] = chunk.take(row.part, letters.index("3")) if "3" in letters else chunk


def _aligned(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """An uninitialised array at a multiple of 64 bytes, which JAX takes on a CPU as it is, without a copy."""
    size = math.prod(shape) * dtype.itemsize
    buffer = np.empty(size + 64, np.uint8)
    start = -buffer.ctypes.data % 64
    return buffer[start : start + size].view(dtype).reshape(shape)


def nested(flat: Mapping[str, Any]) -> Any:
    """{"a": {"b": x}} of {"a/b": x}."""
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree


# --- out ------------------------------------------------------------------------------------------------------------------------


def writes(rows: Sequence[Row], config: ModelConfig, flat: Mapping[str, Any], kind_of: Callable[[str], str]) -> Iterator[Write]:
    """The tensors of a file in the order of the table; each is made while it is written. `flat` is {path: array}."""
    parts: dict[str, list[tuple[Row, int | None]]] = {}
    for row in rows:
        for layer in _layers(row, config):
            parts.setdefault(_name(row, layer), []).append((row, layer))
    for name, pieces in parts.items():
        kind = kind_of(name)
        make = functools.partial(_pieces, pieces, config, flat, ENCODINGS[kind].dtype)
        yield name, kind, file_shape(pieces[0][0], config), make


def _pieces(
    pieces: Sequence[tuple[Row, int | None]], config: ModelConfig, flat: Mapping[str, Any], dtype: np.dtype
) -> Iterator[np.ndarray]:
    """A file's tensor from front to back: what is one parameter in chunks, what is fused of several at once."""
    views = [
        _in_file_order(row, config, np.asarray(flat[row.path]) if layer is None else np.asarray(flat[row.path])[layer])
        for row, layer in pieces
    ]
    if len(pieces) == 1:
        (view,) = views
        count = max(1, CHUNK_BYTES // (view[:1].size * dtype.itemsize))
        for start in range(0, len(view), count):
            yield np.ascontiguousarray(view[start : start + count], dtype)
        return
    size = sizes(config)
    fused = np.empty([size[letter] for letter in pieces[0][0].letters], dtype)
    for (row, _), view in zip(pieces, views, strict=True):
        fused[tuple(row.part if letter == "3" else slice(None) for letter in row.letters)] = view
    yield fused


def matches(pattern: str) -> Callable[[str], bool]:
    """Whether a whole name matches the regular expression."""
    return lambda name: re.fullmatch(pattern, name) is not None
