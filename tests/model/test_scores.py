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

from gptjax.config import DISTANCE_POSITIONS, PRODUCT_SCORES, Config, ModelConfig, UserError, walk
from gptjax.model import biases, primitives
from gptjax.model.attention import Attention, attend
from gptjax.model.blockwise import blockwise_attention
from gptjax.model.cache import Cache
from gptjax.model.decoder import Decoder
from gptjax.model.rows import Rows
from gptjax.model.scores import ATTENTION_SCORES, SINKS, scored
from tests.small import packed_row, random_params, small

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


def model(knobs: dict[str, Any], **more: Any) -> ModelConfig:
    return small(SIZES, knobs, more).model


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
    """The gradient along one direction of every parameter and input, against central differences of the definition."""
    g = given(name)
    rng = np.random.default_rng(2)
    cotangent = rng.standard_normal((LENGTH, g.config.model_dim))
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
        ours = {only: (of_params[only], ahead[0][only]) for only in exact} | {"x": (of_x, ahead[1])}
        for only, (gradient, along) in ours.items():
            terms = jax.tree.map(lambda one, other: (np.asarray(one, np.float64) * other).sum(), gradient, along)
            size = math.sqrt(sum(float((np.asarray(leaf, np.float64) ** 2).sum()) for leaf in jax.tree.leaves(gradient)))
            assert abs(sum(jax.tree.leaves(terms)) - slopes[only]) <= 1e-5 * (size + abs(slopes[only])) + 2e-5, (backend, only)


@pytest.mark.parametrize("name", CASES)
def test_with_a_cache_it_is_the_same(name: str) -> None:
    """The second text alone: filled up to the middle of the cache's second block, the rest at once, and a last token by itself."""
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
