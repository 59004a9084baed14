"""A small vocabulary with everything that a large one has, and answers of a model whose logits are random numbers."""

import functools

import jax
import jax.numpy as jnp
import numpy as np

# Single bytes; words and JSON; characters whole and split at every place, also over the ends of others; nothing; a special id.
_PIECES = [
    '{"',
    '": ',
    '", "',
    '"}',
    "[",
    "]}",
    "true",
    " null",
    "12",
    "-3",
    "0",
    " the",
    "ab",
    "abc",
    "  ",
    "\\n",
    '\\"',
    "é",
    "中",
]
_SPLIT = [b"\xe4\xb8", b"\xb8\xad", b"\xad\xe4", b"\x9f\xa6\x99", b"\xf0\x9f", b"\xa6\x99a", b"\xa9", b"a\xc3", b'\xc3"', b"\xff"]
VOCABULARY: list[bytes | None] = [
    *(bytes([byte]) for byte in range(256)),
    *(piece.encode() for piece in _PIECES),
    *_SPLIT,
    b"",
    None,
    None,
]
EOS = len(VOCABULARY) - 1
MODEL_VOCAB = 320  # more than the tokenizer's: rows of padding


@functools.partial(jax.jit, static_argnames=("batch", "room", "eos_id"))
def random_answers(constraint, seed, limit, *, batch, room, eos_id):
    """(tokens [batch, room], how many of them each row drew, whether it ended by itself): at most `limit` of random logits."""

    def step(state):
        i, tokens_BT, state_B, length_B, stopped_B = state
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), i))
        logits_BV = jnp.broadcast_to(3 * jax.random.normal(keys[0], (MODEL_VOCAB,)), (batch, MODEL_VOCAB))
        token_B = jax.random.categorical(keys[1], constraint.allowed(logits_BV, state_B, limit - i))
        state_B = jnp.where(stopped_B, state_B, constraint.advance(state_B, token_B))
        ended_B = (token_B == eos_id) if eos_id is not None else constraint.finished(state_B)
        return i + 1, tokens_BT.at[:, i].set(token_B), state_B, length_B + ~stopped_B, stopped_B | ended_B

    begin_B = constraint.begin(batch)
    # Where nothing at all may be written, a row without an end of text has stopped before it begins.
    stopped_B = constraint.finished(begin_B) & (eos_id is None)
    state = (0, jnp.zeros((batch, room), jnp.int32), begin_B, jnp.zeros(batch, jnp.int32), stopped_B)
    _, tokens_BT, _, length_B, stopped_B = jax.lax.while_loop(lambda state: (state[0] < limit) & ~state[-1].all(), step, state)
    return tokens_BT, length_B, stopped_B


def random_texts(automaton, seed, limit, *, batch=1000, room=40, eos_id=EOS):
    """The bytes of `batch` answers; eos ends a text and stands nowhere else."""
    tokens, lengths, stopped = (
        np.asarray(x)
        for x in random_answers(automaton.constraint(), np.uint32(seed), np.int32(limit), batch=batch, room=room, eos_id=eos_id)
    )
    assert (stopped | (lengths == limit)).all()
    rows = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
    if eos_id is not None:
        assert all(eos_id not in row[:-1] and (row[-1] == eos_id) == end for row, end in zip(rows, stopped, strict=True))
        rows = [row[:-1] if end else row for row, end in zip(rows, stopped, strict=True)]
    return [b"".join(VOCABULARY[token] for token in row) for row in rows]
