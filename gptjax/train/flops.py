"""How much arithmetic a token costs, what the chip could do, and the ratio of the two.

The model FLOPs of training are counted as in PaLM (Chowdhery et al. 2022, appendix B), so that figures compare with published
ones:

    flops a token = 6 * P + 12 * L * T * N * H

P is the number of weights that take part in a matrix product: projections, MLPs and the head, also where it shares the token
embedding, and the map of a factorised embedding; looking an embedding up costs nothing. Each further prediction head
is a layer more and the head once more. Of routed experts it counts as many as a token goes to, dropped or not. A weight
is one multiply and one add forward (2) and twice that backward (6).
Attention adds scores and weighted values, 2 * T * N * H each forward, so 12 * T * N * H with the backward pass in each of L
layers; where queries and keys are wider than values (latent attention), H is the mean of the two widths. The T x T square is
counted whole although a causal mask needs half of it: that is the convention. What a backend skips or recomputes (remat, masked
blocks) is not counted, and neither are norms, softmax and activations. An additive score counts as a product does,
v . tanh(query + key) being H multiplications and additions; its H sums and H tanh are activations.

Beside adapters the P weights are frozen, whose own gradients, a third of the 6, are not computed: 4 * P + 6 * A, A being the
adapters' weights that take part in a product.
"""

from __future__ import annotations

import math

from gptjax.config import ModelConfig

# Published dense peaks of one JAX device in FLOP/s, bfloat16 inputs and float32 accumulation, by the `device_kind` that JAX
# reports. Only chips of which one JAX device is one whole chip: of a TPU v2 or v3 it is half.
PEAK_BFLOAT16: dict[str, float] = {
    "TPU v4": 275e12,
    "TPU v5 lite": 197e12,  # v5e
    "TPU v5e": 197e12,
    "TPU v5": 459e12,  # v5p
    "TPU v5p": 459e12,
    "TPU v6 lite": 918e12,  # v6e, Trillium
    "TPU v6e": 918e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-PCIE-40GB": 312e12,
    "NVIDIA A100 80GB PCIe": 312e12,
    "NVIDIA H100 80GB HBM3": 989.4e12,  # SXM
    "NVIDIA H100 PCIe": 756e12,
    "NVIDIA H200": 989.4e12,
    "NVIDIA L4": 121e12,
    "NVIDIA L40S": 362e12,
}


def matmul_parameters(model: ModelConfig) -> int:
    """Weights that each token is multiplied with. Raises `ValueError` where a size is still 0."""
    sizes = {name: getattr(model, name) for name in ("vocab_size", "num_kv_heads", "head_dim", "mlp_dim")}
    unsettled = [name for name, size in sizes.items() if not size]
    if unsettled:
        raise ValueError(f"model.{' and model.'.join(unsettled)} must be settled before parameters are counted.")
    width = model.model_dim
    attention = attention_parameters(model)
    matrices = 3 if model.gated_mlp else 2
    mlp = matrices * width * model.mlp_dim
    if model.num_experts:
        active = model.experts_per_token + model.num_shared_experts
        mlp = matrices * width * model.expert_mlp_dim * active + width * model.num_experts
    head = width * model.vocab_size
    factor = 0
    if model.embedding_dim:
        factor = model.embedding_dim * width
        if model.tied_embeddings:
            head = model.embedding_dim * model.vocab_size + factor
    return model.num_blocks * (attention + mlp) + factor + model.prediction_heads * head


def attention_parameters(model: ModelConfig) -> int:
    """Weights of one layer's attention that each token is multiplied with."""
    c = model
    if c.attention_kind != "latent":
        return 2 * c.model_dim * c.head_dim * (c.num_heads + c.num_kv_heads)
    queries, query = c.num_heads * c.query_dim, c.query_latent_dim
    of_queries = query * (c.model_dim + queries) if query else c.model_dim * queries
    of_latent = c.model_dim * (c.kv_latent_dim + c.rotary_head_dim) + c.kv_latent_dim * 2 * c.num_heads * c.head_dim
    return of_queries + of_latent + c.num_heads * c.head_dim * c.model_dim


def attention_width(model: ModelConfig) -> float:
    """N * H of the formula: of all heads, the mean of the widths that scores and weighted values are sums over."""
    return model.num_heads * (model.query_dim + model.head_dim) / 2


def flops_per_token(model: ModelConfig, seq_len: int, adapted: int | None = None) -> float:
    """Model FLOPs of training (forward and backward) for one token in rows of `seq_len` tokens: see the head of this file.

    `adapted`: weights of adapters, all others being frozen; None: all are trained.
    """
    of_weights = 6.0 * matmul_parameters(model) if adapted is None else 4.0 * matmul_parameters(model) + 6.0 * adapted
    return of_weights + 12.0 * model.num_blocks * seq_len * attention_width(model)


def peak_flops(device_kind: str, dtype: str) -> float | None:
    """Published dense peak of one device in FLOP/s; None where the chip is not in the table.

    None for float32 as well: what its products run on (TF32, one, three or six passes of bfloat16, true float32) hangs on the
    matmul precision and the XLA version, so no one figure is the peak.
    """
    return PEAK_BFLOAT16.get(device_kind) if dtype == "bfloat16" else None


def device_peak(device_kind: str, dtype: str, peak_tflops: float = 0.0) -> float | None:
    """FLOP/s of one device: `metrics.peak_tflops` where it is given, else the table's."""
    return peak_tflops * 1e12 if peak_tflops else peak_flops(device_kind, dtype)


def mfu(tokens_per_second: float | None, token_flops: float, num_devices: int, peak: float | None) -> float | None:
    """Model FLOPs utilisation in 0..1 of `num_devices` together; None where the rate or the peak of one device is not known."""
    if tokens_per_second is None or not peak or not math.isfinite(tokens_per_second):
        return None
    return tokens_per_second * token_flops / (num_devices * peak)


def describe_mfu(
    model: ModelConfig,
    seq_len: int,
    device_kind: str,
    num_devices: int,
    peak_tflops: float = 0.0,
    adapted: int | None = None,
) -> str:
    """One line for the log at start: what a token costs, by which formula, against which peak."""
    parameters, width = matmul_parameters(model), attention_width(model)
    weights = (
        f"6 * {parameters:,} weights" if adapted is None else f"4 * {parameters:,} frozen weights + 6 * {adapted:,} adapters'"
    )
    cost = (
        f"FLOPs a token: {weights} + 12 * {model.num_blocks} layers * {seq_len:,} tokens * {width:,.0f} head "
        f"width = {flops_per_token(model, seq_len, adapted) / 1e9:.4g} G"
    )
    peak = device_peak(device_kind, model.dtype, peak_tflops)
    devices = f"{num_devices} x {device_kind}"
    if peak is None:
        return f"{cost}; MFU n/a: no published {model.dtype} peak in the table for {devices} (metrics.peak_tflops sets one)"
    source = "metrics.peak_tflops" if peak_tflops else f"published, {model.dtype}"
    return f"{cost}; MFU against {peak / 1e12:.4g} TFLOP/s ({source}) on each of {devices}"
