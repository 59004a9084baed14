"""Languages of texts, and the smallest automaton over UTF-8 bytes that accepts one.

A `Pattern` is a tree of the classes below; `compile_pattern` makes it a `ByteAutomaton`: characters to ranges of bytes, the
tree to an automaton that may be in several states at once (Thompson, 1968), that one to a deterministic one by the subset
construction (Rabin and Scott, 1959), and its equivalent states merged (Moore, 1956). Bytes that no edge tells apart share a
class, so that a table has tens of columns, not 256.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from gptjax.config import UserError

MAX_PARTS = 400_000  # states before the subset construction; {m,n} repeats its part, so a few characters can ask for millions
MAX_STATES = 20_000  # states of a byte automaton
_MAX_CODE_POINT = 0x10FFFF


# --- the tree ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Chars:
    """One character out of sorted, disjoint ranges of code points, both ends included; surrogates are not characters."""

    ranges: tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class Sequence:
    """The parts one after the other; none: the empty text."""

    parts: tuple[Pattern, ...]


@dataclass(frozen=True)
class Choice:
    """Any one of the options."""

    options: tuple[Pattern, ...]


@dataclass(frozen=True)
class Repeat:
    """`low` to `high` times the part; None: without end."""

    part: Pattern
    low: int
    high: int | None


@dataclass(frozen=True)
class Separated:
    """One or more times the part, with separators between. The part is in the automaton once, where a `Repeat` would have two."""

    part: Pattern
    separator: Pattern


@dataclass(frozen=True)
class Listing:
    """The parts in their order with separators between, each with whether it must be there; the others may be left out."""

    parts: tuple[tuple[Pattern, bool], ...]
    separator: Pattern


@dataclass(frozen=True)
class Compiled:
    """A language that is an automaton already."""

    automaton: ByteAutomaton


Pattern = Chars | Sequence | Choice | Repeat | Separated | Listing | Compiled


def literal(text: str) -> Pattern:
    """That text and no other. Raises `UserError` for a lone surrogate, which UTF-8 cannot write."""
    for character in text:
        if 0xD800 <= ord(character) <= 0xDFFF:
            raise UserError(f"the text {text!r} holds the lone surrogate U+{ord(character):04X}, which is no character.")
    return Sequence(tuple(Chars(((ord(character), ord(character)),)) for character in text))


def union(ranges: list[tuple[int, int]]) -> tuple[tuple[int, int], ...]:
    """The ranges sorted, with those that touch joined."""
    joined: list[tuple[int, int]] = []
    for low, high in sorted(ranges):
        if joined and low <= joined[-1][1] + 1:
            joined[-1] = (joined[-1][0], max(joined[-1][1], high))
        else:
            joined.append((low, high))
    return tuple(joined)


def complement(ranges: tuple[tuple[int, int], ...], last: int = _MAX_CODE_POINT) -> tuple[tuple[int, int], ...]:
    """The code points up to `last` that are in none of the sorted, disjoint ranges."""
    found, begin = [], 0
    for low, high in ranges:
        if low > begin:
            found.append((begin, min(low - 1, last)))
        begin = high + 1
    return tuple((low, high) for low, high in [*found, (begin, last)] if low <= high)


# --- characters to bytes ----------------------------------------------------------------------------------------------

_Bytes = tuple[tuple[int, int], ...]  # one range for each byte of a character
# Code points of one length in UTF-8, without the surrogates.
_LENGTHS = ((0, 0x7F), (0x80, 0x7FF), (0x800, 0xD7FF), (0xE000, 0xFFFF), (0x10000, _MAX_CODE_POINT))


def utf8_ranges(low: int, high: int) -> Iterator[_Bytes]:
    """The encodings of the code points `low` to `high`, as sequences of ranges of bytes; disjoint."""
    for first, last in _LENGTHS:
        begin, end = max(low, first), min(high, last)
        if begin <= end:
            yield from _split(chr(begin).encode(), chr(end).encode())


def _split(low: bytes, high: bytes) -> Iterator[_Bytes]:
    """The byte strings of one length from `low` to `high`, whose bytes after the first run over 80 to BF."""
    rest = len(low) - 1
    if rest == 0 or low[0] == high[0]:
        tails = _split(low[1:], high[1:]) if rest else [()]
        yield from (((low[0], high[0]), *tail) for tail in tails)
        return
    begin, end = low[0], high[0]
    if any(byte != 0x80 for byte in low[1:]):
        yield from (((begin, begin), *tail) for tail in _split(low[1:], b"\xbf" * rest))
        begin += 1
    if any(byte != 0xBF for byte in high[1:]):
        yield from (((end, end), *tail) for tail in _split(b"\x80" * rest, high[1:]))
        end -= 1
    if begin <= end:
        yield ((begin, end), *(((0x80, 0xBF),) * rest))


# --- the tree to an automaton that may be in several states -----------------------------------------------------------


class _Parts:
    """States with edges over ranges of bytes, and free ones.

    `add` makes a pattern's states behind `start` and gives the state where it ends. It puts no edge into `start`, which may
    therefore begin several patterns.
    """

    def __init__(self) -> None:
        self.free: list[list[int]] = []
        self.edges: list[list[tuple[int, int, int]]] = []  # (lowest byte, highest byte, state)

    def new(self, *sources: int) -> int:
        """A state with free edges from `sources`."""
        if len(self.free) >= MAX_PARTS:
            raise UserError(f"the pattern has more than {MAX_PARTS} parts once its repetitions are written out; ask for fewer.")
        self.free.append([])
        self.edges.append([])
        for source in sources:
            self.free[source].append(len(self.free) - 1)
        return len(self.free) - 1

    def add(self, pattern: Pattern, start: int) -> int:
        match pattern:
            case Chars():
                return self._chars(pattern, start)
            case Sequence():
                return functools.reduce(lambda state, part: self.add(part, state), pattern.parts, start)
            case Choice():
                return self.new(*[self.add(option, self.new(start)) for option in pattern.options])
            case Repeat():
                return self._repeat(pattern, start)
            case Separated():
                begin = self.new(start)
                end = self.add(pattern.part, begin)
                self.free[self.add(pattern.separator, end)].append(begin)
                return self.new(end)
            case Listing():
                return self._listing(pattern, start)
            case Compiled():
                return self._compiled(pattern.automaton, start)

    def _chars(self, pattern: Chars, start: int) -> int:
        end = self.new()
        states: dict[_Bytes, int] = {(): end}  # what is left of a character, to the state before it

        def before(tail: _Bytes) -> int:
            if tail not in states:
                states[tail] = self.new()
                self.edges[states[tail]].append((*tail[0], before(tail[1:])))
            return states[tail]

        for low, high in pattern.ranges:
            for sequence in utf8_ranges(low, high):
                self.edges[start].append((*sequence[0], before(sequence[1:])))
        return end

    def _repeat(self, pattern: Repeat, start: int) -> int:
        for _ in range(pattern.low):
            start = self.add(pattern.part, start)
        if pattern.high is None:
            hub = self.new(start)
            self.free[self.add(pattern.part, hub)].append(hub)
            return self.new(hub)
        ends = [start]
        for _ in range(pattern.high - pattern.low):
            ends.append(self.add(pattern.part, ends[-1]))
        return self.new(*ends)

    def _listing(self, pattern: Listing, start: int) -> int:
        nothing: int | None = start  # the state where no part is written yet; None where one must have been
        something: int | None = None
        for part, required in pattern.parts:
            begin = self.new() if nothing is None else self.new(nothing)
            if something is not None:
                self.free[self.add(pattern.separator, something)].append(begin)
            end = self.add(part, begin)
            left_out = [] if required or something is None else [something]
            something = self.new(end, *left_out)
            nothing = None if required else nothing
        return self.new(*[state for state in (nothing, something) if state is not None])

    def _compiled(self, automaton: ByteAutomaton, start: int) -> int:
        states = [self.new() for _ in range(automaton.num_states)]
        self.free[start].append(states[0])
        for byte, column in enumerate(automaton.next_state[:, automaton.classes].T.tolist()):
            for state, target in enumerate(column):
                if target >= 0:
                    self.edges[states[state]].append((byte, byte, states[target]))
        return self.new(*[states[i] for i in np.flatnonzero(automaton.accepting)])


# --- the automaton ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class ByteAutomaton:
    """Accepts whole texts, as UTF-8 bytes. It begins in state 0, and every state can still reach an accepting one."""

    classes: np.ndarray  # [256] int: byte to its column
    next_state: np.ndarray  # [states, classes] int32, -1 where nothing can follow
    accepting: np.ndarray  # [states] bool

    @property
    def num_states(self) -> int:
        return len(self.accepting)

    def accepts(self, text: bytes) -> bool:
        """Whether the whole text is in the language."""
        state = 0
        for byte in text:
            state = int(self.next_state[state, self.classes[byte]])
            if state < 0:
                return False
        return bool(self.accepting[state])


def compile_pattern(pattern: Pattern) -> ByteAutomaton:
    """The smallest automaton of the pattern. Raises `UserError` where it is too large, or no text matches."""
    parts = _Parts()
    start = parts.new()
    end = parts.add(pattern, start)
    classes = _byte_classes(parts)
    next_state, accepting = _determinise(parts, start, end, classes)
    return minimised(classes, next_state, accepting)


def intersection(left: ByteAutomaton, right: ByteAutomaton) -> ByteAutomaton:
    """The texts that both accept. Raises `UserError` as `compile_pattern` does."""
    pairs, columns = np.unique(np.stack([left.classes, right.classes]), axis=1, return_inverse=True)
    known = {(0, 0): 0}
    waiting = [(0, 0)]
    rows = []
    for a, b in waiting:
        row = []
        for x, y in zip(left.next_state[a, pairs[0]].tolist(), right.next_state[b, pairs[1]].tolist(), strict=True):
            if x >= 0 and y >= 0 and (x, y) not in known:
                _check_states(len(known))
                known[x, y] = len(known)
                waiting.append((x, y))
            row.append(known[x, y] if x >= 0 and y >= 0 else -1)
        rows.append(row)
    both = np.array([left.accepting[a] and right.accepting[b] for a, b in waiting])
    return minimised(columns.reshape(-1), np.array(rows, np.int32), both)


def _check_states(count: int) -> None:
    if count >= MAX_STATES:
        raise UserError(f"the pattern needs more than {MAX_STATES} states; bound its repetitions by smaller numbers.")


def _byte_classes(parts: _Parts) -> np.ndarray:
    """[256] int: bytes that no edge tells apart have one number."""
    cuts = np.zeros(257, int)
    for edges in parts.edges:
        for low, high, _ in edges:
            cuts[low] = cuts[high + 1] = 1
    cuts[0] = 0
    return np.cumsum(cuts[:256])


def _determinise(parts: _Parts, start: int, end: int, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(next_state [states, classes] with -1 for nothing, accepting): the sets of states that can be reached, from the start's."""
    edges = [[(int(classes[low]), int(classes[high]), target) for low, high, target in edges] for edges in parts.edges]

    @functools.cache
    def closure(state: int) -> frozenset[int]:
        """The states that free edges lead to and that have other edges, or are the end."""
        seen, waiting = {state}, [state]
        while waiting:
            for target in parts.free[waiting.pop()]:
                if target not in seen:
                    seen.add(target)
                    waiting.append(target)
        return frozenset(state for state in seen if edges[state] or state == end)

    known = {closure(start): 0}
    waiting = [closure(start)]
    rows = []
    for here in waiting:
        moves: list[set[int] | frozenset[int]] = [frozenset()] * (int(classes[-1]) + 1)
        for state in here:
            for low, high, target in edges[state]:
                for column in range(low, high + 1):
                    moves[column] = moves[column] | closure(target) if moves[column] else closure(target)
        row = []
        for move in map(frozenset, moves):
            if move and move not in known:
                _check_states(len(known))
                known[move] = len(known)
                waiting.append(move)
            row.append(known[move] if move else -1)
        rows.append(row)
    return np.array(rows, np.int32), np.array([end in here for here in waiting])


def minimised(classes: np.ndarray, next_state: np.ndarray, accepting: np.ndarray) -> ByteAutomaton:
    """The smallest automaton with the same texts. Raises `UserError` where there is none."""
    dead = len(accepting)
    table = np.where(next_state < 0, dead, next_state)
    table = np.concatenate([table, np.full((1, table.shape[1]), dead)])
    blocks = _equivalent(table, np.append(accepting, False))
    if blocks[0] == blocks[dead]:
        raise UserError("no text matches the pattern.")
    # One state for each block, in the order in which they are first reached.
    _, member = np.unique(blocks, return_index=True)
    nowhere, begin = int(blocks[dead]), int(blocks[0])
    number = {begin: 0}
    waiting = [begin]
    rows = []
    for block in waiting:
        targets = blocks[table[member[block]]].tolist()
        for target in targets:
            if target != nowhere and target not in number:
                number[target] = len(number)
                waiting.append(target)
        rows.append([number.get(target, -1) for target in targets])
    small = np.array(rows, np.int32)
    columns, inverse = np.unique(small, axis=1, return_inverse=True)
    return ByteAutomaton(inverse.reshape(-1)[classes], columns, np.append(accepting, False)[member[waiting]])


def _equivalent(table: np.ndarray, accepting: np.ndarray) -> np.ndarray:
    """[states] int: equal for states from which the same texts are accepted (Moore, 1956).

    States are told apart by a 64-bit hash of where their edges go, round by round. The hash can only fail to tell states apart,
    and the last check sees that. A chain of n states would take n rounds, so the lengths of the shortest and the longest text
    that is accepted from a state tell most of them apart beforehand.
    """
    numbers = np.random.default_rng(0)
    sources, targets = edges_of(table)
    lengths = np.stack([distances(sources, targets, accepting), _longest(sources, targets, accepting)])
    blocks = np.unique(lengths, axis=1, return_inverse=True)[1].reshape(-1)
    while True:
        weights = numbers.integers(1, 2**63, table.shape[1] + 1, np.uint64) | np.uint64(1)
        values = numbers.integers(0, 2**63, int(blocks.max()) + 1, np.uint64)
        hashes = values[blocks] * weights[-1] + (values[blocks[table]] * weights[:-1]).sum(1, dtype=np.uint64)
        _, first, finer = np.unique(hashes, return_index=True, return_inverse=True)
        if len(first) == blocks.max() + 1:
            if (blocks[table] == blocks[table[first[finer]]]).all() and (accepting == accepting[first[finer]]).all():
                return finer
        else:
            blocks = finer


def edges_of(table: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(sources, targets) of a table [states, columns] of next states, each pair once; -1 is no edge."""
    rows = [np.unique(row) for row in table]
    sources = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
    targets = np.concatenate([*rows, np.zeros(0, table.dtype)])
    return sources[targets >= 0], targets[targets >= 0]


def _into(sources: np.ndarray, targets: np.ndarray, states: int) -> list[list[int]]:
    """The sources of the edges into each state."""
    order = np.argsort(targets, kind="stable")
    cuts = np.searchsorted(targets[order], np.arange(1, states))
    return [part.tolist() for part in np.split(sources[order], cuts)]


def distances(sources: np.ndarray, targets: np.ndarray, accepting: np.ndarray) -> np.ndarray:
    """[states] int32: the fewest edges to an accepting state; FAR where none can be reached."""
    into = _into(sources, targets, len(accepting))
    found = np.where(accepting, 0, FAR).tolist()
    waiting = np.flatnonzero(accepting).tolist()
    for state in waiting:
        for source in into[state]:
            if found[source] == FAR:
                found[source] = found[state] + 1
                waiting.append(source)
    return np.array(found, np.int32)


FAR = np.iinfo(np.int32).max


def _longest(sources: np.ndarray, targets: np.ndarray, accepting: np.ndarray) -> np.ndarray:
    """[states] int32: the most edges to an accepting state; FAR where a circle is on the way, -1 where none can be reached."""
    able = distances(sources, targets, accepting) < FAR
    live = able[sources] & able[targets]
    sources, targets = sources[live], targets[live]
    into = _into(sources, targets, len(accepting))
    left = np.bincount(sources, minlength=len(accepting)).tolist()
    found = [0 if right else -1 for right in able]
    waiting = [state for state, count in enumerate(left) if count == 0]
    for state in waiting:
        for source in into[state]:
            found[source] = max(found[source], found[state] + 1)
            left[source] -= 1
            if left[source] == 0:
                waiting.append(source)
    return np.where(np.array(left) > 0, FAR, found).astype(np.int32)
