"""The mesh of devices that a run is laid over."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils

from gptjax.config import Config, MeshConfig, UserError, attention_refusal, check_stages, layer_configs
from gptjax.parallel.pipeline import num_micro_batches

# Outermost first: neighbours along the last axis are the nearest devices, and tensor parallelism talks the most.
AXES = ("stage", "data", "fsdp", "expert", "context", "tensor")


def axis_sizes(config: MeshConfig, devices: int) -> dict[str, int]:
    """{axis: size} in the order of `AXES`, an axis of -1 taking what the others leave of `devices`.

    Raises `UserError` where there are too few devices, or where the others don't divide them.
    """
    given = {axis: getattr(config, axis) for axis in AXES}
    fixed = math.prod(size for size in given.values() if size != -1)
    named = ", ".join(f"mesh.{axis}={size}" for axis, size in given.items() if size not in (-1, 1)) or "the mesh"
    rest = next((axis for axis, size in given.items() if size == -1), None)
    if fixed > devices:
        raise UserError(f"{named} needs {fixed} devices, but there are {devices}.")
    if rest is not None and devices % fixed:
        raise UserError(f"{named} takes devices by {fixed}, which does not divide the {devices} that mesh.{rest}=-1 shares out.")
    return {axis: devices // fixed if size == -1 else size for axis, size in given.items()}


def make_mesh(config: MeshConfig, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """A mesh with all axes of `AXES` over `devices` (all of JAX's by default), or the first of them that it takes.

    Raises `UserError` as `axis_sizes` does, and where a process of several would have no device in it.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = axis_sizes(config, len(devices))
    taken = devices[: math.prod(sizes.values())]
    if idle := sorted({device.process_index for device in devices} - {device.process_index for device in taken}):
        raise UserError(
            f"the mesh takes {len(taken)} of {len(devices)} devices and none of process {idle[0]}'s; "
            "every process must hold a part of it: set one of the axes, mesh.data say, to -1."
        )
    # Auto axes: Linen's and our constraints name axes and leave the rest to the compiler.
    kinds = (jax.sharding.AxisType.Auto,) * len(AXES)
    # A dimension of a pod's torus may have to be split: jax.make_mesh refuses 8x8x16 chips as fsdp 256 by tensor 4.
    ordered = mesh_utils.create_device_mesh(tuple(sizes.values()), taken, allow_split_physical_axes=True)
    return jax.sharding.Mesh(ordered, AXES, axis_types=kinds)


def abstract_mesh(config: MeshConfig, devices: int) -> jax.sharding.AbstractMesh:
    """The mesh that `make_mesh` would give on so many devices, which need not be here."""
    sizes = axis_sizes(config, devices)
    kinds = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.sharding.AbstractMesh(tuple(sizes.values()), AXES, axis_types=kinds)


def batch_shards(mesh: Any) -> int:
    """How many parts a batch's rows are cut into."""
    return mesh.shape["data"] * mesh.shape["fsdp"] * mesh.shape["expert"]


def check_divides(config: Config, mesh: Any) -> None:
    """Raises `UserError` with the numbers where rows, heads or widths of a run don't divide over the mesh (a `Mesh`, or an
    `AbstractMesh` of devices that are not here).
    """
    model, data = config.model, config.data
    micro_batches = num_micro_batches(config.mesh, mesh.shape["stage"])
    over_rows = "mesh.data * mesh.fsdp * mesh.expert" + (" * mesh.micro_batches" if micro_batches > 1 else "")
    row_parts = batch_shards(mesh) * micro_batches
    rows = data.batch_size // config.train.accumulation_steps
    tensor, context = mesh.shape["tensor"], mesh.shape["context"]
    # Of 2c chunks of a row, a device has one early and one late: see model/context.py.
    length_parts = ("2 * mesh.context", 2 * context) if context > 1 else ("mesh.context", 1)
    needs = [
        ("data.batch_size / train.accumulation_steps", rows, over_rows, row_parts),
        ("evaluate.batch_size", config.evaluate.batch_size or rows, over_rows, row_parts),
        ("data.seq_len", data.seq_len, *length_parts),
        ("model.num_heads", model.num_heads, "mesh.tensor", tensor),
        ("model.num_kv_heads", model.num_kv_heads, "mesh.tensor", tensor),
        ("model.mlp_dim", 0 if model.num_experts else model.mlp_dim, "mesh.tensor", tensor),
        ("model.expert_mlp_dim", model.expert_mlp_dim, "mesh.tensor", tensor),
        ("model.num_experts", model.num_experts, "mesh.expert", mesh.shape["expert"]),
        ("model.num_layers", model.num_layers, "mesh.stage", mesh.shape["stage"]),
    ]
    if mesh.shape["expert"] > 1 and not model.num_experts:
        raise UserError(
            f"mesh.expert={mesh.shape['expert']}, but the model has no experts; set model.num_experts or mesh.expert=1."
        )
    for key, number, axes, size in needs:
        if number % size:
            raise UserError(f"{key}={number} does not divide over {axes}={size}; change one of them.")
    check_stages(model, mesh.shape["stage"])
    for layer in layer_configs(model) if model.attention != "auto" else ():
        if refusal := attention_refusal(layer, model.attention, data.seq_len, context):
            raise UserError(refusal)
