"""A run, as a story: data, state, then step after step; metrics, evaluations and checkpoints on the way; a result at the end.

A run is a folder. The same call goes on where the folder's newest intact checkpoint stands, and a finished run answers with
its result.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import pathlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TextIO

import jax
from jax.sharding import Mesh

from gptjax.adapters.attach import adapter_weights
from gptjax.adapters.merge import for_writing
from gptjax.config import Config, Stages, UserError, flatten, tasks_of, to_dict
from gptjax.config.objective import writing_part, writing_refusal
from gptjax.data.mixture import describe
from gptjax.data.pipeline import Dataset, batch_documents, load_dataset, mixture_figures, steps_per_epoch
from gptjax.data.tokenizers import Tokenizer, load_tokenizer
from gptjax.generate.settings import GenerationConfig
from gptjax.generate.text import generate_text
from gptjax.parallel import hosts
from gptjax.parallel.mesh import make_mesh
from gptjax.tasks.load import TaskDataset, load_tasks
from gptjax.tasks.table import TASKS
from gptjax.train.checkpoints import CheckpointError, Checkpoints
from gptjax.train.curve import draw_loss_curve
from gptjax.train.evaluate import by_source, evaluate
from gptjax.train.feed import check_steps_divide, step_batches
from gptjax.train.flops import describe_mfu, device_peak, flops_per_token, mfu
from gptjax.train.groups import trained_count
from gptjax.train.metrics import LiveLine, MetricsWriter, NoMetrics, log_to_stderr, parameter_table, step_figures
from gptjax.train.optimizers import Lengths, evaluation_params
from gptjax.train.provenance import note_start
from gptjax.train.reference import with_reference
from gptjax.train.restore import initial_params
from gptjax.train.rewind import Rewind, Spike, Watch
from gptjax.train.run import RunLock, check_config, environment, read_result, state_sha256, write_result
from gptjax.train.state import TrainState
from gptjax.train.step import abstract_state, init_state
from gptjax.train.stop import Interrupted, StopSignals
from gptjax.train.task_evaluation import Examples, evaluate_tasks


class NonFiniteError(RuntimeError):
    """Too many steps in a row had a non-finite gradient."""


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
    metrics: MetricsWriter | NoMetrics
    stop: StopSignals
    stages: Stages
    watch: Watch
    end: int = 0  # the step at which this start ends
    seconds_before: float = 0.0
    figures: dict[str, Any] | None = None  # of the evaluation at the latest step, where there was one
    started: float = dataclasses.field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of the run, over all its starts."""
        return self.seconds_before + time.monotonic() - self.started

    def rows(self, steps: int) -> int:
        """Place in the sequence of rows after the first `steps` steps, rows that were passed over included."""
        return self.stages.rows(steps) + self.watch.skipped_rows

    def tokens(self, steps: int) -> int:
        """Positions that the first `steps` steps predict, padding included."""
        return self.stages.rows(steps) * self.config.data.seq_len

    def is_due(self, group: str, step: int, default: int = 0) -> bool:
        return step == self.lengths.total or self.config.is_due(group, step, self.epoch_steps, default)


def train(
    config: Config,
    workdir: pathlib.Path,
    allow_changes: Sequence[str] = (),
    until: int | None = None,
    accepts: Callable[[Dataset], None] | None = None,
) -> dict[str, Any]:
    """Trains to the end and returns the content of `result.json`; a run that has ended returns it at once.

    With `until` it ends at that step, saved, as if the rest were to come later, and returns {"steps": until}. `accepts` is called
    with the data before anything is compiled, and may raise `UserError`.

    Raises `UserError` for what a person can mend, `Interrupted` after SIGTERM or Ctrl-C (the run is saved), `NonFiniteError`,
    `CheckpointsFailing`. Of several processes all call it; process 0 alone writes into the folder (of a checkpoint, each its own
    arrays) and speaks.
    """
    with StopSignals() as stop, _stderr_of_process_0() as stream, _lock(workdir):
        log: Callable[[str], None] = functools.partial(print, file=stream, flush=True)
        dataset = load_data(config, log)
        if accepts is not None:
            accepts(dataset)
        config = dataset.settled(config)
        epoch_steps = steps_per_epoch(config, dataset.train)
        lengths = Lengths.of(config, epoch_steps)
        mesh = make_mesh(config.mesh)
        stages = config.stages(epoch_steps)
        check_steps_divide(config, stages, mesh)
        result = hosts.from_process_0(_open_folder(workdir, config, allow_changes, log) if hosts.is_primary() else None)
        if result is not None and result["steps"] >= lengths.total:
            log(f"{workdir} holds a finished run of {result['steps']} steps, eval loss {result['eval']['loss']:.4f}.")
            return result
        if hosts.is_primary():
            _keep_tokenizer(workdir, dataset.tokenizer)
        total_tokens = stages.rows(lengths.total) * config.data.seq_len
        with (
            LiveLine(lengths.total, stream, total_tokens=total_tokens) as line,
            Checkpoints(workdir / "checkpoints", config.checkpoint, line) as checkpoints,
        ):
            state, about = _restore_or_init(config, lengths, mesh, checkpoints, line, dataset.tokenizer)
            if hosts.is_primary():
                note_start(workdir, config, dataset, mesh, int(state.step), about)
            if isinstance(dataset, TaskDataset):
                initial = functools.partial(_initial_params, config, lengths, mesh, state, line, dataset.tokenizer)
                dataset = with_reference(config, dataset, workdir, mesh, initial, line)
            rewind: Rewind | None = None
            while True:
                with _metrics(workdir, config, int(state.step) or None, line) as metrics:
                    watch = Watch.restored(config, about.get("spikes", {}))
                    run = Run(
                        config, workdir, dataset, mesh, lengths, epoch_steps, checkpoints, line, metrics, stop, stages, watch
                    )
                    run.end = min(lengths.total, until or lengths.total)
                    run.seconds_before, run.figures = about.get("seconds", 0.0), about.get("eval")
                    if rewind is None:
                        _describe(run, state)
                    else:
                        _keep_rewind(run, state)
                    try:
                        return _finish(run, _steps(run, state))
                    except Spike as spike:
                        rewind = spike.rewind
                # Only here, outside of the handler, nothing refers to the abandoned state any more.
                state, about = _go_back(run, rewind)


@contextlib.contextmanager
def _stderr_of_process_0() -> Iterator[TextIO]:
    if hosts.is_primary():
        yield sys.stderr
        return
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        yield nowhere


@contextlib.contextmanager
def _lock(workdir: pathlib.Path) -> Iterator[None]:
    """The folder's lock, which process 0 takes for all."""
    with RunLock(workdir, log_to_stderr) if hosts.is_primary() else contextlib.nullcontext():
        if hosts.process_count() > 1:
            hosts.check_shared(workdir / "run.lock")
        yield


def load_data(config: Config, log: Callable[[str], None], own: Tokenizer | None = None) -> Dataset:
    """`load_dataset`, by process 0 first, for where hosts share the cache; the same tokens in all processes, or `UserError`."""
    hosts.check_same(flatten(config))
    with hosts.process_0_first():
        dataset = load_tasks(config, log, own) if tasks_of(config) else load_dataset(config, log, own=own)
    counts = {name: dataset.report[name] for name in ("documents", "tokens", "bytes", "rows")}
    hosts.check_same({"the tokenizer's fingerprint": dataset.tokenizer.fingerprint, "the count of the data": counts})
    return dataset


def _open_folder(
    workdir: pathlib.Path, config: Config, allow_changes: Sequence[str], log: Callable[[str], None]
) -> dict[str, Any] | None:
    """Settles which run the folder holds; its result, where there is one."""
    check_config(workdir, config, allow_changes, log)
    return read_result(workdir)


def _metrics(workdir: pathlib.Path, config: Config, resume_step: int | None, line: LiveLine) -> MetricsWriter | NoMetrics:
    return MetricsWriter(workdir, config, resume_step, line) if hosts.is_primary() else NoMetrics()


def _keep_tokenizer(workdir: pathlib.Path, tokenizer: Tokenizer) -> None:
    """The run's folder holds its tokenizer. Raises `UserError` where it holds another, by which the checkpoints were made."""
    folder = workdir / "tokenizer"
    has_checkpoint = any((workdir / "checkpoints").glob("*/manifest.json"))
    if has_checkpoint and (folder / "descriptor.json").is_file():
        before = load_tokenizer(folder)
        if before.encoding_fingerprint != tokenizer.encoding_fingerprint:
            raise UserError(
                f"{workdir} was trained with another tokenizer ({before.kind}, {before.vocab_size} ids) than the config gives "
                f"now ({tokenizer.kind}, {tokenizer.vocab_size} ids): its files or its text have changed."
            )
    tokenizer.save(folder)


def _restore_or_init(
    config: Config,
    lengths: Lengths,
    mesh: Mesh,
    checkpoints: Checkpoints,
    log: Callable[[str], None],
    tokenizer: Tokenizer,
) -> tuple[TrainState, dict[str, Any]]:
    restored = checkpoints.restore(abstract_state(config, lengths, mesh))
    if restored is not None:
        log(f"going on from the checkpoint of step {restored.step}.")
        return restored.state, restored.metadata
    return init_state(config, lengths, mesh, initial_params(config, mesh, log, tokenizer)), {}


def _initial_params(
    config: Config, lengths: Lengths, mesh: Mesh, state: TrainState, log: Callable[[str], None], tokenizer: Tokenizer
) -> Any:
    """Those of step 0, whatever step the state is at."""
    if not int(state.step):
        return state.params
    return init_state(config, lengths, mesh, initial_params(config, mesh, log, tokenizer)).params


def _describe(run: Run, state: TrainState) -> None:
    c, mesh = run.config, run.mesh
    run.line(parameter_table(state.params))
    trained, total = trained_count(c, state.params)
    if trained < total:
        run.line(f"trained: {trained:,} of {total:,} parameters ({trained / total:.3%}); the others are frozen.")
    kind = mesh.devices.flat[0].device_kind
    run.line(describe_mfu(c.model, c.data.seq_len, kind, mesh.size, c.metrics.peak_tflops, adapter_weights(c)))
    if c.evaluate.sample_tokens and not tasks_of(c) and (refusal := writing_refusal(c.objective)):
        run.line(f"evaluate.sample_tokens={c.evaluate.sample_tokens} has no effect: {refusal}")
    total = run.lengths.total
    run.line(f"{total:,} steps of {c.tokens_per_step:,} tokens: {run.stages.batches(total) / run.epoch_steps:.2f} epochs.")
    for stage in run.stages.every if len(run.stages.every) > 1 else ():
        run.line(f"from step {stage.first_step + 1:,}: {stage.batch_size:,} rows a step, cut to {stage.seq_len:,} tokens.")


def _steps(run: Run, state: TrainState) -> TrainState:
    """From the state's step to the end. The metrics of a step are read only after the next one is under way. Raises `Spike`."""
    start_step = int(state.step)
    vote = hosts.StopVote(run.mesh)
    batches = step_batches(run.config, run.dataset.train, run.lengths, run.mesh, start_step, run.watch.skipped_rows)
    evaluated = hosts.from_process_0(run.metrics.has(start_step, "eval/loss"))
    if start_step and run.is_due("evaluate", start_step) and not evaluated:
        run.figures = _evaluate(run, state, start_step)  # a stop took precedence over it
    pending: tuple[int, dict[str, jax.Array]] | None = None
    for step in range(start_step + 1, run.end + 1):
        train_step, batch = next(batches)
        compiles = step == start_step + 1 or run.stages.at(step - 1).first_step == step - 1  # the first one of its shape
        hosts.moved("step", step, patience=math.inf if compiles else 1)
        state, metrics = train_step(state, batch)
        told = vote(run.stop.received)
        if pending is not None:
            _read(run, *pending)
        pending = (step, metrics)
        run.checkpoints.poll()
        run.line.checkpoint(run.checkpoints.last_saved_step)

        stops = told and step < run.lengths.total
        evaluates = run.is_due("evaluate", step) and not stops
        saves = run.is_due("checkpoint", step) or run.watch.is_point(step) or stops or step == run.end
        if evaluates or saves:
            _read(run, *pending)
            pending = None
        run.figures = _evaluate(run, state, step) if evaluates else None
        if saves:
            _save(run, state, step)
        if stops:
            _stop(run, step, told)
        if evaluates or saves:
            hosts.moved("the end of step", step)  # from here on the watch is impatient again
    return state


def _read(run: Run, step: int, metrics: dict[str, jax.Array]) -> None:
    """Waits for a step's metrics, writes the row that is due, and ends a run whose gradients are not finite any more.

    Raises `Spike` where the step completes one.
    """
    c = run.config
    values = {name: value.item() for name, value in jax.device_get(metrics).items()}
    if values["nonfinite_streak"]:
        _check_finite(run, step, values["nonfinite_streak"])
    if rewind := run.watch.see(step, values[c.train.spike_metric]):
        raise Spike(rewind)
    tokens, stage = run.tokens(step), run.stages.at(step - 1)
    run.line.step(step, tokens, values["loss"])
    if not run.is_due("metrics", step, default=10):
        return
    rate = run.line.tokens_per_second
    peak = device_peak(run.mesh.devices.flat[0].device_kind, c.model.dtype, c.metrics.peak_tflops)
    row = {
        "step": step,
        "tokens": tokens,
        **step_figures(values),
        "tokens_per_second": rate,
        "mfu": mfu(rate, flops_per_token(c.model, stage.seq_len, adapter_weights(c)), run.mesh.size, peak),
        "seconds": run.seconds,
    }
    if len(run.stages.every) > 1:
        row |= {"batch_size": stage.batch_size, "seq_len": stage.seq_len}
    for source, figures in mixture_figures(c, run.dataset.train, run.rows(step)).items():
        row |= {f"mixture/{source}/{name}": value for name, value in figures.items()}
    run.metrics.write(row)
    run.line.row(row)


def _check_finite(run: Run, step: int, streak: int) -> None:
    named = _documents(run, step)
    run.line(f"step {step}: the gradient is not finite; the parameters are left as they were ({streak} in a row; {named}).")
    limit = run.config.train.max_nonfinite_steps
    if streak >= limit:
        raise NonFiniteError(
            f"the gradient was not finite in {streak} steps in a row, the last one step {step} with the documents {named}; "
            f"lower optimizer.learning_rate or look at these documents (train.max_nonfinite_steps={limit})."
        )


def _documents(run: Run, step: int) -> str:
    documents = batch_documents(run.config, run.dataset.train, step - 1, run.watch.skipped_rows)
    return ", ".join(documents[:8]) + (f" and {len(documents) - 8} more" if len(documents) > 8 else "")


def _go_back(run: Run, rewind: Rewind) -> tuple[TrainState, dict[str, Any]]:
    """The state before a spike, and what is to be known of it. Nothing is lost to a kill until the first checkpoint behind it is
    written: the run then finds the spike once more.
    """
    hosts.moved("its way back", patience=10)
    name, step = run.config.train.spike_metric, rewind.found_at
    taken = run.stages.rows(step) - run.stages.rows(rewind.back_to)
    taken += run.config.train.spike_skip_steps * run.stages.at(step - 1).batch_size
    value = "not finite" if rewind.value is None else f"{rewind.value:.4g}"
    run.line(
        f"step {step}: the {name.replace('_', ' ')} is {value}, above {rewind.limit:.4g} since step {rewind.first_bad}; going "
        f"back to step {rewind.back_to} and passing over {taken:,} rows ({_documents(run, rewind.first_bad)})."
    )
    restored = run.checkpoints.restore(abstract_state(run.config, run.lengths, run.mesh), rewind.back_to)
    assert restored is not None
    before = Watch.restored(run.config, restored.metadata["spikes"])
    watch = run.watch.after(rewind, run.watch.skipped_rows + taken, before)
    run.checkpoints.go_back(rewind.back_to)
    return restored.state, restored.metadata | {"spikes": watch.saved(), "seconds": run.seconds}


def _keep_rewind(run: Run, state: TrainState) -> None:
    """Writes the row of a rewind, and the checkpoint that it went back to anew, with the rows to pass over."""
    rewind, number = run.watch.rewinds[-1], len(run.watch.rewinds)
    if not run.metrics.has(rewind.back_to, f"rewind_{number}/found_at"):  # a kill came between it and the checkpoint
        found = {f"rewind_{number}/{name}": getattr(rewind, name) for name in ("found_at", "first_bad", "skipped_rows")}
        run.metrics.write({"step": rewind.back_to, "tokens": run.tokens(rewind.back_to)} | found)
    _save(run, state, rewind.back_to)


def _evaluate(run: Run, state: TrainState, step: int) -> dict[str, Any]:
    """Writes the evaluation's row and sample; the last evaluation of a run is over the whole split."""
    c = run.config
    params = evaluation_params(c, state)
    with run.line.paused("evaluating"):
        max_batches = 0 if step == run.lengths.total else c.evaluate.max_batches
        figures: dict[str, Any]
        if isinstance(run.dataset, TaskDataset):
            figures, judged = evaluate_tasks(c, params, run.dataset, run.mesh, max_batches)
        else:
            figures = evaluate(c, params, run.dataset, run.mesh, max_batches)
        row = {"step": step, "tokens": run.tokens(step)} | {f"eval/{name}": value for name, value in figures.items()}
        run.metrics.write(row)
        run.line.row(row)
        if isinstance(run.dataset, TaskDataset):
            _show(run, judged, step)
        elif c.evaluate.sample_tokens and writing_part(c.objective) is not None:
            _sample(run, params, step)
    return figures


def _show(run: Run, judged: Examples, step: int) -> None:
    """Keeps what the model said of the first records of each task, as the task shows it."""
    shown = [
        TASKS[knobs.kind].show(knobs, one)
        for name, knobs in tasks_of(run.config).items()
        for one in judged[name][: run.config.evaluate.show_examples]
    ]
    if shown:
        _keep_sample(run, "\n\n".join(shown), step)


def _sample(run: Run, params: Any, step: int) -> None:
    c = run.config.evaluate
    config, params = for_writing(run.config, params)
    sample = generate_text(
        params,
        config,
        run.dataset.tokenizer,
        [c.sample_prompt],
        GenerationConfig(max_new_tokens=c.sample_tokens, temperature=c.sample_temperature, top_k=c.sample_top_k),
        seed=run.config.train.seed,
    )[0]
    _keep_sample(run, sample.prompt + sample.text, step)


def _keep_sample(run: Run, text: str, step: int) -> None:
    run.line(f"sample at step {step}:\n{text}")
    if not hosts.is_primary():
        return
    folder = run.workdir / "samples"
    folder.mkdir(exist_ok=True)
    (folder / f"{step:08d}.txt").write_text(text, encoding="utf-8")


def _save(run: Run, state: TrainState, step: int) -> None:
    """Rows of metrics are on the disk before the checkpoint that makes them final.

    What else than the state a checkpoint holds: where the data goes on, and the evaluation where the run is at its end.
    """
    about = {"data": {"next_step": step, "next_row": run.rows(step)}, "seconds": run.seconds, "eval": run.figures}
    about |= {"config": to_dict(run.config), "tokenizer": run.dataset.tokenizer.encoding_fingerprint}
    if run.config.train.spike_threshold:
        about["spikes"] = run.watch.saved()
    hosts.moved("checkpoint", step, patience=10)
    run.metrics.sync()
    run.checkpoints.save(step, state, about, held=run.watch.held(step))


def _stop(run: Run, step: int, signal_number: int) -> None:
    run.checkpoints.wait()
    if run.checkpoints.last_saved_step != step:
        raise CheckpointError(
            f"stopped at step {step}, which could not be saved; the same command goes on from the checkpoint before it."
        )
    raise Interrupted(signal_number, step)


def _finish(run: Run, state: TrainState) -> dict[str, Any]:
    hosts.moved("its end", patience=10)
    run.checkpoints.wait()
    total, step = run.lengths.total, int(state.step)
    if run.checkpoints.last_saved_step != step:
        raise CheckpointError(
            f"the run's end, step {step}, could not be saved; the same command goes on from the checkpoint before it."
        )
    if step < total:
        return {"steps": step}
    assert run.figures is not None
    result = {
        "eval": run.figures,
        "steps": total,
        "tokens": run.tokens(total),
        "seconds": round(run.seconds, 3),
        "nonfinite_steps": int(state.nonfinite_steps),
        "rewinds": run.watch.saved()["rewinds"],
        "state_sha256": state_sha256(state),
    } | environment()
    sources = mixture_figures(run.config, run.dataset.train, run.rows(total))
    if sources:
        result["mixture"] = sources
    if not hosts.is_primary():
        return result
    if sources:
        evaluated = by_source(run.figures)
        run.line(describe({name: figures | evaluated[name] for name, figures in sources.items()}))
    write_result(run.workdir, result)
    picture = draw_loss_curve(run.workdir)
    where = f"{run.workdir / 'result.json'}" + (f", {picture}" if picture else "")
    run.line(f"finished: {total} steps, eval loss {run.figures['loss']:.4f}; {where}.")
    return result
