"""SOAP, Prodigy and cautious updates against float64 rewritings of their papers; Sophia's estimate of the curvature."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.train.loss import sampled_targets
from gptjax.train.objectives import causal
from gptjax.train.optimizers import make_optimizer
from gptjax.train.step import curvature, hidden_states
from tests.small import random_batch, random_params, small
from tests.train.test_optimizers import RULE, adamw_64, draw, lion_64, named, updated

# Two layers; heads [2, 2] that are one axis of 4; two experts; an embedding and a head.
SHAPES = {
    "layers": {
        "attention": {"output": {"kernel": (2, 2, 2, 4)}},
        "experts": {"up": {"kernel": (2, 2, 3, 4)}},
        "mlp": {"up": {"kernel": (2, 4, 5), "bias": (2, 5)}},
    },
    "embed": {"tokens": (6, 4)},
    "head": (4, 6),
}
MATRICES = {"layers/attention/output/kernel": (2, 4, 4), "layers/experts/up/kernel": (4, 3, 4), "layers/mlp/up/kernel": (2, 4, 5)}
RATES = [0.01, 0.02, 0.02, 0.02 * 5 / 6, 0.02 * 4 / 6, 0.02 * 3 / 6]  # RULE's
DECAY = 0.3


def series(path: str, trees: list[Any]) -> list[np.ndarray]:
    return [named(tree)[path].astype(np.float64) for tree in trees]


def soap_64(c: Any, p: np.ndarray, gradients: list[np.ndarray], right_basis: bool = True) -> list[np.ndarray]:
    """One matrix, by Algorithm 3 of Vyas et al. (2024) with the authors' first step: it makes the bases and moves nothing."""

    def iterate(factor: np.ndarray, basis: np.ndarray, times: int) -> np.ndarray:
        for _ in range(times):
            size = len(factor)
            basis = np.linalg.qr((factor * size / np.trace(factor) + 1e-2 * np.eye(size)) @ basis)[0]
        return basis

    rows, columns = p.shape
    left, right, ql, qr = np.zeros((rows, rows)), np.zeros((columns, columns)), np.eye(rows), np.eye(columns)
    m = v = np.zeros_like(p)
    out = []
    for t, (rate, g) in enumerate(zip(RATES, gradients, strict=True)):
        direction = np.zeros_like(p)
        if t:
            m, v = c.beta1 * m + (1 - c.beta1) * g, c.beta2 * v + (1 - c.beta2) * (ql.T @ g @ qr) ** 2
            adam = (ql.T @ m @ qr) / (1 - c.beta1**t) / (np.sqrt(v / (1 - c.beta2**t)) + c.epsilon)
            direction = ql @ adam @ qr.T
        p = p - rate * direction - rate * DECAY * p
        left, right = c.beta2 * left + (1 - c.beta2) * g @ g.T, c.beta2 * right + (1 - c.beta2) * g.T @ g
        times = 10 if t == 0 else int(t % c.soap_refresh_every == 0)
        ql, qr = iterate(left, ql, times), iterate(right, qr, times) if right_basis else qr
        out.append(p)
    return out


@pytest.mark.parametrize("max_dim", [8192, 4])
def test_soap_equals_its_paper_on_each_matrix(max_dim: int) -> None:
    config = small(RULE, optimizer__name="soap", optimizer__soap_refresh_every=2, optimizer__soap_max_dim=max_dim)
    params, gradients = draw(0, SHAPES), [draw(seed, SHAPES) for seed in range(1, 7)]
    found = [named(tree) for tree in updated(config, params, gradients)]
    for path, leaf in named(params).items():
        g = series(path, gradients)
        if path not in MATRICES:  # AdamW
            decay = DECAY if path == "head" else 0.0
            for n, value in enumerate(adamw_64(config.optimizer, RATES, decay, leaf.astype(np.float64), g)):
                np.testing.assert_allclose(found[n][path], value, rtol=1e-5, atol=1e-6, err_msg=f"{path}, step {n}")
            continue
        shape = MATRICES[path]
        for number in range(shape[0]):
            one = [x.reshape(shape)[number] for x in (leaf.astype(np.float64), *g)]
            for n, value in enumerate(soap_64(config.optimizer, one[0], one[1:], shape[2] <= max_dim)):
                mine = found[n][path].reshape(shape)[number]
                np.testing.assert_allclose(mine, value, rtol=1e-5, atol=1e-5, err_msg=f"{path}, {number}, step {n}")


def test_soap_finds_the_eigenbasis() -> None:
    """Of gradients whose covariance is known, as numpy's eigendecomposition has it."""
    rng = np.random.default_rng(0)
    axes = np.linalg.qr(rng.normal(size=(4, 4)))[0]
    made = axes * [8, 4, 2, 1] @ rng.normal(size=(12, 4, 5))
    gradients = [{"layers": {"mlp": {"up": {"kernel": g[None].astype(np.float32)}}}} for g in made]
    config = small(optimizer__name="soap", optimizer__soap_refresh_every=1, optimizer__beta2=0.99)
    state = final_state(config, gradients[0], gradients)
    left, basis = (next(np.asarray(x)[0] for k, x in named(state).items() if f"/{part}/" in k) for part in ("left", "left_basis"))
    expected = np.linalg.eigh(left.astype(np.float64))[1][:, ::-1]
    np.testing.assert_allclose(np.abs(expected.T @ basis), np.eye(4), atol=0.02)


def final_state(config: Any, params: Any, gradients: list[Any]) -> Any:
    optimizer = make_optimizer(config, lambda n: 0.1, 20)
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    for gradient in gradients:
        _, state = update(gradient, state, params)
    return state


def prodigy_64(c: Any, params: Any, gradients: list[Any], factor: Any, decay: Any) -> tuple[list[Any], list[float]]:
    """Algorithm 4 of Mishchenko & Defazio (2023) on a dict of arrays; a parameter p is factor times a variable z of its own."""
    z0 = {k: p / factor(k) for k, p in params.items()}
    z, zero = dict(z0), {k: np.zeros_like(p) for k, p in params.items()}
    m, v, s, r, d = dict(zero), dict(zero), dict(zero), 0.0, c.prodigy_initial_rate
    out, distances = [], []
    for rate, gradient in zip(RATES, gradients, strict=True):
        rate = 100 * rate
        g = {k: factor(k) * x for k, x in gradient.items()}
        root = np.sqrt(c.beta2)
        m = {k: c.beta1 * m[k] + (1 - c.beta1) * d * g[k] for k in g}
        v = {k: c.beta2 * v[k] + (1 - c.beta2) * d**2 * g[k] ** 2 for k in g}
        r = root * r + (1 - root) * rate * d**2 * sum((g[k] * (z0[k] - z[k])).sum() for k in g)
        s = {k: root * s[k] + (1 - root) * rate * d**2 * g[k] for k in g}
        # epsilon belongs to the gradient as it came
        z = {k: z[k] - rate * d * (m[k] / (np.sqrt(v[k]) + d * factor(k) * c.epsilon) + decay(k) * factor(k) * z[k]) for k in g}
        d = max(d, r / sum(np.abs(x).sum() for x in s.values()))
        out.append({k: factor(k) * z[k] for k in g})
        distances.append(d)
    return out, distances


@pytest.mark.parametrize("groups", [(), ("head=lr:3.0",)])
def test_prodigy_equals_its_paper(groups: tuple[str, ...]) -> None:
    """With gradients that keep their direction, so that the distance grows."""
    config = small(RULE, optimizer__name="prodigy", optimizer__learning_rate=2.0, optimizer__groups=groups,
                   optimizer__prodigy_initial_rate=0.01)  # fmt: skip
    params = draw(0, SHAPES)
    gradients = [jax.tree.map(lambda p, seed=seed: np.float32(p * (0.9 + 0.01 * seed)), params) for seed in range(6)]
    found = [named(tree) for tree in updated(config, params, gradients)]
    start, *rest = ({k: x.astype(np.float64) for k, x in named(tree).items()} for tree in (params, *gradients))
    expected, distances = prodigy_64(
        config.optimizer,
        start,
        rest,
        factor=lambda k: 3.0 if groups and k == "head" else 1.0,
        # decay is a part of the step, which the factor multiplies once
        decay=lambda k: DECAY if k.endswith(("kernel", "head")) else 0.0,
    )
    assert distances[-1] > distances[0] > 0
    for n, tree in enumerate(expected):
        for path, value in tree.items():
            np.testing.assert_allclose(found[n][path], value, rtol=1e-5, atol=1e-6, err_msg=f"{path}, step {n}")


@pytest.mark.parametrize("name", ["adamw", "lion"])
def test_cautious_updates_drop_what_goes_against_the_gradient(name: str) -> None:
    """Algorithm 2 of Liang et al. (2024); the share that is left is of each layer's and expert's array."""
    config = small(RULE, optimizer__name=name, optimizer__cautious=True, optimizer__groups=("head=decay:0.5",))
    params, gradients = draw(0, SHAPES), [draw(seed, SHAPES) for seed in range(1, 7)]
    found = [named(tree) for tree in updated(config, params, gradients)]
    rule = {"adamw": adamw_64, "lion": lion_64}[name]
    dropped = 0
    for path, leaf in named(params).items():
        decay = DECAY if path.endswith("kernel") else DECAY / 2 if path == "head" else 0.0
        g = series(path, gradients)
        # from 0 and without decay, what the plain rule adds at each step
        plain = np.diff([np.zeros(leaf.shape), *rule(config.optimizer, RATES, 0.0, np.zeros(leaf.shape), g)], axis=0)
        p = leaf.astype(np.float64)
        own = tuple(range(0 if path in ("head", "embed/tokens") else 2 if "experts" in path else 1, leaf.ndim))
        for n, (rate, step, gradient) in enumerate(zip(RATES, plain, g, strict=True)):
            mask = -step * gradient > 0
            p = p + step * mask / np.maximum(mask.mean(axis=own, keepdims=True), 1e-3) - rate * decay * p
            dropped += (~mask).sum()
            np.testing.assert_allclose(found[n][path], p, rtol=1e-5, atol=1e-6, err_msg=f"{path}, step {n}")
    assert dropped > 50


# --- Sophia's estimate ---------------------------------------------


def test_targets_are_drawn_from_the_model_and_not_by_chunk() -> None:
    """Their frequencies are the softmax's, within 5 standard deviations."""
    rng = np.random.default_rng(0)
    hidden, table = rng.normal(size=(1, 1, 4)).astype(np.float32), rng.normal(size=(5, 4)).astype(np.float32)
    keys = jnp.asarray(rng.integers(0, 2**32, (40, 100, 2), np.uint32))
    draws = [
        sampled_targets(jnp.broadcast_to(hidden, (40, 100, 4)), table, keys, transposed=True, chunk=chunk) for chunk in (0, 1200)
    ]
    np.testing.assert_array_equal(*draws)
    logits = (hidden[0, 0] @ table.T).astype(np.float64)
    shares = np.exp(logits) / np.exp(logits).sum()
    counts = np.bincount(np.asarray(draws[0]).ravel(), minlength=5)
    assert (np.abs(counts - 4000 * shares) < 5 * np.sqrt(4000 * shares * (1 - shares))).all()


def test_curvature_is_the_gauss_newton_diagonal_on_average() -> None:
    """For the head of a softmax it is sum of x^2 p (1 - p) over targets, by their number: known without sampling."""
    config = small(model__num_layers=1, model__tied_embeddings=False, objective__label_smoothing=0.1, objective__z_loss=0.1)
    params, batch = random_params(config), random_batch(config)
    draws = 300
    estimate = jax.jit(jax.vmap(lambda key: curvature(config, params, batch, key)["head"]))
    found = np.asarray(estimate(jax.random.split(jax.random.key(0), draws)), np.float64)
    example = causal({name: jnp.asarray(value) for name, value in batch.items()})
    x = np.asarray(hidden_states(config, params, example)[0], np.float64).reshape(-1, config.model.model_dim)
    logits = x @ np.asarray(params["head"], np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    weights = np.asarray(example.weights, np.float64).ravel()
    expected = np.einsum("n,nd,nv->dv", weights, x**2, p * (1 - p)) / weights.sum()
    error = found.std(axis=0) / np.sqrt(draws)
    assert (np.abs(found.mean(0) - expected) < 6 * error).all()  # of 368 numbers
    sums = found.sum((1, 2))
    assert abs(sums.mean() - expected.sum()) < 4 * sums.std() / np.sqrt(draws) < 0.06 * expected.sum()
