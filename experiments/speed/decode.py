"""Speed of generation on a CPU: GPT-2 124M with random weights, against transformers' `generate` and the bound of memory.

    python experiments/speed/decode.py                           # batch 1 and 8, all kinds, 3 rounds
    python experiments/speed/decode.py --batch 1 --rounds 5 --json figures.json

Rounds alternate: in each one every kind generates once, in turning order, and the bandwidth of a streaming read with all
threads is taken beside it, over as many bytes as a token reads. Prefill: the time to the first token; decode: what others take.
`share` of the bound: (bytes of weights read a token / measured bandwidth) / seconds a decoding step. `over` a kind: the median
over rounds of its seconds a step by ours.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # torch's idle threads are not to disturb the others

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gptjax.config import ModelConfig, from_dict
from gptjax.generate import weights
from gptjax.generate.decode import generate_tokens
from gptjax.generate.settings import GenerationConfig
from gptjax.model.decoder import Decoder

SIZES = {"vocab_size": 50257, "num_layers": 12, "model_dim": 768, "num_heads": 12, "max_seq_len": 1024}
OURS = ("float32", "bfloat16", "int8")
THEIRS = ("torch-float32", "torch-bfloat16")

Run = Callable[[int, int], None]  # (rows, new tokens): generates them


@functools.cache
def model() -> tuple[ModelConfig, Any]:
    values: Any = {"model": SIZES, "data": {"seq_len": 1}, "train": {"duration_steps": 1}}
    config = from_dict(values).model
    boxed = jax.eval_shape(lambda: Decoder(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"])
    rng = np.random.default_rng(0)
    return config, jax.tree.map(lambda leaf: jnp.asarray(rng.normal(0, 0.02, leaf.shape), jnp.float32), nn.unbox(boxed))


def ours(kind: str, prompt: int) -> tuple[Run, int]:
    """(run, bytes of weights that a step reads)."""
    config, params = model()
    params = jax.block_until_ready(weights.prepare(params, config, kind))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, prompt).tolist()
    read = sum(leaf.nbytes for leaf in jax.tree.leaves(params)) - params["embed"]["positions"].nbytes

    def run(rows: int, new: int) -> None:
        settings = GenerationConfig(max_new_tokens=new, do_sample=False)
        generated = generate_tokens(
            params, config, [tokens] * rows, settings=settings, seed=0, eos_ids=(), vocab_size=config.vocab_size
        )
        assert generated.num_new.tolist() == [new] * rows

    return run, read


def theirs(kind: str, prompt: int, threads: int) -> Run:
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel
    from transformers import logging as transformers_logging

    transformers_logging.set_verbosity_error()
    torch.set_num_threads(threads)
    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config()).eval().to(getattr(torch, kind.removeprefix("torch-")))
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 50257, prompt))

    def run(rows: int, new: int) -> None:
        options: Any = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "use_cache": True, "pad_token_id": 0}
        with torch.inference_mode():
            out = model.generate(ids.expand(rows, -1), attention_mask=torch.ones(rows, prompt, dtype=torch.long), **options)
        assert out.shape == (rows, prompt + new)

    return run


def bandwidth(size: int, threads: int) -> float:
    """Bytes a second of a streaming read over `size` bytes, with all threads: the best of five."""
    import torch

    torch.set_num_threads(threads)
    array = torch.ones(size // 4)
    seconds = []
    for _ in range(5):
        begin = time.perf_counter()
        array.sum()
        seconds.append(time.perf_counter() - begin)
    return size / min(seconds)


def seconds(run: Run, rows: int, new: int) -> float:
    begin = time.perf_counter()
    run(rows, new)
    return time.perf_counter() - begin


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--batch", default="1,8")
    parser.add_argument("--kinds", default=",".join(OURS + THEIRS))
    parser.add_argument("--prompt", type=int, default=128)
    parser.add_argument("--new", type=int, default=128)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", metavar="FILE")
    arguments = parser.parse_args()
    threads, kinds = os.cpu_count() or 1, arguments.kinds.split(",")
    runs: dict[str, Run] = {}
    read: dict[str, int] = {}
    for kind in kinds:
        if kind in OURS:
            runs[kind], read[kind] = ours(kind, arguments.prompt)
        else:
            runs[kind] = theirs(kind, arguments.prompt, threads)

    figures = []
    for rows in map(int, arguments.batch.split(",")):
        for kind in kinds:  # compiles, and warms the allocator; ours compiles again for the bucket of one token
            runs[kind](rows, arguments.new)
            runs[kind](rows, 1)
        steps: dict[str, list[float]] = {kind: [] for kind in kinds}
        firsts: dict[str, list[float]] = {kind: [] for kind in kinds}
        shares: dict[str, list[float]] = {kind: [] for kind in read}
        rates: dict[str, list[float]] = {kind: [] for kind in read}
        for number in range(arguments.rounds):
            for kind in kinds[number % len(kinds) :] + kinds[: number % len(kinds)]:
                first, whole = seconds(runs[kind], rows, 1), seconds(runs[kind], rows, arguments.new)
                firsts[kind].append(first)
                steps[kind].append((whole - first) / (arguments.new - 1))
                if kind in read:
                    rates[kind].append(bandwidth(read[kind], threads))
                    shares[kind].append(read[kind] / rates[kind][-1] / steps[kind][-1])
        for kind in kinds:
            row: dict[str, Any] = {"batch": rows, "kind": kind}
            row["prefill tokens/s"] = rows * arguments.prompt / statistics.median(firsts[kind])
            row["decode tokens/s"] = rows / statistics.median(steps[kind])
            row["ms a step"], row["fastest"] = 1e3 * statistics.median(steps[kind]), 1e3 * min(steps[kind])
            if kind in read:
                row["MB read"], row["GB/s"] = read[kind] / 1e6, statistics.median(rates[kind]) / 1e9
                row["share"] = statistics.median(shares[kind])
                for other in (other for other in kinds if other in THEIRS):
                    pairs = zip(steps[other], steps[kind], strict=True)
                    row[f"over {other}"] = statistics.median(theirs / ours for theirs, ours in pairs)
            figures.append(row)
            print("  ".join(f"{key} {value:.2f}" if isinstance(value, float) else f"{value:>14}" for key, value in row.items()))
    if arguments.json:
        with open(arguments.json, "w", encoding="utf-8") as file:
            json.dump({"jax": jax.__version__, "threads": threads, "figures": figures}, file, indent=1)


if __name__ == "__main__":
    main()
