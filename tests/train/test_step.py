"""The training step: one gradient however a batch is split, what a gradient that is not finite does, and types."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import MeshConfig
from gptjax.model import primitives
from gptjax.model.decoder import Decoder
from gptjax.parallel.mesh import make_mesh
from gptjax.train.groups import parameter_path
from gptjax.train.objectives import causal
from gptjax.train.optimizers import Lengths, evaluation_params
from gptjax.train.step import abstract_state, example_loss, init_state, make_train_step, summed_gradients
from tests.small import GPT2, LLAMA, random_batch, random_params, small, tree_close, tree_equal

MESH = make_mesh(MeshConfig(data=1))


def start(config: Any, params: Any = None) -> Any:
    lengths = Lengths.of(config, 1.0)
    return init_state(config, lengths, MESH, params), make_train_step(config, lengths, MESH)


def on_host(tree: Any) -> Any:
    return jax.tree.map(np.array, tree)


# --- accumulation ---------------------------------------------

DROPOUT = {"model.embedding_dropout": 0.1, "model.attention_dropout": 0.2, "model.residual_dropout": 0.2, "model.num_layers": 1}


def uneven_batch(config: Any) -> dict[str, np.ndarray]:
    """Masks of very different sizes; even rows, which are a whole micro-batch of 2, 4 or 8, count for nothing."""
    rng = np.random.default_rng(5)
    share = np.array([0, 1.0, 0, 0.2, 0, 0.6, 0, 0.05])[:, None]
    batch = random_batch(config, seed=4)
    return batch | {"loss_mask": (rng.random(batch["tokens"].shape) < share).astype(np.float32)}


@pytest.fixture(scope="module")
def whole_batch() -> Any:
    config = small(DROPOUT)
    params, batch = random_params(config), uneven_batch(config)
    keys = primitives.row_keys(jax.random.key(7), jnp.arange(8))
    return params, batch, keys, jax.jit(lambda p: summed_gradients(config, p, batch, keys))(params)


@pytest.mark.parametrize("parts", [2, 4, 8])
def test_accumulation_changes_nothing(parts: int, whole_batch: Any) -> None:
    """Only the order of some hundred float32 additions differs: 2e-6 of the largest gradient is 17 roundings."""
    params, batch, keys, (gradients, sums) = whole_batch
    config = small(DROPOUT, train__accumulation_steps=parts)
    masked = batch["loss_mask"].reshape(8 // parts, parts, -1).sum((0, 2))
    assert (masked == 0).any() and len(set(masked)) > 1, "the test wants an empty micro-batch and uneven ones"
    split_gradients, split_sums = jax.jit(lambda p: summed_gradients(config, p, batch, keys))(params)
    assert split_sums["weight_sum"] == sums["weight_sum"] == causal(batch).weights.sum()
    for name in ("loss_sum", "nll_sum"):
        np.testing.assert_allclose(split_sums[name], sums[name], rtol=2e-6)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients))
    tree_close(split_gradients, gradients, rtol=1e-5, atol=2e-6 * largest)


# --- objective ---------------------------------------------


@pytest.mark.parametrize(("smoothing", "z_loss"), [(0.0, 0.0), (0.15, 0.01)])
def test_loss_equals_float64_formulas(smoothing: float, z_loss: float) -> None:
    config = small(LLAMA, objective__label_smoothing=smoothing, objective__z_loss=z_loss, model__num_layers=1)
    params, batch = random_params(config), random_batch(config, rows=3)
    example = causal(batch | {"loss_mask": np.random.default_rng(0).integers(0, 2, batch["tokens"].shape)})
    logits, _ = Decoder(config.model).apply(
        {"params": params}, example.inputs, example.positions, segment_ids_BT=example.segment_ids
    )
    logits = np.asarray(logits, np.float64)
    weights = np.asarray(example.weights)
    normaliser = np.log(np.exp(logits).sum(-1))
    log_p = logits - normaliser[..., None]
    target = (1 - smoothing) * np.eye(23)[example.targets] + smoothing / 23
    expected = ((-(target * log_p).sum(-1) + z_loss * normaliser**2) * weights).sum()
    nll = (-np.take_along_axis(log_p, np.asarray(example.targets)[..., None], -1)[..., 0] * weights).sum()
    loss, parts = example_loss(config, params, example, None)
    np.testing.assert_allclose([loss, parts["nll_sum"], parts["weight_sum"]], [expected, nll, weights.sum()], rtol=1e-5)


def test_causal_targets_by_hand() -> None:
    batch = {
        "tokens": np.array([[5, 6, 7, 8, 9, 0, 0]]),
        "segment_ids": np.array([[1, 1, 1, 2, 2, 0, 0]]),
        "positions": np.array([[0, 1, 2, 0, 1, 0, 0]]),
    }
    example = causal(batch)
    assert example.inputs.tolist() == [[5, 6, 7, 8, 9, 0]] and example.targets.tolist() == [[6, 7, 8, 9, 0, 0]]
    assert example.weights.tolist() == [[1, 1, 0, 1, 0, 0]], "no document predicts the next one's first token, nor padding"
    assert example.positions.tolist() == [[0, 1, 2, 0, 1, 0]] and example.segment_ids.tolist() == [[1, 1, 1, 2, 2, 0]]
    masked = causal(batch | {"loss_mask": np.array([[0, 0, 1, 1, 1, 1, 1]])})
    assert masked.weights.tolist() == [[0, 1, 0, 1, 0, 0]], "the mask is of targets"


# --- one step ---------------------------------------------

RUN = {"optimizer.learning_rate": 0.01, "optimizer.warmup_steps": 4, "optimizer.ema_decay": 0.9, "model.num_layers": 1}


def test_a_gradient_that_is_not_finite_moves_nothing_but_counters() -> None:
    config = small(RUN)
    state, step = start(config)
    good = [random_batch(config, seed) | {"loss_mask": np.ones((8, 13), np.float32)} for seed in (0, 1)]
    bad = good[0] | {"loss_mask": np.where(np.arange(13) == 1, np.inf, 1.0).astype(np.float32)[None].repeat(8, 0)}
    nan = good[0] | {"loss_mask": np.full((8, 13), np.nan, np.float32)}

    state, metrics = step(state, good[0])
    assert int(metrics["nonfinite_steps"]) == int(metrics["nonfinite_streak"]) == 0
    before = on_host(state)
    for number, batch in enumerate((bad, nan), 1):
        state, metrics = step(state, batch)
        assert not np.isfinite(metrics["loss"]) or not np.isfinite(metrics["gradient_norm"])
        for name in ("params", "opt_state", "ema_params"):
            tree_equal(getattr(state, name), getattr(before, name))
        assert int(state.nonfinite_streak) == int(metrics["nonfinite_streak"]) == number
        assert int(state.nonfinite_steps) == int(metrics["nonfinite_steps"]) == number
        assert int(state.step) == 1 + number
    state, metrics = step(state, good[1])
    assert (int(state.nonfinite_streak), int(state.nonfinite_steps), int(state.step)) == (0, 2, 4)

    other, _ = start(config)
    for batch in good:
        other, other_metrics = step(other, batch)
    for name in ("params", "opt_state", "ema_params"):
        tree_equal(getattr(state, name), getattr(other, name))
    assert metrics["learning_rate"] == other_metrics["learning_rate"]


def test_steps_learn_compile_once_and_donate() -> None:
    config = small(RUN, model__residual_dropout=0.1, train__duration_steps=20, model__num_layers=2)
    state, step = start(config)
    batch = random_batch(config)
    losses, rates = [], []
    average = on_host(state.ema_params)
    tree_equal(average, state.params)
    for _ in range(20):
        old = jax.tree.leaves(state)
        state, metrics = step(state, batch)
        assert all(leaf.is_deleted() for leaf in old)
        average = jax.tree.map(lambda a, p: 0.9 * a + 0.1 * np.asarray(p), average, state.params)
        losses.append(float(metrics["loss"]))
        rates.append(float(metrics["learning_rate"]))
    assert step.compiled._cache_size() == 1
    assert losses[-1] < losses[0] - 0.3
    np.testing.assert_allclose(rates[:5], [0.0025, 0.005, 0.0075, 0.01, 0.01], rtol=1e-6)
    tree_close(state.ema_params, average, rtol=1e-5, atol=1e-6)
    tree_equal(evaluation_params(config, state), state.ema_params)
    assert make_train_step(config, Lengths.of(config, 1.0), MESH) is step
    shapes = abstract_state(config, Lengths.of(config, 1.0), MESH)
    for leaf, shape in zip(jax.tree.leaves(state), jax.tree.leaves(shapes), strict=True):
        assert (leaf.shape, leaf.dtype, leaf.sharding) == (shape.shape, shape.dtype, shape.sharding)


def test_clipping_scales_the_whole_gradient_and_logs_the_norm_before() -> None:
    """SGD without momentum at a rate of 1 moves parameters by the gradient that it is given."""
    config = small(model__num_layers=1, optimizer__name="sgd", optimizer__beta1=0.0, optimizer__weight_decay=0.0,
                   optimizer__learning_rate=1.0, optimizer__schedule="constant", optimizer__clip_norm=0.25)  # fmt: skip
    params, batch = random_params(config), random_batch(config)
    gradients, sums = jax.jit(lambda p: summed_gradients(config, p, batch, None))(params)
    gradients = jax.tree.map(lambda g: np.asarray(g, np.float64) / float(sums["weight_sum"]), gradients)
    norm = np.sqrt(sum((g**2).sum() for g in jax.tree.leaves(gradients)))
    assert norm > 0.5, "the test wants a gradient to clip"
    state, step = start(config, params)
    state, metrics = step(state, batch)
    np.testing.assert_allclose(metrics["gradient_norm"], norm, rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], sums["loss_sum"] / sums["weight_sum"], rtol=1e-6)
    moved = jax.tree.map(lambda p, new: np.asarray(p, np.float64) - new, params, state.params)
    tree_close(moved, jax.tree.map(lambda g: g * 0.25 / norm, gradients), rtol=1e-4, atol=1e-6)


def test_schedule_free_starts_from_given_parameters() -> None:
    """Its second copy of them must not be the same buffer, or donation takes it twice."""
    config = small(RUN, optimizer__name="schedule_free_adamw", optimizer__ema_decay=0.0)
    params = random_params(config)
    state, step = start(config, params)
    for seed in range(2):
        state, _ = step(state, random_batch(config, seed))
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    found, given = evaluation_params(config, state), params
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(found))
    assert not np.array_equal(found["embed"]["tokens"], given["embed"]["tokens"])


# --- types under bfloat16, read from the jaxpr ---------------------------------------------


def equations(jaxpr: Any) -> Any:
    for equation in jaxpr.eqns:
        yield equation
        for parameter in jax.tree.leaves(equation.params, is_leaf=lambda leaf: hasattr(leaf, "eqns") or hasattr(leaf, "jaxpr")):
            inner = getattr(parameter, "jaxpr", parameter)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def operands(jaxpr: Any, names: set[str]) -> list[tuple[str, tuple[int, ...], str]]:
    return [
        (equation.primitive.name, variable.aval.shape, str(variable.aval.dtype))
        for equation in equations(jaxpr)
        if equation.primitive.name in names
        for variable in equation.invars
    ]


@pytest.mark.parametrize("kind", [GPT2, LLAMA], ids=["gpt2", "llama"])
@pytest.mark.parametrize("backend", ["dense", "blockwise"])
def test_float32_where_it_must_be(kind: dict[str, Any], backend: str) -> None:
    """ReLU, so that every exponential belongs to a softmax or the loss; only the vocabulary has 29 rows."""
    sizes = {"model.activation": "relu", "model.mlp_dim": 40, "model.vocab_size": 29, "model.dtype": "bfloat16"}
    config = small(kind, sizes, model__attention=backend)
    params, batch = random_params(config), random_batch(config)
    assert {str(leaf.dtype) for leaf in jax.tree.leaves(params)} == {"float32"}

    def loss(p: Any) -> Any:
        return example_loss(config, p, causal(batch), None)[0]

    forward, both = jax.make_jaxpr(loss)(params), jax.make_jaxpr(jax.value_and_grad(loss))(params)
    assert {str(variable.aval.dtype) for variable in both.jaxpr.outvars} == {"float32"}, "loss and gradients"
    statistics = operands(both.jaxpr, {"exp", "exp2", "log", "log1p", "rsqrt", "sqrt", "logistic", "erf", "tanh"})
    assert {"exp", "log", "rsqrt"} <= {name for name, _, _ in statistics}
    assert {dtype for _, _, dtype in statistics} == {"float32"}
    sums = operands(forward.jaxpr, {"reduce_sum", "reduce_max", "cumsum", "reduce_precision", "argmax"})
    assert {dtype for _, shape, dtype in sums if dtype.startswith(("f", "bf"))} == {"float32"}

    products = [equation for equation in equations(forward.jaxpr) if equation.primitive.name == "dot_general"]
    head = [equation for equation in products if any(29 in variable.aval.shape for variable in equation.invars)]
    assert head and all(str(equation.outvars[0].aval.dtype) == "float32" for equation in head), "logits"
    for equation in products:
        assert {str(variable.aval.dtype) for variable in equation.invars} == {"bfloat16"}, equation


def test_state_is_float32_under_bfloat16_compute() -> None:
    config = small(RUN, model__dtype="bfloat16")
    state = abstract_state(config, Lengths.of(config, 1.0), MESH)
    for path, leaf in jax.tree_util.tree_leaves_with_path((state.params, state.opt_state, state.ema_params)):
        assert leaf.dtype == (np.int32 if leaf.shape == () else np.float32), parameter_path(path)
