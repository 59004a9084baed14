"""How fast a prompt is read and a text is written, compilation apart."""

from __future__ import annotations

import dataclasses
import time
from types import TracebackType
from typing import Any

import jax
import numpy as np


@dataclasses.dataclass
class Speed:
    """Tokens and seconds of any number of calls; sums over the rows of a batch."""

    prompt_tokens: int = 0
    decoded_tokens: int = 0  # all but the first of each row, which the prefill gives
    compile_seconds: float = 0.0
    prefill_seconds: float = 0.0  # from the call to the first token, without compilation
    decode_seconds: float = 0.0  # from the first token to the end

    def as_dict(self) -> dict[str, float | None]:
        """JSON's; rates in tokens/s, None where there was nothing to measure."""
        return dataclasses.asdict(self) | {
            "prefill_tokens_per_second": _rate(self.prompt_tokens, self.prefill_seconds),
            "decode_tokens_per_second": _rate(self.decoded_tokens, self.decode_seconds),
        }

    def __str__(self) -> str:
        prefill, decode = _rate(self.prompt_tokens, self.prefill_seconds), _rate(self.decoded_tokens, self.decode_seconds)
        parts = [
            f"prefill {self.prompt_tokens} tokens in {self.prefill_seconds:.3f} s" + (f" ({prefill:,.0f}/s)" if prefill else "")
        ]
        parts = parts if self.prompt_tokens else []  # a search is timed as a whole
        parts += [
            f"decode {self.decoded_tokens} tokens in {self.decode_seconds:.3f} s" + (f" ({decode:,.1f}/s)" if decode else ""),
        ]
        if self.compile_seconds >= 0.001:
            parts.append(f"compilation {self.compile_seconds:.1f} s")
        return "; ".join(parts)


def _rate(tokens: int, seconds: float) -> float | None:
    return tokens / seconds if tokens and seconds > 0 else None


class Stopwatch:
    """Context manager around one call of `generate_tokens`, which `hear` follows; adds what it took to a `Speed`.

    Prefill and decode are one dispatch: the first token marks where one ends. JAX says when it traces, lowers and compiles, which
    happens before the dispatch, so these intervals are taken off the first part.
    """

    def __init__(self, speed: Speed, prompt_tokens: int) -> None:
        self._speed, self._prompt_tokens = speed, prompt_tokens
        self._first: float | None = None
        self._heard = 0
        self._compiling: list[tuple[float, float]] = []

    def __enter__(self) -> Stopwatch:
        jax.monitoring.register_event_duration_secs_listener(self._on_event)
        self._began = time.perf_counter()
        return self

    def hear(self, alive_B: np.ndarray) -> None:
        """One step's tokens are there."""
        if self._first is None:
            self._first = time.perf_counter()
        else:
            self._heard += int(alive_B.sum())

    def drew(self, tokens: int) -> None:
        """All tokens are there, of a strategy that is not heard step by step: its time is counted as decoding."""
        self._heard = tokens

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        ended = time.perf_counter()
        jax.monitoring.unregister_event_duration_listener(self._on_event)
        if self._first is None:
            if self._heard:
                compiling = covered(self._compiling)
                self._speed.decoded_tokens += self._heard
                self._speed.compile_seconds += compiling
                self._speed.decode_seconds += max(0.0, ended - self._began - compiling)
            return
        compiling = covered([span for span in self._compiling if span[1] <= self._first])
        self._speed.prompt_tokens += self._prompt_tokens
        self._speed.decoded_tokens += self._heard
        self._speed.compile_seconds += compiling
        self._speed.prefill_seconds += max(0.0, self._first - self._began - compiling)
        self._speed.decode_seconds += ended - self._first

    def _on_event(self, event: str, duration_secs: float, **_: Any) -> None:
        if event.startswith("/jax/core/compile/"):
            now = time.perf_counter()
            self._compiling.append((now - duration_secs, now))


def covered(spans: list[tuple[float, float]]) -> float:
    """The length of the union of intervals: what is traced inside a trace is reported twice."""
    total, end = 0.0, float("-inf")
    for start, stop in sorted(spans):
        total += max(0.0, stop - max(start, end))
        end = max(end, stop)
    return total
