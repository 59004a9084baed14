"""Tokens to text as they are drawn: what is shown is never taken back, and all of it is the text that the whole row gives."""

from __future__ import annotations

import codecs
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from gptjax.config import UserError


class Decoder(Protocol):
    """What streaming needs of a tokenizer."""

    def decode(self, ids: Any) -> str: ...

    def vocabulary(self) -> Sequence[bytes | None]: ...


class TextStream:
    """The text that new tokens add behind a prompt, token by token.

    Each token adds its bytes (`vocabulary()`), and a character is shown once it is whole; bytes that are no UTF-8 become U+FFFD.
    Where the prompt is no text yet, the beginning is what `decode` makes of it: some tokenizers take a space off there. Where a
    tokenizer's pieces have no bytes of their own, all of the text comes at the end. The text ends before the first of
    `stop_strings` to be complete; what may yet become one of them is held back.
    """

    def __init__(self, tokenizer: Decoder, prompt_ids: Sequence[int] | np.ndarray, stop_strings: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        self._prompt_ids = [int(i) for i in prompt_ids]
        self._ids: list[int] = []
        self._stop_strings = tuple(stop_strings)
        self._held = ""  # decoded, but perhaps the beginning of a stop string
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        try:
            self._pieces: Sequence[bytes | None] | None = tokenizer.vocabulary()
        except UserError:
            self._pieces = None
        before = tokenizer.decode(self._prompt_ids)
        self._before = before
        self._is_at_start = not before
        self.text = ""  # shown so far
        self.is_stopped = False  # a stop string was complete
        self.fed = 0  # tokens, those after a stop string too

    @property
    def tokens(self) -> tuple[int, ...]:
        """The tokens up to the end or the one that completed a stop string, which is among them."""
        return tuple(self._ids)

    def feed(self, token: int) -> str:
        """The text that is settled by one more token; nothing after a stop string."""
        self.fed += 1
        if self.is_stopped:
            return ""
        self._ids.append(int(token))
        return self._settle(self._decoded(int(token)))

    def finish(self) -> str:
        """The rest of the text."""
        if self.is_stopped:
            return ""
        rest = self._settle(self._undecoded())
        if self.is_stopped:
            return rest
        held, self._held = self._held, ""
        self.text += held
        return rest + held

    def _decoded(self, token: int) -> str:
        """The characters that are whole now."""
        if self._pieces is None:
            return ""
        found = self._utf8.decode(self._pieces[token] or b"")
        if not self._is_at_start:
            return found
        if self._utf8.getstate()[0]:  # in the middle of a character
            return ""
        return self._beginning()

    def _beginning(self) -> str:
        found = self._tokenizer.decode(self._prompt_ids + self._ids)
        self._is_at_start = not found
        return found

    def _undecoded(self) -> str:
        """What no further token will complete."""
        if self._pieces is not None:
            return self._beginning() if self._is_at_start else self._utf8.decode(b"", final=True)
        whole = self._tokenizer.decode(self._prompt_ids + self._ids)
        before = self._before
        return whole[len(before) :] if whole.startswith(before) else self._tokenizer.decode(self._ids)

    def _settle(self, new: str) -> str:
        """Shows what cannot belong to a stop string any more."""
        text = self._held + new
        ends = [(start + len(stop), start) for stop in self._stop_strings if (start := text.find(stop)) >= 0]
        if ends:
            self.is_stopped = True
            shown, self._held = text[: min(ends)[1]], ""
        else:
            keep = max((_overlap(text, stop) for stop in self._stop_strings), default=0)
            shown, self._held = text[: len(text) - keep], text[len(text) - keep :]
        self.text += shown
        return shown


def _overlap(text: str, stop: str) -> int:
    """The length of the longest end of `text` with which `stop` begins."""
    return next((size for size in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:size])), 0)
