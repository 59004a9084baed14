"""A small run over packed documents, for what looks at runs afterwards."""

from __future__ import annotations

import json
import pathlib
import random
from typing import Any

from gptjax.config import Config
from tests.small import small

KNOBS: dict[str, Any] = {
    "data.source": "jsonl",
    "data.packing": "packed",
    "data.eval_fraction": 0.2,
    "data.seq_len": 32,
    "data.batch_size": 4,
    "data.add_bos": False,
    "model.vocab_size": 0,
    "model.max_seq_len": 32,
    "optimizer.name": "sgd",
    "optimizer.learning_rate": 0.5,
    "optimizer.schedule": "constant",
    "optimizer.warmup_steps": 0,
    "optimizer.weight_decay": 0.0,
    "train.duration_steps": 6,
    "train.accumulation_steps": 2,
    "metrics.every_steps": 1,
    "checkpoint.every_steps": 1,
    "checkpoint.keep_last": 9,
    "evaluate.every_steps": 2,
    "evaluate.batch_size": 4,
    "evaluate.sample_prompt": "a",
    "evaluate.sample_tokens": 3,
}


def write_documents(path: pathlib.Path) -> pathlib.Path:
    """JSON lines of short texts; the same at every call."""
    rng = random.Random(0)
    texts = ["".join(rng.choices("abcdefgh ij", k=rng.randint(3, 30))) for _ in range(60)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def small_run(documents: pathlib.Path, **knobs: Any) -> Config:
    return small(KNOBS, {"data.path": str(documents)}, **knobs)


def quiet(line: str) -> None:
    """A log that nobody reads."""
