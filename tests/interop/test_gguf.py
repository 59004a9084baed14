"""GGUF files, written here from the published format, against arrays that were never in one."""

from __future__ import annotations

import pathlib
import struct
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from gptjax.config import UserError
from gptjax.data.tokenizers import Gpt2Tokenizer, SentencePieceTokenizer
from gptjax.interop import gguf
from gptjax.interop.formats import open_model
from gptjax.interop.tensors import ENCODINGS, Stored, Tensors

# --- a writer -------------------------------------------------------------------------------------------------------------------

TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 8, "BF16": 30}


def text(value: str) -> bytes:
    return struct.pack("<Q", len(value.encode())) + value.encode()


def value_of(value: Any) -> bytes:
    """A metadata value behind its type."""
    if isinstance(value, bool):
        return struct.pack("<I?", 7, value)
    if isinstance(value, int):
        return struct.pack("<II", 4, value)
    if isinstance(value, float):
        return struct.pack("<If", 6, value)
    if isinstance(value, str):
        return struct.pack("<I", 8) + text(value)
    inner = value_of(value[0])[:4]
    return struct.pack("<I", 9) + inner + struct.pack("<Q", len(value)) + b"".join(value_of(item)[4:] for item in value)


def write(
    path: pathlib.Path, metadata: dict[str, Any], tensors: dict[str, tuple[tuple[int, ...], int, bytes]], version: int = 3
) -> pathlib.Path:
    """`tensors`: {name: (shape, type's number, bytes)}."""
    header = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    header += b"".join(text(key) + value_of(value) for key, value in metadata.items())
    body = b""
    for name, (shape, kind, content) in tensors.items():
        header += text(name) + struct.pack("<I", len(shape)) + struct.pack(f"<{len(shape)}Q", *reversed(shape))
        header += struct.pack("<IQ", kind, len(body))
        body += content + b"\0" * (-len(content) % 32)
    path.write_bytes(header + b"\0" * (-len(header) % 32) + body)
    return path


def encoded(array: np.ndarray, kind: str) -> tuple[tuple[int, ...], int, bytes]:
    dtype = {"F32": np.float32, "F16": np.float16, "BF16": ml_dtypes.bfloat16}[kind]
    return array.shape, TYPES[kind], array.astype(dtype).tobytes()


# --- block formats, number by number --------------------------------------------------------------------------------------------


def brute_force(raw: bytes, kind: str) -> list[float]:
    """From the structs of ggml's block formats: every number by itself."""
    size, found = {"Q8_0": 34, "Q4_0": 18, "Q4_1": 20}[kind], []
    for at in range(0, len(raw), size):
        block = raw[at : at + size]
        (d,) = struct.unpack_from("<e", block)
        for i in range(32):
            if kind == "Q8_0":
                found.append(d * struct.unpack_from("<b", block, 2 + i)[0])
                continue
            (m,) = struct.unpack_from("<e", block, 2) if kind == "Q4_1" else (0.0,)
            byte = block[(4 if kind == "Q4_1" else 2) + i % 16]
            q = byte & 15 if i < 16 else byte >> 4
            found.append(d * q + m if kind == "Q4_1" else d * (q - 8))
    return found


def random_blocks(kind: str, count: int, seed: int = 0) -> bytes:
    """Bytes at random behind scales that are numbers."""
    rng = np.random.default_rng(seed)
    halves = {"Q8_0": 1, "Q4_0": 1, "Q4_1": 2}[kind]
    rest = ENCODINGS[kind].block_bytes - 2 * halves
    return b"".join(rng.normal(0, 0.1, halves).astype("<f2").tobytes() + rng.bytes(rest) for _ in range(count))


@pytest.mark.parametrize("kind", ["Q8_0", "Q4_0", "Q4_1"])
def test_blocks_equal_brute_force(tmp_path: pathlib.Path, kind: str) -> None:
    raw = random_blocks(kind, 3 * 5 * 2)
    path = tmp_path / "blocks"
    path.write_bytes(b"front" + raw)
    tensors = Tensors(path, {"x": Stored(path, 5, (15, 64), kind)})
    expected = np.array(brute_force(raw, kind)).reshape(15, 64)
    np.testing.assert_allclose(tensors.rows("x", 0, 15), expected, rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(tensors.rows("x", 4, 6), expected[4:6], rtol=1e-6, atol=1e-7)


# --- models ---------------------------------------------------------------------------------------------------------------------

LAYERS, D, F, V, S = 2, 64, 96, 19, 32
HEADS, KV, H = 4, 2, 16


def metadata(kind: str, **more: Any) -> dict[str, Any]:
    values = {
        "block_count": LAYERS,
        "embedding_length": D,
        "feed_forward_length": F,
        "context_length": S,
        "attention.head_count": HEADS,
    }
    if kind == "gpt2":
        values["attention.layer_norm_epsilon"] = 1e-5
    else:
        values |= {"attention.head_count_kv": KV, "attention.layer_norm_rms_epsilon": 1e-6, "rope.freq_base": 500.0}
    return {"general.architecture": kind, **{f"{kind}.{key}": value for key, value in values.items()}, **more}


def arrays(kind: str, tied: bool = False) -> dict[str, np.ndarray]:
    """A model's tensors as transformers has them (but for GPT-2's transposed matrices), under GGUF's names."""
    rng = np.random.default_rng(0)
    shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (V, D), "output_norm.weight": (D,)}
    shapes |= {} if tied else {"output.weight": (V, D)}
    if kind == "gpt2":
        shapes |= {"position_embd.weight": (S, D), "output_norm.bias": (D,)}
        block = {
            "attn_qkv": (3 * D, D),
            "attn_output": (D, D),
            "ffn_up": (F, D),
            "ffn_down": (D, F),
            "attn_norm": (D,),
            "ffn_norm": (D,),
        }
        biased = set(block)
    else:
        block = {"attn_q": (HEADS * H, D), "attn_k": (KV * H, D), "attn_v": (KV * H, D), "attn_output": (D, HEADS * H)}
        block |= {"ffn_gate": (F, D), "ffn_up": (F, D), "ffn_down": (D, F), "attn_norm": (D,), "ffn_norm": (D,)}
        biased = {"attn_q", "attn_k", "attn_v"} if kind == "qwen2" else set()
    for layer in range(LAYERS):
        for name, shape in block.items():
            shapes[f"blk.{layer}.{name}.weight"] = shape
            if name in biased:
                shapes[f"blk.{layer}.{name}.bias"] = shape[:1]
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def read(path: pathlib.Path) -> tuple[Any, Any]:
    model = open_model(path)
    config = model.config().model
    return config, model.read(config)


def side_by_side(matrix: np.ndarray, heads: int) -> np.ndarray:
    """Rows of each head as llama.cpp wants them: 0, H/2, 1, H/2 + 1, ..., so that a rotary pair is two neighbours."""
    order = [head * H + i + half * H // 2 for head in range(heads) for i in range(H // 2) for half in range(2)]
    return matrix[order]


@pytest.mark.parametrize("kind", ["llama", "qwen2"])
@pytest.mark.parametrize("encoding", ["F32", "F16", "BF16"])
def test_llama_and_qwen2(tmp_path: pathlib.Path, kind: str, encoding: str) -> None:
    plain = {name: array.astype(ml_dtypes.bfloat16).astype(np.float16).astype(np.float32) for name, array in arrays(kind).items()}
    stored = dict(plain)
    if kind == "llama":
        for layer in range(LAYERS):
            for name, heads in (("attn_q", HEADS), ("attn_k", KV)):
                stored[f"blk.{layer}.{name}.weight"] = side_by_side(plain[f"blk.{layer}.{name}.weight"], heads)
    path = write(tmp_path / "m.gguf", metadata(kind), {name: encoded(array, encoding) for name, array in stored.items()})
    config, params = read(path)
    assert (config.num_kv_heads, config.head_dim, config.rope_base, config.norm_epsilon) == (KV, H, 500.0, 1e-6)
    assert (config.attention_bias, config.attention_output_bias, config.tied_embeddings) == (kind == "qwen2", False, False)
    assert config.param_dtype == ("bfloat16" if encoding == "BF16" else "float32")
    attention = params["layers"]["attention"]
    for layer in range(LAYERS):
        for ours, theirs in (("query", "attn_q"), ("key", "attn_k"), ("value", "attn_v")):
            kernel = attention[ours]["kernel"][layer].reshape(D, -1)
            np.testing.assert_array_equal(kernel.T.astype(np.float32), plain[f"blk.{layer}.{theirs}.weight"])
            if kind == "qwen2":
                bias = attention[ours]["bias"][layer].reshape(-1)
                np.testing.assert_array_equal(bias.astype(np.float32), plain[f"blk.{layer}.{theirs}.bias"])
        gate = params["layers"]["mlp"]["gate"]["kernel"][layer]
        np.testing.assert_array_equal(gate.T.astype(np.float32), plain[f"blk.{layer}.ffn_gate.weight"])
    np.testing.assert_array_equal(params["head"].T.astype(np.float32), plain["output.weight"])


def test_gpt2_with_a_copy_of_the_embedding_as_its_head(tmp_path: pathlib.Path) -> None:
    plain = arrays("gpt2")
    plain["output.weight"] = plain["token_embd.weight"]
    config, params = read(write(tmp_path / "m", metadata("gpt2"), {name: encoded(array, "F32") for name, array in plain.items()}))
    assert (config.position, config.activation, config.norm_epsilon, config.tied_embeddings) == (
        "learned",
        "gelu_tanh",
        1e-5,
        True,
    )
    fused = plain["blk.1.attn_qkv.weight"]
    for part, name in enumerate(("query", "key", "value")):
        kernel = params["layers"]["attention"][name]["kernel"][1].reshape(D, D)
        np.testing.assert_array_equal(kernel.T, fused[part * D : part * D + D])
    np.testing.assert_array_equal(params["layers"]["mlp"]["down"]["kernel"][0].T, plain["blk.0.ffn_down.weight"])


def test_quantised_matrices_and_float32_norms(tmp_path: pathlib.Path) -> None:
    """Blocks lie along the inputs; the numbers are those of the brute force, in the rows' order."""
    tensors = {name: encoded(array, "F32") for name, array in arrays("qwen2", tied=True).items()}
    raw = {
        "blk.0.ffn_up.weight": ("Q4_0", (F, D)),
        "blk.1.ffn_up.weight": ("Q4_1", (F, D)),
        "blk.0.ffn_down.weight": ("Q8_0", (D, F)),
    }
    expected = {}
    for seed, (name, (kind, shape)) in enumerate(raw.items()):
        blocks = random_blocks(kind, shape[0] * shape[1] // 32, seed)
        tensors[name] = (shape, TYPES[kind], blocks)
        expected[name] = np.array(brute_force(blocks, kind)).reshape(shape)
    config, params = read(write(tmp_path / "m.gguf", metadata("qwen2"), tensors))
    assert config.param_dtype == "float32" and config.tied_embeddings
    mlp = params["layers"]["mlp"]
    np.testing.assert_allclose(mlp["up"]["kernel"][0].T, expected["blk.0.ffn_up.weight"], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(mlp["up"]["kernel"][1].T, expected["blk.1.ffn_up.weight"], rtol=1e-6, atol=1e-7)
    np.testing.assert_allclose(mlp["down"]["kernel"][0].T, expected["blk.0.ffn_down.weight"], rtol=1e-6, atol=1e-7)


def divisors(factor: float, low: float, high: float, original: int, base: float) -> np.ndarray:
    """As llama.cpp's converter computes rope_freqs for Llama 3.1: by what a frequency is divided."""
    found = []
    for i in range(0, H, 2):
        wavelength = 2 * np.pi * base ** (i / H)
        smooth = (original / wavelength - low) / (high - low)
        found.append(
            1.0
            if wavelength < original / high
            else factor
            if wavelength > original / low
            else 1 / ((1 - smooth) / factor + smooth)
        )
    return np.array(found, np.float32)


@pytest.mark.parametrize(
    ("more", "expected"),
    [
        (
            {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0},
            {"rope_scaling": "linear", "rope_scaling_factor": 4.0},
        ),
        (
            {
                "llama.rope.scaling.type": "yarn",
                "llama.rope.scaling.factor": 4.0,
                "llama.rope.scaling.original_context_length": 8,
            },
            {"rope_scaling": "yarn", "rope_original_max_seq_len": 8, "rope_attention_factor": 0.0},
        ),
        ({"llama.attention.sliding_window": 5}, {"attention_window": 5}),
        ({"llama.attention.head_count_kv": [2, 2]}, {"num_kv_heads": 2}),
    ],
)
def test_metadata(tmp_path: pathlib.Path, more: dict[str, Any], expected: dict[str, Any]) -> None:
    tensors = {name: encoded(array, "F32") for name, array in arrays("llama").items()}
    config = open_model(write(tmp_path / "m.gguf", metadata("llama", **more), tensors)).config().model
    assert {name: getattr(config, name) for name in expected} == expected


def test_llama3_scaling_is_known_by_its_divisors(tmp_path: pathlib.Path) -> None:
    tensors = {name: encoded(array, "F32") for name, array in arrays("llama").items()}
    values = metadata("llama") | {"llama.rope.freq_base": 500000.0}
    tensors["rope_freqs.weight"] = encoded(divisors(32.0, 1.0, 4.0, 8192, 500000.0), "F32")
    config, _ = read(write(tmp_path / "m.gguf", values, tensors))
    assert (config.rope_scaling, config.rope_scaling_factor, config.rope_original_max_seq_len) == ("llama3", 32.0, 8192)
    tensors["rope_freqs.weight"] = encoded(np.arange(1, 9, dtype=np.float32), "F32")
    with pytest.raises(UserError, match="divisors in rope_freqs.weight are not those of Llama 3.1"):
        open_model(write(tmp_path / "m.gguf", values, tensors))


# --- tokenizers -----------------------------------------------------------------------------------------------------------------


def with_tokenizer(tmp_path: pathlib.Path, **values: Any) -> tuple[Any, str]:
    more = {f"tokenizer.ggml.{key}": value for key, value in values.items()}
    tensors = {name: encoded(array, "F32") for name, array in arrays("gpt2", tied=True).items()}
    return open_model(write(tmp_path / "m.gguf", metadata("gpt2", **more), tensors)).tokenizer()


def test_gpt2_tokenizer(tmp_path: pathlib.Path, shared_data: pathlib.Path) -> None:
    import json

    files = {name: (shared_data / "gpt2_bpe" / name).read_bytes() for name in ("encoder.json", "vocab.bpe")}
    pieces = sorted(json.loads(files["encoder.json"]), key=json.loads(files["encoder.json"]).get)
    merges = files["vocab.bpe"].decode().split("\n")[1:-1]
    found, _ = with_tokenizer(tmp_path, model="gpt2", pre="gpt-2", tokens=pieces, merges=merges)
    expected = Gpt2Tokenizer.from_files(files)
    for sample in ("Hello, world!  3 spaces", "naïve 中文\n"):
        assert found.encode(sample).tolist() == expected.encode(sample).tolist()
    assert found.decode(found.encode("naïve 中文\n")) == "naïve 中文\n"


def test_llama_tokenizer(tmp_path: pathlib.Path) -> None:
    pieces = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", "a", "b", "ab", "▁ab"]
    scores = [0.0] * 259 + [-5.0, -6.0, -7.0, -1.0, -0.5]
    types = [2, 3, 3] + [6] * 256 + [1] * 5
    found, _ = with_tokenizer(
        tmp_path,
        model="llama",
        tokens=pieces,
        scores=scores,
        token_type=types,
        bos_token_id=1,
        eos_token_id=2,
        unknown_token_id=0,
    )
    assert isinstance(found, SentencePieceTokenizer)
    assert (found.vocab_size, found.bos_id, found.eos_id) == (264, 1, 2)
    assert found.encode("ab ab").tolist() == [263, 263]  # a space is put before the text
    assert found.encode("é").tolist() == [259, 3 + 0xC3, 3 + 0xA9]
    assert found.decode([1, 263, 263, 3 + 0xC3, 3 + 0xA9]) == "ab abé"


def test_a_tokenizer_that_is_not_ours_is_said(tmp_path: pathlib.Path) -> None:
    found, reason = with_tokenizer(tmp_path, model="gpt2", pre="qwen2", tokens=["a"], merges=["a a"])
    assert found is None and "model='gpt2', pre='qwen2'" in reason
    found, reason = with_tokenizer(tmp_path, model="gpt2", pre="gpt-2", tokens=["a", "a"], merges=["a a"])
    assert found is None and "none that can be taken over" in reason


# --- refusals -------------------------------------------------------------------------------------------------------------------


def change_tensors(tensors: dict[str, Any], change: str) -> dict[str, Any]:
    shape, _, content = tensors["blk.0.ffn_up.weight"]
    return {
        "unknown type": tensors | {"blk.0.ffn_up.weight": (shape, 14, content)},
        "unheard-of type": tensors | {"blk.0.ffn_up.weight": (shape, 99, content)},
        "missing": {name: tensor for name, tensor in tensors.items() if name != "blk.1.attn_k.weight"},
        "extra": tensors | {"blk.0.ffn_extra.weight": (shape, 0, content)},
        "misshapen": tensors | {"blk.0.ffn_up.weight": (shape[::-1], 0, content)},
    }[change]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("unknown type", "the tensor blk.0.ffn_up.weight is of type Q6_K; read are F64, F32, F16, BF16, Q8_0, Q4_0, Q4_1"),
        ("unheard-of type", "is of type number 99"),
        ("missing", "has no tensor blk.1.attn_k.weight"),
        ("extra", "the tensor blk.0.ffn_extra.weight has no place"),
        ("misshapen", r"blk.0.ffn_up.weight has shape \(64, 96\), but its config asks for \(96, 64\)"),
    ],
)
def test_tensors_that_do_not_fit_are_named(tmp_path: pathlib.Path, change: str, named: str) -> None:
    tensors = {name: encoded(array, "F32") for name, array in arrays("llama").items()}
    with pytest.raises(UserError, match=named):
        read(write(tmp_path / "m.gguf", metadata("llama"), change_tensors(tensors, change)))


@pytest.mark.parametrize(
    ("more", "named"),
    [
        ({"general.architecture": "mamba"}, "architecture 'mamba' is not read from GGUF; read are gpt2, llama, qwen2"),
        ({"llama.rope.scaling.type": "longrope"}, "llama.rope.scaling.type='longrope'"),
        ({"llama.rope.dimension_count": 8}, "llama.rope.dimension_count=8 is not the width of a head, 16"),
        ({"llama.expert_count": 8}, "llama.expert_count=8"),
        ({"llama.attention.head_count_kv": [2, 4]}, r"head_count_kv=\[2, 4\] differs between layers"),
        ({"llama.block_count": "two"}, "num_layers='two' must be a whole number"),
        ({"llama.attention.head_count": 0}, "value of the wrong kind"),
    ],
)
def test_metadata_that_does_not_fit_is_named(tmp_path: pathlib.Path, more: dict[str, Any], named: str) -> None:
    tensors = {name: encoded(array, "F32") for name, array in arrays("llama").items()}
    with pytest.raises(UserError, match=named):
        open_model(write(tmp_path / "m.gguf", metadata("llama") | more, tensors)).config()


def test_every_truncation_of_a_header_and_of_the_tensors_is_refused(tmp_path: pathlib.Path) -> None:
    tensors = {name: encoded(array, "F32") for name, array in arrays("llama").items()}
    path = write(tmp_path / "m.gguf", metadata("llama", **{"tokenizer.ggml.tokens": ["a", "b"]}), tensors)
    whole = path.read_bytes()
    for size in [*range(0, 2500, 37), len(whole) // 2, len(whole) - 4]:
        path.write_bytes(whole[:size])
        with pytest.raises(UserError, match=r"truncated|no GGUF file"):
            open_model(path)
    path.write_bytes(b"GGML" + whole[4:])
    with pytest.raises(UserError, match="is no GGUF file: it begins with b'GGML'"):
        gguf.open_file(path)
    path.write_bytes(whole[:4] + struct.pack("<I", 1) + whole[8:])
    with pytest.raises(UserError, match="version 1; read are 2 and 3"):
        open_model(path)
