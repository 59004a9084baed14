"""Mixture of experts in place of the MLP: each token goes to its k most probable experts (Shazeer et al., 2017).

Axis letters beside those of decoder.py:

    E routed experts   C places of one expert in one row
    J choices of a token, k of them   M tokens on their way to experts, each as often as it goes to one

With capacity (GShard, Lepikhin et al., 2021; Switch Transformer, Fedus et al., 2022) an expert has C places in each row of the
batch. They are given in the order of the tokens, a token's more probable choice first, so that what a token gets depends on
nothing after it, on no other row, and on no mesh; a choice that finds no place is dropped and adds nothing. Tokens lie in buffers
[B, E, C, D], and changing their layout from rows to experts is the compiler's all-to-all over the `expert` axis.

Dropless, tokens are sorted by expert and multiplied in groups of whatever size they have. On a mesh each device sorts its own;
over the `expert` axis they go by an all-to-all with room for the worst case, every token to experts of one device: its sizes must
be known to the compiler, and XLA's ragged all-to-all does not run on CPUs. With P parts of the experts this moves and holds P
times what an even load needs, but multiplies no more of it where `jax.lax.ragged_dot` is native. XLA's CPU backend computes that
product as if each token went to every expert.

Padding (segment 0) is routed nowhere, takes no place, and is not counted.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from jax.ad_checkpoint import checkpoint_name

from gptjax.config import ModelConfig
from gptjax.model import primitives
from gptjax.model.layers import ACTIVATIONS, MLP, PROJECTED, parameter
from gptjax.model.parameterization import initial_std
from gptjax.parallel.sharding import constrain, mesh_size, spec

# The name of the routers' logits, which remat always keeps: computed again with other roundings, a near tie could fall the other
# way in the backward pass.
ROUTED = "routed"

# An expert's linear maps by name: kernel [E, in, out], and bias [E, out] or None.
Maps = dict[str, tuple[jax.Array, jax.Array | None]]


@struct.dataclass
class RouterStats:
    """What the router did with the tokens of a batch, padding left out: float32 sums, [L, ...] once the layers are stacked."""

    tokens: jax.Array
    chosen_E: jax.Array  # tokens whose choice an expert was, dropped ones too; these sum to k * tokens
    probability_E: jax.Array
    squared_z: jax.Array  # of log(sum of exp(logits))
    dropped: jax.Array  # choices that found no place


def router_losses(stats: RouterStats) -> dict[str, jax.Array]:
    """Scalars, each a mean over layers of one over tokens; `stats` has a leading axis of layers.

    load_balance   E * sum over experts of (share of all choices) * (mean probability): 1 where both are even, up to E where one
                   expert has all (Fedus et al., 2022; for k > 1 shares are of the k * tokens choices). The gradient flows
                   through the probabilities.
    router_z       mean of log(sum of exp(logits))**2 (ST-MoE, Zoph et al., 2022)
    busiest        E * the largest expert's share of the choices, for the eye
    """
    tokens_L1 = jnp.maximum(stats.tokens, 1.0)[:, None]
    share_LE = stats.chosen_E / jnp.maximum(stats.chosen_E.sum(-1, keepdims=True), 1.0)
    experts = share_LE.shape[-1]
    return {
        "load_balance": experts * (share_LE * stats.probability_E / tokens_L1).sum(-1).mean(),
        "router_z": (stats.squared_z / tokens_L1[:, 0]).mean(),
        "busiest": experts * share_LE.max(-1).mean(),
    }


class Router(nn.Module):
    """Logits over the experts and the k largest, in float32 whatever the config's type: a rounding may change the choice."""

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, is_token_BT: jax.Array | None) -> tuple[jax.Array, jax.Array, RouterStats]:
        """(chosen experts [B, T, J], their weights [B, T, J], sums); padding's weights are 0. Ties go to the lower number."""
        c = self.config
        shape = (x_BTD.shape[-1], c.num_experts)
        normal = nn.initializers.normal(initial_std(c, "router"))
        kernel_DE = parameter(self, "kernel", normal, ("embed", "router"), shape, c.param_dtype)
        logits_BTE = jnp.einsum(
            "BTD,DE->BTE", x_BTD.astype(jnp.float32), kernel_DE.astype(jnp.float32), precision=jax.lax.Precision.HIGHEST
        )
        logits_BTE = checkpoint_name(constrain(logits_BTE, "batch", "length", None), ROUTED)
        probabilities_BTE = jax.nn.softmax(logits_BTE, axis=-1)
        _, chosen_BTJ = jax.lax.top_k(logits_BTE, c.experts_per_token)
        weights_BTJ = jnp.take_along_axis(probabilities_BTE, chosen_BTJ, axis=-1)
        if c.router_normalize_top_k:
            weights_BTJ = weights_BTJ / weights_BTJ.sum(-1, keepdims=True)
        real_BT1 = jnp.ones_like(logits_BTE[..., :1]) if is_token_BT is None else is_token_BT[..., None].astype(jnp.float32)
        stats = RouterStats(
            tokens=real_BT1.sum(),
            chosen_E=(jax.nn.one_hot(chosen_BTJ, c.num_experts).sum(2) * real_BT1).sum((0, 1)),
            probability_E=(probabilities_BTE * real_BT1).sum((0, 1)),
            squared_z=(jnp.square(jax.nn.logsumexp(logits_BTE, axis=-1, keepdims=True)) * real_BT1).sum(),
            dropped=jnp.float32(0),
        )
        return chosen_BTJ, weights_BTJ * real_BT1, stats


class ExpertMap(nn.Module):
    """The parameters of one linear map an expert: kernel [E, in, out], and bias [E, out] where the config's MLPs have one."""

    config: ModelConfig
    axes: tuple[str, str]
    shape: tuple[int, int]
    into_residual: bool = False

    @nn.compact
    def __call__(self) -> tuple[jax.Array, jax.Array | None]:
        c = self.config
        std = initial_std(c, "hidden")
        if self.into_residual and c.scaled_residual_init:
            std /= math.sqrt(2 * c.num_layers)
        shape, axes = (c.num_experts, *self.shape), ("experts", *self.axes)
        kernel = parameter(self, "kernel", nn.initializers.normal(std), axes, shape, c.param_dtype)
        if not c.mlp_bias:
            return kernel, None
        return kernel, parameter(self, "bias", nn.initializers.zeros, axes[::2], shape[::2], c.param_dtype)


class ExpertMLP(nn.Module):
    """Routed experts, each an MLP as `layers.MLP`, and shared ones that see every token.

    The shared ones are one MLP of their joint width (DeepSeekMoE, Dai et al., 2024), with one bias on its output.
    """

    config: ModelConfig

    @nn.compact
    def __call__(self, x_BTD: jax.Array, is_token_BT: jax.Array | None, may_drop: bool) -> tuple[jax.Array, RouterStats]:
        """([B, T, D], sums). `is_token_BT` is False on padding (None: nowhere); `may_drop=False`: dropless all the same."""
        c = self.config
        chosen_BTJ, weights_BTJ, stats = Router(c, name="router")(x_BTD, is_token_BT)
        inward, outward = (c.model_dim, c.expert_mlp_dim), (c.expert_mlp_dim, c.model_dim)
        maps = {"up": ExpertMap(c, ("embed", "mlp"), inward, name="up")()}
        if c.gated_mlp:
            maps["gate"] = ExpertMap(c, ("embed", "mlp"), inward, name="gate")()
        maps["down"] = ExpertMap(c, ("mlp", "embed"), outward, into_residual=True, name="down")()
        if c.expert_capacity_factor and may_drop:
            y_BTD, dropped = _with_capacity(c, x_BTD, is_token_BT, chosen_BTJ, weights_BTJ, maps)
            stats = stats.replace(dropped=dropped)  # type: ignore[attr-defined]
        else:
            over_mesh = mesh_size() > 1 and not self.is_initializing()  # one token initialises; it divides over nothing
            y_BTD = _dropless(c, x_BTD, is_token_BT, chosen_BTJ, weights_BTJ, maps, over_mesh)
        y_BTD = constrain(y_BTD.astype(c.dtype), "batch", "length", None)
        if c.num_shared_experts:
            joint = dataclasses.replace(c, mlp_dim=c.num_shared_experts * c.expert_mlp_dim)
            y_BTD = y_BTD + MLP(joint, name="shared")(x_BTD)
        return y_BTD, stats


def _apply_maps(config: ModelConfig, maps: Maps, x: jax.Array, linear: Callable[..., jax.Array]) -> jax.Array:
    """An MLP of each expert, `linear(x, kernel, bias)` being one map of each."""
    activation = ACTIVATIONS[config.activation]
    up = checkpoint_name(linear(x, *maps["up"]), PROJECTED)
    if config.gated_mlp:
        hidden = activation(checkpoint_name(linear(x, *maps["gate"]), PROJECTED)) * up
    else:
        hidden = activation(up)
    return checkpoint_name(linear(hidden, *maps["down"]), PROJECTED)


def _operand(x: jax.Array, dtype: jnp.dtype) -> jax.Array:
    """`x` rounded to `dtype`; on a CPU, which has no product of batches of bfloat16 summed in float32, as float32 again."""
    x = x.astype(dtype)
    return x.astype(jnp.float32) if primitives.hand_written() else x


# --- with capacity ---


def capacity(config: ModelConfig, length: int) -> int:
    """Places of one expert in a row of `length` tokens; never more than tokens, for a token takes at most one of them."""
    even = length * config.experts_per_token / config.num_experts
    return max(1, min(length, math.ceil(config.expert_capacity_factor * even - 1e-9)))  # 1.1 * 10 is 11.000000000000002


def _with_capacity(
    config: ModelConfig, x_BTD: jax.Array, is_token_BT: Any, chosen_BTJ: jax.Array, weights_BTJ: jax.Array, maps: Maps
) -> tuple[jax.Array, jax.Array]:
    """([B, T, D] in float32, dropped choices)."""
    dtype = jnp.dtype(config.dtype)
    batch, length, choices = chosen_BTJ.shape
    experts, places = config.num_experts, capacity(config, length)
    chosen_BM = chosen_BTJ.reshape(batch, length * choices)
    taken_BME = jax.nn.one_hot(chosen_BM, experts, dtype=jnp.int32)
    if is_token_BT is not None:
        taken_BME = taken_BME * jnp.repeat(is_token_BT, choices, axis=1)[..., None]
    place_BM = ((jnp.cumsum(taken_BME, axis=1) - taken_BME) * taken_BME).sum(-1)
    wanted_BM = taken_BME.sum(-1) > 0
    kept_BM = wanted_BM & (place_BM < places)
    slot_BM = jnp.where(kept_BM, chosen_BM * places + place_BM, experts * places)  # out of range: nowhere

    token_M = jnp.arange(length * choices) // choices
    source_BS = jax.vmap(lambda slot_M: jnp.full(experts * places, length).at[slot_M].set(token_M, mode="drop"))(slot_BM)
    take = jax.vmap(lambda rows, index: jnp.take(rows, index, axis=0, mode="fill", fill_value=0))
    buffers_BSD = constrain(take(x_BTD.astype(dtype), source_BS), "batch", None, None)
    buffers_BECD = constrain(
        buffers_BSD.reshape(batch, experts, places, -1), "expert_batch", "experts", None, None
    )  # here tokens go to their experts' devices

    def linear(x_BECI: jax.Array, kernel_EIO: jax.Array, bias_EO: jax.Array | None) -> jax.Array:
        operands = _operand(x_BECI, dtype), _operand(kernel_EIO, dtype)
        y = jnp.einsum("BECI,EIO->BECO", *operands, preferred_element_type=jnp.float32)
        return (y if bias_EO is None else y + bias_EO[:, None].astype(jnp.float32)).astype(dtype)

    y_BECD = constrain(_apply_maps(config, maps, buffers_BECD, linear), "expert_batch", "experts", None, None)
    y_BSD = constrain(y_BECD.reshape(batch, experts * places, -1), "batch", None, None)  # and here they come back
    y_BTJD = take(y_BSD, slot_BM).reshape(batch, length, choices, -1)
    y_BTD = jnp.einsum("BTJD,BTJ->BTD", y_BTJD.astype(jnp.float32), weights_BTJ)
    return y_BTD, (wanted_BM & ~kept_BM).sum().astype(jnp.float32)


# --- dropless ---


def _dropless(
    config: ModelConfig,
    x_BTD: jax.Array,
    is_token_BT: jax.Array | None,
    chosen_BTJ: jax.Array,
    weights_BTJ: jax.Array,
    maps: Maps,
    over_mesh: bool,
) -> jax.Array:
    """[B, T, D] in float32."""
    dtype, experts = jnp.dtype(config.dtype), config.num_experts
    if is_token_BT is not None:
        chosen_BTJ = jnp.where(is_token_BT[..., None], chosen_BTJ, experts)  # nobody's
    # The last bias is added outside, once: the `tensor` axis holds parts of a sum.
    down, down_bias_ED = maps["down"]
    maps = {name: (kernel.astype(dtype), bias) for name, (kernel, bias) in (maps | {"down": (down, None)}).items()}
    if over_mesh:
        y_BTD = _over_mesh(config, x_BTD, chosen_BTJ, weights_BTJ, maps)
    else:
        y_BTD = _combine(config, x_BTD, chosen_BTJ, weights_BTJ, maps, 1, ())
    if down_bias_ED is not None:
        share_BTE = jnp.einsum("BTJE,BTJ->BTE", jax.nn.one_hot(chosen_BTJ, experts), weights_BTJ)
        y_BTD = y_BTD + jnp.einsum("BTE,ED->BTD", share_BTE, down_bias_ED.astype(jnp.float32))
    return y_BTD


def _over_mesh(config: ModelConfig, x_BTD: jax.Array, chosen_BTJ: jax.Array, weights_BTJ: jax.Array, maps: Maps) -> jax.Array:
    """`_combine` on each device's own tokens, experts and part of the hidden width."""
    mesh = jax.sharding.get_abstract_mesh()
    tokens = spec("batch", "length", None)
    into = spec("experts", None, "mlp"), None if maps["up"][1] is None else spec("experts", "mlp")
    layouts = {name: (spec("experts", "mlp", None), None) if name == "down" else into for name in maps}
    expert_axes, width_axes = (_axes(name) for name in ("experts", "mlp"))
    parts = math.prod(mesh.shape[axis] for axis in expert_axes)

    def local(x_BTD: jax.Array, chosen_BTJ: jax.Array, weights_BTJ: jax.Array, maps: Maps) -> jax.Array:
        y_BTD = _combine(config, x_BTD, chosen_BTJ, weights_BTJ, maps, parts, expert_axes)
        return jax.lax.psum(y_BTD, width_axes) if width_axes else y_BTD

    # Axes that are manual already, such as a pipeline's, stay so.
    free = {axis for axis, kind in zip(mesh.axis_names, mesh.axis_types, strict=True) if kind == jax.sharding.AxisType.Auto}
    run = jax.shard_map(local, in_specs=(tokens, tokens, tokens, layouts), out_specs=tokens, axis_names=free, check_vma=False)
    return run(x_BTD.astype(config.dtype), chosen_BTJ, weights_BTJ, maps)


def _axes(name: str) -> tuple[str, ...]:
    """The mesh axes of one logical name."""
    (entry,) = spec(name) or (None,)
    return (entry,) if isinstance(entry, str) else tuple(entry or ())


def _combine(
    config: ModelConfig,
    x_BTD: jax.Array,
    chosen_BTJ: jax.Array,
    weights_BTJ: jax.Array,
    maps: Maps,
    parts: int,
    axes: tuple[str, ...],
) -> jax.Array:
    """The experts' weighted sum for these tokens, [B, T, D] in float32; each of `parts` devices along `axes` holds E / parts."""
    batch, length, choices = chosen_BTJ.shape
    x_ID = x_BTD.reshape(batch * length, -1).astype(config.dtype)
    chosen_M = chosen_BTJ.reshape(-1)
    token_M = jnp.arange(chosen_M.size) // choices
    if parts == 1:
        y_MD = _grouped(config, maps, x_ID, token_M, chosen_M, config.num_experts)
    else:
        y_MD = _exchange(config, maps, x_ID, token_M, chosen_M, choices, parts, axes)
    y_BTJD = y_MD.reshape(batch, length, choices, -1)
    return jnp.einsum("BTJD,BTJ->BTD", y_BTJD.astype(jnp.float32), weights_BTJ)


def _exchange(
    config: ModelConfig,
    maps: Maps,
    x_ID: jax.Array,
    token_M: jax.Array,
    chosen_M: jax.Array,
    choices: int,
    parts: int,
    axes: tuple[str, ...],
) -> jax.Array:
    """`_grouped` where each device along `axes` holds E / parts experts: tokens go to them and come back, [M, D]."""
    own = config.num_experts // parts
    room = x_ID.shape[0] * min(choices, own)  # a token's choices are different experts, so no more can want one device
    taken_MP = jax.nn.one_hot(chosen_M // own, parts, dtype=jnp.int32)  # of padding, E // own = parts: none
    place_M = ((jnp.cumsum(taken_MP, axis=0) - taken_MP) * taken_MP).sum(-1)
    slot_M = jnp.where(taken_MP.sum(-1) > 0, chosen_M // own * room + place_M, parts * room)
    source_S = jnp.full(parts * room, x_ID.shape[0]).at[slot_M].set(token_M, mode="drop")
    expert_S = jnp.full(parts * room, own).at[slot_M].set(chosen_M % own, mode="drop")
    sent_SD = jnp.take(x_ID, source_S, axis=0, mode="fill", fill_value=0)
    came_SD, expert_S = (jax.lax.all_to_all(array, axes, 0, 0, tiled=True) for array in (sent_SD, expert_S))
    y_SD = _grouped(config, maps, came_SD, jnp.arange(parts * room), expert_S, own)
    back_SD = jax.lax.all_to_all(y_SD, axes, 0, 0, tiled=True)
    return jnp.take(back_SD, slot_M, axis=0, mode="fill", fill_value=0)


def _grouped(
    config: ModelConfig, maps: Maps, x_ID: jax.Array, token_M: jax.Array, expert_M: jax.Array, experts: int
) -> jax.Array:
    """[M, D]: the MLP of expert `expert_M[m]` on row `token_M[m]` of `x_ID`; 0 where there is no such expert."""
    dtype = jnp.dtype(config.dtype)
    order_M = jnp.argsort(expert_M, stable=True)
    sorted_M = expert_M[order_M]
    sizes_E = jnp.bincount(expert_M, length=experts).astype(jnp.int32)  # counts no number from `experts` on
    # What lies past the last group is not defined by ragged_dot, neither forward nor backward.
    is_real_M1 = (sorted_M < experts)[:, None]

    def linear(x_MI: jax.Array, kernel_EIO: jax.Array, bias_EO: jax.Array | None) -> jax.Array:
        operands = _operand(x_MI, dtype), _operand(kernel_EIO, dtype)
        y_MO = jax.lax.ragged_dot(*operands, sizes_E, preferred_element_type=jnp.float32)
        if bias_EO is not None:
            y_MO = y_MO + jnp.take(bias_EO, sorted_M, axis=0, mode="fill", fill_value=0).astype(jnp.float32)
        return jnp.where(is_real_M1, y_MO, 0).astype(dtype)

    x_MD = jnp.where(is_real_M1, x_ID[token_M[order_M]], 0)
    y_MD = _apply_maps(config, maps, x_MD, linear)
    return jnp.zeros_like(y_MD).at[order_M].set(y_MD, unique_indices=True)
