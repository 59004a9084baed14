"""What a model writes where a task asks it: answers to the first prompts of the evaluation's records."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

from gptjax.adapters.merge import for_writing
from gptjax.config import Config, TaskConfig, tasks_of
from gptjax.data.records import Record
from gptjax.data.tokenizers import Tokenizer
from gptjax.generate.decode import bucket
from gptjax.generate.settings import GenerationConfig
from gptjax.generate.text import generate_text
from gptjax.tasks.base import Judged, Request
from gptjax.tasks.load import encoder
from gptjax.tasks.table import TASKS
from gptjax.tasks.writing import Written, figures
from gptjax.train.step import decoder_params

Answers = dict[bytes, Written]  # by the prompt's ids


def answer(
    config: Config, params: Any, tokenizer: Tokenizer, records: Mapping[str, Sequence[Record]], seed: int = 0
) -> dict[str, Answers]:
    """{task: what was written to its first `generate_records` prompts}, of the tasks that ask. Records of one prompt share their
    references. An answer is a function of (parameters, prompt, seed) alone.
    """
    config, params = for_writing(config, params)
    found: dict[str, Answers] = {}
    for name, knobs in tasks_of(config).items():
        if knobs.generate_records:
            asked = _requests(config, knobs, tokenizer, records[name])
            chosen = dict(itertools.islice(asked.items(), knobs.generate_records))
            found[name] = _write(config, knobs, params, tokenizer, chosen, seed)
    return found


def _requests(config: Config, knobs: TaskConfig, tokenizer: Tokenizer, records: Sequence[Record]) -> dict[bytes, Request]:
    encode = encoder(config, tokenizer)
    found: dict[bytes, Request] = {}
    for record in records:
        request = TASKS[knobs.kind].request(knobs, record.values, encode)
        if request is not None and len(request.ids):
            key = request.ids.tobytes()
            before = found[key].references if key in found else ()
            found[key] = request._replace(references=tuple(dict.fromkeys((*before, *request.references))))
    return found


def settings_of(knobs: TaskConfig) -> GenerationConfig:
    return GenerationConfig(
        max_new_tokens=knobs.max_new_tokens,
        temperature=knobs.temperature,
        do_sample=knobs.num_beams == 1,
        num_beams=knobs.num_beams,
        stop_strings=knobs.stop_strings,
    )


def _write(
    config: Config, knobs: TaskConfig, params: Any, tokenizer: Tokenizer, requests: Mapping[bytes, Request], seed: int
) -> Answers:
    """Prompts of like lengths together, batches filled up by their first prompt, so that few shapes are compiled."""
    size = min(config.evaluate.batch_size or config.data.batch_size, len(requests))
    by_bucket: dict[int, list[bytes]] = {}
    for key, request in requests.items():
        by_bucket.setdefault(bucket(len(request.ids)), []).append(key)
    found: Answers = {}
    for keys in by_bucket.values():
        for batch in [keys[start : start + size] for start in range(0, len(keys), size)]:
            prompts = [requests[key].ids for key in batch] + [requests[batch[0]].ids] * (size - len(batch))
            written = generate_text(decoder_params(params), config, tokenizer, prompts, settings_of(knobs), seed=seed)
            for key, one in zip(batch, written, strict=False):
                request = requests[key]
                found[key] = Written(request.shown, request.references, one.text, one.finish_reason != "length")
    return {key: found[key] for key in requests}


def figures_of(config: Config, answers: Mapping[str, Answers]) -> dict[str, dict[str, float]]:
    """{task: what its answers are worth}."""
    return {name: figures(tasks_of(config)[name], list(own.values())) for name, own in answers.items() if own}


def with_answers(config: Config, tokenizer: Tokenizer, name: str, judged: Sequence[Judged], answers: Answers) -> list[Judged]:
    """The judged records of a task, `predicted` being what was written where its prompt was asked."""
    knobs, encode, left = tasks_of(config)[name], encoder(config, tokenizer), dict(answers)
    found = []
    for one in judged:
        request = TASKS[knobs.kind].request(knobs, one.record, encode)
        key = request.ids.tobytes() if request is not None else b""
        own = answers.get(key)
        if own is not None:  # of several records with one prompt, the answer counts with the first
            one = dataclasses.replace(one, predicted=own.text, written=left.pop(key, None))
        found.append(one)
    return found
