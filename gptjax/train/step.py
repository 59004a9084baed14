"""One training step, compiled once: gradients, accumulation, clipping, update.

Loss is a sum over weighted tokens divided by the sum of weights; both sums run over micro-batches and devices before the one
division, so that a batch gives the same gradient however it is split.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh

from gptjax.adapters.attach import attached
from gptjax.adapters.compose import composed, num_leading, with_leading
from gptjax.config import Config, tasks_of
from gptjax.model import primitives
from gptjax.model.decoder import Decoder, output_table
from gptjax.model.experts import RouterStats, router_losses
from gptjax.parallel.sharding import batch_sharding, laid_over, parameter_shardings, replicated, use_rules
from gptjax.tasks.losses import HEADS, init_heads, task_figures, task_losses, with_units
from gptjax.train import adversarial, state_precision
from gptjax.train.groups import check_patterns, keep_frozen, trained_part, with_zeros, without_frozen
from gptjax.train.loss import sampled_targets, softmax_cross_entropy
from gptjax.train.objectives import OBJECTIVES, Example, further_ahead
from gptjax.train.optimizers import Lengths, make_optimizer, make_schedule
from gptjax.train.soap import factor_sharding
from gptjax.train.sophia import curvature_is_due
from gptjax.train.state import TrainState

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]

# What a random key is for: folded into the seed first, so that no two uses ever share bits.
INIT, DROPOUT, CURVATURE, ADAPTERS, HEAD_INIT = 0, 1, 2, 3, 4


def _float32(tree: Any) -> Any:
    """Optimizer state, averages and summed gradients are float32 also where parameters are bfloat16."""
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), tree)


def init_params(config: Config, seed: jax.Array) -> Any:
    """Initial parameters as a function of (config, seed), those of the tasks' heads beside the decoder's; they still carry their
    logical axis names.
    """
    key = jax.random.fold_in(jax.random.key(seed), INIT)
    tokens_BT = jnp.zeros((1, 1), jnp.int32)
    params = with_adapters(config, Decoder(config.model).init(key, tokens_BT)["params"], seed)
    heads = init_heads(config, jax.random.fold_in(jax.random.key(seed), HEAD_INIT))
    return params | ({HEADS: heads} if heads else {})


def with_adapters(config: Config, boxed: Any, seed: jax.Array) -> Any:
    """A decoder's parameters, carrying their logical names, as `config.adapter` freezes them, and fresh adapters beside them."""
    return attached(config, boxed, jax.random.fold_in(jax.random.key(seed), ADAPTERS))


@functools.cache
def state_shardings(config: Config, lengths: Lengths, mesh: Mesh) -> TrainState:
    """A TrainState of NamedShardings: optimizer state that mirrors a parameter lies where the parameter lies.

    Raises `UserError` for a pattern of the optimizer's that no parameter matches.
    """
    boxed = jax.eval_shape(lambda: init_params(config, jnp.uint32(0)))
    check_patterns(config, nn.unbox(boxed))
    with use_rules(config.mesh):
        shardings = parameter_shardings(boxed, mesh)
    abstract = jax.eval_shape(lambda: _new_state(config, lengths, nn.unbox(init_params(config, jnp.uint32(0))), jnp.uint32(0)))
    by_path = {}
    for (path, leaf), sharding in zip(
        jax.tree_util.tree_leaves_with_path(nn.unbox(boxed)), jax.tree.leaves(shardings), strict=True
    ):
        by_path[tuple(path)] = leaf.shape, sharding
        by_path |= {(*path, *part): (shape, laid) for part, shape, laid in state_precision.placed(leaf.shape, sharding)}

    def place(path: tuple[Any, ...], leaf: Any) -> Any:
        suffixes = (tuple(path[start:]) for start in range(len(path)))
        shape, sharding = next((by_path[suffix] for suffix in suffixes if suffix in by_path), ((), replicated(mesh)))
        return sharding if shape == leaf.shape else factor_sharding(leaf.shape, shape, sharding)

    return jax.tree_util.tree_map_with_path(place, abstract)


def _new_state(config: Config, lengths: Lengths, params: Any, seed: jax.Array) -> TrainState:
    optimizer = make_optimizer(config, make_schedule(config.optimizer, lengths), lengths.total)
    return TrainState(
        step=jnp.int32(0),
        params=params,
        opt_state=optimizer.init(_float32(params)),
        ema_params=jax.tree.map(jnp.copy, _float32(params)) if config.optimizer.ema_decay else None,
        seed=seed,
        nonfinite_steps=jnp.int32(0),
        nonfinite_streak=jnp.int32(0),
    )


def init_state(config: Config, lengths: Lengths, mesh: Mesh, params: Any = None) -> TrainState:
    """The state at step 0, laid over the mesh. `params`, where given, takes the place of random ones."""
    with laid_over(mesh, config.mesh):
        if params is not None:
            shardings = state_shardings(config, lengths, mesh)
            build = jax.jit(lambda params, seed: _new_state(config, lengths, params, seed), out_shardings=shardings)
            return build(params, jnp.uint32(config.train.seed))
        any_seed = dataclasses.replace(config, train=dataclasses.replace(config.train, seed=0))
        return _initialiser(any_seed, lengths, mesh)(jnp.uint32(config.train.seed))


@functools.cache
def _initialiser(config: Config, lengths: Lengths, mesh: Mesh) -> Callable[[jax.Array], TrainState]:
    """The seed to the state at step 0, jitted: one compilation for all seeds."""
    return jax.jit(
        lambda seed: _new_state(config, lengths, nn.unbox(init_params(config, seed)), seed),
        out_shardings=state_shardings(config, lengths, mesh),
    )


def abstract_state(config: Config, lengths: Lengths, mesh: Mesh) -> TrainState:
    """Shapes, dtypes and shardings of the state, for restoring without computing it first."""
    shapes = jax.eval_shape(lambda: _new_state(config, lengths, nn.unbox(init_params(config, jnp.uint32(0))), jnp.uint32(0)))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        state_shardings(config, lengths, mesh),
    )


def hidden_states(
    config: Config, params: Any, example: Example, dropout_keys: Any = None, of_heads: bool = False, nudges_BTE: Any = None
) -> tuple[Any, RouterStats | None]:
    """([B, T, D], what the routers did) in training and evaluation alike; packed rows see only their own segment, windows have
    one. `of_heads`: a list of them, of all prediction heads. `nudges_BTE`: what is added to the tokens' embeddings.
    """
    leading, example = num_leading(config, params), with_leading(config, params, example)
    decoder = composed(config, params, dropout_keys)
    found: Any = Decoder(config.model).apply(
        {"params": decoder if nudges_BTE is None else adversarial.nudged(decoder, nudges_BTE, leading)},
        example.inputs,
        example.positions,
        segment_ids_BT=example.segment_ids if config.data.packing != "windows" else None,
        prefix_BT=example.prefix,
        dropout_keys=dropout_keys,
        method=Decoder.hidden_of_heads if of_heads else Decoder.hidden,
    )
    return jax.tree.map(lambda hidden_BTD: hidden_BTD[:, leading:], found[0]), found[-1]


def decoder_params(params: Any) -> Any:
    """The decoder's own part of all that is trained."""
    return {name: part for name, part in params.items() if name != HEADS}


def head_options(config: Config) -> dict[str, Any]:
    """How hidden states become logits, for `softmax_cross_entropy` and `row_nll`."""
    model = config.model
    return {
        "transposed": model.tied_embeddings,
        "chunk": config.objective.loss_chunk,
        "dtype": jnp.dtype(model.dtype),
        "softcap": model.logit_softcap,
    }


def example_loss(config: Config, params: Any, example: Example, dropout_keys: Any) -> tuple[jax.Array, Metrics]:
    """(sum of the weighted losses, its parts) of one micro-batch."""
    hidden, stats = hidden_states(config, params, example, dropout_keys, of_heads=True)
    losses = []
    for ahead, hidden_BTD in enumerate(hidden):
        later = further_ahead(example, ahead)
        table, smoothing, z_loss = output_table(params, config.model), config.objective.label_smoothing, config.objective.z_loss
        of_targets = {"label_smoothing": smoothing, "z_loss": z_loss, **head_options(config)}
        losses.append(softmax_cross_entropy(hidden_BTD, table, later.targets, later.weights, **of_targets))
    loss_sum, parts = losses[0]
    for head, (further_sum, further) in enumerate(losses[1:], 2):
        loss_sum = loss_sum + config.objective.prediction_heads_weight * further_sum
        parts = parts | {f"heads/{head}/{name}": value for name, value in further.items()}
    if stats is None:
        return loss_sum, parts
    router_loss_sum, router_parts = _router_sums(config, stats, parts["weight_sum"])
    return loss_sum + router_loss_sum, parts | router_parts


def task_loss(
    config: Config, params: Any, batch: Batch, dropout_keys: Any, nudges_BTE: Any = None, shares: Any = None
) -> tuple[jax.Array, Metrics]:
    """As `example_loss`, of the tasks' examples in a micro-batch. `shares`: as `task_losses`; routers count nothing then."""
    hidden_BTD, stats = hidden_states(config, params, task_inputs(batch), dropout_keys, nudges_BTE=nudges_BTE)
    loss_sum, parts = task_losses(config, params, hidden_BTD, within_model(batch), head_options(config), shares)
    if stats is None or shares is not None:
        return loss_sum, parts
    router_loss_sum, router_parts = _router_sums(config, stats, parts["weight_sum"])
    return loss_sum + router_loss_sum, parts | router_parts


def task_inputs(batch: Batch) -> Example:
    """What the decoder reads of a batch of tasks' examples; what is wanted of it stands in other arrays."""
    return OBJECTIVES["causal"](batch)


def within_model(batch: Batch) -> Batch:
    """The arrays [B, T, ...] for the places that the decoder reads; the last of a batch's, [B, T + 1], is empty."""
    return {name: array[:, :-1] for name, array in batch.items()}


def _router_sums(config: Config, stats: RouterStats, weight_sum: jax.Array) -> tuple[jax.Array, Metrics]:
    """(the routers' losses times the micro-batch's weight, their parts likewise and the choices that were made and dropped).

    The division by the weights of all micro-batches then leaves the mean of their losses, each by its targets. Shares and mean
    probabilities are over the tokens of one micro-batch on all devices: the load-balancing loss, alone of all, depends on
    train.accumulation_steps, and nothing depends on the mesh.
    """
    losses = router_losses(stats)
    objective = config.objective
    loss = objective.router_balance_loss * losses["load_balance"] + objective.router_z_loss * losses["router_z"]
    sums = {f"moe/{name}": weight_sum * value for name, value in losses.items()}
    return weight_sum * loss, sums | {"moe/choices": stats.chosen_E.sum(), "moe/dropped": stats.dropped.sum()}


def _head_metrics(sums: Metrics) -> Metrics:
    """The mean nll of each prediction head but the first."""
    heads = sorted({name.split("/")[1] for name in sums if name.startswith("heads/")}, key=int)
    return {
        f"heads/nll_{head}": sums[f"heads/{head}/nll_sum"] / jnp.maximum(sums[f"heads/{head}/weight_sum"], 1.0) for head in heads
    }


def _router_metrics(sums: Metrics, weight: jax.Array) -> Metrics:
    """The step's `moe/` metrics; none for a dense model."""
    moe = {name: value for name, value in sums.items() if name.startswith("moe/")}
    if not moe:
        return {}
    choices, dropped = moe.pop("moe/choices"), moe.pop("moe/dropped")
    return {name: value / weight for name, value in moe.items()} | {
        "moe/dropped": dropped,
        "moe/dropped_fraction": dropped / jnp.maximum(choices, 1.0),
    }


def step_dropout_keys(config: Config, seed: jax.Array, step: jax.Array) -> Any:
    """One key a row of the global batch, [B, 2]: dropout does not depend on how the batch is split."""
    model = config.model
    rates = model.embedding_dropout, model.attention_dropout, model.residual_dropout, model.stochastic_depth
    if not any((*rates, config.adapter.dropout)):
        return None
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(seed), DROPOUT), step)
    return primitives.row_keys(key, jnp.arange(config.data.batch_size))


def _sampled_loss(config: Config, params: Any, example: Example, dropout_keys: Any) -> tuple[jax.Array, Metrics]:
    """As `example_loss`, of targets drawn from the model's own distribution, without what else is added to the loss.

    `dropout_keys` [B, 2] are for the draw; dropout has none.
    """
    hidden_BTD, _ = hidden_states(config, jax.lax.stop_gradient(params), example)
    targets_BT = sampled_targets(
        hidden_BTD,
        output_table(params, config.model),
        primitives.fold_in(dropout_keys[:, None], jnp.arange(example.inputs.shape[1])),
        **head_options(config),
    )
    plain = dataclasses.replace(config.objective, label_smoothing=0.0, z_loss=0.0, router_balance_loss=0.0, router_z_loss=0.0)
    return example_loss(dataclasses.replace(config, objective=plain), params, example._replace(targets=targets_BT), None)


def curvature(config: Config, params: Any, batch: Batch, key: jax.Array) -> Any:
    """The Gauss-Newton-Bartlett estimate of the mean loss's curvature (Liu et al., 2023), a tree like the parameters, float32:
    the square of a gradient for targets drawn from the model, times the number of targets.

    It is a function of (parameters, batch, key) alone, however the batch is split.
    """
    keys_B = primitives.row_keys(key, jnp.arange(config.data.batch_size))
    gradients, sums = summed_gradients(config, params, batch, keys_B, loss=_sampled_loss)
    weight = jnp.maximum(sums["weight_sum"], 1.0)  # (sum / weight)^2 * weight
    return jax.tree.map(lambda g: jnp.square(g) / weight, without_frozen(config, gradients))


def _curvature_if_due(config: Config, state: TrainState, batch: Batch, gradients: Any) -> dict[str, Any]:
    """What the update rule needs beside gradients: for "sophia" the curvature, 0 where none is due."""
    c = config.optimizer
    if c.name != "sophia":
        return {}
    key = jax.random.fold_in(jax.random.fold_in(jax.random.key(state.seed), CURVATURE), state.step)
    due = curvature_is_due(state.step - state.nonfinite_steps, c.sophia_estimate_every)
    zeros = jax.tree.map(jnp.zeros_like, gradients)
    return {"curvature": jax.lax.cond(due, lambda: curvature(config, state.params, batch, key), lambda: zeros)}


def summed_gradients(
    config: Config, params: Any, batch: Batch, dropout_keys: Any, loss: Callable[..., tuple[jax.Array, Metrics]] = example_loss
) -> tuple[Any, Metrics]:
    """Gradient of the summed loss, 0 and not computed where parameters are frozen, and the summed parts, over all
    micro-batches."""
    parts = config.train.accumulation_steps
    batch = dict(with_units(config, params, batch, head_options(config)))

    def one(rows: tuple[Batch, Any]) -> tuple[Any, Metrics]:
        micro_batch, keys = rows
        trained, whole = trained_part(config, params)

        def loss_of(trained: Any, *nudged: Any) -> tuple[jax.Array, Metrics]:
            if tasks_of(config):
                return task_loss(config, whole(trained), micro_batch, keys, *nudged)
            example = OBJECTIVES[config.objective.name](micro_batch)
            return loss(config, whole(trained), example=example, dropout_keys=keys)

        if adversarial.shares(config):
            table = composed(config, params)["embed"]["tokens"]
            (loss_sum, metrics), gradients = adversarial.value_and_grad(
                config, loss_of, trained, table, within_model(micro_batch)
            )
        else:
            (loss_sum, metrics), gradients = jax.value_and_grad(loss_of, has_aux=True)(trained)
        return with_zeros(_float32(gradients), params), metrics | {"loss_sum": loss_sum}

    if parts == 1:
        return one((batch, dropout_keys))
    # Row r goes to micro-batch r % parts, so that a device's share of the batch stays on it.
    split = jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), (batch, dropout_keys))
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), jax.eval_shape(one, jax.tree.map(lambda x: x[0], split)))
    total, _ = jax.lax.scan(lambda total, rows: (jax.tree.map(jnp.add, total, one(rows)), None), zeros, split)
    return total


def _step(config: Config, lengths: Lengths, state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
    c = config.optimizer
    schedule = make_schedule(c, lengths)
    gradients, sums = summed_gradients(config, state.params, batch, step_dropout_keys(config, state.seed, state.step))
    gradients = without_frozen(config, gradients)
    extra = _curvature_if_due(config, state, batch, gradients)
    weight = jnp.maximum(sums["weight_sum"], 1.0)
    gradient_norm = optax.tree.norm(gradients) / weight
    scale = 1 / weight
    if c.clip_norm:
        scale = scale * jnp.minimum(1.0, c.clip_norm / jnp.maximum(gradient_norm, 1e-12))

    def update(params: Any, opt_state: Any, ema_params: Any, gradients: Any, extra: Any) -> tuple[Any, Any, Any]:
        gradients = jax.tree.map(lambda g: g * scale, gradients)
        optimizer: Any = make_optimizer(config, schedule, lengths.total)
        updates, opt_state = optimizer.update(gradients, opt_state, _float32(params), **extra)
        params = keep_frozen(config, optax.apply_updates(params, updates), params)
        if ema_params is not None:
            averaged = optax.incremental_update(params, ema_params, 1 - c.ema_decay)
            ema_params = keep_frozen(config, averaged, ema_params)
        return params, opt_state, ema_params

    # One infinite or NaN value anywhere shows in the norm; then nothing but the counters moves. Selecting each leaf afterwards
    # would make XLA copy both moments on a CPU: 2.6 times the update's time.
    finite = jnp.isfinite(gradient_norm) & jnp.isfinite(sums["loss_sum"]) & jnp.isfinite(optax.tree.norm(extra))
    kept = (state.params, state.opt_state, state.ema_params)
    params, opt_state, ema_params = jax.lax.cond(finite, update, lambda *kept: kept[:3], *kept, gradients, extra)
    updates_so_far = state.step - state.nonfinite_steps
    bad = (~finite).astype(jnp.int32)
    new_state = TrainState(
        step=state.step + 1,
        params=params,
        opt_state=opt_state,
        ema_params=ema_params,
        seed=state.seed,
        nonfinite_steps=state.nonfinite_steps + bad,
        nonfinite_streak=(state.nonfinite_streak + bad) * bad,
    )
    metrics = {
        "loss": sums["loss_sum"] / weight,
        "nll": sums["nll_sum"] / weight,
        "weight": sums["weight_sum"],
        "gradient_norm": gradient_norm,
        "learning_rate": jnp.asarray(schedule(updates_so_far), jnp.float32),
        "nonfinite_steps": new_state.nonfinite_steps,
        "nonfinite_streak": new_state.nonfinite_streak,
    }
    metrics |= _router_metrics(sums, weight) | _head_metrics(sums) | task_figures(sums) | adversarial.figures(sums)
    return new_state, metrics


@functools.cache
def make_train_step(config: Config, lengths: Lengths, mesh: Mesh) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """(state, batch) -> (state, metrics), jitted; the state that goes in is donated.

    The same arguments give the same function.
    """
    shardings = state_shardings(config, lengths, mesh)
    with use_rules(config.mesh):
        batch = batch_sharding(mesh)
    step = jax.jit(
        functools.partial(_step, config, lengths),
        in_shardings=(shardings, batch),
        out_shardings=(shardings, replicated(mesh)),
        donate_argnums=0,
    )

    def run(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        with laid_over(mesh, config.mesh):
            return step(state, batch)

    run.compiled = step  # type: ignore[attr-defined]
    return run
