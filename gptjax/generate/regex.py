"""Regular expressions as patterns.

What may be written, with the meaning that Python's `re.fullmatch` gives it under `re.ASCII`:

- characters, each for itself, and `\\` before punctuation; `\\n \\r \\t \\f \\v \\a \\xHH \\uHHHH \\UHHHHHHHH`
- `.`: any character but a newline; `\\d \\w \\s` (ASCII), `\\D \\W \\S` (every other character of Unicode)
- classes `[a-z_]` and `[^...]`, over all of Unicode, with the escapes above
- groups `(...)` and `(?:...)`, alternatives with `|`
- `* + ? {m} {m,} {,n} {m,n}`; a `?` behind one, which asks for the shortest match, changes nothing for whole matches
- `^` and `$` at the ends of the expression or of its outermost alternatives

All else is refused, naming the position: back-references, look-around, named groups, flags, `\\b`, possessive repetition.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import NoReturn

from gptjax.config import UserError
from gptjax.generate.patterns import Chars, Choice, Pattern, Repeat, Sequence, complement, union

_Ranges = tuple[tuple[int, int], ...]

_DIGITS: _Ranges = ((ord("0"), ord("9")),)
_WORD: _Ranges = ((ord("0"), ord("9")), (ord("A"), ord("Z")), (ord("_"), ord("_")), (ord("a"), ord("z")))
_SPACES: _Ranges = ((9, 13), (32, 32))
_SETS = {"d": _DIGITS, "w": _WORD, "s": _SPACES}
_CONTROLS = {"n": 10, "r": 13, "t": 9, "f": 12, "v": 11, "a": 7}
_HEX_DIGITS = {"x": 2, "u": 4, "U": 8}
_QUANTIFIER = re.compile(r"[*+?]|\{(\d+)(,(\d*))?\}|\{,(\d+)\}")
_LIMITS = {"*": (0, None), "+": (1, None), "?": (0, 1)}
_NEWLINE: _Ranges = ((10, 10),)
# What some dialect takes for the end of a line.
_LINE_ENDS: _Ranges = ((10, 10), (13, 13), (0x2028, 0x2029))
_DEEPEST = 100
ANY = Chars(complement(()))


@dataclass(frozen=True)
class Branch:
    """One of the outermost alternatives of an expression."""

    pattern: Pattern
    begins: bool  # with ^
    ends: bool  # with $


def parse_regex(expression: str) -> Pattern:
    """The texts that the whole expression matches. Raises `UserError` naming the position of what is not supported."""
    branches = _Parser(expression).expression()
    return branches[0].pattern if len(branches) == 1 else Choice(tuple(branch.pattern for branch in branches))


def parse_search(expression: str) -> Pattern:
    """The texts in which the expression is found anywhere, as JSON Schema's `pattern` has it.

    Dialects differ in what `.`, and `\\d \\w \\s` outside printable ASCII, are. What all of them allow is taken: no character
    that ends a line in any of them, and by way of a negation of `\\d \\w \\s` no character that is not printable ASCII.
    """
    anything = Repeat(ANY, 0, None)
    options = []
    for branch in _Parser(expression, portable=True).expression():
        before = () if branch.begins else (anything,)
        options.append(Sequence((*before, branch.pattern, *(() if branch.ends else (anything,)))))
    return Choice(tuple(options))


@dataclass
class _Parser:
    text: str
    portable: bool = False
    at: int = 0
    depth: int = 0

    def expression(self) -> list[Branch]:
        branches = []
        while True:
            begins = self._take("^")
            parts = self._parts()
            ends = self._take("$")
            branches.append(Branch(Sequence(parts), begins, ends))
            if self._take("|"):
                continue
            if self.at < len(self.text):
                self.at -= ends
                self._refuse(self._unexpected())
            return branches

    def _unexpected(self) -> str:
        if self.text[self.at] == ")":
            return "')' closes no group; write \\) for the character"
        return f"{self.text[self.at]!r} stands elsewhere than at the ends of the expression or of its outermost alternatives"

    def _refuse(self, reason: str, at: int | None = None) -> NoReturn:
        raise UserError(f"the regular expression {self.text!r}, position {self.at if at is None else at}: {reason}.")

    def _take(self, token: str) -> bool:
        if not self.text.startswith(token, self.at):
            return False
        self.at += len(token)
        return True

    def _parts(self) -> tuple[Pattern, ...]:
        """What stands one after the other, up to an alternative, an anchor or the end of the group."""
        parts = []
        while self.at < len(self.text) and self.text[self.at] not in "|)$^":
            parts.append(self._repeated())
        return tuple(parts)

    def _repeated(self) -> Pattern:
        part = self._atom()
        begin = self.at
        found = _QUANTIFIER.match(self.text, self.at)
        if not found:
            return part
        self.at = found.end()
        self._take("?")
        if self.at < len(self.text) and self.text[self.at] in "*+?{":
            self._refuse(f"{self.text[self.at]!r} repeats a repetition; put the first in (?:...)")
        exact, comma, most, at_most = found.groups()
        if found[0] in _LIMITS:
            low, high = _LIMITS[found[0]]
        elif at_most is not None:
            low, high = 0, int(at_most)
        else:
            low = int(exact)
            high = low if comma is None else int(most) if most else None
        if high is not None and high < low:
            self._refuse(f"the repetition {found[0]} ends below where it begins", begin)
        return Repeat(part, low, high)

    def _atom(self) -> Pattern:
        begin, character = self.at, self.text[self.at]
        self.at += 1
        if character == "(":
            return self._group(begin)
        if character == "[":
            return self._class(begin)
        if character == ".":
            return Chars(complement(_LINE_ENDS if self.portable else _NEWLINE))
        if character == "\\":
            found = self._escape(begin)
            return Chars(((found, found),)) if isinstance(found, int) else Chars(found)
        if character in "*+?":
            self._refuse(f"there is nothing for {character!r} to repeat; write \\{character} for the character", begin)
        if character == "{":
            self._refuse("'{' begins no repetition here; write \\{ for the character", begin)
        return Chars(((self._code(character, begin),) * 2,))

    def _code(self, character: str, begin: int) -> int:
        if 0xD800 <= ord(character) <= 0xDFFF:
            self._refuse(f"U+{ord(character):04X} is a surrogate, not a character; write the character itself", begin)
        return ord(character)

    def _group(self, begin: int) -> Pattern:
        if not self._take("?:") and self.text.startswith("?", self.at):
            self._refuse("of the groups that begin with '(?' only (?:...) is supported, no look-around, names or flags", begin)
        self.depth += 1
        if self.depth > _DEEPEST:
            self._refuse(f"groups are nested more than {_DEEPEST} deep", begin)
        options = [Sequence(self._parts())]
        while self._take("|"):
            options.append(Sequence(self._parts()))
        if not self._take(")"):
            if self.at < len(self.text):
                self._refuse(self._unexpected())
            self._refuse("this group is not closed", begin)
        self.depth -= 1
        return options[0] if len(options) == 1 else Choice(tuple(options))

    def _escape(self, begin: int, in_class: bool = False) -> int | _Ranges:
        """What stands behind a backslash: a code point, or the ranges of a set."""
        if self.at == len(self.text):
            self._refuse("the expression ends in a backslash; write \\\\ for the character", begin)
        letter = self.text[self.at]
        self.at += 1
        if letter.lower() in _SETS:
            ranges = _SETS[letter.lower()]
            return ranges if letter.islower() else self._without(ranges)
        if letter in _CONTROLS:
            return _CONTROLS[letter]
        if letter in _HEX_DIGITS:
            return self._hexadecimal(letter, begin)
        if letter == "b" and in_class:
            return 8
        if letter.isascii() and letter.isalnum():
            kind = "back-references are" if letter.isdigit() else "the escape is"
            self._refuse(f"\\{letter}: {kind} not supported", begin)
        return self._code(letter, begin)

    def _hexadecimal(self, letter: str, begin: int) -> int:
        digits = self.text[self.at : self.at + _HEX_DIGITS[letter]]
        if not re.fullmatch(f"[0-9A-Fa-f]{{{_HEX_DIGITS[letter]}}}", digits):
            self._refuse(f"\\{letter} wants {_HEX_DIGITS[letter]} hexadecimal digits", begin)
        self.at += len(digits)
        code = int(digits, 16)
        if code > 0x10FFFF:
            self._refuse(f"\\{letter}{digits} is beyond U+10FFFF", begin)
        return self._code(chr(code), begin)

    def _class(self, begin: int) -> Pattern:
        negated = self._take("^")
        ranges: list[tuple[int, int]] = []
        has_set = False
        first = True
        while first or not self._take("]"):
            first = False
            low = self._member(begin)
            if not isinstance(low, int):
                ranges += low
                has_set = True
            elif self.text.startswith("-", self.at) and not self.text.startswith("-]", self.at):
                at = self.at
                self.at += 1
                high = self._member(begin)
                if not isinstance(high, int) or high < low:
                    self._refuse("the range ends below where it begins, or in a set", at)
                ranges.append((low, high))
            else:
                ranges.append((low, low))
        found = union(ranges)
        if negated:
            return Chars(self._without(found) if has_set else complement(found))
        return Chars(found)

    def _without(self, ranges: _Ranges) -> _Ranges:
        """The characters that are not in ranges with a set among them."""
        return complement(union([*ranges, (0, 0x1F)]), 0x7E) if self.portable else complement(ranges)

    def _member(self, begin: int) -> int | _Ranges:
        """A character or a set of a class."""
        if self.at == len(self.text):
            self._refuse("this class is not closed", begin)
        at = self.at
        self.at += 1
        return self._escape(at, in_class=True) if self.text[at] == "\\" else self._code(self.text[at], at)
