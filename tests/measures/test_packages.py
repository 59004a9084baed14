"""A package that is missing is named with its extra; one that is broken is not hidden."""

from __future__ import annotations

import builtins
import importlib
import importlib.util
import sys
from typing import Any

import pytest

from gptjax.config import UserError
from gptjax.measures import packages, text


@pytest.mark.parametrize(("missing", "error"), [("sacrebleu", UserError), ("lxml", ModuleNotFoundError)])
def test_a_missing_package_names_the_extra(monkeypatch: pytest.MonkeyPatch, missing: str, error: type[Exception]):
    def absent(name: str) -> Any:
        raise ModuleNotFoundError(f"No module named {missing!r}", name=missing)

    monkeypatch.setattr(importlib, "import_module", absent)
    with pytest.raises(error, match=r"sacrebleu, .* pip install 'gptjax\[evaluate\]'" if error is UserError else "lxml"):
        text.bleu([["a b c d"]], ["a b c d"])


def test_measures_are_imported_without_the_packages(monkeypatch: pytest.MonkeyPatch):
    real = builtins.__import__

    def guarded(name: str, *rest: Any, **named: Any) -> Any:
        assert name.partition(".")[0] not in packages.PACKAGES, f"{name} is imported before it is used"
        return real(name, *rest, **named)

    monkeypatch.setattr(builtins, "__import__", guarded)
    for name in ("answers", "baselines", "calibration", "classification", "regression", "tagging", "text"):
        specification = importlib.util.find_spec(f"gptjax.measures.{name}")
        assert specification is not None and specification.loader is not None
        module = importlib.util.module_from_spec(specification)
        monkeypatch.setitem(sys.modules, specification.name, module)
        specification.loader.exec_module(module)
