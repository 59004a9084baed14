"""Perturbed texts to train on: what an attack's random search draws, without a model."""

from __future__ import annotations

import numpy as np

from gptjax.attacks.constraints import Constraints
from gptjax.attacks.lexicon import Lexicon
from gptjax.attacks.recipes import Recipe
from gptjax.attacks.search import Goal, Problem, draw, rng_of
from gptjax.config import UserError


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
