"""Run by test_pipeline.py in a process of its own: pipelines over 8 virtual devices. Prints one JSON object.

Idle slots of the pipelines' buffers hold NaN throughout, so any result that an idle stage leaks into is NaN.
"""

from __future__ import annotations

import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import Config, MeshConfig
from gptjax.generate.decode import generate_tokens
from gptjax.generate.settings import GenerationConfig
from gptjax.parallel import pipeline
from gptjax.parallel.mesh import check_divides, make_mesh
from gptjax.parallel.sharding import laid_over
from gptjax.train.evaluate import make_eval_step
from gptjax.train.optimizers import Lengths
from gptjax.train.step import init_state, make_train_step
from tests.parallel.eight_devices import refusal, sha256
from tests.small import LLAMA, random_batch, small

DROPOUT = {"model.residual_dropout": 0.2, "model.embedding_dropout": 0.2, "model.attention_dropout": 0.2}
SIZES = {"model.num_layers": 8, "model.num_heads": 4, "data.batch_size": 32, "optimizer.epsilon": 1e-3}
MODELS = {
    "gpt2": SIZES | DROPOUT,
    "llama": SIZES
    | LLAMA
    | DROPOUT
    | {"model.attention": "dense", "model.remat": "full", "model.scan_unroll": 2, "train.accumulation_steps": 2}
    | {"model.attention_window": 5, "model.attention_pattern": ("local", "global"), "model.position_pattern": ("rotary", "none")},
}
MESHES: dict[str, dict[str, dict[str, int]]] = {
    "gpt2": {
        "one": {"data": 1},
        "stage 8": {"data": 1, "stage": 8, "micro_batches": 16},
        "stage 2, data 2, fsdp 2": {"data": 2, "fsdp": 2, "stage": 2},
    },
    "llama": {"one": {"data": 1}, "stage 4, tensor 2": {"data": 1, "tensor": 2, "stage": 4}},
}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")


def collectives(compiled: Any) -> dict[str, list[list[int]]]:
    """{kind: shapes of all arrays that collectives of this kind give} in the program of one device."""
    found: dict[str, list[list[int]]] = {kind: [] for kind in COLLECTIVES}
    for result, kind in re.findall(rf"= (.*?) ({'|'.join(COLLECTIVES)})\(", compiled.as_text()):
        shapes = re.findall(r"[a-z]+[0-9]*\[([0-9,]*)\]", re.sub(r"/\*.*?\*/", "", result))
        found[kind] += [[int(size) for size in shape.split(",") if size] for shape in shapes]
    return found


def run(config: Config) -> dict[str, Any]:
    lengths, mesh = Lengths.of(config, 1.0), make_mesh(config.mesh)
    check_divides(config, mesh)
    state, step = init_state(config, lengths, mesh), make_train_step(config, lengths, mesh)
    found: dict[str, Any] = {"init": sha256(state.params), "devices": mesh.size, "loss": []}
    layers = state.params["layers"]["mlp"]["up"]["kernel"]
    found["layers_per_device"] = layers.addressable_shards[0].data.shape[0]
    with laid_over(mesh, config.mesh):
        compiled = step.compiled.lower(state, random_batch(config)).compile()  # type: ignore[attr-defined]
    found["collectives"] = collectives(compiled)
    for seed in range(4):
        state, metrics = compiled(state, random_batch(config, seed))
        found["loss"].append(float(metrics["loss"]))
        if seed == 0:  # after one step AdamW's first moment is the clipped gradient, scaled
            moments = jax.tree_util.tree_leaves_with_path(first_moment(state.opt_state))
            found["gradients"] = {jax.tree_util.keystr(path): np.asarray(leaf).ravel().tolist() for path, leaf in moments}
    return found | (after_training(config, mesh, state.params) if config.model.position == "learned" else {})


def after_training(config: Config, mesh: jax.sharding.Mesh, params: Any) -> dict[str, Any]:
    """What evaluation and generation give; both have no dropout, and generation's cache takes the layers one by one."""
    batch = {name: rows[:16] for name, rows in random_batch(config, 7).items()}
    token_bytes = np.ones(config.model.vocab_size, np.float32)
    nats = make_eval_step(config, mesh)(params, token_bytes, batch)[0]
    options: dict[str, Any] = {"seed": 0, "eos_ids": (), "vocab_size": config.model.vocab_size}
    made = generate_tokens(
        params, config.model, [[1, 2, 3], [4]], settings=GenerationConfig(max_new_tokens=8, temperature=0.8), **options
    )
    return {"row_nats": np.asarray(nats).tolist(), "tokens": [row.tolist() for row in made.tokens]}


def first_moment(opt_state: Any) -> Any:
    def has_moments(node: Any) -> bool:
        return hasattr(node, "mu")

    return next(node.mu for node in jax.tree.leaves(opt_state, is_leaf=has_moments) if has_moments(node))


def by_hand() -> dict[str, float]:
    """Largest differences of results, gradients and sums of 8 layers that read their rows' context and their numbers, over 4
    stages, from loops in float64.
    """
    rng = np.random.default_rng(0)
    w_LD, x_BTD, row_B = rng.standard_normal((8, 5)), rng.standard_normal((6, 3, 5)), rng.standard_normal(6)

    def layer(w_D: Any, x_bTD: Any, row_b: Any, number: Any) -> tuple[Any, Any]:
        return jnp.sin(x_bTD * w_D + row_b[:, None, None] * number), {"sum": x_bTD.sum((0, 1)), "rows": row_b.sum()}

    def layers(w_LD: Any, numbers_L: Any, x_bTD: Any, row_b: Any) -> tuple[Any, Any]:
        return jax.lax.scan(lambda x_bTD, own: layer(own[0], x_bTD, row_b, own[1]), x_bTD, (w_LD, numbers_L))

    def objective(w_LD: Any, x_BTD: Any) -> tuple[Any, Any]:
        y_BTD, sums = pipeline.pipelined(layers, w_LD, x_BTD, row_B.astype(np.float32), micro_batches=3)
        return (y_BTD**2).sum() + (sums["sum"] ** 2).sum(), (y_BTD, sums)

    config = MeshConfig(data=2, stage=4)
    with laid_over(make_mesh(config), config):
        run = jax.jit(jax.value_and_grad(objective, argnums=(0, 1), has_aux=True))
        (_, (y_BTD, sums)), (dw_LD, dx_BTD) = run(w_LD.astype(np.float32), x_BTD.astype(np.float32))

    inputs, z = [x_BTD], []
    for number in range(8):
        z.append(inputs[-1] * w_LD[number] + row_B[:, None, None] * number)
        inputs.append(np.sin(z[-1]))
    wanted_dw, g = np.zeros_like(w_LD), 2 * inputs[-1]
    for number in reversed(range(8)):
        g = g * np.cos(z[number])
        wanted_dw[number] = (g * inputs[number]).sum((0, 1))
        g = g * w_LD[number] + 2 * inputs[number].sum((0, 1))
    wanted = {
        "result": (y_BTD, inputs[-1]),
        "sums": (sums["sum"], np.stack([x.sum((0, 1)) for x in inputs[:-1]])),
        "sums of context": (sums["rows"], np.full(8, row_B.sum())),
        "gradient of parameters": (dw_LD, wanted_dw),
        "gradient of inputs": (dx_BTD, g),
    }
    return {
        name: float(np.abs(np.asarray(ours) - theirs).max() / np.abs(theirs).max()) for name, (ours, theirs) in wanted.items()
    }


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    pipeline.EMPTY = float("nan")
    runs = {
        model: {
            name: run(small(MODELS[model], {f"mesh.{axis}": size for axis, size in axes.items()}))
            for name, axes in meshes.items()
        }
        for model, meshes in MESHES.items()
    }
    refused = [
        refusal(mesh__stage=2, mesh__data=1, model__num_layers=3),
        refusal(mesh__stage=2, mesh__data=1, **{"model.position": "none", "model.position_pattern": ("none", "rotary")}),
        refusal(mesh__stage=2, mesh__data=1, mesh__micro_batches=3),
        refusal(mesh__stage=2, mesh__data=2, data__batch_size=8, mesh__micro_batches=4, train__accumulation_steps=2),
        refusal(mesh__stage=2, mesh__data=1, mesh__micro_batches=4, evaluate__batch_size=6),
        refusal(mesh__stage=1, mesh__data=1, mesh__micro_batches=3),
    ]
    print(json.dumps({"runs": runs, "refused": refused, "by hand": by_hand()}))
