"""Gaps in a text, filled by models that were trained to: masked tokens, and spans behind sentinels."""

from __future__ import annotations

import functools
import re
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.adapters.compose import hidden_of_texts
from gptjax.config import Config, UserError
from gptjax.config.adapter import context_of, describe_context
from gptjax.config.objective import Part, parts
from gptjax.data.reserved import special_ids
from gptjax.generate.settings import GenerationConfig
from gptjax.generate.text import generate_text
from gptjax.model.decoder import logits, output_table
from gptjax.model.kernels import Kernel


@dataclass(frozen=True)
class Filled:
    """A text without its gaps."""

    text: str
    gaps: tuple[str, ...]  # what stands in each of them
    log_probs: tuple[float, ...]  # of each gap, all its tokens together


def has_gaps(model: Any, text: str) -> bool:
    """Whether the text has gaps of the kind that the model fills."""
    names = _masks(model) if model.config.objective.name == "masked" else _sentinel_names(model)
    return any(name in text for name in names)


def fill(model: Any, text: str, *, seed: int = 0, **settings: Any) -> Filled:
    """The text with its gaps filled: `[MASK]` by a masked model, each by the one token that is most likely there; `<extra_id_0>`,
    `<extra_id_1>`, ... by a model trained on spans, drawn as `settings` (fields of `GenerationConfig`) say.

    Raises `UserError` where the model was trained for neither, or the text has no gap.
    """
    fills = {part.method for part in parts(model.config.objective)}
    if not fills & {"masked", "span"}:
        raise UserError(f"a model trained with objective.name={model.config.objective.name} fills no marked gaps.")
    if not has_gaps(model, text):
        raise UserError(
            f"the text has no gap: it has none of {', '.join(_masks(model)) if 'masked' in fills else '<extra_id_0>'}."
        )
    if "masked" in fills:
        return _fill_masks(model, text)
    return _fill_spans(model, text, GenerationConfig(**settings), seed)


def _masks(model: Any) -> list[str]:
    ids = special_ids(model.tokenizer, model.config.objective, model.config.data.seq_len)
    return [name for name, i in model.tokenizer.special_tokens().items() if i == ids.mask]


def _sentinel_names(model: Any) -> list[str]:
    return [name for name in model.tokenizer.special_tokens() if re.fullmatch(r"<extra_id_\d+>", name)]


def _ids(model: Any, text: str) -> np.ndarray:
    """Those of a document as training shows it."""
    data, tokenizer = model.config.data, model.tokenizer
    before = [tokenizer.bos_id] if data.add_bos and tokenizer.bos_id is not None else []
    after = [tokenizer.eos_id] if data.add_eos and tokenizer.eos_id is not None else []
    ids = np.concatenate([before, tokenizer.encode_special(text), after]).astype(np.int32)
    if len(ids) > context_of(model.config):
        raise UserError(f"the text has {len(ids)} tokens, more than {describe_context(model.config)}.")
    return ids


def _fill_masks(model: Any, text: str) -> Filled:
    config, tokenizer = model.config, model.tokenizer
    if isinstance(output_table(model.params, config.model), Kernel):
        raise UserError("masks are filled with a model's own weights, not with those stored for generation.")
    ids = _ids(model, text)
    mask = special_ids(tokenizer, config.objective, config.data.seq_len).mask
    width = min(max(16, 1 << (len(ids) - 1).bit_length()), context_of(config))
    row = np.pad(ids, (0, width - len(ids)))[None]
    is_text = np.zeros(config.model.vocab_size, bool)
    is_text[np.flatnonzero(tokenizer.token_bytes())] = True
    log_probs_TV = np.asarray(_predictions(model.params, config, row, np.arange(width)[None] < len(ids), is_text))
    places = np.flatnonzero(ids == mask)
    best = log_probs_TV[places].argmax(-1)
    ids[places] = best
    gaps = tuple(tokenizer.decode([i]) for i in best)
    return Filled(tokenizer.decode(ids), gaps, tuple(log_probs_TV[places, best].tolist()))


@functools.partial(jax.jit, static_argnames="config")
def _predictions(params: Any, config: Config, tokens_1T: Any, real_1T: Any, is_text_V: Any) -> jax.Array:
    """Log-probabilities [T, V] of text at each place; places that are not real are seen by none."""
    hidden_1TD = hidden_of_texts(config, params, tokens_1T, real_1T)
    scores_TV = logits(hidden_1TD, output_table(params, config.model), config.model)[0]
    return jax.nn.log_softmax(jnp.where(is_text_V, scores_TV, -jnp.inf))


def _fill_spans(model: Any, text: str, settings: GenerationConfig, seed: int) -> Filled:
    config, tokenizer = model.config, model.tokenizer
    sentinels = special_ids(tokenizer, config.objective, config.data.seq_len).sentinels
    part: Part = next(part for part in parts(config.objective) if part.method == "span")
    ids = _ids(model, text)
    marks = ids[np.isin(ids, sentinels)]
    if marks.tolist() != list(sentinels[: len(marks)]) or len(marks) >= len(sentinels):
        raise UserError(
            "gaps are marked <extra_id_0>, <extra_id_1> and so on, each once and in this order, "
            f"at most {len(sentinels) - 1} of them."
        )
    token = tokenizer.token_id(part.token) if part.token else None
    prompt = np.concatenate([[] if token is None else [token], ids]).astype(np.int32)
    settings = settings.replace(eos_token_id=(sentinels[len(marks)],))  # ends the last span
    options: dict[str, Any] = {"seed": seed, "texts": [text], "both_ways": True}
    (found,) = generate_text(model.decoding_params, config, tokenizer, [prompt], settings, **options)
    spans: dict[int, list[int]] = {int(mark): [] for mark in marks}
    chances = dict.fromkeys(spans, 0.0)
    here: int | None = None
    for drawn, log_prob in zip(found.tokens, found.log_probs, strict=True):
        if drawn in sentinels:
            here = drawn if drawn in spans and not spans[drawn] else None
        elif here is not None:
            spans[here].append(drawn)
            chances[here] += log_prob
    whole = [i for number in ids.tolist() for i in spans.get(number, [number])]
    return Filled(tokenizer.decode(whole), tuple(tokenizer.decode(span) for span in spans.values()), tuple(chances.values()))
