"""Every pair of an adapter's knobs, and of these and what they meet, as test_pairs.py has it; of tasks' knobs, the door alone:
each kind is trained in tests/tasks.
"""

from __future__ import annotations

import pytest

from tests.test_pairs import FACTORS, Factors, all_pairs, check_names, check_rows, refusal

# What only some methods have stands with them.
_METHODS = {
    "none": {},
    "lora": {},
    "lora, dropped": {"adapter.dropout": 0.1},
    "lora, int8": {"adapter.base": "int8"},
    "dora": {"adapter.dropout": 0.1, "adapter.base": "int8"},
    "ia3": {"adapter.base": "int8"},
    "prompt": {"adapter.prompt_length": 3, "data.packing": "padded"},
    "prefix": {"adapter.prompt_length": 3, "data.packing": "padded"},
    "bitfit": {"adapter.base": "int8"},
}
ADAPTERS: Factors = {
    "adapter.method": {one: {"adapter.method": one.split(",")[0]} | more for one, more in _METHODS.items()},
    "adapter.shared_input": {str(one): {"adapter.shared_input": one} for one in (False, True)},
    "adapter.rank_stabilised": {str(one): {"adapter.rank_stabilised": one} for one in (False, True)},
}
MEETS = ("model.tied_embeddings", "model.residual_dropout", "train.accumulation_steps")
TRAINED: Factors = ADAPTERS | {name: FACTORS[name] for name in MEETS}
_AT = {"task.path": "records.jsonl", "data.packing": "padded"}
TASKS: Factors = {
    "task.kind": {
        "none": {"task.kind": "none"},
        **{
            kind: {"task.kind": kind} | _AT
            for kind in ("classification", "multilabel", "regression", "tagging", "answers", "completion", "chat", "preference")
        },
    },
    "objective.name": FACTORS["objective.name"],
    "optimizer.name": FACTORS["optimizer.name"],
    "model.prediction_heads": FACTORS["model.prediction_heads"],
}
DOOR = TASKS | TRAINED


def test_a_refusal_names_both_options() -> None:
    check_names({pair: refusal(pair, DOOR) for pair in all_pairs(DOOR)})


def test_a_step_with_every_pair_of_an_adapter_s_options(capsys: pytest.CaptureFixture) -> None:
    check_rows({pair: refusal(pair, TRAINED) for pair in all_pairs(TRAINED)}, 0, capsys, TRAINED, parts=1)
