"""The decoder: a GPT, or a Llama, or what lies between, by `ModelConfig`.

Axis letters, here and in every file of the package:

    B batch          D model width      N query heads            L layers
    T query position F MLP width        K key and value heads    V vocabulary
    S key position   H head width       G = N // K, query heads that share a key head

Modules are pure functions of (parameters, inputs): the key/value cache goes in and comes out, dropout takes its keys as an
argument. Parameters of the L blocks are stacked on a leading axis, whether the blocks are scanned or unrolled.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.config import ModelConfig, check_stages, layer_configs
from gptjax.model import primitives
from gptjax.model.block import Block
from gptjax.model.cache import Cache
from gptjax.model.embedding import Embedding
from gptjax.model.experts import ROUTED, RouterStats
from gptjax.model.kernels import LinearMap
from gptjax.model.layers import PROJECTED, Norm, parameter
from gptjax.model.parameterization import initial_std, output_multiplier
from gptjax.model.positions import angles_by_base, angles_key
from gptjax.model.rows import Rows
from gptjax.parallel.pipeline import num_micro_batches, pipelined
from gptjax.parallel.sharding import axis_size, mesh_config

# What the backward pass may keep; everything else is computed again.
# "dots" keeps what projections give, by name: products inside a hand-written derivative are hidden from JAX's own policies.
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_only_these_names(PROJECTED, ROUTED),
    "full": jax.checkpoint_policies.save_only_these_names(ROUTED),
}


class Decoder(nn.Module):
    """Token ids to logits."""

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        self.embed = Embedding(c)
        # They make the parameters; `_scanned`, `_with_cache` and `hidden_of_heads` run them.
        self.layers = _stack(c, c.num_layers, "layers")
        if c.prediction_heads > 1:
            self.prediction_heads = _stack(c, c.prediction_heads - 1, "prediction_heads")
        if c.norm_placement != "post":
            self.final_norm = Norm(c)
        if not c.tied_embeddings:
            normal = nn.initializers.normal(initial_std(c, "head"))
            self.head = parameter(self, "head", normal, ("table_width", "table_rows"), (c.model_dim, c.vocab_size), c.param_dtype)

    def hidden(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
        prefix_BT: jax.Array | None = None,
        dropout_keys: Any = None,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Cache | None, RouterStats | None]:
        """What the output table is multiplied with, the normed output of the last block, [B, T, D], or [B, T, E] where a table
        [V, E] is tied, times the parameterization's output multiplier; the cache with these tokens written in; and what the
        routers of all layers did (None: no experts).

        `segment_ids_BT`: tokens see only their own segment (packed documents). `prefix_BT`, bool: tokens that all of their
        segment see; others are seen by later ones only. `dropout_keys`: one a row; None: no dropout.
        With a cache, token t stands at `positions_BT[:, t]` and sees all positions up to its own; without, it sees the row up
        to t.
        """
        x_BTD, _, cache, stats = self._trunk(tokens_BT, positions_BT, segment_ids_BT, prefix_BT, dropout_keys, cache)
        return self.out(x_BTD), cache, stats

    def hidden_of_heads(self, tokens_BT: jax.Array, *args: Any, **kwargs: Any) -> tuple[list[jax.Array], RouterStats | None]:
        """(`hidden` of each prediction head, the first being the decoder's own; what all routers did). Arguments as `hidden`,
        without a cache.

        Gloeckle et al. (2024): a block of its own for each head on one trunk, then one norm and one output table for all. Theirs
        branches off before the last layer, so that the first head too is a block beside the others; here it is the decoder
        itself, whole, and the others are blocks on top.
        """
        c = self.config
        x_BTD, rows, _, stats = self._trunk(tokens_BT, *args, **kwargs)
        hidden = [self.out(x_BTD)]
        if c.prediction_heads == 1:
            return hidden, stats
        numbers = c.num_layers + jnp.arange(c.prediction_heads - 1)
        if self.is_initializing():
            self.prediction_heads(x_BTD, rows._replace(angles=None), numbers, None)
            return hidden, stats
        kinds, params = layer_configs(c), self.variables["params"]["prediction_heads"]
        for n, (own, number) in enumerate(_unstacked((params, numbers), c.prediction_heads - 1), c.num_layers):
            y_BTD, (_, more) = _applied(kinds[n % len(kinds)], _block(c, False))(own, number, x_BTD, rows, None)
            hidden.append(self.out(y_BTD))
            stats = jax.tree.map(lambda of, one: jnp.concatenate([of, one[None]]), stats, more)
        return hidden, stats

    def out(self, x_BTD: jax.Array) -> jax.Array:
        """The stream, behind the last block, as the output table takes it."""
        c = self.config
        hidden_BTD = x_BTD if c.norm_placement == "post" else self.final_norm(x_BTD)
        if (multiplier := output_multiplier(c)) != 1:
            hidden_BTD = hidden_BTD * multiplier
        return self.embed.to_table(hidden_BTD) if c.embedding_dim and c.tied_embeddings else hidden_BTD

    def _trunk(
        self,
        tokens_BT: jax.Array,
        positions_BT: jax.Array | None = None,
        segment_ids_BT: jax.Array | None = None,
        prefix_BT: jax.Array | None = None,
        dropout_keys: Any = None,
        cache: Cache | None = None,
    ) -> tuple[jax.Array, Rows, Cache | None, RouterStats | None]:
        """(the last layer's output [B, T, D], what the blocks were told, cache, what the routers did)."""
        c = self.config
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        x_BTD = self.embed(tokens_BT, positions_BT)
        if dropout_keys is not None:
            x_BTD = primitives.dropout(x_BTD, c.embedding_dropout, primitives.fold_in(dropout_keys, 0))
        angles = angles_by_base(positions_BT, layer_configs(c))
        rows = Rows(positions_BT, angles, segment_ids_BT, prefix_BT, dropout_keys)
        if self.is_initializing():  # parameters depend on no angles
            x_BTD, (_, stats) = self.layers(x_BTD, rows._replace(angles=None), jnp.arange(c.num_layers), None)
        elif cache is not None:
            x_BTD, cache, stats = self._with_cache(x_BTD, rows, cache)
        else:
            x_BTD, stats = self._without_cache(x_BTD, rows)
        return x_BTD, rows, cache, stats

    def _with_cache(self, x_BTD: jax.Array, rows: Rows, cache: Cache) -> tuple[jax.Array, Cache, None]:
        """All layers one after the other, on the same parameters or on those that generation has prepared.

        A scan would copy each layer's kernels and cache out of the stack, and the cache back, for every token.
        """
        layers = self.variables["params"]["layers"]
        kinds = [_applied(kind, Block) for kind in layer_configs(self.config)]
        for n in range(self.config.num_layers):
            own = layers[str(n)] if str(n) in layers else jax.tree.map(lambda leaf, n=n: leaf[n], layers)
            x_BTD, (written, _) = kinds[n % len(kinds)](own, n, x_BTD, rows, cache.of_layer(n))
            cache = written.of_layer(-1)
        return x_BTD, cache, None

    def _without_cache(self, x_BTD: jax.Array, rows: Rows) -> tuple[jax.Array, RouterStats | None]:
        """All layers, as a pipeline where the mesh has stages."""
        c, params, stages = self.config, self.variables["params"]["layers"], axis_size("stage")
        layers = functools.partial(_scanned, c)
        if stages == 1:
            return layers(params, jnp.arange(c.num_layers), x_BTD, rows)
        check_stages(c, stages)
        return pipelined(layers, params, x_BTD, rows, num_micro_batches(mesh_config(), stages))

    def __call__(self, tokens_BT: jax.Array, *args: Any, **kwargs: Any) -> tuple[jax.Array, Cache | None]:
        """(logits [B, T, V] in float32, cache); arguments as `hidden`."""
        if self.is_initializing() and self.config.prediction_heads > 1:
            self.hidden_of_heads(tokens_BT)
        hidden_BTD, cache, _ = self.hidden(tokens_BT, *args, **kwargs)
        table = self.embed.tokens if self.config.tied_embeddings else self.head
        return logits(hidden_BTD, table, self.config), cache


# --- layers ------------------------------------------------------------------------------------


def _stack(config: ModelConfig, length: int, axis: str) -> nn.Module:
    """So many blocks, their parameters stacked on a leading axis of this logical name."""
    return nn.scan(
        Block,
        variable_axes={"params": 0},
        split_rngs={"params": True},
        in_axes=(nn.broadcast, 0, 0),
        out_axes=0,
        length=length,
        metadata_params={nn.PARTITION_NAME: axis},
    )(_declaring(layer_configs(config)))


def _declaring(kinds: tuple[ModelConfig, ...]) -> ModelConfig:
    """The kind of layer that declares the parameters of all: stacked, they are the same in each, used or not."""
    return next((kind for kind in kinds if kind.position == "t5"), kinds[0])


def _applied(kind: ModelConfig, block: type[Block]) -> Callable[..., tuple[jax.Array, Any]]:
    """(parameters, number, x_BTD, rows, cache) to what a block of this kind gives. `rows` has the angles of all kinds."""
    module = block(kind, parent=None)

    def apply(params: Any, number: Any, x_BTD: jax.Array, rows: Rows, cache: Cache | None) -> tuple[jax.Array, Any]:
        own = rows._replace(angles=rows.angles.get(angles_key(kind)))
        with jax.named_scope("layers"):
            applied: Any = module.apply({"params": params}, x_BTD, own, number, cache)
        return applied

    return apply


def _scanned(
    config: ModelConfig, params: Any, numbers_l: jax.Array, x_BTD: jax.Array, rows: Rows
) -> tuple[jax.Array, RouterStats | None]:
    """Consecutive layers, the first of them the first of a period: (x_BTD, what their routers did, [l, ...] each).

    A scan over groups of p layers, where layers repeat after p: those of a group are traced one by one, each of its own kind, so
    that what a window leaves out is known when tracing. What p does not divide follows by itself, for which the scanned layers
    are copied out of the stack.
    """
    kinds, length = layer_configs(config), len(numbers_l)
    groups, rest = divmod(length, len(kinds))
    unroll = -(-config.scan_unroll // len(kinds)) or groups
    # A loop keeps XLA from merging what is computed again with the first time; unrolled, or run once, it is no loop.
    is_loop = unroll == 1 and groups > 1
    in_loop = [_applied(kind, _block(config, is_loop)) for kind in kinds]

    def one(layer: Callable, x_BTD: jax.Array, own: Any) -> tuple[jax.Array, Any]:
        x_BTD, (_, stats) = layer(*own, x_BTD, rows, None)
        return x_BTD, stats

    def one_by_one(layers: list, x_BTD: jax.Array, own: Any) -> tuple[jax.Array, Any]:
        found = []
        for layer, item in zip(layers, _unstacked(own, len(layers)), strict=True):
            x_BTD, stats = one(layer, x_BTD, item)
            found.append(stats)
        return x_BTD, jax.tree.map(lambda *leaves: jnp.stack(leaves), *found)

    own = (params, numbers_l)
    if len(kinds) == 1:
        return jax.lax.scan(functools.partial(one, in_loop[0]), x_BTD, own, unroll=unroll)
    grouped = jax.tree.map(lambda leaf: leaf[: length - rest].reshape(groups, len(kinds), *leaf.shape[1:]), own)
    x_BTD, stats = jax.lax.scan(functools.partial(one_by_one, in_loop), x_BTD, grouped, unroll=unroll)
    stats = jax.tree.map(lambda leaf: leaf.reshape(-1, *leaf.shape[2:]), stats)
    if rest:
        alone = [_applied(kind, _block(config, False)) for kind in kinds[:rest]]
        x_BTD, more = one_by_one(alone, x_BTD, jax.tree.map(lambda leaf: leaf[length - rest :], own))
        stats = jax.tree.map(lambda *leaves: jnp.concatenate(leaves), stats, more)
    return x_BTD, stats


def _unstacked(tree: Any, length: int) -> list[Any]:
    """The `length` items of a tree of arrays [length, ...], whose gradients are put together again without sums."""
    leaves, structure = jax.tree.flatten(tree)
    split = [[part[0] for part in jnp.split(leaf, length)] for leaf in leaves]
    return [jax.tree.unflatten(structure, item) for item in zip(*split, strict=True)]


def _block(config: ModelConfig, in_loop: bool) -> type[Block]:
    """Block, its backward pass computing again what the config says."""
    if config.remat == "none":
        return Block
    return nn.remat(Block, policy=REMAT_POLICIES[config.remat], prevent_cse=not in_loop)


# --- logits ------------------------------------------------------------------------------------


def logits(hidden_BTD: jax.Array, table: Any, config: ModelConfig) -> jax.Array:
    """[B, T, V] in float32; `table` is the embedding [V, D] where it is tied, the head [D, V] where not, or a `LinearMap`."""
    if isinstance(table, LinearMap):
        logits_BTV = table(hidden_BTD)
    else:
        dtype = jnp.dtype(config.dtype)
        equation = "BTD,VD->BTV" if config.tied_embeddings else "BTD,DV->BTV"
        logits_BTV = jnp.einsum(equation, hidden_BTD.astype(dtype), table.astype(dtype), preferred_element_type=jnp.float32)
    return config.logit_softcap * jnp.tanh(logits_BTV / config.logit_softcap) if config.logit_softcap else logits_BTV


def output_table(params: Any, config: ModelConfig) -> Any:
    """The parameter that turns hidden vectors into logits: [V, D] where tied, [D, V] where not, or either's `LinearMap`."""
    return params["embed"]["tokens"] if config.tied_embeddings else params["head"]
