"""Does every arrangement of the devices give the run of one device?

    python experiments/meshes/table.py
    python experiments/meshes/table.py --set=model.num_experts=8 --set=model.norm=rmsnorm

Takes every factorisation of 8 (virtual) devices over the mesh axes (expert only where the model has experts), trains the same
tiny model for 10 steps on each, and prints for each: whether the initial parameters have the same bits, the largest relative
difference of a loss, and the largest difference of the first gradient, of each parameter relative to the largest element of its
gradient. Ends with status 1 where bits differ or a difference is above 1e-5. `--only=stage=2,tensor=4` runs one mesh.
"""

from __future__ import annotations

import argparse
import ast
import functools
import itertools
import math
import os
import pathlib
import platform
import sys
import time
from collections.abc import Iterator
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

DEVICES, STEPS, BOUND = 8, 10, 1e-5

# Most of the time is LLVM's, for programs that run ten times on a few numbers; the arithmetic is the same.
QUICK = "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true"

# Everything divides by 8. Keys have no bias: theirs has a gradient of exactly 0, of which rounding is all there is to compare.
KNOBS: dict[str, Any] = {
    "model.vocab_size": 40,
    "model.num_layers": 8,
    "model.model_dim": 32,
    "model.num_heads": 8,
    "model.max_seq_len": 16,
    "model.attention_bias": False,
    "model.embedding_dropout": 0.1,
    "model.attention_dropout": 0.1,
    "model.residual_dropout": 0.1,
    "data.seq_len": 16,
    "data.batch_size": 16,
    "optimizer.learning_rate": 1e-2,
    "train.duration_steps": STEPS,
}


def factorisations(number: int, axes: tuple[str, ...]) -> Iterator[dict[str, int]]:
    """Every {axis: size} whose sizes multiply to `number`."""
    divisors = [size for size in range(1, number + 1) if number % size == 0]
    for sizes in itertools.product(divisors, repeat=len(axes)):
        if math.prod(sizes) == number:
            yield dict(zip(axes, sizes, strict=True))


def train(knobs: dict[str, Any], axes: dict[str, int]) -> dict[str, Any]:
    """{"init": list of arrays, "losses": [10], "gradients": list of arrays} of one mesh."""
    import jax
    import numpy as np

    from gptjax.parallel.mesh import check_divides, make_mesh
    from gptjax.train.optimizers import Lengths
    from gptjax.train.step import init_state, make_train_step
    from tests.small import random_batch, small

    config = small(knobs, {"mesh.data": 1} | {f"mesh.{axis}": size for axis, size in axes.items()})
    lengths, mesh = Lengths.of(config, 1.0), make_mesh(config.mesh)
    check_divides(config, mesh)
    state, step = init_state(config, lengths, mesh), make_train_step(config, lengths, mesh)
    on_host = functools.partial(jax.tree.map, np.asarray)
    found: dict[str, Any] = {"init": jax.tree.leaves(on_host(state.params)), "losses": []}
    for number in range(STEPS):
        state, metrics = step(state, random_batch(config, number))
        found["losses"].append(float(metrics["loss"]))
        if number == 0:  # AdamW's first moment is now the gradient, up to a factor that is the same for all
            moments = [node.mu for node in jax.tree.leaves(state.opt_state, is_leaf=_has_moments) if _has_moments(node)]
            found["gradients"] = jax.tree.leaves(on_host(moments[0]))
    make_train_step.cache_clear()
    jax.clear_caches()
    return found


def _has_moments(node: Any) -> bool:
    return hasattr(node, "mu")


def compare(run: dict[str, Any], one: dict[str, Any]) -> tuple[bool, float, float]:
    """(initial parameters have the same bits, largest relative difference of losses, largest of gradients)."""
    import numpy as np

    pairs = zip(run["init"], one["init"], strict=True)
    same = all(ours.dtype == theirs.dtype and ours.tobytes() == theirs.tobytes() for ours, theirs in pairs)
    losses = np.abs(np.array(run["losses"]) / np.array(one["losses"]) - 1).max()
    gradients = [np.abs(a - b).max() / np.abs(b).max() for a, b in zip(run["gradients"], one["gradients"], strict=True)]
    # max() would drop a NaN; an infinity fails the bound and shows.
    return same, *(float(np.nan_to_num(np.max(x), nan=np.inf)) for x in (losses, gradients))


def text(value: str) -> Any:
    """The value of a --set as Python reads it, or as it stands."""
    try:
        return ast.literal_eval(value)
    except (ValueError, SyntaxError):
        return value


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a knob of the tiny model")
    parser.add_argument("--only", action="append", default=[], metavar="AXIS=N,AXIS=N", help="this mesh, not all")
    arguments = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()
    import jax

    jax.config.update("jax_num_cpu_devices", DEVICES)
    from gptjax.config import UserError
    from gptjax.parallel.mesh import AXES

    knobs = KNOBS | {key: text(value) for key, _, value in (given.partition("=") for given in arguments.set)}
    axes = tuple(axis for axis in AXES if axis != "expert" or knobs.get("model.num_experts"))
    chosen = [dict(part.split("=") for part in given.split(",")) for given in arguments.only]
    meshes = [{axis: int(sizes.get(axis, 1)) for axis in axes} for sizes in chosen] or list(factorisations(DEVICES, axes))

    begun, failures, refused = time.monotonic(), 0, 0
    one = train(knobs, {})
    print("| " + " | ".join(axes) + " | initial parameters | losses | gradients | |")
    print("|" + " ---: |" * len(axes) + " :---: | ---: | ---: | --- |", flush=True)
    for mesh in meshes:
        sizes = " | ".join(str(mesh[axis]) for axis in axes)
        try:
            same, losses, gradients = compare(train(knobs, mesh), one)
        except UserError as error:
            refused += 1
            print(f"| {sizes} | | | | refused: {error} |", flush=True)
            continue
        fails = not same or losses > BOUND or gradients > BOUND
        failures += fails
        print(
            f"| {sizes} | {'same bits' if same else 'DIFFER'} | {losses:.1e} | {gradients:.1e} | {'FAILS' if fails else ''} |",
            flush=True,
        )
    print(
        f"\n{len(meshes)} meshes, {refused} refused, {failures} failed; bound {BOUND:g}; {time.monotonic() - begun:.0f} s. "
        f"Python {platform.python_version()}, jax {jax.__version__}, {DEVICES} virtual devices on {os.cpu_count()} CPU cores."
    )
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
