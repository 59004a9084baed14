"""What may come next, by a state of each row's own: the protocol that grammars and stop strings are written to."""

from __future__ import annotations

from typing import Any, Protocol

import jax

from gptjax.generate.processors import History


class Guide(Protocol):
    """Follows every row of a request, as a pytree that decoding carries in its loop.

    Its arrays hold the rows' states and whatever tables these run through; whatever is no array is fixed for a compilation.
    Guides come before all processors, in the order in which they are given.
    """

    def allowed(self, logits_BV: jax.Array, history: History, left_B: jax.Array) -> jax.Array:
        """The logits, -inf on what may not come next; a row may still draw `left_B` tokens, this one included."""
        ...

    def advanced(self, tokens_B: jax.Array, alive_B: jax.Array) -> Any:
        """The guide after these tokens; rows where `alive_B` is False drew none. Same structure, shapes and types as before."""
        ...

    def stopped(self) -> jax.Array:
        """[B] bool: rows whose text ends here, with the token that came last."""
        ...
