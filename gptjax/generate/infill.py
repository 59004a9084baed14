"""Prompts for models that were trained to fill in the middle (Bavarian et al., 2022, arXiv 2207.14255).

A document is shown as prefix, suffix, middle, told apart by three special tokens, and what the model continues is the middle:

    psm:  <PRE> prefix <SUF> suffix <MID>
    spm:  <PRE> <SUF> suffix <MID> prefix

The second is the paper's form for models trained on both, and that of Code Llama and StarCoder: prefix and middle are one text.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from gptjax.config import UserError
from gptjax.data.reserved import GAP_SPELLINGS, find_gap
from gptjax.data.tokenizers import Tokenizer

ORDERS = ("psm", "spm")


@dataclass(frozen=True)
class Sentinels:
    """The ids that begin the three parts; `end`, where the model has one, ends the middle beside the end of text."""

    prefix: int
    suffix: int
    middle: int
    end: int | None = None


def find_sentinels(tokenizer: Tokenizer) -> Sentinels:
    """The tokenizer's own, by their usual names. Raises `UserError` where it has none."""
    found = find_gap(tokenizer)
    if found is not None:
        return Sentinels(*found)
    tried = ", ".join(prefix for prefix, *_ in GAP_SPELLINGS)
    raise UserError(
        f"the tokenizer has no tokens for filling in (none of {tried} and their fellows), "
        "so its model was not trained to; give a model that was."
    )


def infill_prompt(
    tokenizer: Tokenizer, prefix: str, suffix: str, order: str = "psm", sentinels: Sentinels | None = None
) -> np.ndarray:
    """int32 ids of a prompt whose continuation is the text between `prefix` and `suffix`; without a begin-of-text token.

    Either may be empty. `sentinels`: None for the tokenizer's own. Raises `UserError` for another order than psm and spm, and
    where the tokenizer has no sentinels.
    """
    if order not in ORDERS:
        raise UserError(f"the infill order {order!r} is not one of {', '.join(ORDERS)}.")
    marks = sentinels or find_sentinels(tokenizer)
    before = np.asarray(tokenizer.encode(prefix) if prefix else [], np.int32)
    after = _inside(tokenizer, suffix)
    if order == "psm":
        parts = [[marks.prefix], before, [marks.suffix], after, [marks.middle]]
    else:
        parts = [[marks.prefix, marks.suffix], after, [marks.middle], before]
    return np.concatenate([np.asarray(part, np.int32) for part in parts])


def _inside(tokenizer: Tokenizer, text: str) -> np.ndarray:
    """The ids of a text that begins no document: without the space that some tokenizers put before every text."""
    if not text:
        return np.zeros(0, np.int32)
    ids = np.asarray(tokenizer.encode(text), np.int32)
    vocabulary = tokenizer.vocabulary()
    if b"".join(vocabulary[i] or b"" for i in ids) != b" " + text.encode():
        return ids
    # Behind a newline there is no such space, and few vocabularies join a newline with what follows.
    guard = np.asarray(tokenizer.encode("\n"), np.int32)
    guarded = np.asarray(tokenizer.encode("\n" + text), np.int32)
    rest = guarded[len(guard) :]
    joined = b"".join(vocabulary[i] or b"" for i in rest)
    if not np.array_equal(guarded[: len(guard)], guard) or joined != text.encode():
        raise UserError("the tokenizer puts a space before the suffix that cannot be taken off; infill does not work with it.")
    return rest
