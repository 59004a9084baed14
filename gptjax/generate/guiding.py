"""Guides of decoding: rows that end with a stop string, and rows that are held to a language, inside the compiled call."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from gptjax.config import UserError
from gptjax.generate.automata import Constraint, TokenAutomaton
from gptjax.generate.processors import History
from gptjax.generate.stops import StopStrings, StopTables


@struct.dataclass
class StopGuide:
    """Allows everything; stops each row where a stop string is complete."""

    tables: StopTables
    state_B: Any

    def allowed(self, logits_BV: jax.Array, history: History, left_B: jax.Array) -> jax.Array:
        return logits_BV

    def advanced(self, tokens_B: jax.Array, alive_B: jax.Array) -> StopGuide:
        state_B = jnp.where(alive_B, self.tables.advance(self.state_B, tokens_B), self.state_B)
        return self.replace(state_B=state_B)  # type: ignore[attr-defined]

    def stopped(self) -> jax.Array:
        return self.tables.stopped(self.state_B)


def stop_guides(tokenizer: Any, stop_strings: tuple[str, ...], rows: int, vocab_size: int) -> tuple[StopGuide, ...]:
    """The guide for `rows` rows of a model of `vocab_size` ids; none without stop strings.

    None either where the pieces have no bytes of their own: such rows go on, and their text is cut when they have ended.
    """
    if not stop_strings:
        return ()
    try:
        vocabulary = tokenizer.vocabulary()
    except UserError:
        return ()
    tables = StopStrings(stop_strings).tables(vocabulary, vocab_size)
    return (StopGuide(tables, np.zeros(rows, np.int32)),)


@struct.dataclass
class LanguageGuide:
    """Rules out what leads out of a language; ends each row whose text is whole and which nothing but its end may follow."""

    tables: Constraint
    state_B: Any

    def allowed(self, logits_BV: jax.Array, history: History, left_B: jax.Array) -> jax.Array:
        return self.tables.allowed(logits_BV, self.state_B, left_B)

    def advanced(self, tokens_B: jax.Array, alive_B: jax.Array) -> LanguageGuide:
        state_B = jnp.where(alive_B, self.tables.advance(self.state_B, tokens_B), self.state_B)
        return self.replace(state_B=state_B)  # type: ignore[attr-defined]

    def stopped(self) -> jax.Array:
        return self.tables.finished(self.state_B)


def language_guides(language: TokenAutomaton | None, rows: int, max_new_tokens: int) -> tuple[LanguageGuide, ...]:
    """The guide for `rows` rows; none without a language.

    Raises `UserError` where no text of the language is short enough, and where the empty one is the only one.
    """
    if language is None:
        return ()
    language.check_room(max_new_tokens)
    if language.finished_S[0]:
        raise UserError("the constraint allows the empty text alone, which leaves nothing to generate.")
    return (LanguageGuide(language.constraint(), np.zeros(rows, np.int32)),)
