"""Settings by parameter: factors of the rate and the weight decay by pattern, and what is frozen."""

from __future__ import annotations

import difflib
import functools
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from gptjax.config import Config, OptimizerConfig, UserError
from gptjax.config.optimizer import frozen_layers, parameter_groups
from gptjax.model.parameterization import learning_rate_multiplier


def parameter_path(path: tuple[Any, ...]) -> str:
    """'layers/attention/query/kernel': how a parameter is named in patterns, tables and errors."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def _map_named(of: Callable[..., Any], tree: Any, *rest: Any) -> Any:
    """`of(name, leaf, ...)` over a tree of parameters, of which some may be masked away."""
    return jax.tree_util.tree_map_with_path(lambda path, *leaves: of(parameter_path(path), *leaves), tree, *rest)


def decay_mask(config: OptimizerConfig, params: Any) -> Any:
    """True for each parameter that weight decay applies to: those that no pattern of `optimizer.no_decay` is found in, but for
    the blocks' layer scales, which weigh a branch as a norm's scale would, and adapters' factors.
    """
    patterns = (*config.no_decay, "layer_scale$", "^adapters/.*/(rescale|magnitude)$")
    return _map_named(lambda name, _: not any(re.search(pattern, name) for pattern in patterns), params)


# --- factors ---------------------------------------------


def _role_factors(config: Config, name: str) -> tuple[float, float]:
    """(rate, decay) of a parameter by its role in the parameterization: their product, by which it decays, is 1."""
    rate = learning_rate_multiplier(config, name)
    return rate, 1.0 / rate


def _factors(config: Config, name: str) -> tuple[float, float]:
    rate, decay = _role_factors(config, name)
    for group in parameter_groups(config.optimizer):
        if re.search(group.pattern, name):
            return rate * group.rate, decay * group.decay
    return rate, decay


def rate_multipliers(config: Config, params: Any) -> Any:
    """What each parameter's learning rate is multiplied by: a float, or float32 [L, 1, ...] where some layers are frozen."""

    def of(name: str, leaf: Any) -> Any:
        rate, _ = _factors(config, name)
        moves = _moving_layers(config, name, leaf)
        return rate if moves is None else np.float32(rate) * moves

    return _map_named(of, params)


def decay_multipliers(config: Config, params: Any) -> Any:
    """What `optimizer.weight_decay` is multiplied by for each parameter: a float, 0 by `optimizer.no_decay`."""
    mask = decay_mask(config.optimizer, params)
    return _map_named(lambda name, _, decays: _factors(config, name)[1] * decays, params, mask)


# --- frozen parameters ---------------------------------------------

_LAYERS = ("layers/", "adapters/layers/")


@functools.cache
def _frozen(config: Config, name: str) -> bool:
    """Whether no part of the parameter ever changes."""
    if not config.adapter.trains(name) or any(re.search(pattern, name) for pattern in config.optimizer.freeze):
        return True
    return name.startswith(_LAYERS) and len(frozen_layers(config.optimizer, config.model.num_layers)) == config.model.num_layers


def _moving_layers(config: Config, name: str, leaf: Any) -> np.ndarray | None:
    """float32 [L, 1, ...], 0 for the frozen layers of a stacked parameter; None where none is."""
    if not config.optimizer.freeze_layers or not name.startswith(_LAYERS):
        return None
    frozen = frozen_layers(config.optimizer, config.model.num_layers)
    moves = np.array([layer not in frozen for layer in range(config.model.num_layers)], np.float32)
    return moves.reshape(-1, *(1,) * (leaf.ndim - 1))


def _freezes(config: Config) -> bool:
    return bool(config.optimizer.freeze or config.optimizer.freeze_layers or config.adapter.method != "none")


def keep_frozen(config: Config, new: Any, old: Any) -> Any:
    """`new`, with the frozen parameters and layers of `old`."""

    def of(name: str, old: Any, new: Any) -> Any:
        if _frozen(config, name):
            return old
        moves = _moving_layers(config, name, old)
        return new if moves is None else jnp.where(moves > 0, new, old)

    return _map_named(of, old, new) if _freezes(config) else new


def trained_part(config: Config, params: Any) -> tuple[Any, Callable[[Any], Any]]:
    """(the parameters without those that are frozen whole, what makes all parameters of such a tree again)."""
    if not _freezes(config):
        return params, lambda part: part

    def whole(part: Any) -> Any:
        return jax.tree.map(lambda own, trained: own if isinstance(trained, optax.MaskedNode) else trained, params, part)

    return hide_frozen(config, params), whole


def with_zeros(part: Any, params: Any) -> Any:
    """Gradients of a `trained_part`, with float32 zeros for all other parameters."""

    def filled(own: jax.Array, gradient: Any) -> Any:
        return jnp.zeros(own.shape, jnp.float32) if isinstance(gradient, optax.MaskedNode) else gradient

    return jax.tree.map(filled, params, part)


def trained_count(config: Config, params: Any) -> tuple[int, int]:
    """(numbers that are trained, all numbers) of a tree of arrays or shapes."""

    def of(name: str, leaf: Any) -> int:
        moves = _moving_layers(config, name, leaf)
        share = 1.0 if moves is None else moves.mean()
        return 0 if _frozen(config, name) else round(leaf.size * share)

    return sum(jax.tree.leaves(_map_named(of, params))), sum(leaf.size for leaf in jax.tree.leaves(params))


def without_frozen(config: Config, gradients: Any) -> Any:
    """Gradients with 0 for what is frozen, so that it counts in no norm."""
    return keep_frozen(config, gradients, jax.tree.map(jnp.zeros_like, gradients)) if _freezes(config) else gradients


def hide_frozen(config: Config, tree: Any) -> Any:
    """The tree without its frozen parameters, in whose places stand nodes without leaves."""
    return _map_named(lambda name, leaf: optax.MaskedNode() if _frozen(config, name) else leaf, tree)


def trained_only(config: Config, inner: optax.GradientTransformation) -> optax.GradientTransformation:
    """`inner`, which never sees frozen parameters and holds no state for them; what is frozen stays bit for bit."""
    if not _freezes(config):
        return inner
    hide = functools.partial(hide_frozen, config)
    wrapped = optax.with_extra_args_support(inner)

    def update(updates: Any, state: Any, params: Any = None, **trees: Any) -> tuple[Any, Any]:
        hidden = None if params is None else hide(params)
        new, state = wrapped.update(hide(updates), state, hidden, **{name: hide(tree) for name, tree in trees.items()})
        # -0, since -0 + 0 is 0: adding -0 leaves every number as it is.
        return keep_frozen(config, new, jax.tree.map(lambda update: jnp.full_like(update, -0.0), updates)), state

    return optax.GradientTransformationExtraArgs(lambda params: inner.init(hide(params)), update)


# --- patterns that match nothing ---------------------------------------------


def check_patterns(config: Config, params: Any) -> None:
    """Raises `UserError` for a pattern of `optimizer.groups` or `optimizer.freeze` found in no parameter of the model (a tree of
    arrays or shapes), and where nothing is left to train.
    """
    names = [parameter_path(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
    patterns = [("groups", group.pattern) for group in parameter_groups(config.optimizer)]
    patterns += [("freeze", pattern) for pattern in config.optimizer.freeze]
    for key, pattern in patterns:
        if not any(re.search(pattern, name) for name in names):
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
            raise UserError(f"optimizer.{key}: {pattern!r} is found in no parameter; the nearest are {', '.join(near)}.")
    if all(_frozen(config, name) for name in names):
        adapter = "" if config.adapter.method == "none" else f"adapter.method={config.adapter.method}, "
        raise UserError(f"{adapter}optimizer.freeze and optimizer.freeze_layers leave no parameter to train.")
