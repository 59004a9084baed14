"""The plan of a run: what it needs and takes on a topology, as a dict and as text."""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Sequence
from typing import Any

from gptjax.config import Config, UserError
from gptjax.parallel.mesh import abstract_mesh
from gptjax.parallel.pipeline import bubble_fraction, num_micro_batches
from gptjax.plan import hlo, memory, roofline
from gptjax.plan.chips import GIB, Topology
from gptjax.plan.compiled import Compiled, compile_step, find_devices
from gptjax.train.flops import matmul_parameters
from gptjax.train.optimizers import Lengths


def plan(
    config: Config, topology: Topology, *, memory_gib: float = 0.0, efficiency: float = roofline.EFFICIENCY
) -> dict[str, Any]:
    """Everything about one step and the whole run on a topology; `fits` says whether a device's memory holds it.

    `memory_gib` takes the place of the chip's memory, and of this machine's for cpu:N, whose devices share it. Raises `UserError`
    where the config cannot run there at all.
    """
    if not config.model.vocab_size:
        raise UserError("model.vocab_size=0 waits for the tokenizer; give --config.model.vocab_size to plan the run.")
    if config.model.attention == "cudnn" and topology.chip.kind != "gpu":
        raise UserError(f"model.attention=cudnn runs on NVIDIA GPUs, not on {topology.name}; set model.attention=auto.")
    limit = memory_gib * GIB or topology.device_memory or _machine_memory() / topology.devices
    mesh = abstract_mesh(config.mesh, topology.devices)
    if mesh.size != topology.devices:
        axes = ", ".join(f"mesh.{axis}={size}" for axis, size in mesh.shape.items() if size > 1) or "the mesh"
        raise UserError(
            f"{axes} takes {mesh.size} of the {topology.devices} devices of {topology.name}; one axis of -1 takes what is left."
        )
    estimated = memory.estimate(config, mesh, topology.chip.kind)
    stages = mesh.shape["stage"]
    report: dict[str, Any] = {
        "topology": topology.name,
        "devices": topology.devices,
        "chip": dataclasses.asdict(topology.chip),
        "mesh": dict(mesh.shape),
        "compiled": topology.chip.kind != "gpu",
        "parameters": count_parameters(config),
        "matmul_parameters": matmul_parameters(config.model),
        "tokens_per_step": config.tokens_per_step,
        "flops": roofline.flops_by_formula(config),
        "memory": {"limit": limit, "estimated": estimated},
        "notes": [],
    }
    if stages > 1:
        report["bubble_fraction"] = bubble_fraction(stages, num_micro_batches(config.mesh, stages))
    if report["compiled"]:
        compiled = compile_step(config, find_devices(topology), on_cpu=topology.chip.kind == "cpu")
        _add_compiled(report, config, topology, compiled, efficiency)
    else:
        report["memory"]["total"] = estimated["total"]
        report["notes"].append("memory and FLOPs by formula only: GPUs are not compiled for, and no time is estimated.")
    report["fits"] = report["memory"]["total"] <= limit
    return report


def count_parameters(config: Config) -> int:
    import jax

    from gptjax.train.step import init_params

    return sum(leaf.size for leaf in jax.tree.leaves(jax.eval_shape(lambda: init_params(config, jax.numpy.uint32(0)))))


def _machine_memory() -> float:
    return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def _add_compiled(report: dict[str, Any], config: Config, topology: Topology, compiled: Compiled, efficiency: float) -> None:
    """Adds what the compiler says: memory, FLOPs, collectives, and the times that follow from them."""
    report["compile_seconds"] = compiled.seconds
    if compiled.used:
        report["memory"] |= {"total": compiled.used, "limit": min(report["memory"]["limit"], compiled.limit)}
        report["notes"].append("the compiler gave up for want of memory, so FLOPs are the formula's and there are no times.")
        return
    state = memory.state_bytes(config, compiled.mesh)
    parts = {
        **state,
        "batch": compiled.arguments - sum(state.values()),
        "temporaries": compiled.temporaries,
        "outputs": compiled.outputs,
        "program": compiled.code,
    }
    report["memory"] |= {"parts": parts, "total": sum(parts.values())}
    program = hlo.parse(compiled.text)
    in_kernels = program.kernel_flops()
    report["flops"] = roofline.flops_by_formula(config, kernel=in_kernels > 0)
    executed = report["flops"]["executed"]
    per_device = program.matmul_flops() + in_kernels
    report["flops"] |= {
        "compiler": per_device * topology.devices,
        "in_kernels": in_kernels * topology.devices,
        "compiler_loops_once": program.matmul_flops(with_loops=False) * topology.devices,
        "cost_analysis_loops_once": compiled.flops_once * topology.devices,
        "compiler_over_formula": per_device * topology.devices / executed,
    }
    devices = list(compiled.mesh.devices.flat)
    collectives = program.collectives()
    report["collectives"] = collective_table(collectives, dict(compiled.mesh.shape), devices, topology)
    if program.unread:
        report["notes"].append(f"loops whose trip count could not be read, counted once: {', '.join(program.unread)}.")
    if program.kernels():
        report["notes"].append(
            "the attention kernels' FLOPs are counted from their shapes, for the time half of the square; their memory "
            "traffic as what goes in and out once."
        )
    if config.model.num_experts and not config.model.expert_capacity_factor:
        report["notes"].append(
            "of dropless experts the formula counts the rows that tokens choose; their grouped products are compiled with room "
            "for the worst case, and on a CPU for each token with every expert."
        )
    if topology.device_peak:
        _add_times(report, config, topology, program, collectives, devices, efficiency)


def collective_table(
    collectives: Sequence[hlo.Collective], sizes: dict[str, int], devices: Sequence[Any], topology: Topology
) -> list[dict[str, Any]]:
    """One row for each (kind, mesh axes): runs a step, bytes of the full arrays, bytes that one device sends, seconds."""
    rows: dict[tuple[str, str], dict[str, Any]] = {}
    for collective in collectives:
        axes = "+".join(roofline.mesh_axes(collective.group, sizes)) or "-"
        row = rows.setdefault(
            (collective.kind, axes), {"kind": collective.kind, "axes": axes, "runs": 0, "bytes": 0.0, "sent": 0.0, "seconds": 0.0}
        )
        row["runs"] += collective.times
        row["bytes"] += collective.times * collective.full_bytes
        row["sent"] += collective.times * collective.wire_bytes
        if topology.chip.link_bandwidth:
            row["seconds"] += roofline.collective_seconds(collective, devices, topology)
    return sorted(rows.values(), key=lambda row: -row["sent"])


def _add_times(
    report: dict[str, Any],
    config: Config,
    topology: Topology,
    program: hlo.Program,
    collectives: Sequence[hlo.Collective],
    devices: Sequence[Any],
    efficiency: float,
) -> None:
    peak = topology.device_peak
    seconds = roofline.device_seconds(program, peak * efficiency, topology.chip.memory_bandwidth / topology.chip.devices)
    network = sum(roofline.collective_seconds(collective, devices, topology) for collective in collectives)
    # Idle stages work on zeros, so the program's own time holds the bubble.
    bounds = {"overlapped": max(seconds["together"], network), "in_turn": seconds["together"] + network}
    report["seconds"] = {
        "efficiency": efficiency,
        "arithmetic": seconds["arithmetic"],
        "memory": seconds["memory"],
        "device": seconds["together"],
        "collectives": network,
        **bounds,
    }
    report["mfu"] = {name: report["flops"]["model"] / (step * peak * topology.devices) for name, step in bounds.items()}
    report["tokens_per_second"] = {name: config.tokens_per_step / step for name, step in bounds.items()}
    steps = run_steps(config)
    if steps is None:
        report["notes"].append("the run's length is given in epochs, so its steps are known only with the data.")
        return
    report["steps"] = steps
    report["run_days"] = {name: steps * step / 86400 for name, step in bounds.items()}


def run_steps(config: Config) -> int | None:
    """Steps of the whole run; None where only the data would tell."""
    return None if config.train.duration_epochs else Lengths.of(config, 1.0).total


# --- text --------------------------------------------------------------------------------------


def describe(report: dict[str, Any]) -> str:
    """The plan as lines of text."""
    chip, flops, sizes = report["chip"], report["flops"], report["memory"]
    verdict = "fits" if report["fits"] else "DOES NOT FIT"
    mesh = ", ".join(f"{axis} {size}" for axis, size in report["mesh"].items() if size > 1) or "1 device"
    lines = [
        f"{report['topology']}: {report['devices']} devices; mesh {mesh}",
        f"{report['parameters']:,} parameters; {report['tokens_per_step']:,} tokens a step",
        "",
        "memory on one device, GiB",
        *_memory_lines(sizes),
        f"  {'total':<24}{sizes['total'] / GIB:10.2f} of {sizes['limit'] / GIB:.2f}: {verdict}",
        "",
        "FLOPs of one step, all devices",
        f"  {'model (6P + 12LTNH)':<24}{flops['model']:10.4g}",
        f"  {'recomputed (remat)':<24}{flops['recomputed']:10.4g}",
        *([f"  {'empty expert places':<24}{flops['empty']:10.4g}"] if flops["empty"] else []),
        f"  {'executed, by formula':<24}{flops['executed']:10.4g}",
    ]
    if "compiler" in flops:
        over = 100 * (flops["compiler_over_formula"] - 1)
        lines += [
            f"  {'executed, by compiler':<24}{flops['compiler']:10.4g}  ({over:+.2f} % of the formula's)",
            f"  {'its own count':<24}{flops['cost_analysis_loops_once']:10.4g}  (cost_analysis: a loop's body once)",
        ]
    if report.get("collectives"):
        lines += [
            "",
            "collectives of one step",
            f"  {'kind':<20}{'mesh axes':<16}{'runs':>7}{'GB':>11}{'GB sent':>11}{'seconds':>10}",
        ]
        lines += [
            f"  {row['kind']:<20}{row['axes']:<16}{row['runs']:>7,}{row['bytes'] / 1e9:>11.3f}{row['sent'] / 1e9:>11.3f}"
            f"{row['seconds']:>10.4f}"
            for row in report["collectives"]
        ]
        lines.append("  GB: the whole arrays, once gathered or before they are scattered; GB sent: by one device")
    if "bubble_fraction" in report:
        lines += ["", f"pipeline bubble: {100 * report['bubble_fraction']:.1f} % of each stage's time"]
    if "seconds" in report:
        lines += ["", *_time_lines(report, chip)]
    lines += [f"note: {note}" for note in report["notes"]]
    return "\n".join(lines)


def _memory_lines(sizes: dict[str, Any]) -> list[str]:
    lines = [
        f"  {name:<24}{size / GIB:10.2f}" for name, size in sizes.get("parts", sizes["estimated"]).items() if name != "total"
    ]
    if "parts" in sizes:
        lines.append(f"  {'(estimate, uncompiled)':<24}{sizes['estimated']['total'] / GIB:10.2f}")
    return lines if "parts" in sizes or sizes["total"] == sizes["estimated"]["total"] else []


def _time_lines(report: dict[str, Any], chip: dict[str, Any]) -> list[str]:
    seconds = report["seconds"]
    lines = [
        "one step, seconds (an estimate: a roofline of the compiled program)",
        f"  {'arithmetic':<24}{seconds['arithmetic']:10.4f}  at {100 * seconds['efficiency']:.0f} % (assumed) of "
        f"{chip['peak_bfloat16'] / 1e12:.4g} TFLOP/s a chip",
        f"  {'memory':<24}{seconds['memory']:10.4f}  at {chip['memory_bandwidth'] / 1e9:.4g} GB/s a chip",
        f"  {'device':<24}{seconds['device']:10.4f}  the longer of the two, instruction by instruction",
        f"  {'collectives':<24}{seconds['collectives']:10.4f}  at {chip['link_bandwidth'] / 1e9:.4g} GB/s a link and direction",
        "",
        f"  {'':<24}{'step':>10}{'MFU':>9}{'tokens/s':>14}{'run':>14}",
    ]
    for name, words in (("overlapped", "collectives hidden"), ("in_turn", "collectives in turn")):
        days = report["run_days"][name] if "run_days" in report else math.nan
        lines.append(
            f"  {words:<24}{seconds[name]:9.3f}s{100 * report['mfu'][name]:8.1f}%{report['tokens_per_second'][name]:>14,.0f}"
            f"{'n/a' if math.isnan(days) else f'{days:.2f} days':>14}"
        )
    return lines
