"""Run by test_context.py in a process of its own: a sequence over 1 to 8 virtual devices. Prints one JSON object."""

from __future__ import annotations

import dataclasses
import functools
import json
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import UserError
from gptjax.model import primitives
from gptjax.model.attention import attend
from gptjax.parallel.mesh import check_divides, make_mesh
from gptjax.parallel.sharding import batch_sharding, laid_over
from gptjax.train.evaluate import make_eval_step
from gptjax.train.optimizers import Lengths
from gptjax.train.step import init_state, make_train_step, state_shardings, summed_gradients
from tests.small import GPT2, LLAMA, random_batch, random_params, small

DROPOUT = {"model.attention_dropout": 0.2, "model.residual_dropout": 0.1}
WINDOWED = LLAMA | {"model.attention_window": 9, "model.attention_softcap": 2.0, "model.block": "parallel"}
WINDOWED |= {"model.query_key_norm": True, "model.rotary_fraction": 0.5, "model.rope_scaling": "linear"}
ADDITIVE = {"model.attention_score": "additive", "model.position": "t5", "model.attention_sink": "learned"}
ADDITIVE |= {"model.attention_window": 9, "model.attention_sink_tokens": 2}
SIZES = {"model.max_seq_len": 64, "data.seq_len": 32}
# name: (knobs, meshes that are held against one device); the first of them also trains, but for ADDITIVE.
RUNS: dict[str, tuple[dict[str, Any], list[dict[str, int]]]] = {
    "learned positions": (GPT2 | DROPOUT, [{"context": 8}]),
    "additive, sinks, distances": (ADDITIVE, [{"context": 2, "data": 2, "tensor": 2}]),
    "rotary, grouped, window, cap": (WINDOWED | DROPOUT, [{"context": 2, "data": 2, "tensor": 2}, {"context": 4, "fsdp": 2}]),
}


def run(knobs: dict[str, Any], axes: dict[str, int], trains: bool) -> dict[str, Any]:
    """Loss and gradient of a batch, at parameters of which none is zero; losses of three steps; nats of the batch's rows."""
    config = small(SIZES, knobs, {"mesh.data": 1} | {f"mesh.{name}": size for name, size in axes.items()})
    lengths, mesh = Lengths.of(config, 1.0), make_mesh(config.mesh)
    check_divides(config, mesh)
    params, batch = random_params(config), random_batch(config, 0)
    keys = primitives.row_keys(jax.random.key(1), jnp.arange(config.data.batch_size))
    shardings = state_shardings(config, lengths, mesh).params
    with laid_over(mesh, config.mesh):
        backward = jax.jit(functools.partial(summed_gradients, config), in_shardings=(shardings, batch_sharding(mesh), None))
        gradients, sums = backward(params, batch, keys)
    found: dict[str, Any] = {"loss": [float(sums["loss_sum"])]}
    found["gradients"] = {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf).ravel().tolist()
        for path, leaf in jax.tree_util.tree_leaves_with_path(gradients)
    }
    if trains:
        state, step = init_state(config, lengths, mesh, params), make_train_step(config, lengths, mesh)
        if config.model.position == "learned":
            found["rows"] = np.asarray(make_eval_step(config, mesh)(state.params, jnp.ones(23), batch)[0]).tolist()
        for seed in range(3):
            state, metrics = step(state, random_batch(config, seed))
            found["loss"].append(float(metrics["loss"]))
    return found


def compiled(backend: str, length: int) -> dict[str, Any]:
    """Collectives and array sizes of attention's forward and backward pass over 4 devices, 2 heads of 64 each."""
    config = small(
        {"model.head_dim": 64, "model.num_heads": 2, "model.num_kv_heads": 1, "model.attention": backend},
        {"model.max_seq_len": length, "data.seq_len": length, "mesh.context": 4, "mesh.data": 1},
    )
    mesh = make_mesh(config.mesh)
    shapes = [jax.ShapeDtypeStruct((1, length, heads, 64), jnp.float32) for heads in (2, 1, 1)]
    sharding = jax.NamedSharding(mesh, jax.P(None, "context"))

    def cost(q: Any, k: Any, v: Any) -> Any:
        return jnp.square(attend(config.model, q, k, v, jnp.zeros((1, length), jnp.int32))).sum()

    with laid_over(mesh, config.mesh):
        kept = jax.eval_shape(lambda *given: jax.vjp(cost, *given)[1], *shapes)
        if backend == "splash":
            return {"kept": max(leaf.size for leaf in jax.tree.leaves(kept))}
        text = jax.jit(jax.grad(cost, (0, 1, 2)), in_shardings=sharding).lower(*shapes).compile().as_text()
    arrays = [[int(size) for size in sizes.split(",")] for sizes in re.findall(r"\w+\[([\d,]+)\]", text)]
    return {
        "all-gather": len(re.findall(r" all-gather(?:-start)?\(", text)),
        "collective-permute": len(re.findall(r" collective-permute(?:-start)?\(", text)),
        "reduce-scatter": len(re.findall(r" (?:reduce-scatter|all-reduce)(?:-start)?\(", text)),
        "squares": [sizes for sizes in arrays if sum(size >= length for size in sizes) > 1],
        "kept": max(leaf.size for leaf in jax.tree.leaves(kept)),
        "largest": max(int(np.prod(sizes)) for sizes in arrays),
    }


def splash() -> dict[str, float]:
    """Greatest differences from dense on one device, relative to its greatest value, of the output and the gradients."""
    length = 256
    config = small(
        {"model.head_dim": 64, "model.num_heads": 2, "model.num_kv_heads": 2, "model.attention": "splash"},
        {"model.attention_window": 100, "model.attention_softcap": 2.0, "model.max_seq_len": length, "data.seq_len": length},
        {"mesh.context": 2, "mesh.tensor": 2, "mesh.data": 2},
    )
    rng = np.random.default_rng(0)
    q, k, v, g = (jnp.asarray(rng.standard_normal((2, length, 2, 64)), jnp.float32) for _ in range(4))
    ids = jnp.asarray(np.sort(rng.integers(0, 3, (2, length)), axis=1), jnp.int32)

    def both(model: Any, q: Any, k: Any, v: Any) -> Any:
        out, backward = jax.vjp(lambda q, k, v: attend(model, q, k, v, ids), q, k, v)
        return out, *backward(g)

    dense = jax.jit(lambda q, k, v: both(dataclasses.replace(config.model, attention="dense"), q, k, v))(q, k, v)
    found = {}
    for name, mesh in {"shared out": config.mesh, "by device": dataclasses.replace(config.mesh, context=1)}.items():
        with laid_over(make_mesh(mesh), mesh):
            ours = jax.jit(lambda q, k, v: both(config.model, q, k, v))(q, k, v)
        pairs = zip(ours, dense, strict=True)
        found[name] = max(float(jnp.abs(np.asarray(one) - other).max() / jnp.abs(other).max()) for one, other in pairs)
    return found


def distances() -> dict[str, float]:
    """Of everything that scores are made with and of keys that are seen from afar: greatest differences from dense on one device,
    relative to its greatest value, of the output and of all gradients; rows over 2 devices, length over 2, heads over 2.
    """
    length, rng = 32, np.random.default_rng(0)
    ids = jnp.asarray(np.sort(rng.integers(0, 3, (2, length)), axis=1), jnp.int32)
    marks = {"prefix_BT": jnp.asarray(rng.random((2, length)) < 0.3), "anchors_BT": jnp.asarray(rng.random((2, length)) < 0.2)}
    q, k, v, g = (jnp.asarray(rng.standard_normal((2, length, n, 8)), jnp.float32) for n in (4, 2, 2, 4))
    shapes = {"score_vector": (4, 8), "sink_bias": (4,), "bias": (4, 2 * length - 1)}
    learned = {name: jnp.asarray(rng.standard_normal(shape), jnp.float32) for name, shape in shapes.items()}
    keys = primitives.row_keys(jax.random.key(1), jnp.arange(2))
    found = {}
    for name, score, given in (
        ("additive, prefix", "additive", marks),
        ("dot, first tokens", "dot", {"anchors_BT": marks["anchors_BT"]}),
    ):
        knobs = {"model.attention_score": score, "model.attention_window": 9, "model.attention_dropout": 0.2}
        knobs |= {"model.num_kv_heads": 2, "model.head_dim": 8}
        config = small(SIZES, knobs, {"mesh.context": 2, "mesh.tensor": 2, "mesh.data": 2})
        taken = learned if score == "additive" else {name: x for name, x in learned.items() if name != "score_vector"}

        def both(model: Any, q: Any, k: Any, v: Any, taken: Any, given: Any = given) -> Any:
            def run(q: Any, k: Any, v: Any, taken: Any) -> Any:
                return attend(model, q, k, v, ids, dropout_keys=keys, learned=taken, **given)

            out, backward = jax.vjp(run, q, k, v, taken)
            return out, *backward(g)

        dense = dataclasses.replace(config.model, attention="dense")
        expected = jax.jit(functools.partial(both, dense))(q, k, v, taken)
        with laid_over(make_mesh(config.mesh), config.mesh):
            ours = jax.jit(functools.partial(both, config.model))(q, k, v, taken)
        pairs = zip(jax.tree.leaves(ours), jax.tree.leaves(expected), strict=True)
        found[name] = max(float(np.abs(np.asarray(one) - other).max() / np.abs(other).max()) for one, other in pairs)
    return found


def refusal(*parts: dict[str, Any], traced: bool = False) -> str:
    try:
        config = small(SIZES, {"mesh.data": 1}, *parts)
        mesh = make_mesh(config.mesh)
        if not traced:
            check_divides(config, mesh)
        with laid_over(mesh, config.mesh):
            q, k, v = (jax.ShapeDtypeStruct((1, 32, heads, 4), jnp.float32) for heads in (4, 4, 4))
            jax.eval_shape(lambda q, k, v: attend(config.model, q, k, v), q, k, v)
    except UserError as error:
        return str(error)
    return ""


if __name__ == "__main__":
    jax.config.update("jax_num_cpu_devices", 8)
    runs = {
        name: [run(knobs, axes, trains=number < 2 and knobs is not ADDITIVE) for number, axes in enumerate(({}, *meshes))]
        for name, (knobs, meshes) in RUNS.items()
    }
    refused = [
        refusal({"mesh.context": 8, "data.seq_len": 24}),
        refusal({"mesh.context": 2, "model.attention": "dense"}),
        refusal({"mesh.context": 2, "model.attention": "xla"}, traced=True),
        refusal({"mesh.context": 2, "mesh.rules": ("length=context+tensor", "heads=", "kv_heads=")}),
        refusal({"mesh.context": 2, "mesh.tensor": 2, "mesh.rules": ("kv_heads=",)}),
        refusal({"mesh.context": 8, "data.seq_len": 32}),
    ]
    found = {"runs": runs, "splash": splash(), "refused": refused, "distances": distances()}
    found |= {"compiled": compiled("blockwise", 1024), "splash compiled": compiled("splash", 1024)}
    print(json.dumps(found))
