"""A run, as a story: data, state, then step after step; metrics, evaluations and checkpoints on the way; a result at the end.

A run is a folder. The same call goes on where the folder's newest intact checkpoint stands, and a finished run answers with
its result.
"""

from __future__ import annotations

import dataclasses
import os
import pathlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from types import FrameType
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding

from gptjax.config import Config, to_dict
from gptjax.data.pipeline import Dataset, batch_documents, load_dataset, steps_per_epoch, train_batches
from gptjax.generate.text import generate_text
from gptjax.parallel.mesh import check_divides, make_mesh
from gptjax.parallel.sharding import batch_sharding, use_rules
from gptjax.train.checkpoints import CheckpointError, Checkpoints
from gptjax.train.evaluate import evaluate
from gptjax.train.flops import describe_mfu, device_peak, flops_per_token, mfu
from gptjax.train.metrics import LiveLine, MetricsWriter, draw_loss_curve, log_to_stderr, parameter_table
from gptjax.train.optimizers import Lengths, evaluation_params
from gptjax.train.restore import initial_params
from gptjax.train.run import RunLock, check_config, environment, read_result, state_sha256, write_result
from gptjax.train.state import TrainState
from gptjax.train.step import abstract_state, init_state, make_train_step


class Interrupted(Exception):
    """The run was asked to stop, and is saved; `signal_number` says by what."""

    def __init__(self, signal_number: int, step: int):
        super().__init__(
            f"stopped by {signal.Signals(signal_number).name} and saved at step {step}; the same command goes on from there."
        )
        self.signal_number = signal_number


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a non-finite gradient."""


class StopSignals:
    """Context manager that turns the first SIGTERM or SIGINT into a number to look at; a second SIGINT interrupts at once."""

    def __init__(self) -> None:
        self.received = 0
        self._before: dict[int, Any] = {}

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.received and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.received = number
        again = " (Ctrl-C again: at once, without saving)" if number == signal.SIGINT else ""
        # Straight to the descriptor: the signal may have come in the middle of a print.
        os.write(2, f"\n{signal.Signals(number).name}: stopping after this step{again}.\n".encode())

    def __enter__(self) -> StopSignals:
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *_: Any) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)


@dataclasses.dataclass
class Run:
    """What the steps of one process share."""

    config: Config
    workdir: pathlib.Path
    dataset: Dataset
    mesh: Mesh
    lengths: Lengths
    epoch_steps: float
    checkpoints: Checkpoints
    line: LiveLine
    metrics: MetricsWriter
    stop: StopSignals
    seconds_before: float = 0.0
    figures: dict[str, Any] | None = None  # of the evaluation at the latest step, where there was one
    started: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of the run, over all its starts."""
        return self.seconds_before + time.monotonic() - self.started

    def is_due(self, group: str, step: int, default: int = 0) -> bool:
        every = self.config.duration(group, "every", self.epoch_steps, default=default)
        return step == self.lengths.total or (every > 0 and step % every == 0)


def train(config: Config, workdir: pathlib.Path, allow_changes: Sequence[str] = ()) -> dict[str, Any]:
    """Trains to the end and returns the content of `result.json`; a run that has ended returns it at once.

    Raises `UserError` for what a person can mend, `Interrupted` after SIGTERM or Ctrl-C (the run is saved), `NonFiniteError`,
    `CheckpointsFailing`.
    """
    log = log_to_stderr
    with StopSignals() as stop, RunLock(workdir, log):
        dataset = load_dataset(config, log)
        config = config.with_vocab_size(dataset.tokenizer.vocab_size)
        epoch_steps = steps_per_epoch(config, dataset.train)
        lengths = Lengths.of(config, epoch_steps)
        mesh = make_mesh(config.mesh)
        check_divides(config, mesh)
        check_config(workdir, config, allow_changes, log)
        result = read_result(workdir)
        if result is not None and result["steps"] >= lengths.total:
            log(f"{workdir} holds a finished run of {result['steps']} steps, eval loss {result['eval']['loss']:.4f}.")
            return result
        dataset.tokenizer.save(workdir / "tokenizer")
        with LiveLine(lengths.total) as line, Checkpoints(workdir / "checkpoints", config.checkpoint, line) as checkpoints:
            state, about = _restore_or_init(config, lengths, mesh, checkpoints, line)
            with MetricsWriter(workdir, config, int(state.step) or None, line) as metrics:
                run = Run(config, workdir, dataset, mesh, lengths, epoch_steps, checkpoints, line, metrics, stop)
                run.seconds_before, run.figures = about.get("seconds", 0.0), about.get("eval")
                _describe(run, state)
                return _finish(run, _steps(run, state))


def _restore_or_init(
    config: Config, lengths: Lengths, mesh: Mesh, checkpoints: Checkpoints, log: Callable[[str], None]
) -> tuple[TrainState, dict[str, Any]]:
    restored = checkpoints.restore(abstract_state(config, lengths, mesh))
    if restored is not None:
        log(f"going on from the checkpoint of step {restored.step}.")
        return restored.state, restored.metadata
    return init_state(config, lengths, mesh, initial_params(config, mesh, log)), {}


def _describe(run: Run, state: TrainState) -> None:
    c, mesh = run.config, run.mesh
    run.line(parameter_table(state.params))
    run.line(describe_mfu(c.model, c.data.seq_len, mesh.devices.flat[0].device_kind, mesh.size, c.metrics.peak_tflops))
    run.line(f"{run.lengths.total:,} steps of {c.tokens_per_step:,} tokens: {run.lengths.total / run.epoch_steps:.2f} epochs.")


def _on_device(sharding: NamedSharding, batches: Iterator[dict[str, np.ndarray]]) -> Iterator[dict[str, jax.Array]]:
    for batch in batches:
        yield {name: jax.make_array_from_process_local_data(sharding, array) for name, array in batch.items()}


def _steps(run: Run, state: TrainState) -> TrainState:
    """From the state's step to the end. The metrics of a step are read only after the next one is under way."""
    config, start_step = run.config, int(state.step)
    train_step = make_train_step(config, run.lengths, run.mesh)
    host_batches = train_batches(config, run.dataset.train, start_step, jax.process_index(), jax.process_count())
    with use_rules(config.mesh):
        batches = _on_device(batch_sharding(run.mesh), host_batches)
    if start_step and run.is_due("evaluate", start_step) and not run.metrics.has(start_step, "eval/loss"):
        run.figures = _evaluate(run, state, start_step)  # a stop took precedence over it
    pending: tuple[int, dict[str, jax.Array]] | None = None
    for step in range(start_step + 1, run.lengths.total + 1):
        state, metrics = train_step(state, next(batches))
        if pending is not None:
            _read(run, *pending)
        pending = (step, metrics)
        run.checkpoints.poll()
        run.line.checkpoint(run.checkpoints.last_saved_step)

        stops = run.stop.received and step < run.lengths.total
        evaluates = run.is_due("evaluate", step) and not stops
        saves = run.is_due("checkpoint", step) or stops
        if evaluates or saves:
            _read(run, *pending)
            pending = None
        run.figures = _evaluate(run, state, step) if evaluates else None
        if saves:
            _save(run, state, step)
        if stops:
            _stop(run, step)
    return state


def _read(run: Run, step: int, metrics: dict[str, jax.Array]) -> None:
    """Waits for a step's metrics, writes the row that is due, and ends a run whose gradients are not finite any more."""
    c = run.config
    values = {name: value.item() for name, value in jax.device_get(metrics).items()}
    if values["nonfinite_streak"]:
        _check_finite(run, step, values["nonfinite_streak"])
    tokens = step * c.tokens_per_step
    run.line.step(step, tokens, values["loss"])
    if not run.is_due("metrics", step, default=10):
        return
    rate = run.line.tokens_per_second
    peak = device_peak(run.mesh.devices.flat[0].device_kind, c.model.dtype, c.metrics.peak_tflops)
    row = {
        "step": step,
        "tokens": tokens,
        "train/loss": values["loss"],
        "train/nll": values["nll"],
        "train/weight": values["weight"],
        "gradient_norm": values["gradient_norm"],
        "learning_rate": values["learning_rate"],
        "nonfinite_steps": values["nonfinite_steps"],
        "tokens_per_second": rate,
        "mfu": mfu(rate, flops_per_token(c.model, c.data.seq_len), run.mesh.size, peak),
        "seconds": run.seconds,
    } | {name: value for name, value in values.items() if name.startswith("moe/")}
    run.metrics.write(row)
    run.line.row(row)


def _check_finite(run: Run, step: int, streak: int) -> None:
    documents = batch_documents(run.config, run.dataset.train, step - 1)
    named = ", ".join(documents[:8]) + (f" and {len(documents) - 8} more" if len(documents) > 8 else "")
    run.line(f"step {step}: the gradient is not finite; the parameters are left as they were ({streak} in a row; {named}).")
    limit = run.config.train.max_nonfinite_steps
    if streak >= limit:
        raise NonFiniteError(
            f"the gradient was not finite in {streak} steps in a row, the last one step {step} with the documents {named}; "
            f"lower optimizer.learning_rate or look at these documents (train.max_nonfinite_steps={limit})."
        )


def _evaluate(run: Run, state: TrainState, step: int) -> dict[str, Any]:
    """Writes the evaluation's row and sample; the last evaluation of a run is over the whole split."""
    c = run.config
    params = evaluation_params(c.optimizer, state)
    with run.line.paused("evaluating"):
        figures = evaluate(c, params, run.dataset, run.mesh, 0 if step == run.lengths.total else c.evaluate.max_batches)
        row = {"step": step, "tokens": step * c.tokens_per_step} | {f"eval/{name}": value for name, value in figures.items()}
        run.metrics.write(row)
        run.line.row(row)
        if c.evaluate.sample_tokens:
            _sample(run, params, step)
    return figures


def _sample(run: Run, params: Any, step: int) -> None:
    c = run.config.evaluate
    sample = generate_text(
        params,
        run.config,
        run.dataset.tokenizer,
        [c.sample_prompt],
        max_new_tokens=c.sample_tokens,
        temperature=c.sample_temperature,
        top_k=c.sample_top_k,
        seed=run.config.train.seed,
    )[0]
    text = sample.prompt + sample.text
    run.line(f"sample at step {step}:\n{text}")
    folder = run.workdir / "samples"
    folder.mkdir(exist_ok=True)
    (folder / f"{step:08d}.txt").write_text(text, encoding="utf-8")


def _save(run: Run, state: TrainState, step: int) -> None:
    """Rows of metrics are on the disk before the checkpoint that makes them final.

    What else than the state a checkpoint holds: where the data goes on, and the evaluation where the run is at its end.
    """
    about = {"data": {"next_step": step}, "seconds": run.seconds, "eval": run.figures, "config": to_dict(run.config)}
    run.metrics.sync()
    run.checkpoints.save(step, state, about)


def _stop(run: Run, step: int) -> None:
    run.checkpoints.wait()
    if run.checkpoints.last_saved_step != step:
        raise CheckpointError(
            f"stopped at step {step}, which could not be saved; the same command goes on from the checkpoint before it."
        )
    raise Interrupted(run.stop.received, step)


def _finish(run: Run, state: TrainState) -> dict[str, Any]:
    run.checkpoints.wait()
    total = run.lengths.total
    if run.checkpoints.last_saved_step != total:
        raise CheckpointError(
            f"the run's end, step {total}, could not be saved; the same command goes on from the checkpoint before it."
        )
    assert run.figures is not None
    result = {
        "eval": run.figures,
        "steps": total,
        "tokens": total * run.config.tokens_per_step,
        "seconds": round(run.seconds, 3),
        "nonfinite_steps": int(state.nonfinite_steps),
        "state_sha256": state_sha256(state),
    } | environment()
    write_result(run.workdir, result)
    picture = draw_loss_curve(run.workdir)
    where = f"{run.workdir / 'result.json'}" + (f", {picture}" if picture else "")
    run.line(f"finished: {total} steps, eval loss {run.figures['loss']:.4f}; {where}.")
    return result
