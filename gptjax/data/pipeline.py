"""Tokens to batches. The batch of a step is a function of (train.seed, step) alone, so a run's place in the data is one integer.

The rows of training are one infinite sequence, of which step s takes rows s * B to (s + 1) * B (while the batch size rises, the
rows that follow those of the steps before it), and a process of several those that its devices hold. A run that went back from
a spike of its loss passes over some: all later rows then come so many places later. They come in a new random order each epoch,
epoch after epoch without a gap. Windows are cut anew each epoch, from a phase of its own, so that no token comes twice in an
epoch and no boundary stays. (nanoGPT draws its windows with replacement, which leaves a fraction exp(-1) of the text unseen
after an epoch's worth.) Orders and phases are drawn from Philox, a counter-based generator, for (seed, epoch): starting at any
step costs nothing.

Orders are drawn here for whole batches, because Grain's own shuffle costs 20 to 40 microseconds a row; Grain iterates over steps,
and reads ahead in threads.
"""

from __future__ import annotations

import functools
import hashlib
import math
import pathlib
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptjax.config import Config, UserError
from gptjax.data import cache
from gptjax.data.cleaning import Cleaned, clean
from gptjax.data.packing import Rows, pack, shortened
from gptjax.data.sources import open_sources
from gptjax.data.tokenizers import SentencePieceTokenizer, Tokenizer, make_tokenizer, train_sentencepiece

Batch = dict[str, np.ndarray]
_FORMAT = "1"  # part of every cache key: a change of what an entry holds changes it
_PREFETCH_THREADS = 2  # a batch is a few numpy calls that release the GIL only in part; more threads bring nothing


@dataclass(frozen=True)
class Split:
    """The tokens of one split, and its packed rows (None where `data.packing` is windows)."""

    name: str
    tokens: np.ndarray  # unsigned [n], read-only, memory-mapped
    offsets: np.ndarray  # int64 [documents + 1]
    names: list[str]
    text_bytes: int
    rows: Rows | None

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Dataset:
    """Both splits; `report` holds plain numbers: documents, tokens, bytes, what was dropped, fill rates, seconds."""

    tokenizer: Tokenizer
    train: Split
    eval: Split
    report: dict[str, Any]


def load_dataset(config: Config, log: Callable[[str], Any] = print, cache_dir: pathlib.Path | None = None) -> Dataset:
    """Opens, cleans, tokenizes (or finds in the cache) and packs the source. Raises `UserError`."""
    began = time.perf_counter()
    cache_dir = cache_dir or cache.default_cache_dir()
    cleaned = clean(open_sources(config.data), config.data)
    tokenizer = _tokenizer(config, cleaned, cache_dir, log)
    around = _delimiters(config, tokenizer)
    key = hashlib.sha256("\n".join([_FORMAT, cleaned.digest, tokenizer.fingerprint, repr(around)]).encode()).hexdigest()[:32]
    entry = cache_dir / f"tokens-{key}"
    tokens = cache.read_entry(entry)
    was_cached = tokens is not None
    if tokens is None:
        tokens = cache.write_entry(entry, cleaned.splits, tokenizer, around)
    splits = {name: _split(config, name, part) for name, part in tokens.items()}
    report = _report(splits, tokenizer, cleaned.report) | {
        "cache": str(entry), "from_cache": was_cached, "seconds": round(time.perf_counter() - began, 3),
    }  # fmt: skip
    dataset = Dataset(tokenizer, splits["train"], splits["eval"], report)
    _log(dataset, config, log)
    return dataset


def _tokenizer(config: Config, cleaned: Cleaned, cache_dir: pathlib.Path, log: Callable[[str], Any]) -> Tokenizer:
    """The config's tokenizer; a SentencePiece model that is trained on the source is kept in the cache."""
    data = config.data
    if data.tokenizer != "sentencepiece" or data.tokenizer_path:
        return make_tokenizer(data, cleaned.splits)

    def train() -> bytes:
        log(f"data: training a SentencePiece model of {data.tokenizer_vocab_size} pieces on the training split.")
        return train_sentencepiece(cleaned.splits["train"], data.tokenizer_vocab_size)

    import sentencepiece

    parts = [_FORMAT, sentencepiece.__version__, cleaned.train_digest, str(data.tokenizer_vocab_size)]
    key = hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]
    return SentencePieceTokenizer(cache.cached_bytes(cache_dir / f"sentencepiece-{key}.model", train))


def _delimiters(config: Config, tokenizer: Tokenizer) -> cache.Delimiters:
    """[bos] document [eos], as far as asked for and known to the tokenizer.

    Where one id is both, windows of concatenated text would show it twice between documents: there it stands once before each
    document, and once after the last.
    """
    bos = tokenizer.bos_id if config.data.add_bos else None
    eos = tokenizer.eos_id if config.data.add_eos else None
    if config.data.packing == "windows" and bos is not None and bos == eos:
        return cache.Delimiters(bos, None, at_end=eos)
    return cache.Delimiters(bos, eos)


def _split(config: Config, name: str, part: cache.Tokens) -> Split:
    data = config.data
    rows = pack(part.offsets, data.seq_len) if data.packing == "packed" else None
    split = Split(name, part.tokens, part.offsets, part.names, part.text_bytes, rows)
    if rows is not None and not len(rows):
        raise UserError(f"the {name} split has {split.num_tokens} tokens and none to predict: no document has two tokens.")
    enough = data.seq_len + 1 if name == "train" else 2
    if rows is None and split.num_tokens < enough:
        raise UserError(f"the {name} split has {split.num_tokens} tokens, but data.packing=windows needs at least {enough}.")
    return split


def _report(splits: dict[str, Split], tokenizer: Tokenizer, dropped: dict[str, int]) -> dict[str, Any]:
    return {
        "vocab_size": tokenizer.vocab_size,
        "documents": {name: len(split.names) for name, split in splits.items()},
        "tokens": {name: split.num_tokens for name, split in splits.items()},
        "bytes": {name: split.text_bytes for name, split in splits.items()},
        "rows": {name: len(split.rows) if split.rows else None for name, split in splits.items()},
        "fill_rate": {name: round(split.rows.fill_rate, 6) if split.rows else 1.0 for name, split in splits.items()},
        "cleaning": dropped,
    }


def _log(dataset: Dataset, config: Config, log: Callable[[str], Any]) -> None:
    report = dataset.report
    for split in (dataset.train, dataset.eval):
        rows = f", {len(split.rows):,} rows filled to {split.rows.fill_rate:.1%}" if split.rows else ""
        log(
            f"data: {split.name}: {len(split.names):,} documents, {split.text_bytes:,} bytes, {split.num_tokens:,} tokens"
            f" ({split.text_bytes / split.num_tokens:.2f} bytes a token){rows}."
        )
    changed = ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in report["cleaning"].items() if count)
    log(
        f"data: {config.data.source} source, {dataset.tokenizer.kind} tokenizer of {dataset.tokenizer.vocab_size:,} ids; "
        f"{'cleaning: ' + changed if changed else 'nothing dropped'}; "
        f"{'found in' if report['from_cache'] else 'written to'} the cache, {report['seconds']:.1f} s."
    )


# --- training ---------------------------------------------------------------------------------------------------------


def steps_per_epoch(config: Config, split: Split) -> float:
    """Steps that take every row of an epoch once."""
    return _rows_per_epoch(config, split) / config.data.batch_size


def _rows_per_epoch(config: Config, split: Split) -> int:
    """Packed rows; for windows, as many as fit behind any phase below seq_len."""
    if split.rows is not None:
        return len(split.rows)
    return max(1, (split.num_tokens - config.data.seq_len) // config.data.seq_len)


def train_batches(
    config: Config, split: Split, start_step: int = 0, share: np.ndarray | None = None, skipped_rows: int = 0
) -> Iterator[Batch]:
    """The batches of steps `start_step`, `start_step` + 1, ..., to the end of the stage (`Config.stages`) of the first of them:
    without end where nothing warms up. `share`: of a step's rows only these, ascending. `skipped_rows`: rows that were passed
    over before `start_step`.

    int32 [rows, seq_len + 1] `tokens`, `segment_ids` (1, 2, ... within a row, 0 for padding) and `positions` (from 0 in each
    segment). Reads `data.prefetch` batches ahead.
    """
    import grain

    stages = config.stages(steps_per_epoch(config, split))
    stage, end = stages.at(start_step), stages.end(start_step) or _LAST_STEP
    share = _share(stage.batch_size, share)

    def batch(step: int) -> Batch:
        return shortened(_train_batch(config, split, stages.rows(step) + skipped_rows + share), stage.seq_len)

    batches = grain.MapDataset.range(start_step, end).map(lambda step: batch(int(step)))
    ahead = config.data.prefetch
    options = grain.ReadOptions(num_threads=_PREFETCH_THREADS if ahead else 0, prefetch_buffer_size=ahead)
    return iter(batches.to_iter_dataset(options))


_LAST_STEP = 2**53  # as good as infinite; a range needs an end


def _share(batch_size: int, share: np.ndarray | None) -> np.ndarray:
    if share is None:
        return np.arange(batch_size)
    if not len(share) or share[0] < 0 or share[-1] >= batch_size or (np.diff(share) <= 0).any():
        raise ValueError(f"a share of a batch of {batch_size} rows must be some of them in ascending order, not {share}.")
    return share


def _train_batch(config: Config, split: Split, numbers: np.ndarray) -> Batch:
    """Those rows of the infinite sequence."""
    epochs, rows = _epoch_rows(config, split, numbers)
    if split.rows is not None:
        return split.rows.batch(split.tokens, rows)
    return _windows(split, _window_starts(config, split, epochs, rows), config.data.seq_len)


def batch_documents(config: Config, split: Split, step: int, skipped_rows: int = 0) -> list[str]:
    """Names of the documents in the global batch of `step`, each once, in the order of the source."""
    stages = config.stages(steps_per_epoch(config, split))
    numbers = np.arange(stages.rows(step), stages.rows(step + 1)) + skipped_rows
    epochs, rows = _epoch_rows(config, split, numbers)
    if split.rows is not None:
        found = split.rows.documents(rows)
    else:
        starts = _window_starts(config, split, epochs, rows)
        first, last = (np.searchsorted(split.offsets, at, side="right") - 1 for at in (starts, starts + config.data.seq_len))
        found = np.unique(np.concatenate([np.arange(a, b + 1) for a, b in zip(first, last, strict=True)]))
    return [split.names[index] for index in found]


def _epoch_rows(config: Config, split: Split, numbers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(epochs, rows) at places `numbers` (ascending) of the infinite sequence of rows."""
    count = _rows_per_epoch(config, split)
    epochs, places = np.divmod(numbers, count)
    if not config.data.shuffle:
        return epochs, places
    rows = np.empty_like(places)
    for epoch in range(int(epochs[0]), int(epochs[-1]) + 1):
        here = epochs == epoch
        rows[here] = _epoch_order(config.train.seed, epoch, count)[places[here]]
    return epochs, rows


@functools.lru_cache(maxsize=4)
def _epoch_order(seed: int, epoch: int, count: int) -> np.ndarray:
    """int64 [count], a random order: that of random keys. Numpy promises to keep the bits of Philox, but not its own shuffle."""
    order = np.argsort(_philox(seed, _ORDER, epoch).random_raw(count), kind="stable")
    order.flags.writeable = False
    return order


_ORDER, _PHASE = 1, 2  # purposes, so that the two never draw the same numbers


def _philox(seed: int, purpose: int, stream: int) -> np.random.Philox:
    """Philox 4x64 (Salmon et al. 2011) at the start of one of its streams."""
    return np.random.Philox(key=np.asarray([seed, purpose], np.uint64), counter=np.asarray([0, 0, stream, 0], np.uint64))


def _window_starts(config: Config, split: Split, epochs: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """int64 first tokens: row r of an epoch begins r * seq_len tokens behind the epoch's phase."""
    seq_len = config.data.seq_len
    phases = np.zeros_like(epochs)
    room = split.num_tokens - _rows_per_epoch(config, split) * seq_len  # phases that leave every window whole
    if config.data.shuffle:
        for epoch in np.unique(epochs):
            raw = _philox(config.train.seed, _PHASE, int(epoch)).random_raw()
            phases[epochs == epoch] = int(raw) % room  # the remainder's bias is below 2 * seq_len / 2**64
    return phases + rows * seq_len


def _windows(split: Split, starts: np.ndarray, seq_len: int) -> Batch:
    """Windows of `seq_len` + 1 tokens; past the split's end, and for a start of -1, padding."""
    positions = np.arange(seq_len + 1, dtype=np.int32)
    places = starts[:, None] + positions
    real = ((places < split.num_tokens) & (starts[:, None] >= 0)).astype(np.int32)
    return {"tokens": split.tokens[places * real].astype(np.int32) * real, "segment_ids": real, "positions": positions * real}


# --- evaluation -------------------------------------------------------------------------------------------------------


def num_eval_batches(config: Config, split: Split, batch_size: int) -> int:
    """Batches of `eval_batches`."""
    return math.ceil(_eval_rows(config, split) / batch_size)


def _eval_rows(config: Config, split: Split) -> int:
    """Rows that predict the whole split; the last window may be short."""
    return len(split.rows) if split.rows is not None else math.ceil((split.num_tokens - 1) / config.data.seq_len)


def eval_batches(config: Config, split: Split, batch_size: int, share: np.ndarray | None = None) -> Iterator[Batch]:
    """The whole split once, in order: every token is predicted once that has one before it in its document (for windows: in the
    split). Yields batches of `batch_size` rows, or the `share` of each, as `train_batches` does; rows missing at the end are
    padding, so that every share has the same number of batches, each of the same shape.
    """
    share = _share(batch_size, share)
    rows = _eval_rows(config, split)
    for batch in range(num_eval_batches(config, split, batch_size)):
        numbers = batch * batch_size + share
        numbers = np.where(numbers < rows, numbers, -1)
        if split.rows is not None:
            yield split.rows.batch(split.tokens, numbers)
        else:
            starts = np.where(numbers >= 0, numbers * config.data.seq_len, -1)
            yield _windows(split, starts, config.data.seq_len)
