"""Contrastive search (Su et al., 2022) in one compiled call.

Of the k most probable tokens v the next is the one with the highest

    (1 - penalty_alpha) * p(v | x) - penalty_alpha * max_j cos(h_v, h_j),

where h_j is the last hidden vector (after the final norm) of token j of the text and h_v that of v, fed behind it. So a step
feeds k candidates a row, each in a row of the cache of its own. These rows hold the same text, so that after the choice only the
chosen candidate's slot is copied to the others, and the step's hidden vectors give the next logits too.

Axis letters as in model/decoder.py, and P: padded prompt, W: prompt and continuation, C: candidates, N = B * C.
"""

from __future__ import annotations

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


@struct.dataclass
class _State:
    tokens_BW: jax.Array
    lengths_B: jax.Array
    stopped_B: jax.Array
    log_probs_BR: jax.Array
    directions_BWD: jax.Array  # hidden vectors of length 1; 0 past the text
    logits_BV: jax.Array  # of the token to come
    cache: Cache  # N rows
    count: jax.Array


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
) -> Generated:
    """The continuation of each prompt with `settings.top_k` candidates a token; nothing is random, so `seed` and `samples` don't
    matter.

    Compiled once for each (config, rows, bucket of the longest prompt, bucket of `max_new_tokens`, top_k, which processors are
    on), whatever `penalty_alpha`.

    Raises `UserError` for settings that make no sense together, guides, `on_tokens`, and what decode.generate_tokens refuses.
    """
    _check(settings, guides, on_tokens)
    if not prompts or settings.max_new_tokens == 0:
        return nothing(len(prompts))
    asked = ask(
        config,
        prompts,
        settings,
        seed=seed,
        eos_ids=eos_ids,
        vocab_size=vocab_size,
        samples=samples,
        search="contrastive search",
        numbers={"penalty_alpha": np.float32(settings.penalty_alpha)},
    )
    candidates, room = min(settings.top_k, vocab_size), decode.bucket(settings.max_new_tokens)
    tokens_BW, ends_B, stopped_B, log_probs_BR = hosts.fetch(
        compiled_search(params, asked, for_inference(config), candidates, room)
    )
    spans = list(zip(asked.lengths_B, ends_B, strict=True))
    return Generated(
        tokens=tuple(row[start:end] for row, (start, end) in zip(tokens_BW, spans, strict=True)),
        stopped=stopped_B,
        guided=np.zeros(len(prompts), bool),
        log_probs=tuple(row[: end - start] for row, (start, end) in zip(log_probs_BR, spans, strict=True)),
    )


def _check(settings: GenerationConfig, guides: tuple[Any, ...], on_tokens: Any) -> None:
    if not settings.penalty_alpha:
        raise UserError(f"penalty_alpha={settings.penalty_alpha} must be above 0 for contrastive search.")
    if guides:
        raise UserError("contrastive search cannot follow a grammar, a pattern or stop strings; set penalty_alpha=0.")
    if on_tokens is not None:
        raise UserError("contrastive search cannot stream; set penalty_alpha=0.")


@functools.partial(jax.jit, static_argnames=("config", "candidates", "room"))
def compiled_search(
    params: Any, asked: Asked, config: ModelConfig, candidates: int, room: int
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """(tokens [B, W], tokens of each row in use [B], rows that chose eos [B], log-probabilities of new tokens [B, room])."""
    batch, width = asked.prompts_BP.shape
    params = weights.prepare(params, config)
    positions_BP = jnp.broadcast_to(jnp.arange(width), (batch, width))
    cache = forward.empty_cache(params, config, batch, width + room)
    hidden_BPD, cache = forward.hidden(params, config, asked.prompts_BP, positions_BP, cache)
    last_B1D = jnp.take_along_axis(hidden_BPD, (asked.lengths_B - 1)[:, None, None], axis=1)
    is_prompt_BP1 = (positions_BP < asked.lengths_B[:, None])[..., None]
    state = _State(
        tokens_BW=jnp.pad(asked.prompts_BP, ((0, 0), (0, room))),
        lengths_B=asked.lengths_B,
        stopped_B=jnp.zeros(batch, bool),
        log_probs_BR=jnp.zeros((batch, room), jnp.float32),
        directions_BWD=jnp.pad(jnp.where(is_prompt_BP1, _direction(hidden_BPD), 0), ((0, 0), (0, room), (0, 0))),
        logits_BV=forward.logits(params, config, last_B1D)[:, 0],
        cache=jax.tree.map(lambda slots: jnp.repeat(slots, candidates, axis=1), cache),
        count=jnp.int32(0),
    )

    def unfinished(state: _State) -> jax.Array:
        return (state.count < asked.max_new_tokens) & ~state.stopped_B.all()

    state = jax.lax.while_loop(unfinished, functools.partial(_extend, params, config, asked, candidates), state)
    return state.tokens_BW, state.lengths_B, state.stopped_B, state.log_probs_BR


def _extend(params: Any, config: ModelConfig, asked: Asked, candidates: int, state: _State) -> _State:
    """Every row that has not stopped with one token more."""
    batch = state.lengths_B.shape[0]
    rows_B = jnp.arange(batch)
    own_BV = processors.within_vocabulary(state.logits_BV, asked.vocab_size)
    processed_BV = asked.processed(own_BV, state.tokens_BW, state.lengths_B, rows_B)
    probabilities_BC, tokens_BC = jax.lax.top_k(jax.nn.softmax(processed_BV, axis=-1), candidates)

    places_N = jnp.repeat(state.lengths_B, candidates)
    hidden_N1D, cache = forward.hidden(params, config, tokens_BC.reshape(-1, 1), places_N[:, None], state.cache)
    hidden_BCD = hidden_N1D.reshape(batch, candidates, -1)
    chosen_B = _choose(asked, state, probabilities_BC, _direction(hidden_BCD))
    token_B, hidden_BD = tokens_BC[rows_B, chosen_B], hidden_BCD[rows_B, chosen_B]

    alive_B = ~state.stopped_B
    place_B = jnp.where(alive_B, state.lengths_B, state.tokens_BW.shape[1])
    return _State(
        tokens_BW=put(state.tokens_BW, place_B, token_B),
        lengths_B=state.lengths_B + alive_B,
        stopped_B=state.stopped_B | (alive_B & asked.is_eos_V[token_B]),
        log_probs_BR=put(state.log_probs_BR, place_B - asked.lengths_B, log_probs_of(own_BV, token_B)),
        directions_BWD=put(state.directions_BWD, place_B, _direction(hidden_BD)),
        logits_BV=forward.logits(params, config, hidden_BD[:, None])[:, 0],
        cache=_share(cache, chosen_B, state.lengths_B, candidates),
        count=state.count + 1,
    )


def _direction(hidden_D: jax.Array) -> jax.Array:
    hidden_D = hidden_D.astype(jnp.float32)
    return hidden_D / jnp.linalg.norm(hidden_D, axis=-1, keepdims=True)


def _choose(asked: Asked, state: _State, probabilities_BC: jax.Array, directions_BCD: jax.Array) -> jax.Array:
    """[B]: number of the best candidate."""
    cosines_BCW = jnp.einsum("BCD,BWD->BCW", directions_BCD, state.directions_BWD, precision="highest")
    is_text_BW = jnp.arange(cosines_BCW.shape[-1]) < state.lengths_B[:, None]
    closest_BC = jnp.where(is_text_BW[:, None], cosines_BCW, -1).max(axis=-1)
    alpha = asked.numbers["penalty_alpha"]
    scores_BC = (1 - alpha) * probabilities_BC - alpha * closest_BC
    # What a processor rules out is no candidate, however unlike the text it is.
    return jnp.argmax(jnp.where(probabilities_BC > 0, scores_BC, -jnp.inf), axis=-1)


def _share(cache: Cache, chosen_B: jax.Array, places_B: jax.Array, candidates: int) -> Cache:
    """The chosen candidate's slot in all of its row's rows of the cache."""
    batch = chosen_B.shape[0]
    chosen_N = jnp.repeat(jnp.arange(batch) * candidates + chosen_B, candidates)
    places_N = jnp.repeat(places_B, candidates)
    rows_N = jnp.arange(batch * candidates)
    return jax.tree.map(lambda slots: slots.at[:, rows_N, places_N].set(slots[:, chosen_N, places_N]), cache)
