"""Adapters as a run starts with them: a function of (config, the decoder's parameters, key)."""

from __future__ import annotations

import difflib
import functools
import math
import re
import zlib
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.adapters.nodes import LowRank, in_int8
from gptjax.config import Config, UserError
from gptjax.config.adapter import LOW_RANK
from gptjax.model.decoder import Decoder
from gptjax.model.kernels import CONTRACTED

# Projections that read the same vector: with adapter.shared_input these have one first factor.
SHARING = ("query", "key", "value")

Names = tuple[str | None, ...]


def contracted_axes(module: str) -> int:
    """How many axes of a projection's kernel, without the layers', are inputs."""
    return CONTRACTED.get(module, 1)


def rescales_inputs(module: str) -> bool:
    """Whether IA3's factors of a projection are of its inputs, the MLP's inner activations; else of its outputs."""
    return module == "down"


def projections(layers: Any, path: tuple[str, ...] = ("layers",)) -> dict[str, dict[str, Any]]:
    """{"layers/attention/query": {"kernel", "bias"}, ...} of a decoder's layers; experts, which are no projections, are left
    out."""
    found: dict[str, dict[str, Any]] = {}
    for name, value in layers.items():
        if not isinstance(value, Mapping) or name == "experts":
            continue
        found |= {"/".join((*path, name)): dict(value)} if "kernel" in value else projections(value, (*path, name))
    return found


def adapted(config: Config, layers: Any) -> list[str]:
    """Paths of the projections that are adapted, such as "layers/attention/query". Raises `UserError` for a pattern that finds
    none."""
    names = list(projections(layers))
    for pattern in config.adapter.patterns:
        if not any(re.search(pattern, f"{name}/kernel") for name in names):
            near = difflib.get_close_matches(pattern, names, n=3, cutoff=0.0)
            raise UserError(f"adapter.targets: {pattern!r} is found in no kernel of a layer; the nearest are {', '.join(near)}.")
    return [name for name in names if any(re.search(pattern, f"{name}/kernel") for pattern in config.adapter.patterns)]


def attached(config: Config, boxed: Any, key: jax.Array) -> Any:
    """The parameters that a run with `config.adapter` has, of a decoder's: its own, frozen ones perhaps in int8, and "adapters".

    `boxed`: parameters that carry their logical names, as do those that come back. Raises `UserError` for a pattern that
    matches nothing.
    """
    c = config.adapter
    if c.method == "none":
        return boxed
    params = {**boxed, "layers": _frozen_layers(boxed["layers"])} if c.base == "int8" else boxed
    fresh = {"prompt": _prompt, "prefix": _prefix, "ia3": _factors, "bitfit": lambda *_: {}}.get(c.method, _low_rank)
    adapters = fresh(config, boxed, key)
    return {**params, "adapters": _nested(adapters)} if adapters else params


@functools.cache
def adapter_weights(config: Config) -> int | None:
    """Weights of adapters that each token is multiplied with; None without adapters.

    The places that prompts and prefixes put ahead of a row are not among the tokens that are counted.
    """
    if config.adapter.method == "none":
        return None
    if config.adapter.method not in LOW_RANK:
        return 0

    def make() -> Any:
        key = jax.random.key(0)
        return attached(config, Decoder(config.model).init(key, jnp.zeros((1, 1), jnp.int32))["params"], key)["adapters"]

    named = jax.tree_util.tree_leaves_with_path(nn.unbox(jax.eval_shape(make)))
    factors = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf.size for path, leaf in named}
    own = sum(size for name, size in factors.items() if not name.endswith("magnitude"))
    shared = [name for name in factors if name.endswith("attention/lora_a")]  # each of those that share it is a product
    uses = sum("lora_b" in name and name.split("/")[-2] in SHARING for name in factors)
    return own + sum(factors[name] * (uses - 1) for name in shared)


def key_of(key: jax.Array, path: str) -> jax.Array:
    """A key for the parameter at `path`, whatever others there are."""
    return jax.random.fold_in(key, zlib.crc32(path.encode()))


def _box(value: jax.Array, names: Names) -> Any:
    return nn.LogicallyPartitioned(value, names)


def _frozen_layers(layers: Any) -> Any:
    """The layers with each projection's kernel as {"codes", "scale"}."""
    held = {}
    for name, value in layers.items():
        if isinstance(value, Mapping) and "kernel" in value:
            axes, kernel = contracted_axes(name), value["kernel"]
            stored = jax.vmap(lambda one, axes=axes: in_int8(one, axes))(kernel.value)
            scale_names = (kernel.names[0], *kernel.names[axes + 1 :])
            value = {**value, "kernel": {"codes": _box(stored.codes, kernel.names), "scale": _box(stored.scale, scale_names)}}
        elif isinstance(value, Mapping) and name != "experts":
            value = _frozen_layers(value)
        held[name] = value
    return held


def _low_rank(config: Config, boxed: Any, key: jax.Array) -> dict[str, Any]:
    """A is uniform and within 1 / sqrt(inputs), B is 0: what PEFT starts from. DoRA's magnitudes are the columns' lengths."""
    c, found, rank = config.adapter, projections(boxed["layers"]), config.adapter.rank
    made: dict[str, Any] = {}
    for path in adapted(config, boxed["layers"]):
        kernel, axes = found[path]["kernel"], contracted_axes(path.rsplit("/", 1)[-1])
        shape, names = kernel.value.shape, kernel.names
        inputs, outputs = shape[1 : axes + 1], shape[axes + 1 :]
        bound = 1 / math.sqrt(math.prod(inputs))
        first = first_factor(config, path)
        a = jax.random.uniform(key_of(key, first), (shape[0], *inputs, rank), jnp.float32, -bound, bound)
        b = jnp.zeros((shape[0], rank, *outputs), jnp.float32)
        made[first] = _box(a, (*names[: axes + 1], None))
        made[f"{path}/lora_b"] = _box(b, (names[0], None, *names[axes + 1 :]))
        if c.method == "dora":
            lengths = _lengths(config, kernel.value, a, b, axes)
            made[f"{path}/magnitude"] = _box(lengths, (names[0], *names[axes + 1 :]))
    return made


def _lengths(config: Config, kernel: jax.Array, a: jax.Array, b: jax.Array, axes: int) -> jax.Array:
    """[L, *out]: of the columns as they will be frozen, which int8 has rounded."""

    def of(kernel: jax.Array, a: jax.Array, b: jax.Array) -> jax.Array:
        base = in_int8(kernel, axes) if config.adapter.base == "int8" else kernel
        return LowRank(base, a, b, None, config.adapter.scale, "float32").lengths(axes)

    return jax.vmap(of)(kernel, a, b)


def first_factor(config: Config, path: str) -> str:
    """Where the first factor of a projection's update stands: beside it, or beside all that share it."""
    parent, _, module = path.rpartition("/")
    return f"{parent}/lora_a" if config.adapter.shared_input and module in SHARING else f"{path}/lora_a"


def _factors(config: Config, boxed: Any, key: jax.Array) -> dict[str, Any]:
    made, found = {}, projections(boxed["layers"])
    for path in adapted(config, boxed["layers"]):
        module, kernel = path.rsplit("/", 1)[-1], found[path]["kernel"]
        axes = contracted_axes(module)
        kept = slice(1, axes + 1) if rescales_inputs(module) else slice(axes + 1, None)
        shape = (kernel.value.shape[0], *kernel.value.shape[kept])
        made[f"{path}/rescale"] = _box(jnp.ones(shape, jnp.float32), (kernel.names[0], *kernel.names[kept]))
    return made


def _prompt(config: Config, boxed: Any, key: jax.Array) -> dict[str, Any]:
    """Copies of random tokens' vectors, which Lester et al. (2021) find better than random ones."""
    table = boxed["embed"]["tokens"]
    ids = jax.random.randint(key, (config.adapter.prompt_length,), 0, table.value.shape[0])
    return {"embed/prompt": _box(jnp.take(table.value, ids, axis=0).astype(jnp.float32), (None, table.names[1]))}


def _prefix(config: Config, boxed: Any, key: jax.Array) -> dict[str, Any]:
    """As small as kernels start."""
    made = {}
    for module in ("key", "value"):
        path = f"layers/attention/{module}"
        kernel = boxed["layers"]["attention"][module]["kernel"]
        shape = (kernel.value.shape[0], config.adapter.prompt_length, *kernel.value.shape[2:])
        drawn = config.model.init_std * jax.random.normal(key_of(key, path), shape)
        made[f"{path}/prefix"] = _box(drawn, (kernel.names[0], None, *kernel.names[2:]))
    return made


def _nested(flat: Mapping[str, Any]) -> dict[str, Any]:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree
