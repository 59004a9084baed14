"""Small configs, random parameters and batches that the tests of the model and of the training step share."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gptjax import config as c
from gptjax.data.corruption import corruption_of
from gptjax.data.reserved import reserve
from gptjax.data.tokenizer_base import Tokenizer
from gptjax.train.step import init_params

SIZES = {
    "model.vocab_size": 23,
    "model.num_layers": 2,
    "model.model_dim": 16,
    "model.num_heads": 4,
    "model.max_seq_len": 16,
    "data.seq_len": 12,
    "data.batch_size": 8,
    "train.duration_steps": 20,
}
GPT2: dict[str, Any] = {}
LLAMA = {
    "model.norm": "rmsnorm",
    "model.position": "rotary",
    "model.activation": "silu",
    "model.gated_mlp": True,
    "model.num_kv_heads": 2,
    "model.mlp_dim": 24,
    "model.attention_bias": False,
    "model.mlp_bias": False,
    "model.tied_embeddings": False,
}
NEOX = {
    "model.position": "rotary",
    "model.rotary_fraction": 0.5,
    "model.block": "parallel",
    "model.activation": "gelu",
    "model.tied_embeddings": False,
}
KINDS = {"gpt2": GPT2, "llama": LLAMA}


def small(*parts: dict[str, Any], **knobs: Any) -> c.Config:
    """A config of `SIZES` with dicts of dotted keys, and keywords such as model__dtype, laid over it."""
    flat = dict(SIZES)
    for part in parts:
        flat |= part
    flat |= {key.replace("__", "."): value for key, value in knobs.items()}
    values: dict[str, Any] = {}
    for key, value in flat.items():
        group, leaf = key.split(".")
        values.setdefault(group, {})[leaf] = value
    return c.from_dict(values)


def random_params(config: c.Config, seed: int = 0, std: float = 0.3) -> Any:
    """Parameters of which none is 0 or 1, so that a bias or a scale left out shows."""
    shapes = nn.unbox(jax.eval_shape(lambda: init_params(config, jnp.uint32(0))))
    rng = np.random.default_rng(seed)

    def draw(path: Any, leaf: Any) -> jax.Array:
        offset = 1.0 if "scale" in jax.tree_util.keystr(path) else 0.0
        return jnp.asarray(offset + std * rng.standard_normal(leaf.shape), leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, shapes)


def packed_row(documents: list[np.ndarray], length: int) -> dict[str, np.ndarray]:
    """One row [1, length] with these documents one after the other, then padding."""
    row = {name: np.zeros((1, length), np.int32) for name in ("tokens", "segment_ids", "positions")}
    start = 0
    for number, document in enumerate(documents, 1):
        end = start + len(document)
        row["tokens"][0, start:end] = document
        row["segment_ids"][0, start:end] = number
        row["positions"][0, start:end] = np.arange(len(document))
        start = end
    return row


def random_batch(config: c.Config, seed: int = 0, rows: int | None = None) -> dict[str, np.ndarray]:
    """Packed rows [B, T + 1] of documents of random lengths, with padding at the end of some."""
    rng = np.random.default_rng(seed)
    length = config.data.seq_len + 1
    made = []
    for _ in range(rows or config.data.batch_size):
        documents, left = [], length - int(rng.integers(0, 4))
        while left > 0:
            size = min(left, int(rng.integers(2, 8)))
            documents.append(rng.integers(1, config.model.vocab_size, size).astype(np.int32))
            left -= size
        made.append(packed_row(documents, length))
    batch = {name: np.concatenate([row[name] for row in made]) for name in made[0]}
    return batch if config.objective.name == "causal" else as_shown(config, batch, seed)


def as_shown(config: c.Config, batch: dict[str, np.ndarray], seed: int = 0) -> dict[str, np.ndarray]:
    """The rows as the objective shows them, its tokens being the last of the vocabulary. Documents are cut to what has room."""
    text = Letters(config.model.vocab_size)
    text.vocab_size -= reserve(text, config.objective, config.data.seq_len).vocab_size - text.vocab_size
    assert text.vocab_size > 1, f"model.vocab_size={config.model.vocab_size} leaves no room for the objective's tokens"
    corruption = corruption_of(config, reserve(text, config.objective, config.data.seq_len))
    assert corruption is not None
    rows, left = [], np.full(len(batch["tokens"]), corruption.capacity)
    for row, segments in enumerate(batch["segment_ids"]):
        documents = []
        for number in np.unique(segments[segments > 0]):
            document = batch["tokens"][row][segments == number] % text.vocab_size
            fits = np.flatnonzero(corruption.grown[: len(document) + 1] <= left[row])
            if len(fits) and fits[-1] >= 2:
                documents.append(document[: fits[-1]])
                left[row] -= corruption.grown[fits[-1]]
        rows.append(packed_row(documents, corruption.capacity))
    whole = {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}
    return corruption.train(whole, seed, np.arange(len(rows)))


class Letters(Tokenizer):
    """Some ids without a text that could be read: what corruption needs of a tokenizer."""

    kind = "letters"

    def __init__(self, vocab_size: int):
        self.vocab_size = vocab_size

    def encode(self, text: str) -> np.ndarray:
        raise NotImplementedError

    def decode(self, ids: Any) -> str:
        raise NotImplementedError

    def token_bytes(self) -> np.ndarray:
        return np.ones(self.vocab_size, np.int32)

    def vocabulary(self) -> list[bytes | None]:
        return [bytes([number]) for number in range(self.vocab_size)]

    def files(self) -> dict[str, bytes]:
        return {}

    @classmethod
    def from_files(cls, files: Any) -> Letters:
        raise NotImplementedError


def tree_close(a: Any, b: Any, rtol: float, atol: float) -> None:
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=rtol, atol=atol, err_msg=jax.tree_util.keystr(path))


def tree_equal(a: Any, b: Any) -> None:
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y), err_msg=jax.tree_util.keystr(path))
