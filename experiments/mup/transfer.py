"""The best learning rate over widths, standard and muP: short runs on tinyshakespeare. README.md has the question and the result.

    python experiments/mup/transfer.py --text=input.txt --results=experiments/mup/results.jsonl [--widths=64,128] [--seeds=2]
    python experiments/mup/transfer.py --results=experiments/mup/results.jsonl --summary [--plot=experiments/mup/transfer.png]

A run that --results has already is skipped, so that the same command goes on where it stopped. All runs of one width and
parameterization share one compilation: the rate and the seed are arguments of it.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import pathlib
import time
from collections.abc import Callable
from typing import Any

import numpy as np

STEPS, LAYERS, SEQ_LEN, BATCH, BASE, WARMUP = 200, 2, 64, 16, 64, 20
RATES = tuple(2.0**-n for n in (11, 10, 9, 8, 7, 6, 5))  # 0.00049 to 0.031, by factors of 2
PARAMETERIZATIONS = ("standard", "mup")
LAST = 20  # steps whose mean training loss is a run's result; no token comes twice in so short a run


def config_of(text: pathlib.Path, width: int, parameterization: str) -> Any:
    from gptjax import recipes

    knobs = {
        "data.source": "text", "data.path": text, "data.seq_len": SEQ_LEN, "data.batch_size": BATCH,
        "model.max_seq_len": SEQ_LEN, "model.num_layers": LAYERS, "model.model_dim": width, "model.num_heads": width // 32,
        "model.parameterization": parameterization, "model.mup_base_dim": BASE if parameterization == "mup" else 0,
        "train.duration_steps": STEPS, "optimizer.warmup_steps": WARMUP,
    }  # fmt: skip
    recipe = pathlib.Path(__file__).parents[2] / "configs" / "shakespeare_char.py"
    return recipes.load_recipe(f"{recipe}:cpu", [f"{key}={value}" for key, value in knobs.items()])


def runner(config: Any) -> Callable[[float, Any, Any], Any]:
    """(rate, seed, batches [steps, B, T + 1]) -> the loss of each step, compiled once."""
    import jax
    import jax.numpy as jnp
    import optax
    from flax import linen as nn

    from gptjax.train.optimizers import Lengths, make_optimizer, make_schedule
    from gptjax.train.step import init_params, summed_gradients

    # The schedule at a peak of 1, times a rate that is known only when it runs.
    unit = dataclasses.replace(config.optimizer, learning_rate=1.0)
    shape = make_schedule(unit, Lengths(STEPS, WARMUP, STEPS))

    @jax.jit
    def run(rate: Any, seed: Any, batches: Any) -> Any:
        optimizer = make_optimizer(config, lambda n: rate * shape(n), STEPS)
        params = nn.unbox(init_params(config, seed))

        def step(carry: Any, batch: Any) -> Any:
            params, state = carry
            gradients, sums = summed_gradients(config, params, batch, None)
            gradients = jax.tree.map(lambda g: g / sums["weight_sum"], gradients)
            scale = jnp.minimum(1.0, config.optimizer.clip_norm / optax.tree.norm(gradients))
            updates, state = optimizer.update(jax.tree.map(lambda g: g * scale, gradients), state, params)
            return (optax.apply_updates(params, updates), state), sums["loss_sum"] / sums["weight_sum"]

        return jax.lax.scan(step, (params, optimizer.init(params)), batches)[1]

    return run


def train_all(arguments: argparse.Namespace) -> None:
    import jax
    import jax.numpy as jnp

    from gptjax.data.pipeline import load_dataset, train_batches

    path = pathlib.Path(arguments.results)
    done = {key_of(row) for row in rows_of(path)}
    for width, kind in itertools.product(arguments.widths, arguments.kinds):
        config = config_of(arguments.text, width, kind)
        wanted = [(seed, rate) for seed in range(arguments.seeds) for rate in RATES if (width, kind, seed, rate) not in done]
        if not wanted:
            continue
        dataset = load_dataset(config, lambda _: None)
        config = config.with_vocab_size(dataset.tokenizer.vocab_size)
        run = runner(config)
        for seed, rate in wanted:
            seeded = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=seed))
            rows = list(itertools.islice(train_batches(seeded, dataset.train), STEPS))
            batches = {name: jnp.asarray(np.stack([row[name] for row in rows])) for name in rows[0]}
            if (seed, rate) == wanted[0]:  # compilation is not a run's time
                run = run.lower(jnp.float32(rate), jnp.uint32(seed), batches).compile()  # type: ignore[attr-defined]
            began = time.perf_counter()
            losses = np.asarray(jax.block_until_ready(run(jnp.float32(rate), jnp.uint32(seed), batches)))
            seconds = time.perf_counter() - began
            row = {"width": width, "parameterization": kind, "seed": seed, "rate": rate, "steps": STEPS,
                   "loss": float(losses[-LAST:].mean()), "seconds": round(seconds, 2)}  # fmt: skip
            with open(path, "a", encoding="utf-8") as file:
                file.write(json.dumps({key: None if value != value else value for key, value in row.items()}) + "\n")
            print(row, flush=True)


def rows_of(path: pathlib.Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def key_of(row: dict[str, Any]) -> tuple[Any, ...]:
    return row["width"], row["parameterization"], row["seed"], row["rate"]


def mean_losses(rows: list[dict[str, Any]], kind: str, width: int) -> dict[float, tuple[float, int]]:
    """{rate: (mean of the final losses, seeds)}; a run that diverged (null) counts as infinite."""
    found: dict[float, list[float]] = {}
    for row in rows:
        if (row["parameterization"], row["width"]) == (kind, width):
            found.setdefault(row["rate"], []).append(float("inf") if row["loss"] is None else row["loss"])
    return {rate: (float(np.mean(losses)), len(losses)) for rate, losses in sorted(found.items())}


def summarise(rows: list[dict[str, Any]]) -> None:
    """Tables of mean losses, the best rate of each width, and how many grid steps it moves."""
    widths = sorted({row["width"] for row in rows})
    for kind in PARAMETERIZATIONS:
        print(f"\n{kind}\n\n| width | " + " | ".join(f"{rate:.5f}" for rate in RATES) + " | best | seeds | seconds a run |")
        print("|---:" * (len(RATES) + 4) + "|")
        best = {}
        for width in widths:
            means = mean_losses(rows, kind, width)
            if not means:
                continue
            best[width] = min(means, key=lambda rate: means[rate][0])
            cells = [f"{means[rate][0]:.3f}" if rate in means else "" for rate in RATES]
            seeds = min(count for _, count in means.values())
            seconds = [row["seconds"] for row in rows if (row["parameterization"], row["width"]) == (kind, width)]
            print(f"| {width} | " + " | ".join(cells) + f" | {best[width]:.5f} | {seeds} | {min(seconds):.0f} |")
        moved = [round(float(np.log2(best[width] / best[min(best)]))) for width in best]
        print(f"\nThe best rate moves by {', '.join(f'{m:+d}' for m in moved)} grid steps from width {min(best)}'s.")


def draw(rows: list[dict[str, Any]], path: pathlib.Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 3.6), dpi=150, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    widths = sorted({row["width"] for row in rows})
    for axes, kind in zip(figure.subplots(1, 2, sharey=True), PARAMETERIZATIONS, strict=True):
        for index, width in enumerate(widths):
            means = mean_losses(rows, kind, width)
            shade = 0.8 * (1 - index / max(len(widths) - 1, 1))
            axes.plot(list(means), [loss for loss, _ in means.values()], ".-", color=(shade, shade, 1 - shade / 2), label=width)
        axes.set(xscale="log", title=kind, xlabel="learning rate")
        axes.set_xticks(RATES, [f"2^{int(np.log2(rate))}" for rate in RATES])
        axes.minorticks_off()
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.legend(title="width", frameon=False, fontsize=8)
    figure.axes[0].set_ylabel(f"training loss, mean of the last {LAST} of {STEPS} steps")
    canvas.print_figure(path, format="png")


def main() -> None:
    from gptjax.verbs.arguments import sizes

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=pathlib.Path, metavar="FILE", help="tinyshakespeare's input.txt")
    parser.add_argument("--results", required=True, metavar="FILE.jsonl")
    parser.add_argument("--widths", type=sizes, default=(64, 128, 256, 512), metavar="N,N")
    parser.add_argument("--kinds", type=lambda text: text.split(","), default=PARAMETERIZATIONS, metavar="KIND,KIND")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--summary", action="store_true", help="only say what the results are")
    parser.add_argument("--plot", type=pathlib.Path, metavar="FILE.png")
    arguments = parser.parse_args()
    if not arguments.summary:
        train_all(arguments)
    rows = rows_of(pathlib.Path(arguments.results))
    summarise(rows)
    if arguments.plot:
        draw(rows, arguments.plot)


if __name__ == "__main__":
    main()
