"""A tiny random GPT with a byte tokenizer, and its log-probabilities written out in float64."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gptjax.config import Config, from_dict
from gptjax.data.tokenizers import ByteTokenizer
from gptjax.train.restore import TrainedModel
from gptjax.train.step import init_params

SIZES = {"vocab_size": 257, "num_layers": 2, "model_dim": 16, "num_heads": 2, "max_seq_len": 48, "norm_epsilon": 1e-5}


@functools.cache
def tiny_model() -> TrainedModel:
    """Every leaf random, and large enough that each token depends on all before it."""
    return TrainedModel(tiny_config(), random_params(tiny_config()), ByteTokenizer(), 0)


@functools.cache
def tiny_config(**objective: Any) -> Config:
    values: dict[str, Any] = {"model": SIZES, "data": {"seq_len": 8, "add_bos": False}, "train": {"duration_steps": 1}}
    return from_dict(values | ({"objective": objective} if objective else {}))


def random_params(config: Config, scale: float = 0.3) -> Any:
    shapes = jax.eval_shape(lambda: nn.unbox(init_params(config, jnp.uint32(0))))
    rng = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, scale, leaf.shape), jnp.float32), shapes)


def brute_log_probs(ids: Any, prefix: int = 0) -> np.ndarray:
    """[T, V] float64: log-probabilities of the token behind each of `ids` [T], GPT-2's formulas written out.

    The first `prefix` of the tokens see each other both ways.
    """
    config, p = tiny_config().model, jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tiny_model().params)
    T, H = len(ids), config.head_dim
    x = p["embed"]["tokens"][np.asarray(ids)] + p["embed"]["positions"][:T]
    sees = np.tril(np.ones((T, T), bool)) | (np.arange(T) < prefix)[None]

    def norm(x: np.ndarray, own: Any) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        return centred / np.sqrt((centred**2).mean(-1, keepdims=True) + config.norm_epsilon) * own["scale"] + own["bias"]

    def project(x: np.ndarray, own: Any, axes: int = 1) -> np.ndarray:
        return np.tensordot(x, own["kernel"], axes) + own["bias"]

    for number in range(config.num_layers):
        layer = jax.tree.map(lambda leaf, n=number: leaf[n], p["layers"])
        a = layer["attention"]
        y = norm(x, layer["attention_norm"])
        q, k, v = (project(y, a[name]) for name in ("query", "key", "value"))
        scores = np.einsum("tnh,snh->nts", q, k) / np.sqrt(H)
        scores = np.where(sees, scores, -np.inf)
        weights = np.exp(scores - scores.max(-1, keepdims=True))
        weights /= weights.sum(-1, keepdims=True)
        x = x + project(np.einsum("nts,snh->tnh", weights, v), a["output"], 2)
        y = project(norm(x, layer["mlp_norm"]), layer["mlp"]["up"])
        y = 0.5 * y * (1 + np.tanh(np.sqrt(2 / np.pi) * (y + 0.044715 * y**3)))
        x = x + project(y, layer["mlp"]["down"])
    logits = norm(x, p["final_norm"]) @ p["embed"]["tokens"].T
    logits -= logits.max(-1, keepdims=True)
    return logits - np.log(np.exp(logits).sum(-1, keepdims=True))
