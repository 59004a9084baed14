"""Layers that differ by a pattern: against a float64 forward with loops, and in the properties that training rests on."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import config as c
from gptjax.interop.huggingface import architecture_for
from gptjax.model.attention import Cache
from gptjax.model.decoder import Decoder
from gptjax.model.positions import sinusoids
from gptjax.train.objectives import causal
from gptjax.train.step import example_loss
from tests.model.test_decoder import ACTIVATION_64, norm_64, rotate_64
from tests.small import LLAMA, random_batch, random_params, small, tree_close

pytestmark = pytest.mark.usefixtures("unoptimised")

GEMMA3 = LLAMA | {
    "model.num_layers": 5,
    "model.attention_window": 3,
    "model.attention_pattern": ("local", "local", "global"),
    "model.rope_base": 1000.0,
    "model.local_rope_base": 50.0,
    "model.rope_scaling": "linear",
    "model.rope_scaling_factor": 2.0,
}
BOTH = LLAMA | {
    "model.num_layers": 4,
    "model.attention_window": 4,
    "model.attention_pattern": ("global", "local"),
    "model.position_pattern": ("rotary", "none", "rotary"),
}
CASES = {
    "Gemma 3's, and a rest": GEMMA3,
    "SmolLM3's": LLAMA | {"model.num_layers": 4, "model.position_pattern": ("rotary", "none")},
    "a period longer than the model": BOTH,
    "sinusoidal": {"model.position": "sinusoidal", "model.model_dim": 18, "model.num_heads": 3},
}

# --- golden: float64 numpy ---------------------------------------------


def places_64(model: Any, positions: np.ndarray) -> np.ndarray:
    """[T, D], number by number."""
    return np.array(
        [
            [(np.sin, np.cos)[i % 2](p / 10000 ** (2 * (i // 2) / model.model_dim)) for i in range(model.model_dim)]
            for p in positions
        ]
    )


def attention_64(model: Any, a: Any, h: np.ndarray, number: int, positions: np.ndarray, segments: np.ndarray) -> np.ndarray:
    """[T, N, H] of layer `number`."""
    windows, places = model.attention_pattern or ("local",), model.position_pattern or (model.position,)
    local = windows[number % len(windows)] == "local"
    window = model.attention_window or len(h)
    window = window if local else len(h)
    q, k, v = (np.einsum("td,dnh->tnh", h, a[name]["kernel"]) + a[name].get("bias", 0.0) for name in ("query", "key", "value"))
    if places[number % len(places)] == "rotary":
        base, slower = model.rope_base, model.rope_scaling_factor
        if local and model.local_rope_base:
            base, slower = model.local_rope_base, 1.0
        frequencies = np.array([base ** (-2 * i / model.head_dim) / slower for i in range(model.head_dim // 2)])
        q, k = (rotate_64(x, positions, frequencies) for x in (q, k))
    mixed = np.zeros_like(q)
    for head in range(model.num_heads):
        shared = head // (model.num_heads // model.num_kv_heads)
        for t in range(len(h)):
            seen = [s for s in range(max(0, t + 1 - window), t + 1) if segments[s] == segments[t]]
            scores = k[seen, shared] @ q[t, head] / np.sqrt(model.head_dim)
            weights = np.exp(scores - scores.max())
            mixed[t, head] = weights / weights.sum() @ v[seen, shared]
    return mixed


def forward_64(
    model: Any, params: Any, tokens: Any, positions: Any, segments: Any, attention: Callable = attention_64
) -> np.ndarray:
    """Logits [T, V] of one row."""
    p = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), params)
    x = p["embed"]["tokens"][tokens]
    if model.position == "learned":
        x = x + p["embed"]["positions"][positions]
    if model.position == "sinusoidal":
        x = x + places_64(model, positions)
    for number in range(model.num_layers):
        layer = jax.tree.map(lambda leaf, n=number: leaf[n], p["layers"])
        mixed = attention(model, layer["attention"], norm_64(model, layer["attention_norm"], x), number, positions, segments)
        out, m = layer["attention"]["output"], layer["mlp"]
        x = x + np.einsum("tnh,nhd->td", mixed, out["kernel"]) + out.get("bias", 0.0)
        h = norm_64(model, layer["mlp_norm"], x)
        hidden = h @ m["up"]["kernel"] + m["up"].get("bias", 0.0)
        if model.gated_mlp:
            hidden = ACTIVATION_64[model.activation](h @ m["gate"]["kernel"] + m["gate"].get("bias", 0.0)) * hidden
        else:
            hidden = ACTIVATION_64[model.activation](hidden)
        x = x + hidden @ m["down"]["kernel"] + m["down"].get("bias", 0.0)
    x = norm_64(model, p["final_norm"], x)
    return x @ (p["embed"]["tokens"].T if model.tied_embeddings else p["head"])


def check_logits(config: Any, params: Any, attention: Callable = attention_64) -> None:
    """Two packed rows against `forward_64`."""
    example = causal(random_batch(config, rows=2))
    apply = jax.jit(
        lambda p, tokens, positions, segments: Decoder(config.model).apply(
            {"params": p}, tokens, positions, segment_ids_BT=segments
        )
    )
    logits = np.asarray(apply(params, example.inputs, example.positions, example.segment_ids)[0])
    for row in range(2):
        of_row = (np.asarray(x[row]) for x in (example.inputs, example.positions, example.segment_ids))
        expected = forward_64(config.model, params, *of_row, attention=attention)
        np.testing.assert_allclose(logits[row], expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())


@pytest.mark.parametrize("name", CASES)
def test_logits_equal_a_float64_forward(name: str) -> None:
    config = small(CASES[name])
    check_logits(config, random_params(config))


def test_sinusoids_equal_float64_also_of_an_odd_width() -> None:
    positions = np.array([[0, 1, 7], [100, 511, 1023]])
    for width in (8, 7):
        expected = np.stack([places_64(small(model__model_dim=width, model__num_heads=1).model, row) for row in positions])
        np.testing.assert_allclose(sinusoids(jnp.asarray(positions), width), expected, atol=1e-4)  # 1023 radians in float32: 6e-5


# --- one model in several forms ---------------------------------------------


def check_cached(config: Any, params: Any) -> Cache:
    """A prompt, then token by token, against one forward; the cache after it."""
    model = config.model
    tokens = np.random.default_rng(1).integers(0, model.vocab_size, (2, 9)).astype(np.int32)
    expected = Decoder(model).apply({"params": params}, tokens)[0]
    apply = jax.jit(lambda tokens, positions, cache: Decoder(model).apply({"params": params}, tokens, positions, cache=cache))
    pieces, cache = [], Cache.empty(model, 2, 9)
    for start, end in ((0, 6), (6, 7), (7, 8), (8, 9)):
        positions = np.broadcast_to(np.arange(start, end, dtype=np.int32), (2, end - start))
        logits, cache = apply(tokens[:, start:end], positions, cache)
        pieces.append(logits)
    np.testing.assert_allclose(np.concatenate(pieces, 1), expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
    return cache


@pytest.mark.parametrize("name", ["a period longer than the model", "sinusoidal"])
def test_cached_logits_equal_the_uncached(name: str) -> None:
    config = small(CASES[name])
    check_cached(config, random_params(config))


def loss_and_gradient(config: Any, params: Any) -> Any:
    example = causal(random_batch(config, seed=2, rows=3))
    return jax.jit(jax.value_and_grad(lambda p: example_loss(config, p, example, None)[0]))(params)


def check_forms(knobs: dict[str, Any], form: dict[str, Any]) -> None:
    """Loss and gradients of the same model, computed in another way."""
    params = random_params(small(knobs))
    loss, gradients = loss_and_gradient(small(knobs), params)
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(gradients))
    other_loss, other_gradients = loss_and_gradient(small(knobs, form), params)
    np.testing.assert_allclose(other_loss, loss, rtol=2e-6)
    tree_close(other_gradients, gradients, rtol=1e-5, atol=2e-6 * largest)


def test_unrolling_and_remat_change_nothing() -> None:
    check_forms(GEMMA3, {"model.scan_unroll": 0, "model.attention": "dense", "model.remat": "full"})


def test_a_pattern_of_one_kind_is_the_plain_model() -> None:
    """The same bits: the same program."""
    plain = LLAMA | {"model.attention_window": 3}
    config = small(plain, model__attention_pattern=("local", "local"), model__position_pattern=("rotary",))
    assert c.layer_configs(config.model) == (small(plain).model,)


def test_what_is_traced_does_not_grow_with_depth_and_angles_are_computed_once() -> None:
    def traced(layers: int) -> Any:
        config = small(GEMMA3, model__num_layers=layers)
        params = jax.eval_shape(lambda: random_params(config))
        return jax.make_jaxpr(lambda p, tokens: Decoder(config.model).apply({"params": p}, tokens)[0])(
            params, jnp.zeros((2, 12), jnp.int32)
        )

    six, twelve = (str(traced(layers)) for layers in (6, 12))
    assert six.count("\n") == twelve.count("\n")
    assert len(re.findall(r"= cos\b", six)) == 2, "one for each base"


def test_no_gradient_comes_from_later_tokens_nor_from_beyond_the_window() -> None:
    """Two local layers of 3 reach back over 4 tokens, with one global layer all do."""
    for pattern, reach in ((("local", "local"), 4), (("local", "global"), 12)):
        config = small(LLAMA, model__attention_window=3, model__attention_pattern=pattern, model__tied_embeddings=False)
        params = random_params(config)

        def losses(table: jax.Array, config: Any = config, params: Any = params) -> jax.Array:
            held = params | {"embed": params["embed"] | {"tokens": table}}
            logits, _ = Decoder(config.model).apply({"params": held}, jnp.arange(12)[None])
            return jax.nn.log_softmax(logits[0])[:, 3]

        slopes = np.abs(jax.jit(jax.jacrev(losses))(params["embed"]["tokens"]))[:, :12].max(-1)
        before = np.arange(12)[:, None] - np.arange(12)
        seen = (before >= 0) & (before <= reach)
        assert (slopes[~seen] == 0).all()
        assert (slopes[seen] > 0).all()


# --- the door ---------------------------------------------


def test_layers_repeat_after_the_least_period() -> None:
    def kinds(*parts: dict[str, Any], **knobs: Any) -> list[tuple[int, str, float, str]]:
        layers = c.layer_configs(small(*parts, **knobs).model)
        return [(layer.attention_window, layer.position, layer.rope_base, layer.rope_scaling) for layer in layers]

    local, all_seen = (3, "rotary", 50.0, "none"), (0, "rotary", 1000.0, "linear")
    assert kinds(GEMMA3, model__num_layers=26) == [local, local, all_seen]
    assert kinds(GEMMA3, model__num_layers=2) == [local]
    assert kinds(GEMMA3, model__local_rope_base=0.0)[0] == (3, "rotary", 1000.0, "linear")
    assert len(kinds(BOTH, model__num_layers=26)) == 6
    assert len(kinds(BOTH)) == 4
    assert kinds() == [(0, "learned", 10000.0, "none")]


REFUSED = {
    "no window": ({"attention_pattern": ("local", "global")}, "model.attention_pattern=local,global", "model.attention_window=0"),
    "no local": (
        {"attention_pattern": ("global",), "attention_window": 4},
        "model.attention_pattern=global",
        "model.attention_window=4",
    ),
    "position beside the pattern": (
        {"position_pattern": ("rotary", "none")},
        "model.position_pattern=rotary,none",
        "position=learned",
    ),
    "embedding in a pattern": ({"position_pattern": ("learned",)}, "model.position_pattern='learned'", "rotary, alibi, t5, none"),
    "base without local": (
        {"local_rope_base": 10.0, "position": "rotary"},
        "model.local_rope_base=10.0",
        "model.attention_pattern=",
    ),
    "base without rotary": (
        {"local_rope_base": 10.0, "attention_pattern": ("local",), "attention_window": 4},
        "model.local_rope_base=10.0",
        "model.position=learned",
    ),
    "base of one": (
        {"local_rope_base": 1.0, "attention_pattern": ("local",), "attention_window": 4, "position": "rotary"},
        "model.local_rope_base=1.0",
        "above 1",
    ),
    "scaling": ({"rope_scaling": "linear", "position": "sinusoidal"}, "model.rope_scaling=linear", "model.position=sinusoidal"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_does_not_go_together_is_refused(case: str) -> None:
    knobs, *names = REFUSED[case]
    with pytest.raises(c.UserError) as refused:
        small({f"model.{name}": value for name, value in knobs.items()})
    assert all(name in str(refused.value) for name in names), refused.value


def test_stages_hold_whole_periods_or_are_refused() -> None:
    model = small(GEMMA3, model__num_layers=12).model
    c.check_stages(model, 2)
    c.check_stages(model, 4)
    with pytest.raises(c.UserError, match=r"model.num_layers=12 over mesh.stage=3 leaves 4 .* the 3 of model.attention_pattern"):
        c.check_stages(model, 3)


def test_export_refuses_patterns_and_sinusoids() -> None:
    for knobs, name in (
        (LLAMA | {"model.attention_window": 4, "model.attention_pattern": ("local", "global")}, "attention_pattern"),
        (LLAMA | {"model.position_pattern": ("rotary", "none")}, "position_pattern"),
        ({"model.position": "sinusoidal"}, "position='sinusoidal'"),
    ):
        with pytest.raises(c.UserError, match=name):
            architecture_for(small(knobs).model)
