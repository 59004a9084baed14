"""The chunked loss against the formula in float64."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import MeshConfig
from gptjax.parallel.mesh import make_mesh
from gptjax.train.loss import row_nll, softmax_cross_entropy

B, T, D, V = 3, 7, 8, 11


@pytest.fixture
def data():
    rng = np.random.default_rng(0)
    weights = rng.uniform(size=(B, T)) * (rng.uniform(size=(B, T)) > 0.3)
    return (
        jnp.asarray(rng.normal(size=(B, T, D)), jnp.float32),
        jnp.asarray(rng.normal(size=(D, V)), jnp.float32),
        jnp.asarray(rng.integers(0, V, (B, T))),
        jnp.asarray(weights, jnp.float32),
    )


def exact_losses(hidden, head, targets, softcap=0.0):
    """Log probabilities [B, T, V], log(Z) and nll [B, T], in float64."""
    logits = np.einsum("btd,dv->btv", np.float64(hidden), np.float64(head))
    logits = softcap * np.tanh(logits / softcap) if softcap else logits
    lse = np.log(np.exp(logits).sum(-1))
    log_p = logits - lse[..., None]
    return log_p, lse, -np.take_along_axis(log_p, np.asarray(targets)[..., None], -1)[..., 0]


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("chunk", [0, 1, 6, 9, 1000])
@pytest.mark.parametrize(("smoothing", "z_loss", "softcap"), [(0.0, 0.0, 0.0), (0.1, 0.02, 0.0), (0.1, 0.02, 1.5)])
def test_equals_the_formula_with_its_gradients(data, transposed, chunk, smoothing, z_loss, softcap):
    hidden, head, targets, weights = data
    options = {"transposed": transposed, "label_smoothing": smoothing, "z_loss": z_loss, "chunk": chunk, "softcap": softcap}

    def loss_of(hidden, head, weights):
        return softmax_cross_entropy(hidden, head.T if transposed else head, targets, weights, **options)

    def reference(hidden, head, weights):
        logits = hidden @ head
        logits = softcap * jnp.tanh(logits / softcap) if softcap else logits
        lse = jax.nn.logsumexp(logits, axis=-1)
        nll = lse - jnp.take_along_axis(logits, targets[..., None], -1)[..., 0]
        return (weights * ((1 - smoothing) * nll + smoothing * (lse - logits.mean(-1)) + z_loss * lse**2)).sum()

    (loss, parts), gradients = jax.value_and_grad(lambda *a: (lambda y: (3 * y[0], y[1]))(loss_of(*a)), (0, 1, 2), has_aux=True)(
        hidden, head, weights
    )
    np.testing.assert_allclose(loss_of(hidden, head, weights)[0], loss / 3, rtol=1e-6)
    with jax.enable_x64(True):
        exact = [jnp.asarray(np.asarray(x), jnp.float64) for x in (hidden, head, weights)]
        expected = jax.tree.map(np.asarray, jax.value_and_grad(reference, (0, 1, 2))(*exact))
    np.testing.assert_allclose(loss, 3 * expected[0], rtol=1e-6)
    for got, want in zip(gradients, expected[1], strict=True):
        np.testing.assert_allclose(got, 3 * want, rtol=2e-5, atol=2e-5)

    log_p, _, nll = exact_losses(hidden, head, targets, softcap)
    np.testing.assert_allclose(parts["nll_sum"], (nll * weights).sum(), rtol=1e-5)
    np.testing.assert_allclose(parts["weight_sum"], weights.sum(), rtol=1e-6)


@pytest.mark.parametrize(("chunk", "softcap"), [(0, 0.0), (6, 0.0), (6, 1.5)])
def test_rows_for_evaluation(data, chunk, softcap):
    hidden, head, targets, weights = data
    nll = row_nll(hidden, head, targets, weights, transposed=False, chunk=chunk, softcap=softcap)
    np.testing.assert_allclose(nll, (exact_losses(hidden, head, targets, softcap)[2] * weights).sum(1), rtol=1e-5)


def shapes_in(jaxpr):
    for equation in jaxpr.eqns:
        for variable in equation.outvars:
            yield equation.primitive.name, variable.aval
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda x: hasattr(x, "eqns") or hasattr(x, "jaxpr")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from shapes_in(inner)


def test_never_holds_all_logits(data):
    hidden, head, targets, weights = data
    gradient = jax.grad(lambda h, w: softmax_cross_entropy(h, w, targets, weights, transposed=False, chunk=6)[0], (0, 1))
    largest = max(np.prod(aval.shape) for _, aval in shapes_in(jax.make_jaxpr(gradient)(hidden, head).jaxpr) if V in aval.shape)
    assert largest <= max(6 * V, D * V)


def test_logits_and_softmax_are_float32_under_bfloat16_products(data):
    hidden, head, targets, weights = data
    loss = jax.grad(lambda h, w: softmax_cross_entropy(h, w, targets, weights, transposed=False, dtype=jnp.bfloat16)[0], (0, 1))
    kinds = {(name, aval.dtype.name) for name, aval in shapes_in(jax.make_jaxpr(loss)(hidden, head).jaxpr)}
    assert ("dot_general", "bfloat16") not in kinds
    assert ("exp", "bfloat16") not in kinds and ("log", "bfloat16") not in kinds
    assert {g.dtype for g in loss(hidden, head)} == {jnp.dtype("float32")}


def test_sharded_over_the_batch(data, eight_devices):
    _, head, _, _ = data
    rng = np.random.default_rng(1)
    hidden, targets = jnp.asarray(rng.normal(size=(8, T, D)), jnp.float32), jnp.asarray(rng.integers(0, V, (8, T)))
    mesh = make_mesh(MeshConfig(data=8))

    def step(hidden, targets, head):
        loss = jax.value_and_grad(
            lambda h, w: softmax_cross_entropy(h, w, targets, jnp.ones((8, T)), transposed=False, chunk=24)[0], (0, 1)
        )
        return loss(hidden, head)

    rows = jax.NamedSharding(mesh, jax.P("data"))
    alone = jax.jit(step)(hidden, targets, head)
    spread = jax.jit(step)(
        jax.device_put(hidden, rows), jax.device_put(targets, rows), jax.device_put(head, jax.NamedSharding(mesh, jax.P()))
    )
    for a, b in zip(jax.tree.leaves(alone), jax.tree.leaves(spread), strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-5)
