"""Adapters of all methods on small models, and what they come to in numpy's float64."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import Config
from gptjax.train.objectives import causal
from gptjax.train.run import named_leaves
from gptjax.train.step import hidden_states
from tests.small import GPT2, LLAMA, random_batch, random_params, small

WINDOWS = {"data.packing": "windows", "adapter.prompt_length": 3}
ALL_KERNELS = ("attention/", "mlp/")
CASES: dict[str, tuple[dict[str, Any], ...]] = {
    "lora": (GPT2, {"adapter.method": "lora", "adapter.rank": 3, "adapter.targets": ALL_KERNELS, "adapter.shared_input": True}),
    "rslora": (LLAMA, {"adapter.method": "lora", "adapter.rank": 4, "adapter.rank_stabilised": True, "adapter.alpha": 3.0}),
    "dora": (GPT2, {"adapter.method": "dora", "adapter.rank": 2, "adapter.targets": ALL_KERNELS}),
    "ia3": (GPT2, {"adapter.method": "ia3", "adapter.targets": ("query", "value", "down")}),
    "int8": (LLAMA, {"adapter.method": "dora", "adapter.rank": 2, "adapter.base": "int8", "adapter.targets": ("output", "up")}),
    "bitfit": (GPT2, {"adapter.method": "bitfit", "adapter.base": "int8"}),
    "prompt": (GPT2, {"adapter.method": "prompt"}, WINDOWS),
    "prefix": (GPT2, {"adapter.method": "prefix"}, WINDOWS),
}
MERGED = [name for name in CASES if name not in ("prompt", "prefix")]


def case(name: str, **knobs: Any) -> Config:
    return small(*CASES[name], {"optimizer.learning_rate": 0.02, "optimizer.schedule": "constant"}, **knobs)


def drawn(config: Config) -> Any:
    """Random parameters, adapters too, with codes of int8 that use their range."""
    params = random_params(config)
    rng = np.random.default_rng(7)

    def draw(path: Any, leaf: jax.Array) -> jax.Array:
        if leaf.dtype == jnp.int8:
            return jnp.asarray(rng.integers(-127, 128, leaf.shape), jnp.int8)
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith("kernel/scale"):  # of int8
            return jnp.asarray(rng.uniform(1e-3, 5e-3, leaf.shape), jnp.float32)
        if name.endswith(("rescale", "magnitude")):
            return leaf + 1
        return leaf

    return jax.tree_util.tree_map_with_path(draw, params)


def example_of(config: Config, rows: int = 2) -> Any:
    return causal({name: jnp.asarray(x) for name, x in random_batch(config, 0, rows).items()})


hidden = jax.jit(lambda config, params, example: hidden_states(config, params, example)[0], static_argnums=0)


def effective(config: Config, params: Any) -> dict[str, np.ndarray]:
    """{path: float64} of the decoder that the adapters make, by the papers' formulas."""
    c = config.adapter
    flat = {name: np.asarray(leaf, np.float64) for name, leaf in named_leaves(params).items()}
    found = {name: leaf for name, leaf in flat.items() if not name.startswith("adapters/")}
    for name in [name for name in found if name.endswith("kernel/codes")]:
        path = name.removesuffix("/codes")
        outputs = 2 if path.split("/")[-2] in ("query", "key", "value") else 1
        scale = found.pop(f"{path}/scale")
        codes = found.pop(name)
        found[path] = codes * scale.reshape(len(scale), *(1,) * (codes.ndim - 1 - outputs), *scale.shape[1:])
    scale = c.alpha / (np.sqrt(c.rank) if c.rank_stabilised else c.rank)
    for name in [name for name in flat if name.endswith("lora_b")]:
        path = name.removeprefix("adapters/").removesuffix("/lora_b")
        of_all = f"adapters/{path.rpartition('/')[0]}/lora_a"
        a, b = flat.get(f"adapters/{path}/lora_a", flat.get(of_all)), flat[name]
        updated = found[f"{path}/kernel"] + scale * np.stack([np.tensordot(x, y, 1) for x, y in zip(a, b, strict=True)])
        if c.method == "dora":
            inputs = tuple(range(1, a.ndim - 1))
            magnitude = flat[f"adapters/{path}/magnitude"]
            wide = magnitude.reshape(len(magnitude), *(1,) * len(inputs), *magnitude.shape[1:])
            updated = wide * updated / np.sqrt((updated**2).sum(inputs, keepdims=True))
        found[f"{path}/kernel"] = updated
    for name in [name for name in flat if name.endswith("rescale")]:
        path, factors = name.removeprefix("adapters/").removesuffix("/rescale"), flat[name]
        if path.endswith("down"):
            found[f"{path}/kernel"] = found[f"{path}/kernel"] * factors[:, :, None]
        else:
            found[f"{path}/kernel"] = found[f"{path}/kernel"] * factors[:, None]
            found[f"{path}/bias"] = found[f"{path}/bias"] * factors
    return found


def nested(flat: dict[str, Any]) -> Any:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        functools.reduce(lambda node, parent: node.setdefault(parent, {}), parents, tree)[leaf] = jnp.asarray(value, jnp.float32)
    return tree
