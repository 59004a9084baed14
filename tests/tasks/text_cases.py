"""Tiny records and configs for the tasks that write, for preferences, and for several tasks in one run."""

from __future__ import annotations

import json
import pathlib
import random
from typing import Any

from gptjax.config import Config
from tests.small import small

_WORDS = ["red", "blue", "green", "Zürich", "sun", "stone"]

SIZES: dict[str, Any] = {
    "model.vocab_size": 257,
    "model.num_layers": 1,
    "model.max_seq_len": 128,
    "data.seq_len": 128,
    "data.batch_size": 4,
    "data.eval_fraction": 0.3,
    "optimizer.learning_rate": 0.01,
    "optimizer.epsilon": 1e-4,
    "optimizer.warmup_steps": 0,
    "train.duration_steps": 4,
    "train.accumulation_steps": 2,
    "checkpoint.every_steps": 2,
    "evaluate.every_steps": 4,
    "evaluate.batch_size": 4,
    "metrics.every_steps": 1,
}
KINDS: dict[str, dict[str, Any]] = {
    "completion": {"task.completion": "{texts}"},
    "chat": {"task.chat_template": "plain"},
    "preference": {"task.preference_beta": 0.5},
}


def write_records(folder: pathlib.Path, count: int = 20) -> None:
    """FOLDER/records.jsonl with what every kind reads; the same at every call."""
    rng = random.Random(0)
    lines = []
    for _ in range(count):
        a, b, c = rng.sample(_WORDS, 3)
        messages = [{"role": "user", "content": a}, {"role": "assistant", "content": b}, {"role": "user", "content": c}]
        record = {
            "prompt": f"{a} {b}:",
            "texts": [f" {a}", f" {b} {c}"],
            "chosen": f" {a}",
            "rejected": f" {c} {b}",
            "messages": [*messages, {"role": "assistant", "content": a}],
            "text": f"{a} {b}",
            "label": "up" if a < b else "down",
        }
        lines.append(json.dumps(record, ensure_ascii=False))
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def alone(kind: str, folder: pathlib.Path, **knobs: Any) -> Config:
    """One task."""
    return small(SIZES, KINDS[kind], {"task.kind": kind, "task.path": str(folder / "records.jsonl")}, **knobs)


def several(folder: pathlib.Path, **knobs: Any) -> Config:
    """Every kind beside a classification, in one run."""
    path = folder / "records.jsonl"
    mixture = ("label=classification", "write=completion", "talk=chat", "prefer=preference")
    settings = (
        "label.loss_weight=2",
        "write.completion={texts}",
        "write.generate_records=2",
        "write.max_new_tokens=4",
        "talk.chat_template=plain",
        "prefer.preference_beta=0.5",
    )
    knobs = {"task__mixture": tuple(f"{item}:{path}" for item in mixture), "task__mixture_settings": settings} | knobs
    return small(SIZES, **knobs)
