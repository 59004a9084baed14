"""One layer of the decoder. Axis letters: see decoder.py."""

from __future__ import annotations

import jax
from flax import linen as nn

from gptjax.config import ModelConfig
from gptjax.model import primitives
from gptjax.model.attention import Attention
from gptjax.model.cache import Cache
from gptjax.model.experts import ExpertMLP, RouterStats
from gptjax.model.latent import LatentAttention
from gptjax.model.layers import MLP, Norm
from gptjax.model.rows import Rows
from gptjax.parallel.sharding import constrain

ATTENTION_KINDS: dict[str, type[nn.Module]] = {"multi_head": Attention, "latent": LatentAttention}


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)), or experts in place of the mlp; parallel: both see the block's input, as in
    GPT-NeoX (Black et al., 2022).
    """

    config: ModelConfig

    @nn.compact
    def __call__(
        self, x_BTD: jax.Array, rows: Rows, layer: jax.Array, cache: Cache | None
    ) -> tuple[jax.Array, tuple[Cache | None, RouterStats | None]]:
        c = self.config
        attention_keys = residual_keys = mlp_keys = None
        if rows.dropout_keys is not None:  # 0 is the embedding's; a block has three
            sites = (primitives.fold_in(rows.dropout_keys, 3 * layer + site) for site in (1, 2, 3))
            attention_keys, residual_keys, mlp_keys = sites

        x_BTD = constrain(x_BTD, "batch", "length", None)
        y_BTD = Norm(c, name="attention_norm")(x_BTD)
        y_BTD, cache = ATTENTION_KINDS[c.attention_kind](c, name="attention")(
            y_BTD, rows._replace(dropout_keys=attention_keys), cache
        )
        input_BTD, x_BTD = x_BTD, x_BTD + primitives.dropout(y_BTD, c.residual_dropout, residual_keys)

        y_BTD, stats = Norm(c, name="mlp_norm")(input_BTD if c.block == "parallel" else x_BTD), None
        if c.num_experts:
            is_token_BT = None if rows.segment_ids_BT is None else rows.segment_ids_BT > 0
            # A token that is generated has no row to share places with, so none is dropped.
            y_BTD, stats = ExpertMLP(c, name="experts")(y_BTD, is_token_BT, may_drop=cache is None)
        else:
            y_BTD = MLP(c, name="mlp")(y_BTD)
        return x_BTD + primitives.dropout(y_BTD, c.residual_dropout, mlp_keys), (cache, stats)
