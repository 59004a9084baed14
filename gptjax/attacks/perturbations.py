"""The table of perturbations: how one word, with its neighbours, may be changed."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence

from gptjax.attacks import letters
from gptjax.attacks.lexicon import Lexicon

Edit = Mapping[int, str]  # what some words become; "" takes a word out
Perturbation = Callable[[Sequence[str], int, random.Random, Lexicon], Iterator[Edit]]

_WITH_NOT = "do does did is are was were have has had could would should must need"
_SHORT = {"are": ("'re", "you we they"), "have": ("'ve", "i you we they"), "will": ("'ll", "i you he she it we they")}
EXPANSIONS = {
    **{f"{word}n't": f"{word} not" for word in _WITH_NOT.split()},
    **{f"{word}{short}": f"{word} {verb}" for verb, (short, words) in _SHORT.items() for word in words.split()},
    **{"can't": "can not", "won't": "will not", "i'm": "i am", "let's": "let us", "it's": "it is", "that's": "that is"},
}
CONTRACTIONS = {expansion: contraction for contraction, expansion in EXPANSIONS.items()}


def _of_letters(change: Callable[[str, random.Random], Iterator[str]]) -> Perturbation:
    """A change of the word's letters as a perturbation."""

    def perturb(words: Sequence[str], index: int, rng: random.Random, lexicon: Lexicon) -> Iterator[Edit]:
        return ({index: changed} for changed in change(words[index], rng))

    return perturb


def _typo(words: Sequence[str], index: int, rng: random.Random, lexicon: Lexicon) -> Iterator[Edit]:
    """A slip of the fingers: letters swapped, left out, doubled by another, or a neighbouring key."""
    kinds = [letters.swap_letters, letters.delete_letter, letters.insert_letter, letters.keyboard_slip]
    slips = [kind(words[index], rng) for kind in kinds]
    while slips:
        slip = rng.choice(slips)
        changed = next(slip, None)
        if changed is None:
            slips.remove(slip)
        else:
            yield {index: changed}


def _delete_word(words: Sequence[str], index: int, rng: random.Random, lexicon: Lexicon) -> Iterator[Edit]:
    yield {index: ""}


def _swap_words(words: Sequence[str], index: int, rng: random.Random, lexicon: Lexicon) -> Iterator[Edit]:
    if index + 1 < len(words):
        yield {index: words[index + 1], index + 1: words[index]}


def _repeat_word(words: Sequence[str], index: int, rng: random.Random, lexicon: Lexicon) -> Iterator[Edit]:
    word = words[index]
    yield {index: f"{word} {word}" if word.isascii() or len(word) > 1 else word * 2}


def _synonym(words: Sequence[str], index: int, rng: random.Random, lexicon: Lexicon) -> Iterator[Edit]:
    """What the lexicon gives, the nearest first, in the word's case."""
    for other in lexicon.get(words[index].lower(), ()):
        yield {index: in_case_of(other, words[index])}


def _case(words: Sequence[str], index: int, rng: random.Random, lexicon: Lexicon) -> Iterator[Edit]:
    word = words[index]
    others = [other for other in (word.upper(), word.lower(), word.capitalize(), word.swapcase()) if other != word]
    return ({index: other} for other in rng.sample(list(dict.fromkeys(others)), len(set(others))))


def _contraction(words: Sequence[str], index: int, rng: random.Random, lexicon: Lexicon) -> Iterator[Edit]:
    """do not to don't and back, in English."""
    word = words[index].replace("\u2019", "'")
    if word.lower() in EXPANSIONS:
        yield {index: in_case_of(EXPANSIONS[word.lower()], word)}
    pair = " ".join(words[index : index + 2]).lower()
    if pair in CONTRACTIONS:
        yield {index: in_case_of(CONTRACTIONS[pair], word), index + 1: ""}


def in_case_of(word: str, model: str) -> str:
    """`word` in capitals, or with a capital, where `model` is."""
    if model.isupper() and len(model) > 1:
        return word.upper()
    return word[:1].upper() + word[1:] if model[:1].isupper() else word


PERTURBATIONS: dict[str, Perturbation] = {
    "swap_letters": _of_letters(letters.swap_letters),
    "delete_letter": _of_letters(letters.delete_letter),
    "insert_letter": _of_letters(letters.insert_letter),
    "substitute_letter": _of_letters(letters.substitute_letter),
    "keyboard": _of_letters(letters.keyboard_slip),
    "homoglyph": _of_letters(letters.homoglyph),
    "typo": _typo,
    "delete_word": _delete_word,
    "swap_words": _swap_words,
    "repeat_word": _repeat_word,
    "synonym": _synonym,
    "case": _case,
    "contraction": _contraction,
}
