"""Hearing on the host, step by step, what a compiled call draws."""

from __future__ import annotations

import contextlib
import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.experimental import io_callback

from gptjax.parallel.sharding import constrain

# Called once a step: (the tokens drawn [B] int32, the rows that drew one [B] bool).
OnTokens = Callable[[np.ndarray, np.ndarray], None]


class Listener:
    """Hears the steps of one call. What its function raises is kept, since nothing may be raised through a compiled call."""

    def __init__(self, number: int, on_tokens: OnTokens | None):
        self.number = number
        self._on_tokens = on_tokens
        self._raised: BaseException | None = None

    def hear(self, tokens_B: np.ndarray, alive_B: np.ndarray) -> bool:
        """Whether to go on."""
        if self._raised is None and self._on_tokens is not None:
            try:
                self._on_tokens(tokens_B, alive_B)
            except BaseException as error:
                self._raised = error
        return self._raised is None

    def wait(self, result: Any) -> Any:
        """`result` once it is there. Raises what the function raised, or what arrived meanwhile, when the call has ended."""
        if self._on_tokens is None:
            return result
        while not all(leaf.is_ready() for leaf in jax.tree.leaves(result)):
            try:
                time.sleep(0.002)  # blocking on an array would leave Ctrl-C waiting for its end
            except BaseException as error:
                self._raised = self._raised or error
        if self._raised is not None:
            raise self._raised
        return result


# By number, which is traced: another function is no other compilation.
_listeners: dict[int, Listener] = {}
_numbers = itertools.count(1)


@contextlib.contextmanager
def listening(on_tokens: OnTokens | None) -> Iterator[Listener]:
    listener = Listener(next(_numbers) % 2**31, on_tokens)
    _listeners[listener.number] = listener
    try:
        yield listener
    finally:
        del _listeners[listener.number]


def tell(number: jax.Array, tokens_B: jax.Array, alive_B: jax.Array) -> jax.Array:
    """Tells listener `number` of a step; a scalar bool: whether to go on.

    The loop needs the answer before its next step, which keeps the calls in order on any mesh.
    """
    answer = jax.ShapeDtypeStruct((), np.bool_)
    return io_callback(_hear, answer, number, constrain(tokens_B, None), constrain(alive_B, None))


def _hear(number: Any, tokens_B: Any, alive_B: Any) -> np.bool_:
    listener = _listeners.get(int(number))
    return np.bool_(listener is not None and listener.hear(np.asarray(tokens_B), np.asarray(alive_B)))
