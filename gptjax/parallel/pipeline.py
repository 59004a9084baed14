"""The stacked layers as a pipeline over mesh axis `stage`: GPipe's schedule (Huang et al., 2019) through a shifting buffer.

Layers stay stacked in their one order: stage s of S holds layers s * L/S up to (s + 1) * L/S. A batch is cut into M
micro-batches. At tick t stage s works on micro-batch t - s, then hands its result to stage s + 1; after M + S - 1 ticks all are
through. All stages work at once because they are one batched computation: the buffer has a leading dimension of S that lies over
the mesh axis, and shifting it by one is what moves activations between devices. (GSPMD, Xu et al., 2021, section 3.3.)

Axis letters as in model/decoder.py, and S: stages, M: micro-batches, b: rows of a micro-batch, B / M.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.config import MeshConfig, UserError
from gptjax.parallel.sharding import axis_size, constrain

AXIS = "stage"

# What an idle stage finds in the buffer. It reaches no result and no gradient: tests put NaN here.
EMPTY = 0.0


def num_micro_batches(config: MeshConfig, stages: int) -> int:
    """M of a pipeline with so many stages; 1 where there is no pipeline."""
    return config.micro_batches or stages if stages > 1 else 1


def bubble_fraction(stages: int, micro_batches: int, repeats: int = 1) -> float:
    """Share of the pipeline's time in which a stage has nothing to do: (S - 1) / (M * repeats + S - 1).

    `repeats`: times that a micro-batch goes round all stages; 1 in `pipelined`, more in circular schedules (Narayanan et al.,
    2021, section 2.2, where it is v).
    """
    return (stages - 1) / (micro_batches * repeats + stages - 1)


def pipelined(
    layers: Callable[..., tuple[jax.Array, Any]],
    params: Any,
    x_BTD: jax.Array,
    per_row: Any,
    micro_batches: int,
) -> tuple[jax.Array, Any]:
    """(`x_BTD` through all L layers, [B, T, D]; the layers' sums, [L, ...]), over the `stage` axis of the mesh that is set.

    `layers(their parameters, their numbers, x_bTD, per_row)` are those of one stage and give (x_bTD, sums over the rows: a tree
    of arrays [L/S, ...], or None), the latter added up over micro-batches. Leaves of `params` are [L, ...]; those of `per_row`
    [B, ...] go with their rows through all layers, unchanged.
    Raises `UserError` where B does not divide into micro-batches.
    """
    stages, rows = axis_size(AXIS), x_BTD.shape[0]
    if rows % micro_batches:
        raise UserError(f"{rows} rows do not divide into mesh.micro_batches={micro_batches}; change one of them.")
    numbers_L = jnp.arange(jax.tree.leaves(params)[0].shape[0])
    own_S = jax.tree.map(lambda leaf: leaf.reshape(stages, -1, *leaf.shape[1:]), (params, numbers_L))

    # Row r goes to micro-batch r % M, so that a device's share of the batch stays on it.
    x_MbTD, per_row_M = jax.tree.map(
        lambda leaf: leaf.reshape(rows // micro_batches, micro_batches, *leaf.shape[1:]).swapaxes(0, 1), (x_BTD, per_row)
    )
    micro_batch_tS = jnp.arange(micro_batches + stages - 1)[:, None] - jnp.arange(stages)
    is_busy_tS = (micro_batch_tS >= 0) & (micro_batch_tS < micro_batches)
    is_first_S111, is_last_S111 = ((jnp.arange(stages) == s)[:, None, None, None] for s in (0, stages - 1))
    # Fed to the first stage and taken from the last as whole arrays with a dimension S, so that they cross the mesh once a step,
    # not once a tick.
    fed_MSbTD = constrain(jnp.where(is_first_S111, x_MbTD[:, None], 0), None, "stages", "batch", "length", None)
    fed_tSbTD = jnp.pad(fed_MSbTD, ((0, stages - 1), *[(0, 0)] * 4), constant_values=EMPTY)

    def tick(arrived_SbTD: jax.Array, now: tuple[jax.Array, ...]) -> tuple[jax.Array, tuple[jax.Array, Any]]:
        micro_batch_S, is_busy_S, fed_SbTD = now
        # An idle stage works on zeros: its result is never used, and what is finite times a gradient of 0 is 0.
        x_SbTD = jnp.where(is_busy_S[:, None, None, None], jnp.where(is_first_S111, fed_SbTD, arrived_SbTD), 0)
        here_S = jax.tree.map(lambda leaf: jnp.take(leaf, micro_batch_S, axis=0, mode="clip"), per_row_M)
        here_S = jax.tree.map(lambda leaf: constrain(leaf, "stages", "batch", *[None] * (leaf.ndim - 2)), here_S)
        x_SbTD = constrain(x_SbTD, "stages", "batch", "length", None)
        y_SbTD, sums_S = jax.vmap(layers, spmd_axis_name=AXIS)(*own_S, x_SbTD, here_S)
        y_SbTD = constrain(y_SbTD, "stages", "batch", "length", None)
        return jnp.roll(y_SbTD, 1, axis=0), (y_SbTD, sums_S)

    empty_SbTD = jnp.full((stages, *x_MbTD.shape[1:]), EMPTY, x_BTD.dtype)
    _, (y_tSbTD, sums_tS) = jax.lax.scan(tick, empty_SbTD, (micro_batch_tS, is_busy_tS, fed_tSbTD))
    y_MbTD = jnp.where(is_last_S111, y_tSbTD[stages - 1 :], 0).sum(1)
    y_BTD = constrain(y_MbTD.swapaxes(0, 1).reshape(x_BTD.shape), "batch", "length", None)

    def total(leaf_tS: jax.Array) -> jax.Array:
        is_busy = is_busy_tS.reshape(is_busy_tS.shape + (1,) * (leaf_tS.ndim - 2))
        return jnp.where(is_busy, leaf_tS, 0).sum(0).reshape(-1, *leaf_tS.shape[3:])

    return y_BTD, jax.tree.map(total, sums_tS)
