"""Knobs of the optimizer."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from gptjax.config.knobs import UserError, duration, knob

if TYPE_CHECKING:
    from gptjax.config.schema import Config


@dataclass(frozen=True)
class OptimizerConfig:
    """Gradients to updates."""

    name: str = knob(
        "adamw",
        "Update rule.",
        choices=(
            "adamw",
            "lion",
            "adafactor",
            "sgd",
            "muon",
            "schedule_free_adamw",
            "soap",
            "sophia",
            "prodigy",
            "ademamix",
        ),
    )
    learning_rate: float = knob(
        1e-3, "Peak learning rate; prodigy: a factor of the rate that it finds by itself, 1 being usual.", at_least=0
    )
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
    groups: tuple[str, ...] = knob(
        (),
        "Factors of the learning rate and of the weight decay by parameter, each REGEX=lr:FACTOR, REGEX=decay:FACTOR or both, "
        "such as embed=lr:0.1+decay:0; the first whose regular expression is found in a parameter's path counts.",
    )
    freeze: tuple[str, ...] = knob(
        (), "Regular expressions; a parameter whose path one of them is found in never changes and has no optimizer state."
    )
    freeze_layers: tuple[str, ...] = knob(
        (), "Numbers of layers from 0, such as 7 or 0-3 (both ends included), whose parameters never change."
    )
    cautious: bool = knob(
        False,
        "Drop the elements of an update that go against the gradient's sign, and scale up the others (Liang et al., 2024).",
    )
    soap_refresh_every: int = knob(
        10, "soap: updates between two refreshes of the eigenbases, each one step of orthogonal iteration.", at_least=1
    )
    soap_max_dim: int = knob(8192, "soap: a side of a matrix longer than this keeps its own axes as the basis.", at_least=1)
    sophia_estimate_every: int = knob(
        10, "sophia: updates between two estimates of the curvature, each of which costs about one and a third steps.", at_least=1
    )
    sophia_gamma: float = knob(
        0.05, "sophia: what the curvature is multiplied by before the momentum is divided by it and clipped at 1.", above=0
    )
    prodigy_initial_rate: float = knob(1e-6, "prodigy: the rate that its estimate starts from; it only grows.", above=0)
    ademamix_alpha: float = knob(5.0, "ademamix: weight of the slow average of gradients.", at_least=0)
    ademamix_beta3: float = knob(
        0.9999,
        "ademamix: decay of the slow average of gradients; its half-life, 6,931 steps by default, must be well below the run's "
        "length (0.999: 693 steps), or early gradients outweigh all others at its end.",
        above=0,
        below=1,
    )
    ademamix_warmup_fraction: float = knob(
        1.0,
        "ademamix: share of the run over which the slow average's weight rises from 0 and its decay from beta1; 0: at once.",
        at_least=0,
        at_most=1,
    )
    clip_norm: float = knob(1.0, "Gradients are scaled to at most this global norm; 0: never.", at_least=0)
    state_dtype: str = knob(
        "float32",
        "How moments are stored between steps, rounded at random in proportion: float32, bfloat16, or int8, codes with a "
        "scale for each block of 256 (Dettmers et al., 2022).",
        choices=("float32", "bfloat16", "int8"),
    )
    ema_decay: float = knob(0.0, "Decay of a moving average of parameters, used for evaluation; 0: none.", at_least=0, below=1)


class Group(NamedTuple):
    """Factors of the rate and the weight decay, for the parameters in whose path `pattern` is found."""

    pattern: str
    rate: float
    decay: float


def parameter_groups(optimizer: OptimizerConfig) -> tuple[Group, ...]:
    """`optimizer.groups`, read. Raises `UserError` for a text that says no group."""
    return tuple(_group(text) for text in optimizer.groups)


def _group(text: str) -> Group:
    pattern, equals, settings = text.rpartition("=")
    factors = {"lr": 1.0, "decay": 1.0}
    for setting in settings.split("+"):
        name, colon, number = setting.partition(":")
        try:
            factors[name] = float(number)
        except ValueError:
            colon = ""
        if not (pattern and equals and colon and set(factors) == {"lr", "decay"} and 0 <= factors[name] < float("inf")):
            raise UserError(
                f"optimizer.groups: {text!r} must be REGEX=lr:FACTOR, REGEX=decay:FACTOR or REGEX=lr:FACTOR+decay:FACTOR, with "
                "factors of at least 0."
            )
    _check_pattern("optimizer.groups", pattern)
    return Group(pattern, factors["lr"], factors["decay"])


def frozen_layers(optimizer: OptimizerConfig, num_layers: int) -> frozenset[int]:
    """The layers of `optimizer.freeze_layers`. Raises `UserError` for one that a model of so many layers lacks."""
    found: set[int] = set()
    for text in optimizer.freeze_layers:
        match = re.fullmatch(r"(\d+)(?:-(\d+))?", text)
        if not match:
            raise UserError(f"optimizer.freeze_layers: {text!r} must be a layer's number, or FIRST-LAST.")
        first, last = int(match[1]), int(match[2] or match[1])
        if not first <= last < num_layers:
            raise UserError(
                f"optimizer.freeze_layers: {text!r} must be in ascending order and within model.num_layers={num_layers}, which "
                f"has layers 0 to {num_layers - 1}."
            )
        found.update(range(first, last + 1))
    return frozenset(found)


def _check_pattern(key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UserError(f"{key}: {pattern!r} is not a regular expression: {error}.") from None


# Rules whose step is no multiple of one direction that could be compared with the gradient: they measure or average what
# became of it.
NOT_CAUTIOUS = ("schedule_free_adamw", "prodigy")

# Optimizers whose state may be stored in fewer bits: averages that forget. Others hold factors, or sums over the whole run.
COMPRESSIBLE = ("adamw", "lion", "muon", "sgd")


def check(config: Config) -> None:
    """Raises `UserError` for optimizer knobs that don't go together."""
    optimizer = config.optimizer
    if optimizer.name in ("schedule_free_adamw", "ademamix") and not optimizer.beta1:
        raise UserError(f"optimizer.beta1=0 leaves nothing to average; optimizer.name={optimizer.name} needs it above 0.")
    if optimizer.cautious and optimizer.name in NOT_CAUTIOUS:
        raise UserError(
            f"optimizer.cautious=True does not go with optimizer.name={optimizer.name}, whose step rests on what became of the "
            "steps before it."
        )
    if optimizer.name == "sophia" and (heads := config.model.prediction_heads) > 1:
        raise UserError(
            f"optimizer.name=sophia estimates curvature from targets that the model draws, of which "
            f"model.prediction_heads={heads} would need one for each head; change one of them."
        )
    for key in ("no_decay", "freeze"):
        for pattern in getattr(optimizer, key):
            _check_pattern(f"optimizer.{key}", pattern)
    parameter_groups(optimizer)
    frozen_layers(optimizer, config.model.num_layers)
    if optimizer.schedule == "wsd" and not (optimizer.decay_steps or optimizer.decay_tokens or optimizer.decay_epochs):
        raise UserError(
            "optimizer.schedule=wsd needs the length of its final fall: set optimizer.decay_steps, decay_tokens or decay_epochs."
        )
    if optimizer.state_dtype != "float32" and optimizer.name not in COMPRESSIBLE:
        raise UserError(
            f"optimizer.state_dtype={optimizer.state_dtype} does not go with optimizer.name={optimizer.name}, whose state is not "
            f"made of moments alone; {', '.join(COMPRESSIBLE)} take it."
        )
