"""Scores, sinks, prefixes and positions by distance: a layer's attention against float64 NumPy, whatever form computes it."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from gptjax.config import DISTANCE_POSITIONS, PRODUCT_SCORES, Config, ModelConfig, UserError, walk
from gptjax.generate import decode
from gptjax.generate.settings import GenerationConfig
from gptjax.interop.huggingface import architecture_for
from gptjax.model import biases, primitives, scores
from gptjax.model.attention import Attention, attend, causal_mask, masked_attention
from gptjax.model.blockwise import blockwise_attention
from gptjax.model.cache import Cache, cached_attention
from gptjax.model.decoder import Decoder
from gptjax.model.rows import Rows
from gptjax.model.scores import ATTENTION_SCORES, SINKS, Learn, Score
from tests.generate.small_models import greedy_by_full_forwards, model_config
from tests.generate.small_models import random_params as small_random_params
from tests.small import packed_row, random_params, small, tree_close

SIZES = {"model.num_heads": 6, "model.num_kv_heads": 3, "model.head_dim": 4, "model.model_dim": 8, "model.num_layers": 1}
SIZES |= {"model.max_seq_len": 300, "data.seq_len": 300}
# name: (knobs, whether some keys are seen from before them). Each knob stands in two of them, in other company.
CASES: dict[str, tuple[dict[str, Any], bool]] = {
    "additive, alibi, sink, cap, norm": (
        {
            "model.attention_score": "additive",
            "model.position": "alibi",
            "model.attention_sink": "learned",
            "model.attention_softcap": 0.8,
            "model.query_key_norm": True,
        },
        False,
    ),
    "additive, t5, window, first tokens, prefix": (
        {
            "model.attention_score": "additive",
            "model.position": "t5",
            "model.attention_window": 40,
            "model.attention_sink_tokens": 3,
        },
        True,
    ),
    "cosine, t5 both ways, sink, prefix": (
        {
            "model.attention_score": "cosine",
            "model.position": "t5",
            "model.t5_bidirectional": True,
            "model.t5_num_buckets": 12,
            "model.t5_max_distance": 50,
            "model.attention_sink": "learned",
        },
        True,
    ),
    "dot, alibi, sink, window, first tokens, cap": (
        {
            "model.attention_score": "dot",
            "model.position": "alibi",
            "model.attention_sink": "learned",
            "model.attention_window": 30,
            "model.attention_sink_tokens": 2,
            "model.attention_softcap": 2.0,
        },
        False,
    ),
}
LENGTH = 260  # three blocks of 128, the last one mostly padding


# --- the definition, in float64 ------------------------------------------------------------------


def t5_bucket(c: ModelConfig, before: int) -> int:
    """One distance's, by the steps of the paper's own description."""
    buckets, first = c.t5_num_buckets, 0
    if c.t5_bidirectional:
        buckets //= 2
        first, before = (buckets, -before) if before < 0 else (0, before)
    if before < 0:
        return 0
    exact = buckets // 2
    if before < exact:
        return first + before
    steps = math.log(before / exact) / math.log(c.t5_max_distance / exact) * (buckets - exact)
    return first + min(exact + int(steps), buckets - 1)


SLOPES_OF_6 = [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]  # four heads', then every other one of eight heads'


def seen(c: ModelConfig, ids: Any, positions: Any, prefix: Any, t: int, s: int) -> bool:
    order = s <= t or bool(prefix is not None and prefix[s])
    near = not c.attention_window or abs(t - s) < c.attention_window or positions[s] < c.attention_sink_tokens
    return order and near and ids[s] == ids[t]


def norm(c: ModelConfig, p: Any, x: np.ndarray) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt((x**2).mean(-1, keepdims=True) + c.norm_epsilon) * p["scale"] + p["bias"]


def scores_64(c: ModelConfig, p: Any, q: np.ndarray, k: np.ndarray, n: int) -> np.ndarray:
    """[T, S] of head n, before cap and positions."""
    if c.attention_score == "additive":
        return np.tanh(q[:, None] + k[None]) @ p["score_vector"][n]
    if c.attention_score == "cosine":
        lengths = np.linalg.norm(q, axis=-1)[:, None] * np.linalg.norm(k, axis=-1)
        return q @ k.T / lengths * p["cosine_norm_scale"][n]
    return q @ k.T / (math.sqrt(c.head_dim) if c.attention_score == "scaled_dot" else 1.0)


def attention_64(c: ModelConfig, p: Any, x: np.ndarray, ids: Any, positions: Any, prefix: Any) -> np.ndarray:
    """One row [T, D] through the layer's attention."""
    q, k, v = (np.einsum("td,dnh->tnh", x, p[name]["kernel"]) + p[name]["bias"] for name in ("query", "key", "value"))
    if c.query_key_norm:
        q, k = norm(c, p["query_norm"], q), norm(c, p["key_norm"], k)
    length, order = len(x), np.arange(len(x))
    mask = np.array([[seen(c, ids, positions, prefix, t, s) for s in range(length)] for t in range(length)])
    before = order[:, None] - order
    out = np.zeros_like(q)
    for n in range(c.num_heads):
        head = n // (c.num_heads // c.num_kv_heads)
        scores = scores_64(c, p, q[:, n], k[:, head], n)
        if c.attention_softcap:
            scores = c.attention_softcap * np.tanh(scores / c.attention_softcap)
        if c.position == "alibi":
            scores = scores - SLOPES_OF_6[n] * np.abs(before)
        if c.position == "t5":
            buckets = {d: t5_bucket(c, d) for d in range(-length, length)}
            scores = scores + p["distance_bias"][n][np.vectorize(buckets.get)(before)]
        weights = np.where(mask, np.exp(scores), 0.0)
        sink = np.exp(p["sink_bias"][n]) if c.attention_sink == "learned" else 0.0
        out[:, n] = weights / (weights.sum(1, keepdims=True) + sink) @ v[:, head]
    return np.einsum("tnh,nhd->td", out, p["output"]["kernel"]) + p["output"]["bias"]


# --- every form against it ---------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Given:
    config: ModelConfig
    params: Any
    x: np.ndarray
    rows: Rows


def given(name: str) -> Given:
    """Two texts in one row; of the second, the first 60 tokens are seen from before them."""
    knobs, has_prefix = CASES[name]
    config = small(SIZES, knobs)
    rng = np.random.default_rng(1)
    whole = jax.tree.map(lambda leaf: leaf[0], random_params(config, std=0.5)["layers"]["attention"])
    ids = np.repeat([1, 2], [70, LENGTH - 70]).astype(np.int32)
    positions = np.concatenate([np.arange(70), np.arange(LENGTH - 70)]).astype(np.int32)
    prefix = (ids == 2) & (positions < 60)
    x = rng.standard_normal((LENGTH, config.model.model_dim))
    rows = Rows(positions[None], None, ids[None], prefix[None] if has_prefix else None, None)
    return Given(config.model, whole, x, rows)


def out_64(g: Given, params: Any, x: np.ndarray) -> np.ndarray:
    prefix = None if g.rows.prefix_BT is None else g.rows.prefix_BT[0]
    return attention_64(g.config, params, x, g.rows.segment_ids_BT[0], g.rows.positions_BT[0], prefix)


@pytest.mark.parametrize("name", CASES)
def test_values_and_gradients_equal_float64(name: str) -> None:
    """The gradient along one direction of every parameter and input, against central differences of the definition; and none of
    what comes later.
    """
    g = given(name)
    rng = np.random.default_rng(2)
    cotangent = rng.standard_normal((LENGTH, g.config.model_dim))
    cotangent[200:] = 0  # past the prefix
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), g.params)
    expected = out_64(g, exact, g.x)
    ahead = [jax.tree.map(lambda leaf: rng.standard_normal(leaf.shape), tree) for tree in (exact, g.x)]

    def moved(by: float, only: str) -> float:
        tree, x = dict(exact), g.x
        if only == "x":
            x = x + by * ahead[1]
        else:
            tree[only] = jax.tree.map(lambda leaf, along: leaf + by * along, exact[only], ahead[0][only])
        return float((out_64(g, tree, x) * cotangent).sum())

    slopes = {only: (moved(1e-5, only) - moved(-1e-5, only)) / 2e-5 for only in (*exact, "x")}
    for backend in ("dense", "blockwise"):
        config = dataclasses.replace(g.config, attention=backend)

        @jax.jit
        def both(params: Any, x: Any, config: ModelConfig = config) -> Any:
            out, back = jax.vjp(lambda p, x: Attention(config).apply({"params": p}, x[None], g.rows, None)[0][0], params, x)
            return out, back(jnp.asarray(cotangent, jnp.float32))

        out, (of_params, of_x) = both(g.params, jnp.asarray(g.x, jnp.float32))
        np.testing.assert_allclose(out, expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max(), err_msg=backend)
        assert (np.asarray(of_x)[200:] == 0).all() and (np.asarray(of_x)[:200] != 0).any(1).all(), backend
        ours = {only: (of_params[only], ahead[0][only]) for only in exact} | {"x": (of_x, ahead[1])}
        for only, (gradient, along) in ours.items():
            terms = jax.tree.map(lambda one, other: (np.asarray(one, np.float64) * other).sum(), gradient, along)
            size = math.sqrt(sum(float((np.asarray(leaf, np.float64) ** 2).sum()) for leaf in jax.tree.leaves(gradient)))
            assert abs(sum(jax.tree.leaves(terms)) - slopes[only]) <= 1e-5 * (size + abs(slopes[only])) + 2e-5, (backend, only)


@pytest.mark.parametrize("name", CASES)
def test_with_a_cache_it_is_the_same(name: str) -> None:
    """The second text alone: filled into the cache's second block, some tokens at once, and a last one by itself."""
    g = given(name)
    length, filled = 150, 139
    x = np.asarray(g.x[70 : 70 + length], np.float32)
    exact = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), g.params)
    prefix = None if g.rows.prefix_BT is None else g.rows.prefix_BT[0, 70 : 70 + length]
    positions = np.arange(length, dtype=np.int32)
    expected = attention_64(g.config, exact, x.astype(np.float64), np.ones(length), positions, prefix)

    @jax.jit
    def run(x: Any, positions: Any, prefix: Any, cache: Cache) -> Any:
        rows = Rows(positions[None], None, None, None if prefix is None else prefix[None], None)
        out, cache = Attention(g.config).apply({"params": g.params}, x[None], rows, cache.of_layer(0))
        return out[0], cache.of_layer(-1)

    cache, found = Cache.empty(g.config, 1, length), []
    for start, end in ((0, filled), (filled, length - 1), (length - 1, length)):
        of_part = None if prefix is None or start else prefix[start:end]
        out, cache = run(x[start:end], positions[start:end], of_part, cache)
        found.append(out)
    np.testing.assert_allclose(np.concatenate(found), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


# --- who is seen -------------------------------------------------------------------------------

# The first four tokens are seen from before them, the window is 3, the first token outlasts it.
WINDOWED = """
    11100000
    11110000
    11110000
    11110000
    10111000
    10011100
    10001110
    10000111
"""
# Two texts; of the second, two tokens are seen from before them.
TWO_TEXTS = """
    10000000
    11000000
    11100000
    11110000
    00001100
    00001100
    00001110
    00001111
"""
MASKS: dict[str, tuple[str, dict[str, Any], list[int], list[int]]] = {
    "window": (WINDOWED, {"attention_window": 3, "attention_sink_tokens": 1}, [0, 1, 2, 3], [0] * 8),
    "two texts": (TWO_TEXTS, {}, [4, 5], [0] * 4 + [1] * 4),
    "all of one": ("11111111\n" * 8, {}, list(range(8)), [0] * 8),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_are_these(name: str) -> None:
    """Values that are the unit vectors show the weights; those that are not 0 are the mask."""
    picture, knobs, prefixed, texts = MASKS[name]
    mask = np.array([[int(digit) for digit in line] for line in picture.split()])
    config = ModelConfig(vocab_size=5, num_heads=2, num_kv_heads=1, head_dim=8, mlp_dim=8, **knobs)
    rng = np.random.default_rng(0)
    q, k = (jnp.asarray(rng.standard_normal((1, 8, n, 8)), jnp.float32) for n in (2, 1))
    v = jnp.eye(8)[None, :, None]
    ids, prefix = np.array([texts]), np.isin(np.arange(8), prefixed)[None]
    anchors = np.arange(8)[None] < config.attention_sink_tokens if config.attention_sink_tokens else None
    for backend in ("dense", "blockwise"):
        chosen = dataclasses.replace(config, attention=backend)
        weights = attend(chosen, q, k, v, ids, prefix_BT=prefix, anchors_BT=anchors)
        for n in range(2):
            np.testing.assert_array_equal(np.asarray(weights[0, :, n]) > 0, mask)
    if any(texts):
        return
    positions = jnp.arange(8)[None]
    cache = Cache.empty(config, 1, 8).of_layer(0).write(k, v, positions)
    options: Any = {"window": config.attention_window, "anchors": config.attention_sink_tokens, "scale": 1.0}
    weights = cached_attention(q, cache, positions, prefix_BT=prefix, **options)
    for n in range(2):
        np.testing.assert_array_equal(np.asarray(weights[0, :, n]) > 0, mask)


def test_many_blocks_drop_the_weights_that_dense_drops() -> None:
    """Eighteen blocks of queries, several to a loop, with everything on; a score in parts of a block."""
    rng = np.random.default_rng(0)
    q, k, v, g = (jnp.asarray(rng.standard_normal((2, 70, n, 4)), jnp.float32) for n in (4, 2, 2, 4))
    shapes = {"score_vector": (4, 4), "sink_bias": (4,), "bias": (4, 139)}
    learned = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    ids = jnp.asarray(np.sort(rng.integers(0, 3, (2, 70)), axis=1), jnp.int32)
    prefix, anchors = (jnp.asarray(rng.random((2, 70)) < share) for share in (0.3, 0.2))
    keys = primitives.row_keys(jax.random.key(1), jnp.arange(2))
    options: Any = {"function": "additive", "dropout_rate": 0.3, "dropout_keys": keys, "softcap": 1.5}
    mask = causal_mask(70, ids, 11, prefix, anchors)
    marks: Any = {"segment_ids_BT": ids, "prefix_BT": prefix, "anchors_BT": anchors, "window": 11, "block_size": 4}
    forms = (
        lambda q, k, v, learned: masked_attention(q, k, v, mask, learned=learned, **options),
        lambda q, k, v, learned: blockwise_attention(q, k, v, learned=learned, **marks, **options),
    )

    def both(form: Any) -> Any:
        out, back = jax.vjp(form, q, k, v, learned)
        return out, back(g)

    dense, blockwise = (jax.jit(functools.partial(both, form))() for form in forms)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(dense))
    tree_close(blockwise, dense, rtol=1e-5, atol=1e-6 * largest)


# --- the tables ----------------------------------------------------------------------------------


def test_knobs_and_tables_name_the_same() -> None:
    choices = {key: field.metadata["choices"] for key, _, field in walk(Config())}
    assert choices["model.attention_score"] == tuple(ATTENTION_SCORES)
    assert choices["model.attention_sink"] == tuple(SINKS)
    assert set(PRODUCT_SCORES) == {name for name, score in ATTENTION_SCORES.items() if score.function is None}
    assert set(DISTANCE_POSITIONS) == set(biases.DISTANCE_BIASES) < set(choices["model.position"])


def test_a_score_of_ones_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """Minus a learned number times the squared distance of query and key: one function, one entry."""

    def near(learned: Any, q_BKGtH: Any, k_BKsH: Any) -> Any:
        apart = q_BKGtH[..., None, :] - k_BKsH[:, :, None, None]
        return -learned["sharpness"][:, :, None, None] * jnp.square(apart).sum(-1)

    ones = Learn(lambda c: jax.nn.initializers.ones)
    monkeypatch.setitem(ATTENTION_SCORES, "near", Score(function=near, learned={"sharpness": ones}))
    monkeypatch.setattr(scores, "_MOST", 2 * 4 * 3 * 3)  # parts of three queries and three keys
    config = ModelConfig(vocab_size=5, model_dim=8, num_heads=2, num_kv_heads=1, head_dim=4, mlp_dim=8, attention_score="near")
    x = jnp.asarray(np.random.default_rng(0).standard_normal((1, 6, 8)), jnp.float32)
    rows = Rows(jnp.arange(6)[None], None, None, None, None)
    params = nn.unbox(Attention(config).init(jax.random.key(0), x, rows, None)["params"])
    params = jax.tree.map(lambda leaf: 20 * leaf, params) | {"sharpness": jnp.asarray([0.5, 2.0])}

    def run(params: Any, backend: str) -> Any:
        return Attention(dataclasses.replace(config, attention=backend)).apply({"params": params}, x, rows, None)[0].sum()

    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)

    def by_hand(sharpness: np.ndarray) -> float:
        q, k, v = (np.einsum("td,dnh->nth", x[0], p[name]["kernel"]) for name in ("query", "key", "value"))
        weights = np.exp(-sharpness[:, None, None] * ((q[:, :, None] - k[:, None]) ** 2).sum(-1)) * np.tri(6)
        return float(np.einsum("nts,sh,nhd->", weights / weights.sum(-1, keepdims=True), v[0], p["output"]["kernel"]))

    steps = np.eye(2) * 1e-5
    slopes = [(by_hand(p["sharpness"] + step) - by_hand(p["sharpness"] - step)) / 2e-5 for step in steps]
    for backend in ("dense", "blockwise"):
        value, gradient = jax.jit(jax.value_and_grad(run), static_argnums=1)(params, backend)
        np.testing.assert_allclose(value, by_hand(p["sharpness"]), rtol=1e-5)
        np.testing.assert_allclose(gradient["sharpness"], slopes, rtol=1e-4, atol=1e-7)
    with pytest.raises(UserError, match="attention=xla cannot do model.attention_score=near; dense and blockwise can"):
        run(params, "xla")


def test_an_additive_score_holds_no_square(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 4096 queries and keys, both passes: less at once than one number a pair, or than one vector a pair of a block."""
    monkeypatch.setattr(scores, "_MOST", 2**14)
    config = ModelConfig(vocab_size=5, num_heads=1, num_kv_heads=1, head_dim=32, mlp_dim=8, attention="blockwise")
    config = dataclasses.replace(config, attention_score="additive")
    q = jax.ShapeDtypeStruct((1, 4096, 1, 32), jnp.float32)
    learned = {"score_vector": jax.ShapeDtypeStruct((1, 32), jnp.float32)}
    gradient = jax.grad(lambda q, k, v, learned: attend(config, q, k, v, learned=learned).sum(), (0, 1, 2, 3))
    compiled = jax.jit(gradient, compiler_options={"xla_backend_optimization_level": 0}).lower(q, q, q, learned).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 4096 * 4096 * 4


def test_products_go_to_every_backend() -> None:
    rng = np.random.default_rng(0)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 128, n, 64)), jnp.float32) / 4 for n in (2, 1, 1))
    config = ModelConfig(vocab_size=5, num_heads=2, num_kv_heads=1, head_dim=64, mlp_dim=8, attention_score="dot")
    dense, *others = (
        jax.jit(attend, static_argnums=0)(dataclasses.replace(config, attention=name), q, k, v)
        for name in ("dense", "xla", "splash")
    )
    for other in others:
        np.testing.assert_allclose(other, dense, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize(
    ("knobs", "sentence"),
    [
        ({"attention": "xla", "position": "alibi"}, "attention=xla cannot do model.position=alibi; dense and blockwise can"),
        ({"attention": "splash", "attention_score": "additive"}, "splash cannot do model.attention_score=additive; dense and"),
        ({"attention": "cudnn", "attention_sink": "learned"}, "cudnn cannot do model.attention_sink=learned; dense and"),
        (
            {"attention": "xla", "attention_window": 4, "attention_sink_tokens": 2},
            "xla cannot do model.attention_sink_tokens=2; dense and blockwise can",
        ),
        (
            {"attention_sink_tokens": 2},
            "model.attention_sink_tokens=2 needs a window that they outlast, but model.attention_window=0",
        ),
        ({"position": "t5", "t5_num_buckets": 5}, "model.t5_num_buckets=5 must be a multiple of 2 where"),
        (
            {"position": "t5", "t5_num_buckets": 6, "t5_bidirectional": True},
            "must be a multiple of 4 where model.t5_bidirectional",
        ),
        ({"t5_bidirectional": True}, "model.t5_bidirectional=True needs model.position=t5, but model.position=learned"),
        ({"position": "t5", "t5_max_distance": 16}, "model.t5_max_distance=16 must be more than 16, the distances that have"),
        (
            {"position": "alibi", "rope_scaling": "yarn"},
            "yarn needs model.position=rotary, but model.position=alibi",
        ),
    ],
    ids=str,
)
def test_refused_by_name(knobs: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError) as error:
        small({f"model.{name}": value for name, value in knobs.items()})
    assert sentence in str(error.value)


@pytest.mark.parametrize(
    "knobs", [{"attention_score": "cosine"}, {"attention_sink": "learned"}, {"position": "alibi"}, {"position": "t5"}], ids=str
)
def test_what_another_format_cannot_say_is_not_exported(knobs: dict[str, str]) -> None:
    ((name, value),) = knobs.items()
    with pytest.raises(UserError, match=f"cannot do model.{name}={value!r}"):
        architecture_for(small({f"model.{name}": value}).model)


# --- in the decoder ------------------------------------------------------------------------------

ALL = {"model.attention_score": "additive", "model.position": "t5", "model.attention_sink": "learned"}
ALL |= {"model.attention_window": 4, "model.attention_sink_tokens": 1}


def test_unrolled_it_is_the_same_and_packed_as_alone() -> None:
    config = small(ALL, model__t5_num_buckets=4, model__t5_max_distance=6)
    params, rng = random_params(config), np.random.default_rng(0)
    texts = [rng.integers(1, 23, size).astype(np.int32) for size in (5, 7)]
    row = packed_row(texts, 12)

    @functools.partial(jax.jit, static_argnums=0)
    def run(model: ModelConfig, tokens: Any, positions: Any, ids: Any) -> Any:
        return Decoder(model).apply({"params": params}, tokens, positions, ids)[0]

    packed = run(config.model, row["tokens"], row["positions"], row["segment_ids"])
    unrolled = dataclasses.replace(config.model, scan_unroll=0)
    tree_close(run(unrolled, row["tokens"], row["positions"], row["segment_ids"]), packed, rtol=1e-5, atol=1e-5)
    for start, text in ((0, texts[0]), (5, texts[1])):
        padded = packed_row([text], 12)
        alone = run(config.model, padded["tokens"], padded["positions"], padded["segment_ids"])
        np.testing.assert_allclose(alone[0, : len(text)], packed[0, start : start + len(text)], rtol=1e-5, atol=1e-5)


def test_generated_as_by_full_forwards_past_the_context() -> None:
    knobs = {key.removeprefix("model."): value for key, value in ALL.items()}
    config = model_config(t5_num_buckets=4, t5_max_distance=6, num_layers=1, tied_embeddings=False, **knobs)
    params = small_random_params(config)
    prompts = [[3, 1, 4, 1, 5], [9, 2]]
    made = decode.generate_tokens(
        params, config, prompts, settings=GenerationConfig(14, do_sample=False), seed=0, eos_ids=(), vocab_size=37
    )
    for prompt, tokens in zip(prompts, made.tokens, strict=True):
        assert tokens.tolist() == greedy_by_full_forwards(params, config, prompt, 14)


# --- against transformers ------------------------------------------------------------------------


@pytest.mark.parity
def test_buckets_and_slopes_are_those_of_transformers() -> None:
    torch = pytest.importorskip("torch")
    from transformers.models.bloom.modeling_bloom import build_alibi_tensor
    from transformers.models.t5.modeling_t5 import T5Attention

    before = np.arange(-200, 201)
    for both, buckets, furthest in ((False, 32, 128), (True, 32, 128), (True, 12, 50), (False, 8, 90)):
        sizes = {"t5_bidirectional": both, "t5_num_buckets": buckets, "t5_max_distance": furthest}
        theirs = T5Attention._relative_position_bucket(torch.tensor(-before), both, buckets, furthest)
        np.testing.assert_array_equal(biases.t5_buckets(ModelConfig(**sizes), before), theirs.numpy())
    for heads in (1, 2, 3, 6, 8, 12, 20):
        theirs = build_alibi_tensor(torch.ones(1, 2), heads, torch.float32)[:, 0, 1]
        np.testing.assert_allclose(biases.alibi_slopes(heads), theirs.numpy(), rtol=1e-6)
