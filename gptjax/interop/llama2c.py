"""llama2.c's files: float32 models of Llama's architecture, with and without the header of version 1, and their tokenizer.

    version 0   seven int32: width, MLP width, layers, heads, key heads, vocabulary (negative: a head of its own), context
    version 1   "ak42", the version, the same seven, one byte: the head is tied; zeros up to 256 bytes

then the tensors of one kind after the other, those of all layers together. The tokenizer is a file of (score, length, bytes).
"""

from __future__ import annotations

import math
import pathlib
import re
import struct
from typing import Any

from gptjax.config import UserError
from gptjax.data.tokenizers import Tokenizer
from gptjax.interop import tokens
from gptjax.interop.foreign import Foreign
from gptjax.interop.layout import Row
from gptjax.interop.tensors import Stored, Tensors

MAGIC = 0x616B3432
_FIELDS = ("dim", "hidden_dim", "n_layers", "n_heads", "n_kv_heads", "vocab_size", "max_seq_len")


def open_file(path: pathlib.Path) -> Foreign:
    """The model of a file. Raises `UserError` where its header makes no sense or its size is another."""
    with open(path, "rb") as file:
        start = file.read(256)
    size = path.stat().st_size
    if len(start) < 28:
        raise UserError(f"{path} has {size} bytes, too few for the header of a llama2.c file.")
    magic, version = struct.unpack_from("<Ii", start)
    if magic == MAGIC and (version != 1 or len(start) < 256):
        raise UserError(f"{path} is a llama2.c file of version {version}; read are 0 and 1, whose numbers are float32.")
    versioned = magic == MAGIC
    header = dict(zip(_FIELDS, struct.unpack_from("<7i", start, 8 if versioned else 0), strict=True))
    tied = bool(start[36]) if versioned else header["vocab_size"] > 0
    header["vocab_size"] = abs(header["vocab_size"])
    heads, kv_heads = header["n_heads"], header["n_kv_heads"]
    makes_sense = all(0 < value < 2**28 for value in header.values())
    if not makes_sense or header["dim"] % heads or heads % kv_heads or header["dim"] // heads % 2:
        raise UserError(f"{path} is no llama2.c file: its header {header} makes no sense.")
    stored, end = _places(path, header, tied, 256 if versioned else 28, versioned)
    if end != size:
        raise UserError(f"{path} has {size} bytes, but its header speaks of {end}; it is truncated, or no llama2.c file.")
    return Foreign(
        format="llama2c",
        architecture="llama",
        source=path,
        knobs=_knobs(header, tied),
        tensors=Tensors(path, stored),
        rows=lambda config: _rows(tied),
        ignored=lambda name: name == "rotary",  # cosines and sines, which follow from the positions
        tokenizer=lambda: _beside(path, header["vocab_size"]),
    )


def _knobs(header: dict[str, int], tied: bool) -> dict[str, Any]:
    return {
        "vocab_size": header["vocab_size"],
        "num_layers": header["n_layers"],
        "model_dim": header["dim"],
        "num_heads": header["n_heads"],
        "num_kv_heads": header["n_kv_heads"],
        "mlp_dim": header["hidden_dim"],
        "max_seq_len": header["max_seq_len"],
        "norm": "rmsnorm",
        "norm_bias": False,
        "norm_epsilon": 1e-5,
        "position": "rotary",
        "activation": "silu",
        "gated_mlp": True,
        "attention_bias": False,
        "mlp_bias": False,
        "tied_embeddings": tied,
        "param_dtype": "float32",
    }


def _places(path: pathlib.Path, header: dict[str, int], tied: bool, at: int, versioned: bool) -> tuple[dict[str, Stored], int]:
    """Where each tensor lies, one a layer, and where the last one ends."""
    dim, mlp, vocab, length = (header[name] for name in ("dim", "hidden_dim", "vocab_size", "max_seq_len"))
    width = dim // header["n_heads"]
    kv = header["n_kv_heads"] * width
    layers = {"attention_norm": (dim,), "wq": (dim, dim), "wk": (kv, dim), "wv": (kv, dim), "wo": (dim, dim)}
    layers |= {"ffn_norm": (dim,), "w1": (mlp, dim), "w2": (dim, mlp), "w3": (mlp, dim)}
    single = {"tok_embeddings": (vocab, dim), "norm": (dim,), "rotary": (2, length, width // 2), "output": (vocab, dim)}
    matrices = ["wq", "wk", "wv", "wo"]
    if versioned:
        order = ["attention_norm", "ffn_norm", "norm", "tok_embeddings", *matrices, "w1", "w2", "w3"]
    else:
        order = ["tok_embeddings", "attention_norm", *matrices, "ffn_norm", "w1", "w2", "w3", "norm", "rotary"]
    stored = {}
    for name in order + ([] if tied else ["output"]):
        shape = layers.get(name) or single[name]
        for layer in range(header["n_layers"]) if name in layers else (None,):
            stored[name if layer is None else f"layers.{layer}.{name}"] = Stored(path, at, shape, "F32")
            at += 4 * math.prod(shape)
    return stored, at


def _rows(tied: bool) -> list[Row]:
    attention, mlp = "layers/attention/", "layers/mlp/"
    rows = [
        Row("embed/tokens", "VD", "tok_embeddings", "V D"),
        Row("layers/attention_norm/scale", "D", "layers.{}.attention_norm", "D"),
        # Rotary pairs lie side by side.
        Row(attention + "query/kernel", "DNph", "layers.{}.wq", "Nhp D"),
        Row(attention + "key/kernel", "DKph", "layers.{}.wk", "Khp D"),
        Row(attention + "value/kernel", "DKH", "layers.{}.wv", "KH D"),
        Row(attention + "output/kernel", "NHD", "layers.{}.wo", "D NH"),
        Row("layers/mlp_norm/scale", "D", "layers.{}.ffn_norm", "D"),
        Row(mlp + "gate/kernel", "DF", "layers.{}.w1", "F D"),
        Row(mlp + "down/kernel", "FD", "layers.{}.w2", "D F"),
        Row(mlp + "up/kernel", "DF", "layers.{}.w3", "F D"),
        Row("final_norm/scale", "D", "norm", "D"),
    ]
    return rows if tied else [*rows, Row("head", "DV", "output", "V D")]


# --- tokenizer ------------------------------------------------------------------------------------------------------------------


def _beside(path: pathlib.Path, vocab_size: int) -> tuple[Tokenizer | None, str]:
    """The tokenizer of a file beside the model, tokenizer.bin or tok512.bin."""
    names = (f"tok{vocab_size}.bin", "tokenizer.bin")
    found = next((path.parent / name for name in names if (path.parent / name).is_file()), None)
    return (read_tokenizer(found, vocab_size), "") if found else (None, f"{path.parent} has neither {' nor '.join(names)}")


def read_tokenizer(path: pathlib.Path, vocab_size: int) -> Tokenizer:
    """A SentencePiece model with the pieces and scores of a llama2.c file. Raises `UserError` where it is damaged.

    The file has the pieces as text: a space for SentencePiece's U+2581, and "\\n<s>\\n" for the token that begins a text.
    """
    data, at = path.read_bytes(), 4
    pieces: list[bytes] = []
    scores: list[float] = []
    try:
        for _ in range(vocab_size):
            score, length = struct.unpack_from("<fi", data, at)
            at += 8 + length
            if length < 0 or at > len(data):
                raise struct.error
            pieces.append(data[at - length : at])
            scores.append(score)
    except struct.error:
        raise UserError(f"{path} is truncated: it has {len(pieces)} pieces of {vocab_size}.") from None
    if at != len(data):
        raise UserError(f"{path} holds {len(data) - at} bytes more than {vocab_size} pieces take.")
    special = {"unk": 0, "bos": 1, "eos": 2}
    types = [tokens.BYTE if re.fullmatch(rb"<0x[0-9A-F]{2}>", piece) else tokens.NORMAL for piece in pieces]
    types[:3] = [tokens.UNKNOWN, tokens.CONTROL, tokens.CONTROL]
    texts = [piece.strip(b"\n") if i < 3 else piece.replace(b" ", "\u2581".encode()) for i, piece in enumerate(pieces)]
    try:
        return tokens.sentencepiece_from_lists(texts, scores, types, special)
    except RuntimeError as error:
        raise UserError(
            f"{path} holds no tokenizer that SentencePiece takes: {str(error).splitlines()[0].rstrip('.')}."
        ) from None
