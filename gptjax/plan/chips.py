"""Chips, as their makers publish them, and topologies: how many of them, in which shape.

TPU figures are Google Cloud's documentation pages of each version (docs.cloud.google.com/tpu/docs/v4, v5e, v5p, v6e, tpu7x):
dense bfloat16 peak, HBM capacity and bandwidth, and the bidirectional ICI bandwidth of a chip; the v4 page has none, and its
300 GB/s each way are those of Jouppi et al., 2023 (six links of 50). One direction of one link is that total over the links of
the torus (two in each dimension) and over the two directions. GPU figures are NVIDIA's data sheets of the SXM forms; of a B200,
those of the HGX B200, whose GPUs have 180 GB.
"""

from __future__ import annotations

import difflib
import math
import re
from dataclasses import dataclass

from gptjax.config import UserError

GB, GIB = 10**9, 2**30


@dataclass(frozen=True)
class Chip:
    """One chip; a chip may be several JAX devices, which share it evenly."""

    name: str
    kind: str  # tpu, gpu or cpu
    peak_bfloat16: float  # FLOP/s, dense
    memory: float  # bytes
    memory_bandwidth: float  # bytes/s
    link_bandwidth: float  # bytes/s one way over one link of the torus; a GPU's: all of its NVLink one way
    dimensions: int = 0  # of the torus
    wraps_at: int = 0  # a dimension of a multiple of this many chips is a ring
    devices: int = 1  # JAX devices


CHIPS = {
    chip.name: chip
    for chip in (
        Chip("v4", "tpu", 275e12, 32 * GIB, 1200 * GB, 50 * GB, 3, 4),
        Chip("v5e", "tpu", 197e12, 16 * GIB, 819 * GB, 50 * GB, 2, 16),
        Chip("v5p", "tpu", 459e12, 95 * GIB, 2765 * GB, 100 * GB, 3, 4),
        Chip("v6e", "tpu", 918e12, 32 * GIB, 1638 * GB, 100 * GB, 2, 16),
        Chip("tpu7x", "tpu", 2307e12, 192 * GIB, 7380 * GB, 100 * GB, 3, 4, devices=2),
        Chip("a100", "gpu", 312e12, 80 * GB, 2039 * GB, 300 * GB),
        Chip("h100", "gpu", 989.4e12, 80 * GB, 3350 * GB, 450 * GB),
        Chip("h200", "gpu", 989.4e12, 141 * GB, 4800 * GB, 450 * GB),
        Chip("b200", "gpu", 2250e12, 180 * GB, 8000 * GB, 900 * GB),
        Chip("cpu", "cpu", 0.0, 0.0, 0.0, 0.0),
    )
}


@dataclass(frozen=True)
class Topology:
    """So many chips: of TPUs a torus, of GPUs (GPUs a node) x (nodes)."""

    chip: Chip
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        return f"{self.chip.name}:{'x'.join(map(str, self.shape))}"

    @property
    def chips(self) -> int:
        return math.prod(self.shape)

    @property
    def devices(self) -> int:
        return self.chips * self.chip.devices

    @property
    def device_memory(self) -> float:
        """Bytes of one JAX device."""
        return self.chip.memory / self.chip.devices

    @property
    def device_peak(self) -> float:
        """bfloat16 FLOP/s of one JAX device."""
        return self.chip.peak_bfloat16 / self.chip.devices


def parse_topology(text: str) -> Topology:
    """`CHIP:AxBxC`, as in v5p:4x4x4, v5e:2x2, h100:8x16, cpu:8.

    Raises `UserError` for an unknown chip, with the nearest known, and for a shape that such a slice cannot have.
    """
    name, colon, size = text.partition(":")
    if name not in CHIPS:
        near = difflib.get_close_matches(name.lower(), CHIPS, n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}?" if near else f"there are {', '.join(CHIPS)}."
        raise UserError(f"--topology={text}: unknown chip {name!r}; {hint}")
    chip = CHIPS[name]
    example = {"tpu": "2x2" if chip.dimensions == 2 else "4x4x4", "gpu": "8x16", "cpu": "8"}[chip.kind]
    if not colon or not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)*", size):
        raise UserError(f"--topology={text}: write the chips after the name, as in {name}:{example}.")
    shape = tuple(int(part) for part in size.split("x"))
    limit = {"tpu": chip.dimensions, "gpu": 2, "cpu": 1}[chip.kind]
    if len(shape) > limit or (chip.kind == "tpu" and len(shape) < limit and shape != (1,)):
        raise UserError(f"--topology={text}: {name} takes {limit} sizes, not {len(shape)}, as in {name}:{example}.")
    if chip.kind == "tpu":
        _check_slice(text, chip, shape)
    return Topology(chip, shape)


def _check_slice(text: str, chip: Chip, shape: tuple[int, ...]) -> None:
    """A host holds 2 x 2 chips, so a slice of several hosts has even sizes; a single chip is a host of its own."""
    if math.prod(shape) == 1:
        return
    odd = [size for size in shape[:2] if size % 2]
    if odd:
        nearest = "x".join(str(size + size % 2 if place < 2 else size) for place, size in enumerate(shape))
        raise UserError(
            f"--topology={text}: hosts of 2x2 chips do not divide it; the nearest that they do is {chip.name}:{nearest}."
        )
