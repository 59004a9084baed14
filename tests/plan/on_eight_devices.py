"""Run by test_plan.py in a process of its own, with 8 virtual devices. Prints one JSON object."""

from __future__ import annotations

import contextlib
import io
import json
import pathlib
import sys
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp
from jax.sharding import AxisType, NamedSharding

from gptjax import cli
from gptjax.parallel.mesh import make_mesh
from gptjax.plan import hlo, report, roofline
from gptjax.plan.chips import parse_topology
from gptjax.plan.compiled import Compiled, compile_step, find_devices, prepare
from gptjax.plan.search import search
from gptjax.train.optimizers import Lengths
from gptjax.train.step import init_state
from tests.small import LLAMA, small

CPU = "cpu:8"


def known_program() -> dict[str, Any]:
    """A scan of 5 over products that end in an all-reduce, and one all-gather after it; by shard_map, so that none else is."""
    mesh = jax.make_mesh((2, 4), ("a", "b"), axis_types=(AxisType.Auto,) * 2)

    def body(x, w):  # on one device x is [6, 3], w [3, 12]
        def one(x, _):
            return jnp.tanh(jax.lax.psum(x @ w, "b"))[:, :3], ()

        x, _ = jax.lax.scan(one, x, None, length=5)
        return jax.lax.all_gather(x, "a", tiled=True)

    run = jax.shard_map(
        body, mesh=mesh, in_specs=(jax.P("a", "b"), jax.P("b", None)), out_specs=jax.P(None, "b"), check_vma=False
    )
    arguments = [
        jax.ShapeDtypeStruct((12, 12), jnp.float32, sharding=NamedSharding(mesh, jax.P("a", "b"))),
        jax.ShapeDtypeStruct((12, 12), jnp.float32, sharding=NamedSharding(mesh, jax.P("b", None))),
    ]
    program = hlo.parse(jax.jit(run).lower(*arguments).compile().as_text())
    found = [(c.kind, c.bytes, c.full_bytes, c.wire_bytes, len(c.group), c.times) for c in program.collectives()]
    return {"collectives": sorted(found), "flops": program.matmul_flops(), "unread": program.unread}


def compiled(**knobs: Any) -> Compiled:
    config = small(LLAMA, model__num_layers=2, mesh__fsdp=2, mesh__tensor=2, mesh__data=2, **knobs)
    return compile_step(config, find_devices(parse_topology(CPU)), on_cpu=False)


def flops() -> dict[str, float]:
    """A scan over layers and over micro-batches, against the same written out."""
    knobs = {"data__batch_size": 16, "objective__loss_chunk": 1000}
    loops = hlo.parse(compiled(train__accumulation_steps=2, **knobs).text)
    unrolled = compiled(model__scan_unroll=0, **knobs)
    flat = hlo.parse(unrolled.text)
    return {
        "loops": loops.matmul_flops(),
        "loops_once": loops.matmul_flops(with_loops=False),
        "flat": flat.matmul_flops(),
        "flat_once": flat.matmul_flops(with_loops=False),
        "flat_cost_analysis": unrolled.flops_once,
    }


def experts() -> dict[str, Any]:
    """A mixture with more places than choices, its layers computed again, over expert and fsdp."""
    sizes = {"model.num_experts": 8, "model.expert_mlp_dim": 64, "model.num_shared_experts": 1, "model.model_dim": 32}
    knobs = {"model.expert_capacity_factor": 1.5, "model.remat": "full", "data.batch_size": 16, "objective.loss_chunk": 1000}
    config = small(LLAMA | {"model.mlp_dim": 0}, sizes, knobs, mesh__data=2, mesh__expert=2, mesh__fsdp=2)
    program = hlo.parse(compile_step(config, find_devices(parse_topology(CPU)), on_cpu=False).text)
    return {"formula": roofline.flops_by_formula(config), "compiler": 8 * program.matmul_flops()}


def memory() -> dict[str, Any]:
    """The plan's sizes, against the bytes of a state that is really laid over the devices, and against the compiled program's."""
    config = small(LLAMA, mesh__fsdp=2, mesh__tensor=2, mesh__data=2, model__num_layers=1)
    step: list[Compiled] = []

    def remembered(*arguments: Any, **options: Any) -> Compiled:
        step.append(compile_step(*arguments, **options))
        return step[-1]

    with mock.patch.object(report, "compile_step", remembered):
        made = report.plan(config, parse_topology(CPU))
    mesh = make_mesh(config.mesh)
    state = init_state(config, Lengths.of(config, 1.0), mesh)

    def held(tree: Any) -> int:
        shards = (shard for leaf in jax.tree.leaves(tree) for shard in leaf.addressable_shards)
        return sum(shard.data.nbytes for shard in shards if shard.device == mesh.devices.flat[3])

    return {
        "report": made,
        "text": report.describe(made),
        "parameters": held(state.params),
        "state": held(state),
        "compiled": [step[0].arguments, step[0].temporaries, step[0].outputs, step[0].code],
        "axes": sorted({row["axes"] for row in made["collectives"]}),
    }


def command(folder: pathlib.Path) -> dict[str, Any]:
    """Exit status, standard output and the file of a `gptjax plan` that does not fit."""
    recipe = pathlib.Path(__file__).resolve().parents[2] / "configs" / "shakespeare_char.py"
    output = folder / "plan.json"
    sizes = ["--config.model.num_layers=1", "--config.model.vocab_size=64", "--config.data.batch_size=8", "--memory_gib=0.001"]
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        status = cli.main(["plan", f"--config={recipe}:cpu", f"--topology={CPU}", f"--output={output}", "--json", *sizes])
    return {"status": status, "out": out.getvalue(), "file": json.loads(output.read_text())}


def searched() -> list[dict[str, Any]]:
    config = small(LLAMA, data__batch_size=16, model__num_layers=1)
    return search(config, parse_topology(CPU), compile_best=1, memory_gib=1.0)[:5]


if __name__ == "__main__":
    prepare(parse_topology(CPU))
    where = pathlib.Path(sys.argv[1])
    found = {
        "known": known_program(),
        "flops": flops(),
        "experts": experts(),
        "memory": memory(),
        "too_big": command(where),
        "search": searched(),
    }
    print(json.dumps(found))
