"""Each hand-written form against the plain formula in float64, values and gradients; and dropout's statistics."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import MeshConfig
from gptjax.model import primitives
from gptjax.parallel.mesh import make_mesh


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def assert_same(function, reference, *arguments, tolerance=3e-6):
    """Values, and the gradients of a sum with uneven weights, agree with the reference in float64."""
    size = math.prod(jax.eval_shape(function, *arguments).shape)

    def scalar(f):
        return lambda *a: (f(*a).reshape(-1) * jnp.cos(jnp.arange(size))).sum()

    numbers = tuple(range(len(arguments)))
    got = jax.jit(lambda *a: (function(*a), jax.grad(scalar(function), numbers)(*a)))(*arguments)
    with jax.enable_x64(True):
        exact = [jnp.asarray(np.asarray(x), jnp.float64) for x in arguments]
        expected = jax.jit(lambda *a: (reference(*a), jax.grad(scalar(reference), numbers)(*a)))(*exact)
        expected = jax.tree.map(np.asarray, expected)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(x, y, rtol=tolerance, atol=tolerance * max(1.0, np.abs(y).max()))


@pytest.fixture(params=["plain", "hand_written"])
def form(request):
    with primitives.use_form(request.param):
        yield request.param


@pytest.mark.parametrize(
    ("x", "kernel", "contracted"), [((2, 5, 8), (8, 3, 4), 1), ((2, 5, 3, 4), (3, 4, 8), 2), ((6, 8), (8, 7), 1)]
)
@pytest.mark.parametrize("with_bias", [False, True])
def test_linear(form, x, kernel, contracted, with_bias):
    arguments = [normal(0, *x), normal(1, *kernel)] + ([normal(2, *kernel[contracted:])] if with_bias else [])

    def reference(x, kernel, bias=0.0):
        return jnp.tensordot(x, kernel, contracted) + bias

    def function(x, kernel, bias=None):
        return primitives.linear(x, kernel, contracted, jnp.float32, bias)

    assert_same(function, reference, *arguments)


def test_linear_rejects_shapes_that_do_not_contract(form):
    with pytest.raises(ValueError, match="cannot be contracted"):
        primitives.linear(jnp.ones((2, 3)), jnp.ones((4, 5)), 1, jnp.float32)


def test_linear_sums_in_float32_and_keeps_the_types_of_its_parameters(form):
    """In bfloat16 a sum of 4096 ones would stop at 256."""
    x, kernel = jnp.ones((4096, 2)), jnp.ones((2, 3), jnp.float32)
    y, backward = jax.vjp(lambda x, kernel: primitives.linear(x, kernel, 1, jnp.bfloat16), x, kernel)
    dx, dkernel = backward(jnp.ones_like(y))
    assert (y.dtype, dx.dtype, dkernel.dtype) == (jnp.bfloat16, jnp.float32, jnp.float32)
    np.testing.assert_array_equal(dkernel, 4096.0)


def _layer_norm(x, scale, bias=0.0):
    centred = x - x.mean(-1, keepdims=True)
    return centred / jnp.sqrt(jnp.square(centred).mean(-1, keepdims=True) + 1e-3) * scale + bias


def test_layer_norm(form):
    x = normal(0, 2, 5, 16) * 3 + 1
    assert_same(lambda x, s, b: primitives.layer_norm(x, s, b, 1e-3), _layer_norm, x, normal(1, 16), normal(2, 16))
    assert_same(lambda x, s: primitives.layer_norm(x, s, None, 1e-3), _layer_norm, x, normal(1, 16))


def test_rms_norm(form):
    def reference(x, scale):
        return x / jnp.sqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-3) * scale

    assert_same(lambda x, s: primitives.rms_norm(x, s, 1e-3), reference, normal(0, 2, 5, 16) * 3 + 1, normal(1, 16))


def test_norms_compute_in_float32_under_bfloat16(form):
    x = (normal(0, 4, 512) + 100).astype(jnp.bfloat16)
    expected = _layer_norm(x.astype(jnp.float32), 1.0).astype(jnp.bfloat16)
    got = primitives.layer_norm(x, jnp.ones(512), None, 1e-3)
    assert got.dtype == jnp.bfloat16
    np.testing.assert_allclose(got.astype(jnp.float32), expected.astype(jnp.float32), atol=0.01)


def test_gelu(form):
    x = jnp.linspace(-6, 6, 201)
    assert_same(primitives.gelu, lambda x: x * 0.5 * (1 + jax.lax.erf(x / math.sqrt(2))), x)
    assert_same(primitives.gelu_tanh, lambda x: 0.5 * x * (1 + jnp.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))), x)


@pytest.mark.parametrize("activation", [primitives.gelu, primitives.gelu_tanh])
def test_gelu_stays_in_bfloat16(form, activation):
    y, backward = jax.vjp(activation, jnp.ones(3, jnp.bfloat16))
    assert y.dtype == backward(y)[0].dtype == jnp.bfloat16


def test_embed(form):
    ids = jnp.asarray([[1, 3, 3], [0, 1, 3]])
    one_hot = np.eye(5)[np.asarray(ids)]
    assert_same(lambda table: primitives.embed(table, ids), lambda table: one_hot @ table, normal(0, 5, 4))


def test_the_default_form_is_hand_written_on_a_cpu_only():
    assert primitives.hand_written() == (jax.default_backend() == "cpu")
    with pytest.raises(ValueError, match="must be 'plain'"), primitives.use_form("fast"):
        pass


# --- dropout: bounds are 5 standard deviations -----------------------------------------------


def masks(rate, shape, seed=0, step=0, site=0):
    """float64 [B, ...] of 0 and 1."""
    key = jax.random.fold_in(jax.random.key(seed), step)
    keys = primitives.fold_in(primitives.row_keys(key, jnp.arange(shape[0])), site)
    return np.asarray(primitives.dropout(jnp.ones(shape), rate, keys) > 0, np.float64)


@pytest.mark.parametrize("rate", [0.0, 0.1, 0.2, 0.5, 0.9])
def test_dropout_keeps_the_stated_share_and_the_mean(rate):
    kept = masks(rate, (8, 64, 256))
    assert abs(kept.mean() - (1 - rate)) <= 5 * math.sqrt(rate * (1 - rate) / kept.size)
    x = jnp.ones((8, 64, 256))
    y = primitives.dropout(x, rate, primitives.row_keys(jax.random.key(0), jnp.arange(8)))
    assert set(np.unique(y)) <= {np.float32(0), np.float32(1 / (1 - rate))}
    assert primitives.dropout(x, rate, None) is x


def test_dropout_is_even_over_every_axis():
    kept = masks(0.2, (16, 64, 128))
    for axes in [(1, 2), (0, 2), (0, 1)]:
        shares = kept.mean(axes)
        z = (shares - 0.8) / math.sqrt(0.16 / (kept.size / shares.size))
        assert np.abs(z).max() < 5
        assert 0.5 < z.std() < 1.6  # neither clumped nor more even than chance


def correlation(a, b):
    """In standard deviations of chance."""
    a, b = a - a.mean(), b - b.mean()
    return (a * b).mean() / (a.std() * b.std()) * math.sqrt(a.size)


def test_dropout_is_independent_between_elements_rows_layers_steps_and_seeds():
    kept = masks(0.5, (8, 64, 256))
    for lag in (1, 2, 3, 4, 8, 16, 64, 128):
        assert abs(correlation(kept[..., lag:], kept[..., :-lag])) < 5
    for lag in (1, 2, 8, 32):
        assert abs(correlation(kept[:, lag:], kept[:, :-lag])) < 5
    for lag in (1, 2, 4):
        assert abs(correlation(kept[lag:], kept[:-lag])) < 5
    for other in [{"site": 1}, {"site": 2}, {"site": 3}, {"step": 1}, {"step": 2}, {"seed": 1}]:
        assert abs(correlation(kept, masks(0.5, (8, 64, 256), **other))) < 5


def test_dropout_patterns_of_eight_neighbours_are_equally_frequent():
    """Chi-square over 256 patterns: mean 255, standard deviation 22.6."""
    bits = masks(0.5, (16, 64, 512)).reshape(-1, 8).astype(int)
    counts = np.bincount(bits @ (1 << np.arange(8)), minlength=256)
    expected = counts.sum() / 256
    assert abs(((counts - expected) ** 2 / expected).sum() - 255) < 5 * 22.6


def test_dropout_is_a_function_of_the_row_however_the_batch_is_split():
    x, key = normal(0, 6, 4, 8), jax.random.key(3)
    whole = primitives.dropout(x, 0.4, primitives.row_keys(key, jnp.arange(6)))
    rows = jnp.asarray([4, 1])
    part = primitives.dropout(x[rows], 0.4, primitives.row_keys(key, rows))
    np.testing.assert_array_equal(part, whole[rows])


def test_dropout_backward_uses_the_mask_of_the_forward():
    keys = primitives.row_keys(jax.random.key(0), jnp.arange(2))
    x = normal(0, 2, 3, 16)
    y, backward = jax.vjp(lambda x: primitives.dropout(x, 0.3, keys), x)
    np.testing.assert_array_equal(backward(x)[0], y)


def test_primitives_give_the_same_under_a_sharded_batch(eight_devices):
    mesh = make_mesh(MeshConfig(data=8))
    x, kernel = normal(0, 8, 4, 16), normal(1, 16, 2, 8)

    def loss(x, kernel):
        keys = primitives.row_keys(jax.random.key(0), jnp.arange(8))
        y = primitives.linear(primitives.layer_norm(x, jnp.ones(16), None, 1e-5), kernel, 1, jnp.float32)
        return jnp.square(primitives.dropout(primitives.gelu_tanh(y), 0.2, keys)).sum()

    alone = jax.jit(jax.value_and_grad(loss, (0, 1)))(x, kernel)
    sharded = jax.device_put(x, jax.NamedSharding(mesh, jax.P("data")))
    spread = jax.jit(jax.value_and_grad(loss, (0, 1)))(sharded, jax.device_put(kernel, jax.NamedSharding(mesh, jax.P())))
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(spread), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
    assert spread[1][0].sharding.spec[0] == "data"
