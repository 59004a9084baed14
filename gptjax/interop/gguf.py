"""GGUF files (versions 2 and 3, little-endian), in: metadata, tensors of `ENCODINGS`, and the tokenizer where ours express it.

    "GGUF", version, number of tensors, number of metadata entries
    entry   key, type, value          tensor   name, number of axes, sizes (the fastest first), type, place after the header

The architectures are `llama` (whose query and key rows lie with rotary pairs side by side), `qwen2` and `gpt2`.
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
import struct
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

from gptjax.config import Config, ModelConfig, UserError, from_dict, to_dict
from gptjax.interop import tokens
from gptjax.interop.architectures import Knobs, Source
from gptjax.interop.foreign import Foreign, FoundTokenizer, param_dtype
from gptjax.interop.layout import Row
from gptjax.interop.tensors import ENCODINGS, Stored, Tensors
from gptjax.model.positions import ROPE_SCALING

MAGIC = b"GGUF"
_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# The types that are read, and names of others for the refusal.
_KINDS = {0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 8: "Q8_0", 30: "BF16", 28: "F64"}
_KINDS |= {6: "Q5_0", 7: "Q5_1", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K", 12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K"}


# --- the container --------------------------------------------------------------------------------------------------------------


class _Header:
    """Reads a header front to back; nothing is believed that goes beyond the file."""

    def __init__(self, path: pathlib.Path, file: BinaryIO) -> None:
        self.path, self.file, self.size = path, file, path.stat().st_size

    def take(self, size: int) -> bytes:
        if not 0 <= size <= self.size - self.file.tell():
            raise UserError(f"{self.path} is truncated or damaged: its header goes on beyond its {self.size} bytes.")
        return self.file.read(size)

    def number(self, code: str) -> Any:
        return struct.unpack("<" + code, self.take(struct.calcsize("<" + code)))[0]

    def text(self) -> str:
        return self.take(self.number("Q")).decode("utf-8", errors="surrogateescape")

    def value(self, kind: int) -> Any:
        if kind == _STRING:
            return self.text()
        if kind == _ARRAY:
            inner, count = self.number("I"), self.number("Q")
            if inner in _NUMBERS:
                code = _NUMBERS[inner]
                return list(struct.unpack(f"<{count}{code}", self.take(count * struct.calcsize("<" + code))))
            if count > self.size:
                raise UserError(f"{self.path} is damaged: an array of {count} values cannot be in its {self.size} bytes.")
            return [self.value(inner) for _ in range(count)]
        if kind not in _NUMBERS:
            raise UserError(f"{self.path} is damaged: its metadata has a value of the unknown type {kind}.")
        return self.number(_NUMBERS[kind])


def read_header(path: pathlib.Path) -> tuple[dict[str, Any], dict[str, Stored]]:
    """(metadata, where each tensor lies), checked against the file's size. Raises `UserError`."""
    with open(path, "rb") as file:
        header = _Header(path, file)
        magic = file.read(4)
        if magic != MAGIC:
            raise UserError(f"{path} is no GGUF file: it begins with {magic!r}, not {MAGIC!r}.")
        version = header.number("I")
        if version not in (2, 3):
            raise UserError(f"{path} is a GGUF file of version {version}; read are 2 and 3, little-endian.")
        num_tensors, num_entries = header.number("Q"), header.number("Q")
        metadata = {}
        for _ in range(num_entries):
            key = header.text()
            metadata[key] = header.value(header.number("I"))
        listed = []
        for _ in range(num_tensors):
            name, axes = header.text(), header.number("I")
            sizes = tuple(header.number("Q") for _ in range(axes))
            listed.append((name, sizes[::-1], header.number("I"), header.number("Q")))
        alignment = metadata.get("general.alignment", 32)
        start = -(-file.tell() // alignment) * alignment
    stored = {}
    for name, shape, kind, offset in listed:
        tensor = Stored(path, start + offset, shape, _KINDS.get(kind, f"number {kind}"))
        if tensor.kind in ENCODINGS and tensor.offset + tensor.num_bytes > header.size:
            raise UserError(
                f"{path} is truncated: its tensor {name} ends at byte {tensor.offset + tensor.num_bytes} of {header.size}."
            )
        stored[name] = tensor
    return metadata, stored


# --- architectures --------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class _Architecture:
    knobs: Callable[[Source, str], Knobs]
    rows: Callable[[ModelConfig], list[Row]]


def _get(source: Source, kind: str, key: str, default: Any = None) -> Any:
    value = source.get(f"{kind}.{key}") if default is None else source.get(f"{kind}.{key}", default)
    if isinstance(value, list):
        if len(set(value)) > 1:
            raise source.refuse(f"{kind}.{key}", "differs between layers; the decoder knows one for all.")
        value = value[0] if value else 0
    return value


def _shared_knobs(source: Source, kind: str) -> Knobs:
    return {
        "num_layers": _get(source, kind, "block_count"),
        "model_dim": _get(source, kind, "embedding_length"),
        "num_heads": _get(source, kind, "attention.head_count"),
        "mlp_dim": _get(source, kind, "feed_forward_length"),
        "max_seq_len": _get(source, kind, "context_length"),
    }


def _gpt2_knobs(source: Source, kind: str) -> Knobs:
    epsilon = _float32(_get(source, kind, "attention.layer_norm_epsilon"))
    fixed = {"norm": "layernorm", "position": "learned", "activation": "gelu_tanh", "gated_mlp": False}
    return _shared_knobs(source, kind) | fixed | {"norm_epsilon": epsilon, "attention_bias": True, "mlp_bias": True}


def _llama_knobs(source: Source, kind: str) -> Knobs:
    shared = _shared_knobs(source, kind)
    head_dim = _get(source, kind, "attention.key_length", shared["model_dim"] // shared["num_heads"])
    for key in ("attention.value_length", "rope.dimension_count"):
        if _get(source, kind, key, head_dim) != head_dim:
            raise source.refuse(f"{kind}.{key}", f"is not the width of a head, {head_dim}; the decoder knows no other.")
    if _get(source, kind, "expert_count", 0):
        raise source.refuse(f"{kind}.expert_count", "asks for experts, which are not read from GGUF.")
    return shared | {
        "head_dim": head_dim,
        "num_kv_heads": _get(source, kind, "attention.head_count_kv", shared["num_heads"]),
        "norm": "rmsnorm",
        "norm_bias": False,
        "norm_epsilon": _float32(_get(source, kind, "attention.layer_norm_rms_epsilon")),
        "position": "rotary",
        "rope_base": float(_get(source, kind, "rope.freq_base", 10000.0)),
        "activation": "silu",
        "gated_mlp": True,
        "attention_bias": kind == "qwen2",
        "attention_output_bias": False,
        "mlp_bias": False,
        "attention_window": _get(source, kind, "attention.sliding_window", 0),
        **_scaling(source, kind),
    }


def _scaling(source: Source, kind: str) -> Knobs:
    named = _get(source, kind, "rope.scaling.type", "none")
    if named == "none":
        return {}
    if named not in ("linear", "yarn"):
        raise source.refuse(
            f"{kind}.rope.scaling.type", "is not among those that the decoder reads from GGUF: none, linear, yarn."
        )
    knobs = {"rope_scaling": named, "rope_scaling_factor": _get(source, kind, "rope.scaling.factor")}
    if named == "yarn":
        knobs["rope_original_max_seq_len"] = _get(source, kind, "rope.scaling.original_context_length", 0)
        factor = _get(source, kind, "rope.scaling.attn_factor", 1.0)
        if factor != 1:
            knobs["rope_attention_factor"] = factor * (0.1 * math.log(knobs["rope_scaling_factor"]) + 1)
    return knobs


def _float32(value: float) -> float:
    """1e-05 for the float32 next to it: metadata are float32, and what was meant is the shortest decimal that rounds to it."""
    return float(str(np.float32(value)))


def _gpt2_rows(config: ModelConfig) -> list[Row]:
    rows = [Row("embed/tokens", "VD", "token_embd.weight", "V D"), Row("embed/positions", "SD", "position_embd.weight", "S D")]
    for ours, theirs in {"layers/attention_norm": "blk.{}.attn_norm", "layers/mlp_norm": "blk.{}.ffn_norm"}.items():
        rows += [Row(f"{ours}/scale", "D", f"{theirs}.weight", "D"), Row(f"{ours}/bias", "D", f"{theirs}.bias", "D")]
    rows += [Row("final_norm/scale", "D", "output_norm.weight", "D"), Row("final_norm/bias", "D", "output_norm.bias", "D")]
    attention, mlp = "layers/attention/", "layers/mlp/"
    for part, name in enumerate(("query", "key", "value")):
        rows.append(Row(f"{attention}{name}/kernel", "DNH", "blk.{}.attn_qkv.weight", "3NH D", part))
        rows.append(Row(f"{attention}{name}/bias", "NH", "blk.{}.attn_qkv.bias", "3NH", part))
    rows += [
        Row(attention + "output/kernel", "NHD", "blk.{}.attn_output.weight", "D NH"),
        Row(attention + "output/bias", "D", "blk.{}.attn_output.bias", "D"),
        Row(mlp + "up/kernel", "DF", "blk.{}.ffn_up.weight", "F D"),
        Row(mlp + "up/bias", "F", "blk.{}.ffn_up.bias", "F"),
        Row(mlp + "down/kernel", "FD", "blk.{}.ffn_down.weight", "D F"),
        Row(mlp + "down/bias", "D", "blk.{}.ffn_down.bias", "D"),
    ]
    return rows


def _llama_rows(config: ModelConfig, pairs_beside: bool) -> list[Row]:
    attention, mlp = "layers/attention/", "layers/mlp/"
    q, k = ("Nhp D", "Khp D") if pairs_beside else ("Nph D", "Kph D")
    rows = [
        Row("embed/tokens", "VD", "token_embd.weight", "V D"),
        Row("final_norm/scale", "D", "output_norm.weight", "D"),
        Row("layers/attention_norm/scale", "D", "blk.{}.attn_norm.weight", "D"),
        Row("layers/mlp_norm/scale", "D", "blk.{}.ffn_norm.weight", "D"),
        Row(attention + "query/kernel", "DNph", "blk.{}.attn_q.weight", q),
        Row(attention + "key/kernel", "DKph", "blk.{}.attn_k.weight", k),
        Row(attention + "value/kernel", "DKH", "blk.{}.attn_v.weight", "KH D"),
        Row(attention + "output/kernel", "NHD", "blk.{}.attn_output.weight", "D NH"),
        Row(mlp + "gate/kernel", "DF", "blk.{}.ffn_gate.weight", "F D"),
        Row(mlp + "up/kernel", "DF", "blk.{}.ffn_up.weight", "F D"),
        Row(mlp + "down/kernel", "FD", "blk.{}.ffn_down.weight", "D F"),
    ]
    if config.attention_bias:
        for name, ours, theirs in (("query", "NH", "attn_q"), ("key", "KH", "attn_k"), ("value", "KH", "attn_v")):
            rows.append(Row(f"{attention}{name}/bias", ours, f"blk.{{}}.{theirs}.bias", ours))
    return rows


ARCHITECTURES = {
    "gpt2": _Architecture(_gpt2_knobs, _gpt2_rows),
    "llama": _Architecture(_llama_knobs, lambda config: _llama_rows(config, pairs_beside=True)),
    "qwen2": _Architecture(_llama_knobs, lambda config: _llama_rows(config, pairs_beside=False)),
}


def open_file(path: pathlib.Path) -> Foreign:
    """The model of a file. Raises `UserError`, naming file and key or tensor."""
    metadata, stored = read_header(path)
    source, tensors = Source(path, metadata), Tensors(path, stored)
    kind = source.get("general.architecture")
    if kind not in ARCHITECTURES:
        raise UserError(f"{path}: the architecture {kind!r} is not read from GGUF; read are {', '.join(ARCHITECTURES)}.")
    for name in ("token_embd.weight", "output.weight"):
        if name in tensors:
            tensors.check_kind(name)
    if "token_embd.weight" not in tensors or len(tensors["token_embd.weight"].shape) != 2:
        raise UserError(f"{path} has no tensor token_embd.weight with two axes.")
    tied = "output.weight" not in tensors or tensors.equal("output.weight", "token_embd.weight")
    try:
        knobs = ARCHITECTURES[kind].knobs(source, kind)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path} has a metadata value of the wrong kind: {error}.") from None
    knobs |= {"vocab_size": tensors["token_embd.weight"].shape[0], "tied_embeddings": tied}
    knobs |= {"param_dtype": param_dtype({tensor.kind for tensor in tensors.values()})}
    if "rope_freqs.weight" in tensors:
        knobs |= _llama3_of(path, tensors, knobs)

    def rows(config: ModelConfig) -> list[Row]:
        head = [] if tied else [Row("head", "DV", "output.weight", "V D")]
        return ARCHITECTURES[kind].rows(config) + head

    extra = {"rope_freqs.weight"} | ({"output.weight"} if tied else set())
    return Foreign("gguf", kind, path, knobs, tensors, rows, lambda name: name in extra, lambda: _tokenizer(source))


def _llama3_of(path: pathlib.Path, tensors: Tensors, knobs: Knobs) -> Knobs:
    """The knobs that give the divisors of `rope_freqs.weight`, by which Llama 3.1's and 3.2's files say their scaling."""
    tensors.check_kind("rope_freqs.weight")
    divisors = tensors.rows("rope_freqs.weight", 0, tensors["rope_freqs.weight"].shape[0]).astype(np.float64)
    if (divisors == 1).all():
        return {}
    for factor in (8.0, 32.0):
        scaling = {"rope_scaling": "llama3", "rope_scaling_factor": factor, "rope_original_max_seq_len": 8192}
        values = to_dict(Config()) | {"train": {"duration_steps": 1}, "data": {"seq_len": 1}}
        model = from_dict(values | {"model": values["model"] | knobs | scaling}).model
        expected = ROPE_SCALING["llama3"](model)
        if expected.shape == divisors.shape and np.allclose(1 / divisors, expected, rtol=1e-4):
            return scaling
    raise UserError(
        f"{path}: the frequencies' divisors in rope_freqs.weight are not those of Llama 3.1 or 3.2, the only ones known."
    )


# --- tokenizer ------------------------------------------------------------------------------------------------------------------


def _tokenizer(source: Source) -> FoundTokenizer:
    values = {
        key.removeprefix("tokenizer.ggml."): value for key, value in source.values.items() if key.startswith("tokenizer.ggml.")
    }
    pieces, model, pre = values.get("tokens"), values.get("model"), values.get("pre", "gpt-2")
    if not pieces:
        return None, f"{source.path} holds no tokenizer"
    try:
        if model == "gpt2" and pre in ("gpt-2", "gpt2"):
            return tokens.gpt2_from_lists(pieces, values["merges"]), ""
        if model == "llama" and len(values["scores"]) == len(values["token_type"]) == len(pieces):
            special = {name: values[key] for name, key in _SPECIAL.items() if key in values}
            encoded = [piece.encode("utf-8", errors="surrogateescape") for piece in pieces]
            prefix = bool(values.get("add_space_prefix", True))
            made = tokens.sentencepiece_from_lists(encoded, values["scores"], values["token_type"], special, dummy_prefix=prefix)
            return made, ""
    except (KeyError, ValueError, RuntimeError, TypeError) as error:
        return None, f"the tokenizer in {source.path} is none that can be taken over: {str(error).splitlines()[0].rstrip('.')}"
    return None, f"the tokenizer of {source.path} (tokenizer.ggml.model={model!r}, pre={pre!r}) is none that can be taken over"


_SPECIAL = {"unk": "unknown_token_id", "bos": "bos_token_id", "eos": "eos_token_id"}
