"""The mixture of experts against loops over tokens and experts in float64."""

from __future__ import annotations

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from gptjax.config import ModelConfig, UserError
from gptjax.generate.decode import generate_tokens
from gptjax.generate.settings import GenerationConfig
from gptjax.model.attention import Cache
from gptjax.model.decoder import Decoder
from gptjax.model.experts import ExpertMLP, RouterStats, capacity, router_losses
from gptjax.train.objectives import causal
from gptjax.train.step import example_loss, summed_gradients
from tests.small import random_batch, random_params, small, tree_close

pytestmark = pytest.mark.usefixtures("unoptimised")

ROWS, LENGTH = 3, 12


def erf(x: np.ndarray) -> np.ndarray:
    return np.vectorize(math.erf)(x)


ACTIVATION_64 = {
    "gelu": lambda x: 0.5 * x * (1 + erf(x / math.sqrt(2))),
    "silu": lambda x: x / (1 + np.exp(-x)),
}


def mlp_64(c: ModelConfig, p: Any, x: np.ndarray, expert: int | None = None) -> np.ndarray:
    """Of one vector, by the weights of one expert, or by weights without an axis of experts."""

    def linear(name: str, x: np.ndarray) -> np.ndarray:
        own = {key: value if expert is None else value[expert] for key, value in p[name].items()}
        return x @ own["kernel"] + own.get("bias", 0.0)

    hidden = ACTIVATION_64[c.activation](linear("gate" if c.gated_mlp else "up", x))
    return linear("down", hidden * linear("up", x) if c.gated_mlp else hidden)


def experts_64(c: ModelConfig, p: Any, x: np.ndarray, real: np.ndarray) -> tuple[np.ndarray, dict]:
    """([B, T, D], the router's sums and losses), token by token and expert by expert."""
    k, experts = c.experts_per_token, c.num_experts
    y, chosen, probability = np.zeros_like(x), np.zeros(experts), np.zeros(experts)
    tokens = squared_z = dropped = 0.0
    for row in range(x.shape[0]):
        places = dict.fromkeys(range(experts), 0)
        for t in range(x.shape[1]):
            if c.num_shared_experts:
                y[row, t] += mlp_64(c, p["shared"], x[row, t])
            if not real[row, t]:
                continue
            logits = x[row, t] @ p["router"]["kernel"]
            p_all = np.exp(logits) / np.exp(logits).sum()
            best = sorted(range(experts), key=lambda expert: -p_all[expert])[:k]
            total = sum(p_all[expert] for expert in best) if c.router_normalize_top_k else 1.0
            tokens, squared_z, probability = tokens + 1, squared_z + np.log(np.exp(logits).sum()) ** 2, probability + p_all
            for expert in best:
                chosen[expert] += 1
                if c.expert_capacity_factor and places[expert] == capacity(c, x.shape[1]):
                    dropped += 1
                    continue
                places[expert] += 1
                y[row, t] += p_all[expert] / total * mlp_64(c, p, x[row, t], expert)
    balance = experts * np.sum(chosen / (k * tokens) * probability / tokens)
    return y, {"dropped": dropped, "chosen": chosen, "load_balance": balance, "router_z": squared_z / tokens}


def model(**knobs: Any) -> ModelConfig:
    sizes = {"num_experts": 4, "expert_mlp_dim": 6, "activation": "silu"}
    return small({f"model.{name}": value for name, value in (sizes | knobs).items()}).model


CASES = {
    "top 1 dropless": {"experts_per_token": 1, "router_normalize_top_k": False},
    "top 1 with capacity": {"experts_per_token": 1, "router_normalize_top_k": False, "expert_capacity_factor": 0.8},
    "top 2 dropless, gated, shared": {"gated_mlp": True, "num_shared_experts": 2, "mlp_bias": False},
    "top 2 with capacity, gated, shared": {"gated_mlp": True, "num_shared_experts": 1, "expert_capacity_factor": 1.0},
    "top 3 of 5, not normalised, tight": {
        "num_experts": 5,
        "experts_per_token": 3,
        "router_normalize_top_k": False,
        "expert_capacity_factor": 0.5,
        "activation": "gelu",
    },
    "top 3 of 5 dropless": {"num_experts": 5, "experts_per_token": 3, "activation": "gelu"},
}


def draw(c: ModelConfig, seed: int = 0) -> tuple[Any, jax.Array, jax.Array]:
    """(parameters none of which is 0, x [B, T, D], which tokens are real)."""
    rng = np.random.default_rng(seed)
    x = jnp.asarray(rng.standard_normal((ROWS, LENGTH, c.model_dim)), jnp.float32)
    real = jnp.arange(LENGTH) < jnp.array([LENGTH, 7, 10])[:, None]
    shapes = nn.unbox(jax.eval_shape(lambda: ExpertMLP(c).init(jax.random.key(0), x, real, True)["params"]))
    return jax.tree.map(lambda leaf: jnp.asarray(0.5 * rng.standard_normal(leaf.shape), jnp.float32), shapes), x, real


@functools.cache
def forward(c: ModelConfig, may_drop: bool = True) -> Any:
    return jax.jit(lambda params, x, real: ExpertMLP(c).apply({"params": params}, x, real, may_drop))


def run(c: ModelConfig, params: Any, x: jax.Array, real: jax.Array | None) -> tuple[jax.Array, RouterStats]:
    y, stats = forward(c)(params, x, real)
    return y, jax.tree.map(lambda leaf: leaf[None], stats)


def to_64(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


@pytest.mark.parametrize("case", CASES)
def test_equals_loops_over_tokens_and_experts(case: str) -> None:
    c = model(**CASES[case])
    params, x, real = draw(c)
    y, stats = run(c, params, x, real)
    expected, sums = experts_64(c, to_64(params), *to_64((x, real)))
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-5)
    np.testing.assert_array_equal(stats.chosen_E[0], sums["chosen"])
    assert float(stats.dropped[0]) == sums["dropped"]
    assert (sums["dropped"] > 0) == bool(c.expert_capacity_factor)
    assert float(stats.tokens[0]) == LENGTH + 7 + 10
    losses = router_losses(stats)
    for name in ("load_balance", "router_z"):
        np.testing.assert_allclose(losses[name], sums[name], rtol=1e-5)
    np.testing.assert_allclose(losses["busiest"], c.num_experts * sums["chosen"].max() / sums["chosen"].sum(), rtol=1e-6)


@pytest.mark.parametrize("case", CASES)
def test_gradients_equal_differences_in_float64(case: str) -> None:
    """Slopes of one number made of the output and both losses, along a random direction of each parameter and of x."""
    c = model(**CASES[case])
    params, x, real = draw(c)
    rng = np.random.default_rng(1)
    mix = rng.standard_normal(x.shape)

    def number(params: Any, x: jax.Array) -> jax.Array:
        y, stats = ExpertMLP(c).apply({"params": params}, x, real, True)
        losses = router_losses(jax.tree.map(lambda leaf: leaf[None], stats))
        return (y * mix).sum() + 3 * losses["load_balance"] + 2 * losses["router_z"]

    def number_64(params: Any, x: np.ndarray) -> float:
        y, sums = experts_64(c, params, x, to_64(real))
        return float((y * mix).sum() + 3 * sums["load_balance"] + 2 * sums["router_z"])

    at = to_64((params, x))
    leaves, tree = jax.tree.flatten(at)
    gradients = jax.tree.leaves(jax.jit(jax.grad(number, (0, 1)))(params, x))
    for place, gradient in enumerate(gradients):
        direction, step = rng.standard_normal(leaves[place].shape), 1e-6
        ends = [
            number_64(*jax.tree.unflatten(tree, leaves[:place] + [leaves[place] + sign * step * direction] + leaves[place + 1 :]))
            for sign in (1, -1)
        ]
        expected = (ends[0] - ends[1]) / (2 * step)
        scale = float(np.linalg.norm(gradient) * np.linalg.norm(direction))
        assert abs(float((gradient * direction).sum()) - expected) < 1e-5 * scale, jax.tree_util.tree_leaves_with_path(at)[place][
            0
        ]


@pytest.mark.parametrize("factor", [0.0, 1.0])
def test_bfloat16_rounds_the_products_and_not_the_router(factor: float) -> None:
    exact, rounded = (model(expert_capacity_factor=factor, gated_mlp=True, dtype=dtype) for dtype in ("float32", "bfloat16"))
    params, x, real = draw(exact)
    x = x.astype(jnp.bfloat16)

    def both(c: ModelConfig) -> Any:
        def total(params: Any, x: jax.Array) -> tuple[jax.Array, Any]:
            y, stats = ExpertMLP(c).apply({"params": params}, x, real, True)
            return (y.astype(jnp.float32) ** 2).sum(), (y, stats)

        return jax.jit(jax.value_and_grad(total, has_aux=True))(params, x)

    (_, (expected, expected_stats)), expected_gradients = both(exact)
    (_, (y, stats)), gradients = both(rounded)
    assert y.dtype == jnp.bfloat16
    np.testing.assert_allclose(y.astype(jnp.float32), expected, rtol=0, atol=0.02 * float(jnp.abs(expected).max()))
    tree_close(stats, expected_stats, rtol=1e-6, atol=0)
    for name in ("up", "down"):
        assert gradients[name]["kernel"].dtype == jnp.float32
        off = jnp.linalg.norm(gradients[name]["kernel"] - expected_gradients[name]["kernel"])
        assert 0 < off < 0.02 * jnp.linalg.norm(expected_gradients[name]["kernel"])


def test_room_for_all_is_dropless() -> None:
    wide, dropless = model(expert_capacity_factor=100.0), model()
    params, x, real = draw(dropless)

    def both(c: ModelConfig) -> Any:
        return jax.jit(
            jax.value_and_grad(lambda p, x: jnp.sin(ExpertMLP(c).apply({"params": p}, x, real, True)[0]).sum(), (0, 1))
        )(params, x)

    tree_close(both(wide), both(dropless), rtol=1e-5, atol=1e-5)
    assert capacity(wide, LENGTH) == LENGTH
    assert [capacity(model(expert_capacity_factor=factor), 20) for factor in (1e-3, 0.5, 1.0, 1.1, 1.11)] == [1, 5, 10, 11, 12]


def test_what_a_token_gets_depends_on_nothing_behind_or_beside_it() -> None:
    """Places are given in the order of the tokens; all first choices before all second ones would look ahead."""
    c = model(expert_capacity_factor=0.6)
    params, x, _ = draw(c)
    y, stats = run(c, params, x, None)
    assert float(stats.dropped[0]) > 0
    for t in range(1, LENGTH):
        other = x.at[1, t:].set(-2 * x[1, t:]).at[2].set(7.0)
        changed = run(c, params, other, None)[0]
        np.testing.assert_array_equal(changed[1, :t], y[1, :t])
        np.testing.assert_array_equal(changed[0], y[0])


@pytest.mark.parametrize("factor", [0.0, 0.8])
def test_padding_takes_no_place_and_is_not_counted(factor: float) -> None:
    c = model(expert_capacity_factor=factor)
    params, x, _ = draw(c)
    real = jnp.arange(LENGTH) % 3 != 1  # between the tokens, where it would take places before them
    real = jnp.broadcast_to(real, (ROWS, LENGTH))
    y, stats = run(c, params, x, real)
    filled_y, filled_stats = run(c, params, jnp.where(real[..., None], x, 9.0), real)
    np.testing.assert_array_equal(np.asarray(y)[real], np.asarray(filled_y)[real])
    for one, other in zip(jax.tree.leaves(stats), jax.tree.leaves(filled_stats), strict=True):
        np.testing.assert_array_equal(one, other)
    assert not np.asarray(y)[~real].any()


# --- in the decoder ---------------------------------------------------------------------

MOE = {"model.num_experts": 4, "model.expert_mlp_dim": 8, "model.gated_mlp": True, "model.num_shared_experts": 1}


def test_equal_experts_are_the_dense_model() -> None:
    """Weights that sum to 1 over copies of one MLP: the same loss, and gradients that add up to the MLP's."""
    dense = small(model__gated_mlp=True)
    mixed = small(model__gated_mlp=True, model__num_experts=3)
    params = random_params(dense)
    copies = jax.tree.map(lambda leaf: jnp.repeat(leaf[:, None], 3, axis=1), params["layers"]["mlp"])
    copies["router"] = {"kernel": jnp.asarray(np.random.default_rng(0).standard_normal((2, 16, 3)), jnp.float32)}
    layers = {name: value for name, value in params["layers"].items() if name != "mlp"} | {"experts": copies}
    example = causal(random_batch(dense))

    def of(config: Any, params: Any) -> Any:
        return jax.jit(jax.value_and_grad(lambda p: example_loss(config, p, example, None)[0]))(params)

    loss, gradients = of(dense, params)
    mixed_loss, mixed_gradients = of(mixed, params | {"layers": layers})
    np.testing.assert_allclose(mixed_loss, loss, rtol=1e-6)
    summed = mixed_gradients["layers"].pop("experts")
    summed.pop("router")
    mixed_gradients["layers"]["mlp"] = jax.tree.map(lambda leaf: leaf.sum(1), summed)
    tree_close(
        mixed_gradients, gradients, rtol=1e-4, atol=1e-5 * max(float(jnp.abs(g).max()) for g in jax.tree.leaves(gradients))
    )


def test_cached_decoding_equals_the_full_dropless_forward() -> None:
    """Also with a capacity factor, for with a cache nothing is ever dropped."""
    dropless, c = (small(MOE, model__tied_embeddings=False, model__expert_capacity_factor=factor).model for factor in (0.0, 0.5))
    params = random_params(small(MOE, model__tied_embeddings=False))
    tokens = np.random.default_rng(1).integers(0, c.vocab_size, (2, 12)).astype(np.int32)
    full = jax.jit(lambda tokens: Decoder(dropless).apply({"params": params}, tokens)[0])
    expected = full(tokens)
    step = jax.jit(lambda *inputs: Decoder(c).apply({"params": params}, inputs[0], inputs[1], cache=inputs[2]))
    cache, pieces = Cache.empty(c, 2, 12), []
    for position in range(12):
        logits, cache = step(tokens[:, position : position + 1], np.full((2, 1), position), cache)
        pieces.append(logits)
    np.testing.assert_allclose(np.concatenate(pieces, 1), expected, rtol=1e-5, atol=1e-5)

    prompts = [tokens[0, :4], tokens[1, :2]]
    options: dict[str, Any] = {"settings": GenerationConfig(max_new_tokens=3, do_sample=False), "seed": 0, "eos_ids": ()}
    made = generate_tokens(params, c, prompts, vocab_size=c.vocab_size, **options)
    rows = np.zeros((2, 12), np.int32)
    for number, (prompt, new) in enumerate(zip(prompts, made.tokens, strict=True)):
        rows[number, : len(prompt)] = prompt
        rows[number, len(prompt) : len(prompt) + 3] = new
    best = np.asarray(full(rows)).argmax(-1)
    for number, (prompt, new) in enumerate(zip(prompts, made.tokens, strict=True)):
        assert new.tolist() == best[number, len(prompt) - 1 : len(prompt) + 2].tolist()


LOSSES = MOE | {
    "model.expert_capacity_factor": 0.8,
    "objective.router_balance_loss": 0.5,
    "objective.router_z_loss": 0.1,
    "train.accumulation_steps": 2,
}


@functools.cache
def summed(**knobs: Any) -> Any:
    config = small(LOSSES, **knobs)
    batch = random_batch(config, 1)
    return jax.jit(lambda p: summed_gradients(config, p, batch, None))(random_params(config))


@pytest.mark.parametrize("form", [{"model__remat": "dots"}, {"model__remat": "full", "model__scan_unroll": 0}], ids=str)
def test_remat_and_unrolling_change_nothing(form: dict[str, Any]) -> None:
    (gradients, sums), (expected, expected_sums) = summed(**form), summed()
    tree_close(sums, expected_sums, rtol=1e-6, atol=0)
    tree_close(gradients, expected, rtol=1e-4, atol=1e-6 * max(float(jnp.abs(g).max()) for g in jax.tree.leaves(expected)))


def test_losses_enter_by_the_weight_of_each_micro_batch() -> None:
    """By hand, from the routers' sums of each micro-batch by itself; what is dropped does not depend on the split."""
    config = small(LOSSES)
    batch, params = random_batch(config, 1), random_params(config)
    _, sums = summed()
    routers = jax.jit(
        lambda example: Decoder(config.model).apply(
            {"params": params}, example.inputs, example.positions, segment_ids_BT=example.segment_ids, method=Decoder.hidden
        )[2]
    )
    loss, choices, dropped = float(sums["nll_sum"]), 0.0, 0.0
    for part in range(2):
        example = causal({name: array[part::2] for name, array in batch.items()})
        stats = to_64(routers(example))
        real = int((np.asarray(example.segment_ids) > 0).sum())
        assert stats.tokens.tolist() == [real, real]
        balance = 4 * ((stats.chosen_E / (2 * real)) * (stats.probability_E / real)).sum(-1).mean()
        loss += float(example.weights.sum()) * (0.5 * balance + 0.1 * (stats.squared_z / real).mean())
        choices, dropped = choices + 2 * 2 * real, dropped + stats.dropped.sum()
    np.testing.assert_allclose(sums["loss_sum"], loss, rtol=1e-5)
    assert float(sums["moe/choices"]) == choices and float(sums["moe/dropped"]) == dropped > 0
    example = causal(batch)
    _, whole = jax.jit(lambda p: example_loss(config, p, example, None))(params)
    np.testing.assert_allclose(whole["nll_sum"], sums["nll_sum"], rtol=1e-6)
    assert float(whole["moe/dropped"]) == dropped


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        ({"num_experts": 2, "experts_per_token": 3}, "model.experts_per_token=3 is more than model.num_experts=2."),
        ({"num_experts": 2, "experts_per_token": 1}, "model.router_normalize_top_k=True"),
        ({"num_shared_experts": 1}, "model.num_shared_experts=1 is for a mixture of experts"),
        ({"expert_capacity_factor": 1.5}, "model.expert_capacity_factor=1.5 is for a mixture of experts"),
    ],
)
def test_refused(knobs: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError) as error:
        small({f"model.{name}": value for name, value in knobs.items()})
    assert str(error.value).startswith(said)


def test_a_router_loss_without_a_router_is_refused() -> None:
    with pytest.raises(UserError, match="objective.router_z_loss=0.1 is for a mixture of experts"):
        small(objective__router_z_loss=0.1)
