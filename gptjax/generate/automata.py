"""Texts held to a language: an automaton over bytes becomes one over tokens, and a compiled loop rules out what leads astray.

A token moves an automaton as its bytes do one by one, so it is a function from states to states, and most tokens of a
vocabulary are the same function: every letter inside a string, everything that can stand nowhere. `token_columns` finds the
distinct functions by walking all tokens byte class by byte class and sharing equal results; a table [states, distinct
functions] of some megabytes then says what a table [states, V] of gigabytes would (Willard and Louf, 2023, keep the latter as
lists).

In the tables a state is kept only where some sequence of the vocabulary's tokens still ends in an accepting one, so a row never
runs into a corner. Each state knows the fewest tokens to an accepting one, which holds an answer valid when its length is
limited.

Axis letters: B rows, V ids of the model, S states, C distinct columns.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from gptjax.config import UserError
from gptjax.data.tokenizers import Tokenizer
from gptjax.generate.json_schema import schema_pattern
from gptjax.generate.patterns import FAR, ByteAutomaton, compile_pattern, distances, edges_of
from gptjax.generate.regex import parse_regex

Vocabulary = Sequence[bytes | None]

MAX_ENTRIES = 2**25  # of a table: 134 MB of int32
SMALLEST_BUCKET = 64


def bucket(size: int) -> int:
    """The power of two, at least 64, that a table's side is padded to; tables of one bucket share a compilation."""
    return max(SMALLEST_BUCKET, 1 << (size - 1).bit_length())


# --- on the host ------------------------------------------------------------------------------------------------------


def token_columns(
    next_state: np.ndarray, classes: np.ndarray, vocabulary: Vocabulary, vocab_size: int, *, silent: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """(columns [C, S] int32, column of each id [V]): where each id's bytes lead from each state; -1 is nowhere.

    `next_state` [S, byte classes] with -1, `classes` [256]. `silent` [S]: the column of special ids, of those without bytes, and
    of those up to `vocab_size` that the vocabulary lacks. Raises `UserError` where the columns would exceed `MAX_ENTRIES`.
    """
    states = len(next_state)
    # One row more, so that nowhere leads nowhere.
    steps = [np.append(column, -1).astype(np.int32) for column in next_state.T]
    translation = classes.astype(np.uint8).tobytes()
    columns = [np.append(np.arange(states), -1).astype(np.int32)]  # of no bytes yet
    numbers = {columns[0].tobytes(): 0}
    walked: dict[int, int] = {}  # column number * byte classes + byte class, to the column behind that byte
    of_sequence: dict[bytes, int] = {}
    found = np.full(vocab_size, -1)
    for i, piece in enumerate(vocabulary[:vocab_size]):
        if not piece:
            continue
        sequence = piece.translate(translation)
        if sequence not in of_sequence:
            at = 0
            for byte in sequence:
                step = at * len(steps) + byte
                if step not in walked:
                    column = steps[byte][columns[at]]
                    walked[step] = number = numbers.setdefault(column.tobytes(), len(columns))
                    if number == len(columns):
                        columns.append(column)
                        _check_size(states, len(columns))
                at = walked[step]
            of_sequence[sequence] = at
        found[i] = of_sequence[sequence]
    used, classes_V = np.unique(np.append(found, -1), return_inverse=True)
    table = np.stack([silent, *(columns[number][:-1] for number in used[1:])]).astype(np.int32)
    return table, classes_V.reshape(-1)[:-1].astype(np.int32)


def _check_size(states: int, columns: int) -> None:
    if states * columns > MAX_ENTRIES:
        raise UserError(
            f"the pattern's {states} states with the tokenizer's vocabulary need a table of more than {MAX_ENTRIES} entries; "
            "bound its repetitions by smaller numbers."
        )


@dataclass(frozen=True, eq=False)
class TokenAutomaton:
    """Accepts token sequences whose bytes are a text of the language. It begins in state 0.

    An end-of-text id leads from each accepting state to itself, and from no other anywhere.
    """

    classes_V: np.ndarray  # int32: id to its column
    next_SC: np.ndarray  # int32, -1 where the id may not follow
    accepting_S: np.ndarray  # bool
    distance_S: np.ndarray  # int32: the fewest further tokens to an accepting state
    finished_S: np.ndarray  # bool: accepting, and nothing but the end of the text may follow

    @property
    def num_states(self) -> int:
        return len(self.accepting_S)

    def dense(self) -> np.ndarray:
        """[S, V] int32: the next state, -1 where the id may not follow."""
        return self.next_SC[:, self.classes_V]

    def state_after(self, tokens: Sequence[int] | np.ndarray, state: int = 0) -> int:
        """The state behind the tokens; -1 where they leave the language."""
        for token in tokens:
            state = int(self.next_SC[state, self.classes_V[token]])
            if state < 0:
                return -1
        return state

    def check_room(self, max_new_tokens: int) -> None:
        """Raises `UserError` where no text of the language is short enough."""
        if self.distance_S[0] > max_new_tokens:
            raise UserError(
                f"the shortest text that the constraint allows takes {self.distance_S[0]} tokens, "
                f"more than max_new_tokens={max_new_tokens}."
            )

    def constraint(self) -> Constraint:
        """The tables padded to their buckets."""
        next_SC, dead = padded(self.next_SC)
        distance_S = np.full(dead + 1, FAR, np.int32)
        distance_S[: self.num_states] = self.distance_S
        finished_S = np.zeros(dead + 1, bool)
        finished_S[: self.num_states] = self.finished_S
        return Constraint(self.classes_V, next_SC, distance_S, finished_S)


def padded(next_SC: np.ndarray) -> tuple[np.ndarray, int]:
    """(the table with both sides padded to their buckets, its last state, to which -1 leads and from which nothing does)."""
    states, columns = next_SC.shape
    dead = bucket(states + 1) - 1
    table = np.full((dead + 1, bucket(columns)), dead, np.int32)
    table[:states, :columns] = np.where(next_SC < 0, dead, next_SC)
    return table, dead


def token_automaton(
    automaton: ByteAutomaton, vocabulary: Vocabulary, vocab_size: int, eos_ids: Sequence[int] = ()
) -> TokenAutomaton:
    """The token sequences whose bytes the automaton accepts.

    `vocabulary`: the bytes of each id, None for a special one, which never stands inside a text. `vocab_size`: the model's; its
    ids beyond the tokenizer's are never allowed, and the tokenizer's beyond the model's are not there. `eos_ids` end a text.
    Raises `UserError` where no sequence of these tokens is in the language, and for too large a table.
    """
    pieces = [None if i in eos_ids else piece for i, piece in enumerate(vocabulary[:vocab_size])]
    # An id without bytes would let a text stand still for ever.
    silent = np.full(automaton.num_states, -1)
    columns_CS, classes_V = token_columns(automaton.next_state, automaton.classes, pieces, vocab_size, silent=silent)
    next_SC = columns_CS.T
    sources, targets = edges_of(next_SC)
    distance_S = distances(sources, targets, automaton.accepting)
    if distance_S[0] == FAR:
        raise UserError(f"no sequence of the tokenizer's {len(pieces)} ids writes a text that the constraint allows.")
    kept = np.flatnonzero(_reachable(next_SC) & (distance_S < FAR))
    number = np.full(len(distance_S) + 1, -1, np.int32)
    number[kept] = np.arange(len(kept))
    next_SC = number[next_SC[kept]]  # -1 picks the last, which is -1
    accepting_S = automaton.accepting[kept]
    finished_S = accepting_S & (next_SC < 0).all(1)
    if len(eos_ids):
        end = np.where(accepting_S, np.arange(len(kept)), -1).astype(np.int32)
        classes_V[np.asarray(eos_ids)] = next_SC.shape[1]
        next_SC = np.concatenate([next_SC, end[:, None]], axis=1)
    # Columns may have become equal where states have gone.
    next_SC, inverse = np.unique(next_SC, axis=1, return_inverse=True)
    return TokenAutomaton(inverse.reshape(-1)[classes_V].astype(np.int32), next_SC, accepting_S, distance_S[kept], finished_S)


def _reachable(next_SC: np.ndarray) -> np.ndarray:
    """[S] bool: the states that some sequence of tokens leads to from state 0."""
    seen = np.zeros(len(next_SC), bool)
    seen[0] = True
    new = np.array([0])
    while new.size:
        targets = np.unique(next_SC[new])
        new = targets[(targets >= 0) & ~seen[targets]]
        seen[new] = True
    return seen


def regex_automaton(
    expression: str, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int] | None = None
) -> TokenAutomaton:
    """Texts that the whole regular expression matches (`regex.py` says what may be written); `vocab_size` is the model's,
    `eos_ids` end a text (None: the tokenizer's).
    """
    return _of_tokenizer(compile_pattern(parse_regex(expression)), tokenizer, vocab_size, eos_ids)


def schema_automaton(
    schema: object, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int] | None = None
) -> TokenAutomaton:
    """JSON texts that are valid under the schema (`json_schema.py` says which are read); the rest as `regex_automaton`."""
    return _of_tokenizer(compile_pattern(schema_pattern(schema)), tokenizer, vocab_size, eos_ids)


def _of_tokenizer(
    automaton: ByteAutomaton, tokenizer: Tokenizer, vocab_size: int, eos_ids: Sequence[int] | None
) -> TokenAutomaton:
    ends = (tokenizer.eos_id,) if eos_ids is None else eos_ids
    return token_automaton(automaton, tokenizer.vocabulary(), vocab_size, [i for i in ends if i is not None and i < vocab_size])


def joined_bytes(vocabulary: Vocabulary, tokens: Sequence[int] | np.ndarray) -> bytes:
    """The bytes that the tokens write, special ids and ids that the tokenizer lacks left out.

    Unlike `decode` it takes no space off the front, so it gives the text that the constraint was held to.
    """
    return b"".join(vocabulary[token] or b"" for token in tokens if token < len(vocabulary))


# --- in a compiled call -----------------------------------------------------------------------------------------------


@struct.dataclass
class Constraint:
    """The tables of a `TokenAutomaton`, for use inside jit; the state of each row [B] int32 is the caller's to carry.

    The rows of a batch share the tables. Only the tables' buckets are shapes: patterns of like size share a compilation.
    """

    classes_V: jax.Array | np.ndarray
    next_SC: jax.Array | np.ndarray
    distance_S: jax.Array | np.ndarray
    finished_S: jax.Array | np.ndarray

    def begin(self, batch: int) -> jax.Array:
        """[B] int32: the states of rows that have written nothing."""
        return jnp.zeros(batch, jnp.int32)

    def allowed(self, logits_BV: jax.Array, state_B: jax.Array, left: jax.Array | int = FAR) -> jax.Array:
        """The logits, -inf for ids that the language does not allow next.

        `left`: how many tokens may still be drawn, this one included; [B] or one for all. Ids behind which the text could not
        be brought to an end in the rest are ruled out too, so a text cut off by the limit is whole. In a `finished` row without
        an end-of-text id nothing is allowed: such a row is stopped before it draws.
        """
        next_BC = jnp.asarray(self.next_SC)[state_B]
        left_B1 = jnp.broadcast_to(jnp.asarray(left), state_B.shape)[:, None]
        allowed_BC = jnp.asarray(self.distance_S)[next_BC] < left_B1
        return jnp.where(jnp.take(allowed_BC, jnp.asarray(self.classes_V), axis=1), logits_BV, -jnp.inf)

    def advance(self, state_B: jax.Array, token_B: jax.Array) -> jax.Array:
        """The states behind one more token a row."""
        return jnp.asarray(self.next_SC)[state_B, jnp.asarray(self.classes_V)[token_B]]

    def finished(self, state_B: jax.Array) -> jax.Array:
        """[B] bool: the text is whole and nothing but its end may follow."""
        return jnp.asarray(self.finished_S)[state_B]
