"""The model as generation calls it: a prompt in, one token in, several tokens in; always with the cache.

`params` may be the model's own, or what `weights.prepare` made of them. A loop should be given the latter: the
former are prepared at every call.

Where params["leading"] holds keys and values of places ahead of every text (prompt and prefix tuning), whoever calls counts a
text's positions from 0 all the same, in a context that is shorter by so many: `within`, `empty_cache`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.config import ModelConfig
from gptjax.generate import weights
from gptjax.model import decoder, primitives
from gptjax.model.attention import Cache
from gptjax.parallel.sharding import mesh_config, use_rules


def num_leading(params: Any) -> int:
    """Places ahead of every text."""
    return params["leading"].length if "leading" in params else 0


def within(config: ModelConfig, params: Any) -> ModelConfig:
    """The config whose max_seq_len is what a text may have."""
    return dataclasses.replace(config, max_seq_len=config.max_seq_len - num_leading(params))


def empty_cache(params: Any, config: ModelConfig, batch: int, length: int) -> Cache:
    """A cache for `length` tokens of a text, that holds what is ahead of it."""
    leading = num_leading(params)
    cache = Cache.empty(config, batch, leading + length)
    if not leading:
        return cache
    return jax.tree.map(lambda slots, ahead: slots.at[:, :, :leading].set(ahead), cache, params["leading"])


def prefill(
    params: Any, config: ModelConfig, tokens_BT: jax.Array, lengths_B: jax.Array, cache: Cache, prefix_B: jax.Array | None = None
) -> tuple[jax.Array, Cache]:
    """(logits [B, V] in float32 of the token after each row's first `lengths_B`, the cache with positions 0 .. T - 1 written).

    `prefix_B`: so many first tokens of a row see each other both ways; None: none.
    """
    positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
    prefix_BT = None if prefix_B is None else positions_BT < prefix_B[:, None]
    hidden_BTD, cache = hidden(params, config, tokens_BT, positions_BT, cache, prefix_BT)
    hidden_B1D = jnp.take_along_axis(hidden_BTD, (lengths_B - 1)[:, None, None], axis=1)
    return logits(params, config, hidden_B1D)[:, 0], cache


def step(params: Any, config: ModelConfig, tokens_B: jax.Array, positions_B: jax.Array, cache: Cache) -> tuple[jax.Array, Cache]:
    """(logits [B, V] of the token after `tokens_B`, which stand at `positions_B`; the cache with them written)."""
    logits_B1V, cache = several(params, config, tokens_B[:, None], positions_B[:, None], cache)
    return logits_B1V[:, 0], cache


def several(
    params: Any, config: ModelConfig, tokens_BT: jax.Array, positions_BT: jax.Array, cache: Cache
) -> tuple[jax.Array, Cache]:
    """(logits [B, T, V] after each of the T tokens, the cache with them written)."""
    hidden_BTD, cache = hidden(params, config, tokens_BT, positions_BT, cache)
    return logits(params, config, hidden_BTD), cache


def hidden(
    params: Any,
    config: ModelConfig,
    tokens_BT: jax.Array,
    positions_BT: jax.Array,
    cache: Cache,
    prefix_BT: jax.Array | None = None,
) -> tuple[jax.Array, Cache]:
    """(normed output of the last block [B, T, D], the cache with the tokens written); `prefix_BT` as the decoder has it."""
    rows, leading = tokens_BT.shape[0], num_leading(params)
    config, positions_BT = dataclasses.replace(config, max_seq_len=config.max_seq_len + leading), positions_BT + leading
    if rows < cache.rows:  # the cache has what the mesh divides
        given = (tokens_BT, positions_BT, prefix_BT)
        tokens_BT, positions_BT, prefix_BT = jax.tree.map(lambda x_BT: jnp.pad(x_BT, ((0, cache.rows - rows), (0, 0))), given)
    # A token has no length to share out: axis `context` repeats the others' work.
    whole_length = dataclasses.replace(mesh_config(), rules=(*mesh_config().rules, "length="))
    with primitives.fixed_order(), use_rules(whole_length):
        found: Any = decoder.Decoder(config).apply(
            {"params": weights.prepare(params, config)},
            tokens_BT,
            positions_BT,
            prefix_BT=prefix_BT,
            cache=cache,
            method=decoder.Decoder.hidden,
        )
    return found[0][:rows], found[1]


def logits(params: Any, config: ModelConfig, hidden_BTD: jax.Array) -> jax.Array:
    """[B, T, V] in float32."""
    return decoder.logits(hidden_BTD, decoder.output_table(weights.prepare(params, config), config), config)
