"""Logits of transformers' models, computed by torch, against ours from the files that they saved, and back."""

from __future__ import annotations

import dataclasses
import pathlib
from typing import Any

import numpy as np
import pytest

from gptjax.config import ModelConfig
from gptjax.interop import huggingface
from gptjax.interop.foreign import Foreign
from gptjax.model import primitives
from gptjax.model.decoder import Decoder
from gptjax.train import run
from tests.interop.transformer_models import random_transformer

pytestmark = pytest.mark.parity

LENGTH = 40
SIZES = {
    "num_hidden_layers": 2,
    "hidden_size": 32,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 40,
    "max_position_embeddings": LENGTH,
    "rms_norm_eps": 3e-4,
    "tie_word_embeddings": False,
}
GPT2 = {"n_layer": 2, "n_embd": 32, "n_head": 4, "n_positions": LENGTH, "layer_norm_epsilon": 3e-4}
NEOX = {name: value for name, value in SIZES.items() if name not in ("num_key_value_heads", "rms_norm_eps")} | {
    "layer_norm_eps": 3e-4
}


def rope(kind: str, **values: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": 300.0, **values}}


CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("gpt2", GPT2),
    "gpt2 untied": ("gpt2", GPT2 | {"activation_function": "gelu", "n_inner": 48, "tie_word_embeddings": False}),
    "neox parallel": ("gpt_neox", NEOX),
    "neox sequential": ("gpt_neox", NEOX | {"use_parallel_residual": False, **rope("default", partial_rotary_factor=0.5)}),
    "llama": ("llama", SIZES),
    "llama biased, tied": (
        "llama",
        SIZES | {"attention_bias": True, "mlp_bias": True, "head_dim": 12, "tie_word_embeddings": True},
    ),
    "linear": ("llama", SIZES | rope("linear", factor=2.5)),
    "dynamic": ("llama", SIZES | rope("dynamic", factor=2.5)),
    "llama3": (
        "llama",
        SIZES | rope("llama3", factor=8.0, low_freq_factor=0.5, high_freq_factor=2.0, original_max_position_embeddings=20),
    ),
    "yarn": ("llama", SIZES | rope("yarn", factor=4.0, beta_fast=2.0, beta_slow=0.25, original_max_position_embeddings=10)),
    "yarn with two scales": (
        "llama",
        SIZES | rope("yarn", factor=4.0, mscale=1.2, mscale_all_dim=0.7, original_max_position_embeddings=10, truncate=False),
    ),
    "mistral": ("mistral", SIZES | {"sliding_window": 7}),
    "qwen2": ("qwen2", SIZES),
    "qwen2 in a window": ("qwen2", SIZES | {"use_sliding_window": True, "sliding_window": 9, "max_window_layers": 0}),
    "qwen3": ("qwen3", SIZES | {"head_dim": 10}),
}
SHARDED = {"gpt2 untied", "qwen3"}
BFLOAT16 = {"gpt2", "neox sequential", "qwen2"}


def random_model(case: str) -> Any:
    kind, values = CASES[case]
    model = random_transformer(kind, **values)
    return model.bfloat16() if case in BFLOAT16 else model


def theirs(folder: pathlib.Path, tokens: np.ndarray) -> np.ndarray:
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()
    load = transformers.AutoModelForCausalLM.from_pretrained
    model = load(folder, dtype=torch.float32, attn_implementation="eager").eval()
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


def ours(config: ModelConfig, params: Any, tokens: np.ndarray) -> np.ndarray:
    config = dataclasses.replace(config, attention="dense")  # quick to compile
    with primitives.use_form("plain"):
        return np.asarray(Decoder(config).apply({"params": params}, tokens.astype(np.int32))[0])


@pytest.mark.parametrize("case", CASES)
def test_logits_agree_both_ways_and_tensors_come_back_bit_for_bit(tmp_path: pathlib.Path, case: str) -> None:
    model = random_model(case)
    there, back = tmp_path / "there", tmp_path / "back"
    model.save_pretrained(there, max_shard_size="20KB" if case in SHARDED else "1GB")
    assert (there / "model.safetensors.index.json").exists() == (case in SHARDED)

    tokens = np.random.default_rng(0).integers(0, 101, (3, LENGTH))
    expected = theirs(there, tokens)
    knobs, params = huggingface.load(there)
    assert knobs["param_dtype"] == ("bfloat16" if case in BFLOAT16 else "float32")
    logits = ours(ModelConfig(**knobs), params, tokens)
    assert np.abs(expected).max() > 0.5
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)

    exported(there, back)
    np.testing.assert_allclose(theirs(back, tokens), logits, rtol=0, atol=1e-5)
    assert_same_tensors(there, back)


def exported(there: pathlib.Path, back: pathlib.Path) -> None:
    foreign: Foreign = huggingface.open_folder(there)
    config = foreign.config().model
    source = {"format": "huggingface", "architecture": foreign.architecture, "kinds": foreign.kinds(config)}
    back.mkdir()
    huggingface.write(back, huggingface.prepare(config, run.named_leaves(foreign.read(config)), source=source), None, 30_000)


def assert_same_tensors(a: pathlib.Path, b: pathlib.Path) -> None:
    """Read by the package safetensors: names, types, shapes and bits."""
    from safetensors.torch import load_file

    read = [
        {name: tensor for path in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(path).items()}
        for folder in (a, b)
    ]
    assert read[0].keys() == read[1].keys()
    for name, tensor in read[0].items():
        assert tensor.dtype == read[1][name].dtype, name
        assert tensor.equal(read[1][name]), name


def test_dynamic_stretching_past_the_original_context(tmp_path: pathlib.Path) -> None:
    """transformers stretches to the length of the row at hand; ours to max_seq_len: at that length the two are one."""
    random_model("dynamic").save_pretrained(tmp_path)
    knobs, params = huggingface.load(tmp_path)
    tokens = np.random.default_rng(0).integers(0, 101, (1, 2 * LENGTH))
    config = dataclasses.replace(ModelConfig(**knobs), max_seq_len=2 * LENGTH)
    np.testing.assert_allclose(ours(config, params, tokens), theirs(tmp_path, tokens), rtol=0, atol=1e-5)
