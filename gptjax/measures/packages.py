"""The field's own packages, which the extra `evaluate` brings, imported where they are used."""

from __future__ import annotations

import importlib
from typing import Any

from gptjax.config import UserError

PACKAGES = {
    "sklearn": "scikit-learn",
    "seqeval": "seqeval",
    "sacrebleu": "sacrebleu",
    "rouge_score": "rouge-score",
}


def load(module: str) -> Any:
    """The module of one of PACKAGES. Raises `UserError`, naming the extra, where its package is not installed."""
    root = module.partition(".")[0]
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or error.name.partition(".")[0] != root:
            raise  # the package is there, and broken
        raise UserError(
            f"this measure needs the package {PACKAGES[root]}, which is not installed: pip install 'gptjax[evaluate]'."
        ) from None
