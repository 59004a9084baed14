"""Rows of documents to rows as an objective shows them: masked, with a gap, with spans cut out, or as they are.

Every document (piece) of a row is shown by itself, at its own place and segment, so that packed documents never mix. What is
drawn is a function of (seed, number of the row): Philox numbers, some for each place of the row. How the work is split among
steps, hosts or devices cannot change it. All documents of a batch are rewritten at once, by index arithmetic.

Letters: R rows, C places a row, N tokens of the batch one after the other, P documents of the batch.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from gptjax.config import Config, ObjectiveConfig
from gptjax.config.objective import Part, parts
from gptjax.data.reserved import SpecialIds, num_spans, special_ids
from gptjax.data.tokenizer_base import Tokenizer

Batch = dict[str, np.ndarray]

# What the numbers drawn at a place are for. PART, SHOWN, ORDER and the CUTs are read at a document's first token.
PART, SHOWN, ORDER, CUT_A, CUT_B = range(5)
CHOSEN, INSTEAD, RANDOM = 1, 2, 3  # masked, at each token
CUT_OUT, KEPT = 1, 2  # span, at each token
_CHANNELS = 5

# Targets of tokens that are not predicted.
IGNORED = -1


class Draws(NamedTuple):
    """Where a batch's numbers come from: Philox's key, of which evaluation has one for all runs."""

    seed: int
    purpose: int
    rows: np.ndarray  # numbers of the rows

    def uniform(self, places: int) -> np.ndarray:
        """float64 [R, places, channels] in [0, 1)."""
        key = np.asarray([self.seed, self.purpose], np.uint64)
        raw = np.stack(
            [np.random.Philox(key=key, counter=[0, 0, int(row), 0]).random_raw(places * _CHANNELS) for row in self.rows]
        )
        return ((raw >> np.uint64(11)) * 2.0**-53).reshape(len(self.rows), places, _CHANNELS)


class Documents(NamedTuple):
    """P documents one after the other."""

    tokens: np.ndarray  # [N]
    which: np.ndarray  # [N], the document of each token
    place: np.ndarray  # [N], in its document
    lengths: np.ndarray  # [P]
    drawn: np.ndarray  # [N, channels]

    @property
    def first(self) -> np.ndarray:
        return np.cumsum(self.lengths) - self.lengths

    def of(self, chosen: np.ndarray) -> Documents:
        """Those of the mask [P]."""
        mine = chosen[self.which]
        which = (np.cumsum(chosen) - 1)[self.which[mine]]
        return Documents(self.tokens[mine], which, self.place[mine], self.lengths[chosen], self.drawn[mine])


class Shown(NamedTuple):
    """Documents as they are shown: a token each, in any order."""

    which: np.ndarray
    place: np.ndarray  # in the document as it is shown
    tokens: np.ndarray
    prefix: np.ndarray  # bool: all of the document see it


@dataclass(frozen=True)
class Corruption:
    """How a split's rows are shown. `seed` and the rows' numbers decide what is drawn."""

    objective: ObjectiveConfig
    seq_len: int
    ids: SpecialIds
    bos_id: int | None
    eos_id: int | None
    text_ids: tuple[int, ...]  # ids that stand for text, among which random ones are drawn

    @property
    def overlap(self) -> int:
        """Tokens that successive pieces of a document share: where the next token is predicted, the first of a piece is only
        seen.
        """
        return 0 if self.objective.name == "masked" else 1

    @property
    def capacity(self) -> int:
        """Places of a row that are used, out of seq_len + 1."""
        return self.seq_len + self.overlap

    @functools.cached_property
    def grown(self) -> np.ndarray:
        """[capacity + 1]: places that a document of n tokens may take at most."""
        lengths = np.arange(self.capacity + 1)
        sizes = [lengths]
        for part in parts(self.objective):
            more = lengths + bool(part.token)
            if part.method == "span":
                more = more + 2 * num_spans(lengths, part.span_rate, part.span_mean_length)[1] + 1
            sizes.append(more + 4 if part.method == "infill" else more)
        return np.maximum.accumulate(np.max(sizes, axis=0))

    @property
    def longest(self) -> int:
        """Tokens of the longest document (or window) that fits into a row."""
        return int(np.flatnonzero(self.grown <= self.capacity)[-1])

    @property
    def stride(self) -> int:
        """Tokens from one window, or piece of a document, to the next."""
        return self.longest - self.overlap

    def train(self, batch: Batch, seed: int, rows: np.ndarray) -> Batch:
        """`batch` [R, C] as it is shown in training; `rows`: the numbers of its rows in the run."""
        return self.shown(batch, Draws(seed, _TRAIN, rows).uniform(batch["tokens"].shape[1]))

    def evaluation(self, batch: Batch, rows: np.ndarray) -> Batch:
        """The same in evaluation, by the rows' numbers in the split alone: one number for every run, at every step."""
        return self.shown(batch, Draws(0, _EVALUATION, np.maximum(rows, 0)).uniform(batch["tokens"].shape[1]))

    def shown(self, batch: Batch, uniform: np.ndarray) -> Batch:
        """`tokens`, `segment_ids` and `positions` int32 [R, seq_len + 1], and by objective

        masked: `targets`, IGNORED where nothing is predicted; the last place is empty.
        prefix, span, mixture: `prefix`, 1 for tokens that all of their document see, and which are not predicted.
        """
        if self.objective.name == "masked":
            shown = self._masked(batch, uniform)
        else:
            shown = self._rewritten(batch, uniform)
        fill = {"targets": IGNORED}
        return {
            name: np.pad(x, ((0, 0), (0, self.seq_len + 1 - x.shape[1])), constant_values=fill.get(name, 0))
            for name, x in shown.items()
        }

    def _masked(self, batch: Batch, uniform: np.ndarray) -> Batch:
        """BERT's masking (Devlin et al., 2019); each token of the text is chosen by itself, as RoBERTa's collators do."""
        o, tokens = self.objective, batch["tokens"]
        is_text = np.isin(tokens, self.text_ids) & (batch["segment_ids"] > 0)
        chosen = is_text & (uniform[..., CHOSEN] < o.mask_rate)
        instead, mask = uniform[..., INSTEAD], self.ids.mask
        assert mask is not None
        others = np.asarray(self.text_ids)[(uniform[..., RANDOM] * len(self.text_ids)).astype(np.int64)]
        seen = np.where(instead < o.mask_token_rate, mask, np.where(instead >= 1 - o.mask_random_rate, others, tokens))
        targets = np.where(chosen, tokens, IGNORED)
        return {**batch, "tokens": np.where(chosen, seen, tokens).astype(np.int32), "targets": targets.astype(np.int32)}

    def _rewritten(self, batch: Batch, uniform: np.ndarray) -> Batch:
        segment_ids = batch["segment_ids"]
        rows, columns = np.nonzero(segment_ids)
        numbers = rows * (segment_ids.max() + 1) + segment_ids[rows, columns]
        begins = np.flatnonzero(np.diff(numbers, prepend=-1))
        lengths = np.diff(begins, append=len(rows))
        which = np.repeat(np.arange(len(begins)), lengths)
        documents = Documents(
            batch["tokens"][rows, columns], which, np.arange(len(rows)) - begins[which], lengths, uniform[rows, columns]
        )
        shown = self._by_parts(documents)
        return self._laid_out(shown, rows[begins], segment_ids[rows, columns][begins], len(segment_ids))

    def _by_parts(self, documents: Documents) -> Shown:
        """Each document by the part that is drawn for it."""
        all_parts = parts(self.objective)
        ends = np.cumsum([part.weight for part in all_parts])
        drawn = documents.drawn[documents.first, PART] * ends[-1]
        number = np.minimum(np.searchsorted(ends, drawn, side="right"), len(ends) - 1)
        found = []
        for i, part in enumerate(all_parts):
            chosen = np.flatnonzero(number == i)
            shown = METHODS[part.method](self, part, documents.of(number == i))
            token = self.ids.paradigms[i]
            if token is not None:
                here = np.arange(len(chosen))
                first = Shown(here, np.zeros_like(here), np.full_like(here, token), np.ones(len(here), bool))
                shown = Shown(*map(np.concatenate, zip(first, shown._replace(place=shown.place + 1), strict=True)))
            found.append(shown._replace(which=chosen[shown.which]))
        return Shown(*map(np.concatenate, zip(*found, strict=True)))

    def _laid_out(self, shown: Shown, rows: np.ndarray, segments: np.ndarray, num_rows: int) -> Batch:
        """Documents one behind the other in their `rows` [P], numbered by `segments` [P]."""
        lengths = np.bincount(shown.which, minlength=len(rows))
        before = np.cumsum(lengths) - lengths
        first_of_row = np.searchsorted(rows, np.arange(num_rows))
        start = before - before[first_of_row[rows]] if len(rows) else before
        if len(rows) and (start + lengths).max() > self.capacity:
            raise ValueError(f"a row of {(start + lengths).max()} tokens where {self.capacity} have room")
        out = {
            name: np.zeros((num_rows, self.seq_len + 1), np.int32) for name in ("tokens", "segment_ids", "positions", "prefix")
        }
        at = rows[shown.which], start[shown.which] + shown.place
        out["tokens"][at], out["segment_ids"][at] = shown.tokens, segments[shown.which]
        out["positions"][at], out["prefix"][at] = shown.place, shown.prefix
        if self.objective.name == "infill":  # nothing in it is seen from before
            del out["prefix"]
        return out


_TRAIN, _EVALUATION = 11, 12  # purposes of Philox's keys; those of pipeline.py are below 10


# --- the ways to show a document ----------------------------------------------------------------------------------------


def _as_it_is(corruption: Corruption, part: Part, documents: Documents) -> Shown:
    return Shown(documents.which, documents.place, documents.tokens, np.zeros(len(documents.tokens), bool))


def _prefix(corruption: Corruption, part: Part, documents: Documents) -> Shown:
    """A prefix LM (Raffel et al., 2020): the first 1 to n - 1 of n tokens are given, each number as likely."""
    given = 1 + (documents.drawn[documents.first, SHOWN] * (documents.lengths - 1)).astype(np.int64)
    return Shown(documents.which, documents.place, documents.tokens, documents.place < given[documents.which])


def _infill(corruption: Corruption, part: Part, documents: Documents) -> Shown:
    """Two cuts, uniform over the places between tokens, and the middle last (Bavarian et al., 2022, in both its orders):

        psm: <PRE> prefix <SUF> suffix <MID> middle <EOT>
        spm: <PRE> <SUF> suffix <MID> prefix middle <EOT>

    A begin-of-text token stays in front; an end-of-text token comes last, and ends the middle where there is no <EOT>. Every
    token is predicted.
    """
    o, tokens, which = corruption.objective, documents.tokens, documents.which
    assert corruption.ids.gap is not None
    *begins, end = corruption.ids.gap
    at = documents.drawn[documents.first]
    first, last = tokens[documents.first], tokens[documents.first + documents.lengths - 1]
    head = (first == corruption.bos_id).astype(np.int64)
    tail = ((last == corruption.eos_id) & (documents.lengths > head)).astype(np.int64)
    inner = documents.lengths - head - tail
    cuts = np.sort((at[:, [CUT_A, CUT_B]] * (inner[:, None] + 1)).astype(np.int64), axis=1)
    a, b = cuts[:, 0], cuts[:, 1]
    gapped, spm = at[:, SHOWN] < o.infill_rate, at[:, ORDER] < o.infill_spm_rate

    i = documents.place - head[which]  # in what stands between the ends
    of = functools.partial(np.take, indices=which)
    # How far each token moves, by the part it is in: the tokens of other parts and the marks that come before it.
    in_prefix = 1 + of(spm) * (2 + of(inner - b))
    in_middle = 3 + of(inner - b)
    in_suffix = np.where(of(spm), 2 - of(b), 2 - of(b - a))
    moved = np.select(
        [i < 0, i < of(a), i < of(b), i < of(inner)], [0 * i, in_prefix, in_middle, in_suffix], 3 + (end is not None)
    )
    place = np.where(of(gapped), documents.place + moved, documents.place)

    some = np.flatnonzero(gapped)
    h, n, spm, a, b = head[some], inner[some], spm[some], a[some], b[some]
    marks = [h, h + 1 + np.where(spm, 0, a), h + 2 + (n - b) + np.where(spm, 0, a)]
    ids = list(begins)
    which_of = [some, some, some]
    if end is not None:
        marks, ids, which_of = [*marks, h + 3 + n], [*ids, end], [*which_of, some]
    elif corruption.eos_id is not None:  # what ends the middle where the text itself does not end
        open_ = tail[some] == 0
        marks, ids, which_of = [*marks, (h + 3 + n)[open_]], [*ids, corruption.eos_id], [*which_of, some[open_]]
    values = [np.full(len(numbers), value) for numbers, value in zip(which_of, ids, strict=True)]
    new_which, new_place, new_tokens = (
        np.concatenate([old, *added]) for old, added in ((which, which_of), (place, marks), (tokens, values))
    )
    return Shown(new_which, new_place, new_tokens, np.zeros(len(new_which), bool))


def _span(corruption: Corruption, part: Part, documents: Documents) -> Shown:
    """T5's span corruption (Raffel et al., 2020) for a decoder. Of `a b c d e f g`, with `b c` and `g` cut out:

        a <0> d e f <1> | <0> b c <1> g <2>

    What is before the bar sees itself both ways, what is behind it is predicted. Cut-out and kept tokens each fall into k
    parts, all ways as likely, and alternate, a kept part first.
    """
    lengths, which, place = documents.lengths, documents.which, documents.place
    cut, spans = num_spans(lengths, part.span_rate, part.span_mean_length)
    kept = lengths - cut
    cut_places, cut_parts = _parts_of(documents, cut, spans, CUT_OUT)
    kept_places, kept_parts = _parts_of(documents, kept, np.maximum(spans, 1), KEPT)
    # Numbers of spans run through the whole batch: that of a document's span s is base + s.
    base = np.cumsum(spans + 1) - (spans + 1)
    of_cut, of_kept = which[cut_places], which[kept_places]
    cut_sizes = np.bincount(base[of_cut] + cut_parts, minlength=int((spans + 1).sum()))
    kept_sizes = np.bincount(base[of_kept] + kept_parts, minlength=int((spans + 1).sum()))
    owner = np.repeat(np.arange(len(lengths)), spans + 1)
    number = np.arange(len(owner)) - base[owner]
    cut_before = np.cumsum(cut_sizes) - cut_sizes
    cut_before -= cut_before[base[owner]]
    kept_before = np.cumsum(kept_sizes) - kept_sizes
    kept_before -= kept_before[base[owner]]
    first = documents.first

    j_cut, j_kept = place[cut_places], place[kept_places]
    span_of_cut, span_of_kept = base[of_cut] + cut_parts, base[of_kept] + kept_parts
    cut_tokens = documents.tokens[first[of_cut] + j_cut + (kept_before + kept_sizes)[span_of_cut]]
    kept_tokens = documents.tokens[first[of_kept] + j_kept + cut_before[span_of_kept]]
    inputs = kept + spans  # tokens before the bar
    sentinels = np.asarray(corruption.ids.sentinels)[number]
    in_input = number < spans[owner]  # the last one only ends the targets
    shown = [
        (of_kept, j_kept + kept_parts, kept_tokens),
        (owner[in_input], (kept_before + kept_sizes + number)[in_input], sentinels[in_input]),
        (owner, inputs[owner] + cut_before + number, sentinels),
        (of_cut, inputs[of_cut] + j_cut + cut_parts + 1, cut_tokens),
    ]
    which, place, tokens = (np.concatenate(column) for column in zip(*shown, strict=True))
    return Shown(which, place, tokens, place < inputs[which])


def _parts_of(documents: Documents, sizes: np.ndarray, counts: np.ndarray, channel: int) -> tuple[np.ndarray, np.ndarray]:
    """The first `sizes` [P] places of each document, in order, and for each the part it is in: `counts` [P] parts that are not
    empty, with ends of equal chance.
    """
    places = np.flatnonzero(documents.place < sizes[documents.which])
    inside = places[documents.place[places] > 0]  # before which a part may begin
    order = inside[np.lexsort((documents.drawn[inside, channel], documents.which[inside]))]
    owner = documents.which[order]
    rank = np.arange(len(order)) - np.searchsorted(owner, owner)
    begins = np.zeros(len(documents.which), np.int64)
    begins[order[rank < counts[owner] - 1]] = 1
    total = np.cumsum(begins)
    return places, (total - (total - begins)[documents.first][documents.which])[places]


METHODS: dict[str, Callable[[Corruption, Part, Documents], Shown]] = {
    "causal": _as_it_is,
    "prefix": _prefix,
    "infill": _infill,
    "span": _span,
}


def corruption_of(config: Config, tokenizer: Tokenizer) -> Corruption | None:
    """How the config's objective shows rows; None where as they are. Raises `UserError` where the tokenizer lacks its tokens."""
    if config.objective.name == "causal":
        return None
    ids = special_ids(tokenizer, config.objective, config.data.seq_len)
    text_ids = tuple(np.flatnonzero(tokenizer.token_bytes()).tolist())
    return Corruption(config.objective, config.data.seq_len, ids, tokenizer.bos_id, tokenizer.eos_id, text_ids)
