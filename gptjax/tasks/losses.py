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
        shared = {key: batch[key] for key in ("tokens", "segment_ids", "positions")}
        read = batch["read"] * (batch["task"] == number)
        yield name, knobs, params.get(HEADS, {}).get(name, {}), shared | {"read": read} | columns


def task_losses(
    config: Config, params: Any, hidden_BTD: jax.Array, batch: Batch, options: Mapping[str, Any]
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(sum of the weighted losses of all tasks, its parts); arrays of `batch` are [B, T, ...]."""
    language = _Decoder(config, params, options)
    total = Sums(*(jnp.float32(0),) * 3)
    for _, knobs, head, own in _of_tasks(config, params, batch):
        sums = TASKS[knobs.kind].loss(knobs, head, hidden_BTD, own, language)
        total = Sums(*(a + b for a, b in zip(total, sums, strict=True)))
    return total.loss, {"nll_sum": jax.lax.stop_gradient(total.nll), "weight_sum": total.weight}


def task_outputs(
    config: Config, params: Any, hidden_BTD: jax.Array, batch: Batch, options: Mapping[str, Any]
) -> dict[str, jax.Array]:
    """{task: float32 [B, T, K]}, what its `judged` reads."""
    language = _Decoder(config, params, options)
    return {
        name: TASKS[knobs.kind].outputs(knobs, head, hidden_BTD, own, language)
        for name, knobs, head, own in _of_tasks(config, params, batch)
    }
