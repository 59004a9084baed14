"""Schedules at their corners, update rules against their papers in float64, the weight-decay rule listed literally."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from gptjax.config import UserError
from gptjax.train.optimizers import (
    OPTIMIZERS,
    Lengths,
    decay_mask,
    evaluation_params,
    make_optimizer,
    make_schedule,
    parameter_path,
)
from gptjax.train.state import TrainState
from tests.small import GPT2, LLAMA, random_params, small, tree_close, tree_equal

# --- schedules ---------------------------------------------

# peak 1, floor 0.1, 4 steps of warm-up, a run of 20
WARM = {0: 0.25, 1: 0.5, 2: 0.75, 3: 1.0, 4: 1.0}
CORNERS = {
    "constant": ({}, WARM | {5: 1.0, 19: 1.0, 100: 1.0}),
    # halfway from 4 to 20: 0.1 + 0.9 / 2; a quarter: 0.1 + 0.9 * (1 + cos(pi / 4)) / 2
    "cosine": ({}, WARM | {8: 0.1 + 0.45 * (1 + math.sqrt(0.5)), 12: 0.55, 20: 0.1, 100: 0.1}),
    "linear": ({}, WARM | {8: 0.775, 12: 0.55, 16: 0.325, 20: 0.1, 100: 0.1}),
    "wsd": ({"optimizer.decay_steps": 6}, WARM | {5: 1.0, 13: 1.0, 14: 1.0, 15: 0.85, 17: 0.55, 20: 0.1, 100: 0.1}),
    "inverse_sqrt": ({}, WARM | {5: math.sqrt(4 / 5), 16: 0.5, 36: 1 / 3, 400: 0.1, 10**6: 0.1}),
}


@pytest.mark.parametrize("name", CORNERS)
def test_schedule_at_its_corners(name: str) -> None:
    knobs, expected = CORNERS[name]
    config = small(knobs, optimizer__schedule=name, optimizer__learning_rate=1.0, optimizer__warmup_steps=4)
    schedule = make_schedule(config.optimizer, Lengths.of(config, 1.0))
    found = jax.vmap(schedule)(jnp.array(list(expected)))
    np.testing.assert_allclose(found, list(expected.values()), rtol=2e-6)


def test_schedule_without_warm_up_and_with_an_earlier_end() -> None:
    for name in CORNERS:
        config = small(optimizer__schedule=name, optimizer__learning_rate=3.0, optimizer__decay_steps=8)
        schedule = make_schedule(config.optimizer, Lengths.of(config, 1.0))
        assert float(schedule(0)) == 3.0
        if name in ("cosine", "linear"):
            np.testing.assert_allclose([schedule(4), schedule(8), schedule(19)], [1.65, 0.3, 0.3], rtol=1e-6)
    one = small(optimizer__warmup_steps=1, optimizer__learning_rate=2.0)
    np.testing.assert_allclose(make_schedule(one.optimizer, Lengths.of(one, 1.0))(0), 2.0)


def test_lengths_in_other_units_and_refusals() -> None:
    config = small(train__duration_steps=0, train__duration_epochs=2.0, optimizer__warmup_tokens=193, optimizer__decay_epochs=1.5)
    assert Lengths.of(config, 10.0) == Lengths(total=20, warmup=3, decay=15)  # 8 rows of 12 tokens: 193 / 96 is 3 steps
    for knobs, said in (
        ({"optimizer.warmup_steps": 21}, "optimizer.warmup is 21"),
        ({"optimizer.warmup_steps": 5, "optimizer.decay_steps": 5}, "optimizer.decay ends at step 5"),
        ({"optimizer.schedule": "wsd", "optimizer.warmup_steps": 15, "optimizer.decay_steps": 6}, "wsd: 15"),
    ):
        with pytest.raises(UserError, match=said):
            Lengths.of(small(knobs), 1.0)


# --- which parameters decay ---------------------------------------------

DECAYED = {
    "gpt2": {
        "layers/attention/key/kernel",
        "layers/attention/output/kernel",
        "layers/attention/query/kernel",
        "layers/attention/value/kernel",
        "layers/mlp/down/kernel",
        "layers/mlp/up/kernel",
    },
    "llama": {
        "head",
        "layers/attention/key/kernel",
        "layers/attention/output/kernel",
        "layers/attention/query/kernel",
        "layers/attention/value/kernel",
        "layers/mlp/down/kernel",
        "layers/mlp/gate/kernel",
        "layers/mlp/up/kernel",
    },
}


def named(tree: Any) -> dict[str, Any]:
    return {parameter_path(path): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


@pytest.mark.parametrize("kind", DECAYED)
def test_weight_decay_mask(kind: str) -> None:
    config = small(GPT2 if kind == "gpt2" else LLAMA)
    mask = named(decay_mask(config.optimizer, random_params(config)))
    assert {name for name, decays in mask.items() if decays} == DECAYED[kind]
    everything = small(optimizer__no_decay=())
    assert all(named(decay_mask(everything.optimizer, random_params(everything))).values())


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_decay_is_rate_times_weight_decay_times_parameter(name: str) -> None:
    """With gradients of 0 nothing else moves: p (1 - rate * decay), whatever the rule."""
    knobs = LLAMA | {"optimizer.name": name, "optimizer.learning_rate": 0.5, "optimizer.muon_adam_learning_rate": 0.5}
    config = small(knobs, optimizer__weight_decay=0.1, optimizer__schedule="constant")
    params = random_params(config)
    (moved,) = updated(config, params, [jax.tree.map(jnp.zeros_like, params)])
    before, after = named(params), named(moved)
    # schedule-free's first average is all of z, so that its y moves as z does
    for path in before:
        factor = 0.95 if path in DECAYED["llama"] else 1.0
        np.testing.assert_allclose(after[path], factor * before[path], rtol=1e-6, atol=1e-7, err_msg=path)


# --- update rules ---------------------------------------------


def updated(config: Any, params: Any, gradients: list[Any]) -> list[Any]:
    """Parameters after each gradient."""
    optimizer = make_optimizer(config, make_schedule(config.optimizer, Lengths.of(config, 1.0)))

    @jax.jit
    def step(params: Any, state: Any, gradient: Any) -> Any:
        updates, state = optimizer.update(gradient, state, params)
        return optax.apply_updates(params, updates), state

    state, out = jax.jit(optimizer.init)(params), []
    for gradient in gradients:
        params, state = step(params, state, gradient)
        out.append(params)
    return out


def adamw_64(c: Any, rates: list[float], decay: float, p: np.ndarray, gradients: list[np.ndarray]) -> list[np.ndarray]:
    m = v = 0.0
    out = []
    for n, (rate, g) in enumerate(zip(rates, gradients, strict=True), 1):
        m, v = c.beta1 * m + (1 - c.beta1) * g, c.beta2 * v + (1 - c.beta2) * g * g
        direction = (m / (1 - c.beta1**n)) / (np.sqrt(v / (1 - c.beta2**n)) + c.epsilon)
        p = p - rate * direction - rate * decay * p
        out.append(p)
    return out


def lion_64(c: Any, rates: list[float], decay: float, p: np.ndarray, gradients: list[np.ndarray]) -> list[np.ndarray]:
    m = np.zeros_like(p)
    out = []
    for rate, g in zip(rates, gradients, strict=True):
        p = p - rate * np.sign(c.beta1 * m + (1 - c.beta1) * g) - rate * decay * p
        m = c.beta2 * m + (1 - c.beta2) * g
        out.append(p)
    return out


def sgd_64(c: Any, rates: list[float], decay: float, p: np.ndarray, gradients: list[np.ndarray]) -> list[np.ndarray]:
    m = np.zeros_like(p)
    out = []
    for rate, g in zip(rates, gradients, strict=True):
        m = c.beta1 * m + g
        p = p - rate * m - rate * decay * p
        out.append(p)
    return out


def schedule_free_64(c: Any, rates: list[float], decay: float, y: np.ndarray, gradients: list[np.ndarray]) -> list[np.ndarray]:
    """Algorithm 1 of Defazio et al. (2024), with weights of the largest rate so far, squared."""
    x = z = y
    v, weights, largest = 0.0, 0.0, 0.0
    out = []
    for n, (rate, g) in enumerate(zip(rates, gradients, strict=True), 1):
        v = c.beta2 * v + (1 - c.beta2) * g * g
        z = z - rate * (g / (np.sqrt(v / (1 - c.beta2**n)) + c.epsilon) + decay * y)
        largest = max(largest, rate)
        weights += largest**2
        x = x + largest**2 / weights * (z - x)
        y = (1 - c.beta1) * z + c.beta1 * x
        out.append(y)
    return out


RULES: dict[str, Callable[..., list[np.ndarray]]] = {
    "adamw": adamw_64,
    "lion": lion_64,
    "sgd": sgd_64,
    "schedule_free_adamw": schedule_free_64,
}
TINY = {"layers": {"mlp": {"up": {"kernel": (2, 3), "bias": (3,)}}, "mlp_norm": {"scale": (2,)}}, "head": (2, 4)}


def draw(seed: int, shapes: Any = None) -> Any:
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: rng.standard_normal(shape).astype(np.float32), shapes or TINY, is_leaf=lambda leaf: isinstance(leaf, tuple)
    )


RULE = {
    "optimizer.learning_rate": 0.02,
    "optimizer.warmup_steps": 2,
    "optimizer.weight_decay": 0.3,
    "optimizer.beta1": 0.8,
    "optimizer.beta2": 0.9,
    "optimizer.epsilon": 1e-3,
    "optimizer.schedule": "linear",
    "optimizer.final_fraction": 0.0,
    "train.duration_steps": 8,
}


@pytest.mark.parametrize("name", RULES)
def test_update_rule_equals_its_paper(name: str) -> None:
    config = small(RULE, optimizer__name=name)
    rates = [0.01, 0.02, 0.02, 0.02 * 5 / 6, 0.02 * 4 / 6]  # 2 steps up, then down to 0 in 6
    params, gradients = draw(0), [draw(seed) for seed in range(1, 6)]
    found = [named(tree) for tree in updated(config, params, gradients)]
    for path, leaf in named(params).items():
        decay = 0.3 if path.endswith(("kernel", "head")) else 0.0
        series = [named(g)[path].astype(np.float64) for g in gradients]
        expected = RULES[name](config.optimizer, rates, decay, leaf.astype(np.float64), series)
        for n, value in enumerate(expected):
            np.testing.assert_allclose(found[n][path], value, rtol=5e-6, atol=1e-6, err_msg=f"{path}, step {n}")


def test_sgd_without_momentum_is_the_gradient() -> None:
    config = small(optimizer__name="sgd", optimizer__beta1=0.0, optimizer__learning_rate=0.1, optimizer__schedule="constant",
                   optimizer__weight_decay=0.0)  # fmt: skip
    params, gradient = draw(0), draw(1)
    (moved,) = updated(config, params, [gradient])
    tree_close(moved, jax.tree.map(lambda p, g: p - 0.1 * g, params, gradient), rtol=1e-6, atol=1e-7)


def test_adafactor_steps_are_bounded_by_the_rate() -> None:
    """Its update has a root mean square of at most 1 a parameter; unfactored, the first step is the sign."""
    config = small(
        optimizer__name="adafactor", optimizer__learning_rate=0.1, optimizer__schedule="constant", optimizer__weight_decay=0.0
    )
    params = draw(0)
    first, *later = updated(config, params, [draw(seed) for seed in range(1, 4)])
    tree_close(first, jax.tree.map(lambda p, g: p - 0.1 * np.sign(g), params, draw(1)), rtol=1e-4, atol=1e-5)
    for before, after in zip([first, *later], later, strict=False):
        for change in jax.tree.leaves(jax.tree.map(lambda a, b: np.sqrt(np.mean((np.asarray(a) - b) ** 2)), after, before)):
            assert 0 < change <= 0.1 * (1 + 1e-5)


MATRICES = {  # a kernel of the blocks as [inputs, outputs] of one layer
    "layers/attention/query/kernel": (16, 16),
    "layers/attention/key/kernel": (16, 8),
    "layers/attention/value/kernel": (16, 8),
    "layers/attention/output/kernel": (16, 16),
    "layers/mlp/up/kernel": (16, 24),
    "layers/mlp/gate/kernel": (16, 24),
    "layers/mlp/down/kernel": (24, 16),
}


def test_muon_on_stacked_layers_is_muon_on_each_matrix() -> None:
    knobs = LLAMA | RULE | {"optimizer.muon_adam_learning_rate": 0.005}
    config = small(knobs, optimizer__name="muon")
    params = random_params(config)
    gradients = [random_params(config, seed) for seed in (1, 2, 3)]
    found = named(updated(config, params, gradients)[-1])
    assert set(MATRICES) == {path for path in found if path.endswith("kernel")}

    schedule = make_schedule(config.optimizer, Lengths.of(config, 1.0))
    # every matrix of every layer is a parameter of its own, [inputs, outputs], as optax takes them by default
    alone = optax.contrib.muon(schedule, beta=0.95, weight_decay=0.3)
    flat = [
        {
            f"{path} {layer}": jnp.asarray(named(tree)[path][layer]).reshape(shape)
            for path, shape in MATRICES.items()
            for layer in (0, 1)
        }
        for tree in (params, *gradients)
    ]
    matrices, update = flat[0], jax.jit(alone.update)
    state = jax.jit(alone.init)(matrices)
    for gradient in flat[1:]:
        updates, state = update(gradient, state, matrices)
        matrices = optax.apply_updates(matrices, updates)
    for path, shape in MATRICES.items():
        for layer in (0, 1):
            mine = found[path][layer].reshape(shape)
            np.testing.assert_allclose(mine, matrices[f"{path} {layer}"], rtol=1e-4, atol=1e-5, err_msg=path)

    adamw = small(knobs, optimizer__name="adamw", optimizer__learning_rate=0.005)
    expected = named(updated(adamw, params, gradients)[-1])
    for path in set(found) - set(MATRICES):
        np.testing.assert_allclose(found[path], expected[path], rtol=1e-5, atol=1e-6, err_msg=path)


def test_schedule_free_evaluates_its_average() -> None:
    """On a quadratic, x is the mean of z, weighed by the squared rate; computed here without the recursion."""
    config = small(optimizer__name="schedule_free_adamw", optimizer__learning_rate=0.1, optimizer__schedule="constant",
                   optimizer__weight_decay=0.0, optimizer__warmup_steps=3)  # fmt: skip
    c = config.optimizer
    optimizer = make_optimizer(config, make_schedule(c, Lengths.of(config, 1.0)))
    params = {"head": jnp.array([1.0, -2.0])}
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    rates = [0.1 * min(n / 3, 1) for n in range(1, 7)]
    z = y = np.array([1.0, -2.0])
    v, iterates = 0.0, []
    for n, rate in enumerate(rates, 1):
        updates, state = update(params, state, params)  # the gradient of |y|^2 / 2
        params = optax.apply_updates(params, updates)
        v = c.beta2 * v + (1 - c.beta2) * y * y
        z = z - rate * y / (np.sqrt(v / (1 - c.beta2**n)) + c.epsilon)
        iterates.append(z)
        average = np.average(iterates, axis=0, weights=np.square(rates[:n]))
        y = (1 - c.beta1) * z + c.beta1 * average
    zero = jnp.int32(0)
    whole = TrainState(zero, params, state, None, zero, zero, zero)
    np.testing.assert_allclose(params["head"], y, rtol=1e-5)
    np.testing.assert_allclose(evaluation_params(c, whole)["head"], average, rtol=1e-5)
    assert np.abs(average - y).max() > 1e-3
    tree_equal(evaluation_params(c, whole.replace(ema_params={"head": jnp.zeros(2)})), {"head": jnp.zeros(2)})


@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_each_expert_is_a_matrix_of_its_own(name: str) -> None:
    """[L, E, in, out] and the router's [L, in, E]: each matrix is updated as if it stood alone."""
    rng = np.random.default_rng(0)
    shapes = {"up": (2, 3, 128, 130), "router": (2, 128, 3)}
    config = small(optimizer__name=name)
    optimizer = make_optimizer(config, lambda n: 0.1)

    def update(params: Any, gradients: Any) -> Any:
        return optimizer.update(gradients, optimizer.init(params), params)[0]

    def tree(arrays: dict[str, np.ndarray]) -> Any:
        return {"layers": {"experts": {part: {"kernel": array} for part, array in arrays.items()}}}

    params, gradients = ({part: rng.normal(size=shape).astype(np.float32) for part, shape in shapes.items()} for _ in range(2))
    gradients["up"][0, 1] *= 9  # a norm over all experts would show
    found = update(tree(params), tree(gradients))["layers"]["experts"]
    for layer, expert in ((0, 1), (1, 2)):
        alone = [{"layers": {"mlp": {"up": {"kernel": arrays["up"][layer, expert][None]}}}} for arrays in (params, gradients)]
        expected = update(*alone)["layers"]["mlp"]["up"]["kernel"][0]
        np.testing.assert_allclose(found["up"]["kernel"][layer, expert], expected, rtol=1e-3, atol=1e-5)
    alone = [tree({"router": arrays["router"][1:]}) for arrays in (params, gradients)]
    expected = update(*alone)["layers"]["experts"]["router"]["kernel"][0]
    np.testing.assert_allclose(found["router"]["kernel"][1], expected, rtol=1e-3, atol=1e-5)


def test_adafactor_factors_the_second_moments_of_heads_and_takes_each_layer_by_itself() -> None:
    """A query kernel [L, D, N, H] with N * H >= 128 keeps a row and a column a layer; its update is optax's on [D, N * H]."""
    layers, width, heads, head_dim = 2, 128, 4, 32
    rng = np.random.default_rng(0)
    tree = {"layers": {"attention": {"query": {"kernel": rng.normal(size=(layers, width, heads, head_dim)).astype(np.float32)}}}}
    gradients = jax.tree.map(
        lambda leaf: rng.normal(size=leaf.shape).astype(np.float32) * np.float32([1, 9])[:, None, None, None], tree
    )
    config = small(
        optimizer__name="adafactor", optimizer__learning_rate=0.1, optimizer__schedule="constant", optimizer__weight_decay=0.0
    )
    optimizer = make_optimizer(config, lambda n: 0.1)
    state = optimizer.init(tree)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) < 4 * layers * width
    updates, _ = optimizer.update(gradients, state, tree)
    alone = optax.chain(optax.scale_by_factored_rms(), optax.clip_by_block_rms(1.0), optax.scale(-0.1))
    for layer in range(layers):
        matrix = gradients["layers"]["attention"]["query"]["kernel"][layer].reshape(width, heads * head_dim)
        expected, _ = alone.update(jnp.asarray(matrix), alone.init(jnp.asarray(matrix)), jnp.asarray(matrix))
        found = updates["layers"]["attention"]["query"]["kernel"][layer].reshape(width, heads * head_dim)
        np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)
