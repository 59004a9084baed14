"""Where two runs with experts part: is it a router's near tie?

    python experiments/meshes/ties.py
    python experiments/meshes/ties.py --only=stage=4,expert=2 --set=train.seed=1

Trains the model with experts of table.py on one device and on a mesh of eight, side by side. Before each step the forward pass
of that step (its batch, its dropout) is run on one device with the parameters of both, and the routers' logits are compared: how
many tokens choose other experts, how close to a tie those choices were (the k-th largest logit less the next, as the first run
has it), how close the closest of all tokens was, and by how much any logit differs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Iterator
from typing import Any

from table import DEVICES, KNOBS, QUICK, STEPS, text

EXPERTS = {"model.num_experts": 8, "objective.router_balance_loss": 0.01, "objective.router_z_loss": 0.001}


def steps(knobs: dict[str, Any], axes: dict[str, int]) -> Iterator[tuple[Any, float]]:
    """(parameters before the step, on the host; its loss) for each step."""
    import jax
    import numpy as np

    from gptjax.parallel.mesh import make_mesh
    from gptjax.train.optimizers import Lengths
    from gptjax.train.step import init_state, make_train_step
    from tests.small import random_batch, small

    config = small(knobs, {"mesh.data": 1} | {f"mesh.{axis}": size for axis, size in axes.items()})
    lengths, mesh = Lengths.of(config, 1.0), make_mesh(config.mesh)
    state, step = init_state(config, lengths, mesh), make_train_step(config, lengths, mesh)
    for number in range(STEPS):
        params = jax.tree.map(np.asarray, state.params)
        state, metrics = step(state, random_batch(config, number))
        yield params, float(metrics["loss"])


def router_logits(knobs: dict[str, Any]) -> tuple[Any, int]:
    """(a function from (parameters, step) to the routers' logits [L, B, T, E] of the training forward pass and to what is no
    padding [B, T]; choices a token).
    """
    import flax.linen as nn
    import jax
    import jax.numpy as jnp
    import numpy as np

    from gptjax.model.experts import Router
    from gptjax.train import step as step_lib
    from gptjax.train.objectives import OBJECTIVES
    from tests.small import random_batch, small

    config = small(knobs, {"mesh.data": 1})
    seen: list[np.ndarray] = []

    def watch(call: Any, args: Any, kwargs: Any, context: Any) -> Any:
        if isinstance(context.module, Router) and context.method_name == "__call__":
            kernel_DE = context.module.variables["params"]["kernel"]
            logits_BTE = jnp.einsum("BTD,DE->BTE", args[0].astype(jnp.float32), kernel_DE, precision="highest")
            jax.debug.callback(lambda logits: seen.append(np.asarray(logits)), logits_BTE, ordered=True)
        return call(*args, **kwargs)

    @jax.jit
    def forward(params: Any, batch: Any, number: jax.Array) -> jax.Array:
        example = OBJECTIVES[config.objective.name](batch)
        keys = step_lib._dropout_keys(config, jnp.uint32(config.train.seed), number)
        with nn.intercept_methods(watch):
            return step_lib.hidden_states(config, params, example, keys)[0]

    def run(params: Any, number: int) -> tuple[np.ndarray, np.ndarray]:
        seen.clear()
        batch = random_batch(config, number)
        forward(params, batch, jnp.int32(number)).block_until_ready()
        jax.effects_barrier()
        return np.stack(seen), batch["segment_ids"][:, :-1] > 0

    return run, config.model.experts_per_token


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="a knob of the tiny model")
    parser.add_argument("--only", default="stage=4,expert=2", metavar="AXIS=N,AXIS=N", help="the mesh")
    arguments = parser.parse_args()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {QUICK}".strip()
    import jax
    import numpy as np

    jax.config.update("jax_num_cpu_devices", DEVICES)
    knobs = KNOBS | EXPERTS | {key: text(value) for key, _, value in (given.partition("=") for given in arguments.set)}
    axes = {axis: int(size) for axis, size in (part.split("=") for part in arguments.only.split(","))}
    logits, k = router_logits(knobs)
    print("| step | loss differs by | choices that differ | gap there | closest gap of all | largest difference of a logit |")
    print("| ---: | ---: | ---: | ---: | ---: | ---: |")
    for number, ((params, loss), (other_params, other_loss)) in enumerate(zip(steps(knobs, {}), steps(knobs, axes), strict=True)):
        (one, real_BT), (other, _) = logits(params, number), logits(other_params, number)
        ordered = np.sort(one, axis=-1)[..., ::-1]
        gap_LBT = np.where(real_BT, ordered[..., k - 1] - ordered[..., k], np.inf)
        choices = [np.sort(np.argsort(-x, axis=-1, kind="stable")[..., :k], axis=-1) for x in (one, other)]
        differs_LBT = (choices[0] != choices[1]).any(-1) & real_BT
        there = f"{gap_LBT[differs_LBT].max():.1e}" if differs_LBT.any() else ""
        moved = np.abs(one - other).max(-1)[:, real_BT].max()
        print(
            f"| {number} | {abs(other_loss / loss - 1):.1e} | {differs_LBT.sum()} of {real_BT.sum() * len(one)} | {there} "
            f"| {gap_LBT.min():.1e} | {moved:.1e} |",
            flush=True,
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
