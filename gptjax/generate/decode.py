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
from gptjax.generate import forward, processors, weights
from gptjax.generate.guides import Guide
from gptjax.generate.listening import OnTokens, listening, tell
from gptjax.generate.processors import History, Vocabulary
from gptjax.generate.settings import GenerationConfig
from gptjax.model import primitives
from gptjax.model.attention import Cache
from gptjax.parallel import hosts
from gptjax.parallel.sharding import constrain

# What the seed's random key is for, folded into it first; initial parameters and dropout have 0 and 1.
SAMPLE = 2

SMALLEST_BUCKET = 16


@dataclasses.dataclass(frozen=True)
class Generated:
    """The continuations of a batch."""

    tokens: tuple[np.ndarray, ...]  # a row's new tokens, int32; the last one is eos where the row stopped on its own
    stopped: np.ndarray  # [B] bool: the row drew eos
    guided: np.ndarray  # [B] bool: a guide ended the row, with its last token
    log_probs: tuple[np.ndarray, ...]  # float32, of each new token under the model's own distribution over the tokenizer's ids

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
    rows: Any
    seed: Any
    is_eos_V: Any
    vocab_size: Any
    limits_B: Any
    max_new_tokens: Any
    greedy: Any
    values: processors.Values
    listener: Any  # number of the function in listening.py that hears each step
    names: tuple[str, ...] = struct.field(pytree_node=False)
    heard: bool = struct.field(pytree_node=False)  # whether there is one
    prefix: bool = struct.field(pytree_node=False, default=False)  # whether a prompt's tokens see each other both ways


@struct.dataclass
class _Rows:
    """The loop's state. Token i of a row stands at position i - start."""

    tokens_BW: jax.Array
    lengths_B: jax.Array
    starts_B: jax.Array
    stopped_B: jax.Array  # drew eos
    guided_B: jax.Array  # ended by a guide
    log_probs_BR: jax.Array  # of new token r
    cache: Cache
    guides: tuple[Any, ...]
    drawn: jax.Array
    go_on: jax.Array  # False: the listener has failed


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
    guides: tuple[Guide, ...] = (),
    on_tokens: OnTokens | None = None,
    prefix: bool = False,
) -> Generated:
    """Continues each prompt by up to `settings.max_new_tokens` tokens, or until it draws one of `eos_ids`.

    A row's tokens are a function of its prompt, the settings, the seed and its number in `samples` (None: 0 for every row), and
    not of what else is in the batch: token i is drawn by a key of (seed, sample, i). Equal prompts need different numbers to
    differ.
    `vocab_size` is the tokenizer's; ids from there on are never drawn. Compiled once for each (config, rows, bucket of the
    longest prompt, bucket of `max_new_tokens`, which processors are on, the guides' structure), whatever the settings.

    `params` may be the model's own or what `weights.prepare` made of them; the former are prepared at each call, which takes a
    second dispatch and a copy of all weights.

    `prefix`: the tokens of a prompt see each other both ways, as those of a prefix LM.

    `on_tokens` is called after every step, in order, while the one compiled call runs (of several processes, in the first). What
    it raises ends the call and is raised here, and so does a KeyboardInterrupt.

    Raises `UserError` for an empty prompt, one longer than `max_seq_len`, and ids that the tokenizer does not have.
    """
    check_prompts(config, prompts, seed, vocab_size)
    if not prompts or settings.max_new_tokens == 0:
        empty = tuple(np.zeros(0, np.int32) for _ in prompts)
        no, none = np.zeros(len(prompts), bool), tuple(row.astype(np.float32) for row in empty)
        return Generated(empty, stopped=no, guided=no, log_probs=none)
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
        rows=np.int32(len(prompts)),
        seed=np.uint32(seed),
        is_eos_V=np.isin(np.arange(config.vocab_size), eos_ids),
        vocab_size=np.int32(vocab_size),
        limits_B=limits_B,
        max_new_tokens=(limits_B - lengths_B).max(),
        greedy=np.bool_(settings.greedy),
        values=values,
        listener=np.int32(0),
        names=names,
        heard=on_tokens is not None,
        prefix=prefix,
    )
    # Nothing is differentiated here; knobs of the backward pass must not ask for another compilation.
    config = dataclasses.replace(config, remat="none", attention="auto")
    # Not inside the compiled call, where XLA would see a transposed kernel and take a product that sums in another order.
    params = weights.prepare(params, config)
    with listening(on_tokens) as listener:
        request = dataclasses.replace(request, listener=np.int32(listener.number))
        result = listener.check(compiled_generate(params, request, guides, config, bucket(settings.max_new_tokens)))
    tokens_BW, ends_B, stopped_B, guided_B, log_probs_BR = hosts.fetch(result)
    spans = list(zip(lengths_B, ends_B, strict=True))
    return Generated(
        tuple(tokens[start:end] for tokens, (start, end) in zip(tokens_BW, spans, strict=True)),
        stopped=np.asarray(stopped_B),
        guided=np.asarray(guided_B),
        log_probs=tuple(row[: end - start] for row, (start, end) in zip(log_probs_BR, spans, strict=True)),
    )


def check_prompts(config: ModelConfig, prompts: Sequence[Sequence[int] | np.ndarray], seed: int, vocab_size: int) -> None:
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
def compiled_generate(
    params: Any, request: _Request, guides: tuple[Any, ...], config: ModelConfig, room: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array, jax.Array]:
    """(tokens [B, P + room], tokens of each row in use [B], rows that drew eos [B], rows that a guide ended [B],
    log-probabilities of new tokens [B, room]). `room`: space for new tokens.
    """
    batch, width = request.prompts_BP.shape
    cache = forward.empty_cache(params, config, batch, min(width + room, config.max_seq_len))
    prefix_B = request.lengths_B if request.prefix else None
    logits_BV, cache = forward.prefill(params, config, request.prompts_BP, request.lengths_B, cache, prefix_B)
    rows = _Rows(
        tokens_BW=jnp.pad(request.prompts_BP, ((0, 0), (0, room))),
        lengths_B=request.lengths_B,
        starts_B=jnp.zeros(batch, jnp.int32),
        stopped_B=jnp.zeros(batch, bool),
        guided_B=jnp.zeros(batch, bool),
        log_probs_BR=jnp.zeros((batch, room), jnp.float32),
        cache=cache,
        guides=guides,
        drawn=jnp.int32(0),
        go_on=jnp.bool_(True),
    )
    rows = _append(request, rows, logits_BV)

    def unfinished(rows: _Rows) -> jax.Array:
        return (rows.drawn < request.max_new_tokens) & ~(rows.stopped_B | rows.guided_B).all() & rows.go_on

    def body(rows: _Rows) -> _Rows:
        return _append(request, *_advance(params, config, rows, prefix_B))

    rows = jax.lax.while_loop(unfinished, body, rows)
    return rows.tokens_BW, rows.lengths_B, rows.stopped_B, rows.guided_B, rows.log_probs_BR


def _append(request: _Request, rows: _Rows, logits_BV: jax.Array) -> _Rows:
    """Draws the next token of every row that has not stopped."""
    key = jax.random.fold_in(jax.random.key(request.seed), SAMPLE)
    keys_B = jax.vmap(lambda sample, index: jax.random.fold_in(jax.random.fold_in(key, sample), index))(
        request.samples_B, rows.lengths_B
    )
    history = History(rows.tokens_BW, rows.lengths_B, request.lengths_B, request.limits_B)
    own_BV = processors.within_vocabulary(constrain(logits_BV, None, None), request.vocab_size)
    logits_BV = own_BV
    for guide in rows.guides:
        logits_BV = guide.allowed(logits_BV, history, history.limits_B - history.lengths_B)
    chosen_B, log_probs_B = _draw(request, logits_BV, own_BV, keys_B, history)

    alive_B = ~(rows.stopped_B | rows.guided_B) & (rows.lengths_B < request.limits_B)
    here_B = jnp.arange(alive_B.shape[0])
    # Out of range, so dropped, where a row has stopped.
    places_B = jnp.where(alive_B, rows.lengths_B, rows.tokens_BW.shape[1])
    guides = tuple(guide.advanced(chosen_B, alive_B) for guide in rows.guides)
    guided_B = rows.guided_B
    for guide in guides:
        guided_B = guided_B | (alive_B & guide.stopped())
    return dataclasses.replace(
        rows,
        tokens_BW=rows.tokens_BW.at[here_B, places_B].set(chosen_B, mode="drop"),
        lengths_B=rows.lengths_B + alive_B,
        stopped_B=rows.stopped_B | (alive_B & request.is_eos_V[chosen_B]),
        guided_B=guided_B,
        log_probs_BR=rows.log_probs_BR.at[here_B, places_B - request.lengths_B].set(log_probs_B, mode="drop"),
        guides=guides,
        drawn=rows.drawn + 1,
        go_on=tell(request.listener, chosen_B, alive_B) if request.heard else rows.go_on,
    )


def _draw(
    request: _Request, logits_BV: jax.Array, own_BV: jax.Array, keys_B: jax.Array, history: History
) -> tuple[jax.Array, jax.Array]:
    """(a token of each row from `logits_BV` by the processors, its log-probability by `own_BV`), one row after the other.

    How XLA takes a sum over the vocabulary depends on the array's size, so that each row goes through the same loop by itself,
    whose length is no constant and which takes rows out of two at least: otherwise a batch of one would be compiled without it.
    """
    batch = logits_BV.shape[0]
    of_rows = (logits_BV, own_BV, keys_B, history)
    if batch == 1:
        of_rows = jax.tree.map(lambda leaf: jnp.concatenate([leaf, leaf]), of_rows)

    def draw_row(number: jax.Array, drawn: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        row = jax.tree.map(lambda leaf: jax.lax.dynamic_slice_in_dim(leaf, number, 1), of_rows)
        # Kept apart from what makes the rows, with which sums would be compiled in another way for another batch.
        logits_1V, own_1V, keys_1, history_1 = jax.lax.optimization_barrier(row)
        logits_1V = processors.process(request.names, request.values, logits_1V, history_1)
        chosen_1 = processors.draw(logits_1V, keys_1, request.greedy)
        below_1V = own_1V - own_1V.max(-1, keepdims=True)
        log_probs_1 = below_1V[0, chosen_1] - jnp.log(primitives.ordered_sum(jnp.exp(below_1V)))[:, 0]
        return drawn[0].at[number].set(chosen_1[0]), drawn[1].at[number].set(log_probs_1[0])

    none = jnp.zeros(batch, jnp.int32), jnp.zeros(batch, jnp.float32)
    return jax.lax.fori_loop(0, request.rows, draw_row, none)


def _advance(params: Any, config: ModelConfig, rows: _Rows, prefix_B: jax.Array | None) -> tuple[_Rows, jax.Array]:
    """Feeds each row's last token; (rows, logits [B, V] of the token after it). `prefix_B`: first tokens that see each other."""
    context = config.max_seq_len
    last_B = rows.lengths_B - 1
    positions_B = last_B - rows.starts_B
    tokens_B = jnp.take_along_axis(rows.tokens_BW, last_B[:, None], axis=1)[:, 0]
    # A row at the limit writes its last slot once more, which its new window never sees.
    logits_BV, cache = forward.step(params, config, tokens_B, jnp.minimum(positions_B, context - 1), rows.cache)
    rows = dataclasses.replace(rows, cache=cache)
    if rows.tokens_BW.shape[1] <= context:  # no row can get there
        return rows, logits_BV
    full_B = (positions_B >= context) & ~(rows.stopped_B | rows.guided_B)
    refill = functools.partial(_refill, params, config, prefix_B)
    return jax.lax.cond(full_B.any(), refill, lambda rows, logits_BV, full_B: (rows, logits_BV), rows, logits_BV, full_B)


def _refill(
    params: Any, config: ModelConfig, prefix_B: jax.Array | None, rows: _Rows, logits_BV: jax.Array, full_B: jax.Array
) -> tuple[_Rows, jax.Array]:
    """Begins a new window in the rows of `full_B`; the others keep their state and their logits."""
    batch = full_B.shape[0]
    window = max(1, config.max_seq_len // 2)
    starts_B = jnp.maximum(rows.lengths_B - window, 0)
    positions_BT = jnp.broadcast_to(jnp.arange(window), (batch, window))
    tokens_BT = jnp.take_along_axis(rows.tokens_BW, starts_B[:, None] + positions_BT, axis=1)
    given_B = None if prefix_B is None else jnp.maximum(prefix_B - starts_B, 0)  # what is left of the prompt
    new_logits_BV, new_cache = forward.prefill(params, config, tokens_BT, jnp.full(batch, window), rows.cache, given_B)
    full_R = jnp.pad(full_B, (0, rows.cache.rows - batch))  # a mesh may have made the cache's rows more
    cache = jax.tree.map(lambda new, old: jnp.where(full_R[:, None, None, None], new, old), new_cache, rows.cache)
    rows = dataclasses.replace(rows, starts_B=jnp.where(full_B, starts_B, rows.starts_B), cache=cache)
    return rows, jnp.where(full_B[:, None], new_logits_BV, logits_BV)
