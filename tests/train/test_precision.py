"""Moments and products in fewer bits, against float64, with the memory and the loss that they take."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import optax
import pytest

from gptjax.config import MeshConfig, UserError
from gptjax.generate import forward, weights
from gptjax.interop import huggingface
from gptjax.model import quantized
from gptjax.model.cache import Cache
from gptjax.model.decoder import Decoder
from gptjax.parallel.mesh import abstract_mesh, make_mesh
from gptjax.train import state_precision
from gptjax.train.optimizers import Lengths
from gptjax.train.run import named_leaves
from gptjax.train.state_precision import BLOCK, Blocks, num_blocks
from gptjax.train.step import abstract_state, init_state, make_train_step
from tests.small import LLAMA, random_batch, random_params, small

MESH = make_mesh(MeshConfig(data=1))


def uniform_bits(shape: tuple[int, ...], seed: int = 0) -> jax.Array:
    return jnp.asarray(np.random.default_rng(seed).integers(0, 2**32, shape, np.uint32))


# --- moments ----------------------------------------------------------------------------------------------------------------


def levels(signed: bool) -> np.ndarray:
    """All that a code can stand for, of a block whose largest magnitude is 1, in float64."""
    if signed:
        return np.array([math.copysign((abs(code) / 127) ** 2, code) for code in range(-127, 128)])
    return np.array([(code / 255) ** 4 for code in range(256)])


@pytest.mark.parametrize("signed", [True, False])
@pytest.mark.parametrize("width", [7, 256, 300])
def test_int8_is_one_of_the_two_levels_beside_each_number(signed: bool, width: int) -> None:
    rng = np.random.default_rng(width)
    x = rng.normal(size=(3, 2, width)) * 10.0 ** rng.uniform(-9, 3, (3, 2, width))
    x[0, 0] = 0
    x = np.float32(x if signed else x**2)
    stored = state_precision._to_blocks(jnp.asarray(x), signed, uniform_bits(x.shape))
    assert (
        isinstance(stored, Blocks) and stored.codes.shape == x.shape and stored.codes.dtype == (np.int8 if signed else np.uint8)
    )
    assert stored.scales.shape == (3, 2, num_blocks(width)) and stored.scales.dtype == np.float32
    found = np.asarray(state_precision._from_blocks(stored), np.float64)
    for start in range(0, width, BLOCK):
        block, back = x[..., start : start + BLOCK].astype(np.float64), found[..., start : start + BLOCK]
        scale = np.abs(block).max(-1, keepdims=True)
        table = levels(signed)
        share = block / np.where(scale > 0, scale, 1)
        upper = np.clip(np.searchsorted(table, share), 1, len(table) - 1)
        lower, upper = table[upper - 1], table[upper]
        near = np.minimum(np.abs(back - lower * scale), np.abs(back - upper * scale))
        assert (near <= 1e-5 * scale).all()
        np.testing.assert_allclose(np.abs(back).max(-1), scale[..., 0], rtol=1e-6)
    if not signed:
        assert ((found > 0) == (x > 0)).all(), "what divides never becomes 0, and 0 stays"
    assert (found[0, 0] == 0).all()


@pytest.mark.parametrize("kind", ["bfloat16", "int8", "int8 of what is never negative"])
def test_rounding_keeps_the_mean(kind: str) -> None:
    """4096 times the same numbers: the mean is theirs within 5 of its standard errors, at most half a step each."""
    x = np.float32([1.0, 0.337, 0.0421, 0.00313, 0.2999])
    many = jnp.asarray(np.tile(x, (4096, 1)))
    bits = uniform_bits(many.shape)
    if kind == "bfloat16":
        found, step = state_precision._to_bfloat16(many, True, bits).astype(jnp.float32), 2.0**-7 * x
    else:
        signed = kind == "int8"
        found = state_precision._from_blocks(state_precision._to_blocks(many, signed, bits))
        table = levels(signed)
        above = np.clip(np.searchsorted(table, x), 1, len(table) - 1)
        step = table[above] - table[above - 1]
    assert (np.abs(np.asarray(found, np.float64).mean(0) - x) <= 5 * step / 2 / 64 + 1e-7).all()


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_a_slow_average_follows_its_gradient(dtype: str) -> None:
    """A second moment under a decay of 0.999 falls by 1 / e in 1000 steps; rounded to the nearest it would stay where it is."""
    params = {"a": jnp.zeros((8, 64))}
    adam = state_precision.in_dtype(optax.scale_by_adam(b1=0.9, b2=0.999), dtype)
    start = adam.init(params)
    rng = np.random.default_rng(0)
    loud = {"a": jnp.asarray(rng.uniform(0.5, 1.0, (8, 64)), jnp.float32)}
    still = {"a": jnp.zeros((8, 64)).at[:, 0].set(1.0)}  # keeps each block's scale where it was

    @jax.jit
    def run(state: Any) -> tuple[Any, Any]:
        _, state = adam.update(loud, state, params)
        return state, jax.lax.fori_loop(0, 1000, lambda _, state: adam.update(still, state, params)[1], state)

    before, after = (jax.tree.map(state_precision._load, state.inner, is_leaf=lambda node: isinstance(node, Blocks))
                     for state in run(start))  # fmt: skip
    ratio = np.asarray(after.nu["a"], np.float64)[:, 1:].mean() / np.asarray(before.nu["a"], np.float64)[:, 1:].mean()
    assert ratio == pytest.approx(0.999**1000, rel=0.1)


def opt_state_bytes(config: Any) -> int:
    state = abstract_state(config, Lengths.of(config, 1.0), MESH)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.opt_state))


def test_memory_of_the_state() -> None:
    wide = {"model.model_dim": 256, "model.num_heads": 1, "model.mlp_dim": 1024}
    sizes = {dtype: opt_state_bytes(small(wide, optimizer__state_dtype=dtype)) for dtype in ("float32", "bfloat16", "int8")}
    assert sizes["bfloat16"] / sizes["float32"] == pytest.approx(0.5, abs=1e-4)
    assert sizes["int8"] / sizes["float32"] == pytest.approx((1 + 4 / 256) / 4, abs=1e-3)


@pytest.mark.parametrize("name", ["adamw", "lion", "muon", "sgd"])
def test_the_moments_of_each_optimizer_are_stored(name: str) -> None:
    """Nothing of a parameter's size is left in float32, and all of it lies as the parameter does."""
    config = small(optimizer__name=name, optimizer__state_dtype="int8", mesh__data=1, mesh__fsdp=4, mesh__tensor=2)
    state = abstract_state(config, Lengths.of(config, 1.0), abstract_mesh(config.mesh, 8))
    found = dict.fromkeys(named_leaves(state.params), 0)
    for path, leaf in named_leaves(state.opt_state).items():
        owner = next((name for name in found if name in path), None)
        if owner is None:
            continue
        like = named_leaves(state.params)[owner]
        if path.endswith("codes"):
            assert (leaf.shape, leaf.sharding.spec) == (like.shape, like.sharding.spec), path
            assert leaf.dtype == (np.uint8 if "nu/" in path else np.int8)
            found[owner] += 1
        else:
            assert path.endswith("scales") and leaf.shape == (*like.shape[:-1], 1), path
            assert tuple(leaf.sharding.spec) == tuple(like.sharding.spec)[: like.ndim - 1], path
    assert set(found.values()) == ({1, 2} if name == "muon" else {2} if name == "adamw" else {1})
    # [L, D, N, H] of a query: D over fsdp, N over tensor, and so the scales
    (query,) = {leaf.sharding.spec for path, leaf in named_leaves(state.opt_state).items() if "query/kernel/scales" in path}
    assert tuple(query)[1:3] == ("fsdp", "tensor")


def test_training_with_stored_moments() -> None:
    """The same steps give the same bits, and 12 of them about the loss of float32 state."""
    losses: dict[str, list[float]] = {}
    for dtype in ("float32", "bfloat16", "int8"):
        config = small(optimizer__state_dtype=dtype, optimizer__learning_rate=0.01, model__num_layers=1)
        lengths = Lengths.of(config, 1.0)
        step, batch = make_train_step(config, lengths, MESH), random_batch(config)
        for _ in range(2):
            state, found = init_state(config, lengths, MESH), []
            for _ in range(12):
                state, metrics = step(state, batch)
                found.append(float(metrics["loss"]))
            assert losses.setdefault(dtype, found) == found
    start, end = losses["float32"][0], losses["float32"][-1]
    for dtype in ("bfloat16", "int8"):
        assert losses[dtype][:2] == losses["float32"][:2], "the first update needs no stored moment"
        assert abs(losses[dtype][-1] - end) < 0.05 * (start - end) and losses[dtype] != losses["float32"]


def test_refusals_name_both_knobs() -> None:
    for knobs, said in (
        ({"optimizer.state_dtype": "int8", "optimizer.name": "adafactor"}, "state_dtype=int8 .* optimizer.name=adafactor"),
        ({"model.quantization": "fp8", "model.num_experts": 4}, "model.quantization=fp8 .* model.num_experts=4"),
        ({"model.quantization": "int8", "model.mlp_dim": 133152}, "int8 sums at most 133144 products .* 133152"),
    ):
        with pytest.raises(UserError, match=said):
            small(knobs)


# --- products ---------------------------------------------------------------------------------------------------------------


def rounded(kind: str, x: np.ndarray) -> np.ndarray:
    """Rows as 8 bits have them, in float64."""
    scale = np.abs(x).max(-1, keepdims=True) / {"int8": 127, "fp8": 448}[kind]
    units = x / np.where(scale > 0, scale, 1)
    return (np.rint(units) if kind == "int8" else units.astype(ml_dtypes.float8_e4m3fn).astype(np.float64)) * scale


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_product_and_gradient_against_float64(kind: str) -> None:
    rng = np.random.default_rng(3)
    # Multiples of a power of two, largest 127 or 448 of them: scales and units are exact, and no two ways of rounding differ.
    top = {"int8": 127, "fp8": 448}[kind]
    x = rng.integers(-8 * top, 8 * top + 1, (2, 5, 3, 4)) / 64.0
    kernel = rng.integers(-8 * top, 8 * top + 1, (3, 4, 7)) / 512.0
    x[..., 0, 0], kernel[0, 0] = top / 8, -top / 64
    x[1, 4] = 0
    g = rng.normal(size=(2, 5, 7))
    y = lambda x, kernel: quantized.linear(kind, x, kernel, 2, jnp.float32)  # noqa: E731
    found, back = jax.vjp(y, jnp.float32(x), jnp.float32(kernel))
    x_MI, kernel_IO = x.reshape(10, 12), kernel.reshape(12, 7)
    expected = rounded(kind, x_MI) @ rounded(kind, kernel_IO.T).T
    np.testing.assert_allclose(found.reshape(10, 7), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    assert np.abs(expected - x_MI @ kernel_IO).max() > 1e-3 * np.abs(expected).max(), "it is rounded"
    dx, dkernel = back(jnp.float32(g))
    np.testing.assert_allclose(dx.reshape(10, 12), g.reshape(10, 7) @ kernel_IO.T, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(dkernel.reshape(12, 7), x_MI.T @ g.reshape(10, 7), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_a_quantised_model(kind: str) -> None:
    """Near the plain one, causal, scanned as unrolled, decoded with a cache as in training; refused where it can't be said."""
    config = small(LLAMA, model__quantization=kind)
    plain = small(LLAMA)
    params, batch = random_params(config), random_batch(config)
    tokens = jnp.asarray(batch["tokens"][:2, :8])

    def logits(c: Any, params: Any) -> jax.Array:
        return Decoder(c.model).apply({"params": params}, tokens)[0]

    found, exact = jax.jit(lambda p: (logits(config, p), logits(plain, p)))(params)
    spread = float(jnp.std(exact))
    error = float(jnp.sqrt(jnp.mean((found - exact) ** 2)))
    assert 1e-3 * spread < error < 0.2 * spread
    unrolled = jax.jit(lambda p: logits(small(LLAMA, model__quantization=kind, model__scan_unroll=0), p))(params)
    np.testing.assert_allclose(unrolled, found, atol=1e-5 * float(jnp.abs(found).max()))

    def earlier(table: jax.Array) -> jax.Array:  # logits before position 5, of the input vectors
        return (
            Decoder(config.model)
            .apply({"params": params | {"embed": {"tokens": table}}}, tokens.at[:, 5:].set(22))[0][:, :5]
            .sum()
        )

    gradient = jax.jit(jax.grad(earlier))(params["embed"]["tokens"].at[22].set(0.1))
    assert not np.any(gradient[22]) or 22 in np.asarray(tokens[:, :5]), "later tokens have no part in earlier logits"

    prepared = weights.prepare(params, config.model)
    cached, _ = jax.jit(lambda p: forward.prefill(p, config.model, tokens, jnp.array([8, 8]), Cache.empty(config.model, 2, 16)))(
        prepared
    )
    np.testing.assert_allclose(cached, found[:, -1], atol=0.02 * spread)  # a last bit of an input may change a code
    for other in ("int8", "bfloat16"):
        with pytest.raises(UserError, match=f"weights={other} .* model.quantization={kind}"):
            weights.prepare(params, config.model, other)
    with pytest.raises(UserError, match=f"model.quantization='{kind}' .it has 'none'"):
        huggingface.architecture_for(config.model)
