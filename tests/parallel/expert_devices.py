"""Run by test_experts.py in a process of its own: the mixture of experts on meshes of 1 and of 8 virtual devices.

Prints one JSON object. With the argument `all`: every factorisation of 8 over data, fsdp, expert and tensor in which the
experts are shared out, as a table.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import re
import sys
from typing import Any

import jax
import numpy as np

from gptjax.config import Config, UserError
from gptjax.generate.decode import generate_tokens
from gptjax.generate.settings import GenerationConfig
from gptjax.parallel.mesh import check_divides, make_mesh
from gptjax.parallel.sharding import laid_over
from gptjax.train.optimizers import Lengths
from gptjax.train.step import init_state, make_train_step
from tests.small import random_batch, small

MOE = {
    "model.num_layers": 1,
    "model.num_experts": 8,
    "model.expert_mlp_dim": 8,
    "model.num_shared_experts": 1,
    "model.gated_mlp": True,
    "objective.router_balance_loss": 0.1,
    "objective.router_z_loss": 0.1,
    "train.accumulation_steps": 2,
    "data.batch_size": 16,
    # The first step is the gradient itself: parameters move by it.
    "optimizer.name": "sgd",
    "optimizer.beta1": 0.0,
    "optimizer.learning_rate": 1.0,
    "optimizer.schedule": "constant",
    "optimizer.weight_decay": 0.0,
    "optimizer.clip_norm": 0.0,
}
FORMS = {"capacity": {"model.expert_capacity_factor": 0.9}, "dropless": {}}
MESHES: dict[str, dict[str, int]] = {
    "one": {"data": 1},
    "fsdp, expert, tensor": {"fsdp": 2, "expert": 2, "tensor": 2, "data": 1},
    "data, expert, context": {"data": 2, "expert": 2, "context": 2},
}


def run(form: str, axes: dict[str, int], first: dict[str, Any]) -> dict[str, Any]:
    """What a few steps gave; `first` holds the gradients of the first step on one device, or is filled with them."""
    config = small(MOE, FORMS[form], {f"mesh.{axis}": size for axis, size in axes.items()})
    lengths, mesh = Lengths.of(config, 1.0), make_mesh(config.mesh)
    check_divides(config, mesh)
    state = init_state(config, lengths, mesh)
    digest = hashlib.sha256()
    for leaf in jax.tree.leaves(state.params):
        digest.update(np.asarray(leaf).tobytes())
    batches = [random_batch(config, seed) for seed in range(10)]
    before = jax.tree.map(np.asarray, state.params)
    with laid_over(mesh, config.mesh):
        step = make_train_step(config, lengths, mesh).compiled.lower(state, batches[0]).compile()  # type: ignore[attr-defined]
    rows = []
    for number, batch in enumerate(batches):
        state, metrics = step(state, batch)
        rows.append({name: float(value) for name, value in metrics.items()})
        if number == 0:
            gradients = jax.tree.map(lambda old, new: old - np.asarray(new), before, state.params)
    first.setdefault("gradients", gradients)
    largest = max(np.abs(leaf).max() for leaf in jax.tree.leaves(first["gradients"]))
    off = jax.tree.map(lambda a, b: float(np.abs(a - b).max() / largest), gradients, first["gradients"])
    text = step.as_text()
    return {
        "init": digest.hexdigest(),
        "rows": rows,
        "gradient_off": max(jax.tree.leaves(off)),
        "all_to_alls": len(re.findall(r" all-to-all(?:-start)?\(", text)),
        "experts_here": state.params["layers"]["experts"]["up"]["kernel"].addressable_shards[0].data.shape[1],
    }


def samples(axes: dict[str, int]) -> list[list[int]]:
    """Greedy continuations by parameters that lie on the mesh."""
    knobs = {"model.init_std": 0.4, "model.tied_embeddings": False}  # so that the next token is not just the last again
    config = small(MOE, knobs, {f"mesh.{axis}": size for axis, size in axes.items()})
    params = init_state(config, Lengths.of(config, 1.0), make_mesh(config.mesh)).params
    options: dict[str, Any] = {"settings": GenerationConfig(max_new_tokens=4, do_sample=False), "seed": 0, "eos_ids": ()}
    made = generate_tokens(params, config.model, [[3, 1, 4], [1, 5]], vocab_size=config.model.vocab_size, **options)
    return [row.tolist() for row in made.tokens]


def refusal(**knobs: Any) -> str:
    try:
        config: Config = small({key.replace("__", "."): value for key, value in knobs.items()})
        check_divides(config, make_mesh(config.mesh))
    except UserError as error:
        return str(error)
    return ""


def print_all() -> None:
    """Every factorisation against one device: the largest differences over 10 steps."""
    axes = ("data", "fsdp", "expert", "tensor")
    meshes = [dict(zip(axes, sizes, strict=True)) for sizes in itertools.product((1, 2, 4, 8), repeat=4) if np.prod(sizes) == 8]
    for form in FORMS:
        first: dict[str, Any] = {}
        one = run(form, MESHES["one"], first)
        for mesh in (mesh for mesh in meshes if mesh["expert"] > 1):
            found = run(form, mesh, first)
            loss = max(abs(a["loss"] / b["loss"] - 1) for a, b in zip(found["rows"], one["rows"], strict=True))
            dropped = [row["moe/dropped"] for row in found["rows"]] == [row["moe/dropped"] for row in one["rows"]]
            same = found["init"] == one["init"]
            print(
                f"{form:9} {mesh} init same: {same} loss: {loss:.1e} gradient: {found['gradient_off']:.1e} drops same: {dropped}"
            )


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    if sys.argv[1:] == ["all"]:
        print_all()
        sys.exit()
    firsts: dict[str, dict[str, Any]] = {form: {} for form in FORMS}
    refused = [
        refusal(mesh__expert=2),
        refusal(mesh__expert=4, model__num_experts=6),
        refusal(mesh__tensor=4, model__num_experts=8, model__expert_mlp_dim=6),
    ]
    # Context is left to the compiler in the form with capacity, so it is enough to see it where the devices are told.
    runs = {
        form: {
            name: run(form, axes, firsts[form]) for name, axes in MESHES.items() if form == "dropless" or "context" not in axes
        }
        for form in FORMS
    }
    sampled = [samples(MESHES[name]) for name in ("one", "fsdp, expert, tensor")]
    print(json.dumps({"runs": runs, "samples": sampled, "refused": refused}))
