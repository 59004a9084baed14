"""muP: the rules against a table written by hand, equality with the standard parameterization at the base width, the folded
model, and the coordinate check, which muP passes and the standard parameterization fails.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from gptjax.config import Config, ModelConfig, UserError
from gptjax.config.parameterization import UPDATE_KINDS
from gptjax.data.pipeline import load_dataset
from gptjax.generate import forward
from gptjax.interop import huggingface
from gptjax.model.attention import Cache
from gptjax.model.decoder import Decoder
from gptjax.model.parameterization import folded, learning_rate_multiplier, role_of, standard
from gptjax.train import coordinates
from gptjax.train.groups import rate_multipliers
from gptjax.train.optimizers import make_optimizer
from gptjax.train.run import named_leaves
from gptjax.train.step import init_params
from tests.small import GPT2, LLAMA, random_params, small, tree_equal

MUP = {"model.parameterization": "mup", "model.mup_base_dim": 16}
WIDE = MUP | {"model.model_dim": 64, "model.num_heads": 4}  # ratio 4, heads of 16
EXPERTS = {"model.num_experts": 4, "model.num_shared_experts": 1, "model.query_key_norm": True, "model.tied_embeddings": False}

# At ratio 4, and heads 2 times as wide as at the base: (initial standard deviation over init_std, and learning rate over the
# config's for adam, sgd, muon). Norms' and biases' initial values are constants.
EMBEDDING, HIDDEN, VECTOR, HEAD_VECTOR = (1, 1, 4, 1), (1 / 2, 1 / 4, 1, 1), (None, 1, 4, 1), (None, 1, 2, 1)
NORMS = ("layers/attention_norm", "layers/mlp_norm", "final_norm")
GPT2_TABLE = {
    "embed/tokens": EMBEDDING,
    "embed/positions": EMBEDDING,
    **{f"layers/attention/{name}/kernel": HIDDEN for name in ("query", "key", "value", "output")},
    **{f"layers/mlp/{name}/kernel": HIDDEN for name in ("up", "down")},
    **{f"layers/attention/{name}/bias": VECTOR for name in ("query", "key", "value", "output")},
    **{f"layers/mlp/{name}/bias": VECTOR for name in ("up", "down")},
    **{f"{norm}/{name}": VECTOR for norm in NORMS for name in ("scale", "bias")},
}  # fmt: skip
EXPERTS_TABLE = {
    "embed/tokens": EMBEDDING,
    "embed/positions": EMBEDDING,
    "head": (1, 1, 4, 1),
    "layers/experts/router/kernel": (1 / 4, 1 / 4, 1 / 4, 1 / 2),
    **{f"layers/attention/{name}/kernel": HIDDEN for name in ("query", "key", "value", "output")},
    **{f"layers/experts/{name}/kernel": HIDDEN for name in ("up", "down", "shared/up", "shared/down")},
    **{f"layers/attention/{name}/bias": VECTOR for name in ("query", "key", "value", "output")},
    **{f"layers/experts/{name}/bias": VECTOR for name in ("up", "down", "shared/up", "shared/down")},
    **{f"layers/attention/{side}_norm/{name}": HEAD_VECTOR for side in ("query", "key") for name in ("scale", "bias")},
    **{f"{norm}/{name}": VECTOR for norm in NORMS for name in ("scale", "bias")},
}  # fmt: skip


initialised = jax.jit(init_params, static_argnums=0)


@pytest.mark.parametrize(("knobs", "table"), [(GPT2, GPT2_TABLE), (EXPERTS, EXPERTS_TABLE)], ids=["gpt2", "experts"])
def test_every_parameter_has_the_multipliers_of_its_role(knobs: dict[str, Any], table: dict[str, tuple[Any, ...]]) -> None:
    config = small(knobs, WIDE, model__mup_base_head_dim=8, model__vocab_size=97)
    leaves = named_leaves(nn.unbox(jax.eval_shape(lambda: init_params(config, jnp.uint32(0)))))
    assert leaves.keys() == table.keys()
    for optimizer, kind in UPDATE_KINDS.items():
        one = small(knobs, WIDE, model__mup_base_head_dim=8, model__vocab_size=97, optimizer__name=optimizer)
        found = {path: learning_rate_multiplier(one, path) for path in leaves}
        column = {"adam": 1, "sgd": 2, "muon": 3}[kind]
        assert found == pytest.approx({path: row[column] for path, row in table.items()}), optimizer


def test_initial_weights_have_the_standard_deviations_of_their_roles() -> None:
    config = small(EXPERTS, WIDE, model__mup_base_head_dim=8, model__vocab_size=97)
    for path, leaf in named_leaves(nn.unbox(initialised(config, jnp.uint32(0)))).items():
        std = EXPERTS_TABLE[path][0]
        if std is None:
            assert np.ptp(leaf) == 0 and leaf.mean() in (0, 1), path
            continue
        into_residual = path.endswith(("output/kernel", "down/kernel"))
        expected = 0.02 * std / (np.sqrt(2 * config.model.num_layers) if into_residual else 1)
        error = 4 / np.sqrt(2 * leaf.size)  # four standard errors of a normal sample's standard deviation
        assert float(jnp.std(leaf)) == pytest.approx(expected, rel=error), path


def test_a_parameter_without_a_rule_is_named() -> None:
    with pytest.raises(UserError, match="no rule for the parameter layers/attention/latent/kernel"):
        role_of("layers/attention/latent/kernel")


def update(config: Config, params: Any) -> Any:
    """What the optimizer makes of random gradients at its first step, at a rate of 0.01."""
    rng = np.random.default_rng(1)
    gradients = jax.tree.map(lambda leaf: jnp.asarray(rng.standard_normal(leaf.shape), jnp.float32), params)
    optimizer = make_optimizer(config, lambda n: 0.01, 20)
    return jax.jit(lambda p, g: optimizer.update(g, optimizer.init(p), p)[0])(params, gradients)


def one_of_each_role(config: Config) -> Any:
    params = random_params(config)
    layers = params["layers"]
    experts = {name: {"kernel": layers["experts"][name]["kernel"]} for name in ("router", "up")}
    attention = {"query": layers["attention"]["query"], "query_norm": layers["attention"]["query_norm"]}
    return {"embed": params["embed"], "head": params["head"], "layers": {"experts": experts, "attention": attention}}


@pytest.mark.parametrize("name", UPDATE_KINDS)
def test_the_optimizer_scales_the_update_and_not_the_decay(name: str) -> None:
    """At ratio 4; at the base width there is no difference, to the bit."""
    knobs = {"optimizer.name": name, "optimizer.weight_decay": 0.5, "optimizer.muon_adam_learning_rate": 1e-3}
    knobs |= {"optimizer.no_decay": ("norm",), "optimizer.learning_rate": 4e-3}
    plain, wide = small(EXPERTS, knobs), small(EXPERTS, knobs, MUP, model__mup_base_dim=4)
    base = small(EXPERTS, knobs, MUP)
    assert (plain.model.model_dim, wide.model.model_dim / wide.model.mup_base_dim) == (16, 4)
    params = one_of_each_role(plain)
    standard_update, found = update(plain, params), named_leaves(update(wide, params))
    if name == "adamw":
        tree_equal(update(base, params), standard_update)
    assert set(jax.tree.leaves(rate_multipliers(base, params))) == {1.0}
    before = named_leaves(params)
    for path, expected in named_leaves(standard_update).items():
        rate = 0.01 if name != "muon" or path.endswith("kernel") else 0.01 / 4  # AdamW's share of Muon's, 1e-3 / 4e-3
        decay = 0.0 if "norm" in path else -rate * 0.5 * before[path]
        multiplier = EXPERTS_TABLE[path][{"adam": 1, "sgd": 2, "muon": 3}[UPDATE_KINDS[name]]]
        if "query_norm" in path or "key_norm" in path:
            multiplier = 1  # heads are as wide as at the base
        expected = multiplier * (expected - decay) + decay
        np.testing.assert_allclose(found[path], expected, rtol=2e-4, atol=2e-6, err_msg=path)


@functools.cache
def compiled(model: ModelConfig) -> Any:
    return jax.jit(lambda params, tokens: Decoder(model).apply({"params": params}, tokens)[0])


def logits_of(config: Config, params: Any, tokens: np.ndarray) -> np.ndarray:
    return np.asarray(compiled(config.model)(params, tokens))


TOKENS = np.random.default_rng(0).integers(1, 20, (2, 12)).astype(np.int32)


def test_base_width_is_the_standard_model_bit_for_bit() -> None:
    knobs = {"model.mup_base_head_dim": 8, "model.num_heads": 2}
    config, plain = small(MUP, knobs), small(model__num_heads=2)
    assert config.model.head_dim == 8

    @functools.partial(jax.jit, static_argnums=0)
    def at_first(config: Config) -> Any:
        params = nn.unbox(init_params(config, jnp.uint32(3)))
        return params, Decoder(config.model).apply({"params": params}, TOKENS)[0]

    tree_equal(at_first(config), at_first(plain))


@pytest.mark.parametrize("knobs", [GPT2, LLAMA | {"model.query_key_norm": True}], ids=["tied", "untied"])
def test_forward_multipliers_and_the_standard_model_that_they_fold_into(knobs: dict[str, Any], tmp_path: Any) -> None:
    """Logits are 1 / 4 of the standard model's whose queries are 1 / 2 as long (heads 4 times as wide as at the base), alike
    with a cache; the folded parameters, written as a Hugging Face folder and read again, give them without muP.
    """
    config = small(knobs, WIDE, model__mup_base_head_dim=4)
    params = random_params(config, std=0.1)
    found = logits_of(config, params, TOKENS)

    queries = "query_norm" if config.model.query_key_norm else "query"
    attention = params["layers"]["attention"]
    halved = params | {
        "layers": params["layers"] | {"attention": attention | {queries: jax.tree.map(lambda x: x / 2, attention[queries])}}
    }
    plain = dataclasses.replace(config, model=standard(config.model))
    np.testing.assert_allclose(found, logits_of(plain, halved, TOKENS) / 4, rtol=1e-5, atol=1e-6)
    assert np.abs(found - logits_of(plain, params, TOKENS) / 4).max() > 1e-3, "the queries' factor should be seen"

    cache = Cache.empty(config.model, 2, 12)
    cached = forward.prefill(params, config.model, TOKENS, np.array([12, 7]), cache)[0]
    np.testing.assert_allclose(cached, [found[0, 11], found[1, 6]], rtol=1e-4, atol=1e-5)

    export = huggingface.prepare(config.model, named_leaves(params))
    huggingface.write(tmp_path, export, None)
    _, loaded = huggingface.load(tmp_path)
    np.testing.assert_allclose(logits_of(plain, loaded, TOKENS), found, rtol=1e-5, atol=1e-6)


def test_bfloat16_parameters_are_folded_without_a_rounding_or_not_at_all() -> None:
    config = small(WIDE, model__param_dtype="bfloat16", model__mup_base_dim=48)
    with pytest.raises(UserError, match=r"model.mup_base_dim=48 .* 0.75, by which model.param_dtype=bfloat16"):
        folded(config.model, named_leaves(random_params(config)))


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"model.parameterization": "mup"}, "model.parameterization=mup needs model.mup_base_dim, the model_dim at which"),
        ({"model.mup_base_dim": 16}, "model.mup_base_dim=16 is for model.parameterization=mup, not standard"),
        ({"model.mup_base_head_dim": 8}, "model.mup_base_head_dim=8 is for model.parameterization=mup, not standard"),
    ],
)
def test_the_door_refuses(knobs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        small(knobs)


# --- the coordinate check ---------------------------------------------

SEEDS, STEPS = range(6), 2
TINY = {
    "data.source": "text",
    "data.tokenizer": "char",
    "data.packing": "windows",
    "data.split_by": "tail",
    "data.batch_size": 16,
    "model.vocab_size": 0,
    "model.max_seq_len": 12,
    "model.num_layers": 1,
    "model.model_dim": 32,
    "model.num_heads": 2,
    "model.attention": "dense",
    "optimizer.learning_rate": 1e-3,
}
AT_32 = {"model.parameterization": "mup", "model.mup_base_dim": 32}
MUON = {"optimizer.name": "muon", "optimizer.learning_rate": 0.01, "optimizer.muon_adam_learning_rate": 1e-3}


@pytest.mark.parametrize("optimizer", [{}, MUON], ids=["adamw", "muon"])
def test_activations_keep_their_size_under_mup_and_not_without(optimizer: dict[str, Any], tmp_path: Any) -> None:
    letters = np.random.default_rng(0).choice(list("abcdefgh ."), 20_000, p=np.arange(1, 11) / 55)
    (tmp_path / "text.txt").write_text("".join(letters))
    knobs = TINY | optimizer | {"data.path": str(tmp_path / "text.txt")}
    data = load_dataset(small(knobs), lambda _: None, tmp_path)

    def measured(width: int, **more: Any) -> Any:
        config = small(knobs, more).with_vocab_size(data.tokenizer.vocab_size)
        return coordinates.measure(coordinates.at_width(config, width), data.train, STEPS, SEEDS)

    at_base = measured(32, **AT_32)  # where the two are the same
    under_mup = coordinates.slopes((32, 128), [at_base, measured(128, **AT_32)])
    assert [line for line in under_mup if line.judged and not line.passes] == []
    if optimizer:  # initial weights, of which every scale tells, are the same for all optimizers
        return
    without = coordinates.slopes((32, 128), [at_base, measured(128)])
    failing = {(line.quantity, line.measure) for line in without if line.judged and not line.passes}
    assert {("mlp.0", "scale"), ("residual.0", "change"), ("logits", "change")} <= failing


def test_widths_that_do_not_fit_are_refused() -> None:
    config = small(model__num_kv_heads=2)
    wide = coordinates.at_width(config, 64).model
    assert (wide.model_dim, wide.num_heads, wide.num_kv_heads, wide.head_dim, wide.mlp_dim) == (64, 16, 8, 4, 256)
    with pytest.raises(
        UserError, match="at width 12 model.num_kv_heads would be 1.5; it is 2 at the recipe's model.model_dim=16"
    ):
        coordinates.at_width(config, 12)
