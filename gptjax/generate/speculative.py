"""Speculative decoding (Leviathan et al., 2023; Chen et al., 2023) in one compiled call: something cheap drafts several tokens,
the model looks at all of them in one pass and keeps what it would have drawn itself.

With p and q the processed distributions of the model and of the draft, a drafted token x is kept with probability
min(1, p(x) / q(x)); the first that is not is replaced by a draw from max(p - q, 0), renormalised, and if all are kept one more is
drawn from p. So every token has the distribution p. Greedily, a token is kept where it is the model's own choice.

Drafts come from a smaller model of the same vocabulary or, by prompt lookup (Saxena, 2023), from the text itself: what followed
the earliest occurrence of its last n-gram, the longest n up to max_matching_ngram_size that has one; q is then certain of x.

Rows advance on their own, by as many tokens as were kept. All that is random at a place of a text has keys of (seed, sample,
place). A place's keys may be used in several rounds, but they come to matter only in the one that settles its token: what a
round drafted past its first rejection decides nothing.

Axis letters as in model/decoder.py, and P: padded prompt, W: prompt and continuation, X: drafted tokens, Y = X + 1.
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
from gptjax.generate import decode, forward, processors, weights
from gptjax.generate.asked import Asked, Prompts, ask, for_inference, log_probs_of, nothing, put
from gptjax.generate.decode import Generated
from gptjax.generate.settings import GenerationConfig
from gptjax.model.cache import Cache
from gptjax.parallel import hosts

Draft = tuple[Any, ModelConfig]  # parameters and config

# What a key of a place is for.
_DRAFT, _KEEP, _SETTLE = 0, 1, 2


@dataclasses.dataclass(frozen=True, kw_only=True)
class Speculated(Generated):
    """The continuations, and how well the drafts did: `accepted.sum() / drafted.sum()` is the acceptance rate."""

    rounds: np.ndarray  # [B] int32: passes of the model
    drafted: np.ndarray  # [B] int32: tokens it was shown
    accepted: np.ndarray  # [B] int32: those it kept


@struct.dataclass
class _State:
    tokens_BW: jax.Array
    lengths_B: jax.Array
    stopped_B: jax.Array
    log_probs_BR: jax.Array
    cache: Cache  # positions up to the last but one are filled in
    draft_cache: Cache | None
    rounds_B: jax.Array
    drafted_B: jax.Array
    accepted_B: jax.Array


def generate_tokens(
    params: Any,
    config: ModelConfig,
    prompts: Prompts,
    *,
    settings: GenerationConfig,
    seed: int,
    eos_ids: Sequence[int],
    vocab_size: int,
    samples: Sequence[int] | None = None,
    guides: tuple[Any, ...] = (),
    on_tokens: Any = None,
    draft: Draft | None = None,
) -> Speculated:
    """Continues each prompt as decode.generate_tokens does: token for token when greedy (but for logits that tie within
    rounding), in distribution when not.

    A round drafts `settings.num_assistant_tokens` tokens with `draft`, or with None up to `settings.prompt_lookup_num_tokens`
    from the text. Compiled once for each (configs, rows, bucket of the longest prompt, bucket of `max_new_tokens`, drafted
    tokens rounded up to a multiple of 4, which processors are on).

    Raises `UserError` for a draft with another vocabulary or too short a context, guides, `on_tokens`, and what
    decode.generate_tokens refuses.
    """
    count = settings.prompt_lookup_num_tokens if draft is None else settings.num_assistant_tokens
    _check(config, settings, draft, count, guides, on_tokens)
    if not prompts or settings.max_new_tokens == 0:
        none = np.zeros(len(prompts), np.int32)
        return Speculated(**vars(nothing(len(prompts))), rounds=none, drafted=none, accepted=none)
    numbers = {"count": np.int32(count), "ngram": np.int32(settings.max_matching_ngram_size)}
    given: dict[str, Any] = {"seed": seed, "eos_ids": eos_ids, "vocab_size": vocab_size, "samples": samples, "numbers": numbers}
    asked = ask(config, prompts, settings, search="speculative decoding", **given)
    if draft is not None:
        ask(draft[1], prompts, settings, search="the draft model", **given)
    draft_params, draft_config = (None, None) if draft is None else (draft[0], for_inference(draft[1]))
    state = hosts.fetch(
        compiled_rounds(
            params,
            draft_params,
            asked,
            for_inference(config),
            draft_config,
            -(-count // 4) * 4,
            decode.bucket(settings.max_new_tokens),
        )
    )
    spans = list(zip(asked.lengths_B, state["lengths_B"], strict=True))
    return Speculated(
        tokens=tuple(row[start:end] for row, (start, end) in zip(state["tokens_BW"], spans, strict=True)),
        stopped=state["stopped_B"],
        guided=np.zeros(len(prompts), bool),
        log_probs=tuple(row[: end - start] for row, (start, end) in zip(state["log_probs_BR"], spans, strict=True)),
        rounds=state["rounds_B"],
        drafted=state["drafted_B"],
        accepted=state["accepted_B"],
    )


def _check(
    config: ModelConfig, settings: GenerationConfig, draft: Draft | None, count: int, guides: tuple[Any, ...], on_tokens: Any
) -> None:
    if count < 1:
        raise UserError(f"prompt_lookup_num_tokens={count} must be at least 1 for speculative decoding.")
    if draft is not None and settings.prompt_lookup_num_tokens:
        raise UserError(
            f"prompt_lookup_num_tokens={settings.prompt_lookup_num_tokens} and a draft model are both given; only one can draft."
        )
    if draft is not None and draft[1].vocab_size != config.vocab_size:
        raise UserError(
            f"the draft model has model.vocab_size={draft[1].vocab_size} and the model {config.vocab_size}; they must share one "
            "vocabulary."
        )
    if guides:
        raise UserError("speculative decoding cannot follow a grammar, a pattern or stop strings; decode without a draft.")
    if on_tokens is not None:
        raise UserError("speculative decoding cannot stream; decode without a draft.")


@functools.partial(jax.jit, static_argnames=("config", "draft_config", "most", "room"))
def compiled_rounds(
    params: Any,
    draft_params: Any,
    asked: Asked,
    config: ModelConfig,
    draft_config: ModelConfig | None,
    most: int,
    room: int,
) -> dict[str, jax.Array]:
    """Fields of the last state. `most`: space for drafted tokens; `room`: for new tokens."""
    batch, width = asked.prompts_BP.shape
    params = weights.prepare(params, config)
    draft_params = None if draft_config is None else weights.prepare(draft_params, draft_config)

    def filled(params: Any, config: ModelConfig) -> Cache:
        cache = forward.empty_cache(params, config, batch, width + room)
        return forward.prefill(params, config, asked.prompts_BP, asked.lengths_B, cache)[1]

    none_B = jnp.zeros(batch, jnp.int32)
    state = _State(
        tokens_BW=jnp.pad(asked.prompts_BP, ((0, 0), (0, room))),
        lengths_B=asked.lengths_B,
        stopped_B=jnp.zeros(batch, bool),
        log_probs_BR=jnp.zeros((batch, room), jnp.float32),
        cache=filled(params, config),
        draft_cache=None if draft_config is None else filled(draft_params, draft_config),
        rounds_B=none_B,
        drafted_B=none_B,
        accepted_B=none_B,
    )

    def alive(state: _State) -> jax.Array:
        return ~state.stopped_B & (state.lengths_B < asked.limits_B)

    def body(state: _State) -> _State:
        # One token always comes from the model itself.
        room_B = asked.limits_B - state.lengths_B - 1
        counts_B = jnp.where(alive(state), jnp.minimum(asked.numbers["count"], room_B), 0)
        if draft_config is None:
            state, counts_B, q_BXV = *_look_up(asked, most, state, counts_B), None
        else:
            state, q_BXV = _draft(draft_params, draft_config, asked, most, state, counts_B)
        return _verify(params, config, asked, most, state, counts_B, q_BXV, alive(state))

    state = jax.lax.while_loop(lambda state: alive(state).any(), body, state)
    return {name: value for name, value in vars(state).items() if not name.endswith("cache")}


def _draft(
    params: Any, config: ModelConfig, asked: Asked, most: int, state: _State, counts_B: jax.Array
) -> tuple[_State, jax.Array]:
    """(the state with `counts_B` tokens written behind each text, their processed log-probabilities [B, X, V])."""
    batch, width = state.tokens_BW.shape
    rows_B = jnp.arange(batch)

    def one(index: jax.Array, carried: tuple[jax.Array, Cache, jax.Array]) -> tuple[jax.Array, Cache, jax.Array]:
        tokens_BW, cache, q_BXV = carried
        drafts_B = index < counts_B
        lengths_B = state.lengths_B + jnp.where(drafts_B, index, 0)
        # Two tokens: where a round kept all that was drafted, the last of these has not been fed yet.
        places_B2 = jnp.stack([jnp.maximum(lengths_B - 2, 0), lengths_B - 1], axis=1)
        fed_B2 = jnp.take_along_axis(tokens_BW, places_B2, axis=1)
        hidden_B2D, cache = forward.hidden(params, config, fed_B2, places_B2, cache)
        logits_BV = processors.within_vocabulary(forward.logits(params, config, hidden_B2D[:, 1:])[:, 0], asked.vocab_size)
        logits_BV = asked.processed(logits_BV, tokens_BW, lengths_B, rows_B)
        drawn_B = processors.draw(logits_BV, asked.keys(asked.samples_B, lengths_B, _DRAFT), asked.greedy)
        tokens_BW = put(tokens_BW, jnp.where(drafts_B, lengths_B, width), drawn_B)
        return tokens_BW, cache, q_BXV.at[:, index].set(jax.nn.log_softmax(logits_BV, axis=-1))

    assert state.draft_cache is not None
    q_BXV = jnp.zeros((batch, most, config.vocab_size), jnp.float32)
    tokens_BW, cache, q_BXV = jax.lax.fori_loop(0, counts_B.max(), one, (state.tokens_BW, state.draft_cache, q_BXV))
    return dataclasses.replace(state, tokens_BW=tokens_BW, draft_cache=cache), q_BXV


def _look_up(asked: Asked, most: int, state: _State, counts_B: jax.Array) -> tuple[_State, jax.Array]:
    """(the state with what followed the n-gram written behind each text, how many tokens that is [B])."""
    tokens_BW, lengths_B1 = state.tokens_BW, state.lengths_B[:, None]
    width = tokens_BW.shape[1]
    ends_1W = jnp.arange(width)[None]  # an n-gram that ends before this place, for every place

    def longer(back: jax.Array, found: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        same_BW, sizes_BW = found
        own_B1 = jnp.take_along_axis(tokens_BW, jnp.maximum(lengths_B1 - 1 - back, 0), axis=1)
        same_BW = same_BW & (jnp.roll(tokens_BW, back + 1, axis=1) == own_B1) & (ends_1W > back)
        return same_BW, sizes_BW + same_BW

    inside_BW = ends_1W < lengths_B1  # something follows
    _, sizes_BW = jax.lax.fori_loop(0, asked.numbers["ngram"], longer, (inside_BW, jnp.zeros(tokens_BW.shape, jnp.int32)))
    start_B1 = jnp.argmax(sizes_BW, axis=1)[:, None]  # the first of the longest
    found_B = sizes_BW.max(axis=1) > 0
    counts_B = jnp.where(found_B, jnp.minimum(counts_B, (lengths_B1 - start_B1)[:, 0]), 0)

    index_1X = jnp.arange(most)[None]
    copied_BX = jnp.take_along_axis(tokens_BW, jnp.minimum(start_B1 + index_1X, width - 1), axis=1)
    places_BX = jnp.where(index_1X < counts_B[:, None], lengths_B1 + index_1X, width)
    rows_B1 = jnp.arange(tokens_BW.shape[0])[:, None]
    return dataclasses.replace(state, tokens_BW=tokens_BW.at[rows_B1, places_BX].set(copied_BX, mode="drop")), counts_B


def _verify(
    params: Any,
    config: ModelConfig,
    asked: Asked,
    most: int,
    state: _State,
    counts_B: jax.Array,
    q_BXV: jax.Array | None,
    alive_B: jax.Array,
) -> _State:
    """The state after the model has seen the drafted tokens. `q_BXV`: their log-probabilities; None: they were certain."""
    batch, width = state.tokens_BW.shape
    rows_B1, index_1Y = jnp.arange(batch)[:, None], jnp.arange(most + 1)[None]
    # A place that is not used repeats the last token of the text, which writes what is in the cache already.
    ahead_BY = jnp.where(index_1Y <= counts_B[:, None], index_1Y, 0)
    lengths_BY = state.lengths_B[:, None] + ahead_BY
    fed_BY = jnp.take_along_axis(state.tokens_BW, lengths_BY - 1, axis=1)
    logits_BYV, cache = forward.several(params, config, fed_BY, lengths_BY - 1, state.cache)
    own_BYV = processors.within_vocabulary(logits_BYV, asked.vocab_size)
    rows_N = jnp.repeat(jnp.arange(batch), most + 1)
    own_NV = own_BYV.reshape(-1, own_BYV.shape[-1])
    processed_NV = asked.processed(own_NV, state.tokens_BW[rows_N], lengths_BY.reshape(-1), rows_N)

    kept_B, token_B = _judge(asked, state, counts_B, processed_NV.reshape(own_BYV.shape), q_BXV)
    tokens_BW = put(state.tokens_BW, jnp.where(alive_B, state.lengths_B + kept_B, width), token_B)
    new_BY = jnp.take_along_axis(tokens_BW, jnp.minimum(state.lengths_B[:, None] + index_1Y, width - 1), axis=1)
    eos_BY = asked.is_eos_V[new_BY] & (index_1Y <= kept_B[:, None])
    stops_B = eos_BY.any(axis=1)
    added_B = jnp.where(alive_B, jnp.where(stops_B, jnp.argmax(eos_BY, axis=1), kept_B) + 1, 0)
    # Places past those that were added are out of range.
    places_BY = jnp.where(index_1Y < added_B[:, None], (state.lengths_B - asked.lengths_B)[:, None] + index_1Y, width)
    return dataclasses.replace(
        state,
        tokens_BW=tokens_BW,
        lengths_B=state.lengths_B + added_B,
        stopped_B=state.stopped_B | (alive_B & stops_B),
        log_probs_BR=state.log_probs_BR.at[rows_B1, places_BY].set(log_probs_of(own_BYV, new_BY), mode="drop"),
        cache=cache,
        rounds_B=state.rounds_B + alive_B,
        drafted_B=state.drafted_B + counts_B,
        accepted_B=state.accepted_B + jnp.minimum(kept_B, added_B),
    )


def _judge(
    asked: Asked, state: _State, counts_B: jax.Array, logits_BYV: jax.Array, q_BXV: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """(how many of each row's drafted tokens are kept [B], the token behind them [B])."""
    batch, most = logits_BYV.shape[0], logits_BYV.shape[1] - 1
    p_BYV = jax.nn.log_softmax(logits_BYV, axis=-1)
    rows_B, index_1X = jnp.arange(batch), jnp.arange(most)[None]
    places_BX = state.lengths_B[:, None] + index_1X
    x_BX = jnp.take_along_axis(state.tokens_BW, jnp.minimum(places_BX, state.tokens_BW.shape[1] - 1), axis=1)
    p_of_x_BX = jnp.take_along_axis(p_BYV[:, :-1], x_BX[..., None], axis=-1)[..., 0]
    q_of_x_BX = jnp.zeros(x_BX.shape) if q_BXV is None else jnp.take_along_axis(q_BXV, x_BX[..., None], axis=-1)[..., 0]

    keys = asked.keys(jnp.repeat(asked.samples_B, most), places_BX.reshape(-1), _KEEP)
    uniform_BX = jax.vmap(jax.random.uniform)(keys).reshape(batch, most)
    drawn_BX = jnp.log(uniform_BX) < p_of_x_BX - q_of_x_BX
    keep_BX = jnp.where(asked.greedy, x_BX == jnp.argmax(logits_BYV[:, :-1], axis=-1), drawn_BX) & (index_1X < counts_B[:, None])
    kept_B = jnp.cumprod(keep_BX, axis=1).sum(axis=1)

    p_BV = p_BYV[rows_B, kept_B]
    at_B = jnp.minimum(kept_B, most - 1)
    if q_BXV is None:
        q_BV = jax.nn.one_hot(x_BX[rows_B, at_B], p_BV.shape[-1])
    else:
        q_BV = jnp.exp(q_BXV[rows_B, at_B])
    rest_BV = jnp.where((kept_B < counts_B)[:, None], jnp.maximum(jnp.exp(p_BV) - q_BV, 0), jnp.exp(p_BV))
    # Where p and q differ by rounding alone nothing may be left, and p is as good.
    is_plain_B1 = asked.greedy | (rest_BV.sum(axis=-1, keepdims=True) <= 0)
    rest_BV = jnp.where(is_plain_B1, logits_BYV[rows_B, kept_B], jnp.log(rest_BV))
    return kept_B, processors.draw(rest_BV, asked.keys(asked.samples_B, state.lengths_B + kept_B, _SETTLE), asked.greedy)
