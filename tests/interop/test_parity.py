"""Logits of transformers' models, computed by torch, against ours from the files that they saved."""

from __future__ import annotations

import pathlib
import warnings
from typing import Any

import numpy as np
import pytest

from gptjax.config import ModelConfig
from gptjax.interop.huggingface import load
from gptjax.model.decoder import Decoder

pytestmark = pytest.mark.parity


def random_model(kind: str, **changes: Any) -> Any:
    """Every tensor random, norms and biases too, so that none is 0 or 1 by its initialisation."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, at import
        import torch
        import transformers
    if kind == "gpt2":
        sizes = {"vocab_size": 101, "n_layer": 3, "n_embd": 48, "n_head": 4, "n_positions": 40, "layer_norm_epsilon": 3e-4}
        model = transformers.GPT2LMHeadModel(transformers.GPT2Config(**sizes | changes))
    else:
        sizes = {"vocab_size": 101, "num_hidden_layers": 3, "hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2}
        sizes |= {"intermediate_size": 72, "max_position_embeddings": 40, "rms_norm_eps": 3e-4, "tie_word_embeddings": False}
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes | changes))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def largest_difference(model: Any, folder: pathlib.Path) -> float:
    import torch

    knobs, params = load(folder)
    tokens = np.random.default_rng(0).integers(0, 101, (3, 40))
    with torch.no_grad():
        expected = model(torch.from_numpy(tokens)).logits.numpy()
    logits, _ = Decoder(ModelConfig(**knobs)).apply({"params": params}, tokens.astype(np.int32))
    assert np.abs(expected).max() > 1
    return float(np.abs(np.asarray(logits) - expected).max())


@pytest.mark.parametrize(
    ("kind", "changes", "shard_size"),
    [
        ("gpt2", {}, "1GB"),
        ("gpt2", {"activation_function": "gelu", "n_inner": 100, "tie_word_embeddings": False}, "30KB"),
        ("llama", {}, "30KB"),
        ("llama", {"attention_bias": True, "mlp_bias": True, "head_dim": 12, "tie_word_embeddings": True}, "1GB"),
        ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 123.0}, "hidden_act": "gelu"}, "1GB"),
    ],
)
def test_logits_agree_with_transformers(tmp_path: pathlib.Path, kind: str, changes: dict[str, Any], shard_size: str) -> None:
    model = random_model(kind, **changes)
    model.save_pretrained(tmp_path, safe_serialization=True, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "30KB")
    assert largest_difference(model, tmp_path) < 1e-4  # measured: 2.5e-6 at most
