"""Where every array lives: logical axis names to mesh axes, in one table.

Parameters carry logical names from their declaration; activations are constrained by the same names. A misspelt name, two
names that want the same mesh axis in one array, and a dimension that does not divide are errors, never a silent replication.
"""

from __future__ import annotations

import contextlib
import difflib
import math
from collections.abc import Iterator, Mapping
from typing import Any

import jax
from flax import linen as nn
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from gptjax.config import MeshConfig, UserError

# A logical name's mesh axes, the outermost first; () keeps the dimension whole on every device.
RULES: Mapping[str, tuple[str, ...]] = {
    # activations
    "batch": ("data", "fsdp", "expert"),
    "length": ("context",),
    "stages": ("stage",),
    # parameters and activations
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "latent": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "lookup_width": ("tensor",),
    "expert_batch": ("data", "fsdp"),  # of rows that have gone to their experts: what "experts" leaves of "batch"
    # parameters
    "layers": ("stage",),
    "positions": (),
    "embed": ("fsdp",),
    "experts": ("expert",),
    "router": (),
    # Embedding and head: stored in parts of their width, since vocabularies (GPT-2's 50,257) seldom divide; "vocab" is how
    # logits lie, which need not divide.
    "table_rows": (),
    "table_width": ("fsdp", "tensor"),
    "table_factor": (),  # of the map from a narrow table to the model's width
    "prediction_heads": (),
}

_rules: Mapping[str, tuple[str, ...]] = RULES
_mesh_config = MeshConfig()


def rules_of(config: MeshConfig) -> Mapping[str, tuple[str, ...]]:
    """`RULES` with `mesh.rules` laid over: texts such as "vocab=tensor", "embed=fsdp+tensor", "mlp=" (whole).

    Raises `UserError` for a name or a mesh axis that does not exist.
    """
    from gptjax.parallel.mesh import AXES

    rules = dict(RULES)
    for rule in config.rules:
        name, equals, axes = rule.partition("=")
        if not equals:
            raise UserError(f"mesh.rules: {rule!r} must be NAME=AXIS, NAME=AXIS+AXIS or NAME= (whole on every device).")
        _known("name", name, RULES, rule)
        chosen = tuple(axis for axis in axes.split("+") if axis)
        for axis in chosen:
            _known("mesh axis", axis, AXES, rule)
        rules[name] = chosen
    return rules


def _known(what: str, name: str, known: Any, rule: str) -> None:
    if name not in known:
        near = difflib.get_close_matches(name, list(known), n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(known)}."
        raise UserError(f"mesh.rules: {rule!r} has an unknown {what} {name}; {hint}")


@contextlib.contextmanager
def use_rules(config: MeshConfig) -> Iterator[None]:
    """What is traced inside is laid out by the rules of this config."""
    global _rules, _mesh_config
    before = _rules, _mesh_config
    _rules, _mesh_config = rules_of(config), config
    try:
        yield
    finally:
        _rules, _mesh_config = before


@contextlib.contextmanager
def laid_over(mesh: Mesh, config: MeshConfig) -> Iterator[None]:
    """What is traced and run inside lies on this mesh, by the rules of this config."""
    with jax.set_mesh(mesh), use_rules(config):
        yield


def spec(*names: str | None, array: str = "an activation") -> PartitionSpec:
    """The mesh axes of an array whose dimensions have these logical names.

    Raises KeyError for a name outside the rules, `UserError` where two names share a mesh axis; both name `array`.
    """
    taken: dict[str, str] = {}
    entries: list[Any] = []
    for name in names:
        if name is not None and name not in _rules:
            raise KeyError(f"{array} has the logical name {name!r}, which the rules in gptjax/parallel/sharding.py lack")
        axes = () if name is None else _rules[name]
        for axis in axes:
            if axis in taken:
                raise UserError(
                    f"{array} {list(names)}: {taken[axis]!r} and {name!r} are both laid over mesh.{axis}; change mesh.rules."
                )
            taken[axis] = str(name)
        entries.append(axes[0] if len(axes) == 1 else axes or None)
    return PartitionSpec(*entries)


def constrain(x: jax.Array, *names: str | None) -> jax.Array:
    """`x`, laid out by its logical names where a mesh is set; elsewhere `x` itself."""
    layout = spec(*names)
    if jax.sharding.get_abstract_mesh().empty:
        return x
    return jax.lax.with_sharding_constraint(x, layout)


def parameter_specs(boxed: Any, mesh: Any) -> Any:
    """PartitionSpecs for a tree of Linen parameters that still carry their logical names (`nn.LogicallyPartitioned` boxes).

    Raises `UserError` naming the parameter where a dimension does not divide over its mesh axes.
    """

    def of(path: Any, leaf: Any, names: Any) -> PartitionSpec:
        array = "parameter " + jax.tree_util.keystr(path, simple=True, separator="/")
        layout = spec(*names, array=array)
        for size, name, axes in zip(leaf.shape, names, layout, strict=False):
            parts = 1
            for axis in (axes,) if isinstance(axes, str) else axes or ():
                parts *= mesh.shape[axis]
            if size % parts:
                over = axes if isinstance(axes, str) else "*".join(axes)
                raise UserError(f"{array} {leaf.shape}: {name}={size} does not divide over mesh {over}={parts}; see mesh.rules.")
        return layout

    return jax.tree_util.tree_map_with_path(of, nn.unbox(boxed), nn.get_partition_spec(boxed))


def parameter_shardings(boxed: Any, mesh: Mesh) -> Any:
    """`parameter_specs` as NamedShardings of this mesh."""
    specs = parameter_specs(boxed, mesh)
    return jax.tree.map(lambda layout: NamedSharding(mesh, layout), specs, is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))


def layout_table(boxed: Any, mesh: Any) -> list[dict[str, Any]]:
    """For each parameter {"name", "shape", "names", "spec", "bytes", "bytes_per_device"}; `mesh` may be an `AbstractMesh`."""
    rows = []
    specs = jax.tree.leaves(parameter_specs(boxed, mesh), is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
    names = jax.tree.leaves(nn.get_partition_spec(boxed), is_leaf=lambda leaf: isinstance(leaf, PartitionSpec))
    for (path, leaf), layout, logical in zip(jax.tree_util.tree_leaves_with_path(nn.unbox(boxed)), specs, names, strict=True):
        parts = math.prod(mesh.shape[axis] for axes in layout for axis in ((axes,) if isinstance(axes, str) else axes or ()))
        size = leaf.size * leaf.dtype.itemsize
        rows.append(
            {
                "name": jax.tree_util.keystr(path, simple=True, separator="/"),
                "shape": list(leaf.shape),
                "names": list(logical),
                "spec": [list(axes) if isinstance(axes, tuple) else axes for axes in layout],
                "bytes": size,
                "bytes_per_device": size // parts,
            }
        )
    return rows


def replicated(mesh: Mesh) -> NamedSharding:
    return NamedSharding(mesh, PartitionSpec())


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """For arrays [B, ...] of a batch."""
    return NamedSharding(mesh, spec("batch"))


def mesh_config() -> MeshConfig:
    """That of the `use_rules` or `laid_over` around; all defaults where there is none."""
    return _mesh_config


def axis_size(axis: str) -> int:
    """Parts along one axis of the mesh that is set; 1 where none is."""
    return int(jax.sharding.get_abstract_mesh().shape.get(axis, 1))


def parts(name: str) -> int:
    """Parts that the mesh which is set cuts a dimension of this logical name into; 1 where none is."""
    return math.prod(axis_size(axis) for axis in _rules[name])


def mesh_size() -> int:
    """Devices of the mesh that is set; 1 where none is."""
    mesh = jax.sharding.get_abstract_mesh()
    return 1 if mesh.empty else mesh.size
