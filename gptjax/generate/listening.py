"""Hearing on the host, step by step, what a compiled call draws."""

from __future__ import annotations

import contextlib
import itertools
import os
import signal
import threading
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

    def __init__(self, number: int, on_tokens: OnTokens | None, interrupted: Callable[[], bool]):
        self.number = number
        self._on_tokens = on_tokens
        self._interrupted = interrupted
        self._raised: BaseException | None = None

    def hear(self, tokens_B: np.ndarray, alive_B: np.ndarray) -> bool:
        """Whether to go on."""
        if self._raised is None and self._on_tokens is not None:
            try:
                self._on_tokens(tokens_B, alive_B)
                if self._interrupted():
                    self._raised = KeyboardInterrupt()
            except BaseException as error:
                self._raised = error
        return self._raised is None

    def check(self, result: Any) -> Any:
        """`result` when it is there. Raises what ended the call before its time."""
        if self._on_tokens is not None:
            jax.block_until_ready(result)
            if self._raised is not None:
                raise self._raised
        return result


# By number, which is traced: another function is no other compilation.
_listeners: dict[int, Listener] = {}
_numbers = itertools.count(1)


@contextlib.contextmanager
def listening(on_tokens: OnTokens | None) -> Iterator[Listener]:
    with _seeing_interrupts(on_tokens is not None) as interrupted:
        listener = Listener(next(_numbers) % 2**31, on_tokens, interrupted)
        _listeners[listener.number] = listener
        try:
            yield listener
        finally:
            del _listeners[listener.number]


@contextlib.contextmanager
def _seeing_interrupts(wanted: bool) -> Iterator[Callable[[], bool]]:
    """A function that tells whether Ctrl-C came since.

    Python handles signals in its main thread, which waits inside the compiled call for its end; but a byte for each signal is
    written to the wake-up descriptor at once.
    """
    if not wanted or threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    reader, writer = os.pipe()
    os.set_blocking(reader, False)
    os.set_blocking(writer, False)

    def interrupted() -> bool:
        with contextlib.suppress(BlockingIOError):
            return signal.SIGINT in os.read(reader, 64)
        return False

    before = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    try:
        yield interrupted
    finally:
        signal.set_wakeup_fd(before)
        os.close(reader)
        os.close(writer)


def tell(number: jax.Array, tokens_B: jax.Array, alive_B: jax.Array) -> jax.Array:
    """Tells listener `number` of a step; a scalar bool: whether to go on.

    The loop needs the answer before its next step, which keeps the calls in order on any mesh.
    """
    answer = jax.ShapeDtypeStruct((), np.bool_)
    return io_callback(_hear, answer, number, constrain(tokens_B, None), constrain(alive_B, None))


def _hear(number: Any, tokens_B: Any, alive_B: Any) -> np.bool_:
    listener = _listeners.get(int(number))
    return np.bool_(listener is not None and listener.hear(np.asarray(tokens_B), np.asarray(alive_B)))
