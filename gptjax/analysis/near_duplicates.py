"""Which test texts stand in the training texts, or nearly so: exact Jaccard similarity of character shingles.

Every pair at or above the threshold is found, and none is compared that cannot reach it: two sets of which the Jaccard
similarity is at least t share one of their |x| - ceil(t |x|) + 1 rarest members (prefix filtering: S. Chaudhuri et al., ICDE
2006; R. Bayardo et al., WWW 2007). Shingles of characters suit texts without spaces as well (A. Broder, 1997). What a longer
training text merely contains is not found: Jaccard similarity is of wholes.
"""

from __future__ import annotations

import dataclasses
import re
import unicodedata
from collections.abc import Iterator, Sequence

import numpy as np

SHINGLE = 5  # characters
_MOST_CHARACTERS = 40_000_000  # of all texts together: about 2 GB while they are sorted
_MOST_PAIRS = 4_000_000  # compared at once
_MARKS = re.compile(r"[\W_]+")


@dataclasses.dataclass(frozen=True)
class Match:
    """The training text most like a test text, both by their place; the first of those as like."""

    test: int
    train: int
    similarity: float


@dataclasses.dataclass(frozen=True)
class Duplicates:
    """One match at most a test text, in order. `cut` is the number of characters that texts were cut to, 0 for none."""

    matches: list[Match]
    cut: int


def normalise(text: str) -> str:
    """What is compared: compatibility forms, case and punctuation taken away, white space single."""
    return _MARKS.sub(" ", unicodedata.normalize("NFKC", text).casefold()).strip()


def near_duplicates(test: Sequence[str], train: Sequence[str], threshold: float = 0.8) -> Duplicates:
    """Test texts with a training text of at least this similarity, 0 < threshold <= 1; texts without a letter are left out.

    Texts shorter than SHINGLE characters match only as wholes.
    """
    if not 0 < threshold <= 1:
        raise ValueError(f"threshold={threshold} must be above 0 and at most 1.")
    ours, theirs = [normalise(text) for text in test], [normalise(text) for text in train]
    cut = _cut_length([*ours, *theirs])
    if cut:
        ours, theirs = [text[:cut] for text in ours], [text[:cut] for text in theirs]
    first = {text: place for place, text in reversed(list(enumerate(theirs)))}
    whole = {place: Match(place, first[text], 1.0) for place, text in enumerate(ours) if text and text in first}
    rest: dict[str, list[int]] = {}
    for place, text in enumerate(ours):
        if place not in whole and len(text) >= SHINGLE:
            rest.setdefault(text, []).append(place)
    pool = sorted((text for text in first if len(text) >= SHINGLE), key=first.__getitem__)
    asked = list(rest)
    found = dict(whole)
    for number, other, similarity in _similar(asked, pool, threshold):
        found |= {place: Match(place, first[pool[other]], similarity) for place in rest[asked[number]]}
    return Duplicates([found[place] for place in sorted(found)], cut)


def _cut_length(texts: Sequence[str]) -> int:
    """The length to which the longest are cut, so that all together have _MOST_CHARACTERS; 0 where they have no more."""
    lengths = np.sort([len(text) for text in texts])
    if lengths.sum() <= _MOST_CHARACTERS:
        return 0
    before = np.concatenate([[0], np.cumsum(lengths)[:-1]])
    even = (_MOST_CHARACTERS - before) / np.arange(len(lengths), 0, -1)  # for each, if it and all longer ones had alike
    return max(SHINGLE, int(even[np.flatnonzero(even < lengths)[0]]))


def _similar(test: list[str], train: list[str], threshold: float) -> Iterator[tuple[int, int, float]]:
    """(test, train, similarity) of the best training text of each test text that reaches the threshold."""
    if not test or not train:
        return
    tokens, starts = _shingles([*test, *train])
    sizes = np.diff(starts)
    prefix = sizes - np.ceil(threshold * sizes - 1e-9).astype(np.int64) + 1
    place = np.arange(len(tokens)) - np.repeat(starts[:-1], sizes)
    owner = np.repeat(np.arange(len(sizes)), sizes)
    rare = place < np.repeat(prefix, sizes)
    split = starts[len(test)]
    trains = np.flatnonzero(rare[split:]) + split
    trains = trains[np.argsort(tokens[trains], kind="stable")]
    tests = np.flatnonzero(rare[:split])
    low, high = (np.searchsorted(tokens[trains], tokens[tests], side=side) for side in ("left", "right"))
    for begin, end in _chunks(owner[tests], high - low):
        many = (high - low)[begin:end]
        left = np.repeat(owner[tests[begin:end]], many)
        step = np.arange(many.sum()) - np.repeat(np.cumsum(many) - many, many)
        right = owner[trains[np.repeat(low[begin:end], many) + step]]
        close = np.minimum(sizes[left], sizes[right]) >= threshold * np.maximum(sizes[left], sizes[right]) - 1e-9
        pairs = np.unique(np.stack([left[close], right[close]], axis=1), axis=0)
        yield from _best(pairs, tokens, starts, threshold, len(test))


def _chunks(owner: np.ndarray, many: np.ndarray) -> Iterator[tuple[int, int]]:
    """Ranges of test shingles that hold whole texts and, unless one text has more, at most _MOST_PAIRS pairs."""
    ends = np.flatnonzero(np.diff(owner, append=-1)) + 1
    total = np.cumsum(many)
    begin = 0
    for end, following in zip(ends, [*ends[1:], None], strict=True):
        before = total[begin - 1] if begin else 0
        if following is None or total[following - 1] - before > _MOST_PAIRS:
            yield begin, int(end)
            begin = int(end)


def _best(
    pairs: np.ndarray, tokens: np.ndarray, starts: np.ndarray, threshold: float, tests: int
) -> Iterator[tuple[int, int, float]]:
    best: dict[int, tuple[float, int]] = {}
    for left, right in pairs.tolist():
        a, b = tokens[starts[left] : starts[left + 1]], tokens[starts[right] : starts[right + 1]]
        common = len(np.intersect1d(a, b, assume_unique=True))
        similarity = common / (len(a) + len(b) - common)
        if similarity >= threshold and similarity > best.get(left, (0.0, 0))[0]:
            best[left] = (similarity, right)
    yield from ((left, right - tests, similarity) for left, (similarity, right) in best.items())


def _shingles(texts: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """(tokens, starts [texts + 1]): each text's different shingles, the rarest of all texts first.

    A token is the rank of a shingle's 64-bit hash by how many texts have it.
    """
    lengths = np.array([len(text) for text in texts])
    codes = np.frombuffer("".join(texts).encode("utf-32-le", "surrogatepass"), np.uint32)
    hashes = np.zeros(len(codes) - SHINGLE + 1, np.uint64)
    for place in range(SHINGLE):
        hashes = hashes * np.uint64(0x9E3779B97F4A7C15) + codes[place : place + len(hashes)]
    hashes = (hashes ^ (hashes >> np.uint64(31))) * np.uint64(0xBF58476D1CE4E5B9)
    ends = np.cumsum(lengths)
    owner = np.repeat(np.arange(len(texts)), lengths)[: len(hashes)]
    inside = np.arange(len(hashes)) + SHINGLE <= ends[owner]  # none reaches into the next text
    hashes, owner = hashes[inside], owner[inside]
    order = np.lexsort((hashes, owner))
    hashes, owner = hashes[order], owner[order]
    fresh = np.concatenate([[True], (np.diff(owner) > 0) | (hashes[1:] != hashes[:-1])])
    hashes, owner = hashes[fresh], owner[fresh]
    _, inverse, counts = np.unique(hashes, return_inverse=True, return_counts=True)
    rank = np.empty(len(counts), np.int64)
    rank[np.argsort(counts, kind="stable")] = np.arange(len(counts))
    tokens = rank[inverse]
    tokens = tokens[np.lexsort((tokens, owner))]
    return tokens, np.concatenate([[0], np.cumsum(np.bincount(owner, minlength=len(texts)))])
