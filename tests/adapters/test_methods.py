"""What each method computes, against numpy in float64; what it leaves alone; and what is merged."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.adapters.attach import adapter_weights
from gptjax.adapters.compose import composed
from gptjax.adapters.merge import merged, unmerged
from gptjax.config import AdapterConfig, UserError
from gptjax.model.cache import Cache
from gptjax.model.decoder import Decoder
from gptjax.parallel.mesh import make_mesh
from gptjax.parallel.sharding import laid_over
from gptjax.train.checkpoints import Checkpoints
from gptjax.train.groups import trained_count
from gptjax.train.optimizers import OPTIMIZERS, Lengths
from gptjax.train.run import named_leaves
from gptjax.train.step import abstract_state, init_state, make_train_step, summed_gradients
from tests.adapters.cases import CASES, MERGED, case, drawn, effective, example_of, hidden, nested
from tests.small import GPT2, LLAMA, random_batch, random_params, small, tree_close, tree_equal

PLAIN = AdapterConfig()


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
