"""The batches of a run's steps on its devices, each with the compiled step that takes it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from gptjax.config import Config, Stages, UserError
from gptjax.data.pipeline import Mixture, Split, steps_per_epoch, train_batches
from gptjax.parallel import hosts
from gptjax.parallel.mesh import check_divides
from gptjax.parallel.sharding import batch_sharding, use_rules
from gptjax.train.optimizers import Lengths
from gptjax.train.step import make_train_step


def step_batches(
    config: Config, split: Split | Mixture, lengths: Lengths, mesh: Mesh, start_step: int, skipped_rows: int = 0
) -> Iterator[tuple[Callable[..., Any], dict[str, jax.Array]]]:
    """(compiled step, batch) of each step after `start_step`, without end. `skipped_rows`: passed over before it."""
    stages, step = config.stages(steps_per_epoch(config, split)), start_step
    with use_rules(config.mesh):
        sharding = batch_sharding(mesh)
    while True:
        stage = stages.at(step)
        of_stage = config.at_stage(stage)
        size, pieces = of_stage.data.batch_size, of_stage.data.batch_size // stage.batch_size
        share = np.unique(hosts.batch_rows(sharding, size) // pieces)
        train_step = make_train_step(of_stage, lengths, mesh)
        for batch in train_batches(config, split, step, share, skipped_rows):
            yield train_step, hosts.place_batch(sharding, batch, size)
            step += 1


def check_steps_divide(config: Config, stages: Stages, mesh: Mesh) -> None:
    """Raises `UserError` where the batch of a stage does not divide over the mesh. Rows that are cut stay on their device."""
    check_divides(config, mesh)
    for stage in stages.every[:-1]:
        data = dataclasses.replace(config.data, batch_size=stage.batch_size, seq_len=stage.seq_len)
        try:
            check_divides(dataclasses.replace(config, data=data), mesh)
        except UserError as error:
            raise UserError(f"in the warm-up's steps of {stage.batch_size} rows of {stage.seq_len} tokens, {error}") from None
