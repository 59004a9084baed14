"""One layer of the decoder. Axis letters: see decoder.py."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn

from gptjax.config import ModelConfig
from gptjax.model import primitives
from gptjax.model.attention import Attention
from gptjax.model.cache import Cache
from gptjax.model.experts import ExpertMLP, RouterStats
from gptjax.model.forms import FORMS
from gptjax.model.latent import LatentAttention
from gptjax.model.layers import MLP, Norm, parameter
from gptjax.model.rows import Rows
from gptjax.parallel.sharding import constrain

ATTENTION_KINDS: dict[str, type[nn.Module]] = {"multi_head": Attention, "latent": LatentAttention}

BRANCHES = ("attention", "mlp")  # in the order of a form's names

# Keys of stochastic depth are folded in from here on, above all that dropout ever reaches.
_DEPTH_KEYS = 2**30


class Block(nn.Module):
    """Attention and an MLP, or experts in its place, added to the stream x: one after the other, or both on the block's input.

    `FORMS` says which norms stand before a branch, on what it gives, and on the sum. A branch's result is normed, scaled,
    dropped out, and added, in this order.
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, rows: Rows, layer: jax.Array, cache: Cache | None
    ) -> tuple[jax.Array, tuple[Cache | None, RouterStats | None]]:
        c = self.config
        form = FORMS[c.norm_placement, c.block]
        attention_keys = None
        if rows.dropout_keys is not None:
            attention_keys = primitives.fold_in(rows.dropout_keys, 3 * layer + 1)

        x_BTD = constrain(x_BTD, "batch", "length", None)
        read_BTD = self._normed(form.before[0], x_BTD)
        attention = ATTENTION_KINDS[c.attention_kind](c, name="attention")
        y_BTD, cache = attention(read_BTD, rows._replace(dropout_keys=attention_keys), cache)
        sum_BTD = self._normed(form.of_sum[0], x_BTD + self._branch(0, y_BTD, layer, rows.dropout_keys))

        if not form.shares_norm:
            read_BTD = self._normed(form.before[1], x_BTD if form.parallel else sum_BTD)
        y_BTD, stats = self._mlp(read_BTD, rows, may_drop=cache is None)
        sum_BTD = self._normed(form.of_sum[1], sum_BTD + self._branch(1, y_BTD, layer, rows.dropout_keys))
        return sum_BTD, (cache, stats)

    def _normed(self, name: str, x_BTD: jax.Array) -> jax.Array:
        return Norm(self.config, name=name)(x_BTD) if name else x_BTD

    def _mlp(self, x_BTD: jax.Array, rows: Rows, may_drop: bool) -> tuple[jax.Array, RouterStats | None]:
        """`may_drop`: a token that is generated has no row to share places with, so none is dropped."""
        if not self.config.num_experts:
            return MLP(self.config, name="mlp")(x_BTD), None
        is_token_BT = None if rows.segment_ids_BT is None else rows.segment_ids_BT > 0
        return ExpertMLP(self.config, name="experts")(x_BTD, is_token_BT, may_drop=may_drop)

    def _branch(self, number: int, y_BTD: jax.Array, layer: jax.Array, dropout_keys: Any) -> jax.Array:
        """What a branch adds to the stream, made of its result."""
        c = self.config
        y_BTD = self._normed(FORMS[c.norm_placement, c.block].after[number], y_BTD)
        scale: Any = c.residual_scale
        if c.layer_scale:
            start, name = nn.initializers.constant(c.layer_scale), f"{BRANCHES[number]}_layer_scale"
            scale = scale * parameter(self, name, start, ("embed",), (c.model_dim,), c.param_dtype).astype(jnp.float32)
        if c.layer_scale or c.residual_scale != 1:
            y_BTD = (y_BTD * scale).astype(y_BTD.dtype)
        if dropout_keys is None:
            return y_BTD
        # 0 is the embedding's, and a block has three: attention's weights, and what either branch gives.
        y_BTD = primitives.dropout(y_BTD, c.residual_dropout, primitives.fold_in(dropout_keys, 3 * layer + 2 + number))
        if not c.stochastic_depth:
            return y_BTD
        rates = [c.stochastic_depth * (above + 1) / c.num_layers for above in range(c.num_layers)]
        keys = primitives.fold_in(dropout_keys, _DEPTH_KEYS + 2 * layer + number)
        return primitives.drop_rows(y_BTD, rates, jnp.minimum(layer, c.num_layers - 1), keys)
