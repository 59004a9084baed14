"""Schedules, and the table of optimizers."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from gptjax.config import Config, OptimizerConfig, UserError
from gptjax.train import state_precision
from gptjax.train.groups import (
    decay_multipliers,
    hide_frozen,
    keep_frozen,
    parameter_path,
    rate_multipliers,
    trained_only,
)
from gptjax.train.prodigy import prodigy
from gptjax.train.soap import scale_by_soap
from gptjax.train.sophia import scale_by_sophia

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


def _descend(config: Config, rate: Schedule, direction: optax.GradientTransformation) -> optax.GradientTransformation:
    """Minus rate * factor * (direction + weight_decay * factor * parameter), with the parameter's own factors."""
    first = _cautious(direction) if config.optimizer.cautious else direction
    return optax.chain(first, _add_decay(config), _scale_by_rate(config, rate))


def _weight_decay(config: Config, params: Any) -> Any:
    return jax.tree.map(lambda factor: config.optimizer.weight_decay * factor, decay_multipliers(config, params))


def _add_decay(config: Config) -> optax.GradientTransformation:
    def update(updates: Any, params: Any) -> Any:
        return jax.tree.map(lambda u, p, decay: u + decay * p if decay else u, updates, params, _weight_decay(config, params))

    return optax.stateless(update)


def _scale_by_rate(config: Config, rate: Schedule) -> optax.GradientTransformation:
    def scale(update: jax.Array, factor: Any, step: jax.Array) -> jax.Array:
        scaled = step.astype(update.dtype) * update
        return scaled if isinstance(factor, float) and factor == 1.0 else scaled * factor

    def update(updates: Any, state: Any, params: Any = None) -> tuple[Any, Any]:
        del params
        step = jnp.asarray(-rate(state.count))
        scaled = jax.tree.map(lambda u, factor: scale(u, factor, step), updates, rate_multipliers(config, updates))
        return scaled, optax.ScaleByScheduleState(optax.safe_increment(state.count))

    return optax.GradientTransformation(lambda params: optax.ScaleByScheduleState(jnp.zeros([], jnp.int32)), update)


def _cautious(direction: optax.GradientTransformation) -> optax.GradientTransformation:
    """Cautious optimizers (Liang et al., 2024): what goes against the gradient is dropped, the rest divided by the share that is
    left, of each layer's and expert's matrix by itself and at least 0.001, as in the authors' code.
    """
    inner = optax.with_extra_args_support(direction)

    def agree(path: tuple[Any, ...], update: jax.Array, gradient: jax.Array) -> jax.Array:
        own_axes = tuple(range(_num_stacked_axes(path), update.ndim))
        mask = (update * gradient > 0).astype(update.dtype)
        return update * mask / jnp.maximum(mask.mean(axis=own_axes, keepdims=True), 1e-3)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        new, state = inner.update(updates, state, params, **extra)
        return jax.tree_util.tree_map_with_path(agree, new, updates), state

    return optax.GradientTransformationExtraArgs(inner.init, update)


def _adam(c: OptimizerConfig) -> optax.GradientTransformation:
    return optax.scale_by_adam(c.beta1, c.beta2, c.epsilon)


def _adamw(config: Config, rate: Schedule, total_steps: int) -> optax.GradientTransformation:
    return _descend(config, rate, _adam(config.optimizer))


def _lion(config: Config, rate: Schedule, total_steps: int) -> optax.GradientTransformation:
    return _descend(config, rate, optax.scale_by_lion(config.optimizer.beta1, config.optimizer.beta2))


# How many axes of a block's kernel, after the stacked ones, are inputs.
_INPUT_AXES = {"output": 2, "query": 1, "key": 1, "value": 1, "up": 1, "gate": 1, "down": 1, "router": 1}
_INPUT_AXES |= {"kv_latent": 1, "query_latent": 1, "query_up": 1, "rotary_key": 1, "key_up": 1, "value_up": 1}


# Whose parameters are blocks', stacked.
_STACKS = ("layers", "prediction_heads")


def _num_input_axes(path: tuple[Any, ...]) -> int | None:
    """Of a kernel of the blocks, [L, *in, *out] or [L, E, in, out]; None for any other parameter."""
    names = parameter_path(path).split("/")
    return _INPUT_AXES[names[-2]] if names[0] in _STACKS and names[-1] == "kernel" else None


def _num_stacked_axes(path: tuple[Any, ...]) -> int:
    """How many leading axes count matrices: layers, and experts."""
    names = parameter_path(path).split("/")
    if names[0] not in _STACKS:
        return 0
    return 2 if names[1] == "experts" and names[2] in ("up", "gate", "down") else 1


def _adafactor(config: Config, rate: Schedule, total_steps: int) -> optax.GradientTransformation:
    """Adafactor (Shazeer & Stern, 2018) without momentum: factored second moments, each matrix's update clipped to an RMS of 1.

    Decay comes before the learning rate, so that it means what it does elsewhere: rate * weight_decay * parameter.
    """
    second_moments = optax.chain(optax.scale_by_factored_rms(), optax.stateless(lambda updates, _: _clip_rms(updates)))
    return _descend(config, rate, _on_matrices(second_moments))


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


def _sgd(config: Config, rate: Schedule, total_steps: int) -> optax.GradientTransformation:
    momentum = optax.trace(config.optimizer.beta1) if config.optimizer.beta1 else optax.identity()
    return _descend(config, rate, momentum)


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


def _by_kind(params: Any) -> Any:
    """ "matrix" for each kernel of the blocks, "other" for embeddings, head, norms and biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: "other" if _num_input_axes(path) is None else "matrix", params)


def _muon(config: Config, rate: Schedule, total_steps: int) -> optax.GradientTransformation:
    """Muon (Jordan et al., 2024) on the blocks' matrices, AdamW on embeddings, head, norms and biases."""
    c = config.optimizer
    ratio = c.muon_adam_learning_rate / c.learning_rate if c.learning_rate else 0.0
    muon = optax.contrib.scale_by_muon(beta=0.95, weight_dimension_numbers=_muon_dimensions)
    direction = optax.chain(muon, optax.stateless(lambda updates, _: _muon_scales(updates)))
    rules = {"matrix": _descend(config, rate, direction), "other": _descend(config, lambda n: rate(n) * ratio, _adam(c))}
    return optax.partition(rules, _by_kind)


def _muon_scales(updates: Any) -> Any:
    """Each matrix [inputs, outputs] times sqrt(max(1, outputs / inputs)), Muon's own scale."""

    def scale(path: tuple[Any, ...], update: jax.Array) -> jax.Array:
        stacked, inputs = _matrix_axes(path)
        outputs = stacked + inputs
        return update * math.sqrt(max(1.0, math.prod(update.shape[outputs:]) / math.prod(update.shape[stacked:outputs])))

    return jax.tree_util.tree_map_with_path(scale, updates)


def _matrix_axes(path: tuple[Any, ...]) -> tuple[int, int]:
    """(stacked, inputs): how many leading axes of a kernel of the blocks count matrices, and how many after them are inputs."""
    inputs = _num_input_axes(path)
    assert inputs is not None
    return _num_stacked_axes(path), inputs


def _soap(config: Config, rate: Schedule, total_steps: int) -> optax.GradientTransformation:
    """SOAP on the blocks' matrices, AdamW on embeddings, head, norms and biases."""
    c = config.optimizer
    soap = scale_by_soap(_matrix_axes, c.beta1, c.beta2, c.epsilon, c.soap_refresh_every, c.soap_max_dim)
    return optax.partition({"matrix": _descend(config, rate, soap), "other": _adamw(config, rate, total_steps)}, _by_kind)


def _sophia(config: Config, rate: Schedule, total_steps: int) -> optax.GradientTransformation:
    c = config.optimizer
    return _descend(config, rate, scale_by_sophia(c.beta1, c.beta2, c.sophia_gamma, c.epsilon, c.sophia_estimate_every))


def _ademamix(config: Config, rate: Schedule, total_steps: int) -> optax.GradientTransformation:
    """AdEMAMix (Pagliardini et al., 2024): Adam with a second, much slower average of gradients beside the first."""
    c = config.optimizer
    warmup = math.ceil(c.ademamix_warmup_fraction * total_steps)
    fast, slow = math.log(c.beta1), math.log(c.ademamix_beta3)

    def share(n: jax.Array) -> jax.Array:
        return jnp.minimum((n + 1) / warmup, 1.0) if warmup else jnp.float32(1.0)

    def beta3(n: jax.Array) -> jax.Array:
        """From beta1 to its end, its half-life rising linearly."""
        return jnp.exp(fast * slow / ((1 - share(n)) * slow + share(n) * fast))

    mixed = optax.contrib.scale_by_ademamix(c.beta1, c.beta2, beta3, lambda n: c.ademamix_alpha * share(n), c.epsilon)
    return _descend(config, rate, mixed)


def _prodigy(config: Config, rate: Schedule, total_steps: int) -> optax.GradientTransformation:
    c = config.optimizer
    factors = functools.partial(rate_multipliers, config)
    decay = functools.partial(_weight_decay, config)
    return prodigy(rate, c.beta1, c.beta2, c.epsilon, c.prodigy_initial_rate, factors, decay)


def _schedule_free_adamw(config: Config, rate: Schedule, total_steps: int) -> optax.GradientTransformation:
    """Schedule-free AdamW (Defazio et al., 2024): `params` are its y; evaluation uses its x (`evaluation_params`)."""
    c = config.optimizer
    base = _descend(config, rate, optax.scale_by_rms(c.beta2, c.epsilon, eps_in_sqrt=False, bias_correction=True))
    # Optax counts the averaging's steps from 1, the base's from 0; both must see the rate of the same step.
    return optax.contrib.schedule_free(base, lambda n: rate(n - 1), b1=c.beta1)


# Each takes (config, learning rate of update n, the run's steps).
OPTIMIZERS: dict[str, Callable[[Config, Schedule, int], optax.GradientTransformation]] = {
    "adamw": _adamw,
    "lion": _lion,
    "adafactor": _adafactor,
    "sgd": _sgd,
    "muon": _muon,
    "schedule_free_adamw": _schedule_free_adamw,
    "soap": _soap,
    "sophia": _sophia,
    "prodigy": _prodigy,
    "ademamix": _ademamix,
}


def make_optimizer(config: Config, schedule: Schedule, total_steps: int) -> optax.GradientTransformation:
    """Gradients, already averaged and clipped, to updates. Only "sophia" takes more: `curvature`, a tree like them."""
    rule = OPTIMIZERS[config.optimizer.name](config, schedule, total_steps)
    return trained_only(config, state_precision.in_dtype(rule, config.optimizer.state_dtype))


def evaluation_params(config: Config, state: Any) -> Any:
    """The parameters to evaluate, sample from and export: the average where there is one, schedule-free's x, else
    `state.params`."""
    if state.ema_params is not None:
        return state.ema_params
    if config.optimizer.name == "schedule_free_adamw":
        average = optax.contrib.schedule_free_eval_params(state.opt_state, hide_frozen(config, state.params))
        return keep_frozen(config, average, state.params)
    return state.params
