"""Whose a step's loss and gradient are: loss by target and by example, squared norms by parameter and layer.

Letters as in the decoder: B rows, T positions, L layers; G documents or examples of a batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from gptjax.config import Config
from gptjax.model.decoder import output_table
from gptjax.parallel.sharding import laid_over, replicated
from gptjax.tasks.losses import task_losses, with_units
from gptjax.train.groups import hide_frozen, without_frozen
from gptjax.train.loss import token_nll
from gptjax.train.objectives import OBJECTIVES
from gptjax.train.run import named_leaves
from gptjax.train.state import TrainState
from gptjax.train.step import (
    Batch,
    example_loss,
    head_options,
    hidden_states,
    step_dropout_keys,
    summed_gradients,
    task_inputs,
    within_model,
)

LAYERS = ("layers/", "adapters/layers/")  # parameters with a leading axis of layers


def target_losses(config: Config, mesh: Mesh, state: TrainState, batch: Batch) -> tuple[np.ndarray, ...]:
    """float32 [B, T] of the step that `batch` is for: (loss, nll, weight) of each target, with the step's own dropout.

    The step's loss is sum(weight * loss) / sum(weight). It is linear in the weights, so what a target costs is the derivative by
    its weight: label smoothing, z-loss, further prediction heads (which predict the same target from further away) and the
    routers' losses (the same for each target) are in it, by the code that trains.
    """

    return _on_mesh(_target_losses, config, mesh)(state, batch)


def _target_losses(config: Config, state: TrainState, batch: Batch) -> Any:
    def of_batch(params: Any, batch: Batch, keys: Any) -> tuple[jax.Array, ...]:
        example = OBJECTIVES[config.objective.name](batch)

        def loss_of(weights_BT: jax.Array) -> jax.Array:
            return example_loss(config, params, example._replace(weights=weights_BT), keys)[0]

        hidden_BTD, _ = hidden_states(config, params, example, keys)
        nll_BT = token_nll(hidden_BTD, output_table(params, config.model), example.targets, **head_options(config))
        return jax.grad(loss_of)(example.weights), nll_BT, example.weights

    found = _by_micro_batch(config, state, batch, of_batch)
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), found)


def group_losses(
    config: Config, mesh: Mesh, state: TrainState, batch: Batch, groups_BT: np.ndarray, count: int
) -> tuple[np.ndarray, ...]:
    """float32 [G]: (sum of the losses, of the nats, of the weights) of each of the tasks' examples in a step's batch.

    `groups_BT` int32 [B, T + 1]: which example a place is of, 1 to `count`, 0 for none. What a task costs is asked of each
    example alone, everything that the others want being taken away.
    """
    batch = dict(batch) | {"group": jax.device_put(jnp.asarray(groups_BT), batch["tokens"].sharding)}
    return _on_mesh(_group_losses, config, mesh, count)(state, batch)


def _group_losses(config: Config, count: int, state: TrainState, batch: Batch) -> Any:
    options = head_options(config)

    def of_batch(params: Any, batch: Batch, keys: Any) -> tuple[jax.Array, ...]:
        hidden_BTD, _ = hidden_states(config, params, task_inputs(batch), keys)
        inner = within_model(batch)

        def of_group(number: jax.Array) -> tuple[jax.Array, ...]:
            loss, parts = task_losses(config, params, hidden_BTD, _alone(inner, number), options)
            return loss, parts["nll_sum"], parts["weight_sum"]

        return jax.lax.map(of_group, jnp.arange(1, count + 1))

    whole = dict(with_units(config, state.params, batch, options))
    return jax.tree.map(lambda x: x.sum(0), _by_micro_batch(config, state, whole, of_batch))


def _alone(batch: Batch, group: jax.Array) -> Batch:
    """The batch with nothing wanted anywhere but in one group; what the model reads, and a target's unit, stay."""
    own = batch["group"] == group

    def of(name: str, array: jax.Array) -> jax.Array:
        if name in ("tokens", "segment_ids", "positions") or name.endswith("/unit"):
            return array
        return jnp.where(own.reshape(*own.shape, *(1,) * (array.ndim - 2)), array, jnp.zeros_like(array))

    return {name: of(name, array) for name, array in batch.items() if name != "group"}


def _by_micro_batch(config: Config, state: TrainState, batch: Batch, of_batch: Callable[..., Any]) -> Any:
    """What `of_batch(params, batch, dropout keys)` gives for each micro-batch of a step, stacked; row r is in micro-batch
    r % parts, as in `summed_gradients`.
    """
    parts = config.train.accumulation_steps
    whole = (dict(batch), step_dropout_keys(config, state.seed, state.step))
    split = jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), whole)
    return jax.lax.map(lambda rows: of_batch(state.params, *rows), split)


# --- norms --------------------------------------------------------------------------------------------------------------------


def gradient_squares(config: Config, mesh: Mesh, state: TrainState, batch: Batch) -> dict[str, dict[str, np.ndarray]]:
    """{"gradient", "parameters"}: {parameter: float32 [L], or [] where it is no layer's} sums of squares of what is trained.

    Of the mean loss's gradient before clipping, and of the parameters before the step.
    """

    return _on_mesh(_gradient_squares, config, mesh)(state, batch)


def _gradient_squares(config: Config, state: TrainState, batch: Batch) -> Any:
    gradients, sums = summed_gradients(config, state.params, batch, step_dropout_keys(config, state.seed, state.step))
    mean = jax.tree.map(lambda g: g / jnp.maximum(sums["weight_sum"], 1.0), without_frozen(config, gradients))
    return {"gradient": _squares(config, mean), "parameters": _squares(config, state.params)}


def update_squares(config: Config, mesh: Mesh, before: Any, after: Any) -> dict[str, np.ndarray]:
    """The same of what a step added to the parameters."""
    return _on_mesh(_update_squares, config, mesh)(before, after)


def _update_squares(config: Config, before: Any, after: Any) -> Any:
    return _squares(config, jax.tree.map(lambda a, b: a.astype(jnp.float32) - b.astype(jnp.float32), after, before))


def _squares(config: Config, tree: Any) -> dict[str, jax.Array]:
    def of(name: str, leaf: jax.Array) -> jax.Array:
        first = 1 if name.startswith(LAYERS) else 0
        return jnp.square(leaf.astype(jnp.float32)).sum(tuple(range(first, leaf.ndim)))

    return {name: of(name, leaf) for name, leaf in named_leaves(hide_frozen(config, tree)).items()}


@functools.cache
def _on_mesh(function: Callable[..., Any], config: Config, mesh: Mesh, *sizes: int) -> Callable[..., Any]:
    """`function(config, *sizes, ...)`, compiled for the mesh, its results on the host of every process; the same arguments give
    the same function.
    """
    compiled = jax.jit(functools.partial(function, config, *sizes), out_shardings=replicated(mesh))

    def run(*arguments: Any) -> Any:
        with laid_over(mesh, config.mesh):
            return jax.tree.map(np.asarray, compiled(*arguments))

    return run
