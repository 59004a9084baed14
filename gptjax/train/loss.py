"""Placeholder with the plain formula until the chunked loss lands."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp


def softmax_cross_entropy(hidden_BTD, table, targets_BT, weights_BT, *, transposed, label_smoothing, z_loss, chunk, dtype):
    equation = "BTD,VD->BTV" if transposed else "BTD,DV->BTV"
    logits = jnp.einsum(equation, hidden_BTD.astype(dtype), table.astype(dtype), preferred_element_type=jnp.float32)
    lse = jax.nn.logsumexp(logits, -1)
    nll = lse - jnp.take_along_axis(logits, targets_BT[..., None], -1)[..., 0]
    loss = (1 - label_smoothing) * nll + label_smoothing * (lse - logits.mean(-1)) + z_loss * lse**2
    return (loss * weights_BT).sum(), {"nll_sum": (nll * weights_BT).sum(), "weight_sum": weights_BT.sum()}


def row_nll(hidden_BTD, table, targets_BT, weights_BT, *, transposed, chunk, dtype):
    equation = "BTD,VD->BTV" if transposed else "BTD,DV->BTV"
    logits = jnp.einsum(equation, hidden_BTD.astype(dtype), table.astype(dtype), preferred_element_type=jnp.float32)
    lse = jax.nn.logsumexp(logits, -1)
    nll = lse - jnp.take_along_axis(logits, targets_BT[..., None], -1)[..., 0]
    return (nll * weights_BT).sum(-1)
