"""Compiles the real training step for devices that need not be here. `prepare` must run before JAX makes its first array."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from gptjax.config import Config, UserError
from gptjax.plan.chips import GIB, Topology


def prepare(topology: Topology) -> None:
    """Sets what JAX reads when it starts. Raises `UserError` where libtpu is wanted and absent."""
    if topology.chip.kind == "tpu" and importlib.util.find_spec("libtpu") is None:
        raise UserError(
            f'--topology={topology.name} is compiled by libtpu, which is not installed: pip install "gptjax[tpu]"; '
            "a GPU topology or cpu:8 needs none."
        )
    if "jax" not in sys.modules:
        os.environ["JAX_PLATFORMS"] = "cpu"
        os.environ["TPU_SKIP_MDS_QUERY"] = "1"  # libtpu would ask a metadata server which TPU it is on
        os.environ.setdefault("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")  # no TPU is touched, so plans may be made side by side
        os.environ.setdefault("TPU_MIN_LOG_LEVEL", "3")
    if topology.chip.kind == "cpu":
        import jax

        with contextlib.suppress(RuntimeError):  # it has begun already: find_devices counts what it has
            jax.config.update("jax_num_cpu_devices", topology.devices)


def find_devices(topology: Topology) -> list[Any]:
    """As many devices as the topology has: libtpu's descriptions of a slice, or virtual devices of this CPU."""
    import jax

    if topology.chip.kind == "cpu":
        if jax.device_count() < topology.devices:
            raise UserError(f"--topology={topology.name}: JAX has already begun with {jax.device_count()} devices.")
        return jax.devices()[: topology.devices]
    from jax.experimental import topologies

    options: dict[str, Any] = {}
    shape = topology.shape
    if topology.chip.name == "v4":
        options["chip_config_name"] = "megacore"  # a v4 chip's two cores are one JAX device on a TPU VM
    if topology.chips == 1:
        shape, options["chips_per_host_bounds"] = (1,) * topology.chip.dimensions, (1, 1, 1)
    name = f"{topology.chip.name}:{'x'.join(map(str, shape))}"
    try:
        return list(topologies.get_topology_desc(topology_name=name, platform="tpu", **options).devices)
    except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
        raise UserError(f"--topology={topology.name}: libtpu refuses it: {str(error).splitlines()[0]}.") from None


@dataclass(frozen=True)
class Compiled:
    """A training step compiled for a mesh; or, where it does not fit, the sizes that the compiler gave up at."""

    mesh: Any
    seconds: float
    text: str = ""
    flops_once: float = 0.0  # XLA's cost analysis, which counts the body of a loop once
    arguments: int = 0  # bytes on one device
    temporaries: int = 0
    outputs: int = 0  # those that are not donated arguments
    code: int = 0
    used: float = 0.0  # bytes that did not fit
    limit: float = 0.0  # of those that there are, by the compiler


def compile_step(config: Config, devices: Sequence[Any], on_cpu: bool) -> Compiled:
    """The training step of this config on these devices, as `make_train_step` builds it.

    `on_cpu=False` traces the forms and the attention that a TPU gets. Raises `UserError` as the mesh does.
    """
    import jax
    import jax.numpy as jnp

    from gptjax.model import primitives
    from gptjax.parallel.mesh import check_divides, make_mesh
    from gptjax.parallel.sharding import batch_sharding, laid_over, use_rules
    from gptjax.train.objectives import batch_arrays
    from gptjax.train.optimizers import Lengths
    from gptjax.train.step import abstract_state, make_train_step

    mesh = make_mesh(config.mesh, devices)
    check_divides(config, mesh)
    lengths = Lengths.of(config, 1.0)
    began = time.monotonic()
    with primitives.use_platform("cpu" if on_cpu else "tpu"):
        step = make_train_step(config, lengths, mesh).compiled  # type: ignore[attr-defined]
        with use_rules(config.mesh):
            rows = batch_sharding(mesh)
        shape = (config.data.batch_size, config.data.seq_len + 1)
        batch = {name: jax.ShapeDtypeStruct(shape, jnp.int32, sharding=rows) for name in batch_arrays(config)}
        with laid_over(mesh, config.mesh):
            lowered = step.lower(abstract_state(config, lengths, mesh), batch)
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        sizes = re.search(r"Used ([\d.]+)([KMGT]) of ([\d.]+)([KMGT])", str(error))
        if "RESOURCE_EXHAUSTED" not in str(error) or not sizes:
            raise
        unit = {"K": 2**10, "M": 2**20, "G": GIB, "T": 2**40}
        used, limit = float(sizes[1]) * unit[sizes[2]], float(sizes[3]) * unit[sizes[4]]
        return Compiled(mesh, time.monotonic() - began, used=used, limit=limit)
    memory, cost = compiled.memory_analysis(), compiled.cost_analysis()
    cost = cost[0] if isinstance(cost, list) else cost
    return Compiled(
        mesh,
        time.monotonic() - began,
        text=compiled.as_text(),
        flops_once=float(cost.get("flops", 0.0)),
        arguments=memory.argument_size_in_bytes,
        temporaries=memory.temp_size_in_bytes,
        outputs=memory.output_size_in_bytes - memory.alias_size_in_bytes,
        code=memory.generated_code_size_in_bytes,
    )
