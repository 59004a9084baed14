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


@functools.partial(jax.jit, static_argnames=("batch", "steps", "eos_id"))
def random_answers(constraint, seed, limit, *, batch, steps, eos_id):
    """(tokens [batch, steps], how many of them each row drew, whether it ended by itself): at most `limit` of random logits."""

    def step(carry, i):
        state_B, length_B, stopped_B = carry
        keys = jax.random.split(jax.random.fold_in(jax.random.key(seed), i))
        logits_BV = 3 * jax.random.normal(keys[0], (batch, MODEL_VOCAB))
        token_B = jax.random.categorical(keys[1], constraint.allowed(logits_BV, state_B, limit - i))
        live_B = ~stopped_B & (i < limit)
        state_B = jnp.where(live_B, constraint.advance(state_B, token_B), state_B)
        ended_B = (token_B == eos_id) if eos_id is not None else constraint.finished(state_B)
        return (state_B, length_B + live_B, stopped_B | (live_B & ended_B)), token_B

    # Where nothing at all may be written, a row without an end of text has stopped before it begins.
    begin_B = constraint.begin(batch)
    stopped_B = constraint.finished(begin_B) & (eos_id is None)
    carry = (begin_B, jnp.zeros(batch, jnp.int32), stopped_B)
    (_, length_B, stopped_B), tokens_TB = jax.lax.scan(step, carry, jnp.arange(steps))
    return tokens_TB.T, length_B, stopped_B


def random_texts(automaton, seed, limit, *, batch=1000, steps=48, eos_id=EOS):
    """The bytes of `batch` answers; eos ends a text and stands nowhere else."""
    tokens, lengths, stopped = (
        np.asarray(x)
        for x in random_answers(automaton.constraint(), np.uint32(seed), np.int32(limit), batch=batch, steps=steps, eos_id=eos_id)
    )
    assert (stopped | (lengths == limit)).all()
    rows = [row[:length] for row, length in zip(tokens, lengths, strict=True)]
    if eos_id is not None:
        assert all(eos_id not in row[:-1] and (row[-1] == eos_id) == end for row, end in zip(rows, stopped, strict=True))
        rows = [row[:-1] if end else row for row, end in zip(rows, stopped, strict=True)]
    return [b"".join(VOCABULARY[token] for token in row) for row in rows]
