"""The mesh of devices that a run is laid over."""

from __future__ import annotations

import jax

from gptjax.config import MeshConfig, UserError

AXES = ("data",)


def make_mesh(config: MeshConfig, batch_size: int | None = None) -> jax.sharding.Mesh:
    """A mesh over all devices (or the first `mesh.data` of them) with the axes of `AXES`.

    Raises `UserError` where there are too few devices, or where `batch_size` rows don't divide over the data axis.
    """
    devices = jax.devices()
    size = len(devices) if config.data == -1 else config.data
    if size > len(devices):
        raise UserError(f"mesh.data={config.data} needs {size} devices, but there are {len(devices)}.")
    if batch_size is not None and batch_size % size:
        raise UserError(
            f"{batch_size} rows a micro-batch do not divide over mesh.data={size} devices; change data.batch_size or mesh.data."
        )
    # Auto axes: Linen's and our constraints name axes and leave the rest to the compiler.
    return jax.make_mesh((size,), AXES, axis_types=(jax.sharding.AxisType.Auto,), devices=devices[:size])
