"""The decoder: a GPT, or a Llama, or what lies between, by `ModelConfig`.

Axis letters, here and in every file of the package:

    B batch          D model width      N query heads            L layers
    T query position F MLP width        K key and value heads    V vocabulary
    S key position   H head width       G = N // K, query heads that share a key head

Modules are pure functions of (parameters, inputs): the key/value cache goes in and comes out, dropout takes its keys as an
argument. Parameters of the L blocks are stacked on a leading axis, whether the blocks are scanned or unrolled.
"""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.config import ModelConfig
from gptjax.model import primitives
from gptjax.model.block import Block
from gptjax.model.cache import Cache
from gptjax.model.embedding import Embedding
from gptjax.model.experts import ROUTED, RouterStats
from gptjax.model.kernels import Kernel
from gptjax.model.layers import PROJECTED, Norm, parameter
from gptjax.model.parameterization import initial_std, output_multiplier
from gptjax.model.positions import rotary_angles
from gptjax.model.rows import Rows
from gptjax.parallel.pipeline import num_micro_batches, pipelined
from gptjax.parallel.sharding import axis_size, mesh_config

# What the backward pass may keep; everything else is computed again.
# "dots" keeps what projections give, by name: products inside a hand-written derivative are hidden from JAX's own policies.
REMAT_POLICIES = {
    "dots": jax.checkpoint_policies.save_only_these_names(PROJECTED, ROUTED),
    "full": jax.checkpoint_policies.save_only_these_names(ROUTED),
}


def _block(config: ModelConfig) -> type[Block]:
    """Block, its backward pass computing again what the config says."""
    if config.remat == "none":
        return Block
    # A loop keeps XLA from merging what is computed again with the first time; unrolled, or run once, it is no loop.
    is_loop = config.scan_unroll == 1 and config.num_layers > 1
    return nn.remat(Block, policy=REMAT_POLICIES[config.remat], prevent_cse=not is_loop)


class Decoder(nn.Module):
    """Token ids to logits."""

    config: ModelConfig

    def setup(self) -> None:
        c = self.config
        self.embed = Embedding(c)
        self.layers = nn.scan(
            _block(c),
            variable_axes={"params": 0, "intermediates": 0},  # the latter are there when they are asked for
            split_rngs={"params": True},
            in_axes=(nn.broadcast, 0, 0),
            out_axes=0,
            length=c.num_layers,
            unroll=c.scan_unroll or c.num_layers,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(c)
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
        """The normed output of the last block, [B, T, D], times the parameterization's output multiplier, the cache with these
        tokens written in, and what the routers of all layers did (None: no experts).

        `segment_ids_BT`: tokens see only their own segment (packed documents). `prefix_BT`, bool: tokens that all of their
        segment see; others are seen by later ones only. `dropout_keys`: one a row; None: no dropout.
        With a cache, token t stands at `positions_BT[:, t]` and sees all positions up to its own; without, it sees the row up
        to t.
        """
        c = self.config
        if positions_BT is None:
            positions_BT = jnp.broadcast_to(jnp.arange(tokens_BT.shape[1]), tokens_BT.shape)
        x_BTD = self.embed(tokens_BT, positions_BT)
        if dropout_keys is not None:
            x_BTD = primitives.dropout(x_BTD, c.embedding_dropout, primitives.fold_in(dropout_keys, 0))
        angles = rotary_angles(positions_BT, c) if c.position == "rotary" else None
        rows = Rows(positions_BT, angles, segment_ids_BT, prefix_BT, dropout_keys)
        if axis_size("stage") > 1 and cache is None and not self.is_initializing():
            x_BTD, stats = self._through_stages(x_BTD, rows)
        elif cache is not None:
            x_BTD, cache, stats = self._with_cache(x_BTD, rows, cache)
        else:
            x_BTD, (_, stats) = self.layers(x_BTD, rows, jnp.arange(c.num_layers), None)
        return self.final_norm(x_BTD) * output_multiplier(c), cache, stats

    def _with_cache(self, x_BTD: jax.Array, rows: Rows, cache: Cache) -> tuple[jax.Array, Cache, None]:
        """`self.layers` one after the other, on the same parameters or on those that generation has prepared.

        A scan would copy each layer's kernels and cache out of the stack, and the cache back, for every token.
        """
        c = self.config
        block, layers = Block(c, parent=None), self.variables["params"]["layers"]
        for n in range(c.num_layers):
            own = layers[str(n)] if str(n) in layers else jax.tree.map(lambda leaf, n=n: leaf[n], layers)
            applied: Any = block.apply({"params": own}, x_BTD, rows, n, cache.of_layer(n))
            x_BTD, (written, _) = applied
            cache = written.of_layer(-1)
        return x_BTD, cache, None

    def _through_stages(self, x_BTD: jax.Array, rows: Rows) -> tuple[jax.Array, RouterStats | None]:
        """`self.layers` as a pipeline, on the same parameters."""
        c = self.config
        block = _block(c)(c, parent=None)

        def layer(params: Any, x_bTD: jax.Array, rows: Rows, number: jax.Array) -> tuple[jax.Array, Any]:
            x_bTD, (_, stats) = block.apply({"params": params}, x_bTD, rows, number, None)
            return x_bTD, stats

        micro_batches = num_micro_batches(mesh_config(), axis_size("stage"))
        params = self.variables["params"]["layers"]
        return pipelined(layer, params, x_BTD, rows, micro_batches, c.scan_unroll or c.num_layers)

    def __call__(self, tokens_BT: jax.Array, *args: Any, **kwargs: Any) -> tuple[jax.Array, Cache | None]:
        """(logits [B, T, V] in float32, cache); arguments as `hidden`."""
        hidden_BTD, cache, _ = self.hidden(tokens_BT, *args, **kwargs)
        table = self.embed.tokens if self.config.tied_embeddings else self.head
        return logits(hidden_BTD, table, self.config), cache


def logits(hidden_BTD: jax.Array, table: Any, config: ModelConfig) -> jax.Array:
    """[B, T, V] in float32; `table` is the embedding [V, D] where it is tied, the head [D, V] where not, or either's `Kernel`."""
    if isinstance(table, Kernel):
        return table(hidden_BTD)
    dtype = jnp.dtype(config.dtype)
    equation = "BTD,VD->BTV" if config.tied_embeddings else "BTD,DV->BTV"
    return jnp.einsum(equation, hidden_BTD.astype(dtype), table.astype(dtype), preferred_element_type=jnp.float32)


def output_table(params: Any, config: ModelConfig) -> Any:
    """The parameter that turns hidden vectors into logits: [V, D] where tied, [D, V] where not, or either's `Kernel`."""
    return params["embed"]["tokens"] if config.tied_embeddings else params["head"]
