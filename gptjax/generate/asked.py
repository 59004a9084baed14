"""What beam search, contrastive search and speculative decoding are asked for, checked and padded."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from gptjax.config import ModelConfig, UserError
from gptjax.generate import decode, processors
from gptjax.generate.decode import Generated
from gptjax.generate.processors import History, Vocabulary
from gptjax.generate.settings import GenerationConfig

Prompts = Sequence[Sequence[int] | np.ndarray]


@struct.dataclass
class Asked:
    """One call's prompts and settings, all of it traced but the names."""

    prompts_BP: Any
    lengths_B: Any
    samples_B: Any
    seed: Any
    is_eos_V: Any
    vocab_size: Any
    max_new_tokens: Any
    greedy: Any
    values: processors.Values
    numbers: dict[str, Any]  # settings of this search alone
    names: tuple[str, ...] = struct.field(pytree_node=False)

    @property
    def limits_B(self) -> Any:
        """The length at which each row ends."""
        return self.lengths_B + self.max_new_tokens

    def processed(self, logits_NV: jax.Array, tokens_NW: jax.Array, lengths_N: jax.Array, rows_N: jax.Array) -> jax.Array:
        """`processors.process` for rows that continue the prompts `rows_N`."""
        history = History(tokens_NW, lengths_N, self.lengths_B[rows_N], self.limits_B[rows_N])
        return processors.process(self.names, self.values, logits_NV, history)

    def keys(self, samples_N: jax.Array, places_N: jax.Array, purpose: int) -> jax.Array:
        """[N] keys, of (seed, sample, place in the text, purpose) alone."""
        key = jax.random.fold_in(jax.random.key(self.seed), decode.SAMPLE)

        def one(sample: jax.Array, place: jax.Array) -> jax.Array:
            return jax.random.fold_in(jax.random.fold_in(jax.random.fold_in(key, sample), place), purpose)

        return jax.vmap(one)(samples_N, places_N)


def ask(
    config: ModelConfig,
    prompts: Prompts,
    settings: GenerationConfig,
    *,
    seed: int,
    eos_ids: Sequence[int],
    vocab_size: int,
    samples: Sequence[int] | None,
    search: str,
    numbers: dict[str, Any],
    min_tokens_to_keep: int = 1,
) -> Asked:
    """The request, prompts padded to their bucket. Raises `UserError` as `decode.generate_tokens` does, where a text would
    outgrow the context (`search` keeps one window, and does not begin another), and where max_length leaves rows different room.
    """
    decode.check_prompts(config, prompts, seed, vocab_size)
    lengths_B = np.array([len(prompt) for prompt in prompts], np.int32)
    longest = int(lengths_B.max())
    rooms = settings.limits(lengths_B) - lengths_B
    room = int(rooms.max())
    if (rooms != room).any():
        raise UserError(
            f"max_length={settings.max_length} leaves prompts of {lengths_B.min()} to {longest} tokens different room, which "
            f"{search} does not have; give max_new_tokens alone."
        )
    if longest + room > config.max_seq_len:
        raise UserError(
            f"a prompt of {longest} tokens and max_new_tokens={room} are more than "
            f"model.max_seq_len={config.max_seq_len}, past which {search} cannot go."
        )
    prompts_BP = np.zeros((len(prompts), min(decode.bucket(longest), config.max_seq_len)), np.int32)
    for row, prompt in zip(prompts_BP, prompts, strict=True):
        row[: len(prompt)] = prompt
    eos_ids = tuple(sorted(set(eos_ids)))
    names, values = processors.plan(settings, Vocabulary(vocab_size, eos_ids), min_tokens_to_keep)
    return Asked(
        prompts_BP,
        lengths_B,
        np.zeros(len(prompts), np.int32) if samples is None else np.asarray(samples, np.int32),
        seed=np.uint32(seed),
        is_eos_V=np.isin(np.arange(config.vocab_size), eos_ids),
        vocab_size=np.int32(vocab_size),
        max_new_tokens=np.int32(room),
        greedy=np.bool_(settings.greedy),
        values=values,
        numbers=numbers,
        names=names,
    )


def for_inference(config: ModelConfig) -> ModelConfig:
    """Without knobs of the backward pass, which must not ask for another compilation."""
    return dataclasses.replace(config, remat="none", attention="auto")


def log_probs_of(logits_NV: jax.Array, tokens_N: jax.Array) -> jax.Array:
    """[N] log-probabilities of one token a row."""
    chosen_N1 = jnp.take_along_axis(logits_NV, tokens_N[..., None], axis=-1)
    return chosen_N1[..., 0] - jax.nn.logsumexp(logits_NV, axis=-1)


def put(tokens_NW: jax.Array, places_N: jax.Array, values_N: jax.Array) -> jax.Array:
    """`tokens_NW` with one value a row at its place; places past the end are left out."""
    return tokens_NW.at[jnp.arange(tokens_NW.shape[0]), places_N].set(values_N, mode="drop")


def nothing(rows: int) -> Generated:
    """Empty continuations."""
    no = np.zeros(rows, bool)
    tokens, log_probs = np.zeros(0, np.int32), np.zeros(0, np.float32)
    return Generated(tokens=(tokens,) * rows, stopped=no, guided=no, log_probs=(log_probs,) * rows)
