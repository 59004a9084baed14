"""Knobs of the optimizer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptjax.config.knobs import UserError, duration, knob

if TYPE_CHECKING:
    from gptjax.config.schema import Config


@dataclass(frozen=True)
class OptimizerConfig:
    """Gradients to updates."""

    name: str = knob("adamw", "Update rule.", choices=("adamw", "lion", "adafactor", "sgd", "muon", "schedule_free_adamw"))
    learning_rate: float = knob(1e-3, "Peak learning rate.", at_least=0)
    schedule: str = knob(
        "cosine", "Learning rate after the warm-up.", choices=("constant", "cosine", "linear", "wsd", "inverse_sqrt")
    )
    warmup_steps: int = duration("steps", "Linear rise from 0")
    warmup_tokens: int = duration("tokens", "Linear rise from 0")
    warmup_epochs: float = duration("epochs", "Linear rise from 0")
    decay_steps: int = duration(
        "steps",
        "cosine, linear: steps from 0 at which the floor is reached (not given: the run's end); wsd: length of the final fall",
    )
    decay_tokens: int = duration("tokens", "The same")
    decay_epochs: float = duration("epochs", "The same")
    final_fraction: float = knob(0.1, "The schedule's floor as a share of learning_rate.", at_least=0, at_most=1)
    beta1: float = knob(0.9, "Decay of the first moment; sgd: momentum.", at_least=0, below=1)
    beta2: float = knob(0.95, "Decay of the second moment.", at_least=0, below=1)
    epsilon: float = knob(1e-8, "Added to the second moment's root.", above=0)
    weight_decay: float = knob(0.1, "Decoupled weight decay.", at_least=0)
    no_decay: tuple[str, ...] = knob(
        ("norm", "bias", "embed"), "Regular expressions; a parameter whose path one of them matches has no weight decay."
    )
    muon_adam_learning_rate: float = knob(
        3e-4, "muon: learning rate of embeddings, head, norms and biases, which take AdamW.", at_least=0
    )
    clip_norm: float = knob(1.0, "Gradients are scaled to at most this global norm; 0: never.", at_least=0)
    state_dtype: str = knob(
        "float32",
        "How moments are stored between steps, rounded at random in proportion: float32, bfloat16, or int8, codes with a "
        "scale for each block of 256 (Dettmers et al., 2022).",
        choices=("float32", "bfloat16", "int8"),
    )
    ema_decay: float = knob(0.0, "Decay of a moving average of parameters, used for evaluation; 0: none.", at_least=0, below=1)


# Optimizers whose state may be stored in fewer bits: averages that forget. Others hold factors, or sums over the whole run.
COMPRESSIBLE = ("adamw", "lion", "muon", "sgd")


def check(config: Config) -> None:
    """Raises `UserError` for optimizer knobs that don't go together."""
    optimizer = config.optimizer
    if optimizer.name == "schedule_free_adamw" and not optimizer.beta1:
        raise UserError("optimizer.beta1=0 leaves nothing to average; optimizer.name=schedule_free_adamw needs it above 0.")
    if optimizer.schedule == "wsd" and not (optimizer.decay_steps or optimizer.decay_tokens or optimizer.decay_epochs):
        raise UserError(
            "optimizer.schedule=wsd needs the length of its final fall: set optimizer.decay_steps, decay_tokens or decay_epochs."
        )
    if optimizer.state_dtype != "float32" and optimizer.name not in COMPRESSIBLE:
        raise UserError(
            f"optimizer.state_dtype={optimizer.state_dtype} does not go with optimizer.name={optimizer.name}, whose state is not "
            f"made of moments alone; {', '.join(COMPRESSIBLE)} take it."
        )
