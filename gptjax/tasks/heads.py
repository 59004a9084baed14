"""What heads are made of, and how tasks that write read a batch."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from gptjax.config import ModelConfig
from gptjax.tasks.base import Batch


def head_width(model: ModelConfig) -> int:
    """Width of what the output table, and so a head, is multiplied with."""
    return model.embedding_dim if model.embedding_dim and model.tied_embeddings else model.model_dim


def affine(head: Any, hidden_BTD: jax.Array) -> jax.Array:
    """hidden times head["kernel"] [D, K], plus head["bias"] [K] where it has one: float32 [B, T, K]. So few outputs are summed in
    float32 whatever model.dtype.
    """
    y_BTK = jnp.einsum(
        "BTD,DK->BTK", hidden_BTD.astype(jnp.float32), head["kernel"].astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
    )
    return y_BTK + head["bias"].astype(jnp.float32) if "bias" in head else y_BTK


def label_nats(logits_BTK: jax.Array, label_BT: jax.Array) -> jax.Array:
    """float32 [B, T]: cross-entropy of labels counted from 1, and 0 where there is none (0)."""
    nats_BT = -jnp.take_along_axis(jax.nn.log_softmax(logits_BTK), jnp.maximum(label_BT - 1, 0)[..., None], axis=-1)[..., 0]
    return jnp.where(label_BT > 0, nats_BT, 0.0)


def next_tokens(batch: Batch) -> tuple[jax.Array, jax.Array]:
    """(targets, weights float32), [B, T]: at each place the token after it, which counts where its `read` is 1 and it is of the
    same example.
    """
    tokens, segments, read = (_shifted(batch[name]) for name in ("tokens", "segment_ids", "read"))
    weights = (segments == batch["segment_ids"]) & (segments > 0) & (read > 0)
    return tokens, weights.astype(jnp.float32)


def _shifted(x_BT: jax.Array) -> jax.Array:
    return jnp.pad(x_BT[:, 1:], ((0, 0), (0, 1)))


def one_later(x_BT: jax.Array) -> jax.Array:
    """What was said of the next token, at that token's own place."""
    return jnp.pad(x_BT[:, :-1], ((0, 0), (1, 0)))
