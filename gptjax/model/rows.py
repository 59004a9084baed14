"""What every block is told about its tokens, beside their vectors. Axis letters: see decoder.py."""

from __future__ import annotations

from typing import Any, NamedTuple

import jax


class Rows(NamedTuple):
    """Arrays with rows first, so that a pipeline can cut them into micro-batches."""

    positions_BT: jax.Array
    angles: Any  # of rotary positions: a layer's (cos, sin), or None; in the decoder, those of all its layers by `angles_key`
    segment_ids_BT: jax.Array | None  # tokens see only their own segment; None: one a row
    prefix_BT: jax.Array | None  # bool: tokens that all of their segment see, those before them too; None: no token is
    dropout_keys: Any  # [B, 2]; None: no dropout
