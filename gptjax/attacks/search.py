"""The searches: which changes to try next. Each is a generator that yields texts and is sent their class probabilities.

So searches know neither the model nor how its queries are batched, and many of them can share a batch (attack.py). A search ends
with the best `Tried`, which may be the unchanged text, and stops at the first change that reaches its goal.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import random
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from gptjax.attacks.lexicon import Lexicon
from gptjax.attacks.perturbations import PERTURBATIONS
from gptjax.attacks.words import Words, split

if TYPE_CHECKING:  # a recipe names searches, so recipes.py stands on this
    from gptjax.attacks.recipes import Recipe

AT_ONCE = 8  # texts that the random search asks for together
UNKNOWN = "[UNK]"  # stands in a word's place where words are ranked by an unknown one

Changes = Mapping[int, str]
Asking = Generator[list[str], np.ndarray, "Tried"]  # yields texts [n], is sent probabilities [n, classes]


@dataclasses.dataclass(frozen=True)
class Goal:
    """What an attack wants: another class than `label`, or (`target`) that class. `score` grows towards it."""

    label: int
    target: int | None = None

    def score(self, probabilities: np.ndarray) -> np.ndarray:
        """[n] from [n, classes]."""
        return 1 - probabilities[:, self.label] if self.target is None else probabilities[:, self.target]

    def reached(self, probabilities: np.ndarray) -> np.ndarray:
        """bool [n] from [n, classes]."""
        best = probabilities.argmax(axis=1)
        return best != self.label if self.target is None else best == self.target


@dataclasses.dataclass(frozen=True)
class Tried:
    """A change that was put to the model; `predicted` is its answer."""

    changes: Changes
    score: float
    reached: bool
    predicted: int


def rng_of(seed: int, *parts: str | int) -> random.Random:
    """Random numbers that depend on the seed and on these parts alone."""
    digest = hashlib.blake2b(repr((seed, *parts)).encode("utf-8", "backslashreplace"), digest_size=8).digest()
    return random.Random(int.from_bytes(digest, "big"))


class Problem:
    """One text under attack: its words, what may be tried, and the queries so far, a text at most once.

    max_queries: texts put to the model after the original; 0 is no limit.
    """

    def __init__(
        self, text: str, goal: Goal, start: np.ndarray, recipe: Recipe, seed: int, lexicon: Lexicon, max_queries: int = 0
    ):
        self.text, self.goal, self.recipe, self.lexicon = text, goal, recipe, lexicon
        self.words: Words = split(text)
        self.open = recipe.constraints.open(self.words)
        self._open = frozenset(self.open)
        self.rng = rng_of(seed, text)
        self.queries, self.max_queries = 0, max_queries
        self._known = {text: self._tried({}, start[None], 0)}
        self.start = self._known[text]

    @property
    def most(self) -> int:
        """How many words may change."""
        return self.recipe.constraints.most(self.words)

    @property
    def spent(self) -> bool:
        """No further query is allowed."""
        return bool(self.max_queries) and self.queries >= self.max_queries

    def candidates(self, changes: Changes, index: int, tries: int | None = None) -> Iterator[Changes]:
        """`changes` and one more, of the word `index`, by every perturbation; none where that word is changed already.

        `tries` of each perturbation that the constraints allow; by default, as many as the recipe says.
        """
        if index in changes:
            return
        current = [changes.get(i, word) for i, word in enumerate(self.words.words)] if changes else self.words.words
        for name in self.recipe.perturbations:
            edits = PERTURBATIONS[name](current, index, self.rng, self.lexicon)
            allowed = (merged for edit in edits if (merged := self._merged(changes, current, edit)) is not None)
            yield from itertools.islice(allowed, tries or self.recipe.tries)

    def _merged(self, changes: Changes, current: Sequence[str], edit: Changes) -> Changes | None:
        """Both together, where the constraints allow it and something changes."""
        kept = {i: word for i, word in edit.items() if word != current[i]}
        if not kept or any(i in changes or i not in self._open for i in kept):
            return None
        merged = {**changes, **kept}
        return merged if self.recipe.constraints.allow(self.words, merged) else None

    def ask(self, states: Iterable[Changes]) -> Generator[list[str], np.ndarray, list[Tried]]:
        """Puts the texts to the model that it has not seen, as far as queries last; those it has seen come back with them."""
        texts: dict[str, Changes] = {}
        new: list[str] = []
        for changes in states:
            text = self.words.replaced(changes)
            if text in texts or not text.strip():
                continue
            if text not in self._known:
                if self.max_queries and self.queries + len(new) >= self.max_queries:
                    break
                new.append(text)
            texts[text] = changes
        if new:
            self.queries += len(new)
            probabilities = yield new
            self._known |= {text: self._tried(texts[text], probabilities, i) for i, text in enumerate(new)}
        return [dataclasses.replace(self._known[text], changes=changes) for text, changes in texts.items()]

    def _tried(self, changes: Changes, probabilities: np.ndarray, row: int) -> Tried:
        one = probabilities[row : row + 1]
        return Tried(changes, float(self.goal.score(one)[0]), bool(self.goal.reached(one)[0]), int(one.argmax()))


# --- which word comes first -------------------------------------------------------------------------------------------

Ranking = Callable[[Problem], Generator[list[str], np.ndarray, list[int]]]


def _by_replacing(replacement: str) -> Ranking:
    """The words whose replacement moves the score furthest come first (Gao et al. 2018; Jin et al. 2020): a query a word."""

    def rank(problem: Problem) -> Generator[list[str], np.ndarray, list[int]]:
        if len(problem.open) < 2:
            return problem.open
        tried = yield from problem.ask([{index: replacement} for index in problem.open])
        scores = {problem.words.replaced(one.changes): one.score for one in tried}  # "ha ha" is one text without either
        order = {index: scores.get(problem.words.replaced({index: replacement}), -np.inf) for index in problem.open}
        return sorted(problem.open, key=lambda index: -order[index])  # stable: words without an answer keep their order

    return rank


def _at_random(problem: Problem) -> Generator[list[str], np.ndarray, list[int]]:
    yield from ()
    return problem.rng.sample(problem.open, len(problem.open))


RANKINGS: dict[str, Ranking] = {"deletion": _by_replacing(""), "unk": _by_replacing(UNKNOWN), "random": _at_random}


# --- searches ---------------------------------------------------------------------------------------------------------


def _best(tried: Sequence[Tried]) -> Tried:
    return max(tried, key=lambda one: (one.reached, one.score))


def greedy(problem: Problem) -> Asking:
    """Word by word, in the order of the ranking: the best of its candidates is kept where it raises the score."""
    best = problem.start
    for index in (yield from RANKINGS[problem.recipe.ranking](problem)):
        tried = yield from problem.ask(problem.candidates(best.changes, index))
        best = _best([best, *tried])
        if best.reached or problem.spent or len(best.changes) >= problem.most:
            break
    return best


def beam(problem: Problem) -> Asking:
    """All words at every step, keeping the `width` best texts (1: the greedy search of Pruthi et al. 2019)."""
    best, kept = problem.start, [problem.start]
    for _ in range(problem.most):
        pairs = [(one.changes, index) for one in kept for index in problem.open]
        problem.rng.shuffle(pairs)  # where queries run out, no end of the text is favoured
        states = itertools.chain.from_iterable(problem.candidates(changes, index) for changes, index in pairs)
        tried = yield from problem.ask(states)
        if not tried:
            break
        best = _best([best, *tried])
        kept = sorted(tried, key=lambda one: -one.score)[: problem.recipe.width]
        if best.reached or problem.spent:
            break
    return best


def random_search(problem: Problem) -> Asking:
    """`draws` texts, each with as many words changed as may be, drawn without looking at the model's answers."""
    best = problem.start
    left = problem.recipe.draws
    while left > 0 and not (best.reached or problem.spent):
        states = [draw(problem) for _ in range(min(AT_ONCE, left))]
        best = _best([best, *(yield from problem.ask(states))])
        left -= AT_ONCE
    return best


def draw(problem: Problem) -> Changes:
    """One random change of as many words as may change; {} where none can."""
    changes: Changes = {}
    for index in problem.rng.sample(problem.open, len(problem.open)):
        if len(changes) >= problem.most:
            break
        found = list(problem.candidates(changes, index, tries=1))
        changes = problem.rng.choice(found) if found else changes
    return changes


SEARCHES: dict[str, Callable[[Problem], Asking]] = {"greedy": greedy, "beam": beam, "random": random_search}
