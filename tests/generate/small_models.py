"""Small random decoders and a plain reference for generation: one full forward a token, no cache."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gptjax.config import ModelConfig, from_dict
from gptjax.model.decoder import Decoder

GPT2_LIKE = {"norm": "layernorm", "position": "learned"}
LLAMA_LIKE = {
    "norm": "rmsnorm",
    "position": "rotary",
    "num_kv_heads": 2,
    "gated_mlp": True,
    "activation": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tied_embeddings": False,
}
FAMILIES = {"gpt2": GPT2_LIKE, "llama": LLAMA_LIKE}


def model_config(**knobs: Any) -> ModelConfig:
    sizes = {"vocab_size": 37, "num_layers": 2, "model_dim": 16, "num_heads": 4, "mlp_dim": 24, "max_seq_len": 16}
    values = {"model": sizes | knobs, "data": {"seq_len": 1}, "train": {"duration_steps": 1}}
    return from_dict(values).model


def random_params(config: ModelConfig, seed: int = 0, scale: float = 0.4) -> Any:
    """Every leaf random, biases and norms too, and large enough that the next token depends on all that came before."""
    boxed = jax.eval_shape(lambda: Decoder(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    rng = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, scale, leaf.shape), jnp.float32), nn.unbox(boxed))


@functools.cache
def _forward(config: ModelConfig) -> Any:
    return jax.jit(lambda params, tokens_BT: Decoder(config).apply({"params": params}, tokens_BT)[0])


def full_logits(params: Any, config: ModelConfig, tokens: list[int]) -> np.ndarray:
    """[T, V], by one forward without a cache."""
    # Padded behind to one length, which a causal model cannot see, so that all lengths share a compilation.
    padded = np.zeros((1, config.max_seq_len), np.int32)
    padded[0, : len(tokens)] = tokens
    return np.asarray(_forward(config)(params, padded))[0, : len(tokens)]


def greedy_by_full_forwards(params: Any, config: ModelConfig, prompt: list[int], count: int, eos: int | None = None) -> list[int]:
    """Greedy continuation, the window rule past the context written out: when it is full, keep the last half."""
    tokens, window = list(prompt), list(prompt)
    for _ in range(count):
        token = int(full_logits(params, config, window)[-1].argmax())
        tokens.append(token)
        window.append(token)
        if token == eos:
            break
        if len(window) > config.max_seq_len:
            window = window[-(config.max_seq_len // 2) :]
    return tokens[len(prompt) :]
