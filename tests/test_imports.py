"""The layers of the package, held by reading its imports: nothing here is imported or run."""

from __future__ import annotations

import ast
import pathlib
from collections.abc import Iterator

import pytest

REPOSITORY = pathlib.Path(__file__).resolve().parents[1]
PACKAGE = REPOSITORY / "gptjax"

# Module or package: what it may import from gptjax, each name standing for everything below it. The longest matching name rules.
# A package always sees its own modules unless these have lines of their own.
ALLOWED: dict[str, tuple[str, ...]] = {
    "gptjax.config": ("gptjax.config",),
    "gptjax.recipes": ("gptjax.config", "gptjax.interop.huggingface"),
    "gptjax.runtime": (),
    "gptjax.data": ("gptjax.config", "gptjax.data"),
    "gptjax.parallel": ("gptjax.config", "gptjax.parallel"),
    "gptjax.model": ("gptjax.config", "gptjax.parallel.pipeline", "gptjax.parallel.sharding", "gptjax.model"),
    "gptjax.adapters": ("gptjax.config", "gptjax.model", "gptjax.parallel.sharding", "gptjax.adapters"),
    "gptjax.adapters.peft": ("gptjax.config", "gptjax.model", "gptjax.interop", "gptjax.adapters"),
    "gptjax.train.objectives": ("gptjax.config",),
    "gptjax.train.adversarial": ("gptjax.config", "gptjax.model", "gptjax.parallel.sharding"),
    "gptjax.train.groups": ("gptjax.config", "gptjax.model.parameterization"),
    **{f"gptjax.train.{rule}": () for rule in ("soap", "sophia", "prodigy")},
    "gptjax.train.optimizers": (
        "gptjax.config",
        "gptjax.train.groups",
        "gptjax.train.prodigy",
        "gptjax.train.soap",
        "gptjax.train.sophia",
        "gptjax.train.state_precision",
    ),
    "gptjax.train.state": ("gptjax.config",),
    "gptjax.train.stop": ("gptjax.parallel.hosts",),
    "gptjax.train.rewind": ("gptjax.config",),
    "gptjax.train.agreement": (),
    "gptjax.train.feed": (
        "gptjax.config",
        "gptjax.data",
        "gptjax.parallel",
        "gptjax.train.optimizers",
        "gptjax.train.step",
    ),
    "gptjax.train.provenance": (
        "gptjax.config",
        "gptjax.data",
        "gptjax.tasks.load",
        "gptjax.train.manifest",
        "gptjax.train.run",
    ),
    "gptjax.train.reproduction": ("gptjax.config", "gptjax.data", "gptjax.parallel", "gptjax.recipes", "gptjax.train"),
    "gptjax.train.replay_report": ("gptjax.train.documents", "gptjax.train.replay"),
    "gptjax.train.attribution": (
        "gptjax.config",
        "gptjax.model",
        "gptjax.parallel.sharding",
        "gptjax.tasks.losses",
        "gptjax.train",
    ),
    "gptjax.train.documents": (
        "gptjax.config",
        "gptjax.data",
        "gptjax.tasks.load",
        "gptjax.train.attribution",
        "gptjax.train.state",
    ),
    "gptjax.train.replay": (
        "gptjax.config",
        "gptjax.data",
        "gptjax.parallel",
        "gptjax.recipes",
        "gptjax.tasks",
        "gptjax.train",
    ),
    "gptjax.train.state_precision": ("gptjax.config", "gptjax.model.primitives"),
    "gptjax.train.flops": ("gptjax.config",),
    "gptjax.train.counts": ("gptjax.config", "gptjax.train.groups", "gptjax.train.step"),
    "gptjax.train.metrics": ("gptjax.config", "gptjax.train.flops"),
    "gptjax.train.curve": ("gptjax.train.metrics",),
    "gptjax.train.loss": ("gptjax.model.primitives", "gptjax.parallel.sharding"),
    "gptjax.train.manifest": ("gptjax.train.run",),
    "gptjax.train.run": ("gptjax.config",),
    "gptjax.train.checkpoints": ("gptjax.config", "gptjax.train.manifest", "gptjax.train.run"),
    "gptjax.tasks": (
        "gptjax.attacks",
        "gptjax.config",
        "gptjax.data",
        "gptjax.generate.chat",
        "gptjax.measures",
        "gptjax.model",
        "gptjax.parallel.sharding",
        "gptjax.train.loss",
        "gptjax.tasks",
    ),
    "gptjax.tasks.predict": (
        "gptjax.config",
        "gptjax.data",
        "gptjax.parallel",
        "gptjax.tasks",
        "gptjax.train.metrics",
        "gptjax.train.restore",
        "gptjax.train.task_evaluation",
    ),
    "gptjax.train.task_evaluation": (
        "gptjax.config",
        "gptjax.data",
        "gptjax.parallel",
        "gptjax.tasks",
        "gptjax.train.step",
        "gptjax.train.task_writing",
    ),
    "gptjax.train.task_writing": (
        "gptjax.adapters.merge",
        "gptjax.config",
        "gptjax.data",
        "gptjax.generate",
        "gptjax.tasks",
        "gptjax.train.step",
    ),
    "gptjax.train.reference": (
        "gptjax.config",
        "gptjax.data",
        "gptjax.parallel",
        "gptjax.tasks",
        "gptjax.train.task_evaluation",
    ),
    "gptjax.train.step": (
        "gptjax.adapters",
        "gptjax.config",
        "gptjax.model",
        "gptjax.parallel",
        "gptjax.tasks.losses",
        "gptjax.train.adversarial",
        "gptjax.train.groups",
        "gptjax.train.loss",
        "gptjax.train.objectives",
        "gptjax.train.optimizers",
        "gptjax.train.soap",
        "gptjax.train.sophia",
        "gptjax.train.state",
        "gptjax.train.state_precision",
    ),
    "gptjax.train.restore": (
        "gptjax.adapters",
        "gptjax.config",
        "gptjax.data.reserved",
        "gptjax.data.tokenizers",
        "gptjax.generate.weights",
        "gptjax.interop",
        "gptjax.model.parameterization",
        "gptjax.parallel",
        "gptjax.tasks.losses",
        "gptjax.train.checkpoints",
        "gptjax.train.optimizers",
        "gptjax.train.run",
        "gptjax.train.state",
        "gptjax.train.step",
    ),
    "gptjax.train.convert": (
        "gptjax.adapters",
        "gptjax.config",
        "gptjax.data.tokenizers",
        "gptjax.interop",
        "gptjax.model.parameterization",
        "gptjax.recipes",
        "gptjax.tasks.losses",
        "gptjax.tasks.table",
        "gptjax.train.checkpoints",
        "gptjax.train.restore",
        "gptjax.train.run",
    ),
    "gptjax.train.evaluate": (
        "gptjax.config",
        "gptjax.data",
        "gptjax.model",
        "gptjax.parallel",
        "gptjax.train.loss",
        "gptjax.train.objectives",
        "gptjax.train.step",
    ),
    "gptjax.train.coordinates": (
        "gptjax.config",
        "gptjax.data",
        "gptjax.model",
        "gptjax.parallel",
        "gptjax.train.objectives",
        "gptjax.train.optimizers",
        "gptjax.train.step",
    ),
    "gptjax.train.loading": (
        "gptjax.config",
        "gptjax.data.tokenizers",
        "gptjax.interop",
        "gptjax.parallel",
        "gptjax.recipes",
        "gptjax.train",
    ),
    "gptjax.train.loop": (
        "gptjax.adapters",
        "gptjax.config",
        "gptjax.data",
        "gptjax.generate",
        "gptjax.interop",
        "gptjax.model",
        "gptjax.parallel",
        "gptjax.tasks",
        "gptjax.train",
    ),
    "gptjax.generate": (
        "gptjax.adapters.compose",
        "gptjax.config",
        "gptjax.data.reserved",
        "gptjax.data.tokenizer_base",
        "gptjax.data.tokenizers",
        "gptjax.model",
        "gptjax.parallel",
        "gptjax.generate",
    ),
    "gptjax.interop": (
        "gptjax.config",
        "gptjax.data.reserved",
        "gptjax.data.tokenizers",
        "gptjax.model",
        "gptjax.parallel",
        "gptjax.interop",
    ),
    "gptjax.harness": (
        "gptjax.adapters.compose",
        "gptjax.config",
        "gptjax.data.records",
        "gptjax.data.sources",
        "gptjax.generate",
        "gptjax.harness",
        "gptjax.measures.bootstrap",
        "gptjax.model",
        "gptjax.parallel",
        "gptjax.train.loss",
        "gptjax.train.step",
    ),
    "gptjax.plan": ("gptjax.config", "gptjax.model", "gptjax.parallel", "gptjax.train", "gptjax.plan"),
    "gptjax.measures": ("gptjax.config", "gptjax.measures"),
    "gptjax.pages": ("gptjax.config", "gptjax.pages"),
    "gptjax.analysis": ("gptjax.config", "gptjax.measures", "gptjax.pages", "gptjax.analysis"),
    "gptjax.report": (
        "gptjax.config",
        "gptjax.pages",
        "gptjax.report",
        "gptjax.sweeps",
        "gptjax.train.flops",
        "gptjax.train.metrics",
        "gptjax.train.run",
    ),
    "gptjax.sweeps": (
        "gptjax.config",
        "gptjax.measures.bootstrap",
        "gptjax.pages",
        "gptjax.recipes",
        "gptjax.sweeps",
        "gptjax.train.metrics",
        "gptjax.train.run",
    ),
    "gptjax.scaling": (
        "gptjax.config",
        "gptjax.pages",
        "gptjax.recipes",
        "gptjax.scaling",
        "gptjax.sweeps",
        "gptjax.train.flops",
        "gptjax.train.run",
    ),
    "gptjax.attacks": (
        "gptjax.attacks",
        "gptjax.config",
        "gptjax.data.records",
        "gptjax.data.sources",
        "gptjax.measures.bootstrap",
        "gptjax.measures.measured",
    ),
    "gptjax.cli": ("gptjax",),
    "gptjax.verbs": ("gptjax",),
    "gptjax.__main__": ("gptjax",),
}

# Outside packages that a part may not touch: data is numpy only, and nothing needs TensorFlow or unpickles what a stranger wrote.
FORBIDDEN: dict[str, tuple[str, ...]] = {
    "gptjax": ("configs", "experiments", "tests", "tensorflow", "pickle"),
    **{
        f"gptjax.{name}": ("torch", "transformers")
        for name in ("cli", "generate", "harness", "model", "parallel", "plan", "train")
    },
    "gptjax.config": ("jax", "flax", "optax", "orbax", "grain", "torch", "transformers"),
    **{
        f"gptjax.{name}": ("jax", "flax", "optax", "orbax", "torch", "transformers")
        for name in ("analysis", "attacks", "data", "measures", "pages", "report", "scaling")
    },
}


def below(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def module_name(path: pathlib.Path, root: pathlib.Path) -> str:
    parts = path.relative_to(root).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def imports(path: pathlib.Path, name: str, known: set[str]) -> Iterator[tuple[int, str]]:
    """(line, module) of every import, those inside functions too; `from package import module` counts as the module."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"), str(path))):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            package = name.split(".") if path.name == "__init__.py" else name.split(".")[:-1]
            base = (
                ".".join(package[: len(package) - node.level + 1] + [node.module or ""]).rstrip(".")
                if node.level
                else node.module or ""
            )
            for alias in node.names:
                full = f"{base}.{alias.name}"
                yield node.lineno, full if full in known else base


def rule(name: str) -> tuple[str, ...] | None:
    if name == "gptjax":  # the public names, imported when they are used
        return ("gptjax.generate", "gptjax.train.loading")
    matching = [package for package in ALLOWED if below(name, package)]
    return ALLOWED[max(matching, key=len)] if matching else None


def violations(root: pathlib.Path) -> list[str]:
    """One sentence for each import in root/gptjax that its module may not have."""
    modules = {module_name(path, root): path for path in sorted((root / "gptjax").rglob("*.py"))}
    found = []
    for name, path in modules.items():
        allowed = rule(name)
        is_empty_package = path.name == "__init__.py" and not list(imports(path, name, set(modules)))
        if allowed is None and name != "gptjax" and not is_empty_package:
            found.append(f"{name} has no rule: add a line for it to ALLOWED.")
        for line, target in imports(path, name, set(modules)):
            for package, names in FORBIDDEN.items():
                if below(name, package) and any(below(target, forbidden) for forbidden in names):
                    found.append(f"{name}:{line} imports {target}, which nothing in {package} may.")
            if below(target, "gptjax") and target != "gptjax" and not any(below(target, package) for package in allowed or ()):
                found.append(f"{name}:{line} imports {target}; it may see {', '.join(allowed or ()) or 'nothing of gptjax'}.")
    return found


def test_modules_import_only_what_their_layer_may_see():
    assert violations(REPOSITORY) == []


@pytest.mark.parametrize(
    ("path", "source", "complaint"),
    [
        ("config.py", "from gptjax.model import decoder", "gptjax.config:1 imports gptjax.model"),
        ("model/decoder.py", "def f():\n    import gptjax.train.loop", "gptjax.model.decoder:2 imports gptjax.train.loop"),
        ("model/decoder.py", "from ..train import loop", "gptjax.model.decoder:1 imports gptjax.train.loop"),
        ("model/decoder.py", "from ..parallel import mesh", "gptjax.model.decoder:1 imports gptjax.parallel.mesh"),
        ("data/packing.py", "import jax.numpy as jnp", "gptjax.data.packing:1 imports jax.numpy"),
        ("cli.py", "from configs import gpt2_124m", "gptjax.cli:1 imports configs"),
        ("train/loop.py", "from gptjax import cli", "gptjax.train.loop:1 imports gptjax.cli"),
        ("newcomer.py", "import os", "gptjax.newcomer has no rule"),
    ],
)
def test_a_forbidden_import_is_named(tmp_path: pathlib.Path, path: str, source: str, complaint: str):
    for folder in ("model", "data", "train", "parallel"):
        (tmp_path / "gptjax" / folder).mkdir(parents=True)
    for module in ("cli.py", "parallel/mesh.py", "train/loop.py", "model/decoder.py"):
        (tmp_path / "gptjax" / module).touch()
    (tmp_path / "gptjax" / path).write_text(source)
    found = violations(tmp_path)
    assert len(found) == 1 and found[0].startswith(complaint), found


def test_allowed_imports_pass(tmp_path: pathlib.Path):
    (tmp_path / "gptjax" / "model").mkdir(parents=True)
    (tmp_path / "gptjax" / "config.py").write_text("import math")
    (tmp_path / "gptjax" / "model" / "decoder.py").write_text(
        "import jax\nfrom gptjax.config import Config\nfrom . import layers"
    )
    (tmp_path / "gptjax" / "model" / "layers.py").write_text("import gptjax\nfrom ..config import ModelConfig")
    assert violations(tmp_path) == []


def test_recipes_import_only_the_config():
    for path in sorted((REPOSITORY / "configs").glob("*.py")):
        ours = {target for _, target in imports(path, f"configs.{path.stem}", {"gptjax.config"}) if below(target, "gptjax")}
        assert ours <= {"gptjax.config"}, f"{path.name} imports {sorted(ours)}"


def test_no_module_is_a_junk_drawer():
    drawers = {"utils", "util", "helpers", "misc", "common"}
    named = [path for path in PACKAGE.rglob("*") if path.stem in drawers]
    assert named == [], "a module is named for what it does"
