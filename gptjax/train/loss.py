"""Softmax cross-entropy over a large vocabulary, in chunks of positions, so that B x T x V logits are never held at once."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from gptjax.model import primitives
from gptjax.parallel.sharding import constrain, mesh_size

# Bytes of float32 logits that one chunk may take on one device when the size is not given.
_CHUNK_BYTES = 128 * 2**20


class _Options(NamedTuple):
    transposed: bool
    label_smoothing: float
    z_loss: float
    chunk: int
    dtype: Any
    softcap: float


def _plain(*, transposed: bool, chunk: int = 0, dtype: Any = jnp.float32, softcap: float = 0.0) -> _Options:
    """Of logits alone: neither smoothing nor z-loss."""
    return _Options(transposed, 0.0, 0.0, chunk, jnp.dtype(dtype), softcap)


def softmax_cross_entropy(
    hidden_BTD: jax.Array,
    head: jax.Array,
    targets_BT: jax.Array,
    weights_BT: jax.Array,
    *,
    transposed: bool,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    chunk: int = 0,
    dtype: Any = jnp.float32,
    softcap: float = 0.0,
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """(the sum over tokens of weight * loss, its parts), float32 scalars. Sums, so that they add over micro-batches and
    devices.

    loss = (1 - label_smoothing) * nll + label_smoothing * (mean over V of -log p) + z_loss * log(Z)**2 (Szegedy et al., 2016;
    Chowdhery et al., 2022). `head` is [D, V], or with `transposed` the embedding [V, D]. Products are in `dtype`, logits and
    softmax in float32. `softcap`: logits become softcap * tanh(logits / softcap) (Gemma 2); 0: they stay. `chunk` is the
    number of positions, of all rows together, whose logits are held at once; 0 chooses.
    Parts: `nll_sum` (without smoothing and z-loss) and `weight_sum`; they carry no gradient.

    Under differentiation the gradients for `hidden_BTD` and `head` are computed in the forward pass, chunk by chunk, and only
    scaled in the backward.
    """
    options = _Options(transposed, label_smoothing, z_loss, chunk, jnp.dtype(dtype), softcap)
    loss, parts = _cross_entropy(
        options, hidden_BTD, _over_vocabulary(head, transposed), targets_BT, weights_BT.astype(jnp.float32)
    )
    return loss, jax.lax.stop_gradient(parts) | {"weight_sum": weights_BT.astype(jnp.float32).sum()}


def row_nll(hidden_BTD: jax.Array, head: jax.Array, targets_BT: jax.Array, weights_BT: jax.Array, **options: Any) -> jax.Array:
    """Sum over each row of weight * nll, [B] in float32; `options` as `token_nll`'s `logits`."""
    return (token_nll(hidden_BTD, head, targets_BT, **options) * weights_BT.astype(jnp.float32)).sum(1)


def token_nll(hidden_BTD: jax.Array, head: jax.Array, targets_BT: jax.Array, **logits: Any) -> jax.Array:
    """nll of each token, [B, T] in float32; arguments as `softmax_cross_entropy`, `logits` being transposed, chunk, dtype and
    softcap. Under differentiation the logits are computed anew in the backward pass, chunk by chunk.
    """
    options = _plain(**logits)
    return _token_nll(options, hidden_BTD, _over_vocabulary(head, options.transposed), targets_BT)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_nll(options, hidden_BTD, head, targets_BT):
    def one(hidden_BcD, targets_Bc):
        logits_BcV = _logits(options, hidden_BcD, head)
        return (), _token_losses(options, logits_BcV, _softmax(logits_BcV), targets_Bc)[1]

    return jnp.asarray(_over_chunks(options, head, one, (hidden_BTD, targets_BT))[1])


def _token_nll_forward(options, hidden_BTD, head, targets_BT):
    return _token_nll(options, hidden_BTD, head, targets_BT), (hidden_BTD, head, targets_BT)


def _token_nll_backward(options, residuals, cotangent_BT):
    """The gradient of a sum over tokens of weight * nll, the weights being what comes back for each."""
    hidden_BTD, head, targets_BT = residuals
    _, (dhidden_BTD, dhead, _) = _cross_entropy_forward(options, hidden_BTD, head, targets_BT, cotangent_BT)
    return dhidden_BTD, dhead, None


_token_nll.defvjp(_token_nll_forward, _token_nll_backward)


def token_log_probs(hidden_BTD: jax.Array, head: jax.Array, targets_BT: jax.Array, **logits: Any) -> tuple[jax.Array, jax.Array]:
    """(log-probability of each target, float32 [B, T]; whether no other token has more, bool [B, T]), without gradients;
    arguments as `token_nll`.
    """
    options = _plain(**logits)

    def one(hidden_BcD, targets_Bc):
        logits_BcV = _logits(options, hidden_BcD, head)
        _, nll_Bc = _token_losses(options, logits_BcV, _softmax(logits_BcV), targets_Bc)
        return (), (-nll_Bc, jnp.argmax(logits_BcV, axis=-1) == targets_Bc)

    head = _over_vocabulary(head, options.transposed)
    _, (log_probs_BT, is_best_BT) = _over_chunks(options, head, one, (hidden_BTD, targets_BT))
    return log_probs_BT, is_best_BT


def sampled_targets(hidden_BTD: jax.Array, head: jax.Array, keys_BT: jax.Array, **logits: Any) -> jax.Array:
    """int32 [B, T]: a target for each token, drawn from softmax(logits) with its own key (uint32 [B, T, 2]), without gradients;
    other arguments as `token_nll`.
    """
    options = _plain(**logits)

    def noise(key: jax.Array, vocab: int) -> jax.Array:
        return jax.random.gumbel(jax.random.wrap_key_data(key, impl="threefry2x32"), (vocab,))

    def one(hidden_BcD, keys_Bc):
        logits_BcV = _logits(options, hidden_BcD, head)
        drawn = jax.vmap(jax.vmap(functools.partial(noise, vocab=logits_BcV.shape[-1])))(keys_Bc)
        return (), jnp.argmax(logits_BcV + drawn, axis=-1).astype(jnp.int32)

    head = _over_vocabulary(jax.lax.stop_gradient(head), options.transposed)
    _, targets_BT = _over_chunks(options, head, one, (jax.lax.stop_gradient(hidden_BTD), keys_BT))
    return jnp.asarray(targets_BT)


def _over_vocabulary(head: jax.Array, transposed: bool) -> jax.Array:
    """The head, split over the vocabulary in place of its width.

    Each step moves one mesh axis. In a single step XLA's partitioner would put the whole table on every device, in float32:
    2.5 GB of a GPT-3.
    """
    for names in (("lookup_width", None), (None, "vocab")):
        head = constrain(head, *(reversed(names) if transposed else names))
    return head


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _cross_entropy(options, hidden_BTD, head, targets_BT, weights_BT):
    def one(hidden_BcD, targets_Bc, weights_Bc):
        logits_BcV = _logits(options, hidden_BcD, head)
        return _weighted(_token_losses(options, logits_BcV, _softmax(logits_BcV), targets_Bc), weights_Bc), ()

    sums, _ = _over_chunks(options, head, one, (hidden_BTD, targets_BT, weights_BT))
    return sums[0], {"nll_sum": sums[1]}


def _cross_entropy_forward(options, hidden_BTD, head, targets_BT, weights_BT):
    def one(hidden_BcD, targets_Bc, weights_Bc):
        logits_BcV = _logits(options, hidden_BcD, head)
        softmax = _softmax(logits_BcV)
        losses = _token_losses(options, logits_BcV, softmax, targets_Bc)
        dlogits_BcV = _dlogits(options, logits_BcV, softmax, targets_Bc, weights_Bc)
        dhidden_BcD = _dot(dlogits_BcV, head.astype(options.dtype), (2, 0 if options.transposed else 1))
        flat_hidden, flat_dlogits = (x.reshape(-1, x.shape[-1]) for x in (hidden_BcD.astype(options.dtype), dlogits_BcV))
        dhead = _dot(flat_dlogits, flat_hidden, (0, 0)) if options.transposed else _dot(flat_hidden, flat_dlogits, (0, 0))
        return (_weighted(losses, weights_Bc), dhead), (dhidden_BcD.astype(hidden_BcD.dtype), losses[0])

    (sums, dhead), (dhidden_BTD, losses_BT) = _over_chunks(options, head, one, (hidden_BTD, targets_BT, weights_BT))
    return (sums[0], {"nll_sum": sums[1]}), (dhidden_BTD, dhead.astype(head.dtype), losses_BT)


def _cross_entropy_backward(options, residuals, cotangents):
    g = cotangents[0]
    dhidden_BTD, dhead, losses_BT = residuals
    return dhidden_BTD * g.astype(dhidden_BTD.dtype), dhead * g.astype(dhead.dtype), None, losses_BT * g


_cross_entropy.defvjp(_cross_entropy_forward, _cross_entropy_backward)


def _logits(options: _Options, hidden_BcD: jax.Array, head: jax.Array) -> jax.Array:
    logits = _dot(hidden_BcD.astype(options.dtype), head.astype(options.dtype), (2, 1 if options.transposed else 0))
    logits = constrain(logits, "batch", "length", "vocab")
    return options.softcap * jnp.tanh(logits / options.softcap) if options.softcap else logits


class _Softmax(NamedTuple):
    """Of a chunk of logits, per token: the largest, exp(logit - largest), and the sum of these."""

    top_Bc: jax.Array
    exponentials_BcV: jax.Array
    total_Bc: jax.Array

    @property
    def log_normaliser_Bc(self) -> jax.Array:
        return self.top_Bc + jnp.log(self.total_Bc)


def _softmax(logits_BcV: jax.Array) -> _Softmax:
    top_Bc = logits_BcV.max(-1)
    exponentials_BcV = jnp.exp(logits_BcV - top_Bc[..., None])
    if primitives.hand_written():  # XLA's CPU backend would draw them again, on one core, for the sum and for the gradient
        exponentials_BcV = jax.lax.optimization_barrier(exponentials_BcV)
    return _Softmax(top_Bc, exponentials_BcV, primitives.row_sum(exponentials_BcV))


def _token_losses(
    options: _Options, logits_BcV: jax.Array, softmax: _Softmax, targets_Bc: jax.Array
) -> tuple[jax.Array, jax.Array]:
    """(loss, nll) of each token."""
    if primitives.hand_written():
        target_Bc = jnp.take_along_axis(logits_BcV, targets_Bc[..., None], axis=-1)[..., 0]
    else:  # a sum over the vocabulary, of which each device may hold a part
        target_Bc = jnp.where(_is_target(logits_BcV, targets_Bc), logits_BcV, 0.0).sum(-1)
    nll_Bc = softmax.log_normaliser_Bc - target_Bc
    loss_Bc = nll_Bc
    if options.label_smoothing:
        loss_Bc = loss_Bc + options.label_smoothing * (target_Bc - logits_BcV.mean(-1))
    if options.z_loss:
        loss_Bc = loss_Bc + options.z_loss * jnp.square(softmax.log_normaliser_Bc)
    return loss_Bc, nll_Bc


def _weighted(terms: tuple[jax.Array, ...], weights_Bc: jax.Array) -> tuple[jax.Array, ...]:
    return tuple((x_Bc * weights_Bc).sum() for x_Bc in terms)


def _dlogits(
    options: _Options, logits_BcV: jax.Array, softmax: _Softmax, targets_Bc: jax.Array, weights_Bc: jax.Array
) -> jax.Array:
    """Gradient of the weighted loss for the logits before their soft-cap, in the type of the products that follow."""
    vocab = softmax.exponentials_BcV.shape[-1]
    scale_Bc = weights_Bc / softmax.total_Bc
    if options.z_loss:
        scale_Bc = scale_Bc * (1 + 2 * options.z_loss * softmax.log_normaliser_Bc)
    gradient = softmax.exponentials_BcV * scale_Bc[..., None]
    gradient = gradient - jnp.where(
        _is_target(softmax.exponentials_BcV, targets_Bc), (1 - options.label_smoothing) * weights_Bc[..., None], 0.0
    )
    if options.label_smoothing:
        gradient = gradient - options.label_smoothing / vocab * weights_Bc[..., None]
    if options.softcap:
        gradient = gradient * (1 - jnp.square(logits_BcV / options.softcap))
    return gradient.astype(options.dtype)


def _is_target(logits_BcV: jax.Array, targets_Bc: jax.Array) -> jax.Array:
    return targets_Bc[..., None] == jnp.arange(logits_BcV.shape[-1])


def _dot(a: jax.Array, b: jax.Array, axes: tuple[int, int]) -> jax.Array:
    return jax.lax.dot_general(a, b, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=jnp.float32)


def _over_chunks(options: _Options, head: jax.Array, one: Callable, arrays: tuple) -> tuple[Any, tuple]:
    """`one(*chunk)` gives (results to sum, results [B, c, ...] to join along T).

    Each chunk takes every `chunks`-th position of every row, so that all devices have a share of it whether they split rows
    or positions.
    """
    batch, length = arrays[0].shape[:2]
    vocab = head.shape[0 if options.transposed else 1]
    positions = options.chunk or mesh_size() * _CHUNK_BYTES // (4 * vocab)
    chunks = -(-length // max(1, positions // batch))
    size = -(-length // chunks)
    if chunks == 1:
        return one(*arrays)

    def split(x):
        x = jnp.pad(x, ((0, 0), (0, chunks * size - length)) + ((0, 0),) * (x.ndim - 2))  # weight 0
        x = jnp.moveaxis(x.reshape(batch, size, chunks, *x.shape[2:]), 2, 0)
        return constrain(x, None, "batch", "length", *(None,) * (x.ndim - 3))

    def step(total, chunk):
        to_sum, to_join = one(*chunk)
        return jax.tree.map(jnp.add, total, to_sum), to_join

    stacked = jax.tree.map(split, arrays)
    total, first = one(*jax.tree.map(lambda x: x[0], stacked))
    total, rest = jax.lax.scan(step, total, jax.tree.map(lambda x: x[1:], stacked))

    def join(first, rest):
        x = jnp.moveaxis(jnp.concatenate([first[None], rest]), 0, 2)
        return x.reshape(batch, chunks * size, *x.shape[3:])[:, :length]

    return total, jax.tree.map(join, first, rest)
