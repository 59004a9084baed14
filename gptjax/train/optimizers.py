"""Schedules, the weight-decay rule, and the table of optimizers."""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gptjax.config import Config, OptimizerConfig, UserError
from gptjax.train import state_precision

Schedule = Callable[[Any], Any]


class Lengths(NamedTuple):
    """Durations of a run in steps, settled once the size of an epoch is known."""

    total: int
    warmup: int
    decay: int

    @classmethod
    def of(cls, config: Config, steps_per_epoch: float) -> Lengths:
        total = config.duration("train", "duration", steps_per_epoch)
        warmup = config.duration("optimizer", "warmup", steps_per_epoch)
        name = config.optimizer.schedule
        until = total if name == "wsd" else None
        decay = config.duration("optimizer", "decay", steps_per_epoch, default=total, until=until)
        if warmup > total:
            raise UserError(f"optimizer.warmup is {warmup} steps, longer than the run's {total}.")
        if name in ("cosine", "linear") and decay <= warmup < total:
            raise UserError(f"optimizer.decay ends at step {decay}, before the warm-up of {warmup} steps is over.")
        if name == "wsd" and warmup + decay > total:
            raise UserError(f"optimizer.schedule=wsd: {warmup} steps of warm-up and {decay} of decay exceed the run's {total}.")
        return cls(total, warmup, decay)


def _cosine(peak: float, floor: float, lengths: Lengths) -> Schedule:
    span = max(lengths.decay - lengths.warmup, 1)
    return optax.cosine_decay_schedule(peak, span, alpha=floor / peak if peak else 0.0)


def _linear(peak: float, floor: float, lengths: Lengths) -> Schedule:
    return optax.linear_schedule(peak, floor, max(lengths.decay - lengths.warmup, 1))


def _wsd(peak: float, floor: float, lengths: Lengths) -> Schedule:
    """Warm-up, stable, decay (Hu et al., 2024): constant, then a linear fall over the last `decay` steps."""
    stable = lengths.total - lengths.decay - lengths.warmup
    return optax.join_schedules([optax.constant_schedule(peak), optax.linear_schedule(peak, floor, lengths.decay)], [stable])


def _inverse_sqrt(peak: float, floor: float, lengths: Lengths) -> Schedule:
    """peak * sqrt(w / (w + n)) n steps after a warm-up of w (at least 1), never below the floor."""
    shift = max(lengths.warmup, 1)
    return lambda n: jnp.maximum(peak * jnp.sqrt(shift / (shift + n)), floor)


# Each takes (peak, floor, lengths) and gives the rate as a function of the steps since the warm-up.
SCHEDULES: dict[str, Callable[[float, float, Lengths], Schedule]] = {
    "constant": lambda peak, floor, lengths: optax.constant_schedule(peak),
    "cosine": _cosine,
    "linear": _linear,
    "wsd": _wsd,
    "inverse_sqrt": _inverse_sqrt,
}


def make_schedule(config: OptimizerConfig, lengths: Lengths) -> Schedule:
    """Learning rate of update n = 0, 1, ...: a linear rise whose first step is already above 0, then `config.schedule`."""
    peak = config.learning_rate
    after = SCHEDULES[config.schedule](peak, peak * config.final_fraction, lengths)
    if not lengths.warmup:
        return after
    rise = optax.linear_schedule(peak / lengths.warmup, peak, max(lengths.warmup - 1, 1))
    return optax.join_schedules([rise, after], [lengths.warmup])


def parameter_path(path: tuple[Any, ...]) -> str:
    """'layers/attention/query/kernel': how a parameter is named in patterns, tables and errors."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def decay_mask(config: OptimizerConfig, params: Any) -> Any:
    """True for each parameter that weight decay applies to: those that no pattern of `optimizer.no_decay` is found in."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: not any(re.search(pattern, parameter_path(path)) for pattern in config.no_decay), params
    )


def _adamw(c: OptimizerConfig, rate: Schedule, mask: Any) -> optax.GradientTransformation:
    return optax.adamw(rate, c.beta1, c.beta2, c.epsilon, weight_decay=c.weight_decay, mask=mask)


def _lion(c: OptimizerConfig, rate: Schedule, mask: Any) -> optax.GradientTransformation:
    return optax.lion(rate, c.beta1, c.beta2, weight_decay=c.weight_decay, mask=mask)


# How many axes of a block's kernel, after the stacked ones, are inputs.
_INPUT_AXES = {"output": 2, "query": 1, "key": 1, "value": 1, "up": 1, "gate": 1, "down": 1, "router": 1}


def _num_input_axes(path: tuple[Any, ...]) -> int | None:
    """Of a kernel of the blocks, [L, *in, *out] or [L, E, in, out]; None for any other parameter."""
    names = parameter_path(path).split("/")
    return _INPUT_AXES[names[-2]] if names[0] == "layers" and names[-1] == "kernel" else None


def _num_stacked_axes(path: tuple[Any, ...]) -> int:
    """How many leading axes count matrices: layers, and experts."""
    names = parameter_path(path).split("/")
    if names[0] != "layers":
        return 0
    return 2 if names[1] == "experts" and names[2] in ("up", "gate", "down") else 1


def _adafactor(c: OptimizerConfig, rate: Schedule, mask: Any) -> optax.GradientTransformation:
    """Adafactor (Shazeer & Stern, 2018) without momentum: factored second moments, each matrix's update clipped to an RMS of 1.

    Decay comes before the learning rate, so that it means what it does elsewhere: rate * weight_decay * parameter.
    """
    second_moments = optax.chain(optax.scale_by_factored_rms(), optax.stateless(lambda updates, _: _clip_rms(updates)))
    return optax.chain(
        _on_matrices(second_moments), optax.add_decayed_weights(c.weight_decay, mask), optax.scale_by_learning_rate(rate)
    )


def _clip_rms(updates: Any) -> Any:
    """Each parameter's update, and each layer's and expert's of a stacked one, scaled down to a root mean square of at most 1."""

    def clip(path: tuple[Any, ...], update: jax.Array) -> jax.Array:
        own_axes = tuple(range(_num_stacked_axes(path), update.ndim))
        rms = jnp.sqrt(jnp.mean(jnp.square(update), axis=own_axes, keepdims=True))
        return update / jnp.maximum(rms, 1.0)

    return jax.tree_util.tree_map_with_path(clip, updates)


def _on_matrices(inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner`, seeing each kernel of the blocks as [L, inputs, outputs], experts' as [L, E, inputs, outputs]: heads [N, H] are
    one axis, long enough to factor.
    """

    def as_matrices(tree: Any) -> Any:
        def reshape(path: tuple[Any, ...], leaf: jax.Array) -> jax.Array:
            inputs = _num_input_axes(path)
            if inputs is None:
                return leaf
            stacked = _num_stacked_axes(path)
            outputs = stacked + inputs
            return leaf.reshape(*leaf.shape[:stacked], math.prod(leaf.shape[stacked:outputs]), math.prod(leaf.shape[outputs:]))

        return jax.tree_util.tree_map_with_path(reshape, tree)

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        new, state = inner.update(as_matrices(updates), state, None if params is None else as_matrices(params))
        return jax.tree.map(lambda update, like: update.reshape(like.shape), new, updates), state

    return optax.GradientTransformation(lambda params: inner.init(as_matrices(params)), update)


def _sgd(c: OptimizerConfig, rate: Schedule, mask: Any) -> optax.GradientTransformation:
    momentum = optax.trace(c.beta1) if c.beta1 else optax.identity()
    return optax.chain(momentum, optax.add_decayed_weights(c.weight_decay, mask), optax.scale_by_learning_rate(rate))


def _muon_dimensions(params: Any) -> Any:
    """For each kernel of the blocks, [L, *in, *out], its input and output axes; None for what is no matrix of a block.

    The axes of layers and experts are in neither, so that Muon takes them as a batch of matrices.
    """

    def dimensions(path: tuple[Any, ...], leaf: Any) -> Any:
        inputs = _num_input_axes(path)
        if inputs is None:
            return None
        first_input = _num_stacked_axes(path)
        first_output = first_input + inputs
        return optax.contrib.MuonDimensionNumbers(tuple(range(first_input, first_output)), tuple(range(first_output, leaf.ndim)))

    return jax.tree_util.tree_map_with_path(dimensions, params)


def _muon(c: OptimizerConfig, rate: Schedule, mask: Any) -> optax.GradientTransformation:
    """Muon (Jordan et al., 2024) on the blocks' matrices, AdamW on embeddings, head, norms and biases."""
    ratio = c.muon_adam_learning_rate / c.learning_rate if c.learning_rate else 0.0
    muon = optax.contrib.muon(
        rate, beta=0.95, weight_decay=c.weight_decay, weight_decay_mask=mask, muon_weight_dimension_numbers=_muon_dimensions
    )

    def labels(params: Any) -> Any:
        return jax.tree.map(
            lambda found, _: "adamw" if found is None else "muon",
            _muon_dimensions(params),
            params,
            is_leaf=lambda node: node is None or isinstance(node, optax.contrib.MuonDimensionNumbers),
        )

    return optax.partition({"muon": muon, "adamw": _adamw(c, lambda n: rate(n) * ratio, mask)}, labels)


def _schedule_free_adamw(c: OptimizerConfig, rate: Schedule, mask: Any) -> optax.GradientTransformation:
    """Schedule-free AdamW (Defazio et al., 2024): `params` are its y; evaluation uses its x (`evaluation_params`)."""
    base = optax.chain(
        optax.scale_by_rms(c.beta2, c.epsilon, eps_in_sqrt=False, bias_correction=True),
        optax.add_decayed_weights(c.weight_decay, mask),
        optax.scale_by_learning_rate(rate),
    )
    # Optax counts the averaging's steps from 1, the base's from 0; both must see the rate of the same step.
    return optax.contrib.schedule_free(base, lambda n: rate(n - 1), b1=c.beta1)


# Each takes (config, learning rate of update n, weight-decay mask).
OPTIMIZERS: dict[str, Callable[[OptimizerConfig, Schedule, Any], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "lion": _lion,
    "adafactor": _adafactor,
    "sgd": _sgd,
    "muon": _muon,
    "schedule_free_adamw": _schedule_free_adamw,
}


def make_optimizer(config: OptimizerConfig, schedule: Schedule) -> optax.GradientTransformation:
    """Gradients, already averaged and clipped, to updates."""
    optimizer = OPTIMIZERS[config.name](config, schedule, lambda params: decay_mask(config, params))
    return state_precision.in_dtype(optimizer, config.state_dtype)


def evaluation_params(config: OptimizerConfig, state: Any) -> Any:
    """The parameters to evaluate, sample from and export: the average where there is one, schedule-free's x, else
    `state.params`."""
    if state.ema_params is not None:
        return state.ema_params
    if config.name == "schedule_free_adamw":
        return optax.contrib.schedule_free_eval_params(state.opt_state, state.params)
    return state.params
