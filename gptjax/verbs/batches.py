"""`gptjax generate --prompts=FILE`: many prompts in batches of like lengths, answered in the file's order."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any, TextIO

import numpy as np

from gptjax.config import UserError
from gptjax.generate.decode import bucket
from gptjax.generate.settings import GenerationConfig
from gptjax.generate.text import generate_text, prompt_ids
from gptjax.generate.timing import Speed
from gptjax.parallel import hosts
from gptjax.verbs.generate import guided, sample_as_dict
from gptjax.verbs.output import log, plain, print_json
from gptjax.verbs.prompts import Line


def answer_lines(
    model: Any, lines: Sequence[Line], settings: GenerationConfig, arguments: argparse.Namespace, template: str | None
) -> int:
    """Writes one record a sample, in the order of the lines, as soon as all before it are done.

    A line that cannot be answered gets a record with the reason, and the others are answered; then the status is 2.
    """
    records: dict[int, list[dict[str, Any]]] = {}
    ids: dict[int, Any] = {}
    for number, line in enumerate(lines):
        try:
            if line.error:
                raise UserError(line.error)
            ids[number] = prompt_ids(model.config, model.tokenizer, line.prompt, template)
            settings.limits(np.array([len(ids[number])]))
        except UserError as error:
            ids.pop(number, None)
            records[number] = [{"id": line.id, "error": f"{line.where}: {error}"}]
    refused = [found[0]["error"] for found in records.values()]
    speed, options = Speed(), guided(model, settings, arguments)
    with _opened(arguments.output) as file:
        written = _write(file, records, 0)
        for batch in batches({number: len(row) for number, row in ids.items()}, settings, arguments.batch_size):
            padded = batch + batch[:1] * (_rows(len(batch), settings, arguments.batch_size) - len(batch))
            completions = generate_text(
                model.params, model.config, model.tokenizer, [ids[number] for number in padded], settings,
                seed=arguments.seed, speed=speed, **options, texts=[_text(lines[number].prompt) for number in padded],
            )  # fmt: skip
            for i, completion in enumerate(completions[: len(batch) * settings.num_return_sequences]):
                number = batch[i // settings.num_return_sequences]
                record = sample_as_dict(completion) | {"prompt": lines[number].prompt}
                records.setdefault(number, []).append({"id": lines[number].id} | record)
            written = _write(file, records, written)
    summary = {"prompts": len(lines), "answered": len(ids), "refused": len(refused), "speed": speed.as_dict()}
    if arguments.json:
        print_json({"step": model.step} | summary)
    log(f"{len(ids)} prompts answered{f', {len(refused)} refused' if refused else ''}; {speed}.")
    if refused:
        log(f"gptjax: {len(refused)} of {len(lines)} prompts were refused, the first: {refused[0]}")
    return 2 if refused else 0


def batches(lengths: dict[int, int], settings: GenerationConfig, batch_size: int) -> list[list[int]]:
    """The prompts in groups whose lengths share a compilation; what comes first in the file comes first."""
    each = max(1, batch_size // settings.num_return_sequences)
    by_bucket: dict[int, list[int]] = {}
    for number in sorted(lengths):
        by_bucket.setdefault(bucket(lengths[number]), []).append(number)
    groups = [group[i : i + each] for group in by_bucket.values() for i in range(0, len(group), each)]
    return sorted(groups)


def _rows(count: int, settings: GenerationConfig, batch_size: int) -> int:
    """Prompts that a batch of `count` is filled up to: a power of two, so that the last ones need few compilations."""
    each = max(1, batch_size // settings.num_return_sequences)
    return min(each, 1 << (count - 1).bit_length())


def _text(prompt: Any) -> str | None:
    return prompt if isinstance(prompt, str) else None


@contextlib.contextmanager
def _opened(name: str | None) -> Iterator[TextIO | None]:
    """Where records go; None in the processes that don't write."""
    if not hosts.is_primary():
        yield None
        return
    if name is None:
        yield sys.stdout
        return
    try:
        file = open(name, "w", encoding="utf-8")  # noqa: SIM115 - closed below; only its opening may be the person's mistake
    except OSError as error:
        raise UserError(f"--output={name} cannot be written: {error.strerror}.") from None
    with file:
        yield file


def _write(file: TextIO | None, records: dict[int, list[dict[str, Any]]], start: int) -> int:
    """Writes the records from number `start` on up to the first that is not there yet; that one's number."""
    while start in records:
        for record in records.pop(start):
            if file is not None:
                file.write(json.dumps(plain(record), ensure_ascii=False, allow_nan=False) + "\n")
        start += 1
    if file is not None:
        file.flush()
    return start
