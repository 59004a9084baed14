"""A family file: what `get_family()` returns, and the runs that it stands for.

    Family(
        recipe="configs/stdlib_tiny.py",
        shapes=by_parameters(log_spaced(3e4, 1e6, 8), aspect=32, head_dim=16),
        tokens=iso_flops([2e11, 6e11, 2e12]),
        held_out=HeldOut(shape(256, 8, 16), tokens=6e6),
        rate=mup(64),
    )

Shapes are overrides of the model's size, from small to large. A rule of tokens gives each model the lengths of its runs, a rule
of rates what changes with its size. Every run's schedule ends with the run: loss at another length is that of a run of that
length (the first thing that Hoffmann et al., 2022, did otherwise than Kaplan et al., 2020). The warm-up is a share of the run
for the same reason (Porian et al., 2024: a fixed one penalises small runs).
"""

from __future__ import annotations

import dataclasses
import math
import pathlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gptjax import recipes
from gptjax.config import Config, UserError, from_dict
from gptjax.scaling.observations import COUNTS, Counted, Counter
from gptjax.sweeps.definition import Sweep, Trial, make_trials
from gptjax.sweeps.space import Space
from gptjax.train.flops import flops_per_token

Shape = Mapping[str, int]
# (FLOPs a token, parameters) of a model -> tokens of each of its runs
TokenRule = Callable[[float, Counted], Sequence[float]]
# (config of a model, its parameters) -> overrides
RateRule = Callable[[Config, Counted], Mapping[str, Any]]


@dataclasses.dataclass(frozen=True)
class HeldOut:
    """The run that is predicted before it is trained."""

    shape: Shape
    tokens: float


def constant(config: Config, counted: Counted) -> dict[str, Any]:
    """The recipe's rates for every size."""
    return {}


@dataclasses.dataclass(frozen=True)
class Family:
    """Models of one recipe over parameters and tokens. `warmup`: share of each run's steps; 0: as the recipe says."""

    recipe: str
    shapes: Sequence[Shape]
    tokens: TokenRule
    held_out: HeldOut | None = None
    rate: RateRule = constant
    warmup: float = 0.0
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    seeds: Sequence[int] = (0,)
    max_epochs: float = 1.0  # text that comes again teaches less (Muennighoff et al., 2023), which no law here knows
    min_steps: int = 50  # shorter runs are left out
    timeout: float = 0.0
    cores: int = 1


# --- shapes ---


def shape(width: int, layers: int, head_dim: int) -> Shape:
    """One model's size. Raises `UserError` where heads do not divide the width."""
    if width % head_dim:
        raise UserError(f"shape: heads of {head_dim} do not divide the width {width}.")
    return {"model.model_dim": width, "model.num_layers": layers, "model.num_heads": width // head_dim}


def by_aspect(widths: Sequence[int], aspect: float, head_dim: int) -> list[Shape]:
    """As many layers as width / aspect, at least one (Kaplan et al., 2020: from 10 to 100 the loss hardly depends on it)."""
    return [shape(width, max(1, round(width / aspect)), head_dim) for width in widths]


def by_parameters(targets: Sequence[float], aspect: float, head_dim: int) -> list[Shape]:
    """The sizes next to these numbers of parameters in the blocks, 12 * layers * width^2, at widths of whole heads.

    Of widths with layers within a factor of 1.5 of width / aspect, the size nearest to each target. Raises `UserError` where two
    targets come to one size, or the smallest is below any.
    """
    found: list[Shape] = []
    for target in targets:
        options = []
        for heads in range(1, 4 + int(2 * (target * aspect / 12) ** (1 / 3) / head_dim)):
            width = heads * head_dim
            for layers in {max(1, round(target / (12 * width**2)) + step) for step in (-1, 0, 1)}:
                ratio = layers * aspect / width
                if layers >= 1 and ratio >= 1 / 1.5 and (layers == 1 or ratio <= 1.5):
                    options.append((abs(math.log(12 * layers * width**2 / target)), width, layers))
        if not options:
            raise UserError(
                f"by_parameters: no model with heads of {head_dim} and width / layers near {aspect:g} has {target:g}."
            )
        _, width, layers = min(options)
        chosen = shape(width, layers, head_dim)
        if chosen in found:
            raise UserError(f"by_parameters: {target:g} and the target before it both come to width {width}, {layers} layers.")
        found.append(chosen)
    return found


def log_spaced(low: float, high: float, number: int) -> list[float]:
    """Numbers from low to high, each the same factor above the one before."""
    return [low * (high / low) ** (index / (number - 1)) for index in range(number)]


# --- rules of tokens ---


def iso_flops(budgets: Sequence[float]) -> TokenRule:
    """Runs that cost these FLOPs by the formula of train/flops.py, whatever the model: what IsoFLOP profiles are made of."""
    return lambda cost, counted: [budget / cost for budget in budgets]


def per_parameter(ratios: Sequence[float], count: str = "total") -> TokenRule:
    """So many tokens a parameter, by one of observations.COUNTS."""
    if count not in COUNTS:
        raise UserError(f"per_parameter: count={count!r} is none of {', '.join(COUNTS)}.")
    return lambda cost, counted: [ratio * getattr(counted, count) for ratio in ratios]


def same_tokens(tokens: Sequence[float]) -> TokenRule:
    """The same lengths for every model, as in Kaplan et al. (2020)."""
    return lambda cost, counted: tokens


# --- rules of rates ---


def power_of_width(rates: Mapping[str, float], width: int, exponent: float) -> RateRule:
    """{dotted key: rate at this width}, times (model_dim / width)^exponent."""
    return lambda config, counted: {key: rate * (config.model.model_dim / width) ** exponent for key, rate in rates.items()}


def kaplan_rate(config: Config, counted: Counted) -> dict[str, Any]:
    """Adam's rate by size, 0.003239 - 0.0001395 * ln(N), N without embeddings (Kaplan et al., 2020, appendix D.6)."""
    return {"optimizer.learning_rate": 0.003239 - 0.0001395 * math.log(counted.non_embedding)}


def mup(base_dim: int) -> RateRule:
    """The recipe's rates at this width, taken to the others by the maximal update parameterization (Yang et al., 2022)."""
    return lambda config, counted: {"model.parameterization": "mup", "model.mup_base_dim": base_dim}


# --- the runs ---


@dataclasses.dataclass(frozen=True)
class Planned:
    """One run of the plan. `epochs` of the training split; `steps` of the recipe's batch, to which tokens are rounded."""

    point: dict[str, Any]
    counted: Counted
    steps: int
    tokens: int
    flops: float
    epochs: float
    rate: float


@dataclasses.dataclass(frozen=True)
class Plan:
    """The runs that are fitted, the one that is predicted, and a sentence for each that is left out."""

    family: Family
    runs: list[Planned]
    held_out: Planned | None
    left_out: list[str]

    def trials(self, overrides: Sequence[str], held_out: bool) -> list[Trial]:
        """Those of a sweep: with `held_out`, of all runs and the one that is predicted, which comes last."""
        runs = [*self.runs, self.held_out] if held_out and self.held_out else self.runs
        return make_trials(self.sweep(runs), overrides)

    def sweep(self, runs: Sequence[Planned]) -> Sweep:
        f = self.family
        points = Space(tuple(run.point for run in runs))
        return Sweep(f.recipe, points, overrides=f.overrides, timeout=f.timeout, cores=f.cores)


def load_family(spec: str) -> Family:
    """What `get_family` of `FILE.py[:ARG]` returns. Raises `UserError` in one sentence, whatever the file does."""
    path, _, argument = spec.partition(":")
    family = recipes.call_file(pathlib.Path(path), "get_family", argument, "family file")
    if not isinstance(family, Family):
        raise UserError(
            f"get_family of the family file {path} must return a gptjax.scaling.family.Family, not {type(family).__name__}."
        )
    if not family.shapes or not family.seeds:
        raise UserError(f"the family file {path} has no {'seeds' if family.shapes else 'shapes'}.")
    if not 0 <= family.warmup < 1:
        raise UserError(f"the family file {path}: warmup={family.warmup!r} is a share of the run, from 0 to below 1.")
    return family


def make_plan(family: Family, overrides: Sequence[str], vocab_size: int, train_tokens: int, count: Counter) -> Plan:
    """The runs of a family on a training split of so many tokens. Raises `UserError` where a run would see text again."""
    runs: list[Planned] = []
    left_out: list[str] = []
    for each in family.shapes:
        model, counted = _model(family, overrides, each, vocab_size, count)
        cost = flops_per_token(model.model, model.data.seq_len)
        for tokens in family.tokens(cost, counted):
            planned = _planned(family, model, counted, each, tokens, train_tokens)
            if planned.steps < family.min_steps:
                left_out.append(
                    f"{_size(each)}, {tokens:.3g} tokens: {planned.steps} steps are fewer than min_steps={family.min_steps}"
                )
            else:
                runs += [dataclasses.replace(planned, point=planned.point | {"train.seed": seed}) for seed in family.seeds]
    held_out = None
    if family.held_out:
        model, counted = _model(family, overrides, family.held_out.shape, vocab_size, count)
        held_out = _planned(family, model, counted, family.held_out.shape, family.held_out.tokens, train_tokens)
        held_out = dataclasses.replace(held_out, point=held_out.point | {"train.seed": family.seeds[0]})
        if any(held_out.point == run.point for run in runs):
            raise UserError(f"the held-out run ({_size(family.held_out.shape)}) is one of the family's own.")
    if not runs:
        raise UserError(f"the family has no run of at least min_steps={family.min_steps} steps.")
    return Plan(family, runs, held_out, left_out)


def _model(family: Family, overrides: Sequence[str], each: Shape, vocab: int, count: Counter) -> tuple[Config, Counted]:
    """The config of one size, whose length is not settled yet, and its parameters."""
    values = recipes.recipe_values(family.recipe)
    recipes.lay_over(values, family.recipe, dict(family.overrides) | dict(each), overrides)
    try:
        config = from_dict(values).with_vocab_size(vocab)
    except UserError as error:
        raise UserError(f"{_size(each)}: {error}") from None
    return config, count(config)


def _planned(family: Family, config: Config, counted: Counted, each: Shape, tokens: float, train_tokens: int) -> Planned:
    steps = max(1, round(tokens / config.tokens_per_step))
    tokens = steps * config.tokens_per_step
    epochs = tokens / train_tokens
    if epochs > family.max_epochs:
        raise UserError(
            f"{_size(each)}: {tokens:,} tokens are {epochs:.2f} epochs of the {train_tokens:,} to train on, more than "
            f"max_epochs={family.max_epochs:g}; plan shorter runs or take more text."
        )
    rates = dict(family.rate(config, counted))
    lengths = {f"train.duration_{unit}": 0 for unit in ("tokens", "epochs")} | {"train.duration_steps": steps}
    warmup: dict[str, Any] = {}
    if family.warmup:
        warmup = {f"optimizer.warmup_{unit}": 0 for unit in ("tokens", "epochs")}
        warmup["optimizer.warmup_steps"] = max(1, round(family.warmup * steps))
    point = dict(each) | lengths | warmup | rates
    rate = rates.get("optimizer.learning_rate", config.optimizer.learning_rate)
    flops = flops_per_token(config.model, config.data.seq_len) * tokens
    return Planned(point, counted, steps, tokens, flops, epochs, rate)


def _size(each: Shape) -> str:
    return f"width {each.get('model.model_dim')}, {each.get('model.num_layers')} layers"
