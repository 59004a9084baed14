"""Beam search in one compiled call: with length penalty, sampled beams, and diverse groups.

A step extends every beam by every token, adds the token's log-probability (after the processors) to the beam's score, and keeps
the best: those that end join the finished ones, ranked by score / length ** length_penalty (Wu et al., 2016, in the form that
transformers has), and the best of the others go on. `early_stopping` as in transformers 5: a prompt is done when as many texts
as beams have finished and, with True, at once; with False, when the best open beam, were it to end now, would not be among them;
with "never", when no continuation of it could be (for length_penalty > 0 it is given the longest length).

Groups (Vijayakumar et al., 2016): each is a beam search of its own; at every step they choose one after the other, and a token's
score is lowered by diversity_penalty for each beam of an earlier group that has just taken it.

With do_sample, candidates are drawn without replacement in proportion to exp(score) by the largest of score + Gumbel noise
(Kool et al., 2019), from scores that processors have left renormalised (transformers' renormalize_logits).

The prompts go through the model once. After each step the rows of the cache are gathered by the beams' parents, a copy of the
cache that attention has just read.

Axis letters as in model/decoder.py, and P: padded prompt, W: prompt and continuation, G: groups, M: beams of a group,
J: candidates kept of each group, N = G * B * M rows of the cache.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from gptjax.config import ModelConfig, UserError
from gptjax.generate import decode, forward, processors, weights
from gptjax.generate.asked import Asked, Prompts, ask, for_inference, nothing
from gptjax.generate.decode import Generated
from gptjax.generate.settings import GenerationConfig
from gptjax.model.cache import Cache
from gptjax.parallel import hosts


@dataclasses.dataclass(frozen=True, kw_only=True)
class Searched(Generated):
    """The best `num_return_sequences` texts of each prompt, best first, prompt by prompt.

    Where fewer texts are possible (a tiny vocabulary, tokens ruled out) the rest are empty with a score of -inf.
    """

    scores: np.ndarray  # float32: sum of (processed) log-probabilities / number of new tokens ** length_penalty


class _Shape(NamedTuple):
    """What a compilation is for, beside the arrays' shapes."""

    groups: int
    beams: int  # of each group
    kept: int  # candidates that a step looks at, of each group
    returned: int
    sampled: bool
    room: int  # for new tokens


@struct.dataclass
class _Texts:
    """Beams [..., M], running or finished."""

    tokens_W: jax.Array
    log_probs_R: jax.Array  # the model's own, of each new token
    scores: jax.Array  # running: the sum; finished: over the length's power; -inf where there is no such text
    lengths: jax.Array  # new tokens

    def of(self, chosen: jax.Array) -> _Texts:
        """Those at `chosen` of axis 1, for arrays [B, M, ...]."""
        rows = jnp.arange(chosen.shape[0])[:, None]
        return jax.tree.map(lambda leaf: leaf[rows, chosen], self)


@struct.dataclass
class _State:
    running: _Texts  # [G, B, M]
    finished: _Texts  # [G, B, M]
    done_GB: jax.Array
    cache: Cache
    count: jax.Array  # new tokens so far


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
) -> Searched:
    """The best `settings.num_return_sequences` continuations of each prompt that `settings.num_beams` beams find.

    `samples`: one number a prompt (None: 0), which beams that are drawn depend on, with the seed and the token's place.
    Compiled once for each (config, prompts, bucket of the longest, bucket of `max_new_tokens`, beams, groups, rows returned,
    which processors are on), whatever the penalties and `early_stopping`.

    Raises `UserError` for settings that make no sense together, guides, `on_tokens`, and what decode.generate_tokens refuses.
    """
    _check(guides, on_tokens)
    if not prompts or settings.max_new_tokens == 0:
        rows = len(prompts) * settings.num_return_sequences
        return Searched(**vars(nothing(rows)), scores=np.zeros(rows, np.float32))
    early = settings.early_stopping
    numbers = {
        "length_penalty": np.float32(settings.length_penalty),
        "diversity_penalty": np.float32(settings.diversity_penalty),
        "at_once": np.bool_(early is True),
        # The length that an open beam's best score is judged by: as it is, or the longest where that flatters it most.
        "longest": np.bool_(early == "never" and settings.length_penalty > 0),
    }
    asked = ask(
        config,
        prompts,
        settings,
        seed=seed,
        eos_ids=eos_ids,
        vocab_size=vocab_size,
        samples=samples,
        search="beam search",
        numbers=numbers,
        # Beams go on from what does not end, so something has to.
        min_tokens_to_keep=len(set(eos_ids)) + 1,
    )
    beams = settings.num_beams // settings.num_beam_groups
    shape = _Shape(
        groups=settings.num_beam_groups,
        beams=beams,
        # Each beam has this many ends, so that as many beams can go on even if all ends are best.
        kept=min(beams * max(2, 1 + len(set(eos_ids))), beams * config.vocab_size),
        returned=settings.num_return_sequences,
        sampled=not settings.greedy,
        room=decode.bucket(settings.max_new_tokens),
    )
    best, stopped = hosts.fetch(compiled_search(params, asked, for_inference(config), shape))
    starts = np.repeat(asked.lengths_B, shape.returned)
    lengths = best.lengths.reshape(-1)
    return Searched(
        tokens=tuple(
            row[start : start + length]
            for row, start, length in zip(best.tokens_W.reshape(len(starts), -1), starts, lengths, strict=True)
        ),
        stopped=stopped.reshape(-1),
        guided=np.zeros(len(starts), bool),
        log_probs=tuple(row[:length] for row, length in zip(best.log_probs_R.reshape(len(starts), -1), lengths, strict=True)),
        scores=best.scores.reshape(-1),
    )


def _check(guides: tuple[Any, ...], on_tokens: Any) -> None:
    if guides:
        raise UserError(
            "beam search cannot follow a grammar, a pattern or stop strings: their states don't move with beams; set num_beams=1."
        )
    if on_tokens is not None:
        raise UserError("beam search cannot stream: which beam is best is known at the end only; set num_beams=1.")


@functools.partial(jax.jit, static_argnames=("config", "shape"))
def compiled_search(params: Any, asked: Asked, config: ModelConfig, shape: _Shape) -> tuple[_Texts, jax.Array]:
    """(the best texts [B, returned], whether each ends in eos [B, returned])."""
    batch, width = asked.prompts_BP.shape
    params = weights.prepare(params, config)
    places = (shape.groups, batch, shape.beams)
    cache = forward.empty_cache(params, config, batch, width + shape.room)
    _, cache = forward.prefill(params, config, asked.prompts_BP, asked.lengths_B, cache)
    rows_N = jnp.broadcast_to(jnp.arange(batch)[None, :, None], places).reshape(-1)
    tokens_BW = jnp.pad(asked.prompts_BP, ((0, 0), (0, shape.room)))
    texts = _Texts(
        jnp.broadcast_to(tokens_BW[None, :, None], (*places, width + shape.room)),
        jnp.zeros((*places, shape.room), jnp.float32),
        jnp.full(places, -jnp.inf),
        jnp.zeros(places, jnp.int32),
    )
    # All beams of a group are the prompt at first, and count once.
    running = dataclasses.replace(texts, scores=texts.scores.at[:, :, 0].set(0))
    state = _State(running, texts, jnp.zeros(places[:2], bool), jax.tree.map(lambda x: x[:, rows_N], cache), jnp.int32(0))

    # The last token of the prompt is fed once more: a step too many, for half the code to compile.
    def body(state: _State) -> _State:
        state, logits_NV = _advance(params, config, asked, state)
        state, parents_GBM = _select(asked, shape, state, logits_NV.reshape(*places, -1))
        return dataclasses.replace(state, cache=_follow(state.cache, parents_GBM))

    state = jax.lax.while_loop(lambda state: ~state.done_GB.all(), body, state)
    return _best(asked, state.finished, shape.returned)


def _advance(params: Any, config: ModelConfig, asked: Asked, state: _State) -> tuple[_State, jax.Array]:
    """Feeds each beam's last token; (state, logits [N, V] of the token after it)."""
    tokens_GBMW = state.running.tokens_W
    last_GBM = jnp.broadcast_to((asked.lengths_B + state.count - 1)[None, :, None], tokens_GBMW.shape[:3])
    fed_GBM = jnp.take_along_axis(tokens_GBMW, last_GBM[..., None], axis=-1)[..., 0]
    logits_NV, cache = forward.step(params, config, fed_GBM.reshape(-1), last_GBM.reshape(-1), state.cache)
    return dataclasses.replace(state, cache=cache), logits_NV


def _select(asked: Asked, shape: _Shape, state: _State, logits_GBMV: jax.Array) -> tuple[_State, jax.Array]:
    """One step of all groups, one after the other; (state, each new beam's parent [G, B, M] in its group)."""
    batch, vocab = logits_GBMV.shape[1], logits_GBMV.shape[-1]

    def group(taken_BV: jax.Array, part: tuple[Any, ...]) -> tuple[jax.Array, tuple[Any, ...]]:
        running, finished, done_B, logits_BMV = part
        log_probs_BMV, scores_BMV = _scores(asked, shape, running, taken_BV, logits_BMV, state.count)
        parents_BJ, tokens_BJ, scores_BJ = _candidates(asked, shape, scores_BMV, state.count)
        eos_BJ = asked.is_eos_V[tokens_BJ]
        extended = _extended(asked, running, parents_BJ, tokens_BJ, scores_BJ, log_probs_BMV, state.count)
        finished = _finish(asked, shape, finished, extended, eos_BJ, done_B, state.count)

        scores_BM, chosen_BM = jax.lax.top_k(jnp.where(eos_BJ, -jnp.inf, scores_BJ), shape.beams)
        running = dataclasses.replace(extended.of(chosen_BM), scores=scores_BM)
        takes_BM = jnp.where(~done_B[:, None] & (scores_BM > -jnp.inf), 1.0, 0.0)
        tokens_BM = jnp.take_along_axis(tokens_BJ, chosen_BM, axis=1)
        taken_BV = taken_BV.at[jnp.arange(batch)[:, None], tokens_BM].add(takes_BM)
        done_B = done_B | _is_done(asked, finished, scores_BM, state.count + 1)
        return taken_BV, (running, finished, done_B, jnp.take_along_axis(parents_BJ, chosen_BM, axis=1))

    parts = (state.running, state.finished, state.done_GB, logits_GBMV)
    _, (running, finished, done_GB, parents_GBM) = jax.lax.scan(group, jnp.zeros((batch, vocab)), parts)
    state = _State(running, finished, done_GB, state.cache, state.count + 1)
    return state, parents_GBM


def _scores(
    asked: Asked, shape: _Shape, running: _Texts, taken_BV: jax.Array, logits_BMV: jax.Array, count: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(the model's log-probabilities, the scores of the beams so extended), [B, M, V] both."""
    batch, beams, vocab = logits_BMV.shape
    rows_N = jnp.repeat(jnp.arange(batch), beams)
    log_probs_NV = jax.nn.log_softmax(processors.within_vocabulary(logits_BMV.reshape(-1, vocab), asked.vocab_size), axis=-1)
    scores_NV = log_probs_NV
    if shape.groups > 1:
        scores_NV = scores_NV - asked.numbers["diversity_penalty"] * taken_BV[rows_N]
    tokens_NW = running.tokens_W.reshape(len(rows_N), -1)
    scores_NV = asked.processed(scores_NV, tokens_NW, asked.lengths_B[rows_N] + count, rows_N)
    if shape.sampled:
        scores_NV = jax.nn.log_softmax(scores_NV, axis=-1)
    scores_BMV = running.scores[..., None] + scores_NV.reshape(logits_BMV.shape)
    return log_probs_NV.reshape(logits_BMV.shape), scores_BMV


def _candidates(asked: Asked, shape: _Shape, scores_BMV: jax.Array, count: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(parents, tokens, scores) of the candidates, [B, J] each, best or drawn first."""
    batch, beams, vocab = scores_BMV.shape
    scores_BC = scores_BMV.reshape(batch, beams * vocab)
    ranks_BC = scores_BC
    if shape.sampled:
        keys_B = asked.keys(asked.samples_B, asked.lengths_B + count, purpose=0)
        ranks_BC = scores_BC + jax.vmap(lambda key: jax.random.gumbel(key, (beams * vocab,)))(keys_B)
    _, chosen_BJ = jax.lax.top_k(ranks_BC, shape.kept)
    return chosen_BJ // vocab, chosen_BJ % vocab, jnp.take_along_axis(scores_BC, chosen_BJ, axis=1)


def _extended(
    asked: Asked,
    running: _Texts,
    parents_BJ: jax.Array,
    tokens_BJ: jax.Array,
    scores_BJ: jax.Array,
    log_probs_BMV: jax.Array,
    count: jax.Array,
) -> _Texts:
    """The candidates written out, [B, J]."""
    rows_B1, places_1J = jnp.arange(parents_BJ.shape[0])[:, None], jnp.arange(parents_BJ.shape[1])[None]
    parents = running.of(parents_BJ)
    added_BJ = log_probs_BMV[rows_B1, parents_BJ, tokens_BJ]
    return _Texts(
        parents.tokens_W.at[rows_B1, places_1J, (asked.lengths_B + count)[:, None]].set(tokens_BJ),
        parents.log_probs_R.at[:, :, count].set(added_BJ),
        scores_BJ,
        jnp.full_like(parents.lengths, count + 1),
    )


def _finish(
    asked: Asked, shape: _Shape, finished: _Texts, extended: _Texts, eos_BJ: jax.Array, done_B: jax.Array, count: jax.Array
) -> _Texts:
    """The best of the finished texts and of those that end now and are among the first `shape.beams` candidates."""
    ends_BM = (eos_BJ | (count + 1 == asked.max_new_tokens))[:, : shape.beams] & ~done_B[:, None]
    first = jax.tree.map(lambda leaf: leaf[:, : shape.beams], extended)
    scores_BM = first.scores / _power(asked, count + 1)
    first = dataclasses.replace(first, scores=jnp.where(ends_BM, scores_BM, -jnp.inf))
    both = jax.tree.map(lambda old, new: jnp.concatenate([old, new], axis=1), finished, first)
    return both.of(jax.lax.top_k(both.scores, shape.beams)[1])


def _power(asked: Asked, length: jax.Array) -> jax.Array:
    return length.astype(jnp.float32) ** asked.numbers["length_penalty"]


def _is_done(asked: Asked, finished: _Texts, scores_BM: jax.Array, length: jax.Array) -> jax.Array:
    """[B]: whether nothing more is to come, by `early_stopping`; `scores_BM`: of the open beams, best first."""
    worst_B = finished.scores.min(axis=-1)  # -inf until there are as many as beams
    best_B = scores_BM[:, 0] / _power(asked, jnp.where(asked.numbers["longest"], asked.max_new_tokens, length))
    enough_B = (worst_B > -jnp.inf) & (asked.numbers["at_once"] | (best_B <= worst_B))
    return enough_B | (scores_BM[:, 0] == -jnp.inf) | (length == asked.max_new_tokens)


def _follow(cache: Cache, parents_GBM: jax.Array) -> Cache:
    """The cache with each beam's row taken over from its parent."""
    groups, batch, beams = parents_GBM.shape
    first_GB1 = beams * jnp.arange(groups * batch).reshape(groups, batch, 1)
    rows_N = (first_GB1 + parents_GBM).reshape(-1)
    # All slots: moving those of new tokens alone, in place, would read less, but XLA's CPU backend (jaxlib 0.10.2) makes one loop
    # of such a gather and update, which reads rows that it has just overwritten.
    return jax.tree.map(lambda slots: slots[:, rows_N], cache)


def _best(asked: Asked, finished: _Texts, returned: int) -> tuple[_Texts, jax.Array]:
    """Of all groups."""

    def together(leaf: jax.Array) -> jax.Array:
        leaf = jnp.moveaxis(leaf, 0, 1)
        return leaf.reshape(leaf.shape[0], -1, *leaf.shape[3:])

    texts = jax.tree.map(together, finished)
    best = texts.of(jax.lax.top_k(texts.scores, returned)[1])
    lengths = jnp.where(best.scores > -jnp.inf, best.lengths, 0)
    last = asked.lengths_B[:, None] + jnp.maximum(lengths, 1) - 1
    ends = jnp.take_along_axis(best.tokens_W, last[..., None], axis=-1)[..., 0]
    return dataclasses.replace(best, lengths=lengths), asked.is_eos_V[ends] & (lengths > 0)
