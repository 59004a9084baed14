"""Text in, text out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from gptjax.config import Config, UserError
from gptjax.generate.decode import generate_tokens
from gptjax.generate.settings import GenerationConfig


class Tokenizer(Protocol):
    """What generation needs of a tokenizer."""

    vocab_size: int
    bos_id: int | None
    eos_id: int | None

    def encode(self, text: str) -> np.ndarray: ...

    def decode(self, ids: Any) -> str: ...


@dataclass(frozen=True)
class Completion:
    """One sample of one prompt."""

    prompt: str
    sample: int  # 0 .. num_return_sequences - 1
    text: str  # the continuation, without the prompt and without the end-of-text token
    tokens: tuple[int, ...]  # the new tokens, the end-of-text token included
    finish_reason: str  # 'eos': it ended by itself; 'length': max_new_tokens were drawn


def generate_text(
    params: Any,
    config: Config,
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    settings: GenerationConfig,
    *,
    seed: int = 0,
) -> list[Completion]:
    """`settings.num_return_sequences` continuations of each prompt, prompt by prompt, drawn in one compiled call.

    A prompt begins with the begin-of-text token where `data.add_bos` is set and the tokenizer has one, as training documents do.
    Sample i of a prompt is the same whatever other prompts and however many samples are asked for.
    Raises `UserError` for a prompt that is too long or, without a begin-of-text token, empty.
    """
    ids = [_encode(config, tokenizer, prompt) for prompt in prompts]
    requests = [(prompt, sample) for prompt in range(len(prompts)) for sample in range(settings.num_return_sequences)]
    generated = generate_tokens(
        params,
        config.model,
        [ids[prompt] for prompt, _ in requests],
        settings=settings,
        seed=seed,
        eos_ids=settings.eos_ids(tokenizer.eos_id),
        vocab_size=tokenizer.vocab_size,
        samples=[sample for _, sample in requests],
    )
    return [
        Completion(
            prompt=prompts[prompt],
            sample=sample,
            text=_continuation(tokenizer, ids[prompt], new[:-1] if stopped else new),
            tokens=tuple(int(token) for token in new),
            finish_reason="eos" if stopped else "length",
        )
        for (prompt, sample), new, stopped in zip(requests, generated.tokens, generated.stopped, strict=True)
    ]


def _encode(config: Config, tokenizer: Tokenizer, prompt: str) -> np.ndarray:
    ids = np.asarray(tokenizer.encode(prompt), np.int32)
    if config.data.add_bos and tokenizer.bos_id is not None:
        return np.concatenate([np.array([tokenizer.bos_id], np.int32), ids])
    if len(ids) == 0:
        raise UserError(
            "the prompt is empty, and there is no begin-of-text token to start from; give a prompt of at least one character."
        )
    return ids


def _continuation(tokenizer: Tokenizer, prompt_ids: np.ndarray, new_ids: np.ndarray) -> str:
    """The text that the new tokens add, decoded behind the prompt: some tokenizers strip the space in front of a text."""
    before = tokenizer.decode(prompt_ids)
    whole = tokenizer.decode(np.concatenate([prompt_ids, new_ids]))
    return whole[len(before) :] if whole.startswith(before) else tokenizer.decode(new_ids)
