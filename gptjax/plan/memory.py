"""Memory on one device without compiling: the state exactly, the rest by a model of what a training step holds at its peak.

    state        parameters, optimizer state and averages, as they are laid over the mesh
    gradients    float32, where the parameters lie; twice with micro-batches (the sum, and the next one), once more for Sophia
    rounded      the parameters in the type of the products, which the compiler makes once for all micro-batches
    saved        what the forward pass keeps for the backward pass, by model.remat
    working set  the largest moment of one layer, its MLP's or its attention's, with the layer's gathered weights and their
                 gradient; or of the head

What stands in a layer at once was read from programs that libtpu compiled: every array of the MLP or of the attention with its
gradient, and four residual vectors, in float32 and rounded. A TPU lays the last axis out in lanes of 128, so heads of 64 take
the room of 128. Scores are held by the dense attention alone (and by jax.nn's "xla" form); the others keep queries, keys,
values, the result and a log-sum-exp. Routed experts hold places instead of tokens: those of their capacity, filled or not, or,
dropless, as many as tokens could want of one device. Residual vectors are counted whole on every device of `mesh.tensor`.
experiments/plans compares the sum with compiled programs.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import jax

from gptjax.config import Config
from gptjax.model import primitives
from gptjax.model.attention import choose_backend
from gptjax.parallel.mesh import abstract_mesh, batch_shards, check_divides
from gptjax.plan.roofline import expert_places
from gptjax.train.optimizers import Lengths
from gptjax.train.step import abstract_state

CHUNK_BYTES = 128 * 2**20  # of float32 logits on one device, where objective.loss_chunk is 0: see train/loss.py
LANES = 128  # of a TPU's vector registers: the last axis of an array is padded to a multiple


def local_bytes(tree: Any) -> int:
    """Bytes that one device holds of a tree of `jax.ShapeDtypeStruct`s with shardings."""
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in jax.tree.leaves(tree))


def state_bytes(config: Config, mesh: Any) -> dict[str, int]:
    """{"parameters", "optimizer"} on one device, the average of parameters counted with the optimizer; `mesh` may be abstract."""
    state = abstract_state(config, Lengths.of(config, 1.0), mesh)
    parameters = local_bytes(state.params)
    return {"parameters": parameters, "optimizer": local_bytes(state) - parameters}


class _Layer(NamedTuple):
    """Elements a token on one device, of one layer."""

    width: float  # of a residual vector
    heads: float  # of queries, or of attention's result
    kv_heads: float
    hidden: float  # of one array of the MLP's, or of all experts'
    places: float  # of one array of vectors on their way to experts, 0 without


def _layer(config: Config, mesh: Any, platform: str) -> _Layer:
    m, tensor = config.model, mesh.shape["tensor"]
    head = math.ceil(m.head_dim / LANES) * LANES if platform == "tpu" else m.head_dim
    hidden, places = float(m.mlp_dim), 0.0
    if m.num_experts:
        places = _places(config, mesh)
        hidden = (places + m.num_shared_experts) * m.expert_mlp_dim
    return _Layer(m.model_dim, m.num_heads * head / tensor, m.num_kv_heads * head / tensor, hidden / tensor, places * m.model_dim)


def _places(config: Config, mesh: Any) -> float:
    """Rows that go through the experts of one device, for each of its tokens."""
    m, parts = config.model, mesh.shape["expert"]
    if m.expert_capacity_factor or parts == 1:
        return expert_places(m, config.data.seq_len)
    return float(parts * min(m.experts_per_token, m.num_experts // parts))  # room for the worst case: model/experts.py


def saved_elements(config: Config, mesh: Any, platform: str) -> float:
    """Elements a token that the forward pass of one layer keeps for its backward pass, by `model.remat`."""
    m, layer = config.model, _layer(config, mesh, platform)
    ups = 2 if m.gated_mlp else 1
    saved = layer.width + m.num_experts  # the layer's input, and what its router said
    if m.remat != "full":  # what projections give, but for the last one's of the MLP, which no gradient reads; experts' is read
        saved += layer.heads + 2 * layer.kv_heads + layer.width + ups * layer.hidden + layer.places
    if m.remat == "none":  # what they read, too
        saved += 2 * layer.width + layer.heads + ups * layer.hidden + 2 * layer.places
        saved += (layer.heads + layer.kv_heads) * ((m.position == "rotary") + m.query_key_norm)
    return saved


def estimate(config: Config, mesh: Any, platform: str = "gpu") -> dict[str, float]:
    """Bytes on one device by part, and their `total`. `mesh` may be an `AbstractMesh`; `platform`: cpu, gpu or tpu.

    Raises `UserError` where the run does not divide over the mesh.
    """
    check_divides(config, mesh)
    m, accumulation = config.model, config.train.accumulation_steps
    state = state_bytes(config, mesh)
    rows = config.data.batch_size / accumulation / batch_shards(mesh)
    tokens = rows * config.data.seq_len / mesh.shape["context"]
    width = 4 if m.dtype == "float32" else 2
    rounded = state["parameters"] * width / 4 if width < 4 and m.param_dtype == "float32" else 0.0
    parts = {
        **{name: float(size) for name, size in state.items()},
        "gradients": state["parameters"] * (4 if m.param_dtype == "float32" else 8) / 4 * _gradients(config),
        "rounded": rounded,
        "saved activations": tokens * saved_elements(config, mesh, platform) * width * m.num_layers / mesh.shape["stage"],
        "working set": max(_working_set(config, mesh, platform, rows, tokens, width), _head(config, mesh, tokens, width)),
    }
    if m.remat == "none":  # the softmax in float32, and as it enters the product
        scores = _scores(config, mesh, platform, rows) * (4 + width)
        parts["saved activations"] += scores * m.num_layers / mesh.shape["stage"]
    return parts | {"total": sum(parts.values())}


def _gradients(config: Config) -> int:
    """Trees of gradients that are held at once: the sum and the next micro-batch's, and those of Sophia's estimate."""
    return (2 if config.train.accumulation_steps > 1 else 1) + (config.optimizer.name == "sophia")


def _scores(config: Config, mesh: Any, platform: str, rows: float) -> float:
    """Elements of one layer's attention scores, where they are held."""
    m, length, context = config.model, config.data.seq_len, mesh.shape["context"]
    with primitives.use_platform(platform):
        backend = choose_backend(m, length, context)
    return rows * m.num_heads / mesh.shape["tensor"] * length**2 / context if backend in ("dense", "xla") else 0.0


def _working_set(config: Config, mesh: Any, platform: str, rows: float, tokens: float, width: int) -> float:
    m, layer = config.model, _layer(config, mesh, platform)
    both = 4 + (width if width < 4 else 0)  # bytes in float32 and rounded
    ups = 2 if m.gated_mlp else 1
    arrays = 2 * (ups + 1) - (0 if m.remat == "full" else ups)  # with gradients; what is saved is not held twice
    mlp = arrays * layer.hidden * both + layer.places * (4 * width + both)  # on their way there and back, with gradients
    attention = 4 * (layer.heads + layer.kv_heads) * both  # queries, the result, keys, values, with gradients
    scores = _scores(config, mesh, platform, rows) * (8 + width)
    weights = _layer_weights(config, mesh) * (width + 4)
    return tokens * 4 * layer.width * both + max(tokens * mlp, tokens * attention, scores) + weights


def _head(config: Config, mesh: Any, tokens: float, width: int) -> float:
    m, tensor = config.model, mesh.shape["tensor"]
    chunk = float(CHUNK_BYTES)
    if config.objective.loss_chunk:
        chunk = config.objective.loss_chunk / (batch_shards(mesh) * mesh.shape["context"]) * m.vocab_size / tensor * 4
    chunk = min(chunk, tokens * m.vocab_size / tensor * 4)
    return 3 * chunk + m.vocab_size * m.model_dim / tensor * (width + 8)


def _layer_weights(config: Config, mesh: Any) -> float:
    """Elements of one layer's matrices on one device, gathered over fsdp."""
    m = config.model
    attention = 2 * m.model_dim * m.head_dim * (m.num_heads + m.num_kv_heads)
    mlp_dim = float(m.mlp_dim)
    if m.num_experts:
        mlp_dim = m.expert_mlp_dim * (m.num_experts / mesh.shape["expert"] + m.num_shared_experts)
    return (attention + (3 if m.gated_mlp else 2) * m.model_dim * mlp_dim) / mesh.shape["tensor"]


def estimate_over(config: Config, devices: int, platform: str = "gpu") -> tuple[Any, dict[str, float]]:
    """(the mesh, `estimate` on it) for so many devices that are not here."""
    mesh = abstract_mesh(config.mesh, devices)
    return mesh, estimate(config, mesh, platform)
