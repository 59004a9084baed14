"""Prefill and decode in one compiled call: a batch of requests is one dispatch.

The rows of a batch are right-padded prompts, each at its own position. Prompts fill the cache in one pass; then a loop feeds each
row's last token and draws the next until every row has stopped or the limit is reached. What padding leaves in the cache is never
seen: a query sees slots up to its own position, and each slot is overwritten by the row's own token before the row gets there.

Past the context: a row whose `max_seq_len` positions are all taken goes on from the last `max_seq_len // 2` of its tokens (at
least one), which are prefilled again at positions 0, 1, ...; this happens inside the same call, once for every
`max_seq_len - max_seq_len // 2 + 1` tokens, and leaves the other rows as they are.

Axis letters as in model/decoder.py, and P: padded prompt, W: prompt and continuation.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from gptjax.config import ModelConfig, UserError
from gptjax.generate import forward, processors
from gptjax.generate.processors import History, Vocabulary
from gptjax.generate.settings import GenerationConfig
from gptjax.model.attention import Cache
from gptjax.parallel import hosts

# What the seed's random key is for, folded into it first; initial parameters and dropout have 0 and 1.
SAMPLE = 2

SMALLEST_BUCKET = 16


@dataclasses.dataclass(frozen=True)
class Generated:
    """The continuations of a batch."""

    tokens: tuple[np.ndarray, ...]  # a row's new tokens, int32; the last one is eos where the row stopped on its own
    stopped: np.ndarray  # [B] bool: the row drew eos

    @property
    def num_new(self) -> np.ndarray:
        """[B] int: new tokens of each row, eos included."""
        return np.array([len(row) for row in self.tokens], np.int64)


@struct.dataclass
class _Request:
    """What a call is asked for, all of it traced."""

    prompts_BP: Any
    lengths_B: Any
    samples_B: Any
    seed: Any
    is_eos_V: Any
    vocab_size: Any
    limits_B: Any
    max_new_tokens: Any
    greedy: Any
    values: processors.Values
    names: tuple[str, ...] = struct.field(pytree_node=False)


@struct.dataclass
class _Rows:
    """The loop's state. Token i of a row stands at position i - start."""

    tokens_BW: jax.Array
    lengths_B: jax.Array
    starts_B: jax.Array
    stopped_B: jax.Array
    cache: Cache
    drawn: jax.Array


def bucket(length: int) -> int:
    """The power of two, at least 16, that `length` is padded to; lengths of one bucket share a compilation."""
    return max(SMALLEST_BUCKET, 1 << (length - 1).bit_length())


def generate_tokens(
    params: Any,
    config: ModelConfig,
    prompts: Sequence[Sequence[int] | np.ndarray],
    *,
    settings: GenerationConfig,
    seed: int,
    eos_ids: Sequence[int],
    vocab_size: int,
    samples: Sequence[int] | None = None,
) -> Generated:
    """Continues each prompt by up to `settings.max_new_tokens` tokens, or until it draws one of `eos_ids`.

    A row's tokens are a function of its prompt, the settings, the seed and its number in `samples` (None: 0 for every row), and
    not of what else is in the batch: token i is drawn by a key of (seed, sample, i). Equal prompts need different numbers to
    differ.
    `vocab_size` is the tokenizer's; ids from there on are never drawn. Compiled once for each (config, rows, bucket of the
    longest prompt, bucket of `max_new_tokens`, which processors are on), whatever the settings.

    Raises `UserError` for an empty prompt, one longer than `max_seq_len`, and ids that the tokenizer does not have.
    """
    _check(config, prompts, seed, vocab_size)
    if not prompts or settings.max_new_tokens == 0:
        return Generated(tuple(np.zeros(0, np.int32) for _ in prompts), np.zeros(len(prompts), bool))
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    prompts_BP = np.zeros((len(prompts), min(bucket(int(lengths_B.max())), config.max_seq_len)), np.int32)
    for row, prompt in zip(prompts_BP, prompts, strict=True):
        row[: len(prompt)] = prompt
    eos_ids = tuple(sorted(set(eos_ids)))
    limits_B = settings.limits(lengths_B).astype(np.int32)
    names, values = processors.plan(settings, Vocabulary(vocab_size, eos_ids))
    request = _Request(
        prompts_BP,
        lengths_B,
        np.zeros(len(prompts), np.int32) if samples is None else np.asarray(samples, np.int32),
        seed=np.uint32(seed),
        is_eos_V=np.isin(np.arange(config.vocab_size), eos_ids),
        vocab_size=np.int32(vocab_size),
        limits_B=limits_B,
        max_new_tokens=(limits_B - lengths_B).max(),
        greedy=np.bool_(settings.greedy),
        values=values,
        names=names,
    )
    # Nothing is differentiated here; knobs of the backward pass must not ask for another compilation.
    config = dataclasses.replace(config, remat="none", attention="auto")
    tokens_BW, ends_B, stopped_B = hosts.fetch(compiled_generate(params, request, config, bucket(settings.max_new_tokens)))
    return Generated(
        tuple(tokens[start:end] for tokens, start, end in zip(tokens_BW, lengths_B, ends_B, strict=True)), np.asarray(stopped_B)
    )


def _check(config: ModelConfig, prompts: Sequence[Sequence[int] | np.ndarray], seed: int, vocab_size: int) -> None:
    if not 0 <= seed < 2**32:
        raise UserError(f"seed={seed} must be at least 0 and below 2**32.")
    if not 0 < vocab_size <= config.vocab_size:
        raise UserError(
            f"the tokenizer has {vocab_size} ids, but the model's embedding has model.vocab_size={config.vocab_size} rows."
        )
    for number, prompt in enumerate(prompts):
        if len(prompt) == 0:
            raise UserError(
                f"prompt {number} is empty, and nothing can be predicted from nothing; begin with at least one token."
            )
        if len(prompt) > config.max_seq_len:
            raise UserError(
                f"prompt {number} has {len(prompt)} tokens, more than model.max_seq_len={config.max_seq_len}, the model's limit."
            )
        low, high = int(np.min(prompt)), int(np.max(prompt))
        if low < 0 or high >= vocab_size:
            raise UserError(
                f"prompt {number} has the token id {low if low < 0 else high}, but ids go from 0 to {vocab_size - 1}."
            )


@functools.partial(jax.jit, static_argnames=("config", "room"))
def compiled_generate(params: Any, request: _Request, config: ModelConfig, room: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(tokens [B, P + room], tokens of each row in use [B], rows that drew eos [B]). `room`: space for new tokens."""
    batch, width = request.prompts_BP.shape
    cache = Cache.empty(config, batch, min(width + room, config.max_seq_len))
    logits_BV, cache = forward.prefill(params, config, request.prompts_BP, request.lengths_B, cache)
    rows = _Rows(
        tokens_BW=jnp.pad(request.prompts_BP, ((0, 0), (0, room))),
        lengths_B=request.lengths_B,
        starts_B=jnp.zeros(batch, jnp.int32),
        stopped_B=jnp.zeros(batch, bool),
        cache=cache,
        drawn=jnp.int32(0),
    )
    rows = _append(request, rows, logits_BV)

    def unfinished(rows: _Rows) -> jax.Array:
        return (rows.drawn < request.max_new_tokens) & ~rows.stopped_B.all()

    def body(rows: _Rows) -> _Rows:
        return _append(request, *_advance(params, config, rows))

    rows = jax.lax.while_loop(unfinished, body, rows)
    return rows.tokens_BW, rows.lengths_B, rows.stopped_B


def _append(request: _Request, rows: _Rows, logits_BV: jax.Array) -> _Rows:
    """Draws the next token of every row that has not stopped."""
    key = jax.random.fold_in(jax.random.key(request.seed), SAMPLE)
    keys_B = jax.vmap(lambda sample, index: jax.random.fold_in(jax.random.fold_in(key, sample), index))(
        request.samples_B, rows.lengths_B
    )
    history = History(rows.tokens_BW, rows.lengths_B, request.lengths_B, request.limits_B)
    logits_BV = processors.within_vocabulary(logits_BV, request.vocab_size)
    logits_BV = processors.process(request.names, request.values, logits_BV, history)
    chosen_B = processors.draw(logits_BV, keys_B, request.greedy)
    alive_B = ~rows.stopped_B & (rows.lengths_B < request.limits_B)
    batch, width = rows.tokens_BW.shape
    places_B = jnp.where(alive_B, rows.lengths_B, width)  # out of range, so dropped, where a row has stopped
    return dataclasses.replace(
        rows,
        tokens_BW=rows.tokens_BW.at[jnp.arange(batch), places_B].set(chosen_B, mode="drop"),
        lengths_B=rows.lengths_B + alive_B,
        stopped_B=rows.stopped_B | (alive_B & request.is_eos_V[chosen_B]),
        drawn=rows.drawn + 1,
    )


def _advance(params: Any, config: ModelConfig, rows: _Rows) -> tuple[_Rows, jax.Array]:
    """Feeds each row's last token; (rows, logits [B, V] of the token after it)."""
    context = config.max_seq_len
    last_B = rows.lengths_B - 1
    positions_B = last_B - rows.starts_B
    tokens_B = jnp.take_along_axis(rows.tokens_BW, last_B[:, None], axis=1)[:, 0]
    # A row at the limit writes its last slot once more, which its new window never sees.
    logits_BV, cache = forward.step(params, config, tokens_B, jnp.minimum(positions_B, context - 1), rows.cache)
    rows = dataclasses.replace(rows, cache=cache)
    if rows.tokens_BW.shape[1] <= context:  # no row can get there
        return rows, logits_BV
    full_B = (positions_B >= context) & ~rows.stopped_B
    refill = functools.partial(_refill, params, config)
    return jax.lax.cond(full_B.any(), refill, lambda rows, logits_BV, full_B: (rows, logits_BV), rows, logits_BV, full_B)


def _refill(params: Any, config: ModelConfig, rows: _Rows, logits_BV: jax.Array, full_B: jax.Array) -> tuple[_Rows, jax.Array]:
    """Begins a new window in the rows of `full_B`; the others keep their state and their logits."""
    batch = full_B.shape[0]
    window = max(1, config.max_seq_len // 2)
    starts_B = jnp.maximum(rows.lengths_B - window, 0)
    positions_BT = jnp.broadcast_to(jnp.arange(window), (batch, window))
    tokens_BT = jnp.take_along_axis(rows.tokens_BW, starts_B[:, None] + positions_BT, axis=1)
    new_logits_BV, new_cache = forward.prefill(params, config, tokens_BT, jnp.full(batch, window), rows.cache)
    cache = jax.tree.map(lambda new, old: jnp.where(full_B[:, None, None, None], new, old), new_cache, rows.cache)
    rows = dataclasses.replace(rows, starts_B=jnp.where(full_B, starts_B, rows.starts_B), cache=cache)
    return rows, jnp.where(full_B[:, None], new_logits_BV, logits_BV)
