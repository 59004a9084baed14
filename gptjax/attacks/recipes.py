"""Attacks by name: which perturbations, which search, which constraints. Where one is the literature's, its line says whose."""

from __future__ import annotations

from dataclasses import dataclass

from gptjax.attacks.constraints import Constraints
from gptjax.attacks.perturbations import PERTURBATIONS
from gptjax.attacks.search import RANKINGS, SEARCHES
from gptjax.config import UserError
from gptjax.data.sources import nearest


@dataclass(frozen=True)
class Recipe:
    """An attack.

    search: one of SEARCHES; ranking: for "greedy", which word comes first, one of RANKINGS.
    tries: candidates of a word by each perturbation. width: texts that "beam" keeps. draws: texts that "random" tries.
    """

    perturbations: tuple[str, ...]
    constraints: Constraints = Constraints()
    search: str = "greedy"
    ranking: str = "deletion"
    tries: int = 1
    width: int = 1
    draws: int = 100

    def __post_init__(self) -> None:
        named = [("perturbations", name, list(PERTURBATIONS)) for name in self.perturbations]
        named += [("search", self.search, list(SEARCHES)), ("ranking", self.ranking, list(RANKINGS))]
        for key, name, known in named:
            if name not in known:
                raise ValueError(f"{key}={name!r} is none of {', '.join(known)}.")
        if not self.perturbations or min(self.tries, self.width, self.draws) < 1:
            raise ValueError(f"needs a perturbation, and tries, width and draws of at least 1: {self}.")

    @property
    def needs_lexicon(self) -> bool:
        return "synonym" in self.perturbations


_DEEPWORDBUG = ("swap_letters", "substitute_letter", "insert_letter", "delete_letter")
_PRUTHI = ("swap_letters", "delete_letter", "insert_letter", "keyboard")

RECIPES: dict[str, Recipe] = {
    # J. Gao, J. Lanchantin, M. L. Soffa, Y. Qi 2018: at most 30 letters in all; words ranked as TextAttack ranks them, by an
    # unknown word in their place.
    "deepwordbug": Recipe(_DEEPWORDBUG, Constraints(max_edits=30), ranking="unk"),
    # D. Pruthi, B. Dhingra, Z. C. Lipton 2019: a single word of at least 4 letters, of which the first and the last stay.
    "pruthi": Recipe(_PRUTHI, Constraints(max_words=1, min_letters=4, keep_ends=True), search="beam", tries=2),
    # After TextFooler (D. Jin, Z. Jin, J. T. Zhou, P. Szolovits 2020), with the nearest words of a lexicon and ranking by
    # deletion, but without its sentence encoder and its tagger.
    "synonyms": Recipe(("synonym",), Constraints(max_share=0.4), tries=50),
    # M. T. Ribeiro, T. Wu, C. Guestrin, S. Singh 2020, of whose invariance tests this is one.
    "contractions": Recipe(("contraction",), Constraints(skip_stop_words=False, min_letters=1), ranking="random"),
    # After VIPER (S. Eger and others 2019), with letters that look the same in place of near ones.
    "homoglyphs": Recipe(("homoglyph",), Constraints(max_share=0.2)),
    "case": Recipe(("case",), Constraints(max_share=0.2), tries=3),
    # Chinese, where a word is a character: one that looks alike, two that change places, one left out or doubled.
    "characters": Recipe(("homoglyph", "swap_words", "delete_word", "repeat_word"), Constraints(max_share=0.15)),
    # Baselines: what typing errors nobody aimed do, in one text, and in the worst of a hundred.
    "typos": Recipe(("typo",), Constraints(max_share=0.1), search="random", draws=1),
    "random_typos": Recipe(("typo",), Constraints(max_share=0.1), search="random", draws=100),
}


def find_recipe(name: str) -> Recipe:
    """Raises `UserError` where there is none of that name."""
    if name not in RECIPES:
        raise UserError(f"recipe={name!r} is none of {', '.join(RECIPES)}{nearest(name, list(RECIPES))}")
    return RECIPES[name]
