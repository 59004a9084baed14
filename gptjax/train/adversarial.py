"""Adversarial training: every example once more, its tokens' embeddings moved to where the model's own loss grows fastest.

Miyato et al. (2017, "Adversarial training methods for semi-supervised text classification"): with g the gradient of an example's
loss for the embeddings e of its tokens, a matrix [n, E] with one norm,

    loss = loss(e) + adversarial_weight * loss(e + r),    r = adversarial_norm * |e| * g / |g|,

r being a constant for the gradient that follows. They keep a model from escaping r by long embeddings by giving all of them one
length; here r grows with e, which leaves a pre-trained table as it is. An example is a segment of a row, so that its r does not
depend on what is packed beside it; both passes have the same dropout. Words are not replaced by others: `gptjax attack` does
that, to a finished model.

r is a function of the parameters and the batch, made within the step: there is nothing to keep for a run that goes on.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import struct

from gptjax.config import Config, tasks_of
from gptjax.model import primitives
from gptjax.model.kernels import LinearMap
from gptjax.parallel.sharding import constrain


@struct.dataclass
class _Nudged(LinearMap):
    """A table of tokens, for one batch: the rows that are looked up get something added."""

    table_VE: Any
    nudges_BTE: jax.Array

    def rows(self, ids: jax.Array) -> jax.Array:
        return _rows(self.table_VE, ids) + self.nudges_BTE


def _rows(table_VE: Any, ids_BT: jax.Array) -> jax.Array:
    """float32 [B, T, E]."""
    if isinstance(table_VE, LinearMap):
        return table_VE.rows(ids_BT)
    return primitives.embed(constrain(table_VE, None, "lookup_width"), ids_BT).astype(jnp.float32)


def nudged(decoder: Any, nudges_BTE: jax.Array, leading: int) -> Any:
    """The decoder's parameters with `nudges_BTE` added to what is looked up of a batch's tokens; the `leading` places that
    adapters put ahead of them stay.
    """
    table = _Nudged(decoder["embed"]["tokens"], jnp.pad(nudges_BTE, ((0, 0), (leading, 0), (0, 0))))
    return decoder | {"embed": decoder["embed"] | {"tokens": table}}


def shares(config: Config) -> dict[str, float]:
    """{task: the weight of its adversarial loss} of the tasks that have one."""
    return {name: knobs.adversarial_weight for name, knobs in tasks_of(config).items() if knobs.adversarial_norm}


def value_and_grad(
    config: Config, loss_of: Callable[..., Any], trained: Any, table_VE: Any, batch: Mapping[str, jax.Array]
) -> tuple[tuple[jax.Array, dict[str, jax.Array]], Any]:
    """((sum of both losses, the parts of the first and "adversarial/" of the second), its gradient for `trained`).

    `loss_of(trained, nudges_BTE, shares)`: the sum of a micro-batch's losses and its parts. `table_VE`: the tokens' embeddings;
    `batch`: arrays [B, T, ...] of the micro-batch.
    """
    own_BTE = jax.lax.stop_gradient(_rows(table_VE, batch["tokens"]))
    first = jax.value_and_grad(loss_of, argnums=(0, 1), has_aux=True)
    (loss_sum, parts), (gradients, slopes_BTE) = first(trained, jnp.zeros_like(own_BTE))
    norms = jnp.asarray([0.0, *(knobs.adversarial_norm for knobs in tasks_of(config).values())])
    nudges_BTE = nudges(slopes_BTE, own_BTE, batch["segment_ids"], norms[batch["task"]])
    (more_sum, more_parts), more = jax.value_and_grad(loss_of, has_aux=True)(trained, nudges_BTE, shares(config))
    parts = parts | {f"adversarial/{name}": more_parts[name] for name in ("nll_sum", "weight_sum")}
    return (loss_sum + more_sum, parts), jax.tree.map(jnp.add, gradients, more)


def nudges(slopes_BTE: jax.Array, own_BTE: jax.Array, segments_BT: jax.Array, norms_BT: jax.Array) -> jax.Array:
    """[B, T, E]: `slopes_BTE` with, in each segment, `norms_BT` times the norm of the segment's `own_BTE`; 0 where they are 0."""

    def of_segments(x_BTE: jax.Array) -> jax.Array:
        squares_BT = jnp.square(x_BTE).sum(-1)
        # The compiler never holds T x T of it: the sum takes it in.
        same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
        return jnp.where(same_BTT, squares_BT[:, None, :], 0.0).sum(-1)

    steep_BT, lengths_BT = of_segments(slopes_BTE), of_segments(own_BTE)
    factors_BT = jnp.where(steep_BT > 0, norms_BT * jnp.sqrt(lengths_BT / jnp.where(steep_BT > 0, steep_BT, 1.0)), 0.0)
    return constrain(factors_BT[..., None] * slopes_BTE, "batch", "length", None)


def figures(sums: Mapping[str, jax.Array]) -> dict[str, jax.Array]:
    """{"adversarial/nll": the mean nats of moved examples}; nothing of a run without them."""
    if "adversarial/nll_sum" not in sums:
        return {}
    return {"adversarial/nll": sums["adversarial/nll_sum"] / jnp.maximum(sums["adversarial/weight_sum"], 1.0)}
