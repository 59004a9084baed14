"""All groups of knobs in one."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from gptjax.config.adapter import AdapterConfig
from gptjax.config.data import DataConfig
from gptjax.config.knobs import UserError, knob
from gptjax.config.model import ModelConfig
from gptjax.config.objective import ObjectiveConfig
from gptjax.config.optimizer import OptimizerConfig
from gptjax.config.run import CheckpointConfig, EvaluateConfig, MeshConfig, MetricsConfig, TrainConfig
from gptjax.config.stages import Stage, Stages, doubling, doublings
from gptjax.config.task import TaskConfig


@dataclass(frozen=True)
class Config:
    """A whole run. Checks that join several knobs are in `check`."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    task: TaskConfig = TaskConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    adapter: AdapterConfig = AdapterConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    mesh: MeshConfig = MeshConfig()
    init_from: str = knob(
        "", "A run's folder or a Hugging Face folder whose parameters the run starts from; empty: from scratch."
    )
    init_model: bool = knob(
        False,
        "Take the group `model` and the tokenizer from init_from: in place of what the recipe says, and before what is set by "
        "--config.",
    )

    @property
    def tokens_per_step(self) -> int:
        """Predicted positions in one step of the full size, padding included."""
        return self.data.batch_size * self.data.seq_len

    def duration(self, group: str, name: str, steps_per_epoch: float, default: int = 0, until: int | None = None) -> int:
        """Steps of `{group}.{name}_steps|_tokens|_epochs`, `default` where none is given; counted from the run's start, or back
        from step `until`.

        Tokens and epochs round up to a whole step; while the batch size rises they take more steps.
        """
        steps, batches = self._span(group, name, steps_per_epoch)
        if steps or not batches:
            return steps or default
        stages = self.stages(steps_per_epoch)
        return stages.steps(batches) if until is None else stages.last_steps(batches, until)

    def is_due(self, group: str, step: int, steps_per_epoch: float, default: int = 0) -> bool:
        """Whether `{group}.every_steps|_tokens|_epochs` (`default` steps where none is given; 0: never) has come round with
        `step`. Intervals in tokens and epochs are of whole batches of the full size.
        """
        steps, batches = self._span(group, "every", steps_per_epoch)
        if batches:
            stages, every = self.stages(steps_per_epoch), math.ceil(batches)
            return stages.batches(step) // every > stages.batches(step - 1) // every
        every = steps or default
        return every > 0 and step % every == 0

    def _span(self, group: str, name: str, steps_per_epoch: float) -> tuple[int, float]:
        """(steps, batches of the full size), of which the one that is given is not 0."""
        section = getattr(self, group)
        tokens, epochs = getattr(section, f"{name}_tokens"), getattr(section, f"{name}_epochs")
        return getattr(section, f"{name}_steps"), tokens / self.tokens_per_step if tokens else epochs * steps_per_epoch

    def stages(self, steps_per_epoch: float) -> Stages:
        """What the steps take: one stage, or those of the warm-ups of batch size and sequence length."""
        data, train = self.data, self.train
        batches: dict[int, int] = {}
        lengths: dict[int, int] = {}
        if train.batch_warmup_start:
            steps, taken = self._span("train", "batch_warmup", steps_per_epoch)
            # Of k stages of n steps, n * (1 / 2 + 1 / 4 + ... + 1 / 2**k) = n * (1 - start / batch_size) full batches.
            stage_steps = math.ceil(
                steps / doublings(train.batch_warmup_start, data.batch_size)
                if steps
                else taken / (1 - train.batch_warmup_start / data.batch_size)
            )
            batches = doubling(train.batch_warmup_start, data.batch_size, stage_steps)
        if train.seq_len_warmup_start:
            steps, taken = self._span("train", "seq_len_warmup", steps_per_epoch)
            steps = steps or Stages.of(data.batch_size, data.seq_len, batches, {}).steps(taken)
            stage_steps = math.ceil(steps / doublings(train.seq_len_warmup_start, data.seq_len))
            lengths = doubling(train.seq_len_warmup_start, data.seq_len, stage_steps)
        return Stages.of(data.batch_size, data.seq_len, batches, lengths)

    def at_stage(self, stage: Stage) -> Config:
        """The config of a stage's steps: rows as they are given to the model."""
        pieces = self.data.seq_len // stage.seq_len
        data = dataclasses.replace(self.data, batch_size=stage.batch_size * pieces, seq_len=stage.seq_len)
        return dataclasses.replace(self, data=data)

    def with_vocab_size(self, tokenizer_vocab_size: int) -> Config:
        """The config with the embedding's rows settled. Raises `UserError` where the tokenizer has more ids than the model."""
        rows = self.model.vocab_size or tokenizer_vocab_size
        if rows < tokenizer_vocab_size:
            raise UserError(
                f"model.vocab_size={rows} is smaller than the tokenizer's {tokenizer_vocab_size} ids; set it to 0 or to that."
            )
        return dataclasses.replace(self, model=dataclasses.replace(self.model, vocab_size=rows))
