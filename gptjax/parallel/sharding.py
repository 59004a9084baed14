"""Where every array lives: logical axis names to mesh axes, in one table.

Parameters carry logical names from their declaration; activations are constrained by the same names. A misspelt name is a
KeyError, never a silent replication.
"""

from __future__ import annotations

from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

RULES: dict[str, str | None] = {
    # activations
    "batch": "data",
    "length": None,
    # parameters
    "layers": None,
    "vocab": None,
    "positions": None,
    "embed": None,
    "heads": None,
    "kv_heads": None,
    "head_dim": None,
    "mlp": None,
}


def spec(*names: str | None) -> PartitionSpec:
    """The mesh axes of an array whose dimensions have these logical names. Raises KeyError for a name outside `RULES`."""
    return PartitionSpec(*(None if name is None else RULES[name] for name in names))


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x`, laid out by its logical names where a mesh is set; elsewhere `x` itself."""
    layout = spec(*names)
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, layout)


def parameter_shardings(boxed: Any, mesh: Mesh) -> Any:
    """NamedShardings for a tree of Linen parameters that still carry their logical names (`nn.LogicallyPartitioned` boxes)."""
    return jax.tree.map(
        lambda names: NamedSharding(mesh, spec(*names)),
        nn.get_partition_spec(boxed),
        is_leaf=lambda leaf: isinstance(leaf, PartitionSpec),
    )


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """For arrays [B, ...] of a batch."""
    return NamedSharding(mesh, spec("batch"))
