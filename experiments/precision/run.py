"""What fewer bits cost: loss and optimizer state of the `:cpu` Shakespeare recipe, cut short, in each precision.

    python experiments/precision/run.py --steps=200 --seeds=0,1 --text=input.txt --out=figures.json

`--text` is the 1,115,394 characters of tiny Shakespeare in a file. Prints a table and writes the figures of each run as it ends.
"""

from __future__ import annotations

import argparse
import json
import math
import pathlib
import tempfile
from typing import Any

import jax

from gptjax import config as config_lib
from gptjax import recipes
from gptjax.config import MeshConfig
from gptjax.parallel.mesh import make_mesh
from gptjax.train import loop
from gptjax.train.optimizers import Lengths
from gptjax.train.step import abstract_state

ROOT = pathlib.Path(__file__).resolve().parents[2]

VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "bfloat16 products": {"model.dtype": "bfloat16"},
    "int8 products": {"model.quantization": "int8"},
    "fp8 products": {"model.quantization": "fp8"},
    "bfloat16 moments": {"optimizer.state_dtype": "bfloat16"},
    "int8 moments": {"optimizer.state_dtype": "int8"},
}


def configured(variant: str, seed: int, steps: int, text: str) -> config_lib.Config:
    settings = {"data.source": "text", "data.path": text, "train.duration_steps": steps, "train.seed": seed}
    settings |= {"evaluate.every_steps": 0, "evaluate.sample_tokens": 0, "checkpoint.every_steps": 0} | VARIANTS[variant]
    return recipes.load_recipe(
        f"{ROOT / 'configs/shakespeare_char.py'}:cpu", [f"{key}={value}" for key, value in settings.items()]
    )


def state_bytes(config: config_lib.Config) -> int:
    state = abstract_state(config, Lengths.of(config, 1.0), make_mesh(MeshConfig(data=1)))
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(state.opt_state))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--seeds", default="0,1")
    parser.add_argument("--text", required=True)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("figures.json"))
    arguments = parser.parse_args()
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    figures: dict[str, dict[str, Any]] = {name: {"loss": {}, "seconds": {}} for name in VARIANTS}
    for seed in seeds:
        for name in VARIANTS:
            config = configured(name, seed, arguments.steps, arguments.text)
            with tempfile.TemporaryDirectory() as folder:
                result = loop.train(config, pathlib.Path(folder))
            figures[name]["loss"][seed] = result["eval"]["loss"]
            figures[name]["seconds"][seed] = result["seconds"]
            figures[name]["state_bytes"] = state_bytes(config.with_vocab_size(65))
            about = {"steps": arguments.steps, "versions": result["versions"], "hardware": result["hardware"]}
            arguments.out.write_text(json.dumps({"about": about, "figures": figures}, indent=2) + "\n", encoding="utf-8")
            print(f"{name}, seed {seed}: {result['eval']['loss']:.4f}", flush=True)
    print("| | " + " | ".join(f"loss, seed {seed}" for seed in seeds) + " | mean difference | optimizer state |")
    print("|---|" + "---|" * (len(seeds) + 2))
    for name, found in figures.items():
        losses = [found["loss"][seed] for seed in seeds]
        difference = sum(found["loss"][seed] - figures["float32"]["loss"][seed] for seed in seeds) / len(seeds)
        cells = [f"{loss:.4f}" for loss in losses] + [f"{difference:+.4f}", f"{found['state_bytes'] / 1e6:.2f} MB"]
        print(f"| {name} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
