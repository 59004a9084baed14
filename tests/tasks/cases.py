"""A tiny run of every kind of task, for what holds for all of them. A new kind joins by its line in CASES."""

from __future__ import annotations

import json
import pathlib
import random
from typing import Any

from gptjax import config as config_lib
from gptjax import recipes
from gptjax.config import Config

_WORDS = ["red", "blue", "green", "cat", "dog", "sun", "Zürich", "北京", "stone", "bird"]

# {name: what its config has beside COMMON}; `task.path` is filled in.
CASES: dict[str, dict[str, Any]] = {
    "classification": {"task.kind": "classification"},
    "adversarial": {"task.kind": "classification", "task.adversarial_norm": 0.3},
    "multilabel": {"task.kind": "multilabel", "task.label": "animals"},
    "regression": {"task.kind": "regression", "task.label": "length,sunny"},
    "tagging": {"task.kind": "tagging", "task.word_token": "all", "task.train_scheme": "IOBES"},
    "answers": {"task.kind": "answers", "task.format": "jsonl"},
    "completion": {
        "task.kind": "completion",
        "task.prompt": "{text} ",
        "task.completion": "{label}",
        "data.seq_len": 48,
        "model.max_seq_len": 48,
    },
}

COMMON: dict[str, Any] = {
    "data.tokenizer": "byte",
    "data.seq_len": 32,
    "data.batch_size": 8,
    "data.eval_fraction": 0.3,
    "data.add_bos": "true",
    "model.num_layers": 1,
    "model.model_dim": 16,
    "model.num_heads": 2,
    "model.max_seq_len": 32,
    "model.residual_dropout": 0.1,
    "optimizer.learning_rate": 0.01,
    "optimizer.epsilon": 1e-4,
    "optimizer.warmup_steps": 0,
    "train.duration_steps": 4,
    "train.accumulation_steps": 2,
    "checkpoint.every_steps": 2,
    "evaluate.every_steps": 2,
    "evaluate.batch_size": 8,
    "evaluate.show_examples": 1,
    "metrics.every_steps": 1,
}


def write_records(path: pathlib.Path, count: int = 40, seed: int = 0) -> pathlib.Path:
    """JSON lines with what every case reads; the same at every call."""
    rng = random.Random(seed)
    lines = []
    for _ in range(count):
        words = rng.choices(_WORDS, k=rng.randint(2, 5))
        text = " ".join(words)
        answer = rng.choice(words)
        record = {
            "text": text,
            "label": "cat" if "cat" in words else "none",
            "animals": [word for word in ("cat", "dog", "bird") if word in words],
            "length": len(words) / 4,
            "sunny": words.count("sun"),
            "words": words,
            "tags": tags_of(words),
            "question": f"{answer[:1]}?",
            "context": text,
            "answers": [{"text": answer, "answer_start": text.index(answer)}] if rng.random() < 0.8 else [],
        }
        lines.append(json.dumps(record, ensure_ascii=False))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def tags_of(words: list[str]) -> list[str]:
    """BIO: runs of cities, and animals, each an entity."""
    kinds = ["CITY" if word in ("Zürich", "北京") else "ANIMAL" if word in ("cat", "dog", "bird") else "" for word in words]
    return [
        "O" if not kind else f"{'I' if before == kind else 'B'}-{kind}" for before, kind in zip(["", *kinds], kinds, strict=False)
    ]


def case(name: str, path: pathlib.Path, **changes: Any) -> Config:
    """The config of a case on the records at `path`; changes such as data__seq_len=16."""
    values = config_lib.defaults()
    flat = COMMON | {"task.path": path} | CASES[name] | {key.replace("__", "."): value for key, value in changes.items()}
    for key, value in flat.items():
        recipes.apply_override(values, f"{key}={value}")
    return config_lib.from_dict(values)
