"""Tokens to batches. The batch of a step is a function of (train.seed, step) alone, so a run's place in the data is one integer.

The rows of training are one infinite sequence, of which step s takes rows s * B to (s + 1) * B (while the batch size rises, the
rows that follow those of the steps before it), and a process of several those that its devices hold. A run that went back from
a spike of its loss passes over some: all later rows then come so many places later. They come in a new random order each epoch,
epoch after epoch without a gap. Windows are cut anew each epoch, from a phase of its own, so that no token comes twice in an
epoch and no boundary stays. (nanoGPT draws its windows with replacement, which leaves a fraction exp(-1) of the text unseen
after an epoch's worth.) Orders and phases are drawn from Philox, a counter-based generator, for (seed, epoch): starting at any
step costs nothing.

Of a mixture, each source has such a sequence of its own, whatever the weights; mixture.py says which source a row of the run is
from, and how many rows of that source came before it.

Orders are drawn here for whole batches, because Grain's own shuffle costs 20 to 40 microseconds a row; Grain iterates over steps,
and reads ahead in threads.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import math
import pathlib
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from gptjax.config import Config, DataConfig, UserError, mixture_sources, mixture_weights, task_weights
from gptjax.config.mixture import Knots
from gptjax.data import cache
from gptjax.data.cleaning import Cleaned
from gptjax.data.corruption import Corruption, corruption_of
from gptjax.data.mixture import Shares
from gptjax.data.order import MIXTURE, PHASE, epoch_order, philox
from gptjax.data.packing import Rows, pack, shortened
from gptjax.data.recall import Deferred, read_or_recall
from gptjax.data.reserved import reserve, text_tokenizer
from gptjax.data.sources import Joined, Source
from gptjax.data.tokenizers import (
    CharTokenizer,
    SentencePieceTokenizer,
    Tokenizer,
    make_tokenizer,
    train_sentencepiece,
    trained_tokenizer,
)

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
    corruption: Corruption | None = None  # how the objective shows rows; None: as they are
    source: str = ""  # its name in a mixture
    columns: Mapping[str, np.ndarray] = field(default_factory=dict)  # beside the tokens, [n, ...]: labels and the like

    @property
    def num_tokens(self) -> int:
        return len(self.tokens)


@dataclass(frozen=True)
class Mixture:
    """One split of several sources; `shares` says which rows of the run are whose."""

    splits: dict[str, Split]
    shares: Shares


@dataclass(frozen=True)
class Dataset:
    """Both splits; `report` holds plain numbers: documents, tokens, bytes, what was dropped, fill rates, seconds.

    Of a mixture, `eval` is one split a source, and the report's numbers are sums, with each source's own under "sources".
    """

    tokenizer: Tokenizer
    train: Split | Mixture
    eval: Split | dict[str, Split]
    report: dict[str, Any]
    text_tokenizer: Tokenizer  # without what the objective's tokens added to it

    def settled(self, config: Config) -> Config:
        """The config with what the data decides. Raises `UserError` where the two contradict each other."""
        return config.with_vocab_size(self.tokenizer.vocab_size)


def load_dataset(
    config: Config,
    log: Callable[[str], Any] = print,
    cache_dir: pathlib.Path | None = None,
    own: Tokenizer | None = None,
) -> Dataset:
    """Opens, cleans, tokenizes (or finds in the cache) and packs the source, or each of a mixture. Raises `UserError`.

    `own`: the tokenizer of a trained model, whose ids stand for the objective's tokens; None: those that are missing get new ids.
    """
    began = time.perf_counter()
    cache_dir = cache_dir or cache.default_cache_dir()
    sources = mixture_sources(config.data) or {"": config.data}
    cleaned: dict[str, Cleaned] = {}
    unread: dict[str, bool] = {}
    for name, knobs in sources.items():
        with _naming(name):
            cleaned[name], unread[name] = read_or_recall(knobs, cache_dir)
    tokenizer = _tokenizer(config, list(cleaned.values()), cache_dir, log)
    text, tokenizer = tokenizer, own or reserve(tokenizer, config.objective, config.data.seq_len)
    corruption = corruption_of(config, tokenizer)
    splits: dict[str, dict[str, Split]] = {}
    reports: dict[str, dict[str, Any]] = {}
    for name, documents in cleaned.items():
        with _naming(name):
            splits[name], reports[name] = _load_source(config, name, documents, text, corruption, cache_dir)
        reports[name]["files_unread"] = unread[name]
        reports[name]["vocab_size"] = tokenizer.vocab_size
        _log(name, sources[name], splits[name].values(), reports[name], log)
    train = {name: of_source["train"] for name, of_source in splits.items()}
    held_out = {name: of_source["eval"] for name, of_source in splits.items()}
    seconds = {"seconds": round(time.perf_counter() - began, 3)}
    where = "found in" if all(report["from_cache"] for report in reports.values()) else "written to"
    log(f"data: {tokenizer.kind} tokenizer of {tokenizer.vocab_size:,} ids; {where} the cache, {seconds['seconds']:.1f} s.")
    if not config.data.mixture:
        return Dataset(tokenizer, train[""], held_out[""], reports[""] | seconds, text)
    return Dataset(tokenizer, mixture_of(config, train), held_out, _add_up(reports) | seconds, text)


@contextlib.contextmanager
def _naming(source: str) -> Iterator[None]:
    """An error that says of which source of a mixture it is."""
    try:
        yield
    except UserError as error:
        raise UserError(f"data.mixture, source {source}: {error}") if source else error from None


def _load_source(
    config: Config, name: str, cleaned: Cleaned, tokenizer: Tokenizer, corruption: Corruption | None, cache_dir: pathlib.Path
) -> tuple[dict[str, Split], dict[str, Any]]:
    """The splits of one source, and what there is to say of them."""
    around = _delimiters(config, tokenizer)
    entry = cache_dir / f"tokens-{_key(_FORMAT, cleaned.digest, tokenizer.fingerprint, repr(around))}"
    tokens = cache.read_entry(entry)
    was_cached = tokens is not None
    if tokens is None:
        tokens = cache.write_entry(entry, cleaned.splits, tokenizer, around)
    splits = {split: _split(config, split, part, corruption, name) for split, part in tokens.items()}
    return splits, _report(splits, tokenizer, cleaned.report) | {"cache": str(entry), "from_cache": was_cached}


def _tokenizer(config: Config, cleaned: list[Cleaned], cache_dir: pathlib.Path, log: Callable[[str], Any]) -> Tokenizer:
    """The config's tokenizer; a SentencePiece model that is trained on the source is kept in the cache.

    Of a mixture it is made from all the sources' text, so that losses under different weights can be compared.
    """
    data = config.data
    if data.tokenizer == "init_from":
        return text_tokenizer(trained_tokenizer(config.init_from))

    def together(split: str) -> Source:
        return Joined(*(one.splits[split] for one in cleaned))

    sources: dict[str, Source] = {split: Deferred(functools.partial(together, split)) for split in ("train", "eval")}
    if data.tokenizer == "char":
        path = cache_dir / f"characters-{_key(_FORMAT, *(one.digest for one in cleaned))}.json"
        alphabet = cache.stored_bytes(path)
        if alphabet is None:
            alphabet = make_tokenizer(data, sources).files()["alphabet.json"]
            cache.note_bytes(path, alphabet)
        return CharTokenizer.from_files({"alphabet.json": alphabet})
    if data.tokenizer != "sentencepiece" or data.tokenizer_path:
        return make_tokenizer(data, sources)

    def train() -> bytes:
        log(f"data: training a SentencePiece model of {data.tokenizer_vocab_size} pieces on the training split.")
        return train_sentencepiece(sources["train"], data.tokenizer_vocab_size)

    import sentencepiece

    digests = [one.train_digest for one in cleaned]
    key = _key(_FORMAT, sentencepiece.__version__, *digests, str(data.tokenizer_vocab_size))
    return SentencePieceTokenizer(cache.cached_bytes(cache_dir / f"sentencepiece-{key}.model", train))


def _key(*parts: str) -> str:
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:32]


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


def _split(config: Config, name: str, part: cache.Tokens, corruption: Corruption | None, source: str = "") -> Split:
    data = config.data
    rows = None if data.packing == "windows" else _packed(part.offsets, data.seq_len, corruption, data.packing == "padded")
    split = Split(name, part.tokens, part.offsets, part.names, part.text_bytes, rows, corruption, source)
    if rows is not None and not len(rows):
        raise UserError(f"the {name} split has {split.num_tokens} tokens and none to predict: no document has two tokens.")
    stride, width = _window(config, split)
    enough = width if name == "train" else 1 + width - stride
    if rows is None and split.num_tokens < enough:
        raise UserError(f"the {name} split has {split.num_tokens} tokens, but data.packing=windows needs at least {enough}.")
    return split


def _packed(offsets: np.ndarray, seq_len: int, corruption: Corruption | None, alone: bool) -> Rows:
    if corruption is None:
        return pack(offsets, seq_len, alone=alone)
    o = corruption
    return pack(offsets, o.stride, overlap=o.overlap, capacity=o.capacity, sizes=o.grown, alone=alone)


def _window(config: Config, split: Split) -> tuple[int, int]:
    """(tokens from one window to the next, tokens in a window)."""
    if split.corruption is None:
        return config.data.seq_len, config.data.seq_len + 1
    return split.corruption.stride, split.corruption.longest


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


def _add_up(reports: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The report of a mixture: sums over the sources, and each source's own."""
    parts = list(reports.values())
    total: dict[str, Any] = {"vocab_size": parts[0]["vocab_size"]}
    for key in ("documents", "tokens", "bytes", "rows", "cleaning"):
        total[key] = {name: sum(part[key][name] or 0 for part in parts) for name in parts[0][key]}
    if parts[0]["rows"]["train"] is None:
        total["rows"] = dict.fromkeys(parts[0]["rows"])
    return total | {"from_cache": all(part["from_cache"] for part in parts), "sources": reports}


def _log(source: str, data: DataConfig, splits: Iterable[Split], report: dict[str, Any], log: Callable[[str], Any]) -> None:
    about = f"{source}: " if source else ""
    for split in splits:
        rows = f", {len(split.rows):,} rows filled to {split.rows.fill_rate:.1%}" if split.rows else ""
        log(
            f"data: {about}{split.name}: {len(split.names):,} documents, {split.text_bytes:,} bytes, {split.num_tokens:,} tokens"
            f" ({split.text_bytes / split.num_tokens:.2f} bytes a token){rows}."
        )
    changed = ", ".join(f"{count:,} {what.replace('_', ' ')}" for what, count in report["cleaning"].items() if count)
    unread = "; not read again, the files are as they were" if report["files_unread"] else ""
    log(f"data: {about}{data.source} source; {'cleaning: ' + changed if changed else 'nothing dropped'}{unread}.")


# --- training ---------------------------------------------------------------------------------------------------------


def steps_per_epoch(config: Config, split: Split | Mixture) -> float:
    """Steps that take every row of an epoch once; of a mixture, as many rows as the sources that are trained on have together."""
    if isinstance(split, Mixture):
        return _rows_together(config, split.splits) / config.data.batch_size
    return _rows_per_epoch(config, split) / config.data.batch_size


def _rows_together(config: Config, splits: dict[str, Split]) -> int:
    weights = _weights(config, splits)
    return sum(_rows_per_epoch(config, split) for name, split in splits.items() if any(weight for _, weight in weights[name]))


def _weights(config: Config, splits: dict[str, Split]) -> dict[str, Knots]:
    """Those of the knobs; by their rows, where these don't say."""
    rows = {name: _rows_per_epoch(config, split) for name, split in splits.items()}
    given = mixture_weights(config.data) or task_weights(config, rows)
    return given or {name: ((0.0, float(count)),) for name, count in rows.items()}


def mixture_of(config: Config, splits: dict[str, Split]) -> Mixture:
    """The sources, or tasks, of a run, and whose each row of it is, with places of the run by its length in rows."""
    weights = _weights(config, splits)
    epoch_steps = _rows_together(config, splits) / config.data.batch_size
    total_rows = config.stages(epoch_steps).rows(config.duration("train", "duration", epoch_steps))
    first = int(philox(config.train.seed, MIXTURE, 0).random_raw()) >> 1
    return Mixture(splits, Shares.of([weights[name] for name in splits], total_rows, first))


def mixture_figures(config: Config, split: Split | Mixture, num_rows: int) -> dict[str, dict[str, float]]:
    """{source: its weight after the first `num_rows` rows of the run, how many of these are its, the epochs that those are}; {}
    where there is no mixture. A function of (config, num_rows), whatever the run has been through.
    """
    if not isinstance(split, Mixture):
        return {}
    counts = zip(split.splits.items(), split.shares.at(num_rows), split.shares.rows_before(num_rows), strict=True)
    return {
        name: {"weight": weight, "rows": rows, "epochs": rows / _rows_per_epoch(config, one)}
        for (name, one), weight, rows in counts
    }


def _rows_per_epoch(config: Config, split: Split) -> int:
    """Packed rows; for windows, as many as fit behind any phase below a window's stride."""
    if split.rows is not None:
        return len(split.rows)
    stride, _ = _window(config, split)
    return max(1, (split.num_tokens - stride) // stride)


def train_batches(
    config: Config, split: Split | Mixture, start_step: int = 0, share: np.ndarray | None = None, skipped_rows: int = 0
) -> Iterator[Batch]:
    """The batches of steps `start_step`, `start_step` + 1, ..., to the end of the stage (`Config.stages`) of the first of them:
    without end where nothing warms up. `share`: of a step's rows only these, ascending. `skipped_rows`: rows that were passed
    over before `start_step`.

    int32 [rows, seq_len + 1] `tokens`, `segment_ids` (1, 2, ... within a row, 0 for padding) and `positions` (from 0 in each
    segment), and what the objective adds (corruption.py). Reads `data.prefetch` batches ahead.
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


def _train_batch(config: Config, split: Split | Mixture, numbers: np.ndarray) -> Batch:
    """Those rows (ascending) of the infinite sequence."""
    batch: Batch = {}
    if isinstance(split, Split):
        batch, corruption = _rows(config, split, numbers), split.corruption
    else:
        corruption = next(iter(split.splits.values())).corruption
        for one, where, places in _by_source(split, numbers):
            for name, rows in _rows(config, one, places).items():
                batch.setdefault(name, np.empty((len(numbers), *rows.shape[1:]), rows.dtype))[where] = rows
    return batch if corruption is None else corruption.train(batch, config.train.seed, numbers)


def _by_source(mixture: Mixture, numbers: np.ndarray) -> Iterator[tuple[Split, np.ndarray, np.ndarray]]:
    """(split, which of `numbers` are its, their places in its own sequence of rows) of the sources that have any."""
    sources, places = mixture.shares.assign(numbers)
    for index, split in enumerate(mixture.splits.values()):
        where = np.flatnonzero(sources == index)
        if len(where):
            yield split, where, places[where]


def _rows(config: Config, split: Split, numbers: np.ndarray) -> Batch:
    """The rows at places `numbers` (ascending) of a source's infinite sequence."""
    epochs, rows = _epoch_rows(config, split, numbers)
    if split.rows is not None:
        return split.rows.batch(split.tokens, rows, split.columns)
    return _windows(split, _window_starts(config, split, epochs, rows), _window(config, split)[1])


def batch_documents(config: Config, split: Split | Mixture, step: int, skipped_rows: int = 0) -> list[str]:
    """Names of the documents in the global batch of `step`, each once, in the order of the source; of a mixture SOURCE:DOCUMENT,
    source after source.
    """
    stages = config.stages(steps_per_epoch(config, split))
    numbers = np.arange(stages.rows(step), stages.rows(step + 1)) + skipped_rows
    if isinstance(split, Split):
        return _documents(config, split, numbers)
    parts = _by_source(split, numbers)
    return [f"{one.source}:{name}" for one, _, places in parts for name in _documents(config, one, places)]


def _documents(config: Config, split: Split, numbers: np.ndarray) -> list[str]:
    epochs, rows = _epoch_rows(config, split, numbers)
    if split.rows is not None:
        found = split.rows.documents(rows)
    else:
        starts = _window_starts(config, split, epochs, rows)
        first, last = (
            np.searchsorted(split.offsets, at, side="right") - 1 for at in (starts, starts + _window(config, split)[1] - 1)
        )
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
        rows[here] = epoch_order(config.train.seed, epoch, count, split.source)[places[here]]
    return epochs, rows


def _window_starts(config: Config, split: Split, epochs: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """int64 first tokens: row r of an epoch begins r strides behind the epoch's phase."""
    stride, width = _window(config, split)
    phases = np.zeros_like(epochs)
    # phases that leave every window whole
    room = split.num_tokens - _rows_per_epoch(config, split) * stride - (width - stride) + 1
    if config.data.shuffle:
        for epoch in np.unique(epochs):
            raw = philox(config.train.seed, PHASE, int(epoch), split.source).random_raw()
            phases[epochs == epoch] = int(raw) % room  # the remainder's bias is below 2 * stride / 2**64
    return phases + rows * stride


def _windows(split: Split, starts: np.ndarray, width: int) -> Batch:
    """Windows of `width` tokens; past the split's end, and for a start of -1, padding."""
    positions = np.arange(width, dtype=np.int32)
    places = starts[:, None] + positions
    real = ((places < split.num_tokens) & (starts[:, None] >= 0)).astype(np.int32)
    return {"tokens": split.tokens[places * real].astype(np.int32) * real, "segment_ids": real, "positions": positions * real}


# --- evaluation -------------------------------------------------------------------------------------------------------


def num_eval_batches(config: Config, split: Split, batch_size: int) -> int:
    """Batches of `eval_batches`."""
    return math.ceil(_eval_rows(config, split) / batch_size)


def _eval_rows(config: Config, split: Split) -> int:
    """Rows that predict the whole split; the last window may be short."""
    if split.rows is not None:
        return len(split.rows)
    stride, width = _window(config, split)
    return math.ceil((split.num_tokens - (width - stride)) / stride)


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
            found = split.rows.batch(split.tokens, numbers, split.columns)
        else:
            stride, width = _window(config, split)
            found = _windows(split, np.where(numbers >= 0, numbers * stride, -1), width)
        yield found if split.corruption is None else split.corruption.evaluation(found, numbers)
