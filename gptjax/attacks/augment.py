"""Perturbed texts to train on: what an attack's random search draws, without a model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np

from gptjax.attacks.constraints import Constraints
from gptjax.attacks.lexicon import Lexicon
from gptjax.attacks.recipes import Recipe
from gptjax.attacks.search import Goal, Problem, draw, rng_of
from gptjax.config import UserError

Label = TypeVar("Label")


def adversarial(
    text: str, seed: int, step: int, perturbation: str = "typo", words: float = 0.1, lexicon: Lexicon | None = None
) -> str:
    """The text with about this share of its words perturbed, another way at every step: a function of its arguments alone.

    perturbation: one of `PERTURBATIONS`. At least one word changes, unless none can.
    Raises `UserError` for one that needs a lexicon and has none, `ValueError` for an unknown one.
    """
    recipe = Recipe((perturbation,), Constraints(max_share=words), search="random", draws=1)
    if recipe.needs_lexicon and not lexicon:
        raise UserError(f"the perturbation {perturbation} needs a lexicon: a list of synonyms, or word vectors.")
    nothing = np.zeros(1)
    problem = Problem(text, Goal(0), nothing, recipe, rng_of(seed, "step", step).getrandbits(62), lexicon or {})
    changed = problem.words.replaced(draw(problem))
    return changed if changed.strip() else text


def copied(count: int, seed: int, share: float) -> list[int]:
    """Which of `count` examples get a perturbed copy: a `share` of them drawn by `seed`, in their order."""
    return sorted(rng_of(seed, "copies").sample(range(count), round(share * count)))


def augmented(
    texts: Sequence[str],
    labels: Sequence[Label],
    perturbation: str,
    seed: int,
    share: float,
    words: float = 0.1,
    lexicon: Lexicon | None = None,
) -> tuple[list[str], list[Label]]:
    """All texts with their labels, and after them perturbed copies of a `share` of them, drawn by `seed`, in their order.

    Raises `ValueError` for a share that is not in (0, 1], or where texts and labels are not as many.
    """
    if not 0 < share <= 1 or len(texts) != len(labels):
        raise ValueError(f"needs a share above 0 and at most 1, not {share}, and a label of each of {len(texts)} texts.")
    picks = copied(len(texts), seed, share)
    copies = [adversarial(texts[i], seed, i, perturbation, words, lexicon) for i in picks]
    return [*texts, *copies], [*labels, *(labels[i] for i in picks)]
