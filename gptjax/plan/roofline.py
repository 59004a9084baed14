"""From what a device multiplies, moves and sends to seconds, with every assumption in sight.

Each instruction of the compiled program takes the longer of its arithmetic (at `efficiency` of the published peak) and its memory
traffic (at the published bandwidth); they run one after another, as a TPU's core does. A collective takes what a device sends
(`Collective.wire_bytes`) over the links that its group spans: one in each direction of each dimension of the torus along which
the group extends, both only where the dimension closes to a ring. Latency, stragglers and the input pipeline cost nothing here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from gptjax.config import Config, ModelConfig
from gptjax.model.experts import capacity
from gptjax.plan.chips import Topology
from gptjax.plan.hlo import Collective, Program
from gptjax.train.flops import attention_parameters, attention_width, flops_per_token

EFFICIENCY = 0.8  # of the peak that large products reach; an assumption, not a measurement
CHIPLET_LINKS = 12  # a TPU7x's two halves: six times an ICI dimension, whose two directions are two links (Google's TPU7x page)


def expert_places(model: ModelConfig, length: int) -> float:
    """Rows that go through routed experts for each token: those of their capacity, filled or not; dropless, its choices."""
    if not model.expert_capacity_factor:
        return float(model.experts_per_token)
    return model.num_experts * capacity(model, length) / length


def empty_flops_per_token(model: ModelConfig, seq_len: int) -> float:
    """FLOPs on experts' places that no token takes, with the backward pass; below 0 where full ones hold not all choices."""
    if not model.num_experts:
        return 0.0
    matrices = 3 if model.gated_mlp else 2
    empty = expert_places(model, seq_len) - model.experts_per_token
    return 6.0 * model.num_blocks * empty * matrices * model.model_dim * model.expert_mlp_dim


def recomputed_flops_per_token(model: ModelConfig, seq_len: int, kernel: bool = False) -> float:
    """FLOPs that `model.remat` adds: "dots" computes attention again, "full" the block but for its last product, whose result
    no gradient needs; that of routed experts is needed, by their weights. `kernel`: attention's backward pass is two kernels,
    which draw the scores twice and their gradient twice: 7 products in place of 4.
    """
    attention = 4.0 * seq_len * attention_width(model)
    projections = 2.0 * attention_parameters(model)
    ups, experts = (2.0 if model.gated_mlp else 1.0), 0.0
    mlp_dim = model.mlp_dim
    if model.num_experts:
        mlp_dim = model.num_shared_experts * model.expert_mlp_dim
        experts = 2.0 * (ups + 1) * model.model_dim * model.expert_mlp_dim * expert_places(model, seq_len)
    up = 2.0 * ups * model.model_dim * mlp_dim
    again = {"none": 0.0, "dots": attention, "full": attention + projections + up + experts}[model.remat]
    return model.num_blocks * (again + (6.0 * seq_len * attention_width(model) if kernel else 0.0))


def flops_by_formula(config: Config, kernel: bool = False) -> dict[str, float]:
    """FLOPs of one step over all devices: `model` (train/flops.py: what the MFU counts), `recomputed`, on `empty` places of
    experts, and their sum, `executed`.
    """
    tokens, length = config.tokens_per_step, config.data.seq_len
    found = {
        "model": tokens * flops_per_token(config.model, length),
        "recomputed": tokens * recomputed_flops_per_token(config.model, length, kernel),
        "empty": tokens * empty_flops_per_token(config.model, length),
    }
    return found | {"executed": sum(found.values())}


def mesh_axes(group: Sequence[int], sizes: dict[str, int]) -> tuple[str, ...]:
    """The mesh axes along which a group of device numbers extends."""
    places = []
    for number in group:
        place = {}
        for axis, size in reversed(sizes.items()):
            number, place[axis] = divmod(number, size)
        places.append(place)
    return tuple(axis for axis in sizes if len({place[axis] for place in places}) > 1)


def link_bandwidth(group: Sequence[int], devices: Sequence[Any], topology: Topology) -> float:
    """Bytes a second that one device can send to its group at once, over all links that the group may use."""
    chip = topology.chip
    if chip.kind == "gpu":
        return chip.link_bandwidth
    coordinates = [devices[number].coords for number in group]
    links = 0
    for dimension, size in enumerate(topology.shape):
        extent = len({place[dimension] for place in coordinates})
        if extent > 1:
            links += 2 if extent == size and size % chip.wraps_at == 0 else 1
    return chip.link_bandwidth * (links / chip.devices if links else CHIPLET_LINKS)


def hops(group: Sequence[int], devices: Sequence[Any], topology: Topology) -> float:
    """By how much an all-to-all fills the links more than a ring does: its data travels a quarter of the longest dimension."""
    coordinates = [devices[number].coords for number in group]
    longest = max(len({place[dimension] for place in coordinates}) for dimension in range(len(topology.shape)))
    return max(1.0, longest / 4)


def collective_seconds(collective: Collective, devices: Sequence[Any], topology: Topology) -> float:
    """Seconds of all runs of a collective in one step."""
    bandwidth = link_bandwidth(collective.group, devices, topology)
    if collective.kind.endswith("all-to-all"):
        bandwidth /= hops(collective.group, devices, topology)
    return collective.times * collective.wire_bytes / bandwidth


def device_seconds(program: Program, peak: float, bandwidth: float) -> dict[str, float]:
    """Seconds of one step but for its collectives: `arithmetic` and `memory` each by itself, and `together`, instruction by
    instruction the longer of the two.
    """
    sums = {"arithmetic": 0.0, "memory": 0.0, "together": 0.0}
    for flops, traffic, times in program.work():
        arithmetic, memory = flops / peak, traffic / bandwidth
        sums["arithmetic"] += times * arithmetic
        sums["memory"] += times * memory
        sums["together"] += times * max(arithmetic, memory)
    return sums
