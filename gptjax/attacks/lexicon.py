"""Words that may stand for one another, from a file: a list of synonyms, or word vectors and their nearest neighbours."""

from __future__ import annotations

import pathlib
from collections.abc import Mapping

import numpy as np

from gptjax.config import UserError
from gptjax.data.sources import decode_line, read_bytes

Lexicon = Mapping[str, tuple[str, ...]]  # of a word in lower case, what may stand for it, the nearest first

_BLOCK = 512  # words whose cosines to all others are held at once


def read_synonyms(path: str | pathlib.Path) -> Lexicon:
    """Lines of a word and its substitutes with tabs between; a word may have several lines. Raises `UserError`."""
    found: dict[str, list[str]] = {}
    for number, line in enumerate(read_bytes(pathlib.Path(path)).split(b"\n"), 1):
        if not line.strip():
            continue
        word, *others = (cell.strip() for cell in _text(line, path, number).split("\t"))
        if not word or not any(others):
            raise UserError(f"{path}, line {number} is not a word and its substitutes with tabs between.")
        found.setdefault(word.lower(), []).extend(other for other in others if other and other.lower() != word.lower())
    if not found:
        raise UserError(f"{path} is empty: it holds no words.")
    return {word: tuple(dict.fromkeys(others)) for word, others in found.items()}


def read_vectors(path: str | pathlib.Path, neighbours: int = 8, min_cosine: float = 0.5) -> Lexicon:
    """The nearest words by cosine, from lines of a word and its numbers with blanks between, as word2vec and GloVe write them.

    A first line of two numbers, word2vec's, is passed over. Raises `UserError` for lines of different lengths.
    """
    words, rows = _vectors(pathlib.Path(path))
    matrix = np.asarray(rows, np.float32)
    matrix /= np.maximum(np.linalg.norm(matrix, axis=1, keepdims=True), 1e-12)
    found: dict[str, tuple[str, ...]] = {}
    for start in range(0, len(words), _BLOCK):
        cosines = matrix[start : start + _BLOCK] @ matrix.T
        for row, cosine in enumerate(cosines):
            near = np.argsort(-cosine, kind="stable")[: neighbours + 1]
            word = words[start + row]
            found[word] = tuple(words[i] for i in near if i != start + row and cosine[i] >= min_cosine)[:neighbours]
    return found


def _vectors(path: pathlib.Path) -> tuple[list[str], list[np.ndarray]]:
    words: dict[str, np.ndarray] = {}
    for number, line in enumerate(read_bytes(path).split(b"\n"), 1):
        cells = _text(line, path, number).split()
        if not cells or (number == 1 and len(cells) == 2):
            continue
        try:
            vector = np.asarray([float(cell) for cell in cells[1:]], np.float32)
        except ValueError:
            raise UserError(f"{path}, line {number} is not a word and its numbers with blanks between.") from None
        width = len(next(iter(words.values()), vector))
        if not len(vector) or len(vector) != width or not np.isfinite(vector).all():
            raise UserError(f"{path}, line {number} has {len(vector)} numbers, not {width} finite ones.")
        words.setdefault(cells[0].lower(), vector)
    if not words:
        raise UserError(f"{path} is empty: it holds no words.")
    return list(words), list(words.values())


def _text(line: bytes, path: str | pathlib.Path, number: int) -> str:
    try:
        return decode_line(line)
    except ValueError as error:
        raise UserError(f"{path}, line {number} {error}.") from None
