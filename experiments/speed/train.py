"""Tokens a second and peak memory of a training step: gptjax beside transformers' GPT-2 in torch.

    python experiments/speed/train.py --size cpu,gpu,124m --worker gptjax,torch-sdpa,torch-eager,torch-compile --rounds 5
    --json figures.json

Each worker is a process of its own, so that its peak memory is its own; it builds, compiles, and then waits. Rounds alternate
between the workers, since a machine's speed drifts; figures are medians over rounds. The model, the batch and the step are
the same everywhere: GPT-2 with biases and tanh GELU, float32, clipping at norm 1, AdamW (torch: fused). README.md has the
results.
"""

from __future__ import annotations

import argparse
import json
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from typing import Any

# layers, heads, width, context, rows, vocabulary, dropout; seconds a worker runs in one round
SIZES = {
    "cpu": {"layers": 4, "heads": 4, "width": 128, "context": 64, "batch": 12, "vocab": 65, "dropout": 0.0, "seconds": 1.5},
    "gpu": {"layers": 6, "heads": 6, "width": 384, "context": 256, "batch": 8, "vocab": 65, "dropout": 0.2, "seconds": 4.0},
    "124m": {"layers": 12, "heads": 12, "width": 768, "context": 256, "batch": 4, "vocab": 50257, "dropout": 0.0, "seconds": 9.0},
}
# What a gptjax worker may be given after its name, as in `gptjax+plain+scan`: overrides of the config, of the environment,
# and other switches.
OPTIONS: dict[str, dict[str, Any]] = {
    "scan": {"config": {"model.scan_unroll": 1}},
    "dense": {"config": {"model.attention": "dense"}},
    "remat": {"config": {"model.remat": "dots"}},
    "plain": {"form": "plain"},
    "nomalloc": {"malloc": False},
    "hugepages": {"env": {"GLIBC_TUNABLES": "glibc.malloc.hugetlb=1"}},
    "vector512": {"env": {"XLA_FLAGS": "--xla_cpu_prefer_vector_width=512"}},
    "fastminmax": {"env": {"XLA_FLAGS": "--xla_cpu_enable_fast_min_max=true"}},
    "scheduler": {"env": {"XLA_FLAGS": "--xla_cpu_enable_concurrency_optimized_scheduler=true"}},
    "onednn": {"env": {"XLA_FLAGS": "--xla_cpu_use_onednn=true"}},
    "noynn": {"env": {"XLA_FLAGS": "--xla_cpu_experimental_ynn_fusion_type="}},
    "ynndot": {"env": {"XLA_FLAGS": "--xla_cpu_experimental_ynn_fusion_type=LIBRARY_FUSION_TYPE_DOT"}},
}
THREADS = 2


# --- workers: build() gives a function that takes one step and waits for it --------------------


def build_gptjax(size: dict[str, Any], options: list[str]) -> Callable[[], Any]:
    settings = [OPTIONS.get(name) or {"config": dict([name.split("=", 1)])} for name in options]
    if all(setting.get("malloc", True) for setting in settings):
        from gptjax import runtime

        runtime.keep_freed_memory()
    import contextlib

    import jax
    import numpy as np

    from gptjax import config as schema
    from gptjax import recipes
    from gptjax.model import primitives
    from gptjax.parallel.mesh import make_mesh
    from gptjax.train.optimizers import Lengths
    from gptjax.train.step import init_state, make_train_step

    values = schema.defaults()
    model, data = values.model, values.data
    model.num_layers, model.num_heads, model.model_dim = size["layers"], size["heads"], size["width"]
    model.vocab_size, model.max_seq_len, model.scan_unroll = size["vocab"], size["context"], 0
    model.embedding_dropout = model.attention_dropout = model.residual_dropout = size["dropout"]
    data.batch_size, data.seq_len, data.packing = size["batch"], size["context"], "windows"
    values.optimizer.clip_norm = 1.0
    values.train.duration_steps = 1000
    for setting in settings:
        for key, value in setting.get("config", {}).items():
            recipes.apply_override(values, f"{key}={value}")
    config = schema.from_dict(values)
    mesh, lengths = make_mesh(config.mesh), Lengths(1000, 0, 1000)
    form = next((setting["form"] for setting in settings if "form" in setting), None)
    with primitives.use_form(form) if form else contextlib.nullcontext():
        step, state = make_train_step(config, lengths, mesh), init_state(config, lengths, mesh)
        shape = (size["batch"], size["context"] + 1)
        tokens = np.random.default_rng(0).integers(0, size["vocab"], shape, dtype=np.int32)
        positions = np.broadcast_to(np.arange(shape[1], dtype=np.int32), shape).copy()
        batch = {"tokens": tokens, "segment_ids": np.ones(shape, np.int32), "positions": positions}
        state, metrics = step(state, batch)

    def one_step() -> float:
        nonlocal state, metrics
        state, metrics = step(state, batch)
        return float(jax.block_until_ready(metrics["loss"]))

    return one_step


def build_torch(size: dict[str, Any], options: list[str]) -> Callable[[], Any]:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.set_num_threads(THREADS)
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=size["vocab"],
        n_positions=size["context"],
        n_embd=size["width"],
        n_layer=size["layers"],
        n_head=size["heads"],
        resid_pdrop=size["dropout"],
        embd_pdrop=size["dropout"],
        attn_pdrop=size["dropout"],
        use_cache=False,
        bos_token_id=0,
        eos_token_id=0,
    )
    config._attn_implementation = "eager" if "eager" in options else "sdpa"
    model: Any = GPT2LMHeadModel(config).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    forward = torch.compile(model) if "compile" in options else model
    tokens = torch.randint(0, size["vocab"], (size["batch"], size["context"] + 1))
    inputs, targets = tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()

    def one_step() -> float:
        logits = forward(input_ids=inputs).logits
        loss = torch.nn.functional.cross_entropy(logits.reshape(-1, size["vocab"]), targets.reshape(-1))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return one_step


def work(name: str, size: dict[str, Any]) -> None:
    """Serves rounds: each line on standard input is a number of seconds, each answer a line of JSON."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    framework, *options = name.replace("torch-", "torch+").split("+")
    start = time.perf_counter()
    one_step = {"gptjax": build_gptjax, "torch": build_torch}[framework](size, options)
    one_step()
    setup = time.perf_counter() - start
    one_step()
    print(json.dumps({"setup_seconds": setup}), file=answers, flush=True)
    for line in sys.stdin:
        steps, start, cpu_start = 0, time.perf_counter(), time.process_time()
        while steps < 1 or time.perf_counter() - start < float(line):
            loss = one_step()
            steps += 1
        seconds = (time.perf_counter() - start) / steps
        cpu_seconds = (time.process_time() - cpu_start) / steps
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # kilobytes to GiB
        print(
            json.dumps({"seconds": seconds, "cpu_seconds": cpu_seconds, "peak_gib": peak, "loss": loss}), file=answers, flush=True
        )


# --- the comparison ------------------------------------------------------------------------


class Worker:
    def __init__(self, name: str, size: str):
        self.name, self.rounds = name, []
        command = [sys.executable, __file__, "--work", name, "--size", size]
        root = str(pathlib.Path(__file__).resolve().parents[2])
        environment = os.environ | {
            "PYTHONPATH": root,
            "JAX_PLATFORMS": "cpu",
            "OMP_NUM_THREADS": str(THREADS),
            "HF_HUB_OFFLINE": "1",
        }
        environment.setdefault(
            "OMP_WAIT_POLICY", "PASSIVE"
        )  # torch: spinning threads of a waiting worker would disturb the others
        for option in name.split("+")[1:]:
            environment |= OPTIONS.get(option, {}).get("env", {})
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=environment
        )
        self.setup_seconds = 0.0

    def wait(self) -> None:
        self.setup_seconds = self.answer()["setup_seconds"]

    def answer(self) -> dict[str, float]:
        line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"worker {self.name} ended with status {self.process.wait()}; run it alone with --work {self.name}.")
        return json.loads(line)

    def run(self, seconds: float) -> None:
        self.process.stdin.write(f"{seconds}\n")
        self.process.stdin.flush()
        self.rounds.append(self.answer())

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait()


def compare(size_name: str, names: list[str], rounds: int) -> dict[str, Any]:
    size = SIZES[size_name]
    tokens = size["batch"] * size["context"]
    workers = [Worker(name, size_name) for name in names]
    for worker in workers:
        worker.wait()
    for round_number in range(rounds):
        for worker in workers if round_number % 2 == 0 else reversed(workers):
            worker.run(size["seconds"])
    results = {}
    for worker in workers:
        times = [r["seconds"] for r in worker.rounds]
        results[worker.name] = {
            "milliseconds": 1000 * statistics.median(times),
            "fastest_milliseconds": 1000 * min(times),
            "tokens_per_second": tokens / statistics.median(times),
            "peak_gib": worker.rounds[-1]["peak_gib"],
            "setup_seconds": worker.setup_seconds,
            "rounds": [1000 * t for t in times],
            "cpu_milliseconds": 1000 * statistics.median(r["cpu_seconds"] for r in worker.rounds),
        }
        worker.close()
    return results


def report(size_name: str, results: dict[str, Any]) -> None:
    first = next(iter(results.values()))
    print(
        f"\n{size_name}\n{'worker':40} {'ms/step':>9} {'fastest':>9} {'CPU ms':>9} {'tokens/s':>9} "
        f"{'peak GiB':>9} {'set-up s':>9} {'first/this':>10}"
    )
    for name, r in results.items():
        # A ratio in each round, then the median: what slows the machine for a while slows both.
        ratio = statistics.median(b / a for a, b in zip(first["rounds"], r["rounds"], strict=True))
        r["speed_of_first_relative_to_this"] = ratio
        print(
            f"{name:40} {r['milliseconds']:9.1f} {r['fastest_milliseconds']:9.1f} {r['cpu_milliseconds']:9.1f} "
            f"{r['tokens_per_second']:9.0f} {r['peak_gib']:9.2f} {r['setup_seconds']:9.1f} {ratio:10.3f}",
            flush=True,
        )
    best = min((r["speed_of_first_relative_to_this"] for name, r in results.items() if name.startswith("torch")), default=None)
    if best is not None:
        print(f"{next(iter(results))} / best torch: {best:.3f}", flush=True)


def versions() -> dict[str, str]:
    import importlib.metadata as metadata

    found = {name: metadata.version(name) for name in ("jax", "flax", "optax", "torch", "transformers")}
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    models = [line.split(":")[1].strip() for line in lines if line.startswith("model name")]
    return found | {
        "python": platform.python_version(),
        "cpu": models[0] if models else platform.processor(),
        "cores": str(os.cpu_count()),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="cpu,gpu,124m")
    parser.add_argument("--worker", default="gptjax,torch-sdpa,torch-eager,torch-compile", help="compared with the first")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--work", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.work:
        return work(arguments.work, SIZES[arguments.size])
    figures: dict[str, Any] = {"versions": versions(), "threads": THREADS, "sizes": {}}
    for size in arguments.size.split(","):
        figures["sizes"][size] = compare(size, arguments.worker.split(","), arguments.rounds)
        report(size, figures["sizes"][size])
        if arguments.json:
            pathlib.Path(arguments.json).write_text(json.dumps(figures, indent=2) + "\n")


if __name__ == "__main__":
    main()
