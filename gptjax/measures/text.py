"""Metrics of written text: BLEU and chrF by sacreBLEU, ROUGE by rouge-score, perplexity, and diversity."""

from __future__ import annotations

import collections
import math
import re
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from scipy import special

from gptjax.config import UserError
from gptjax.measures import packages
from gptjax.measures.bootstrap import Bootstrap, Sums, mean_of, ratio
from gptjax.measures.measured import Measured, measure

_ORDER = 4
_CHRF_ORDER, _CHRF_BETA = 6, 2
_HAN = re.compile(r"[\u3400-\u4dbf\u4e00-\u9fff]")


def bleu(
    references: Sequence[Sequence[str]], predicted: Sequence[str], tokenize: str = "13a", bootstrap: Bootstrap | None = None
) -> Measured:
    """Corpus BLEU, 0 to 100, with sacreBLEU's signature in the note (K. Papineni et al., ACL 2002; M. Post, WMT 2018).

    References [n] of one or more texts each. `tokenize` is sacreBLEU's: 13a, intl, char, zh (Chinese by character), none.
    The interval resamples the segments' n-gram counts, so that no text is tokenised twice.
    """
    _check(references, predicted)
    module = packages.load("sacrebleu.metrics")
    metric, sentence = (module.BLEU(tokenize=tokenize, effective_order=order) for order in (False, True))
    score = metric.corpus_score(list(predicted), _streams(references))
    parts = [sentence.sentence_score(text, list(refs)) for text, refs in zip(predicted, references, strict=True)]
    rows = np.array([[*part.counts, *part.totals, part.sys_len, part.ref_len] for part in parts], np.float64)
    notes = [metric.get_signature().format()]
    if tokenize == "13a" and any(_HAN.search(text) for refs in references for text in refs):
        notes.append("13a does not cut Chinese into characters: tokenize='zh' does")
    return measure("BLEU", Sums(rows, bleu_from), bootstrap, "; ".join(notes), score.score)


def bleu_from(totals: np.ndarray, effective_order: bool = False) -> np.ndarray:
    """BLEU of counts [..., matches (4), n-grams (4), predicted length, reference length], as sacreBLEU smooths (exp).

    An order of which nothing matches counts as half, a quarter, ... of a match; `effective_order` leaves out orders for which
    the text is too short, as sacreBLEU does for sentences.
    """
    right, made = totals[..., :_ORDER], totals[..., _ORDER : 2 * _ORDER]
    length, wanted = totals[..., -2], totals[..., -1]
    missed = np.cumsum((right == 0) & (made > 0), axis=-1)
    with np.errstate(divide="ignore", invalid="ignore"):
        precision = np.where(right > 0, right, 0.5**missed) / made
        logs = np.where(made > 0, np.log(precision), 0.0 if effective_order else -math.inf)
        orders = np.maximum((made > 0).sum(axis=-1), 1) if effective_order else _ORDER
        penalty = np.where(length < wanted, np.exp(1 - wanted / length), 1.0)
        score = 100 * penalty * np.exp(logs.sum(axis=-1) / orders)
    return np.where((right.sum(axis=-1) > 0) & (length > 0), score, 0.0)


def chrf(references: Sequence[Sequence[str]], predicted: Sequence[str], bootstrap: Bootstrap | None = None) -> Measured:
    """chrF2, 0 to 100: F of character n-grams up to 6, recall twice as heavy (M. Popović, WMT 2015); sacreBLEU's signature."""
    _check(references, predicted)
    metric = packages.load("sacrebleu.metrics").CHRF()
    score = metric.corpus_score(list(predicted), _streams(references))
    rows = np.array([_chrf_row(text, refs) for text, refs in zip(predicted, references, strict=True)], np.float64)
    return measure("chrF2", Sums(rows, chrf_from), bootstrap, metric.get_signature().format(), score.score)


def _chrf_row(text: str, references: Sequence[str]) -> np.ndarray:
    """[18]: for each order the predicted, reference and common n-grams, of the reference that scores best."""
    made = [_character_grams(text, order) for order in range(1, _CHRF_ORDER + 1)]
    rows = []
    for reference in references:
        wanted = [_character_grams(reference, order) for order in range(1, _CHRF_ORDER + 1)]
        # n-grams of an order that the reference is too short for do not count against the prediction
        triples = [(m.total() if w else 0, w.total(), (m & w).total()) for m, w in zip(made, wanted, strict=True)]
        rows.append(np.array(triples, np.float64).ravel())
    return max(rows, key=lambda row: float(chrf_from(row)))


def _character_grams(text: str, order: int) -> collections.Counter[str]:
    joined = "".join(text.split())
    return collections.Counter(joined[start : start + order] for start in range(len(joined) - order + 1))


def chrf_from(totals: np.ndarray) -> np.ndarray:
    """chrF2 of counts [..., 18] (`_chrf_row`): precision and recall are averaged over the orders that both sides have."""
    made, wanted, right = (totals[..., kind::3] for kind in range(3))
    both = (made > 0) & (wanted > 0)
    orders = np.maximum(both.sum(axis=-1), 1)
    precision, recall = (
        np.divide(right, below, out=np.zeros(right.shape), where=both).sum(axis=-1) / orders for below in (made, wanted)
    )
    weight = _CHRF_BETA**2
    below = weight * precision + recall
    return 100 * np.divide((1 + weight) * precision * recall, below, out=np.zeros(below.shape), where=below > 0)


def rouge(
    references: Sequence[Sequence[str]],
    predicted: Sequence[str],
    tokenize: str = "words",
    stemmer: bool = False,
    bootstrap: Bootstrap | None = None,
) -> list[Measured]:
    """F of ROUGE-1, -2 and -L, 0 to 100, mean over texts, the best reference of each (C.-Y. Lin, 2004), by rouge-score.

    `tokenize` words is rouge-score's own, which keeps a-z and 0-9 only; mixed takes every Chinese character as a token and the
    rest as words of any script. Raises `UserError` where words would leave nothing of a reference, as of a Chinese one.
    """
    _check(references, predicted)
    if tokenize not in ("words", "mixed"):
        raise UserError(f"tokenize={tokenize!r} is neither words nor mixed.")
    module = packages.load("rouge_score.rouge_scorer")
    types = {"rouge1": "ROUGE-1", "rouge2": "ROUGE-2", "rougeL": "ROUGE-L"}
    if tokenize == "mixed":
        if stemmer:
            raise UserError("stemmer=True goes with tokenize='words' only: it is an English stemmer.")
        scorer = module.RougeScorer(list(types), tokenizer=_Mixed())
    else:
        scorer = module.RougeScorer(list(types), use_stemmer=stemmer)
        for number, refs in enumerate(references):
            if any(text.strip() and not re.search(r"[a-z0-9]", text.lower()) for text in refs):
                raise UserError(
                    f"tokenize='words' keeps only a-z and 0-9, and nothing of a reference of text {number} (from 0): "
                    f"use tokenize='mixed'."
                )
    found = [scorer.score_multi(list(refs), text) for text, refs in zip(predicted, references, strict=True)]
    note = f"F, tokens: {tokenize}{', Porter stems' if stemmer else ''}"
    return [measure(name, mean_of([100 * row[key].fmeasure for row in found]), bootstrap, note) for key, name in types.items()]


class _Mixed:
    def tokenize(self, text: str) -> list[str]:
        return mixed_words(text)


def mixed_words(text: str) -> list[str]:
    """Lower-case words of letters and digits of any script; each Chinese character is a word."""
    return re.findall(r"\w+", _HAN.sub(lambda found: f" {found.group()} ", text.lower()))


# --- likelihood ---


def perplexity(nats: Sequence[float], tokens: Sequence[float], bootstrap: Bootstrap | None = None) -> Measured:
    """exp of summed nats over summed tokens; [n] documents each, which are what is resampled.

    Perplexities compare only where the tokens are the same: `bits_per_byte` compares tokenizers too.
    """
    return measure("perplexity", Sums(_pairs(nats, tokens, "tokens"), lambda totals: np.exp(ratio(totals))), bootstrap)


def bits_per_byte(nats: Sequence[float], byte_counts: Sequence[float], bootstrap: Bootstrap | None = None) -> Measured:
    """Summed nats over summed bytes of UTF-8, in bits; [n] documents each."""
    rows = _pairs(nats, byte_counts, "bytes")
    return measure("bits per byte", Sums(rows, lambda totals: ratio(totals) / math.log(2)), bootstrap)


def _pairs(nats: Sequence[float], units: Sequence[float], name: str) -> np.ndarray:
    above, below = np.asarray(nats, np.float64), np.asarray(units, np.float64)
    if above.ndim != 1 or above.shape != below.shape or not below.sum() > 0:
        raise UserError(f"needs the nats and {name} of each document, and at least one of the {name}.")
    return np.stack([above, below], axis=1)


# --- diversity ---


def distinct(texts: Sequence[Sequence[str]], order: int = 1, bootstrap: Bootstrap | None = None) -> Measured:
    """Different n-grams over all n-grams of texts, each a list of tokens; 0 to 1 (J. Li et al., NAACL 2016).

    It falls as texts grow longer or more: compare equal amounts only. A resample repeats texts, which is no diversity lost, so
    that the interval is the jackknife's (normal, from leaving each text out), not the bootstrap's.
    """
    grams = [collections.Counter(_grams(text, order)) for text in texts]
    seen = collections.Counter(gram for counter in grams for gram in counter)
    own = np.array([sum(seen[gram] == 1 for gram in counter) for counter in grams], np.float64)
    sizes = np.array([counter.total() for counter in grams], np.float64)
    if not sizes.sum():
        raise UserError(f"no text has {order} tokens.")
    value, n = len(seen) / sizes.sum(), len(texts)
    if bootstrap is None or n < 2:
        return Measured(f"distinct-{order}", float(value), n=n)
    left = (len(seen) - own) / np.maximum(sizes.sum() - sizes, 1)
    error = math.sqrt((n - 1) / n * float(np.sum((left - left.mean()) ** 2)))
    reach = error * float(special.ndtri((1 + bootstrap.confidence) / 2))
    return Measured(f"distinct-{order}", float(value), float(value - reach), float(value + reach), n, "jackknife interval")


def self_bleu(texts: Sequence[str], tokenize: str = "13a", order: int = _ORDER, bootstrap: Bootstrap | None = None) -> Measured:
    """Mean BLEU of each text against all others, 0 to 100; lower is more diverse (Y. Zhu et al., SIGIR 2018).

    Sentence BLEU as sacreBLEU's (exp smoothing, effective order). The interval resamples the texts' scores against the same pool.
    """
    if len(texts) < 2:
        raise UserError(f"self-BLEU compares texts with one another: {len(texts)} is too few.")
    cut = packages.load("sacrebleu.metrics").BLEU(tokenize=tokenize).tokenizer
    tokens = [cut(text.rstrip()).split() for text in texts]
    lengths = np.array([len(text) for text in tokens])
    rows = np.zeros((len(texts), 2 * _ORDER + 2))
    for n in range(1, order + 1):
        rows[:, n - 1], rows[:, _ORDER + n - 1] = _matches_in_others([collections.Counter(_grams(t, n)) for t in tokens])
    rows[:, -2], rows[:, -1] = lengths, _nearest_other(lengths)
    note = f"order {order}, {tokenize}, exp smoothing; grows with the number of texts"
    return measure("self-BLEU", mean_of(bleu_from(rows, effective_order=True)), bootstrap, note)


def _matches_in_others(grams: Sequence[collections.Counter[Any]]) -> tuple[list[int], list[int]]:
    """(matches, n-grams) of each text against all others as references, in one pass: the two highest counts of each n-gram."""
    highest: dict[Any, tuple[int, int, int]] = {}  # count, its text, the highest count of any other text
    for number, counter in enumerate(grams):
        for gram, count in counter.items():
            first, owner, second = highest.get(gram, (0, -1, 0))
            highest[gram] = (count, number, first) if count > first else (first, owner, max(second, count))
    matches = []
    for number, counter in enumerate(grams):
        best = (highest[gram][2 if highest[gram][1] == number else 0] for gram in counter)
        matches.append(sum(min(count, other) for count, other in zip(counter.values(), best, strict=True)))
    return matches, [counter.total() for counter in grams]


def _nearest_other(lengths: np.ndarray) -> np.ndarray:
    """For each length the nearest among the others, the shorter of two that are as near."""
    order = np.argsort(lengths, kind="stable")
    ranked = lengths[order].astype(np.float64)
    before, after = np.r_[-math.inf, ranked[:-1]], np.r_[ranked[1:], math.inf]
    nearest = np.where(ranked - before <= after - ranked, before, after)
    return nearest[np.argsort(order, kind="stable")]


def _grams(tokens: Sequence[Any], order: int) -> Iterable[tuple[Any, ...]]:
    return (tuple(tokens[start : start + order]) for start in range(len(tokens) - order + 1))


def _streams(references: Sequence[Sequence[str]]) -> list[list[str | None]]:
    """sacreBLEU's form: one list per place, None where a text has fewer references."""
    most = max(len(refs) for refs in references)
    return [[refs[place] if place < len(refs) else None for refs in references] for place in range(most)]


def _check(references: Sequence[Sequence[str]], predicted: Sequence[str]) -> None:
    if len(references) != len(predicted) or not len(predicted):
        raise UserError(f"there are {len(references)} texts with references, but {len(predicted)} predictions.")
    for number, refs in enumerate(references):
        if isinstance(refs, str) or not len(refs):
            raise UserError(f"text {number} (from 0) needs a list of at least one reference.")
