"""Tags of words and the entities that they stand for, in the schemes BIO, IOB1 and IOBES (Ramshaw and Marcus, 1995)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

PREFIXES = {"BIO": "BI", "IOB1": "IB", "IOBES": "BIES"}
Entity = tuple[str, int, int]  # type, first word, last word


def entities(tags: Sequence[str]) -> list[Entity]:
    """The entities of any of the schemes, well formed or not, as seqeval's default and conlleval find them: one begins at B, S,
    at an I or E behind O, or where the type changes; one ends at E, S, or before what begins another.
    """
    found: list[Entity] = []
    begin, last = -1, ("O", "")
    for place, tag in enumerate([*tags, "O"]):
        prefix, _, kind = tag.partition("-")
        if last[0] != "O" and (last[0] in "ES" or prefix in "BSO" or kind != last[1]):
            found.append((last[1], begin, place - 1))
            begin = -1
        if prefix != "O" and begin < 0:
            begin = place
        last = prefix, kind
    return found


def written(found: Iterable[Entity], length: int, scheme: str) -> list[str]:
    """The tags of `length` words with these entities."""
    tags, ends = ["O"] * length, dict[int, str]()
    for kind, first, last in sorted(found, key=lambda entity: entity[1]):
        for place in range(first, last + 1):
            tags[place] = f"{_prefix(scheme, place == first, place == last, ends.get(first - 1) == kind)}-{kind}"
        ends[last] = kind
    return tags


def _prefix(scheme: str, first: bool, last: bool, behind_alike: bool) -> str:
    if scheme == "IOBES":
        return "S" if first and last else "B" if first else "E" if last else "I"
    return "B" if first and (scheme == "BIO" or behind_alike) else "I"


def converted(tags: Sequence[str], scheme: str) -> list[str]:
    """The tags of the same entities in `scheme`."""
    return written(entities(tags), len(tags), scheme)


def unknown_tag(tags: Sequence[str], scheme: str) -> str:
    """Which tag is none of the scheme's, to go on from its place; "" where there is none."""
    for place, tag in enumerate(tags):
        prefix, _, kind = tag.partition("-")
        if tag != "O" and not (kind and len(prefix) == 1 and prefix in PREFIXES[scheme]):
            known = ", ".join(f"{prefix}-TYPE" for prefix in PREFIXES[scheme])
            return f"has the tag {tag!r} at word {place + 1}, where {scheme} has O, {known}"
    return ""


def fault(tags: Sequence[str], scheme: str) -> str:
    """What in a sequence is not of the scheme, to go on from its place; "" where all is."""
    if unknown := unknown_tag(tags, scheme):
        return unknown
    for place, (tag, right) in enumerate(zip(tags, converted(tags, scheme), strict=True)):
        if tag != right:
            return f"has the tag {tag!r} at word {place + 1}, where {scheme} would have {right!r}"
    return ""


def all_tags(types: Iterable[str], scheme: str) -> tuple[str, ...]:
    """O and all tags of these types."""
    return ("O", *(f"{prefix}-{kind}" for kind in sorted(set(types)) for prefix in PREFIXES[scheme]))
