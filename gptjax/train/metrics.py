"""What a run says: `metrics.jsonl` always, TensorBoard and Weights & Biases on request, the live line.

A row is a flat dict. The names that others read:

    step, tokens           training steps done, and positions they predicted
    train/loss, eval/loss  nats a token
    tokens_per_second      over a moving window, compilation and evaluation left out
    learning_rate, gradient_norm, mfu, ...
    moe/load_balance       1 where the experts' load is even; moe/router_z, moe/busiest: see model/experts.py
    eval/SOURCE/loss, ...  of each source of a mixture by itself; eval/loss is over the tokens of all
    mixture/SOURCE/rows    rows taken from it so far; mixture/SOURCE/epochs of its own; mixture/SOURCE/weight, its share just now
    heads/nll_2, ...       nll of each further prediction head, over its own targets
    adversarial/nll        nats of the examples that adversarial training moved; train/loss has them in it
    moe/dropped            (token, expert) choices of all layers that found no place; moe/dropped_fraction: of all choices
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import pathlib
import shutil
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Protocol, TextIO

from gptjax.config import Config, UserError, to_dict

FILE_NAME = "metrics.jsonl"
Log = Callable[[str], None]


def log_to_stderr(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


# --- rows ---


def _to_plain(value: Any) -> Any:
    """A numpy or JAX scalar as the Python number; NaN and the infinities as text, for which JSON has no number."""
    value = value.item() if hasattr(value, "item") else value
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def _from_plain(value: Any) -> Any:
    return float(value) if value in ("nan", "inf", "-inf") else value


def _parse_rows(path: pathlib.Path) -> tuple[list[dict[str, Any]], bool]:
    """(rows, whether the last line was torn). Raises `UserError` where another line is damaged: that no kill explains."""
    lines = path.read_bytes().split(b"\n") if path.exists() else []
    rows: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        is_last = number == len(lines)
        if is_last and not line:
            break
        try:
            row = json.loads(line)
        except ValueError as error:
            if is_last:
                return rows, True
            raise UserError(f"line {number} of {path} is damaged ({error}); remove that line to go on.") from None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise UserError(f"line {number} of {path} is not a row of metrics: it has no step; remove that line to go on.")
        rows.append(row)
    return rows, bool(lines and lines[-1])


def read_metrics(path: pathlib.Path | str) -> list[dict[str, Any]]:
    """The rows of a `metrics.jsonl`, in order; NaN and infinities as floats again.

    A last line that was cut off by a kill is left out. Raises `UserError` where the file is absent or damaged elsewhere.
    """
    path = pathlib.Path(path)
    if not path.is_file():
        raise UserError(f"{path} does not exist.")
    return [{key: _from_plain(value) for key, value in row.items()} for row in _parse_rows(path)[0]]


def step_figures(values: Mapping[str, Any]) -> dict[str, Any]:
    """What a row says of a step's own metrics, as `train.step` gives them: all of it a function of (config, seed, step)."""
    named = {f"train/{name}": values[name] for name in ("loss", "nll", "weight")}
    named |= {name: values[name] for name in ("gradient_norm", "learning_rate", "nonfinite_steps")}
    return named | {
        name: value for name, value in values.items() if name.startswith(("moe/", "heads/", "tasks/", "adversarial/"))
    }


class Sink(Protocol):
    """Another place that rows go to."""

    def write(self, row: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


class MetricsWriter:
    """Appends rows to `workdir/metrics.jsonl`, one JSON object a line, and to what else `config.metrics` asks for.

    `resume_step` is the checkpoint's step that the run goes on from, None for a run from the start. Rows past it are dropped
    first, for their steps are taken again; so is the rest of a line that a kill cut off. A row is with the operating system
    when `write` returns: a kill loses none. Construction raises `UserError` where a package that was asked for is absent.
    """

    def __init__(self, workdir: pathlib.Path, config: Config, resume_step: int | None = None, log: Log = log_to_stderr):
        makers = [make for wanted, make in ((config.metrics.tensorboard, TensorBoard), (config.metrics.wandb, WandB)) if wanted]
        self._sinks: list[Sink] = [make(workdir, config, resume_step) for make in makers]
        self.path = workdir / FILE_NAME
        self._keys_at_last: set[str] = set()
        self._last_step = -1
        workdir.mkdir(parents=True, exist_ok=True)
        self._keep_rows_up_to(-1 if resume_step is None else resume_step, log)
        self._file = self.path.open("a", encoding="utf-8")

    def _keep_rows_up_to(self, step: int, log: Log) -> None:
        rows, is_torn = _parse_rows(self.path)
        kept = [row for row in rows if row["step"] <= step]
        if kept:
            self._last_step = kept[-1]["step"]
            self._keys_at_last = {key for row in kept if row["step"] == self._last_step for key in row}
        if len(kept) == len(rows) and not is_torn:
            return
        temporary = self.path.with_name(f".{FILE_NAME}.{os.getpid()}.tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(row) + "\n" for row in kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self.path)
        if len(kept) < len(rows):
            log(f"dropped {len(rows) - len(kept)} rows of {FILE_NAME} past step {max(step, 0):,}: those steps are taken again")

    def write(self, row: Mapping[str, Any]) -> None:
        """Appends one row. Raises `ValueError` where its step lies before the last one's, or already has one of its keys."""
        row = {key: _to_plain(value) for key, value in row.items()}
        step, names = row["step"], row.keys() - {"step", "tokens"}
        if step < self._last_step or (step == self._last_step and names & self._keys_at_last):
            raise ValueError(f"step {step} of {FILE_NAME} is already written (the last one is {self._last_step}).")
        self._keys_at_last = names | (self._keys_at_last if step == self._last_step else set())
        self._last_step = step
        self._file.write(json.dumps(row, allow_nan=False) + "\n")
        self._file.flush()
        for sink in self._sinks:
            sink.write(row)

    def has(self, step: int, key: str) -> bool:
        """Whether the latest rows, if they are of `step`, hold `key`."""
        return step == self._last_step and key in self._keys_at_last

    def sync(self) -> None:
        """Puts the rows on the disk itself: call it before a checkpoint is committed, so that none is lost to a power cut."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        for sink in self._sinks:
            sink.close()

    def __enter__(self) -> MetricsWriter:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


def _numbers(row: Mapping[str, Any]) -> dict[str, float]:
    """The values of a row that can be drawn; text is left out."""
    values = {key: _from_plain(value) for key, value in row.items() if key != "step"}
    return {key: value for key, value in values.items() if isinstance(value, (int, float))}


class TensorBoard:
    """Event files in `workdir/tensorboard`."""

    def __init__(self, workdir: pathlib.Path, config: Config, resume_step: int | None):
        try:
            import tensorboardX
        except ImportError:
            raise _absent("tensorboard", "tensorboardX") from None
        purge_step = None if resume_step is None else resume_step + 1
        self._writer = tensorboardX.SummaryWriter(str(workdir / "tensorboard"), purge_step=purge_step)

    def write(self, row: Mapping[str, Any]) -> None:
        for key, value in _numbers(row).items():
            self._writer.add_scalar(key, value, row["step"])

    def close(self) -> None:
        self._writer.close()


class WandB:
    """An offline run in `workdir/wandb`, for `wandb sync` to send later; each resumption is one more run of the same group."""

    def __init__(self, workdir: pathlib.Path, config: Config, resume_step: int | None):
        try:
            import wandb
        except ImportError:
            raise _absent("wandb", "wandb") from None
        workdir.mkdir(parents=True, exist_ok=True)
        name = workdir.resolve().name
        self._run = wandb.init(
            mode="offline",
            project="gptjax",
            group=name,
            name=f"{name}@{resume_step or 0}",
            dir=str(workdir),
            config=to_dict(config),
            settings={"console": "off", "silent": True},  # its banners would tear the live line
        )

    def write(self, row: Mapping[str, Any]) -> None:
        self._run.log(_numbers(row), step=row["step"])

    def close(self) -> None:
        self._run.finish()


def _absent(extra: str, package: str) -> UserError:
    return UserError(f"metrics.{extra}=True needs the package {package}, which is not installed: pip install 'gptjax[{extra}]'.")


# --- the live line ---


class Rate:
    """Steps and tokens a second over the latest `window` seconds of training proper.

    `tick` after every step. The first interval, in which the step compiles, and any interval with a pause in it count
    neither as time nor as tokens: a step dispatched before an evaluation runs beside it, and would look too quick or too slow.
    """

    def __init__(self, window: float = 30.0, clock: Callable[[], float] = time.monotonic):
        self._window, self._clock = window, clock
        self._intervals: deque[tuple[float, int, int]] = deque()
        self._sums = (0.0, 0, 0)
        self._previous: tuple[float, int, int] | None = None

    def tick(self, step: int, tokens: int) -> None:
        """`step` steps and `tokens` tokens are done, counted from the run's start."""
        now = (self._clock(), step, tokens)
        if self._previous is not None:
            self._add((now[0] - self._previous[0], step - self._previous[1], tokens - self._previous[2]), 1)
        self._previous = now
        while len(self._intervals) > 1 and self._sums[0] - self._intervals[0][0] >= self._window:
            self._add(self._intervals[0], -1)

    def _add(self, interval: tuple[float, int, int], sign: int) -> None:
        if sign > 0:
            self._intervals.append(interval)
        else:
            self._intervals.popleft()
        seconds, steps, tokens = self._sums
        self._sums = (seconds + sign * interval[0], steps + sign * interval[1], tokens + sign * interval[2])

    def pause(self) -> None:
        """Leaves out the time from the last tick to the next."""
        self._previous = None

    @property
    def steps_per_second(self) -> float | None:
        return self._sums[1] / self._sums[0] if self._sums[0] > 0 else None

    @property
    def tokens_per_second(self) -> float | None:
        """None until two steps in a row have been seen."""
        return self._sums[2] / self._sums[0] if self._sums[0] > 0 else None


class LiveLine:
    """Progress on a terminal in one line that overwrites itself; elsewhere a plain line at each row of metrics.

    It is called with a text to log: the text goes above the line. Use it as the `log` of everything that runs beside it.
    """

    def __init__(
        self,
        total_steps: int,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        total_tokens: int | None = None,
    ):
        """`total_tokens`: of the whole run, which tell the time left, since steps need not be of one size; None: steps do."""
        self._stream = sys.stderr if stream is None else stream
        self._total, self._clock = total_steps, clock
        self._total_tokens, self._tokens = total_tokens, 0
        self._is_terminal = self._stream.isatty() and os.environ.get("TERM", "") != "dumb"
        self._lock = threading.RLock()  # checkpoints are written, and log, in threads of their own
        self._step, self._loss, self._saved, self._activity = 0, math.nan, 0, ""
        self._drawn_at, self._is_shown = -math.inf, False
        self.rate = Rate(clock=clock)

    def __call__(self, text: str) -> None:
        self.print_above(text)

    @property
    def tokens_per_second(self) -> float | None:
        return self.rate.tokens_per_second

    def step(self, step: int, tokens: int, loss: float | None = None) -> None:
        """After each step: `step` steps and `tokens` tokens are done in all, the latest known loss is `loss`."""
        self.rate.tick(step, tokens)
        self._tokens = tokens
        self._step, self._loss = step, self._loss if loss is None else loss
        self._draw()

    def row(self, row: Mapping[str, Any]) -> None:
        """The same row as goes to `metrics.jsonl`. Without a terminal this prints a line; on one, evaluations stay above it."""
        self._step, self._loss = row["step"], row.get("train/loss", self._loss)
        if not self._is_terminal:
            self.print_above("  ".join(self._parts(row)))
        elif "eval/loss" in row:
            self.print_above(f"step {row['step']:,}  eval/loss {float(row['eval/loss']):.4f}")
        else:
            self._draw(force=True)

    def checkpoint(self, step: int | None) -> None:
        """The checkpoint of `step` is complete; None or the same step again changes nothing."""
        if step is None or step == self._saved:
            return
        self._saved = step
        self._draw(force=True)

    @contextlib.contextmanager
    def paused(self, activity: str) -> Iterator[None]:
        """Time that is no training, such as an evaluation: shown as `activity`, left out of the rates."""
        self._activity = activity
        self._draw(force=True)
        try:
            yield
        finally:
            self._activity = ""
            self.rate.pause()
            self._draw(force=True)

    def print_above(self, text: str) -> None:
        with self._lock:
            self._hide()
            self._stream.write(text + "\n")
            self._stream.flush()
            self._draw(force=True)

    def close(self) -> None:
        """Leaves the last state of the line standing."""
        with self._lock:
            if self._step:
                self._draw(force=True)
            if self._is_shown:
                self._stream.write("\n")
                self._stream.flush()
            self._is_terminal = self._is_shown = False

    def __enter__(self) -> LiveLine:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def _parts(self, row: Mapping[str, Any] | None = None) -> list[str]:
        """Most important first: a narrow terminal shows only the beginning."""
        parts = [f"step {self._step:,}/{self._total:,}", f"{self._step / max(self._total, 1):.0%}"]
        if row is None:
            parts.append(f"loss {self._loss:.4f}")
        else:
            parts += [f"{name} {float(row[name]):.4f}" for name in ("train/loss", "eval/loss") if name in row]
        tokens, steps = self.rate.tokens_per_second, self.rate.steps_per_second
        parts.append(f"{format_count(tokens)} tokens/s" if tokens else "- tokens/s")
        parts.append(f"ETA {format_seconds(self._seconds_left(steps, tokens))}" if steps and tokens else "ETA -")
        parts.append(f"saved {self._saved:,}" if self._saved else "not saved yet")
        return [*parts, self._activity] if self._activity else parts

    def _seconds_left(self, steps: float, tokens: float) -> float:
        if self._total_tokens is None:
            return (self._total - self._step) / steps
        return (self._total_tokens - self._tokens) / tokens

    def _draw(self, force: bool = False) -> None:
        with self._lock:
            now = self._clock()
            if not self._is_terminal or (not force and now - self._drawn_at < 0.1):
                return
            parts, width = self._parts(), shutil.get_terminal_size().columns - 1
            with contextlib.suppress(OSError, ValueError, AttributeError):
                width = os.get_terminal_size(self._stream.fileno()).columns - 1
            while len(parts) > 1 and len("  ".join(parts)) > width:
                parts.pop()
            self._stream.write("\r\x1b[K" + "  ".join(parts)[: max(width, 1)])
            self._stream.flush()
            self._drawn_at, self._is_shown = now, True

    def _hide(self) -> None:
        if self._is_shown:
            self._stream.write("\r\x1b[K")
            self._is_shown = False


def format_count(number: float) -> str:
    """Three significant digits and a letter: 12.3k."""
    for limit, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= 0.9995 * limit:
            scaled = number / limit
            return f"{scaled:.{2 if scaled < 9.995 else 1 if scaled < 99.95 else 0}f}{letter}"
    return f"{number:.3g}"


def format_seconds(seconds: float) -> str:
    """0:07, 12:34, 1:02:03, 3d 04:05."""
    minutes, second = divmod(max(round(seconds), 0), 60)
    hours, minute = divmod(minutes, 60)
    if hours >= 24:
        return f"{hours // 24}d {hours % 24:02d}:{minute:02d}"
    return f"{hours}:{minute:02d}:{second:02d}" if hours else f"{minute}:{second:02d}"


# --- at the start ---


class NoMetrics:
    """Stands for a `MetricsWriter` in the processes that don't write."""

    def __enter__(self) -> NoMetrics:
        return self

    def __exit__(self, *_: Any) -> None: ...

    def write(self, row: Mapping[str, Any]) -> None: ...

    def has(self, step: int, key: str) -> bool:
        return False

    def sync(self) -> None: ...


def parameter_table(params: Any) -> str:
    """Path, shape, dtype and count of each leaf of `params` (arrays or their shapes, boxed or not), and the total."""
    import jax
    from flax.core import meta

    leaves = jax.tree_util.tree_leaves_with_path(meta.unbox(params))
    rows = [("parameter", "shape", "dtype", "count")]
    total = total_bytes = 0
    for path, leaf in leaves:
        count = math.prod(leaf.shape)
        total, total_bytes = total + count, total_bytes + count * leaf.dtype.itemsize
        shape = " x ".join(map(str, leaf.shape)) or "scalar"
        rows.append((jax.tree_util.keystr(path, simple=True, separator="/"), shape, str(leaf.dtype), f"{count:,}"))
    rows.append(("total", "", f"{total_bytes / 1e6:,.1f} MB", f"{total:,}"))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{name:<{widths[0]}}  {shape:<{widths[1]}}  {dtype:<{widths[2]}}  {count:>{widths[3]}}"
        for name, shape, dtype, count in rows
    ]
    rule = "-" * len(lines[0])
    return "\n".join([lines[0], rule, *lines[1:-1], rule, lines[-1]])
