"""What each method computes, against numpy in float64; what it leaves alone; and what is merged."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.adapters.attach import adapter_weights
from gptjax.adapters.compose import composed
from gptjax.adapters.merge import merged, unmerged
from gptjax.adapters.nodes import LowRank
from gptjax.config import AdapterConfig, UserError
from gptjax.model import primitives
from gptjax.model.cache import Cache
from gptjax.model.decoder import Decoder
from gptjax.parallel.mesh import make_mesh
from gptjax.parallel.sharding import laid_over
from gptjax.train.checkpoints import Checkpoints
from gptjax.train.groups import trained_count
from gptjax.train.optimizers import OPTIMIZERS, Lengths
from gptjax.train.run import named_leaves
from gptjax.train.step import abstract_state, hidden_states, init_state, make_train_step, summed_gradients
from tests.adapters.cases import CASES, MERGED, case, drawn, effective, example_of, hidden, nested
from tests.small import GPT2, LLAMA, random_batch, random_params, small, tree_close, tree_equal

PLAIN = AdapterConfig()
ROW_KEYS = jnp.asarray([[1, 2], [3, 4]], jnp.uint32)


@pytest.mark.parametrize("name", MERGED)
def test_a_method_is_its_formula_and_merged_is_the_same(name: str) -> None:
    config = case(name)
    params, example = drawn(config), example_of(config)
    wanted = effective(config, params)
    plain = dataclasses.replace(config, adapter=PLAIN)
    expected = np.asarray(hidden(plain, nested(wanted), example))
    np.testing.assert_allclose(np.asarray(hidden(config, params, example)), expected, rtol=0, atol=1e-5)
    found_config, found = merged(config, params)
    assert found_config == plain
    assert named_leaves(found).keys() == wanted.keys()
    for path, leaf in named_leaves(found).items():
        np.testing.assert_allclose(np.asarray(leaf), wanted[path], rtol=0, atol=1e-5, err_msg=path)
    np.testing.assert_allclose(np.asarray(hidden(plain, found, example)), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", ["lora", "ia3"])
def test_what_was_merged_can_be_taken_out_again(name: str) -> None:
    config = case(name)
    params = drawn(config)
    back = unmerged(config, merged(config, params)[1], params["adapters"])
    tree_close(back, params, rtol=0, atol=1e-5)


def test_dora_is_not_taken_out() -> None:
    with pytest.raises(UserError, match="adapter.method=dora with adapter.base=int8 cannot be taken out"):
        unmerged(case("int8"), {}, {})


def test_a_prompt_is_tokens_ahead() -> None:
    """Of a decoder whose vocabulary has them too."""
    config = case("prompt")
    params, example = drawn(config), example_of(config)
    size, count = config.model.vocab_size, config.adapter.prompt_length
    table = jnp.concatenate([params["embed"]["tokens"], params["adapters"]["embed"]["prompt"]])
    larger = small(model__vocab_size=size + count)
    decoder = {"embed": params["embed"] | {"tokens": table}, **{name: params[name] for name in ("layers", "final_norm")}}
    rows = example.inputs.shape[0]
    ahead = jnp.broadcast_to(size + jnp.arange(count), (rows, count))
    tokens = jnp.concatenate([ahead, example.inputs], axis=1)
    positions = jnp.concatenate([jnp.broadcast_to(jnp.arange(count), (rows, count)), example.positions + count], axis=1)
    expected: Any = Decoder(larger.model).apply({"params": decoder}, tokens, positions, method=Decoder.hidden)
    np.testing.assert_allclose(hidden(config, params, example), expected[0][:, count:], rtol=0, atol=1e-5)
    logits: Any = Decoder(config.model).apply({"params": composed(config, params)}, example.inputs)[0]
    assert logits.shape[-1] == size  # a tied table's new rows are no tokens to predict


def test_a_prefix_is_a_cache_ahead() -> None:
    """The decoder's own cache, in which the first places hold the learned keys and values."""
    config = case("prefix")
    params, example = drawn(config), example_of(config)
    count, length = config.adapter.prompt_length, example.inputs.shape[1]
    rows = example.inputs.shape[0]
    cache = Cache.empty(config.model, rows, count + length)
    own = {name: params["adapters"]["layers"]["attention"][name]["prefix"] for name in ("key", "value")}
    biases = {name: params["layers"]["attention"][name]["bias"][:, None] for name in own}
    places = jnp.broadcast_to(jnp.arange(count), (rows, count))
    for layer in range(config.model.num_layers):
        stored = {name: jnp.broadcast_to((own[name] + biases[name])[layer], (rows, count, 4, 4)) for name in own}
        cache = cache.of_layer(layer).write(stored["key"], stored["value"], places)
    decoder = {name: params[name] for name in ("embed", "layers", "final_norm")}
    positions = jnp.broadcast_to(count + jnp.arange(length), (rows, length))
    expected: Any = Decoder(config.model).apply(
        {"params": decoder}, example.inputs, positions, cache=cache.of_layer(-1), method=Decoder.hidden
    )
    example = example._replace(positions=positions - count)
    np.testing.assert_allclose(hidden(config, params, example), expected[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("name", [name for name in CASES if name != "rslora"])
def test_training_moves_what_is_trained_alone(name: str, tmp_path: pathlib.Path) -> None:
    """From fresh adapters, that change nothing but for prompts and prefixes, and int8's rounding; and goes on from a checkpoint
    as if there had been none.
    """
    config = case(name)
    lengths, mesh = Lengths.of(config, 1.0), make_mesh(config.mesh)
    state = init_state(config, lengths, mesh)
    before = {path: np.asarray(leaf) for path, leaf in named_leaves(state.params).items()}
    if name in ("lora", "ia3", "dora"):
        plain = dataclasses.replace(config, adapter=PLAIN)
        decoder = {part: value for part, value in state.params.items() if part != "adapters"}
        example = example_of(config)
        found, expected = hidden(config, state.params, example), hidden(plain, decoder, example)
        np.testing.assert_allclose(found, expected, rtol=0, atol=0 if name == "lora" else 2e-6)
    step, batch = make_train_step(config, lengths, mesh), random_batch(config)
    losses = []
    for number in range(3):
        if number == 2 and name == "int8":
            going_on = copied(state)
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[2] < losses[0]
    if name == "int8":  # the last step once more, from a checkpoint
        config_of = dataclasses.replace(config.checkpoint, asynchronous=False)
        with Checkpoints(tmp_path, config_of, lambda line: None) as checkpoints:
            checkpoints.save(2, going_on, {})
            restored = checkpoints.restore(abstract_state(config, lengths, mesh))
        assert restored is not None
        tree_equal(step(restored.state, batch)[0], state)
    trained = 0
    for path, leaf in named_leaves(state.params).items():
        if path.startswith("adapters/") or (name == "bitfit" and path.endswith("/bias")):
            assert not np.array_equal(np.asarray(leaf), before[path]), path
            trained += leaf.size
        else:
            assert np.asarray(leaf).tobytes() == before[path].tobytes(), path
    assert trained_count(config, state.params) == (trained, sum(leaf.size for leaf in before.values()))
    held = [leaf for leaf in jax.tree.leaves(state.opt_state) if leaf.ndim]
    assert sum(leaf.size for leaf in held) == 2 * trained  # Adam's two moments


def copied(state: Any) -> Any:
    """A step takes its state's memory."""
    return jax.tree.map(jnp.copy, state)


def test_a_scan_and_remat_change_nothing() -> None:
    """Rounding aside, of the gradients of adapters in one iteration of each layer and in one of all."""
    found = []
    for knobs in ({"model.scan_unroll": 1, "model.remat": "full"}, {"model.scan_unroll": 0, "model.remat": "none"}):
        config = small(*CASES["lora"], knobs)
        run = jax.jit(functools.partial(summed_gradients, config))
        found.append(run(drawn(config), random_batch(config, rows=2), None)[0]["adapters"])
    tree_close(*found, rtol=1e-4, atol=1e-5)


def test_a_scan_draws_the_same_masks() -> None:
    found = []
    for knobs in ({"model.scan_unroll": 1, "adapter.dropout": 0.3}, {"model.scan_unroll": 0, "adapter.dropout": 0.3}, {}):
        config = small(*CASES["lora"], knobs)
        run = jax.jit(functools.partial(hidden_states, config))
        found.append(np.asarray(run(drawn(config), example_of(config), ROW_KEYS)[0]))
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=1e-5)
    assert np.abs(found[0] - found[2]).max() > 0.1


def test_those_that_share_a_first_factor_share_a_mask() -> None:
    def masks(shared: bool) -> dict[str, np.ndarray]:
        config = small(*CASES["lora"], {"adapter.dropout": 0.3, "adapter.shared_input": shared})
        layers = composed(config, random_params(config), ROW_KEYS)["layers"]
        kernels = {name: layers["attention"][name]["kernel"] for name in ("query", "key", "value", "output")}
        return {name: np.asarray(kernel.keys) for name, kernel in (kernels | {"up": layers["mlp"]["up"]["kernel"]}).items()}

    def different(found: dict[str, np.ndarray]) -> int:
        return len({keys.tobytes() for keys in found.values()})

    alone, together = masks(False), masks(True)
    assert different(alone) == 5 and different(together) == 3 and (together["query"] == together["value"]).all()
    keys_LB2 = together["query"]
    assert keys_LB2.shape == (2, 2, 2) and len({keys.tobytes() for keys in keys_LB2.reshape(4, 2)}) == 4
    without = small(*CASES["lora"])
    assert composed(without, random_params(without), ROW_KEYS)["layers"]["mlp"]["up"]["kernel"].keys is None


@pytest.mark.parity
@pytest.mark.parametrize("use_dora", [False, True])
def test_dropout_is_where_peft_has_it(use_dora: bool) -> None:
    """PEFT's layer, given our mask in the place of its dropout."""
    torch = pytest.importorskip("torch")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = pytest.importorskip("peft")
        settings = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["0"], lora_dropout=0.4, use_dora=use_dora)
        model = peft.get_peft_model(torch.nn.Sequential(torch.nn.Linear(6, 5, bias=False)), settings)
    layer = model.base_model.model[0]
    rng = np.random.default_rng(0)
    x_BTI, w_IO, a_IR, b_RO = (rng.standard_normal(shape).astype(np.float32) for shape in ((2, 3, 6), (6, 5), (6, 2), (2, 5)))
    magnitude_O = rng.uniform(1, 2, 5).astype(np.float32) if use_dora else None
    own = LowRank(*map(jnp.asarray, (w_IO, a_IR, b_RO)), magnitude_O, 1.5, "float32", ROW_KEYS, 0.4)
    mask_BTI = np.asarray(primitives.dropout(jnp.ones((2, 3, 6)), 0.4, ROW_KEYS))
    assert set(np.round(mask_BTI.ravel().astype(float), 3)) == {0, 1.667}

    class Masked(torch.nn.Module):
        def forward(self, x):
            return x * torch.tensor(mask_BTI)

    given = {layer.base_layer.weight: w_IO.T, layer.lora_A["default"].weight: a_IR.T, layer.lora_B["default"].weight: b_RO.T}
    if use_dora:
        given[layer.lora_magnitude_vector["default"].weight] = magnitude_O
    with torch.no_grad():
        for parameter, value in given.items():
            parameter.copy_(torch.tensor(value))
        layer.lora_dropout["default"] = Masked()
        expected = model(torch.tensor(x_BTI)).numpy()
    np.testing.assert_allclose(np.asarray(own(jnp.asarray(x_BTI))), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("knobs", "said"),
    [
        (
            {"adapter.method": "ia3", "adapter.dropout": 0.1},
            "adapter.dropout=0.1 is for lora and dora, not for .*=ia3",
        ),
        ({"adapter.method": "lora", "adapter.dropout": 0.1, "mesh.stage": 2}, "adapter.dropout=0.1 .* mesh.stage=2 cuts up"),
    ],
)
def test_where_dropout_cannot_be(knobs: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        small(knobs)


def test_gradients_of_what_is_frozen_are_not_computed() -> None:
    """By the compiler's own count: a third of a plain step's products are such gradients."""
    found = {}
    for method in ("none", "lora"):
        config = small({"adapter.method": method, "adapter.rank": 1, "model.num_layers": 1, "model.vocab_size": 200})
        run = jax.jit(functools.partial(summed_gradients, config))
        compiled = run.lower(random_params(config), random_batch(config), None).compile()
        found[method] = compiled.cost_analysis()["flops"]
    assert found["lora"] < 0.75 * found["none"]


def test_weights_of_shared_factors_count_for_each_product() -> None:
    config = case("lora")  # 16 wide, 64 in the MLP, 2 layers
    attention = 3 * (16 * 3 + 3 * 16) + (16 * 3 + 3 * 16)
    assert adapter_weights(config) == 2 * (attention + 2 * (16 * 3 + 3 * 64))
    assert adapter_weights(case("ia3")) == 0
    assert adapter_weights(small()) is None


@pytest.mark.parametrize("rule", OPTIMIZERS)
def test_every_update_rule_takes_adapters(rule: str) -> None:
    """Traced, with a frozen base in int8 that no rule may hold anything for."""
    config = case("int8", optimizer__name=rule)
    lengths, mesh = Lengths.of(config, 1.0), make_mesh(config.mesh)
    state = abstract_state(config, lengths, mesh)
    step: Any = make_train_step(config, lengths, mesh)
    batch = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), random_batch(config))
    with laid_over(mesh, config.mesh):
        new, _ = step.compiled.eval_shape(state, batch)
    assert jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), new) == jax.tree.map(lambda leaf: (leaf.shape, leaf.dtype), state)
    held = [name for name in named_leaves(state.opt_state) if "layers/" in name or "embed" in name]
    assert held or rule == "sgd"
    assert all("adapters/layers/" in name for name in held)


def test_counts_of_models_that_everybody_knows() -> None:
    """What PEFT prints for GPT-2 with its default module c_attn, and for a Llama of 7B with q_proj and v_proj, at rank 8."""
    lora = {"adapter.method": "lora", "adapter.rank": 8}
    gpt2 = {"model.num_layers": 12, "model.model_dim": 768, "model.num_heads": 12, "model.vocab_size": 50257}
    fused = {"model.max_seq_len": 1024, "adapter.targets": ("query", "key", "value"), "adapter.shared_input": True}
    llama = {"model.num_layers": 32, "model.model_dim": 4096, "model.num_heads": 32, "model.num_kv_heads": 32}
    llama |= {"model.mlp_dim": 11008, "model.vocab_size": 32000}
    cases = {(294_912, 124_734_720): (GPT2, gpt2, fused), (4_194_304, 6_742_609_920): (LLAMA, llama)}
    for expected, knobs in cases.items():
        config = small(lora, *knobs)
        params = abstract_state(config, Lengths.of(config, 1.0), make_mesh(config.mesh)).params
        assert trained_count(config, params) == expected
