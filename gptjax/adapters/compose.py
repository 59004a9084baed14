"""Frozen parameters and adapters to what the decoder is applied to, and to rows with the places that some adapters put ahead.

Both look at what is there: parameters into which adapters have been merged are the decoder's own again.
"""

from __future__ import annotations

import zlib
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gptjax.adapters.attach import rescales_inputs
from gptjax.adapters.nodes import Extended, Frozen, Int8, LowRank, Prefixed, Rescaled
from gptjax.config import Config
from gptjax.model import primitives
from gptjax.model.decoder import Decoder


def composed(config: Config, params: Any, dropout_keys: jax.Array | None = None) -> Any:
    """The decoder's parameters for a computation: where an adapter changes a kernel stands a `LinearMap` of both. `dropout_keys`,
    uint32 [B, 2]: one of each row that is computed; None: no dropout.

    What is no parameter of the decoder's ("adapters", "task_heads") is left out. Nothing is computed here but biases, which IA3
    multiplies too.
    """
    decoder = {name: value for name, value in params.items() if name not in ("adapters", "task_heads")}
    if config.adapter.method == "none":
        return decoder
    adapters = params.get("adapters", {})
    keys = dropout_keys if config.adapter.dropout else None
    decoder["layers"] = _composed(config, decoder["layers"], adapters.get("layers", {}), keys)
    if prompt := adapters.get("embed"):
        table = Extended(decoder["embed"]["tokens"], prompt["prompt"], config.model.dtype)
        decoder["embed"] = decoder["embed"] | {"tokens": table}
    return decoder


def _composed(config: Config, layers: Any, adapters: Any, keys: jax.Array | None) -> Any:
    """`keys` are those of a shared first factor; whatever stands below has its own, by its name."""
    made = {}
    for name, value in layers.items():
        if isinstance(value, Mapping) and name != "experts":
            own = adapters.get(name, {})
            own_keys = None if keys is None else primitives.fold_in(keys, zlib.crc32(name.encode()))
            if "kernel" in value:
                own_keys = own_keys if "lora_a" in own else keys
                value = _projection(config, name, value, own, adapters.get("lora_a"), own_keys)
            else:
                value = _composed(config, value, own, own_keys)
        made[name] = value
    return made


def _projection(config: Config, name: str, own: Any, adapter: Any, shared_a: jax.Array | None, keys: jax.Array | None) -> Any:
    """A projection's parameters, with what stands in its kernel's place."""
    kernel, dtype = own["kernel"], config.model.dtype
    base = Int8(kernel["codes"], kernel["scale"]) if isinstance(kernel, Mapping) else kernel
    if "lora_b" in adapter:
        factors = adapter.get("lora_a", shared_a), adapter["lora_b"], adapter.get("magnitude")
        layers = jnp.arange(config.model.num_layers)[:, None]
        keys_LB2 = None if keys is None else primitives.fold_in(keys[None], layers)
        return own | {"kernel": LowRank(base, *factors, config.adapter.scale, dtype, keys_LB2, config.adapter.dropout)}
    if "prefix" in adapter:
        return own | {"kernel": Prefixed(base, adapter["prefix"], dtype)}
    if "rescale" in adapter:
        factors = adapter["rescale"]
        if rescales_inputs(name):
            return own | {"kernel": Rescaled(base, factors, None, dtype)}
        scaled = own | {"kernel": Rescaled(base, None, factors, dtype)}
        return scaled | ({"bias": own["bias"] * factors} if "bias" in own else {})
    return own | {"kernel": Frozen(base, dtype)} if isinstance(base, Int8) else own


def num_leading(config: Config, params: Any) -> int:
    """Places that adapters put ahead of each row, whose hidden states are to be cut off; 0 where they are not there."""
    return config.adapter.leading if "adapters" in params else 0


class Rows(NamedTuple):
    """Arrays [B, T], as the decoder has them."""

    inputs: jax.Array
    positions: jax.Array
    segment_ids: jax.Array | None = None
    prefix: jax.Array | None = None


def hidden_of_texts(config: Config, params: Any, tokens_BT: jax.Array, prefix_BT: jax.Array | None = None) -> jax.Array:
    """The decoder's hidden states [B, T, D] of rows that hold a text each, from the first place on; `prefix_BT`: tokens that all
    of their row see.
    """
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    rows = with_leading(config, params, Rows(tokens_BT, positions_BT, None, prefix_BT))
    found: Any = Decoder(config.model).apply(
        {"params": composed(config, params)}, rows.inputs, rows.positions, prefix_BT=rows.prefix, method=Decoder.hidden
    )
    return found[0][:, num_leading(config, params) :]


def with_leading(config: Config, params: Any, example: Any) -> Any:
    """The example (arrays [B, T]: inputs, positions, segment_ids, prefix) with `num_leading` places ahead of each row, seen by
    all of its first segment; its targets are as they were.

    Prompt tuning's places are tokens behind the vocabulary's. Those of prefix tuning hold any token: each layer has its own keys
    and values there, so nothing sees it.
    """
    count = num_leading(config, params)
    if not count:
        return example
    rows = example.inputs.shape[0]
    first = config.model.vocab_size if config.adapter.method == "prompt" else 0
    step = 1 if config.adapter.method == "prompt" else 0
    places = jnp.arange(count)
    ahead: dict[str, Any] = {
        "inputs": first + step * places,
        "positions": places,
        "segment_ids": None if example.segment_ids is None else jnp.broadcast_to(example.segment_ids[:, :1], (rows, count)),
        "prefix": jnp.ones(count, bool),
    }
    behind = {"inputs": example.inputs, "positions": example.positions + count}
    behind |= {"segment_ids": example.segment_ids, "prefix": example.prefix}

    def join(name: str) -> Any:
        if behind[name] is None:
            return None
        own = jnp.broadcast_to(ahead[name], (rows, count)).astype(behind[name].dtype)
        return jnp.concatenate([own, behind[name]], axis=1)

    return example._replace(**{name: join(name) for name in behind})
