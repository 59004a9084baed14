"""Adapters into the parameters for good, and out of them again."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from gptjax.adapters.attach import contracted_axes
from gptjax.adapters.compose import Rows, composed, num_leading, with_leading
from gptjax.adapters.nodes import LowRank, Rescaled
from gptjax.config import AdapterConfig, Config, UserError
from gptjax.config.adapter import LEADING
from gptjax.model import primitives
from gptjax.model.cache import Cache
from gptjax.model.decoder import Decoder
from gptjax.model.kernels import LinearMap


def merged(config: Config, params: Any) -> tuple[Config, Any]:
    """(the config, the parameters) of a run without adapters that computes the same: the decoder's kernels, which have taken
    them in, and what else there is ("task_heads").

    Prompts and prefixes are in no kernel: with them, both come back as they are.
    """
    if config.adapter.method in ("none", *LEADING):
        return config, params
    plain = dataclasses.replace(config, adapter=AdapterConfig())
    return plain, _merged(config, params)


@functools.partial(jax.jit, static_argnums=0)
def _merged(config: Config, params: Any) -> Any:
    decoder = composed(config, params)
    kept = {name: value for name, value in params.items() if name != "adapters"}
    return kept | {"layers": _in_place(decoder["layers"], config.model.param_dtype)}


def _in_place(layers: Any, dtype: str) -> Any:
    made = {}
    for name, value in layers.items():
        if isinstance(value, Mapping):
            kernel = value.get("kernel")
            if isinstance(kernel, LinearMap):
                axes = contracted_axes(name)
                whole = jax.vmap(lambda node, axes=axes: node.merged(axes))(kernel)
                value = {part: own.astype(dtype) for part, own in {**value, "kernel": whole}.items()}
            elif kernel is None:
                value = _in_place(value, dtype)
        made[name] = value
    return made


def for_writing(config: Config, params: Any) -> tuple[Config, Any]:
    """(the config, the parameters) that generation takes: those of `merged`, but that what stands ahead of a text is in
    params["leading"], its keys and values, beside a decoder that knows nothing of it.

    They can be made once, since they see nothing of the text. What has them already comes back as it is.
    """
    config, params = merged(config, params)
    return config, _with_cache(config, params) if num_leading(config, params) else params


@functools.partial(jax.jit, static_argnums=0)
def _with_cache(config: Config, params: Any) -> Any:
    none = jnp.zeros((1, 0), jnp.int32)
    rows, count = with_leading(config, params, Rows(none, none)), num_leading(config, params)
    model = dataclasses.replace(config.model, remat="none", attention="auto")
    with primitives.fixed_order():
        found: Any = Decoder(model).apply(
            {"params": composed(config, params)},
            rows.inputs,
            rows.positions,
            cache=Cache.empty(model, 1, count),
            method=Decoder.hidden,
        )
    plain = _merged(config, {name: value for name, value in params.items() if name != "adapters"})
    return plain | {"leading": jax.tree.map(lambda slots: slots[:, :1, :count], found[1])}


@functools.partial(jax.jit, static_argnums=0)
def unmerged(config: Config, params: Any, adapters: Any) -> Any:
    """The parameters with adapters beside them again, of those that `merged` gave, to float32's rounding.

    Raises `UserError` for DoRA, whose columns have lost their lengths, and for an int8 base, which has been rounded: a run's
    folder keeps the frozen parameters beside the adapters in any case.
    """
    c = config.adapter
    if c.method not in ("lora", "ia3") or c.base == "int8":
        raise UserError(f"adapter.method={c.method} with adapter.base={c.base} cannot be taken out of merged parameters.")
    decoder = composed(config, {**params, "adapters": adapters})
    return {**params, "layers": _taken_out(decoder["layers"], params["layers"]), "adapters": adapters}


def _taken_out(layers: Any, merged_layers: Any) -> Any:
    """`layers`: composed of merged kernels, in which the adapters count twice."""
    made = {}
    for name, value in layers.items():
        own = merged_layers[name]
        if isinstance(value, Mapping):
            kernel = value.get("kernel")
            if isinstance(kernel, LowRank):
                update = kernel.scale * jax.vmap(lambda a, b: jnp.tensordot(a, b, 1))(kernel.a, kernel.b)
                own = {**own, "kernel": own["kernel"] - update}
            elif isinstance(kernel, Rescaled):
                own = {**own, "kernel": own["kernel"] / _factor(kernel, contracted_axes(name))}
                own |= {"bias": own["bias"] / kernel.outputs} if kernel.outputs is not None and "bias" in own else {}
            elif kernel is None:
                own = _taken_out(value, own)
        made[name] = own
    return made


def _factor(node: Rescaled, contracted: int) -> jax.Array:
    """What each weight was multiplied by, [L, *in, *out] with axes of 1."""
    ones = dataclasses.replace(node, base=jnp.ones_like(node.base))
    return jax.vmap(lambda one: one.merged(contracted))(ones)
