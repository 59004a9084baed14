"""Tries layouts, remat policies, micro-batches and batch sizes: a model prunes, and the compiler has the last word."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

from gptjax.config import Config, UserError
from gptjax.plan import memory, roofline
from gptjax.plan.chips import GIB, Topology
from gptjax.plan.report import plan
from gptjax.train.flops import matmul_parameters

REMATS = ("none", "dots", "full")
SLACK = 1.2  # the estimate was at most 10 % above the compiled program's memory: see experiments/plans


def search(
    config: Config,
    topology: Topology,
    *,
    batch_sizes: Sequence[int] = (),
    compile_best: int = 3,
    memory_gib: float = 0.0,
    efficiency: float = roofline.EFFICIENCY,
    log: Any = lambda text: None,
) -> list[dict[str, Any]]:
    """Candidates that fit, the fastest first, each {"knobs", "estimated_bytes", "estimated_tokens_per_second", "plan"}.

    The best `compile_best` by the model are compiled, where the topology is one to compile for, and ranked by their plans; the
    others follow without. Raises `UserError` where not one fits.
    """
    plan_limit = memory_gib * GIB or topology.device_memory
    tried, fitting = 0, []
    for candidate in candidates(config, topology.devices, batch_sizes or (config.data.batch_size,)):
        try:
            mesh, sizes = memory.estimate_over(candidate, topology.devices, topology.chip.kind)
        except UserError:
            continue
        tried += 1
        if plan_limit and sizes["total"] > SLACK * plan_limit:
            continue
        seconds = quick_seconds(candidate, mesh, topology, efficiency)
        rate = candidate.tokens_per_step / seconds if seconds else 0.0
        fitting.append((rate, -sizes["total"], candidate, sizes["total"]))
    log(f"{tried} layouts divide, {len(fitting)} of them fit by the estimate, or nearly")
    fitting.sort(key=lambda entry: entry[:2], reverse=True)
    rows: list[dict[str, Any]] = []
    left = compile_best if topology.chip.kind != "gpu" else 0
    for rate, _, candidate, size in fitting:
        if not left and plan_limit and size > plan_limit:
            continue
        row: dict[str, Any] = {
            "knobs": knobs(candidate),
            "estimated_bytes": size,
            "estimated_tokens_per_second": rate or None,
            "plan": None,
        }
        if left:
            log(f"compiling {describe_knobs(row['knobs'])}")
            row["plan"] = plan(candidate, topology, memory_gib=memory_gib, efficiency=efficiency)
            left -= 1
            if not row["plan"]["fits"]:
                log(f"  needs {row['plan']['memory']['total'] / GIB:.2f} GiB: does not fit after all")
                left += 1
                continue
        rows.append(row)
    if not rows:
        raise UserError(f"no layout over {topology.name} fits; try more chips, a smaller data.batch_size or model.remat=full.")
    return sorted(rows, key=_rank)


def _rank(row: dict[str, Any]) -> tuple[bool, float]:
    compiled = row["plan"] is not None
    rate = row["plan"].get("tokens_per_second", {}).get("in_turn") if compiled else row["estimated_tokens_per_second"]
    return (not compiled, -(rate or 0.0))


def candidates(config: Config, devices: int, batch_sizes: Sequence[int]) -> Iterator[Config]:
    """Configs over every data x fsdp x tensor = devices, remat policy, number of micro-batches and batch size.

    What the config lays over context, expert and stage stays as it is.
    """
    fixed = config.mesh.context * config.mesh.expert * config.mesh.stage
    if fixed < 1 or devices % fixed:
        raise UserError("--search needs mesh.context, mesh.expert and mesh.stage as numbers that divide the devices.")
    left = devices // fixed
    for tensor, remat, batch in itertools.product(_divisors(left), REMATS, batch_sizes):
        if config.model.num_kv_heads % tensor:
            continue
        for fsdp in _divisors(left // tensor):
            mesh = dataclasses.replace(config.mesh, data=left // tensor // fsdp, fsdp=fsdp, tensor=tensor)
            rows = batch // (left // tensor) if batch % (left // tensor) == 0 else 0
            for accumulation in _divisors(rows) if rows else ():
                yield dataclasses.replace(
                    config,
                    mesh=mesh,
                    model=dataclasses.replace(config.model, remat=remat),
                    data=dataclasses.replace(config.data, batch_size=batch),
                    train=dataclasses.replace(config.train, accumulation_steps=accumulation),
                )


def _divisors(number: int) -> list[int]:
    return [size for size in range(1, number + 1) if number % size == 0]


def quick_seconds(config: Config, mesh: Any, topology: Topology, efficiency: float) -> float:
    """A step's time before compiling: arithmetic, and what data, fsdp and tensor must send; 0 for chips without figures.

    fsdp gathers the weights twice (three times with recomputation) and scatters gradients once in every micro-batch; tensor adds
    up two residual vectors a layer, forward, backward and where they are computed again; data adds up gradients. Bandwidth is
    one dimension of the torus, both ways.
    """
    chip, model = topology.chip, config.model
    if not chip.peak_bfloat16:
        return 0.0
    arithmetic = roofline.flops_by_formula(config)["executed"] / (topology.devices * topology.device_peak * efficiency)
    data, fsdp, tensor = (mesh.shape[axis] for axis in ("data", "fsdp", "tensor"))
    weights = matmul_parameters(model) / tensor
    again = 1 if model.remat == "full" else 0
    micro = config.train.accumulation_steps
    sent = micro * weights * (2 * (2 + again) + 4) * (fsdp - 1) / fsdp
    sent += micro * 8 * weights / fsdp * (data - 1) / data
    tokens = config.tokens_per_step / memory.batch_shards(mesh) / mesh.shape["context"]
    sent += tokens * model.model_dim * 4 * 2 * model.num_layers * (2 + again) * (tensor - 1) / tensor
    return arithmetic + sent / (2 * chip.link_bandwidth)


def knobs(config: Config) -> dict[str, Any]:
    """The knobs that the search sets."""
    found = {f"mesh.{axis}": getattr(config.mesh, axis) for axis in ("data", "fsdp", "tensor")}
    return found | {
        "model.remat": config.model.remat,
        "train.accumulation_steps": config.train.accumulation_steps,
        "data.batch_size": config.data.batch_size,
    }


def describe_knobs(found: dict[str, Any]) -> str:
    return " ".join(f"--config.{key}={value}" for key, value in found.items())


def describe(rows: Sequence[dict[str, Any]], limit: int = 12) -> str:
    """The best rows as text."""
    lines = [f"{'':<10}{'GiB':>8}{'tokens/s':>14}{'MFU':>8}  knobs"]
    for row in rows[:limit]:
        report = row["plan"]
        size = report["memory"]["total"] if report else row["estimated_bytes"]
        rate = (
            report["tokens_per_second"]["in_turn"]
            if report and "tokens_per_second" in report
            else row["estimated_tokens_per_second"]
        )
        share = f"{100 * report['mfu']['in_turn']:.1f}%" if report and "mfu" in report else ""
        kind = "compiled" if report else "estimated"
        lines.append(
            f"{kind:<10}{size / GIB:>8.2f}{f'{rate:,.0f}' if rate else 'n/a':>14}{share:>8}  {describe_knobs(row['knobs'])}"
        )
    if len(rows) > limit:
        lines.append(f"and {len(rows) - limit} more that fit by the estimate")
    return "\n".join(lines)
