"""Numbers as a report shows them."""

from __future__ import annotations

import math
from collections.abc import Iterable


def decimals(values: Iterable[float | None], digits: int = 5) -> int:
    """Decimals with which the largest of the values has `digits` digits, so that a column of them is aligned."""
    sizes = [abs(value) for value in values if value is not None and math.isfinite(value) and value]
    return max(0, digits - 1 - math.floor(math.log10(max(sizes)))) if sizes else 0


def fixed(value: float | None, places: int, sign: bool = False) -> str:
    """With so many decimals and a true minus; "—" for None and what is not finite."""
    if value is None or not math.isfinite(value):
        return "—"
    return f"{value:{'+' if sign else ''},.{places}f}".replace("-", "−")


def between(low: float | None, high: float | None, places: int) -> str:
    if low is None or high is None or not (math.isfinite(low) and math.isfinite(high)):
        return "—"
    return f"{fixed(low, places)} to {fixed(high, places)}"


def p_value(p: float | None) -> str:
    return "—" if p is None else "< 0.0001" if p < 1e-4 else f"{p:.2g}"


def percent(share: float) -> str:
    """Rounded, but never to the whole where it is not."""
    return "> 99 %" if 0.995 <= share < 1 else f"{100 * share:.0f} %"


def plural(count: int, word: str) -> str:
    return f"{count:,} {word}{'' if count == 1 else 's'}"


def joined(words: Iterable[str], most: int = 4) -> str:
    """`a, b and c`; past `most`, `a, b and 7 more`."""
    listed = list(words)
    if len(listed) > most:
        listed = [*listed[: most - 1], f"{len(listed) - most + 1} more"]
    return " and ".join(filter(None, [", ".join(listed[:-1]), listed[-1]])) if listed else ""
