"""The files of a run's tasks to rows of examples: what `data.pipeline.load_dataset` is for documents."""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from gptjax.attacks.augment import adversarial, copied
from gptjax.attacks.perturbations import PERTURBATIONS
from gptjax.config import Config, TaskConfig, UserError, tasks_of, with_tasks
from gptjax.data.packing import pack
from gptjax.data.pipeline import Dataset, Mixture, Split, mixture_of
from gptjax.data.records import BadRow, Record, Records, read_records, skipped_rows, too_many
from gptjax.data.sources import nearest
from gptjax.data.tokenizers import Tokenizer, make_tokenizer, trained_tokenizer
from gptjax.generate.chat import Refused
from gptjax.tasks.base import Encoded, Encoder
from gptjax.tasks.table import TASKS

SPLITS = ("train", "eval")


# Of each split, the bad rows that were skipped where it was read: one list where both splits are of the same files.
Skipped = dict[str, list[BadRow]]


class Example(NamedTuple):
    """Whose an example is: which task's, which of its records, and which of the record's examples."""

    task: str
    record: int
    part: int


@dataclass(frozen=True)
class TaskDataset(Dataset):
    """Rows of examples, and the records that they are made of."""

    tasks: dict[str, TaskConfig]  # with what the training records settled
    records: dict[str, dict[str, list[Record]]]  # by split and task
    examples: dict[str, list[Example]]  # by split, as the column "example" counts them, from 1

    def settled(self, config: Config) -> Config:
        return with_tasks(super().settled(config), self.tasks)


def load_tasks(config: Config, log: Callable[[str], Any] = print, own: Tokenizer | None = None) -> TaskDataset:
    """Reads, splits, encodes and packs the records of all tasks. Raises `UserError`. `own`: the tokenizer of a trained model."""
    began = time.perf_counter()
    records: dict[str, dict[str, list[Record]]] = {split: {} for split in SPLITS}
    skipped: dict[str, Skipped] = {}
    settled: dict[str, TaskConfig] = {}
    report: dict[str, Any] = {}
    for name, knobs in tasks_of(config).items():
        parts, skipped[name] = _read(config, knobs, log)
        values = [record.values for record in parts["train"]]
        settled[name] = TASKS[knobs.kind].settled(knobs, values)
        for remark in TASKS[knobs.kind].remarks(settled[name], values):
            log(f"data: {remark}")
        for split in SPLITS:
            _check(settled[name], parts[split])
            records[split][name] = parts[split]
    config = with_tasks(config, settled)
    tokenizer = own or _tokenizer(config)
    splits: dict[str, dict[str, Split]] = {}
    examples: dict[str, list[Example]] = {}
    for split in SPLITS:
        bad = {name: of[split] for name, of in skipped.items()}
        splits[split], examples[split], counts = _of_tasks(config, split, records[split], bad, tokenizer, log)
        for key, count in counts.items():
            report.setdefault(key, {})[split] = count
    report |= {"vocab_size": tokenizer.vocab_size, "seconds": round(time.perf_counter() - began, 3)}
    train: Split | Mixture
    held_out: Split | dict[str, Split]
    if config.task.mixture:
        train, held_out = mixture_of(config, splits["train"]), splits["eval"]
    else:
        train, held_out = (next(iter(splits[split].values())) for split in SPLITS)
    return TaskDataset(tokenizer, train, held_out, report, tokenizer, settled, records, examples)


def _of_tasks(
    config: Config,
    split: str,
    records: dict[str, list[Record]],
    skipped: Mapping[str, list[BadRow]],
    tokenizer: Tokenizer,
    log: Callable[[str], Any],
) -> tuple[dict[str, Split], list[Example], collections.Counter[str]]:
    """({task: its own rows}, the examples of all, counted on from task to task, sums of the counts). Records that cannot be
    written as examples go from `records` to `skipped`.
    """
    splits: dict[str, Split] = {}
    examples: list[Example] = []
    total: collections.Counter[str] = collections.Counter()
    for name, own in records.items():
        encoded, bad = _all_encoded(tasks_of(config)[name], own, encoder(config, tokenizer), skipped[name])
        if bad:
            log(f"data: {split}: {skipped_rows(bad)}.")
        records[name] = [record for record, _ in encoded]
        splits[name], more, counts = _split_of_task(config, split, name, encoded, tokenizer, len(examples))
        examples += more
        total.update(counts)
        log(_described(f"{name}: {split}" if config.task.mixture else split, counts))
    return splits, examples, total


def _tokenizer(config: Config) -> Tokenizer:
    data = config.data
    if data.tokenizer == "init_from":
        return trained_tokenizer(config.init_from)
    if data.tokenizer in ("char", "sentencepiece") and not data.tokenizer_path:
        raise UserError(
            f"data.tokenizer={data.tokenizer} is made from documents, and a task has none: take data.tokenizer=init_from, or "
            "name a file by data.tokenizer_path."
        )
    return make_tokenizer(data, {})


def _read(config: Config, knobs: TaskConfig, log: Callable[[str], Any]) -> tuple[dict[str, list[Record]], Skipped]:
    parts, skipped = _divided(config, knobs, log)
    if knobs.augment:
        copies = _augmented(config, knobs, parts["train"])
        log(f"data: {len(copies):,} copies of training records, changed by {knobs.augment}.")
        parts["train"] = [*parts["train"], *copies]
    return parts, skipped


def _divided(config: Config, knobs: TaskConfig, log: Callable[[str], Any]) -> tuple[dict[str, list[Record]], Skipped]:
    required = TASKS[knobs.kind].needs(knobs)

    def of(path: str, key: str = "task.path", split: str = knobs.train_split) -> Records:
        return read(knobs, path, key, required, log, split=split)

    every = of(knobs.path)
    if knobs.eval_path or (knobs.format == "tfds" and knobs.eval_split):
        other = of(knobs.eval_path, "task.eval_path") if knobs.eval_path else of(knobs.path, split=knobs.eval_split)
        return {"train": every.records, "eval": other.records}, {"train": every.skipped, "eval": other.skipped}
    held_out = [_is_held_out(record, config.data.eval_fraction) for record in every]
    parts = {
        "train": [record for record, out in zip(every, held_out, strict=True) if not out],
        "eval": [record for record, out in zip(every, held_out, strict=True) if out],
    }
    if empty := [split for split in SPLITS if not parts[split]]:
        raise UserError(
            f"{knobs.path} has {len(every)} records, of which data.eval_fraction={config.data.eval_fraction} leaves none for the "
            f"{empty[0]} split; give more, or task.eval_path."
        )
    return parts, dict.fromkeys(SPLITS, every.skipped)


def _augmented(config: Config, knobs: TaskConfig, records: Sequence[Record]) -> list[Record]:
    """Changed copies of some records, a function of (train.seed, records). Raises `UserError`."""
    if knobs.augment not in PERTURBATIONS:
        raise UserError(
            f"task.augment={knobs.augment} is none of {', '.join(PERTURBATIONS)}{nearest(knobs.augment, [*PERTURBATIONS])}"
        )
    fields = sorted(TASKS[knobs.kind].given(knobs))
    found = []
    for number in copied(len(records), config.train.seed, knobs.augment_share):
        values = records[number].values
        changed = {
            name: adversarial(values[name], config.train.seed, number, knobs.augment, knobs.augment_words)
            for name in fields
            if isinstance(values[name], str)
        }
        found.append(dataclasses.replace(records[number], values=values | changed))
    return found


def read(
    knobs: TaskConfig,
    path: str,
    key: str,
    required: Collection[str],
    log: Callable[[str], Any],
    format: str = "",
    split: str = "train",
) -> Records:
    """The records of a task's files, in `format` or that of the task; of a TFDS data set, those of `split`. Raises
    `UserError`.
    """
    return read_records(
        path,
        format or knobs.format,
        max_bad=knobs.max_bad_rows,
        limit_key="task.max_bad_rows",
        columns=knobs.columns,
        word_column=knobs.word_column,
        tag_column=knobs.tag_column,
        tfds_name=knobs.tfds_name,
        tfds_split=split,
        required=sorted(required),
        check=functools.partial(TASKS[knobs.kind].check, knobs),
        key=key,
        log=lambda line: log(f"data: {line}."),
    )


def _is_held_out(record: Record, share: float) -> bool:
    """By a hash of the content, so that equal records are on one side, wherever they stand."""
    text = json.dumps(record.values, sort_keys=True, ensure_ascii=False, default=str)
    digest = hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()
    return int.from_bytes(digest) < share * 2**64


def _check(knobs: TaskConfig, records: Sequence[Record]) -> None:
    for record in records:
        if reason := TASKS[knobs.kind].check(knobs, record.values):
            raise UserError(f"{record.place} {reason}.")


def encoder(config: Config, tokenizer: Tokenizer) -> Encoder:
    return Encoder(tokenizer, config.data.add_bos, config.data.add_eos, config.data.seq_len)


def _all_encoded(
    knobs: TaskConfig, records: Sequence[Record], encode: Encoder, skipped: list[BadRow]
) -> tuple[list[tuple[Record, list[Encoded]]], list[BadRow]]:
    """(the records with their examples, the bad rows that only show now, added to `skipped`). Raises `UserError`."""
    found, bad = [], []
    for record in records:
        try:
            found.append((record, TASKS[knobs.kind].encode(knobs, record.values, encode)))
        except Refused as error:
            bad.append(BadRow(record.file, record.line, f"cannot be written: {str(error).rstrip('.')}"))
            skipped.append(bad[-1])
            if len(skipped) > knobs.max_bad_rows:
                raise UserError(too_many(skipped, knobs.max_bad_rows, "task.max_bad_rows")) from None
        except UserError as error:
            raise UserError(f"{record.place}: {str(error).rstrip('.')}.") from None
    return found, bad


def _split_of_task(
    config: Config,
    split: str,
    task: str,
    records: Sequence[tuple[Record, Sequence[Encoded]]],
    tokenizer: Tokenizer,
    first: int,
) -> tuple[Split, list[Example], dict[str, int]]:
    """(rows of the examples of a task's records, whose they are, counts of what became of them). Raises `UserError`.

    `first`: how many examples were counted before.
    """
    knobs = tasks_of(config)[task]
    found: list[tuple[Example, Encoded]] = []
    names: list[str] = []
    cut = dropped = 0
    for number, (record, parts) in enumerate(records):
        if any(part.cut for part in parts):
            if knobs.too_long == "refuse":
                raise UserError(f"{record.place} has more than data.seq_len={config.data.seq_len} tokens.")
            if knobs.too_long == "drop":
                dropped += 1
                continue
            cut += 1
        found += [(Example(task, number, place), part) for place, part in enumerate(parts)]
        names += [f"{record.file}:{record.line}"] * len(parts)
    built = split_of(config, split, found, names, tokenizer, task if config.task.mixture else "", first)
    counts = {
        "documents": len(records),
        "examples": len(found),
        "tokens": built.num_tokens,
        "bytes": built.text_bytes,
        "rows": len(built.rows or ()),
        "cut": cut,
        "dropped": dropped,
    }
    return built, [example for example, _ in found], counts


def split_of(
    config: Config,
    split: str,
    found: Sequence[tuple[Example, Encoded]],
    names: Sequence[str],
    tokenizer: Tokenizer,
    source: str = "",
    first: int = 0,
) -> Split:
    """The rows of examples, by data.packing and data.seq_len. Raises `UserError` where there is none.

    `source`: the name of their task, where there are several; `first`: how many examples were counted before.
    """
    lengths = np.asarray([len(part.tokens) for _, part in found], np.int64)
    if not len(lengths):
        of = f" of {source}" if source else ""
        raise UserError(f"the {split} split{of} has no example of at most data.seq_len={config.data.seq_len} tokens.")
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    tokens = np.concatenate([part.tokens for _, part in found]).astype(np.int32)
    rows = pack(offsets, config.data.seq_len, overlap=0, alone=config.data.packing == "padded")
    # A batch is seq_len + 1 long, of which the model reads seq_len: the last place stays empty.
    rows = dataclasses.replace(rows, capacity=config.data.seq_len + 1)
    if any(part.parts for _, part in found):
        sizes = [part.parts or (len(part.tokens),) for _, part in found]
        ends = np.cumsum([len(one) for one in sizes])
        rows = rows.cut_into(np.concatenate(sizes).astype(np.int64), np.concatenate([[0], ends]).astype(np.int64))
    text_bytes = int(tokenizer.token_bytes()[tokens].sum())
    columns = _columns(config, found, lengths, first)
    return Split(split, tokens, offsets, list(names), text_bytes, rows, source=source, columns=columns)


def _columns(config: Config, found: Sequence[tuple[Example, Encoded]], lengths: np.ndarray, first: int) -> dict[str, np.ndarray]:
    numbers = {name: number for number, name in enumerate(tasks_of(config), 1)}
    columns = {
        "example": np.repeat(np.arange(first + 1, first + len(found) + 1, dtype=np.int32), lengths),
        "task": np.repeat(np.asarray([numbers[example.task] for example, _ in found], np.int32), lengths),
        "read": np.concatenate([part.read for _, part in found]).astype(np.int32),
    }
    for name, knobs in tasks_of(config).items():
        for column, like in TASKS[knobs.kind].columns(knobs).items():
            none = np.zeros((0, *like.shape[1:]), like.dtype)
            if not any(example.task == name for example, _ in found):
                columns[f"{name}/{column}"] = np.broadcast_to(np.zeros((), like.dtype), (int(lengths.sum()), *like.shape[1:]))
                continue
            columns[f"{name}/{column}"] = np.concatenate(
                [
                    part.columns[column].astype(like.dtype)
                    if example.task == name
                    else np.zeros((len(part.tokens), *like.shape[1:]), like.dtype)
                    for example, part in found
                ]
                or [none]
            )
    return columns


def _described(split: str, counts: Mapping[str, int]) -> str:
    changed = ", ".join(f"{counts[what]:,} {what}" for what in ("cut", "dropped") if counts[what])
    return (
        f"data: {split}: {counts['documents']:,} records, {counts['examples']:,} examples, {counts['tokens']:,} tokens, "
        f"{counts['rows']:,} rows{f'; {changed}' if changed else ''}."
    )


def task_batch_arrays(config: Config) -> dict[str, tuple[tuple[int, ...], np.dtype]]:
    """{array of a batch: (shape behind [B, T + 1], type)}."""
    arrays: dict[str, tuple[tuple[int, ...], np.dtype]] = {
        name: ((), np.dtype(np.int32)) for name in ("tokens", "segment_ids", "positions", "example", "task", "read")
    }
    for name, knobs in tasks_of(config).items():
        for column, like in TASKS[knobs.kind].columns(knobs).items():
            arrays[f"{name}/{column}"] = (like.shape[1:], like.dtype)
    return arrays
