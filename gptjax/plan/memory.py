"""Memory on one device without compiling: the state exactly, the rest by a model of what a training step holds at its peak.

    state        parameters, optimizer state and averages, as they are laid over the mesh
    gradients    float32, where the parameters lie; twice with micro-batches (the sum, and the next one)
    saved        what the forward pass keeps for the backward pass, by model.remat
    working set  the largest moment of one layer: attention scores, MLP, its gathered weights and their gradient; or of the head

Numbers of arrays below are what the dense attention and the plain primitives hold at once; experiments/plans compares the sum
with compiled programs. Residual vectors are counted whole on every device of `mesh.tensor`, which is the worst case.
"""

from __future__ import annotations

import math
from typing import Any

import jax

from gptjax.config import Config
from gptjax.parallel.mesh import abstract_mesh, batch_shards, check_divides
from gptjax.train.optimizers import Lengths
from gptjax.train.step import abstract_state

CHUNK_BYTES = 128 * 2**20  # of float32 logits on one device, where objective.loss_chunk is 0: see train/loss.py


def local_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree of `jax.ShapeDtypeStruct`s with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def state_bytes(config: Config, mesh: Any) -> dict[str, int]:
    """{"parameters", "optimizer"} on one device, the average of parameters counted with the optimizer; `mesh` may be abstract."""
    state = abstract_state(config, Lengths.of(config, 1.0), mesh)
    parameters = local_bytes(state.params)
    return {"parameters": parameters, "optimizer": local_bytes(state) - parameters}


def activation_floats(config: Config, tensor: int) -> dict[str, float]:
    """Elements a token that one layer saves (`full`, and on top of it `dots` and `none`), and that its MLP holds at once."""
    m = config.model
    heads, kv, mlp = (size / tensor for size in (m.num_heads * m.head_dim, m.num_kv_heads * m.head_dim, m.mlp_dim))
    ups = 2 if m.gated_mlp else 1
    return {
        "full": m.model_dim,
        "dots": heads + 2 * kv + ups * mlp + 2 * m.model_dim,
        "none": 4 * m.model_dim + 2 * heads + 2 * mlp + (heads + kv if m.query_key_norm else 0),
        "mlp": (ups + 1) * mlp,
    }


def estimate(config: Config, mesh: Any) -> dict[str, float]:
    """Bytes on one device by part, and their `total`. `mesh` may be an `AbstractMesh`.

    Raises `UserError` where the run does not divide over the mesh.
    """
    check_divides(config, mesh)
    m, accumulation = config.model, config.train.accumulation_steps
    state = state_bytes(config, mesh)
    tensor, context = mesh.shape["tensor"], mesh.shape["context"]
    rows = config.data.batch_size / accumulation / batch_shards(mesh)
    tokens = rows * config.data.seq_len / context
    width = 4 if m.dtype == "float32" else 2
    floats = activation_floats(config, tensor)
    layers = m.num_layers / mesh.shape["stage"]

    scores = rows * m.num_heads / tensor * config.data.seq_len**2 / context if m.attention in ("auto", "dense") else 0.0
    kept = {"full": ("full",), "dots": ("full", "dots"), "none": ("full", "dots", "none")}[m.remat]
    saved = tokens * sum(floats[name] for name in kept) * width
    if m.remat == "none":
        saved += scores * (4 + width)  # softmax in float32 and as it enters the product
    weights = _layer_weights(config) / tensor
    # Forward and backward of one layer: scores, weights and their gradients; twice the MLP; gathered weights and a gradient.
    layer = scores * (8 + width) + tokens * (2 * floats["mlp"] + 4 * m.model_dim) * width + weights * (width + 4)
    chunk = min(CHUNK_BYTES, tokens * m.vocab_size / tensor * 4) if not config.objective.loss_chunk else 0.0
    if config.objective.loss_chunk:
        chunk = config.objective.loss_chunk / (batch_shards(mesh) * context) * m.vocab_size / tensor * 4
    head = 3 * chunk + m.vocab_size * m.model_dim / tensor * (width + 8)
    parts = {
        **{name: float(size) for name, size in state.items()},
        "gradients": state["parameters"] * (4 if m.param_dtype == "float32" else 8) / 4 * (2 if accumulation > 1 else 1),
        "saved activations": saved * layers,
        "working set": max(layer, head),
    }
    return parts | {"total": sum(parts.values())}


def _layer_weights(config: Config) -> int:
    m = config.model
    attention = 2 * m.model_dim * m.head_dim * (m.num_heads + m.num_kv_heads)
    return attention + (3 if m.gated_mlp else 2) * m.model_dim * m.mlp_dim


def estimate_over(config: Config, devices: int) -> tuple[Any, dict[str, float]]:
    """(the mesh, `estimate` on it) for so many devices that are not here."""
    mesh = abstract_mesh(config.mesh, devices)
    return mesh, estimate(config, mesh)
