"""All groups of knobs in one."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass

from gptjax.config.data import DataConfig
from gptjax.config.knobs import UserError, knob
from gptjax.config.model import ModelConfig
from gptjax.config.objective import ObjectiveConfig
from gptjax.config.optimizer import OptimizerConfig
from gptjax.config.run import CheckpointConfig, EvaluateConfig, MeshConfig, MetricsConfig, TrainConfig


@dataclass(frozen=True)
class Config:
    """A whole run. Checks that join several knobs are in `check`."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    mesh: MeshConfig = MeshConfig()
    init_from: str = knob(
        "", "A run's folder or a Hugging Face folder whose parameters the run starts from; empty: from scratch."
    )

    @property
    def tokens_per_step(self) -> int:
        """Predicted positions in one step, padding included."""
        return self.data.batch_size * self.data.seq_len

    def duration(self, group: str, name: str, steps_per_epoch: float, default: int = 0) -> int:
        """Steps of `{group}.{name}_steps|_tokens|_epochs`; `default` where none is given.

        Tokens and epochs round up to a whole step.
        """
        section = getattr(self, group)
        steps = getattr(section, f"{name}_steps")
        tokens = getattr(section, f"{name}_tokens")
        epochs = getattr(section, f"{name}_epochs")
        if steps:
            return steps
        if tokens:
            return math.ceil(tokens / self.tokens_per_step)
        return math.ceil(epochs * steps_per_epoch) if epochs else default

    def with_vocab_size(self, tokenizer_vocab_size: int) -> Config:
        """The config with the embedding's rows settled. Raises `UserError` where the tokenizer has more ids than the model."""
        rows = self.model.vocab_size or tokenizer_vocab_size
        if rows < tokenizer_vocab_size:
            raise UserError(
                f"model.vocab_size={rows} is smaller than the tokenizer's {tokenizer_vocab_size} ids; set it to 0 or to that."
            )
        return dataclasses.replace(self, model=dataclasses.replace(self.model, vocab_size=rows))
