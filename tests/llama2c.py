"""Reads llama2.c's files: a model of Llama's architecture (both header versions) and its tokenizer."""

from __future__ import annotations

import pathlib
import re
import struct
from typing import Any

import numpy as np

from gptjax.config import ModelConfig, from_dict

_MAGIC = 0x616B3432


def read_model(path: pathlib.Path) -> tuple[ModelConfig, Any]:
    """(config, parameters in our layout). Knows float32 files with and without the `ak42` header of version 1."""
    data = path.read_bytes()
    (magic,) = struct.unpack_from("<I", data)
    versioned = magic == _MAGIC
    dim, mlp, layers, heads, kv_heads, vocab, length = struct.unpack_from("<7i", data, 8 if versioned else 0)
    tied = bool(data[36]) if versioned else vocab > 0
    vocab, width = abs(vocab), dim // heads
    floats = np.frombuffer(data, np.float32, offset=256 if versioned else 28)

    shapes = {
        "tokens": (vocab, dim),
        "attention_norm": (layers, dim),
        "wq": (layers, heads * width, dim),
        "wk": (layers, kv_heads * width, dim),
        "wv": (layers, kv_heads * width, dim),
        "wo": (layers, dim, heads * width),
        "mlp_norm": (layers, dim),
        "w1": (layers, mlp, dim),
        "w2": (layers, dim, mlp),
        "w3": (layers, mlp, dim),
        "final_norm": (dim,),
        "rotary": (2, length, width // 2),  # cosines and sines, which follow from the positions
        "head": (vocab, dim),
    }
    if versioned:
        order = ["attention_norm", "mlp_norm", "final_norm", "tokens", "wq", "wk", "wv", "wo", "w1", "w2", "w3"]
    else:
        order = [name for name in shapes if name != "head"]
    read, at = {}, 0
    for name in order + ([] if tied else ["head"]):
        size = int(np.prod(shapes[name]))
        read[name] = floats[at : at + size].reshape(shapes[name])
        at += size
    assert at == len(floats), f"{path} holds {len(floats)} numbers, but its header speaks of {at}"

    def inwards(weight: np.ndarray, count: int, rotary: bool = False) -> np.ndarray:
        """[L, outputs, D] to [L, D, heads, H]; rotary pairs lie side by side there, half a head apart here."""
        if rotary:
            weight = weight.reshape(layers, count, width // 2, 2, dim).swapaxes(2, 3)
        return np.moveaxis(weight.reshape(layers, count, width, dim), -1, 1)

    params = {
        "embed": {"tokens": read["tokens"]},
        "final_norm": {"scale": read["final_norm"]},
        "layers": {
            "attention_norm": {"scale": read["attention_norm"]},
            "mlp_norm": {"scale": read["mlp_norm"]},
            "attention": {
                "query": {"kernel": inwards(read["wq"], heads, rotary=True)},
                "key": {"kernel": inwards(read["wk"], kv_heads, rotary=True)},
                "value": {"kernel": inwards(read["wv"], kv_heads)},
                "output": {"kernel": read["wo"].swapaxes(1, 2).reshape(layers, heads, width, dim)},
            },
            "mlp": {
                "gate": {"kernel": read["w1"].swapaxes(1, 2)},
                "up": {"kernel": read["w3"].swapaxes(1, 2)},
                "down": {"kernel": read["w2"].swapaxes(1, 2)},
            },
        },
    }
    if not tied:
        params["head"] = read["head"].T
    knobs = {
        "vocab_size": vocab,
        "num_layers": layers,
        "model_dim": dim,
        "num_heads": heads,
        "num_kv_heads": kv_heads,
        "mlp_dim": mlp,
        "max_seq_len": length,
        "norm": "rmsnorm",
        "norm_epsilon": 1e-5,
        "position": "rotary",
        "activation": "silu",
        "gated_mlp": True,
        "attention_bias": False,
        "mlp_bias": False,
        "tied_embeddings": tied,
    }
    return from_dict({"model": knobs, "data": {"seq_len": 1}, "train": {"duration_steps": 1}}).model, params


def read_pieces(path: pathlib.Path, vocab_size: int) -> list[bytes]:
    """The tokenizer's pieces: after the longest one's length, (score, length, bytes) each."""
    data, at, pieces = path.read_bytes(), 4, []
    for _ in range(vocab_size):
        _, length = struct.unpack_from("<fi", data, at)
        pieces.append(data[at + 8 : at + 8 + length])
        at += 8 + length
    assert at == len(data)
    return pieces


def decode(pieces: list[bytes], tokens: list[int]) -> str:
    """The text of tokens that follow BOS (1): `<0x0A>` stands for that byte, and a space right after BOS is dropped."""
    text, previous = b"", 1
    for token in tokens:
        piece = pieces[token]
        if previous == 1:
            piece = piece.removeprefix(b" ")
        byte = re.fullmatch(rb"<0x([0-9A-F]{2})>", piece)
        text += bytes([int(byte[1], 16)]) if byte else piece
        previous = token
    return text.decode()
