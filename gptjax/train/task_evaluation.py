"""What a model says of the records of its tasks, and what that is worth: the same for any batch size."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gptjax.config import Config, UserError, tasks_of
from gptjax.data.pipeline import Split, eval_batches
from gptjax.data.records import Record
from gptjax.parallel import hosts
from gptjax.parallel.mesh import check_divides
from gptjax.parallel.sharding import batch_sharding, laid_over, replicated, use_rules
from gptjax.tasks.base import Judged
from gptjax.tasks.load import Example, TaskDataset
from gptjax.tasks.losses import task_outputs
from gptjax.tasks.table import TASKS
from gptjax.train.step import head_options, hidden_states, task_inputs, within_model
from gptjax.train.task_writing import answer, figures_of, with_answers

Examples = dict[str, list[Judged]]  # by task


def _outputs(config: Config, params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    hidden_BTD, _ = hidden_states(config, params, task_inputs(batch))
    return task_outputs(config, params, hidden_BTD, within_model(batch), head_options(config))


@functools.cache
def make_output_step(config: Config, mesh: Mesh) -> Callable[..., dict[str, jax.Array]]:
    """(params, batch) -> {task: float32 [B, T, K]}, jitted; the same arguments give the same function."""
    step = jax.jit(functools.partial(_outputs, config), out_shardings=replicated(mesh))

    def run(params: Any, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
        with laid_over(mesh, config.mesh):
            return step(params, batch)

    return run


def judge(
    config: Config,
    params: Any,
    split: Split,
    examples: Sequence[Example],
    records: Mapping[str, Sequence[Record]],
    mesh: Mesh,
    max_batches: int = 0,
) -> Examples:
    """What the model says of each record, in their order; with `max_batches`, of those that are wholly in so many batches."""
    outputs = outputs_by_example(config, params, split, examples, mesh, max_batches)
    of_record: dict[tuple[str, int], list[int]] = {}
    for number, example in enumerate(examples):
        of_record.setdefault((example.task, example.record), []).append(number)
    judged: Examples = {name: [] for name in tasks_of(config)}
    for (name, number), own in of_record.items():
        if all(one in outputs for one in own):
            knobs, record = tasks_of(config)[name], records[name][number].values
            judged[name].append(TASKS[knobs.kind].judged(knobs, record, [outputs[one] for one in own]))
    return judged


def outputs_by_example(
    config: Config, params: Any, split: Split, examples: Sequence[Example], mesh: Mesh, max_batches: int = 0
) -> dict[int, np.ndarray]:
    """{example, from 0: [places with `read` 1, K] of its task's outputs}, of all rows or of those in so many batches."""
    check_divides(config, mesh)
    outputs: dict[int, np.ndarray] = {}
    for batch, found in _run(config, params, split, mesh, max_batches):
        outputs |= _by_example(examples, batch, found)
    return outputs


def _run(
    config: Config, params: Any, split: Split, mesh: Mesh, max_batches: int
) -> Iterator[tuple[dict[str, np.ndarray], dict[str, np.ndarray]]]:
    """(batch, outputs of each task) on the host; the next batch is under way before these are waited for."""
    rows = config.evaluate.batch_size or config.data.batch_size // config.train.accumulation_steps
    step = make_output_step(config, mesh)
    with use_rules(config.mesh):
        layout = batch_sharding(mesh)
    share = hosts.batch_rows(layout, rows)
    pending: Any = None
    batches = zip(eval_batches(config, split, rows, share), eval_batches(config, split, rows), strict=True)
    for number, (own, whole) in enumerate(itertools.islice(batches, max_batches or None)):
        hosts.moved("evaluation batch", number, patience=10)  # the first one compiles
        found = whole, step(params, hosts.place_batch(layout, own, rows))
        if pending is not None:
            yield pending[0], jax.tree.map(np.asarray, pending[1])
        pending = found
    if pending is not None:
        yield pending[0], jax.tree.map(np.asarray, pending[1])


def _by_example(
    examples: Sequence[Example], batch: Mapping[str, np.ndarray], outputs: Mapping[str, np.ndarray]
) -> dict[int, np.ndarray]:
    """{example, from 0: [places with `read` 1, K] of its task's outputs}."""
    rows, places = np.nonzero(batch["read"][:, :-1])
    numbers = batch["example"][rows, places] - 1
    present = np.unique(batch["example"][batch["example"] > 0]) - 1
    order = np.argsort(numbers, kind="stable")  # an example's places are in one row, and stay in order
    rows, places, numbers = rows[order], places[order], numbers[order]
    begins, ends = np.searchsorted(numbers, present), np.searchsorted(numbers, present, side="right")
    return {
        int(number): outputs[examples[number].task][rows[a:b], places[a:b]]
        for number, a, b in zip(present, begins, ends, strict=True)
    }


def evaluate_tasks(
    config: Config, params: Any, dataset: TaskDataset, mesh: Mesh, max_batches: int = 0
) -> tuple[dict[str, float | int], Examples]:
    """({"loss", "examples", and the measures of the run's only task, or TASK/NAME of each of several}, what the model said).

    `loss` is the task's, of several the mean of theirs by `loss_weight`; sums are in float64, in the order of the records.
    Answers in writing are those to the same prompts whatever `max_batches`. Where so many batches have no record whole, all are
    taken.
    """
    answers = answer(config, params, dataset.tokenizer, dataset.records["eval"], config.train.seed)
    written = figures_of(config, answers)
    splits = dataset.eval if isinstance(dataset.eval, dict) else dict.fromkeys(tasks_of(config), dataset.eval)
    judged: Examples = {}
    figures: dict[str, float | int] = {}
    nats = weight = 0.0
    for name, knobs in tasks_of(config).items():
        own_split = judge(config, params, splits[name], dataset.examples["eval"], dataset.records["eval"], mesh, max_batches)
        judged[name] = own_split[name]
        known = [one for one in judged[name] if one.weight]
        if not known and max_batches:  # a record in several windows may have them anywhere
            return evaluate_tasks(config, params, dataset, mesh)
        if not known:
            raise UserError(f"task.path: the evaluation split has no record of which is known what is right ({name}).")
        own = sum(one.nats for one in known), sum(one.weight for one in known)
        nats, weight = nats + knobs.loss_weight * own[0] / own[1], weight + knobs.loss_weight
        front = f"{name}/" if len(tasks_of(config)) > 1 else ""
        figures |= {f"{front}{key}": value for key, value in TASKS[knobs.kind].measures(knobs, known).items()}
        figures |= {f"{front}{key}": value for key, value in written.get(name, {}).items()}
        judged[name] = with_answers(config, dataset.tokenizer, name, judged[name], answers.get(name, {}))
        figures[f"{front}examples"] = len(known)
        if front:
            figures[f"{front}loss"] = own[0] / own[1]
    return {"loss": nats / weight} | figures, judged
