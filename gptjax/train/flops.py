"""How much arithmetic a token costs, what the chip could do, and the ratio of the two.

The model FLOPs of training are counted as in PaLM (Chowdhery et al. 2022, appendix B), so that figures compare with published
ones:

    flops a token = 6 * P + 12 * L * T * N * H

P is the number of weights that take part in a matrix product: projections, MLPs and the head, also where it shares the token
embedding; looking an embedding up costs nothing. Of routed experts it counts as many as a token goes to, dropped or not. A weight
is one multiply and one add forward (2) and twice that backward (6).
Attention adds scores and weighted values, 2 * T * N * H each forward, so 12 * T * N * H with the backward pass in each of L
layers. The T x T square is counted whole although a causal mask needs half of it: that is the convention. What a backend skips
or recomputes (remat, masked blocks) is not counted, and neither are norms, softmax and activations. An additive score counts as a
product does, v . tanh(query + key) being H multiplications and additions; its H sums and H tanh are activations.
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
    attention = 2 * width * model.num_heads * model.head_dim + 2 * width * model.num_kv_heads * model.head_dim
    matrices = 3 if model.gated_mlp else 2
    mlp = matrices * width * model.mlp_dim
    if model.num_experts:
        active = model.experts_per_token + model.num_shared_experts
        mlp = matrices * width * model.expert_mlp_dim * active + width * model.num_experts
    return model.num_layers * (attention + mlp) + width * model.vocab_size


def flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """Model FLOPs of training (forward and backward) for one token in rows of `seq_len` tokens: see the head of this file."""
    return 6.0 * matmul_parameters(model) + 12.0 * model.num_layers * seq_len * model.num_heads * model.head_dim


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


def describe_mfu(model: ModelConfig, seq_len: int, device_kind: str, num_devices: int, peak_tflops: float = 0.0) -> str:
    """One line for the log at start: what a token costs, by which formula, against which peak."""
    parameters, width = matmul_parameters(model), model.num_heads * model.head_dim
    cost = (
        f"FLOPs a token: 6 * {parameters:,} weights + 12 * {model.num_layers} layers * {seq_len:,} tokens * {width:,} head width"
        f" = {flops_per_token(model, seq_len) / 1e9:.4g} G"
    )
    peak = device_peak(device_kind, model.dtype, peak_tflops)
    devices = f"{num_devices} x {device_kind}"
    if peak is None:
        return f"{cost}; MFU n/a: no published {model.dtype} peak in the table for {devices} (metrics.peak_tflops sets one)"
    source = "metrics.peak_tflops" if peak_tflops else f"published, {model.dtype}"
    return f"{cost}; MFU against {peak / 1e12:.4g} TFLOP/s ({source}) on each of {devices}"
