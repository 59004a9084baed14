"""Forms of the block, embedding and prediction heads: against float64, and in the properties that training rests on."""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import UserError
from gptjax.generate import forward, weights
from gptjax.interop.huggingface import architecture_for
from gptjax.model import primitives
from gptjax.model.block import Block
from gptjax.model.cache import Cache
from gptjax.model.decoder import Decoder, output_table
from gptjax.model.decoder import logits as to_logits
from gptjax.model.drawing import draw_block
from gptjax.model.forms import FORMS
from gptjax.model.rows import Rows
from gptjax.train.flops import matmul_parameters
from gptjax.train.groups import decay_mask, parameter_path
from gptjax.train.objectives import causal
from gptjax.train.optimizers import _muon_dimensions
from gptjax.train.step import example_loss, init_params, step_dropout_keys, summed_gradients
from tests.small import random_batch, random_params, small, tree_close

pytestmark = pytest.mark.usefixtures("unoptimised")

# --- the formulas, in float64 ---------------------------------------------

# Of norms n by name, attention A, MLP M (as they enter the sum) and the stream x.
FORMULAS: dict[tuple[str, str], Callable[..., np.ndarray]] = {
    ("pre", "serial"): lambda x, n, A, M: (y := x + A(n("attention_norm")(x))) + M(n("mlp_norm")(y)),
    ("pre", "parallel"): lambda x, n, A, M: x + A(n("attention_norm")(x)) + M(n("mlp_norm")(x)),
    ("pre", "parallel_shared"): lambda x, n, A, M: x + A(n("block_norm")(x)) + M(n("block_norm")(x)),
    ("post", "serial"): lambda x, n, A, M: n("mlp_norm")((y := n("attention_norm")(x + A(x))) + M(y)),
    ("post", "parallel"): lambda x, n, A, M: n("block_norm")(x + A(x) + M(x)),
    ("sandwich", "serial"): lambda x, n, A, M: (y := x + A(n("attention_norm")(x))) + M(n("mlp_norm")(y)),
    ("sandwich", "parallel"): lambda x, n, A, M: x + A(n("attention_norm")(x)) + M(n("mlp_norm")(x)),
    ("sandwich", "parallel_shared"): lambda x, n, A, M: x + A(n("block_norm")(x)) + M(n("block_norm")(x)),
}

# Shazeer (2020): gate's non-linearity; without a gate, up's.
NON_LINEARITIES = {
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "identity": lambda x: x,
    "relu": lambda x: np.maximum(x, 0),
    "relu2": lambda x: np.maximum(x, 0) ** 2,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
}


def in_64(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def norm_64(model: Any, p: Any, name: str, x: np.ndarray) -> np.ndarray:
    if model.norm == "none":
        return x
    if model.norm == "layernorm":
        x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + model.norm_epsilon) * p[name]["scale"] + p[name].get("bias", 0)


def attention_64(model: Any, p: Any, x: np.ndarray) -> np.ndarray:
    q, k, v = (np.einsum("td,dnh->nth", x, p[name]["kernel"]) + p[name]["bias"][:, None] for name in ("query", "key", "value"))
    scores = np.where(np.tril(np.ones((len(x), len(x)))), q @ k.swapaxes(1, 2) / math.sqrt(model.head_dim), -np.inf)
    shares = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("nth,nhd->td", shares / shares.sum(-1, keepdims=True) @ v, p["output"]["kernel"]) + p["output"]["bias"]


def mlp_64(model: Any, p: Any, x: np.ndarray) -> np.ndarray:
    up, act = x @ p["up"]["kernel"] + p["up"]["bias"], NON_LINEARITIES[model.activation]
    hidden = act(x @ p["gate"]["kernel"] + p["gate"]["bias"]) * up if model.gated_mlp else act(up)
    return hidden @ p["down"]["kernel"] + p["down"]["bias"]


def block_64(model: Any, p: Any, x: np.ndarray) -> np.ndarray:
    """[T, D] of one row."""

    def branch(name: str, f: Callable[..., np.ndarray]) -> Callable[[np.ndarray], np.ndarray]:
        def of(read: np.ndarray) -> np.ndarray:
            y = f(model, p[name], read)
            if model.norm_placement == "sandwich":
                y = norm_64(model, p, f"{name}_post_norm", y)
            return y * model.residual_scale * p.get(f"{name}_layer_scale", 1.0)

        return of

    formula = FORMULAS[model.norm_placement, model.block]
    norms = lambda name: functools.partial(norm_64, model, p, name)  # noqa: E731
    return formula(x, norms, branch("attention", attention_64), branch("mlp", mlp_64))


def logits_64(model: Any, params: Any, tokens: np.ndarray, head: int = 1) -> np.ndarray:
    """[T, V] of one row, of one prediction head."""
    p = in_64(params)
    x = p["embed"]["tokens"][tokens]
    if model.embedding_dim:
        x = x @ p["embed"]["factor"]
    x = x * (model.embedding_scale or math.sqrt(model.model_dim)) + p["embed"]["positions"][: len(tokens)]
    for number in range(model.num_layers):
        x = block_64(model, jax.tree.map(lambda leaf, n=number: leaf[n], p["layers"]), x)
    if head > 1:
        x = block_64(model, jax.tree.map(lambda leaf: leaf[head - 2], p["prediction_heads"]), x)
    if model.norm_placement != "post":
        x = norm_64(model, p, "final_norm", x)
    if model.tied_embeddings:
        x = x @ p["embed"]["factor"].T if model.embedding_dim else x
        found = x @ p["embed"]["tokens"].T
    else:
        found = x @ p["head"]
    return model.logit_softcap * np.tanh(found / model.logit_softcap) if model.logit_softcap else found


# --- the block -----------------------------------------------------------

ONE = {"model.num_layers": 1}
SCALED = {"model.residual_scale": 0.7, "model.layer_scale": 0.1}
PLACED = [(norm, *form) for norm in ("layernorm", "rmsnorm") for form in FORMULAS]
PLACED += [("none", "pre", block) for block in ("serial", "parallel", "parallel_shared")]


def apply_block(model: Any, params: Any, x_BTD: Any, layer: int = 0, keys: Any = None) -> jax.Array:
    own = jax.tree.map(lambda leaf: leaf[layer], params["layers"])
    rows = Rows(jnp.broadcast_to(jnp.arange(x_BTD.shape[1]), x_BTD.shape[:2]), None, None, None, keys)
    return Block(model).apply({"params": own}, jnp.asarray(x_BTD, jnp.float32), rows, layer, None)[0]


@pytest.mark.parametrize(("norm", "placement", "block"), PLACED)
def test_every_form_of_the_block_equals_its_formula(norm: str, placement: str, block: str) -> None:
    config = small(SCALED, model__norm=norm, model__norm_placement=placement, model__block=block, model__num_layers=1)
    params = random_params(config)
    x = np.random.default_rng(0).standard_normal((1, 5, 16))
    expected = block_64(config.model, in_64(jax.tree.map(lambda leaf: leaf[0], params["layers"])), x[0])
    np.testing.assert_allclose(apply_block(config.model, params, x)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("activation", NON_LINEARITIES)
@pytest.mark.parametrize("gated", [False, True])
def test_every_mlp_equals_its_formula(activation: str, gated: bool) -> None:
    config = small(model__activation=activation, model__gated_mlp=gated, model__num_layers=1, model__norm="none")
    params = random_params(config)
    x = np.random.default_rng(0).standard_normal((1, 5, 16))
    expected = block_64(config.model, in_64(jax.tree.map(lambda leaf: leaf[0], params["layers"])), x[0])
    np.testing.assert_allclose(apply_block(config.model, params, x)[0], expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_experts_have_the_activations_too() -> None:
    """One expert that takes all is the MLP."""
    knobs = {"model.activation": "relu2", "model.num_layers": 1, "model.norm_placement": "sandwich"}
    routed = {"model.num_experts": 1, "model.experts_per_token": 1, "model.router_normalize_top_k": False}
    config, dense = small(knobs, routed), small(knobs)
    params = random_params(config)
    x = np.random.default_rng(0).standard_normal((1, 5, 16))
    own = in_64(jax.tree.map(lambda leaf: leaf[0], params["layers"]))
    own["mlp"] = {name: {k: leaf[0] for k, leaf in own["experts"][name].items()} for name in ("up", "down")}
    expected = block_64(dense.model, own, x[0])
    np.testing.assert_allclose(apply_block(config.model, params, x)[0], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("knobs", "named"),
    [
        ({"norm": "none", "norm_placement": "post"}, ("model.norm=none", "model.norm_placement=post")),
        ({"norm": "none", "query_key_norm": True}, ("model.norm=none", "model.query_key_norm=True")),
        ({"norm_placement": "post", "block": "parallel_shared"}, ("model.norm_placement=post", "model.block=parallel_shared")),
    ],
)
def test_forms_that_do_not_exist_are_refused_by_name(knobs: dict[str, Any], named: tuple[str, str]) -> None:
    with pytest.raises(UserError) as refused:
        small({f"model.{name}": value for name, value in knobs.items()})
    assert all(name in str(refused.value) for name in named)


def test_a_weight_of_heads_that_are_not_there_is_refused() -> None:
    with pytest.raises(UserError, match="objective.prediction_heads_weight=0.5 .* model.prediction_heads=1"):
        small(objective__prediction_heads_weight=0.5)
    assert small(objective__prediction_heads_weight=0.5, model__prediction_heads=2).model.prediction_heads == 2


def test_an_export_that_could_not_say_a_form_is_refused_by_its_name() -> None:
    for name, value in {"norm_placement": "sandwich", "residual_scale": 0.5, "layer_scale": 0.1, "embedding_scale": 4.0}.items():
        with pytest.raises(UserError, match=f"model.{name}="):
            architecture_for(small({f"model.{name}": value}).model)
    for name, value in {"embedding_dim": 8, "logit_softcap": 3.0, "prediction_heads": 2, "block": "parallel_shared"}.items():
        with pytest.raises(UserError, match=f"model.{name}="):
            architecture_for(small({f"model.{name}": value}).model)
    assert architecture_for(small(model__stochastic_depth=0.5).model) == "gpt2"


# --- stochastic depth -------------------------------------------------------


def test_rows_leave_out_branches_as_often_as_the_rates_say_and_keep_the_mean() -> None:
    config = small(model__stochastic_depth=0.6, model__num_layers=3, model__norm_placement="post")
    keys = primitives.row_keys(jax.random.key(3), jnp.arange(4000))
    x = jnp.ones((4000, 2, 16))
    for layer, rate in enumerate((0.2, 0.4, 0.6)):
        y = np.asarray(primitives.drop_rows(x, [0.2, 0.4, 0.6], layer, primitives.fold_in(keys, layer)))
        whole = y.reshape(4000, -1)
        assert (whole == whole[:, :1]).all(), "a row is left out whole, or not at all"
        assert set(np.unique(whole)) == {np.float32(0), np.float32(1) * np.float32(primitives.kept_scale(rate))}
        sigma = math.sqrt(rate * (1 - rate) / 4000)
        assert abs((whole[:, 0] == 0).mean() - rate) < 4 * sigma
        assert abs(whole.mean() - 1) < 4 * sigma / (1 - rate)
    # In the block: the rows of the last layer are norm(norm(x) + mlp), norm(x + attention) alone, and so on, of four kinds.
    params = random_params(config)
    row = np.random.default_rng(0).standard_normal((1, 3, 16))
    y = np.asarray(apply_block(config.model, params, np.repeat(row, 400, 0), 2, keys[:400]))
    kinds = np.unique(y[:, 0].round(4), axis=0, return_counts=True)[1]
    assert len(kinds) == 4
    shares = sorted([0.4 * 0.4, 0.4 * 0.6, 0.6 * 0.4, 0.6 * 0.6])
    np.testing.assert_allclose(sorted(kinds / 400), shares, atol=4 * math.sqrt(0.25 / 400))


ALL_AT_ONCE = SCALED | {
    "model.norm_placement": "sandwich",
    "model.embedding_dim": 8,
    "model.embedding_scale": 0.0,
    "model.logit_softcap": 2.0,
    "model.prediction_heads": 3,
    "objective.prediction_heads_weight": 0.5,
}


@pytest.fixture(scope="module")
def everything() -> Any:
    config = small(ALL_AT_ONCE)
    return config, random_params(config, std=0.2)


def test_no_split_of_the_batch_changes_which_rows_leave_out_what() -> None:
    knobs = ALL_AT_ONCE | ONE | {"model.stochastic_depth": 0.5, "model.prediction_heads": 2}
    config = small(knobs)
    params, batch = random_params(config, std=0.2), random_batch(config)
    keys = step_dropout_keys(config, jnp.uint32(0), jnp.int32(5))
    assert keys is not None and keys.shape == (8, 2)
    found = []
    for parts in (1, 4):
        split = small(knobs, train__accumulation_steps=parts)
        found.append(jax.jit(functools.partial(summed_gradients, split))(params, batch, keys))
    (whole, sums), (parts, split_sums) = found
    for name in sums:
        np.testing.assert_allclose(split_sums[name], sums[name], rtol=5e-6, err_msg=name)
    tree_close(parts, whole, rtol=1e-4, atol=5e-6 * max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(whole)))
    example = causal(batch)
    steady = jax.jit(lambda p, keys: example_loss(config, p, example, keys))
    assert abs(float(steady(params, None)[0]) - float(sums["loss_sum"])) > 1e-4 * float(
        sums["loss_sum"]
    )  # 20 times what a split may change
    plain = example_loss(small(knobs, model__stochastic_depth=0.0), params, example, None)[0]  # in evaluation nothing is left out
    np.testing.assert_allclose(steady(params, None)[0], plain, rtol=1e-6)


# --- embedding, logits, prediction heads -------------------------------------

TOKENS = np.random.default_rng(1).integers(1, 23, (2, 8)).astype(np.int32)


def test_logits_of_all_heads_equal_float64_and_see_no_later_token(everything: Any) -> None:
    config, params = everything
    heads = lambda p, tokens: [  # noqa: E731
        to_logits(hidden, output_table(p, config.model), config.model)
        for hidden in Decoder(config.model).apply({"params": p}, tokens, method=Decoder.hidden_of_heads)[0]
    ]
    found = jax.jit(heads)(params, TOKENS)
    assert len(found) == 3
    later = TOKENS.copy()
    later[:, 5:] = 3
    for head, (logits, others) in enumerate(zip(found, jax.jit(heads)(params, later), strict=True), 1):
        for row in range(2):
            expected = logits_64(config.model, params, TOKENS[row], head)
            np.testing.assert_allclose(logits[row], expected, rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(logits[:, :5], others[:, :5])
        assert np.abs(np.asarray(logits - others)[:, 5:]).max() > 1e-3


@pytest.mark.parametrize(
    "knobs",
    [
        {"model.embedding_dim": 8, "model.tied_embeddings": False, "model.embedding_scale": 3.0, "model.norm_placement": "post"},
        {"model.logit_softcap": 1.5, "model.block": "parallel_shared", "model.norm": "rmsnorm"},
    ],
    ids=["untied, post", "tied, shared"],
)
def test_other_embeddings_equal_float64(knobs: dict[str, Any]) -> None:
    config = small(knobs)
    params = random_params(config)
    logits = Decoder(config.model).apply({"params": params}, TOKENS[:1])[0]
    np.testing.assert_allclose(logits[0], logits_64(config.model, params, TOKENS[0]), rtol=1e-5, atol=2e-5)


def test_the_loss_adds_each_heads_targets_of_the_same_document(everything: Any) -> None:
    config, params = everything
    batch = random_batch(config, rows=3)
    batch["loss_mask"] = (np.random.default_rng(2).random(batch["tokens"].shape) < 0.8).astype(np.float32)
    nll, weight = np.zeros(4), np.zeros(4)
    for row in range(3):
        tokens, segments = batch["tokens"][row], batch["segment_ids"][row]
        for segment in sorted(set(segments) - {0}):
            places = np.flatnonzero(segments == segment)
            for head in (1, 2, 3):
                found = logits_64(config.model, params, tokens[places], head)
                log_p = found - np.log(np.exp(found).sum(-1, keepdims=True))
                for at, target in zip(range(len(places)), places[head:], strict=False):
                    if batch["loss_mask"][row, target]:
                        nll[head] -= log_p[at, tokens[target]]
                        weight[head] += 1
    loss, sums = jax.jit(lambda p: example_loss(config, p, causal(batch), None))(params)
    np.testing.assert_allclose(sums["nll_sum"], nll[1], rtol=1e-5)
    for head in (2, 3):
        assert sums[f"heads/{head}/weight_sum"] == weight[head] > 0
        np.testing.assert_allclose(sums[f"heads/{head}/nll_sum"], nll[head], rtol=1e-5)
    np.testing.assert_allclose(loss, nll[1] + 0.5 * (nll[2] + nll[3]), rtol=1e-5)


def test_further_heads_leave_the_decoder_as_it_starts() -> None:
    alone, more = (jax.jit(lambda c=c: init_params(c, 0))() for c in (small(ONE), small(ONE, model__prediction_heads=2)))
    assert set(more) == set(alone) | {"prediction_heads"}
    for name, tree in alone.items():
        jax.tree.map(np.testing.assert_array_equal, jax.tree.leaves(tree), jax.tree.leaves(more[name]))


@pytest.mark.parametrize(("placement", "block"), FORMULAS)
def test_cached_equals_uncached_and_scanned_equals_unrolled(placement: str, block: str) -> None:
    """Through generation's own kernels, with the embedding's factor there and back; the cached layers are unrolled."""
    knobs = SCALED | {
        "model.norm_placement": placement,
        "model.block": block,
        "model.embedding_dim": 8,
        "model.logit_softcap": 2.0,
    }
    config = small(knobs, model__stochastic_depth=0.5, model__prediction_heads=2)
    model, params = config.model, random_params(config)
    expected = np.stack([logits_64(model, params, row) for row in TOKENS])
    scanned = Decoder(model).apply({"params": params}, TOKENS)[0]
    np.testing.assert_allclose(scanned, expected, rtol=1e-5, atol=2e-5)
    prepared = weights.prepare(params, model)
    assert "prediction_heads" not in prepared
    cache = Cache.empty(model, 2, 8)
    first, cache = forward.prefill(prepared, model, TOKENS[:, :7], jnp.array([7, 7]), cache)
    last, _ = forward.step(prepared, model, TOKENS[:, 7], jnp.array([7, 7]), cache)
    np.testing.assert_allclose(np.stack([first, last], 1), expected[:, 6:], rtol=1e-5, atol=2e-5)


def test_a_factor_is_rounded_with_bfloat16_weights_and_not_with_int8(everything: Any) -> None:
    config, params = everything
    factor = params["embed"]["factor"]
    back = {kind: weights.rounded(params, config.model, kind)["embed"]["factor"] for kind in ("bfloat16", "int8")}
    np.testing.assert_array_equal(back["int8"], factor)
    np.testing.assert_array_equal(back["bfloat16"], factor.astype(jnp.bfloat16).astype(jnp.float32))


# --- the optimizer's, the counts, the picture ---------------------------------


def test_optimizers_know_the_heads_matrices_and_decay_no_scale(everything: Any) -> None:
    config, params = everything
    decayed = {
        parameter_path(path) for path, on in jax.tree_util.tree_leaves_with_path(decay_mask(config.optimizer, params)) if on
    }
    kernels = {f"{part}/kernel" for part in ("attention/query", "attention/key", "attention/value", "attention/output")}
    kernels |= {"mlp/up/kernel", "mlp/down/kernel"}
    assert decayed == {f"{stack}/{kernel}" for stack in ("layers", "prediction_heads") for kernel in kernels}
    dimensions = _muon_dimensions(params)
    assert dimensions["prediction_heads"] == dimensions["layers"]


@pytest.mark.parametrize("tied", [True, False])
def test_flops_count_every_product(everything: Any, tied: bool) -> None:
    """All weights but tables that are only looked up; factor and output table once for each time they multiply."""
    config = small(ALL_AT_ONCE, model__tied_embeddings=tied)
    sizes = {parameter_path(path): leaf.size for path, leaf in jax.tree_util.tree_leaves_with_path(random_params(config))}
    kernels = sum(size for path, size in sizes.items() if path.endswith("kernel"))
    factor = sizes["embed/factor"]
    out = factor + sizes["embed/tokens"] if tied else sizes["head"]
    assert matmul_parameters(config.model) == kernels + factor + 3 * out


@pytest.mark.parametrize(("routed", "scaled"), [(False, True), (True, False)])
def test_every_form_has_its_own_picture_of_its_own_parameters(routed: bool, scaled: bool) -> None:
    knobs = {"model.num_experts": 2, "model.expert_capacity_factor": 1.5} if routed else {}
    knobs |= SCALED | {"model.query_key_norm": True} if scaled else {}
    pictures = []
    for norm, placement, block in PLACED:
        if norm == "none" and scaled:
            continue
        config = small(knobs, model__norm=norm, model__norm_placement=placement, model__block=block, model__num_layers=1)
        picture = draw_block(config.model)
        shapes = jax.eval_shape(lambda c=config: init_params(c, 0))["layers"]
        named = re.findall(r"\w+", picture)
        groups = {*shapes, *(name for name in shapes["attention"] if name.endswith("_norm"))}
        assert {name: named.count(name) for name in groups} == dict.fromkeys(groups, 1), picture
        assert not [name for name in named if name.endswith(("_norm", "_layer_scale")) and name not in groups], picture
        assert max(map(len, picture.splitlines())) <= 100
        pictures.append(picture)
    # Without norms there is none to share: two of the three are one.
    assert len(set(pictures)) == len(pictures) - (0 if scaled else 1)
    assert set(FORMS) == set(FORMULAS)


def test_the_picture_says_what_happens_to_a_branch() -> None:
    knobs = {"model.residual_dropout": 0.1, "model.stochastic_depth": 0.5, "model.gated_mlp": True, "model.activation": "silu"}
    picture = draw_block(small(SCALED, knobs, model__attention_window=5, model__num_kv_heads=2).model)
    order = ["attention_norm", "attention", "times 0.7", "attention_layer_scale", "dropout 0.1", "stochastic depth", "⊕"]
    places = [re.search(rf"(?<!\w){re.escape(text)}(?!\w)", picture) for text in order]
    assert all(places) and [found.start() for found in places if found] == sorted(found.start() for found in places if found)
    for text in ("attention_window 5", "silu(gate) * up", "4 heads of 4, 2 of keys and", "0.25 to 0.5"):
        assert text in picture
