"""Blockwise attention against the dense formula in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import MeshConfig
from gptjax.model import primitives
from gptjax.model.blockwise import blockwise_attention
from gptjax.parallel.mesh import make_mesh

from .test_primitives import assert_same, normal


def segments(batch, length):
    return jnp.asarray(np.sort(np.random.default_rng(5).integers(0, 4, (batch, length)), axis=1))


def dense(q, k, v, segment_ids=None, causal=True, kept=None):
    """[B, T, N, H] by the definition; `kept` [B, N, T, S] is dropout's mask, scaled."""
    group = q.shape[2] // k.shape[2]
    k, v = jnp.repeat(k, group, axis=2), jnp.repeat(v, group, axis=2)
    scores = jnp.einsum("btnh,bsnh->bnts", q, k) / np.sqrt(q.shape[-1])
    seen = jnp.tril(jnp.ones(scores.shape[-2:], bool))[None] if causal else jnp.ones((1, *scores.shape[-2:]), bool)
    if segment_ids is not None:
        seen = seen & (segment_ids[:, :, None] == segment_ids[:, None, :])
    weights = jax.nn.softmax(jnp.where(seen[:, None], scores, -1e30), axis=-1)
    return jnp.einsum("bnts,bsnh->btnh", weights if kept is None else weights * kept, v)


@pytest.mark.parametrize(
    ("length", "block_size", "packed", "causal"),
    [
        (16, 0, False, True),
        (24, 8, True, True),
        (21, 8, True, True),
        (72, 4, False, True),
        (37, 2, True, True),
        (21, 8, False, False),
    ],
)
def test_equals_dense(length, block_size, packed, causal):
    ids = segments(2, length) if packed else None
    assert_same(
        lambda q, k, v: blockwise_attention(q, k, v, segment_ids_BT=ids, block_size=block_size, causal=causal),
        lambda q, k, v: dense(q, k, v, None if ids is None else np.asarray(ids), causal),
        normal(0, 2, length, 4, 8),
        normal(1, 2, length, 2, 8),
        normal(2, 2, length, 2, 8),
    )


@pytest.mark.parametrize(("length", "block_size"), [(16, 0), (21, 8), (72, 4)])
def test_drops_the_weights_that_primitives_dropout_drops(length, block_size):
    keys = primitives.row_keys(jax.random.key(1), jnp.arange(2))
    kept = np.asarray(primitives.dropout(jnp.ones((2, 2, 2, length, length)), 0.3, keys)).reshape(2, 4, length, length)
    assert 0 < (kept == 0).mean() < 1
    assert_same(
        lambda q, k, v: blockwise_attention(q, k, v, block_size=block_size, dropout_rate=0.3, dropout_keys=keys),
        lambda q, k, v: dense(q, k, v, kept=kept),
        normal(0, 2, length, 4, 8),
        normal(1, 2, length, 2, 8),
        normal(2, 2, length, 2, 8),
    )


def test_the_future_has_no_gradient():
    x = normal(0, 1, 32, 2, 4)
    gradient = jax.grad(lambda x: blockwise_attention(x, x, x, block_size=8)[0, 12].sum())(x)
    assert np.all(np.asarray(gradient)[0, 13:] == 0)
    assert np.all(np.asarray(gradient)[0, 8:13] != 0)


def test_editing_one_document_leaves_the_other_bitwise_equal():
    ids = jnp.asarray([[0] * 20 + [1] * 12])
    x = normal(0, 1, 32, 2, 4)
    other = x.at[0, :20].set(7.0)
    first, second = (blockwise_attention(a, a, a, segment_ids_BT=ids, block_size=8) for a in (x, other))
    np.testing.assert_array_equal(first[0, 20:], second[0, 20:])


def test_keeps_no_square_array_for_the_backward_pass():
    x = normal(0, 1, 64, 2, 4)
    _, backward = jax.vjp(lambda x: blockwise_attention(x, x, x, block_size=8), x)
    assert max(leaf.size for leaf in jax.tree.leaves(backward)) <= x.size


def test_sharded_over_the_batch(eight_devices):
    mesh = make_mesh(MeshConfig(data=8))
    x = normal(0, 8, 32, 2, 4)
    step = jax.jit(jax.grad(lambda x: jnp.square(blockwise_attention(x, x, x, block_size=8)).sum()))
    spread = step(jax.device_put(x, jax.NamedSharding(mesh, jax.P("data"))))
    np.testing.assert_allclose(spread, step(x), rtol=2e-5, atol=2e-5)
    assert spread.sharding.spec[0] == "data"


def test_bfloat16_comes_out_as_it_went_in_with_a_float32_softmax():
    x = normal(0, 1, 16, 2, 4).astype(jnp.bfloat16)
    y, backward = jax.vjp(lambda x: blockwise_attention(x, x, x, block_size=8), x)
    assert y.dtype == backward(y)[0].dtype == jnp.bfloat16
    exact = dense(*[x.astype(jnp.float32)] * 3)
    np.testing.assert_allclose(y.astype(jnp.float32), exact, atol=0.03)
    text = str(jax.make_jaxpr(lambda x: blockwise_attention(x, x, x, block_size=8))(x))
    assert all("f32" in line for line in text.splitlines() if " exp " in line)
