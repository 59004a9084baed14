"""`gptjax plan`: whether a run fits hardware that is not here, what it moves and how long it takes."""

from __future__ import annotations

import argparse
import pathlib
from typing import Any

from gptjax import recipes
from gptjax.config import UserError
from gptjax.verbs.arguments import add_verb, count, rate, required, share, sizes
from gptjax.verbs.output import log, print_json, write_json


def add(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "plan",
        run,
        "Say whether a run fits hardware that is not here, what it moves and how long it takes.",
        """examples:
  gptjax plan --config=configs/llama_7b.py --topology=v5p:4x4x4
  gptjax plan --config=configs/gpt2_124m.py --topology=v5e:2x2 --search --compile_best=2
  gptjax plan --config=configs/gpt2_124m.py --topology=h100:8x16
  gptjax plan --config=configs/shakespeare_char.py:cpu --topology=cpu:8 --config.model.vocab_size=65

Topologies: TPU slices by their chips (v4, v5p, tpu7x: AxBxC; v5e, v6e: AxB; 1 for a single chip), for which libtpu compiles the
real training step (extra: tpu; minutes, and some GiB of this machine's memory); cpu:N virtual devices; GPUs (a100, h100, h200,
b200) as GPUs-a-node x nodes, by formula and without times. The table gives parameters, memory on one device, FLOPs by formula
and by the compiler, collectives by kind and mesh axes, and a step's time. cost_analysis counts a loop's body once, so products,
collectives and memory traffic are read from the compiled program and multiplied by the trips of the loops they stand in.

Times are a roofline of the compiled program: each instruction takes the longer of its arithmetic, at --efficiency of the
published peak, and its memory traffic; collectives take the bytes that a device sends over the links of its group, either
hidden behind all that or in turn with it. The truth lies between the two, a slow input pipeline aside.

Exit status 1 where the run does not fit.""",
    )
    parser.add_argument("--config", metavar="FILE.py[:ARG]", help="recipe, or a config.json")
    parser.add_argument("--topology", metavar="CHIP:SHAPE", help="v5p:4x4x4, v5e:2x2, tpu7x:2x2x1, cpu:8, h100:8x16, ...")
    parser.add_argument("--output", metavar="FILE", help="also write the plan there, as JSON")
    parser.add_argument("--memory_gib", type=rate, default=0.0, metavar="X", help="memory of a device, in place of the chip's")
    parser.add_argument(
        "--efficiency", type=share, default=0.8, metavar="X", help="share of the peak that products reach, an assumption (0.8)"
    )
    parser.add_argument(
        "--search", action="store_true", help="try data x fsdp x tensor, remat policies and micro-batches, and rank them"
    )
    parser.add_argument(
        "--batch_sizes", type=sizes, default=(), metavar="N,N", help="--search: values of data.batch_size to try too"
    )
    parser.add_argument(
        "--compile_best", type=count, default=3, metavar="N", help="--search: how many of the best are compiled (3)"
    )


def run(arguments: argparse.Namespace) -> int:
    from gptjax.plan.chips import parse_topology
    from gptjax.plan.compiled import prepare

    topology = parse_topology(required(arguments, "topology"))
    config = recipes.load_recipe(required(arguments, "config"), arguments.overrides)
    if config.adapter.method != "none":
        raise UserError(f"gptjax plan counts what training all parameters takes, not adapter.method={config.adapter.method}.")
    prepare(topology)
    from gptjax.plan import report, search

    options = {"memory_gib": arguments.memory_gib, "efficiency": arguments.efficiency}
    if arguments.search:
        batch_sizes = arguments.batch_sizes or (config.data.batch_size,)
        rows = search.search(config, topology, batch_sizes=batch_sizes, compile_best=arguments.compile_best, log=log, **options)
        result: dict[str, Any] = {"topology": topology.name, "search": rows, "fits": True}
        text = search.describe(rows)
    else:
        result = report.plan(config, topology, **options)
        text = report.describe(result)
    if arguments.output:
        write_json(pathlib.Path(arguments.output), result)
    if arguments.json:
        print_json(result)
    else:
        print(text)
    return 0 if result["fits"] else 1
