"""Attention: projections, and backends in a table. Axis letters: see decoder.py."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.config import PRODUCT_SCORES, ModelConfig, UserError, attention_refusal
from gptjax.model import primitives
from gptjax.model.biases import DISTANCE_BIASES, by_distance, of_block
from gptjax.model.blockwise import blockwise_attention, by_group, sink
from gptjax.model.cache import Cache, cached_attention, visible
from gptjax.model.context import Shared, context_attention
from gptjax.model.layers import Norm, Projection
from gptjax.model.positions import rotate
from gptjax.model.rows import Rows
from gptjax.model.scores import ATTENTION_SCORES, SINKS, Learned, declare, scored
from gptjax.model.splash import splash_attention, splash_context_attention
from gptjax.parallel.sharding import spec


def causal_mask(
    length: int,
    segment_ids_BT: jax.Array | None,
    window: int = 0,
    prefix_BT: jax.Array | None = None,
    anchors_BT: jax.Array | None = None,
) -> jax.Array:
    """[B or 1, T, T], True where query t may see key s: not later, or of the prefix; in the window, before and after (0: none),
    or an anchor; and in the same segment.
    """
    order_T = jnp.arange(length)
    prefix, anchors = (None if marked_BT is None else marked_BT[:, None, :] for marked_BT in (prefix_BT, anchors_BT))
    mask_BTS = visible((order_T[:, None] - order_T[None, :])[None], window, prefix, anchors)
    if segment_ids_BT is None:
        return mask_BTS
    return mask_BTS & (segment_ids_BT[:, :, None] == segment_ids_BT[:, None, :])


def masked_attention(
    q_BTNH: jax.Array,
    k_BSKH: jax.Array,
    v_BSKH: jax.Array,
    mask_BTS: jax.Array,
    dropout_rate: float = 0.0,
    dropout_keys: Any = None,
    softcap: float = 0.0,
    *,
    scale: float | None = None,
    function: str = "",
    learned: Learned | None = None,
) -> jax.Array:
    """Attention, [B, T, N, H], with the whole score matrix held; softmax in float32.

    Arguments as `blockwise_attention`, but that a mask says what is seen. `softcap`: Gemma 2's.
    """
    batch, length, heads, width = q_BTNH.shape
    groups, learned = heads // k_BSKH.shape[2], by_group(learned, k_BSKH.shape[2])
    q_BTKGH = q_BTNH.reshape(batch, length, -1, groups, width)
    if function:
        scores_BKGTS = scored(function, learned, q_BTKGH.transpose(0, 2, 3, 1, 4), k_BSKH.swapaxes(1, 2))
    else:
        scale = width**-0.5 if scale is None else scale
        scores_BKGTS = jnp.einsum("BTKGH,BSKH->BKGTS", q_BTKGH, k_BSKH, preferred_element_type=jnp.float32) * scale
    if softcap:
        scores_BKGTS = softcap * jnp.tanh(scores_BKGTS / softcap)
    if "bias" in learned:
        scores_BKGTS = scores_BKGTS + of_block(learned["bias"], 0, 0, *scores_BKGTS.shape[3:])
    # A finite floor: exp(floor - max) is exactly 0, so a masked key changes no bit of the result.
    scores_BKGTS = jnp.where(mask_BTS[:, None, None], scores_BKGTS, jnp.finfo(jnp.float32).min)
    weights_BKGTS = _softmax(scores_BKGTS, learned)
    weights_BKGTS = primitives.dropout(weights_BKGTS, dropout_rate, dropout_keys)
    out_BTKGH = jnp.einsum("BKGTS,BSKH->BTKGH", weights_BKGTS.astype(v_BSKH.dtype), v_BSKH)
    return out_BTKGH.reshape(batch, length, heads, -1)


def _softmax(scores_BKGTS: jax.Array, learned: Learned) -> jax.Array:
    if "sink_bias" not in learned:
        return jax.nn.softmax(scores_BKGTS, axis=-1)
    sink_BKGT1 = jnp.broadcast_to(sink(learned)[..., None], (*scores_BKGTS.shape[:-1], 1))
    return jax.nn.softmax(jnp.concatenate([scores_BKGTS, sink_BKGT1], axis=-1), axis=-1)[..., :-1]


# --- backends --------------------------------------------------------------------------------


class Call(NamedTuple):
    """What a backend is asked for: causal attention of q_BTNH over k_BTKH and v_BTKH."""

    config: ModelConfig
    segment_ids_BT: jax.Array | None  # None: one segment a row
    prefix_BT: jax.Array | None  # bool: keys that queries before them see too; None: no key is
    dropout_keys: jax.Array | None  # [B, 2]; None: no dropout
    anchors_BT: jax.Array | None = None  # bool: keys that are seen from beyond the window; None: no key is
    learned: Learned = {}  # [N, ...] each: what scores are made with, see `blockwise_attention`
    first_head: Any = 0  # number of the first query head here, where a device has some of them

    @property
    def window(self) -> int:
        return self.config.attention_window

    def scores(self, q_BTNH: jax.Array) -> dict[str, Any]:
        """How queries and keys become scores, and these weights: for every backend that holds scores itself."""
        drops = {"dropout_rate": self.config.attention_dropout, "dropout_keys": self.dropout_keys}
        return drops | score_options(self.config, q_BTNH) | {"learned": self.learned}

    @property
    def keys(self) -> dict[str, Any]:
        """Which keys are seen."""
        return {"segment_ids_BT": self.segment_ids_BT, "prefix_BT": self.prefix_BT, "anchors_BT": self.anchors_BT}


def product_scale(config: ModelConfig, q_BTNH: jax.Array) -> float:
    """What products of queries and keys are multiplied by."""
    return float(q_BTNH.shape[-1] ** ATTENTION_SCORES[config.attention_score].power)


def score_options(config: ModelConfig, q_BTNH: jax.Array) -> dict[str, Any]:
    """How `config` scores, for every form that holds scores itself."""
    function = config.attention_score if ATTENTION_SCORES[config.attention_score].function else ""
    return {"scale": product_scale(config, q_BTNH), "function": function, "softcap": config.attention_softcap}


def _dense(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, call: Call) -> jax.Array:
    mask_BTS = causal_mask(q_BTNH.shape[1], call.segment_ids_BT, call.window, call.prefix_BT, call.anchors_BT)
    return masked_attention(q_BTNH, k_BTKH, v_BTKH, mask_BTS, **call.scores(q_BTNH))


def _blockwise(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, call: Call) -> jax.Array:
    return blockwise_attention(q_BTNH, k_BTKH, v_BTKH, window=call.window, **call.keys, **call.scores(q_BTNH))


def _library(implementation: Any, q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, call: Call) -> jax.Array:
    """`jax.nn.dot_product_attention`, which knows of segments only through a mask."""
    window = call.window
    mask = None if call.segment_ids_BT is None else causal_mask(q_BTNH.shape[1], call.segment_ids_BT, window)[:, None]
    local = (window - 1, 0) if window else None
    how = {"is_causal": True, "local_window_size": local, "implementation": implementation}
    return jax.nn.dot_product_attention(q_BTNH, k_BTKH, v_BTKH, mask=mask, scale=product_scale(call.config, q_BTNH), **how)


def _splash_options(call: Call, q_BTNH: jax.Array) -> dict[str, Any]:
    scale, softcap = product_scale(call.config, q_BTNH), call.config.attention_softcap
    return {"segment_ids_BT": call.segment_ids_BT, "scale": scale, "window": call.window, "softcap": softcap}


def _splash(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, call: Call) -> jax.Array:
    return splash_attention(q_BTNH, k_BTKH, v_BTKH, **_splash_options(call, q_BTNH))


def _blockwise_shared(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, shared: Shared, call: Call) -> jax.Array:
    options = {**call.keys, **call.scores(q_BTNH), "window": call.window, "first_head": call.first_head}
    return context_attention(q_BTNH, k_BTKH, v_BTKH, shared, **options)


def _splash_shared(q_BTNH: jax.Array, k_BTKH: jax.Array, v_BTKH: jax.Array, shared: Shared, call: Call) -> jax.Array:
    return splash_context_attention(q_BTNH, k_BTKH, v_BTKH, shared, **_splash_options(call, q_BTNH))


class Backend(NamedTuple):
    """One way to attend. What else it can do stands in `config.ATTENTION_CAPABILITIES`."""

    attend: Callable[..., jax.Array]  # (q_BTNH, k_BTKH, v_BTKH, Call)
    over_context: Callable[..., jax.Array] | None = None  # the same of a device's part of rows, (q, k, v, Shared, Call)
    by_device: bool = False  # the compiler cannot divide it among devices, so that each must be given its own part
    platforms: tuple[str, ...] = ()  # (): all


ATTENTION_BACKENDS: dict[str, Backend] = {
    "dense": Backend(_dense),
    "blockwise": Backend(_blockwise, over_context=_blockwise_shared),
    "xla": Backend(functools.partial(_library, "xla")),
    "cudnn": Backend(functools.partial(_library, "cudnn"), by_device=True, platforms=("gpu",)),
    "splash": Backend(_splash, over_context=_splash_shared, by_device=True, platforms=("tpu", "cpu")),
}

# What `auto` tries, in this order: the first that can do what is asked. The dense form lets XLA fuse what it can.
AUTO: dict[str, tuple[str, ...]] = {
    "cpu": ("blockwise", "dense"),
    "gpu": ("cudnn", "dense", "blockwise"),
    "tpu": ("splash", "dense", "blockwise"),
    "other": ("dense", "blockwise"),
}


def choose_backend(config: ModelConfig, length: int, context: int = 1, prefix: bool = False) -> str:
    """The backend for rows of `length` tokens, cut into `context` parts: the one asked for, or what `auto` stands for. `prefix`:
    some keys are seen from before them.

    Raises `UserError` where the one asked for is not for this platform or cannot do what is asked.
    """
    platform = primitives.platform()
    if config.attention != "auto":
        if refusal := attention_refusal(config, config.attention, length, context, prefix):
            raise UserError(refusal)
        platforms = ATTENTION_BACKENDS[config.attention].platforms
        if platforms and platform not in platforms:
            others = ", ".join(name for name, backend in ATTENTION_BACKENDS.items() if not backend.platforms)
            raise UserError(
                f"model.attention={config.attention} runs on {' and '.join(platforms)}, not on {platform}; {others} run anywhere."
            )
        return config.attention
    plain_cpu = platform == "cpu" and not primitives.hand_written()
    order = AUTO["other" if plain_cpu or platform not in AUTO else platform]
    if config.attention_score not in PRODUCT_SCORES:
        order = ("blockwise", "dense")  # no product to fuse with, so nothing is gained by holding a square of scores
    refusals = {name: attention_refusal(config, name, length, context, prefix) for name in order}
    able = [name for name, refusal in refusals.items() if not refusal]
    if not able:
        raise UserError(f"no attention backend for {platform} does what is asked: {' '.join(refusals.values())}")
    return able[0]


def attend(
    config: ModelConfig,
    q_BTNH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_ids_BT: jax.Array | None = None,
    *,
    prefix_BT: jax.Array | None = None,
    anchors_BT: jax.Array | None = None,
    dropout_keys: jax.Array | None = None,
    learned: Learned | None = None,
) -> jax.Array:
    """Causal attention [B, T, N, H] by the config's backend, wherever the arrays lie on the mesh that is set; arguments as
    `blockwise_attention`. Queries and keys have gone through the score's `prepare`.

    Where the length is laid over a mesh axis, or the backend is a kernel of one device, each device is given its rows, heads
    and part of the length by name.
    """
    call = Call(config, segment_ids_BT, prefix_BT, dropout_keys, anchors_BT, learned or {})
    mesh = jax.sharding.get_abstract_mesh()
    length = q_BTNH.shape[1]
    axis = None if mesh.empty else spec("length")[0]
    if isinstance(axis, tuple):
        raise UserError(f"mesh.rules lay 'length' over {' and '.join(axis)}; attention shares it out over one mesh axis only.")
    parts = 1 if axis is None else mesh.shape[axis]
    backend = ATTENTION_BACKENDS[choose_backend(config, length, parts, prefix_BT is not None)]
    if parts == 1 and (mesh.empty or mesh.size == 1 or not backend.by_device):
        return backend.attend(q_BTNH, k_BTKH, v_BTKH, call)

    shared = Shared(axis or "", parts, length)
    queries, keys = spec("batch", "length", "heads", "head_dim"), spec("batch", "length", "kv_heads", "head_dim")
    if queries != keys:
        raise UserError("mesh.rules lay 'heads' and 'kv_heads' over different axes; attention needs them on the same.")

    def on_device(q_BTNH: Any, k_BTKH: Any, v_BTKH: Any, by_place: Any, dropout_keys: Any, learned: Any) -> jax.Array:
        first_head = jax.lax.axis_index(queries[2]) * q_BTNH.shape[2] if queries[2] is not None else 0
        segment_ids_BT, prefix_BT, anchors_BT = by_place
        part = Call(config, segment_ids_BT, prefix_BT, dropout_keys, anchors_BT, learned, first_head)
        if backend.over_context is not None and parts > 1:
            return backend.over_context(q_BTNH, k_BTKH, v_BTKH, shared, part)
        return backend.attend(q_BTNH, k_BTKH, v_BTKH, part)

    run = jax.shard_map(
        on_device,
        in_specs=(queries, keys, keys, spec("batch", "length"), spec("batch"), spec("heads")),
        out_specs=queries,
        axis_names=set(mesh.axis_names) - set(mesh.manual_axes),
        check_vma=False,  # Pallas kernels and scans over gathered keys do not say what varies over which axis
    )
    return run(q_BTNH, k_BTKH, v_BTKH, (segment_ids_BT, prefix_BT, anchors_BT), dropout_keys, dict(learned or {}))


class Attention(nn.Module):
    """Causal multi-head attention with grouped keys and values (Ainslie et al., 2023).

    What scores are made with beside queries and keys is declared in scores.py and biases.py; T5's table of distances is a
    parameter of this layer, its own.
    """

    config: ModelConfig
    position: str = ""  # this layer's; "": `config.position`

    @nn.compact
    def __call__(self, x_BTD: jax.Array, rows: Rows, cache: Cache | None) -> tuple[jax.Array, Cache | None]:
        c = dataclasses.replace(self.config, position=self.position or self.config.position)
        score = ATTENTION_SCORES[c.attention_score]
        query = Projection(c, ("embed",), ("heads", "head_dim"), (c.num_heads, c.head_dim), c.attention_bias, name="query")
        key = Projection(c, ("embed",), ("kv_heads", "head_dim"), (c.num_kv_heads, c.head_dim), c.attention_bias, name="key")
        value = Projection(c, ("embed",), ("kv_heads", "head_dim"), (c.num_kv_heads, c.head_dim), c.attention_bias, name="value")
        has_bias = c.attention_bias and c.attention_output_bias
        output = Projection(c, ("heads", "head_dim"), ("embed",), (c.model_dim,), has_bias, into_residual=True, name="output")

        q_BTNH, k_BTKH, v_BTKH = query(x_BTD), key(x_BTD), value(x_BTD)
        if c.query_key_norm:
            q_BTNH, k_BTKH = Norm(c, "head_dim", name="query_norm")(q_BTNH), Norm(c, "head_dim", name="key_norm")(k_BTKH)
        of_score = declare(self, c, score.learned)
        if score.prepare is not None:
            q_BTNH, k_BTKH = score.prepare(of_score, q_BTNH, k_BTKH)
        if rows.angles is not None and c.position == "rotary":
            q_BTNH, k_BTKH = rotate(q_BTNH, rows.angles), rotate(k_BTKH, rows.angles)
        out_BTNH, cache = self._attend(c, q_BTNH, k_BTKH, v_BTKH, rows, cache, of_score)
        return output(out_BTNH), cache

    def _attend(
        self, c: ModelConfig, q_BTNH: Any, k_BTKH: Any, v_BTKH: Any, rows: Rows, cache: Cache | None, of_score: Learned
    ) -> tuple[jax.Array, Cache | None]:
        learned = {name: x for name, x in of_score.items() if ATTENTION_SCORES[c.attention_score].function}
        learned |= declare(self, c, SINKS[c.attention_sink])
        of_distance = declare(self, c, DISTANCE_BIASES[c.position].learned) if c.position in DISTANCE_BIASES else {}
        if self.is_initializing():
            return q_BTNH, cache  # parameters don't depend on it, and a kernel may want longer rows than they are made with
        bias_ND = by_distance(c, of_distance, q_BTNH.shape[1] if cache is None else cache.length)
        learned |= {} if bias_ND is None else {"bias": bias_ND}
        if cache is not None:
            cache = cache.write(k_BTKH, v_BTKH, rows.positions_BT)
            options = {
                **score_options(c, q_BTNH),
                "window": c.attention_window,
                "anchors": c.attention_sink_tokens,
                "learned": learned,
            }
            return cached_attention(q_BTNH, cache, rows.positions_BT, prefix_BT=rows.prefix_BT, **options), cache
        marks = {"prefix_BT": rows.prefix_BT}
        marks["anchors_BT"] = rows.positions_BT < c.attention_sink_tokens if c.attention_sink_tokens else None
        keys = rows.dropout_keys if c.attention_dropout else None
        return attend(c, q_BTNH, k_BTKH, v_BTKH, rows.segment_ids_BT, **marks, dropout_keys=keys, learned=learned), None
