"""Every attention backend against the dense reference, which is held to float64 brute force; and what each refuses."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import ATTENTION_CAPABILITIES, ModelConfig, UserError, attention_refusal
from gptjax.model import primitives
from gptjax.model.attention import ATTENTION_BACKENDS, AUTO, Cache, attend, choose_backend
from gptjax.model.decoder import Decoder
from tests.small import LLAMA, random_params, small

FEATURES = {"grouped": {"num_kv_heads": 1}, "window": {"attention_window": 37}, "softcap": {"attention_softcap": 1.5}}
# Splash works in blocks of 128 and each of its cases takes seconds to interpret: every feature alone, all together, and none.
LENGTHS = {"blockwise": 300, "xla": 48, "splash": 256}


def cases() -> list[Any]:
    names = (*FEATURES, "segments")
    found = []
    for backend in LENGTHS:
        for chosen in itertools.product([False, True], repeat=len(names)):
            on = tuple(name for name, is_on in zip(names, chosen, strict=True) if is_on)
            if backend == "splash" and len(on) in (2, 3):
                continue
            if "softcap" in on and "attention_softcap" not in ATTENTION_CAPABILITIES[backend]:
                continue
            found.append(pytest.param(backend, on, id="-".join((backend, *on))))
    return found


def model(backend: str, on: tuple[str, ...] = (), **knobs: Any) -> ModelConfig:
    for name in on:
        knobs |= FEATURES.get(name, {})
    sizes = {"vocab_size": 5, "num_heads": 2, "num_kv_heads": 2, "head_dim": 64, "mlp_dim": 8}
    return ModelConfig(**{**sizes, "attention": backend, **knobs})


def arrays(config: ModelConfig, batch: int, length: int, seed: int = 0) -> list[jax.Array]:
    """q, k, v and the gradient of the output."""
    rng = np.random.default_rng(seed)
    heads = (config.num_heads, config.num_kv_heads, config.num_kv_heads, config.num_heads)
    return [jnp.asarray(rng.standard_normal((batch, length, n, config.head_dim)), jnp.float32) for n in heads]


def segment_ids(batch: int, length: int) -> jax.Array:
    return jnp.asarray(np.sort(np.random.default_rng(5).integers(0, 3, (batch, length)), axis=1), jnp.int32)


def value_and_gradients(config: ModelConfig, q: Any, k: Any, v: Any, g: Any, ids: Any = None) -> list[jax.Array]:
    @functools.partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # each of 120 programs runs once
    def both(q: Any, k: Any, v: Any, g: Any) -> Any:
        out, backward = jax.vjp(lambda q, k, v: attend(config, q, k, v, ids), q, k, v)
        return out, *backward(g)

    return list(both(q, k, v, g))


@pytest.mark.parametrize(("backend", "on"), cases())
def test_forward_and_backward_equal_dense(backend: str, on: tuple[str, ...]) -> None:
    length = LENGTHS[backend]
    config = model(backend, on)
    given = arrays(config, 1, length)
    ids = segment_ids(1, length) if "segments" in on else None
    ours = value_and_gradients(config, *given, ids)
    reference = value_and_gradients(dataclasses.replace(config, attention="dense"), *given, ids)
    for name, one, other in zip(("out", "dq", "dk", "dv"), ours, reference, strict=True):
        assert one.dtype == jnp.float32
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=2e-6 * float(jnp.abs(other).max()), err_msg=name)


def brute_force(config: ModelConfig, q: Any, k: Any, v: Any, ids: Any) -> np.ndarray:
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    out = np.zeros_like(q)
    for b, t, n in np.ndindex(q.shape[:3]):
        first = max(0, t - config.attention_window + 1) if config.attention_window else 0
        seen = [s for s in range(first, t + 1) if ids is None or ids[b, s] == ids[b, t]]
        head = n // (config.num_heads // config.num_kv_heads)
        scores = k[b, seen, head] @ q[b, t, n] / math.sqrt(config.head_dim)
        if config.attention_softcap:
            scores = config.attention_softcap * np.tanh(scores / config.attention_softcap)
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ v[b, seen, head]
    return out


@pytest.mark.parametrize(
    "on", [(), ("grouped",), ("window",), ("softcap",), ("segments",), (*FEATURES, "segments")], ids="-".join
)
def test_dense_equals_float64_brute_force(on: tuple[str, ...]) -> None:
    config = model("dense", on, num_heads=4, head_dim=8)
    q, k, v, _ = arrays(config, 1, 60)
    ids = segment_ids(1, 60) if "segments" in on else None
    np.testing.assert_allclose(
        jax.jit(attend, static_argnums=0)(config, q, k, v, ids), brute_force(config, q, k, v, ids), rtol=1e-5, atol=2e-6
    )


def test_dropout_drops_the_same_weights() -> None:
    keys = primitives.row_keys(jax.random.key(0), jnp.arange(2))
    config = model("dense", ("grouped", "window", "softcap"), attention_dropout=0.3)
    q, k, v, _ = arrays(config, 2, 260)
    run = jax.jit(attend, static_argnums=0)
    dense, blockwise = (
        run(dataclasses.replace(config, attention=name), q, k, v, dropout_keys=keys) for name in ("dense", "blockwise")
    )
    np.testing.assert_allclose(blockwise, dense, rtol=1e-5, atol=1e-6)
    assert float(jnp.abs(dense - run(config, q, k, v)).max()) > 0.1


def test_decoding_with_a_cache_keeps_to_window_and_cap() -> None:
    config = small(LLAMA, model__attention_window=5, model__attention_softcap=0.7).model
    params = random_params(small(LLAMA))
    tokens = jnp.asarray(np.random.default_rng(0).integers(0, 23, (2, 12)))
    positions = jnp.broadcast_to(jnp.arange(12), (2, 12))

    @functools.partial(jax.jit, static_argnums=0)
    def run(config: ModelConfig, tokens: Any, positions: Any, cache: Any = None) -> Any:
        return Decoder(config).apply({"params": params}, tokens, positions, cache=cache)

    whole, _ = run(config, tokens, positions)
    cache = Cache.empty(config, 2, 12)
    found = []
    for start, end in ((0, 7), (7, 8), (8, 12)):
        part, cache = run(config, tokens[:, start:end], positions[:, start:end], cache)
        found.append(part)
    np.testing.assert_allclose(jnp.concatenate(found, 1), whole, rtol=2e-5, atol=2e-5)
    for knob in ("attention_window", "attention_softcap"):
        other, _ = run(dataclasses.replace(config, **{knob: 0}), tokens, positions)
        assert float(jnp.abs(other - whole).max()) > 1e-2, knob


# --- what cannot be done is refused ---------------------------------------------


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        (
            {"model.attention": "xla", "model.attention_softcap": 2.0},
            "attention=xla cannot do model.attention_softcap=2.0; dense",
        ),
        (
            {"model.attention": "xla", "model.attention_dropout": 0.1},
            "attention=xla cannot do model.attention_dropout=0.1; dense",
        ),
        ({"model.attention": "splash", "model.attention_dropout": 0.1}, "splash cannot do model.attention_dropout=0.1; dense"),
        ({"model.attention": "cudnn"}, "attention=cudnn needs model.dtype=bfloat16, not float32"),
        (
            {"model.attention": "cudnn", "model.dtype": "bfloat16", "model.head_dim": 12},
            "a model.head_dim of 8, 16, ..., 128, not 12",
        ),
        ({"model.attention": "splash", "model.head_dim": 40}, "needs a model.head_dim that 64 divides, not 40"),
        ({"model.attention": "splash", "model.head_dim": 64}, "needs a data.seq_len that 128 divides, not 12"),
    ],
    ids=str,
)
def test_refused_by_name_before_anything_is_traced(knobs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        small(knobs)
    assert sentence in str(error.value)


def test_a_backend_of_another_platform_is_refused() -> None:
    config = model("cudnn", dtype="bfloat16")
    with pytest.raises(UserError, match="cudnn runs on gpu, not on cpu; dense, blockwise, xla run anywhere"):
        attend(config, *arrays(config, 1, 8)[:3])
    with primitives.use_platform("gpu"), pytest.raises(UserError, match="splash runs on tpu and cpu, not on gpu"):
        choose_backend(model("splash"), 256)


@pytest.mark.parametrize(
    ("platform", "knobs", "length", "context", "chosen"),
    [
        ("cpu", {}, 256, 1, "blockwise"),
        ("gpu", {}, 256, 1, "dense"),
        ("gpu", {"dtype": "bfloat16"}, 256, 1, "cudnn"),
        ("gpu", {"dtype": "bfloat16", "attention_window": 7}, 256, 1, "cudnn"),
        ("gpu", {"dtype": "bfloat16", "attention_softcap": 7.0}, 256, 1, "dense"),
        ("gpu", {"dtype": "bfloat16"}, 256, 2, "blockwise"),
        ("gpu", {"dtype": "bfloat16", "attention_score": "cosine"}, 256, 1, "cudnn"),
        ("gpu", {"attention_score": "additive"}, 256, 1, "blockwise"),
        ("tpu", {"attention_sink": "learned"}, 256, 1, "dense"),
        ("tpu", {}, 256, 1, "splash"),
        ("tpu", {}, 200, 1, "dense"),
        ("tpu", {"head_dim": 40}, 256, 1, "dense"),
        ("tpu", {"attention_dropout": 0.1}, 256, 1, "dense"),
        ("tpu", {}, 256, 2, "splash"),
        ("tpu", {}, 256, 4, "blockwise"),
    ],
)
def test_auto_takes_the_first_that_can(platform: str, knobs: Any, length: int, context: int, chosen: str) -> None:
    with primitives.use_platform(platform):
        assert choose_backend(model("auto", **knobs), length, context) == chosen


def test_auto_always_finds_one() -> None:
    everything = {"attention_dropout": 0.1, "attention_window": 3, "attention_softcap": 2.0, "head_dim": 6}
    everything |= {"attention_score": "additive", "attention_sink": "learned", "attention_sink_tokens": 1, "position": "t5"}
    for order in AUTO.values():
        for context in (1, 2):
            assert any(not attention_refusal(model("auto", **everything), name, 13, context, prefix=True) for name in order)


def test_the_two_tables_name_the_same_backends() -> None:
    assert set(ATTENTION_BACKENDS) == set(ATTENTION_CAPABILITIES)
    for name, backend in ATTENTION_BACKENDS.items():
        assert (backend.over_context is not None) == ("context" in ATTENTION_CAPABILITIES[name])
    with pytest.raises(ValueError, match="must be 'cpu', 'gpu' or 'tpu'"), primitives.use_platform("abacus"):
        pass
