"""FLOPs against hand counts and against XLA's own count of the same matrix products."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest

from gptjax import config as config_lib
from gptjax.train import flops


def settled(**model) -> config_lib.ModelConfig:
    return config_lib.from_dict({"model": model, "data": {"seq_len": 8}, "train": {"duration_steps": 1}}).model


GPT2 = settled(vocab_size=50257, num_layers=12, model_dim=768, num_heads=12)
LLAMA3_8B = settled(
    vocab_size=128256,
    num_layers=32,
    model_dim=4096,
    num_heads=32,
    num_kv_heads=8,
    mlp_dim=14336,
    gated_mlp=True,
    tied_embeddings=False,
)


def test_gpt2_and_llama_by_hand():
    # 12 layers * 12 * 768^2 + 50257 * 768 = 123,532,032; 12 * 12 * 1024 * 768 = 113,246,208
    assert flops.matmul_parameters(GPT2) == 123_532_032
    assert flops.flops_per_token(GPT2, 1024) == 6 * 123_532_032 + 113_246_208 == 854_438_400
    # 32 * (2 * 4096^2 + 2 * 4096 * 1024 + 3 * 4096 * 14336) + 4096 * 128256; 525,336,576 more in the input embedding make
    # the 8.03 B that it is known for
    assert flops.matmul_parameters(LLAMA3_8B) == 7_504_658_432
    assert flops.flops_per_token(LLAMA3_8B, 8192) == 6 * 7_504_658_432 + 12 * 32 * 8192 * 4096


def test_experts_count_as_often_as_a_token_goes_to_them():
    # Mixtral 8x7B has 12.9 B active parameters (Jiang et al., 2024), 131,072,000 of them in the input embedding:
    # 32 * (2 * 4096^2 + 2 * 4096 * 1024 + 2 * 3 * 4096 * 14336 + 8 * 4096) + 4096 * 32000
    mixtral = settled(
        vocab_size=32000,
        num_layers=32,
        model_dim=4096,
        num_heads=32,
        num_kv_heads=8,
        mlp_dim=14336,
        gated_mlp=True,
        tied_embeddings=False,
        num_experts=8,
    )
    assert flops.matmul_parameters(mixtral) == 12_748_587_008
    shared = dataclasses.replace(mixtral, num_shared_experts=1, expert_mlp_dim=1000)
    assert flops.matmul_parameters(shared) - flops.matmul_parameters(mixtral) == 32 * 3 * 4096 * (3 * 1000 - 2 * 14336)


def xla_flops(model: config_lib.ModelConfig, seq_len: int) -> float:
    """XLA's count for one layer's and the head's products over one row, forward, written out with the whole T x T square."""
    t, d, n, h, k = seq_len, model.model_dim, model.num_heads, model.head_dim, model.num_kv_heads
    g, f, v = n // k, model.mlp_dim, model.vocab_size

    def products(x, wq, wk, wv, wo, gate, up, down, head):
        q = jnp.einsum("td,dkgh->tkgh", x, wq)
        keys, values = jnp.einsum("td,dkh->tkh", x, wk), jnp.einsum("td,dkh->tkh", x, wv)
        mixed = jnp.einsum("kgts,skh->tkgh", jnp.einsum("tkgh,skh->kgts", q, keys), values)
        x = jnp.einsum("tkgh,kghd->td", mixed, wo)
        gated = jnp.einsum("td,df->tf", x, gate) if model.gated_mlp else None
        x = jnp.einsum("tf,fd->td", jnp.einsum("td,df->tf", x, up), down)
        return jnp.einsum("td,dv->tv", x, head), gated

    shapes = [(t, d), (d, k, g, h), (d, k, h), (d, k, h), (k, g, h, d), (d, f), (d, f), (f, d), (d, v)]
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(products).lower(*arguments).cost_analysis()["flops"]


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("kv_heads", [1, 2, 6])
def test_formula_equals_xla_count(gated: bool, kv_heads: int):
    model = settled(
        vocab_size=97, num_layers=1, model_dim=30, num_heads=6, num_kv_heads=kv_heads, head_dim=10, mlp_dim=44, gated_mlp=gated
    )
    assert flops.flops_per_token(model, 16) * 16 == 3 * xla_flops(model, 16)


def test_unsettled_sizes_are_refused():
    with pytest.raises(ValueError, match="model.vocab_size must be settled"):
        flops.flops_per_token(settled(), 128)


def test_peak_is_published_or_none():
    assert flops.peak_flops("NVIDIA H100 80GB HBM3", "bfloat16") == 989.4e12
    assert flops.peak_flops("TPU v5 lite", "bfloat16") == 197e12
    assert flops.peak_flops("TPU v5", "bfloat16") == 459e12
    for kind, dtype in [
        ("cpu", "bfloat16"),
        ("NVIDIA H100", "bfloat16"),
        ("TPU v5 lite", "float32"),
        ("NVIDIA H200", "float32"),
        ("", ""),
    ]:
        assert flops.peak_flops(kind, dtype) is None


def test_mfu():
    # Half of the peak of 4 devices: 2 * 100 TFLOP/s at 1 GFLOP a token is 200,000 tokens/s.
    assert flops.mfu(200_000, 1e9, 4, 100e12) == pytest.approx(0.5)
    assert flops.mfu(200_000, 1e9, 4, None) is None
    assert flops.mfu(None, 1e9, 4, 100e12) is None
    assert flops.device_peak("cpu", "float32", peak_tflops=0.25) == 0.25e12


def test_description_names_formula_and_peak():
    model = dataclasses.replace(GPT2, dtype="bfloat16")
    line = flops.describe_mfu(model, 1024, "TPU v4", 8)
    assert "6 * 123,532,032 weights + 12 * 12 layers * 1,024 tokens * 768 head width = 0.8544 G" in line
    assert "275 TFLOP/s (published, bfloat16) on each of 8 x TPU v4" in line
    assert "MFU n/a" in flops.describe_mfu(model, 1024, "cpu", 1)
    assert "0.25 TFLOP/s (metrics.peak_tflops)" in flops.describe_mfu(model, 1024, "cpu", 1, peak_tflops=0.25)
