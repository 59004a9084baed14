"""The forms that a block has: which norms stand where. Read by the block and by its picture; imports no JAX."""

from __future__ import annotations

from typing import NamedTuple


class Form(NamedTuple):
    """Names of a block's norms, those of attention first and those of the MLP second; "" where there is none."""

    before: tuple[str, str] = ("", "")  # of what a branch reads
    after: tuple[str, str] = ("", "")  # of what it gives
    of_sum: tuple[str, str] = ("", "")  # of the stream once it is added
    parallel: bool = False  # both branches read the block's input

    @property
    def shares_norm(self) -> bool:
        """Whether one norm stands before both branches."""
        return self.parallel and bool(self.before[0]) and self.before[0] == self.before[1]


_OWN = ("attention_norm", "mlp_norm")
_POST = ("attention_post_norm", "mlp_post_norm")
_SHARED = ("block_norm", "block_norm")

# By (model.norm_placement, model.block).
FORMS: dict[tuple[str, str], Form] = {
    ("pre", "serial"): Form(before=_OWN),
    ("pre", "parallel"): Form(before=_OWN, parallel=True),
    ("pre", "parallel_shared"): Form(before=_SHARED, parallel=True),
    ("post", "serial"): Form(of_sum=_OWN),
    ("post", "parallel"): Form(of_sum=("", "block_norm"), parallel=True),
    ("sandwich", "serial"): Form(before=_OWN, after=_POST),
    ("sandwich", "parallel"): Form(before=_OWN, after=_POST, parallel=True),
    ("sandwich", "parallel_shared"): Form(before=_SHARED, after=_POST, parallel=True),
}
