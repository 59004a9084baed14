"""Tokens a second of the data pipeline alone: from memory-mapped tokens to batches in the training process.

    python experiments/speed/data.py [--json] [--seconds 1] [--rounds 5]

The source is the built-in one with the byte tokenizer. Every shape is measured in each of several rounds, one after another, so
that a busy moment of the machine meets all of them; the table gives the median and the best round. Loading and tokenizing are
timed with an empty cache and again with a full one.
"""

import argparse
import itertools
import json
import os
import pathlib
import platform
import statistics
import sys
import tempfile
import time

import grain
import numpy as np

from gptjax.config import Config, from_dict
from gptjax.data import pipeline

SHAPES = [(12, 64), (16, 256), (8, 1024), (64, 256), (32, 1024)]  # batch_size, seq_len: nanoGPT's CPU recipe first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--seconds", type=float, default=1.0, help="length of one measurement")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        result = {"machine": machine(), "load": load(pathlib.Path(folder)), "rows": measure(pathlib.Path(folder), args)}
    print(json.dumps(result) if args.json else table(result))


def machine() -> dict[str, str | int]:
    cpu = next(
        (line.split(":")[1].strip() for line in _lines("/proc/cpuinfo") if line.startswith("model name")), platform.machine()
    )
    python = platform.python_version()
    return {"cpu": cpu, "cores": os.cpu_count() or 0, "python": python, "numpy": np.__version__, "grain": grain.__version__}


def _lines(path: str) -> list[str]:
    return pathlib.Path(path).read_text().splitlines() if os.path.exists(path) else []


def load(folder: pathlib.Path) -> dict[str, float]:
    """Seconds of `load_dataset`, first with an empty cache and then with a full one."""
    config = config_of("packed", 16, 256, 0)
    seconds = []
    for _ in range(2):
        began = time.perf_counter()
        dataset = pipeline.load_dataset(config, log=lambda line: None, cache_dir=folder)
        seconds.append(time.perf_counter() - began)
    return {"empty_cache_seconds": seconds[0], "full_cache_seconds": seconds[1], "bytes": sum(dataset.report["bytes"].values())}


def config_of(packing: str, batch_size: int, seq_len: int, prefetch: int) -> Config:
    data = {"packing": packing, "batch_size": batch_size, "seq_len": seq_len, "prefetch": prefetch}
    return from_dict({"data": data, "train": {"duration_steps": 1}})


def measure(folder: pathlib.Path, args: argparse.Namespace) -> list[dict[str, str | int | float]]:
    cases = {}
    for packing, (batch_size, seq_len), prefetch in itertools.product(("packed", "windows"), SHAPES, (0, 16)):
        config = config_of(packing, batch_size, seq_len, prefetch)
        split = pipeline.load_dataset(config, log=lambda line: None, cache_dir=folder).train
        cases[packing, batch_size, seq_len, prefetch] = pipeline.train_batches(config, split)
    speeds: dict[tuple, list[float]] = {case: [] for case in cases}
    for _ in range(args.rounds):
        for case, batches in cases.items():
            next(batches)
            speeds[case].append(tokens_per_second(batches, args.seconds))
    names = ("packing", "batch_size", "seq_len", "prefetch")
    return [
        dict(zip(names, case, strict=True)) | {"tokens_per_second": statistics.median(found), "best": max(found)}
        for case, found in speeds.items()
    ]


def tokens_per_second(batches, seconds: float) -> float:
    began, tokens = time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < seconds:
        batch = next(batches)
        tokens += batch["tokens"][:, 1:].size
    return tokens / spent


def table(result: dict) -> str:
    load = result["load"]
    lines = [
        ", ".join(f"{name} {value}" for name, value in result["machine"].items()),
        f"load_dataset, {load['bytes'] / 1e6:.1f} MB: {load['empty_cache_seconds']:.2f} s with an empty cache, "
        f"{load['full_cache_seconds']:.2f} s with a full one",
        "",
        "| packing | batch_size | seq_len | prefetch | million tokens/s, median | best |",
        "|---|---|---|---|---|---|",
    ]
    for row in result["rows"]:
        *shape, median, best = row.values()
        lines.append(f"| {' | '.join(map(str, shape))} | {median / 1e6:.1f} | {best / 1e6:.1f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
