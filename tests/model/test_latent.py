"""Multi-head latent attention: against float64 loops, transformers' own, and itself with a cache that holds latents alone."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import config as c
from gptjax.generate import forward, weights
from gptjax.generate.decode import generate_tokens
from gptjax.generate.settings import GenerationConfig
from gptjax.interop.huggingface import architecture_for
from gptjax.model.attention import Cache
from gptjax.model.decoder import Decoder
from gptjax.model.latent import LatentAttention
from gptjax.model.positions import rotary_angles
from gptjax.model.rows import Rows
from gptjax.train import flops
from gptjax.train.optimizers import Lengths, make_optimizer, make_schedule, parameter_path
from tests.model.test_decoder import norm_64, rotate_64
from tests.model.test_layer_patterns import check_cached, check_forms, check_logits
from tests.small import LLAMA, random_params, small

LATENT = LLAMA | {
    "model.attention_kind": "latent",
    "model.num_kv_heads": 0,
    "model.head_dim": 6,
    "model.kv_latent_dim": 10,
    "model.query_latent_dim": 9,
    "model.rotary_head_dim": 4,
}
PLAIN = {"model.attention_kind": "latent", "model.kv_latent_dim": 10}  # learned positions, whole queries, biases
MIXED = LATENT | {
    "model.query_latent_dim": 0,
    "model.num_layers": 3,
    "model.position_pattern": ("rotary", "none"),
    "model.attention_window": 4,
    "model.attention_softcap": 2.0,
}
CASES = {"DeepSeek-V2's": LATENT, "no rotary part": PLAIN, "by layer": MIXED}


def attention_64(model: Any, a: Any, h: np.ndarray, number: int, positions: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """[T, N, H], from equations 9 to 19 of the paper, head by head."""
    wide, turning = model.head_dim, model.rotary_head_dim

    def down(name: str) -> np.ndarray:
        return norm_64(model, a[f"{name}_norm"], h @ a[name]["kernel"] + a[name].get("bias", 0.0))

    latent = down("kv_latent")
    if model.query_latent_dim:
        queries = np.einsum("tc,cnh->tnh", down("query_latent"), a["query_up"]["kernel"])
    else:
        queries = np.einsum("td,dnh->tnh", h, a["query"]["kernel"]) + a["query"].get("bias", 0.0)
    shared = h @ a["rotary_key"]["kernel"] + a["rotary_key"].get("bias", 0.0) if turning else np.zeros((len(h), 0))
    turned_q, turned_k = queries[:, :, wide:], shared[:, None]
    places = model.position_pattern or (model.position,)
    if places[number % len(places)] == "rotary":
        frequencies = model.rope_base ** (-2 * np.arange(turning // 2) / turning)
        turned_q, turned_k = (rotate_64(x, positions, frequencies) for x in (turned_q, turned_k))
    window = model.attention_window or len(h)
    mixed = np.zeros((len(h), model.num_heads, wide))
    for n in range(model.num_heads):
        keys, values = (latent @ a[name]["kernel"][:, n] for name in ("key_up", "value_up"))
        for t in range(len(h)):
            seen = [s for s in range(max(0, t + 1 - window), t + 1) if segments[s] == segments[t]]
            scores = (keys[seen] @ queries[t, n, :wide] + turned_k[seen, 0] @ turned_q[t, n]) / math.sqrt(wide + turning)
            if model.attention_softcap:
                scores = model.attention_softcap * np.tanh(scores / model.attention_softcap)
            e = np.exp(scores - scores.max())
            mixed[t, n] = e / e.sum() @ values[seen]
    return mixed


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_a_float64_forward(name: str) -> None:
    config = small(CASES[name])
    check_logits(config, random_params(config), attention_64)


@pytest.mark.parametrize("name", ["no rotary part", "by layer"])
def test_cached_logits_equal_the_uncached_and_the_cache_holds_latents_alone(name: str) -> None:
    config = small(CASES[name])
    cache = check_cached(config, random_params(config))
    model = config.model
    width = model.kv_latent_dim + model.rotary_head_dim
    assert [leaf.shape for leaf in jax.tree.leaves(cache)] == [(model.num_layers, 2, 128, 1, width)]


def test_int8_weights_are_those_that_the_cache_is_read_with() -> None:
    config = small(LATENT)
    params = random_params(config)
    tokens = np.random.default_rng(1).integers(0, 23, (2, 7)).astype(np.int32)
    positions = np.broadcast_to(np.arange(7, dtype=np.int32), (2, 7))
    prepared = weights.prepare(params, config.model, "int8")
    found, _ = jax.jit(lambda p, cache: forward.several(p, config.model, tokens, positions, cache))(
        prepared, Cache.empty(config.model, 2, 7)
    )
    expected = Decoder(config.model).apply({"params": weights.rounded(params, config.model, "int8")}, tokens)[0]
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


def test_other_ways_to_compute_it_change_nothing() -> None:
    check_forms(MIXED, {"model.attention": "dense", "model.scan_unroll": 0, "model.remat": "dots"})


def test_no_gradient_comes_from_a_later_token() -> None:
    config = small(LATENT, model__num_layers=1)
    params = random_params(config)

    def losses(table: jax.Array) -> jax.Array:
        held = params | {"embed": params["embed"] | {"tokens": table}}
        return jax.nn.log_softmax(Decoder(config.model).apply({"params": held}, jnp.arange(12)[None])[0][0])[:, 3]

    slopes = np.abs(jax.jit(jax.jacrev(losses))(params["embed"]["tokens"]))[:, :12].max(-1)
    seen = np.tril(np.ones((12, 12), bool))
    assert (slopes[~seen] == 0).all() and (slopes[seen] > 0).all()


def test_a_row_has_the_same_bits_in_any_batch() -> None:
    config = small(LATENT, model__max_seq_len=160)
    params = weights.prepare(random_params(config), config.model)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, 22, length).tolist() for length in (5, 1, 17, 130)]

    def run(numbers: list[int]) -> list[tuple[list[int], bytes]]:
        made = generate_tokens(
            params, config.model, [prompts[n % 4] for n in numbers], settings=GenerationConfig(max_new_tokens=6), seed=3,
            eos_ids=(), vocab_size=23, samples=numbers,
        )  # fmt: skip
        return [(ids.tolist(), bits.tobytes()) for ids, bits in zip(made.tokens, made.log_probs, strict=True)]

    together = run([3, 1, 5, 0, 2, 7, 4])
    assert run([0]) == together[3:4]


# --- what counts it ---------------------------------------------


def test_kernels_are_counted_and_have_their_axes() -> None:
    for knobs in (LATENT, PLAIN):
        config = small(knobs)
        params = random_params(config)
        kernels = {parameter_path(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params["layers"])}
        sizes = {name: math.prod(shape) for name, shape in kernels.items() if name.endswith("kernel")}
        layers = sum(sizes.values())
        assert flops.matmul_parameters(config.model) == layers + 16 * 23
        attention = sum(size for name, size in sizes.items() if name.startswith("attention"))
        assert flops.attention_parameters(config.model) * 2 == attention
    model = small(LATENT).model
    assert flops.flops_per_token(model, 12) == 6 * flops.matmul_parameters(model) + 6 * 2 * 12 * 4 * (10 + 6)


@pytest.mark.parametrize("name", ["muon", "adafactor"])
def test_optimizers_know_its_matrices(name: str) -> None:
    config = small(LATENT, optimizer__name=name)
    params = random_params(config)
    optimizer = make_optimizer(config, make_schedule(config.optimizer, Lengths.of(config, 1.0)), 20)
    updates, _ = jax.jit(lambda p: optimizer.update(p, optimizer.init(p), p))(params)
    if name == "adafactor":
        assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(updates))
        return
    # Muon's update of a layer is near an orthogonal matrix: singular values about 1, all of them alike.
    update = updates["layers"]["attention"]["key_up"]["kernel"][0].reshape(10, 24)
    values = np.linalg.svd(np.asarray(update, np.float64), compute_uv=False)
    assert values.min() > 0.4 * values.max()


# --- the door ---------------------------------------------

REFUSED = {
    "no width": ({"kv_latent_dim": 0}, "model.attention_kind=latent", "model.kv_latent_dim"),
    "grouped": ({"num_kv_heads": 2}, "model.num_kv_heads=2", "model.attention_kind=latent"),
    "normed keys": ({"query_key_norm": True}, "model.query_key_norm=True", "model.attention_kind=latent"),
    "part of a head": ({"rotary_fraction": 0.5}, "model.rotary_fraction=0.5", "model.attention_kind=latent"),
    "odd": ({"rotary_head_dim": 3}, "model.rotary_head_dim", "not 3"),
    "turned by nothing": ({"position": "none"}, "model.rotary_head_dim=4", "model.position=none"),
    "of no use": ({"attention_kind": "multi_head"}, "model.kv_latent_dim=10", "model.attention_kind=multi_head"),
    "too wide": ({"attention": "splash", "head_dim": 64}, "model.attention=splash", "model.head_dim + model.rotary_head_dim"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused(case: str) -> None:
    knobs, *names = REFUSED[case]
    with pytest.raises(c.UserError) as refused:
        small(LATENT, {f"model.{name}": value for name, value in knobs.items()})
    assert all(name in str(refused.value) for name in names), refused.value


def test_the_rotary_part_is_half_a_head_unless_told() -> None:
    model = small(LATENT, model__rotary_head_dim=0, model__head_dim=16).model
    assert (
        model.rotary_head_dim,
        c.underived(small(LATENT, model__rotary_head_dim=8, model__head_dim=16)).model.rotary_head_dim,
    ) == (8, 0)
    assert small(PLAIN).model.rotary_head_dim == 0


def test_export_refuses_it() -> None:
    with pytest.raises(c.UserError, match="attention_kind='latent'"):
        architecture_for(small(LATENT).model)


# --- transformers ---------------------------------------------


@pytest.mark.parity
@pytest.mark.parametrize("query_latent_dim", [9, 0])
def test_attention_equals_transformers(query_latent_dim: int) -> None:
    """Their rotary pairs stand side by side, ours half a head apart; their maps of one input, and of one latent, are fused."""
    import torch
    from transformers import DeepseekV2Config
    from transformers.models.deepseek_v2.modeling_deepseek_v2 import DeepseekV2Attention, DeepseekV2RotaryEmbedding

    model = small(LATENT, model__query_latent_dim=query_latent_dim, model__norm_epsilon=1e-6).model
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((2, 11, 16)), jnp.float32)
    positions = jnp.broadcast_to(jnp.arange(11), (2, 11))
    rows = Rows(positions, rotary_angles(positions, model), None, None, None)
    layers = random_params(small(LATENT, model__query_latent_dim=query_latent_dim))["layers"]
    p = jax.tree.map(lambda leaf: leaf[0], layers["attention"])
    ours = LatentAttention(model).apply({"params": p}, x, rows, None)[0]

    theirs = DeepseekV2Attention(
        DeepseekV2Config(
            hidden_size=16, num_attention_heads=4, q_lora_rank=query_latent_dim or None, kv_lora_rank=10, qk_nope_head_dim=6,
            qk_rope_head_dim=4, v_head_dim=6, max_position_embeddings=16, attn_implementation="eager",
            rope_parameters={"rope_type": "default", "rope_theta": 1e4},
        ),
        0,
    )  # fmt: skip
    side_by_side = [0, 2, 1, 3]
    queries = np.array(p["query_up" if query_latent_dim else "query"]["kernel"])
    queries[..., 6:] = queries[..., 6:][..., side_by_side]
    weights_of = {
        "kv_a_proj_with_mqa": np.concatenate([p["kv_latent"]["kernel"], p["rotary_key"]["kernel"][:, side_by_side]], 1),
        "kv_b_proj": np.concatenate([p["key_up"]["kernel"], p["value_up"]["kernel"]], 2).reshape(10, -1),
        "o_proj": np.array(p["output"]["kernel"]).reshape(-1, 16),
        "q_b_proj" if query_latent_dim else "q_proj": queries.reshape(queries.shape[0], -1),
    }
    state = {f"{name}.weight": torch.tensor(np.array(kernel.T)) for name, kernel in weights_of.items()}
    state["kv_a_layernorm.weight"] = torch.tensor(np.array(p["kv_latent_norm"]["scale"]))
    if query_latent_dim:
        state["q_a_proj.weight"] = torch.tensor(np.array(p["query_latent"]["kernel"]).T)
        state["q_a_layernorm.weight"] = torch.tensor(np.array(p["query_latent_norm"]["scale"]))
    theirs.load_state_dict(state)
    hidden = torch.tensor(np.array(x))
    with torch.no_grad():
        turns = DeepseekV2RotaryEmbedding(theirs.config)(hidden, torch.tensor(np.array(positions)))
        mask = torch.triu(torch.full((11, 11), -torch.inf), 1)[None, None]
        expected = theirs(hidden, mask, position_embeddings=turns)[0].numpy()
    np.testing.assert_allclose(ours, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
