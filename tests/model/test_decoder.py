"""The decoder as a whole: against a float64 forward written from the papers, and in the properties that training rests on."""

from __future__ import annotations

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec

from gptjax.config import MeshConfig
from gptjax.model import primitives
from gptjax.model.attention import ATTENTION_BACKENDS, Cache
from gptjax.model.block import Block
from gptjax.model.decoder import Decoder
from gptjax.model.embedding import Embedding
from gptjax.model.layers import ACTIVATIONS, Norm
from gptjax.model.positions import rotary_angles, rotate
from gptjax.model.rows import Rows
from gptjax.parallel import sharding
from gptjax.parallel.mesh import make_mesh
from gptjax.train.groups import parameter_path
from gptjax.train.objectives import causal
from gptjax.train.step import example_loss, init_params
from tests.small import GPT2, KINDS, LLAMA, NEOX, packed_row, random_batch, random_params, small, tree_close

pytestmark = pytest.mark.usefixtures("unoptimised")

# --- golden: float64 numpy ---------------------------------------------

ERF = np.vectorize(math.erf)
ACTIVATION_64 = {
    "gelu": lambda x: 0.5 * x * (1 + ERF(x / math.sqrt(2))),
    "gelu_tanh": lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3))),
    "relu": lambda x: np.where(x > 0, x, 0),
    "relu2": lambda x: np.where(x > 0, x, 0) ** 2,
    "silu": lambda x: x / (1 + np.exp(-x)),
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "identity": lambda x: x,
}


def norm_64(model: Any, p: Any, x: np.ndarray) -> np.ndarray:
    if model.norm == "rmsnorm":
        return x / np.sqrt((x * x).mean(-1, keepdims=True) + model.norm_epsilon) * p["scale"]
    centred = x - x.mean(-1, keepdims=True)
    return centred / np.sqrt(x.var(-1, keepdims=True) + model.norm_epsilon) * p["scale"] + p.get("bias", 0.0)


def rotate_64(x: np.ndarray, positions: np.ndarray, frequencies: np.ndarray, factor: float = 1.0) -> np.ndarray:
    """[T, N, H]: each pair (i, i + R/2) as a complex number, turned by its angle; what is behind the pairs stays."""
    half = len(frequencies)
    turn = factor * np.exp(1j * positions[:, None] * frequencies)[:, None]
    z = (x[..., :half] + 1j * x[..., half : 2 * half]) * turn
    return np.concatenate([z.real, z.imag, x[..., 2 * half :]], -1)


def frequencies_64(model: Any) -> np.ndarray:
    """Pair by pair, from the papers: the wavelength decides what becomes of it."""
    width = round(model.head_dim * model.rotary_fraction)
    original, scale, base = model.rope_original_max_seq_len or model.max_seq_len, model.rope_scaling_factor, model.rope_base
    if model.rope_scaling == "dynamic":
        base *= (scale * model.max_seq_len / original - (scale - 1)) ** (width / (width - 2))
    found = []
    for i in range(width // 2):
        frequency = base ** (-2 * i / width)
        wavelength = 2 * math.pi / frequency
        if model.rope_scaling == "linear":
            frequency /= scale
        if model.rope_scaling == "llama3":
            low, high = original / model.rope_low_freq_factor, original / model.rope_high_freq_factor
            if wavelength > low:
                frequency /= scale
            elif wavelength >= high:
                smooth = (original / wavelength - model.rope_low_freq_factor) / (
                    model.rope_high_freq_factor - model.rope_low_freq_factor
                )
                frequency = (1 - smooth) * frequency / scale + smooth * frequency
        if model.rope_scaling == "yarn":
            # The pair, counted in fractions, that turns so often within the original context.
            fast, slow = (
                width / 2 * math.log(original / (2 * math.pi * turns), base)
                for turns in (model.rope_beta_fast, model.rope_beta_slow)
            )
            if model.rope_truncate:
                fast, slow = math.floor(fast), math.ceil(slow)
            fast, slow = max(fast, 0), min(slow, width - 1)
            ramp = min(max((i - fast) / (slow - fast), 0), 1)
            frequency = ramp * frequency / scale + (1 - ramp) * frequency
        found.append(frequency)
    return np.array(found)


def forward_64(model: Any, params: Any, tokens: np.ndarray, positions: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """Logits [T, V] of one row, with loops over layers, heads and queries."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = p["embed"]["tokens"][tokens]
    if model.position == "learned":
        x = x + p["embed"]["positions"][positions]
    for number in range(model.num_layers):
        layer = jax.tree.map(lambda leaf, n=number: leaf[n], p["layers"])
        a = layer["attention"]
        h = norm_64(model, layer["attention_norm"], x)
        q, k, v = (
            np.einsum("td,dnh->tnh", h, a[name]["kernel"]) + a[name].get("bias", 0.0) for name in ("query", "key", "value")
        )
        if model.query_key_norm:
            q, k = norm_64(model, a["query_norm"], q), norm_64(model, a["key_norm"], k)
        if model.position == "rotary":
            factor = model.rope_attention_factor or 0.1 * math.log(model.rope_scaling_factor) + 1
            factor = factor if model.rope_scaling == "yarn" else 1.0
            q, k = (rotate_64(y, positions, frequencies_64(model), factor) for y in (q, k))
        mixed = np.zeros_like(q)
        for head in range(model.num_heads):
            shared = head // (model.num_heads // model.num_kv_heads)
            for t in range(len(tokens)):
                seen = [s for s in range(t + 1) if segments[s] == segments[t]]
                scores = k[seen, shared] @ q[t, head] / math.sqrt(model.head_dim)
                weights = np.exp(scores - scores.max())
                mixed[t, head] = weights / weights.sum() @ v[seen, shared]
        before, x = x, x + np.einsum("tnh,nhd->td", mixed, a["output"]["kernel"]) + a["output"].get("bias", 0.0)
        m = layer["mlp"]
        h = norm_64(model, layer["mlp_norm"], before if model.block == "parallel" else x)
        up = h @ m["up"]["kernel"] + m["up"].get("bias", 0.0)
        if model.gated_mlp:
            hidden = ACTIVATION_64[model.activation](h @ m["gate"]["kernel"] + m["gate"].get("bias", 0.0)) * up
        else:
            hidden = ACTIVATION_64[model.activation](up)
        x = x + hidden @ m["down"]["kernel"] + m["down"].get("bias", 0.0)
    x = norm_64(model, p["final_norm"], x)
    return x @ (p["embed"]["tokens"].T if model.tied_embeddings else p["head"])


def apply(config: Any, params: Any, batch: Any) -> jax.Array:
    example = causal(batch)
    return Decoder(config.model).apply({"params": params}, example.inputs, example.positions, segment_ids_BT=example.segment_ids)[
        0
    ]


STRETCHED = LLAMA | {"model.head_dim": 8, "model.rope_scaling_factor": 4.0, "model.rope_original_max_seq_len": 10}
VARIANTS = {
    "gpt2": GPT2,
    "llama": LLAMA,
    "gpt2 exact gelu, no norm bias, untied": {
        "model.activation": "gelu",
        "model.norm_bias": False,
        "model.tied_embeddings": False,
    },
    "llama with biases, tied, wide heads": LLAMA
    | {
        "model.attention_bias": True,
        "model.mlp_bias": True,
        "model.tied_embeddings": True,
        "model.head_dim": 6,
        "model.rope_base": 100.0,
    },
    "relu, no positions, one key head": {"model.activation": "relu", "model.position": "none", "model.num_kv_heads": 1},
    "parallel, half of each head rotated": NEOX,
    "normed queries and keys, no bias on the output": LLAMA
    | {"model.attention_bias": True, "model.attention_output_bias": False, "model.query_key_norm": True},
    "linear": LLAMA | {"model.rope_scaling": "linear", "model.rope_scaling_factor": 3.0},
    "dynamic": STRETCHED | {"model.rope_scaling": "dynamic"},
    "llama3": STRETCHED | {"model.rope_scaling": "llama3", "model.rope_low_freq_factor": 0.2, "model.rope_high_freq_factor": 1.0},
    "yarn": STRETCHED | {"model.rope_scaling": "yarn", "model.rope_beta_fast": 2.0, "model.rope_beta_slow": 0.1},
    "yarn in fractions": STRETCHED
    | {
        "model.rope_scaling": "yarn",
        "model.rope_beta_fast": 2.0,
        "model.rope_beta_slow": 0.1,
        "model.rope_truncate": False,
        "model.rope_attention_factor": 1.3,
    },
}


@pytest.mark.parametrize("backend", ["dense", "blockwise"])
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_equal_a_float64_forward(variant: str, backend: str) -> None:
    if backend == "blockwise" and variant not in KINDS:
        pytest.skip("the backends are compared on the two main kinds")
    config = small(VARIANTS[variant], model__attention=backend)
    params = random_params(config)
    batch = random_batch(config, rows=2)
    logits = np.asarray(apply(config, params, batch))
    example = causal(batch)
    for row in range(2):
        expected = forward_64(
            config.model, params, *(np.asarray(x[row]) for x in (example.inputs, example.positions, example.segment_ids))
        )
        np.testing.assert_allclose(logits[row], expected, rtol=2e-5, atol=2e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_activations_equal_float64(name: str) -> None:
    x = np.concatenate([np.linspace(-8, 8, 161), [-40.0, 40.0]])
    value, slope = jax.vmap(jax.value_and_grad(ACTIVATIONS[name]))(jnp.asarray(x, jnp.float32))
    np.testing.assert_allclose(value, ACTIVATION_64[name](x), rtol=2e-6, atol=2e-6)
    step = 1e-5
    differences = (ACTIVATION_64[name](x + step) - ACTIVATION_64[name](x - step)) / (2 * step)
    smooth = np.abs(x) > step  # the kink of relu
    np.testing.assert_allclose(np.asarray(slope)[smooth], differences[smooth], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("norm", "bias"), [("layernorm", True), ("layernorm", False), ("rmsnorm", False)])
def test_norms_and_their_gradients_equal_float64(norm: str, bias: bool) -> None:
    model = small(model__norm=norm, model__norm_bias=bias, model__norm_epsilon=1e-2).model
    rng = np.random.default_rng(0)
    x = 3 + rng.standard_normal((2, 3, 16)) * np.array([1e-2, 1, 30])[:, None]
    p = {"scale": 1 + rng.standard_normal(16)} | ({"bias": rng.standard_normal(16)} if bias else {})
    out = rng.standard_normal(x.shape)
    f32 = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), (p, x))

    def cost(p: Any, x: Any) -> Any:
        return jnp.sum(Norm(model).apply({"params": p}, x) * out)

    np.testing.assert_allclose(Norm(model).apply({"params": f32[0]}, f32[1]), norm_64(model, p, x), rtol=2e-5, atol=2e-5)
    gradient_p, gradient_x = jax.grad(cost, argnums=(0, 1))(*f32)
    for index in [(0, 0, 3), (1, 1, 0), (0, 2, 15)]:
        step = np.zeros_like(x)
        step[index] = 1e-5
        slope = ((norm_64(model, p, x + step) - norm_64(model, p, x - step)) * out).sum() / 2e-5
        np.testing.assert_allclose(gradient_x[index], slope, rtol=1e-3, atol=1e-4)
    for name, leaf in p.items():
        step = np.zeros_like(leaf)
        step[5] = 1e-5
        slope = ((norm_64(model, p | {name: leaf + step}, x) - norm_64(model, p | {name: leaf - step}, x)) * out).sum() / 2e-5
        np.testing.assert_allclose(gradient_p[name][5], slope, rtol=1e-3, atol=1e-4)


def test_bfloat16_tables_are_added_in_float32() -> None:
    model = small(model__param_dtype="bfloat16").model
    params = random_params(small(model__param_dtype="bfloat16"))["embed"]
    x = Embedding(model).apply({"params": params}, jnp.array([[3, 5]]), jnp.array([[0, 1]]))
    rows = [np.asarray(params[name], np.float32)[at] for name, at in (("tokens", [3, 5]), ("positions", [0, 1]))]
    np.testing.assert_array_equal(x[0], rows[0] + rows[1])


def test_rotary_equals_complex_turning_and_sees_only_distance() -> None:
    rng = np.random.default_rng(0)
    q, k = rng.standard_normal((2, 1, 9, 3, 8))
    positions = np.array([[0, 1, 2, 5, 9, 20, 100, 500, 1023]])
    model = small(LLAMA, model__head_dim=8).model
    turned = rotate(jnp.asarray(q, jnp.float32), rotary_angles(jnp.asarray(positions), model))
    expected = rotate_64(q[0], positions[0], 10000.0 ** (-np.arange(4) / 4))
    np.testing.assert_allclose(turned[0], expected, atol=2e-4)  # 1023 radians in float32: 6e-5
    np.testing.assert_array_equal(turned[0, 0], q[0, 0].astype(np.float32))  # position 0 turns nothing

    def score(p: int, s: int) -> np.ndarray:
        one = [rotate(jnp.asarray(x[:, :1], jnp.float32), rotary_angles(jnp.array([[at]]), model)) for x, at in ((q, p), (k, s))]
        return np.asarray((one[0] * one[1]).sum(-1))

    np.testing.assert_allclose(score(7, 3), score(107, 103), atol=1e-4)
    assert np.abs(score(7, 3) - score(7, 4)).max() > 1e-2


@pytest.mark.parametrize(
    "knobs", [NEOX, LLAMA | {"model.query_key_norm": True, "model.rope_scaling": "linear"}], ids=["neox", "qk"]
)
def test_cached_logits_equal_the_uncached_with_every_knob(knobs: dict[str, Any]) -> None:
    config = small(knobs)
    model, params = config.model, random_params(config)
    tokens = np.random.default_rng(1).integers(0, 23, (2, 6)).astype(np.int32)
    expected = Decoder(model).apply({"params": params}, tokens)[0]
    pieces, cache = [], Cache.empty(model, 2, 6)
    for start, end in ((0, 4), (4, 5), (5, 6)):
        positions = np.broadcast_to(np.arange(start, end, dtype=np.int32), (2, end - start))
        logits, cache = Decoder(model).apply({"params": params}, tokens[:, start:end], positions, cache=cache)
        pieces.append(logits)
    np.testing.assert_allclose(np.concatenate(pieces, 1), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["block", "rotary_fraction", "query_key_norm", "rope_scaling"])
def test_gradients_of_the_knobs_equal_differences(name: str) -> None:
    """Along one random direction in the space of all parameters, in float32: central differences are good to a few 1e-3."""
    changes = {
        "block": {"model.block": "parallel"},
        "rotary_fraction": {"model.rotary_fraction": 0.5},
        "query_key_norm": {"model.query_key_norm": True},
        "rope_scaling": {"model.rope_scaling": "yarn", "model.rope_scaling_factor": 4.0},
    }[name]
    config = small(LLAMA, changes)
    params = random_params(config)
    cost = jax.jit(lambda p: example_loss(config, p, causal(random_batch(config, rows=2)), None)[0])
    direction = jax.tree.map(lambda leaf: leaf / 10, random_params(config, seed=1))
    slope = sum(jnp.vdot(g, d) for g, d in zip(jax.tree.leaves(jax.grad(cost)(params)), jax.tree.leaves(direction), strict=True))
    ahead, behind = (cost(jax.tree.map(lambda p, d, s=sign: p + s * 1e-2 * d, params, direction)) for sign in (1, -1))
    np.testing.assert_allclose(slope, (ahead - behind) / 2e-2, rtol=1e-2)


# --- causality and packing ---------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("backend", sorted(name for name, backend in ATTENTION_BACKENDS.items() if not backend.platforms))
@pytest.mark.parametrize("segments", [False, True])
def test_no_gradient_reaches_a_later_token(backend: str, kind: str, segments: bool) -> None:
    """Tokens are distinct and the head is untied: the gradient of row i of the embedding is that of input i."""
    length = 12
    config = small(KINDS[kind], model__attention=backend, model__tied_embeddings=False)
    params = random_params(config)
    tokens = jnp.arange(length)[None]
    segment_ids = jnp.array([[1] * 5 + [2] * 7]) if segments else None

    def losses(table: jax.Array) -> jax.Array:
        held = params | {"embed": params["embed"] | {"tokens": table}}
        logits, _ = Decoder(config.model).apply({"params": held}, tokens, segment_ids_BT=segment_ids)
        return -jax.nn.log_softmax(logits[0])[:, 3]

    slopes = np.abs(jax.jit(jax.jacrev(losses))(params["embed"]["tokens"]))[:, :length].max(-1)  # [loss, input]
    seen = np.tril(np.ones((length, length), bool))
    if segments:
        seen &= np.asarray(segment_ids[0])[:, None] == np.asarray(segment_ids[0])[None]
    assert (slopes[~seen] == 0).all()
    assert (slopes[seen] > 0).all()


@pytest.fixture(scope="module", params=[(kind, backend) for kind in KINDS for backend in ("dense", "blockwise")], ids="-".join)
def packing(request: pytest.FixtureRequest) -> Any:
    kind, backend = request.param
    config = small(KINDS[kind], model__attention=backend)
    rng = np.random.default_rng(1)
    documents = [rng.integers(1, 23, size).astype(np.int32) for size in (5, 4, 3)]
    logits = jax.jit(lambda params, batch: apply(config, params, batch))

    def loss(params: Any, batch: Any) -> Any:
        return example_loss(config, params, causal(batch), None)

    return config, random_params(config), documents, logits, jax.jit(jax.value_and_grad(loss, has_aux=True))


def test_packed_equals_unpacked(packing: Any) -> None:
    """Sums of a few dozen float32 terms in another order: 1e-5 of the largest is some 80 roundings."""
    config, params, documents, _, loss = packing
    (together, parts), gradients = loss(params, packed_row(documents, 13))
    assert parts["weight_sum"] == 4 + 3 + 2
    alone = [loss(params, packed_row([document], 13)) for document in documents]
    np.testing.assert_allclose(together, sum(one[0][0] for one in alone), rtol=1e-5)
    summed = jax.tree.map(lambda *leaves: sum(leaves), *(one[1] for one in alone))
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(summed))
    tree_close(gradients, summed, rtol=1e-5, atol=1e-5 * largest)


def test_editing_one_document_leaves_the_others_bits(packing: Any) -> None:
    _, params, documents, logits, _ = packing
    before = np.asarray(logits(params, packed_row(documents, 13)))[0]
    for edited, (start, end) in enumerate([(0, 5), (5, 9), (9, 12)]):
        changed = [(document + 7) % 22 + 1 if number == edited else document for number, document in enumerate(documents)]
        after = np.asarray(logits(params, packed_row(changed, 13)))[0]
        others = np.r_[0:start, end:12]
        np.testing.assert_array_equal(after[others], before[others])
        assert (after[start:end] != before[start:end]).any(-1).all()


# --- one model in several forms ---------------------------------------------


def loss_and_gradient(config: Any, params: Any) -> Any:
    example = causal(random_batch(config, seed=2, rows=4))
    keys = primitives.row_keys(jax.random.key(3), jnp.arange(4)) if config.model.residual_dropout else None
    return jax.jit(jax.value_and_grad(lambda p: example_loss(config, p, example, keys)[0]))(params)


@pytest.fixture(scope="module", params=KINDS)
def plain(request: pytest.FixtureRequest) -> Any:
    knobs = KINDS[request.param] | {"model.num_layers": 3, "model.residual_dropout": 0.2, "model.embedding_dropout": 0.1}
    config = small(knobs)
    params = random_params(config)
    return knobs, params, loss_and_gradient(config, params)


@pytest.mark.parametrize("form", [{"scan_unroll": 0}, {"remat": "dots"}, {"remat": "full", "scan_unroll": 0}], ids=str)
def test_unrolling_and_remat_change_nothing(plain: Any, form: dict[str, Any]) -> None:
    knobs, params, (loss, gradients) = plain
    config = small(knobs, **{f"model__{name}": value for name, value in form.items()})
    other_loss, other_gradients = loss_and_gradient(config, params)
    np.testing.assert_allclose(other_loss, loss, rtol=2e-6)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients))
    tree_close(other_gradients, gradients, rtol=1e-5, atol=2e-6 * largest)


@pytest.mark.parametrize("kind", KINDS)
def test_scan_equals_a_loop_over_blocks(kind: str) -> None:
    config = small(KINDS[kind], model__num_layers=3)
    model, params = config.model, random_params(config)
    example = causal(random_batch(config, rows=3))
    scanned, _, _ = Decoder(model).apply(
        {"params": params}, example.inputs, example.positions, segment_ids_BT=example.segment_ids, method=Decoder.hidden
    )
    x = params["embed"]["tokens"][example.inputs]
    if model.position == "learned":
        x = x + params["embed"]["positions"][example.positions]
    angles = rotary_angles(example.positions, model) if model.position == "rotary" else None
    for number in range(3):
        layer = jax.tree.map(lambda leaf, n=number: leaf[n], params["layers"])
        x, _ = Block(model).apply(
            {"params": layer}, x, Rows(example.positions, angles, example.segment_ids, None, None), jnp.int32(number), None
        )
    looped = Norm(model).apply({"params": params["final_norm"]}, x)
    np.testing.assert_allclose(scanned, looped, rtol=1e-5, atol=1e-5)


def kept_bytes(config: Any, params: Any) -> int:
    """Size of what the forward pass hands to the backward pass."""
    example = causal(random_batch(config, rows=4))
    pullback = jax.eval_shape(lambda p: jax.vjp(lambda q: example_loss(config, q, example, None)[0], p)[1], params)
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(pullback))


@pytest.mark.parametrize("kind", KINDS)
def test_remat_keeps_less(kind: str) -> None:
    params = random_params(small(KINDS[kind]))
    none, dots, full = (kept_bytes(small(KINDS[kind], model__remat=name), params) for name in ("none", "dots", "full"))
    block_input = 4 * 12 * 16 * 4
    assert full + 2 * 2 * block_input < dots < none - 2 * 2 * block_input  # by at least two vectors a layer


def test_grouped_heads_equal_repeated_ones() -> None:
    grouped, whole = small(LLAMA, model__num_kv_heads=2), small(LLAMA, model__num_kv_heads=4)
    params = random_params(grouped)
    attention = params["layers"]["attention"]
    repeated = {name: {"kernel": jnp.repeat(attention[name]["kernel"], 2, axis=2)} for name in ("key", "value")}
    params_whole = params | {"layers": params["layers"] | {"attention": attention | repeated}}
    batch = random_batch(grouped, rows=3)
    np.testing.assert_allclose(apply(grouped, params, batch), apply(whole, params_whole, batch), rtol=1e-5, atol=1e-5)


# --- parameters ---------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_every_dimension_of_every_parameter_has_a_known_name(kind: str) -> None:
    boxed = jax.eval_shape(lambda: init_params(small(KINDS[kind]), jnp.uint32(0)))
    names = nn.get_partition_spec(boxed)
    leaves = jax.tree_util.tree_leaves_with_path(names, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
    for (path, axes), shape in zip(leaves, jax.tree.leaves(nn.unbox(boxed)), strict=True):
        assert len(axes) == len(shape.shape), parameter_path(path)
        assert all(name in sharding.RULES for name in axes), (parameter_path(path), axes)
        assert (axes[0] == "layers") == parameter_path(path).startswith("layers/")


def test_a_misspelt_axis_is_a_key_error() -> None:
    mesh = make_mesh(MeshConfig(data=1))
    boxed = {"kernel": nn.LogicallyPartitioned(jnp.zeros((2, 2)), ("embed", "mpl"))}
    with pytest.raises(KeyError, match="mpl"):
        sharding.parameter_shardings(boxed, mesh)
    with pytest.raises(KeyError, match="bach"):
        sharding.constrain(jnp.zeros((2, 2)), "bach", None)


GPT2_SHAPES = {
    "embed/positions": (16, 16),
    "embed/tokens": (23, 16),
    "final_norm/bias": (16,),
    "final_norm/scale": (16,),
    "layers/attention/key/bias": (2, 4, 4),
    "layers/attention/key/kernel": (2, 16, 4, 4),
    "layers/attention/output/bias": (2, 16),
    "layers/attention/output/kernel": (2, 4, 4, 16),
    "layers/attention/query/bias": (2, 4, 4),
    "layers/attention/query/kernel": (2, 16, 4, 4),
    "layers/attention/value/bias": (2, 4, 4),
    "layers/attention/value/kernel": (2, 16, 4, 4),
    "layers/attention_norm/bias": (2, 16),
    "layers/attention_norm/scale": (2, 16),
    "layers/mlp/down/bias": (2, 16),
    "layers/mlp/down/kernel": (2, 64, 16),
    "layers/mlp/up/bias": (2, 64),
    "layers/mlp/up/kernel": (2, 16, 64),
    "layers/mlp_norm/bias": (2, 16),
    "layers/mlp_norm/scale": (2, 16),
}
LLAMA_SHAPES = {
    "embed/tokens": (23, 16),
    "final_norm/scale": (16,),
    "head": (16, 23),
    "layers/attention/key/kernel": (2, 16, 2, 4),
    "layers/attention/output/kernel": (2, 4, 4, 16),
    "layers/attention/query/kernel": (2, 16, 4, 4),
    "layers/attention/value/kernel": (2, 16, 2, 4),
    "layers/attention_norm/scale": (2, 16),
    "layers/mlp/down/kernel": (2, 24, 16),
    "layers/mlp/gate/kernel": (2, 16, 24),
    "layers/mlp/up/kernel": (2, 16, 24),
    "layers/mlp_norm/scale": (2, 16),
}


@pytest.mark.parametrize(("kind", "expected"), [("gpt2", GPT2_SHAPES), ("llama", LLAMA_SHAPES)])
def test_the_parameters_are_these(kind: str, expected: dict[str, tuple[int, ...]]) -> None:
    params = nn.unbox(jax.eval_shape(lambda: init_params(small(KINDS[kind]), jnp.uint32(0))))
    assert {parameter_path(path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(params)} == expected


@pytest.mark.parametrize("scaled", [True, False])
def test_initialisation(scaled: bool) -> None:
    """The standard deviation of n normal draws is known to 1 / sqrt(2n): four of these, at the least 4096 draws, are 4.4 %."""
    config = small(
        model__num_layers=4, model__model_dim=64, model__vocab_size=256, model__max_seq_len=64, model__init_std=0.05,
        model__scaled_residual_init=scaled, model__tied_embeddings=False,
    )  # fmt: skip
    init = jax.jit(lambda seed: nn.unbox(init_params(config, seed)))
    params = init(jnp.uint32(1))
    for path, leaf in jax.tree_util.tree_leaves_with_path(params):
        name, leaf = parameter_path(path), np.asarray(leaf)
        if name.endswith("bias"):
            assert (leaf == 0).all(), name
        elif name.endswith("scale"):
            assert (leaf == 1).all(), name
        else:
            residual = scaled and ("attention/output" in name or "mlp/down" in name)
            expected = 0.05 / math.sqrt(2 * 4) if residual else 0.05
            assert abs(leaf.std() / expected - 1) < 4 / math.sqrt(2 * leaf.size), name
            assert abs(leaf.mean()) < 4 * expected / math.sqrt(leaf.size), name
            if name.startswith("layers"):
                assert len({layer.tobytes() for layer in leaf}) == 4, f"{name}: layers start alike"
    kernels = params["layers"]["attention"]
    assert not np.array_equal(kernels["query"]["kernel"], kernels["key"]["kernel"])
    again, other = (init(jnp.uint32(seed))["head"] for seed in (1, 2))
    np.testing.assert_array_equal(again, params["head"])
    assert not np.array_equal(other, params["head"])
