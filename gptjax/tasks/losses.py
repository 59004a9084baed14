"""What a batch of a run's tasks costs, and what the model says of it."""

from __future__ import annotations

import dataclasses
import zlib
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gptjax.config import Config, tasks_of
from gptjax.model.decoder import output_table
from gptjax.parallel.sharding import spec
from gptjax.tasks.base import Batch, Language, Parameter, Sums
from gptjax.tasks.heads import head_width
from gptjax.tasks.table import TASKS
from gptjax.train.loss import softmax_cross_entropy, token_nll

HEADS = "task_heads"  # where the parameters of heads stand, beside the decoder's


def init_heads(config: Config, key: jax.Array) -> dict[str, Any]:
    """{task: its head's parameters}, with their logical axes, of tasks that have a head; a function of (key, task's name)."""
    found: dict[str, Any] = {}
    for name, knobs in tasks_of(config).items():
        own = jax.random.fold_in(key, np.uint32(zlib.crc32(name.encode())))
        head = TASKS[knobs.kind].head(knobs, config.model)
        if head:
            found[name] = {
                part: _drawn(config, jax.random.fold_in(own, number), f"{HEADS}/{name}/{part}", parameter)
                for number, (part, parameter) in enumerate(head.items())
            }
    return found


def _drawn(config: Config, key: jax.Array, name: str, parameter: Parameter) -> Any:
    spec(*parameter.axes, array=f"parameter {name}")
    initializer = nn.initializers.zeros if parameter.zeros else nn.initializers.normal(config.model.init_std)
    boxed = nn.with_logical_partitioning(initializer, parameter.axes)
    return boxed(key, parameter.shape, jnp.dtype(config.model.param_dtype))


@dataclasses.dataclass(frozen=True)
class _Decoder(Language):
    """`options`: as `train.step.head_options`."""

    config: Config
    params: Any
    options: Mapping[str, Any]

    def loss(self, hidden_BTD: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array) -> Sums:
        o = self.config.objective
        loss, parts = softmax_cross_entropy(
            hidden_BTD,
            output_table(self.params, self.config.model),
            targets_BT,
            weights_BT,
            label_smoothing=o.label_smoothing,
            z_loss=o.z_loss,
            **self.options,
        )
        return Sums(loss, parts["nll_sum"], parts["weight_sum"])

    def nll(self, hidden_BTD: jax.Array, targets_BT: jax.Array) -> jax.Array:
        return token_nll(hidden_BTD, output_table(self.params, self.config.model), targets_BT, **self.options)


def _of_tasks(config: Config, params: Any, batch: Batch) -> Iterator[tuple[str, Any, Any, Batch]]:
    """(name, knobs, head's parameters, its part of the batch) of each task."""
    for number, (name, knobs) in enumerate(tasks_of(config).items(), 1):
        columns = {key.removeprefix(f"{name}/"): array for key, array in batch.items() if key.startswith(f"{name}/")}
        shared = {key: batch[key] for key in ("tokens", "segment_ids", "positions", "example")}
        read = batch["read"] * (batch["task"] == number)
        yield name, knobs, params.get(HEADS, {}).get(name, {}), shared | {"read": read} | columns


def task_losses(
    config: Config,
    params: Any,
    hidden_BTD: jax.Array,
    batch: Batch,
    options: Mapping[str, Any],
    shares: Mapping[str, float] | None = None,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(sum of the weighted losses of all tasks, its parts); arrays of `batch` are [B, T, ...]. `shares`: the tasks that count,
    and what their loss is multiplied by; None: all, and 1.

    Of several tasks the unit is not a target but a row: with W_t targets of task t in the n_t rows that it has in the whole
    batch, a target costs `loss_weight` * n_t / W_t (`with_units`). So a task counts by its share of the rows, however many
    targets a row of it has.
    """
    language = _Decoder(config, params, options)
    total = Sums(*(jnp.float32(0),) * 3)
    parts: dict[str, jax.Array] = {}
    for name, knobs, head, own in _of_tasks(config, params, batch):
        if shares is not None and name not in shares:
            continue
        sums = TASKS[knobs.kind].loss(knobs, head, hidden_BTD, own, language)
        if config.task.mixture:
            nll = jax.lax.stop_gradient(sums.nll)
            parts |= {f"tasks/{name}/nll_sum": nll, f"tasks/{name}/weight_sum": sums.weight}
            unit = own["unit"].max()
            sums = Sums(knobs.loss_weight * unit * sums.loss, unit * sums.nll, unit * sums.weight)
        if shares is not None:
            sums = sums._replace(loss=shares[name] * sums.loss)
        total = Sums(*(a + b for a, b in zip(total, sums, strict=True)))
    return total.loss, parts | {"nll_sum": jax.lax.stop_gradient(total.nll), "weight_sum": total.weight}


def with_units(config: Config, params: Any, batch: Batch, options: Mapping[str, Any]) -> Batch:
    """The whole batch of a step, arrays [B, T + 1, ...], with what a target of each task counts there in rows: float32
    "TASK/unit", at the places of the task's rows, so that it is cut into micro-batches like everything else.
    """
    if not config.task.mixture:
        return batch
    language = _Decoder(config, params, options)
    inner = {name: array[:, :-1] for name, array in batch.items()}
    # Of these losses only the weights are used, which depend on no parameter: the compiler leaves the rest out.
    hidden_BTD = jnp.zeros((*inner["tokens"].shape, head_width(config.model)), jnp.dtype(config.model.dtype))
    units: dict[str, jax.Array] = {}
    for number, (name, knobs, head, own) in enumerate(_of_tasks(config, params, inner), 1):
        of_task_BT = batch["task"] == number
        rows = of_task_BT.any(axis=1).sum().astype(jnp.float32)
        weight = TASKS[knobs.kind].loss(knobs, head, hidden_BTD, own, language).weight
        units[f"{name}/unit"] = of_task_BT * (rows / jnp.maximum(weight, 1.0))
    return dict(batch) | units


def task_figures(sums: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """{"tasks/NAME/nll", "tasks/NAME/weight"} of a step's batch, of each of several tasks; nll is 0 where it has none there."""
    names = [key.split("/")[1] for key in sums if key.startswith("tasks/") and key.endswith("/weight_sum")]
    found: dict[str, jax.Array] = {}
    for name in names:
        weight = sums[f"tasks/{name}/weight_sum"]
        found[f"tasks/{name}/nll"] = sums[f"tasks/{name}/nll_sum"] / jnp.maximum(weight, 1.0)
        found[f"tasks/{name}/weight"] = weight
    return found


def task_outputs(
    config: Config, params: Any, hidden_BTD: jax.Array, batch: Batch, options: Mapping[str, Any]
) -> dict[str, jax.Array]:
    """{task: float32 [B, T, K]}, what its `judged` reads."""
    language = _Decoder(config, params, options)
    return {
        name: TASKS[knobs.kind].outputs(knobs, head, hidden_BTD, own, language)
        for name, knobs, head, own in _of_tasks(config, params, batch)
    }
