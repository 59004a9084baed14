"""What the verbs print: results, logs and faults, each from process 0 alone where there are several."""

from __future__ import annotations

import json
import math
import pathlib
import sys
from typing import Any

from gptjax.config import UserError
from gptjax.parallel import hosts


def fault(text: str, status: int) -> int:
    """Says why this process ends; of several, all do."""
    hosts.fail(text, status)
    print(f"gptjax: {text}", file=sys.stderr)
    return status


def log(text: str) -> None:
    """A line on standard error, from process 0."""
    if hosts.is_primary():
        print(text, file=sys.stderr, flush=True)


def print_json(value: Any) -> None:
    """One line of valid JSON: NaN and infinities, which JSON lacks, as null. Process 0 prints it."""
    if not hosts.is_primary():
        return
    print(json.dumps(plain(value), ensure_ascii=False, allow_nan=False), flush=True)


def write_json(path: pathlib.Path, value: Any) -> None:
    """A file for --output. Raises `UserError` where it cannot be written."""
    try:
        path.write_text(json.dumps(plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output={path} cannot be written: {error.strerror}.") from None


def plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def write_text(text: str) -> None:
    """Text on standard output at once, from process 0; characters that its encoding lacks as question marks."""
    if not hosts.is_primary():
        return
    try:
        sys.stdout.write(text)
    except UnicodeEncodeError:
        encoding = sys.stdout.encoding
        sys.stdout.write(text.encode(encoding, "replace").decode(encoding))
    sys.stdout.flush()
