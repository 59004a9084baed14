"""`gptjax config`: a resolved config, how two differ, and how one is laid over devices."""

from __future__ import annotations

import argparse
import math
import pathlib
import shutil
import sys
from collections.abc import Sequence
from typing import Any

from gptjax import config as config_lib
from gptjax import recipes
from gptjax.config import Config, UserError, pages
from gptjax.model import drawing
from gptjax.verbs.arguments import add_verb
from gptjax.verbs.output import print_json


def add(verbs: Any) -> None:
    parser = add_verb(
        verbs,
        "config",
        run,
        "Print a resolved config, or how two differ.",
        """examples:
  gptjax config configs/gpt2_124m.py --config.model.num_layers=6
  gptjax config runs/a runs/b
  gptjax config configs/gpt2_124m.py --picture
  gptjax config --help model""",
        add_help=False,
    )
    parser.add_argument("-h", "--help", action=_Help, nargs="?", metavar="GROUP", help="this help, or every knob of a group")
    parser.add_argument("--picture", action="store_true", help="a drawing of the model's block")
    parser.add_argument("--shardings", action="store_true", help="every parameter with its mesh axes and bytes on one device")
    parser.add_argument("files", nargs="*", metavar="RECIPE", help="FILE.py[:ARG], a config.json or a run's folder")
    parser.add_argument("--config", metavar="FILE.py[:ARG]", help="the same as a RECIPE")


class _Help(argparse.Action):
    """Help on the verb, with the groups of knobs; or on one group."""

    def __call__(self, parser: argparse.ArgumentParser, namespace: Any, values: Any, option_string: str | None = None) -> None:
        width = shutil.get_terminal_size().columns
        print(pages.group_page(values, width) if values else f"{parser.format_help()}\n{pages.contents(width)}", end="")
        parser.exit()


def run(arguments: argparse.Namespace) -> int:
    specs = list(arguments.files) + ([arguments.config] if arguments.config else [])
    if len(specs) not in (1, 2):
        raise UserError(
            "gptjax config takes one recipe to print, or two to compare; each may also be a run's folder or its config.json."
        )
    configs = [_load_any(spec, arguments.overrides) for spec in specs]
    if arguments.shardings:
        if len(configs) != 1:
            raise UserError("gptjax config --shardings takes one recipe.")
        return _shardings(configs[0], arguments.json)
    if arguments.picture:
        if len(configs) != 1:
            raise UserError("gptjax config --picture takes one recipe.")
        print(drawing.draw_block(configs[0].model), end="")
        return 0
    if len(configs) == 1:
        print(config_lib.to_json(configs[0]), end="")
        return 0
    changed = config_lib.differences(configs[0], configs[1])
    if arguments.json:
        print_json({key: list(pair) for key, pair in changed.items()})
        return 0
    width = max(map(len, changed), default=0)
    for key, (before, after) in changed.items():
        print(f"{key:<{width}}  {before!r} -> {after!r}")
    if not changed:
        print("the two are the same", file=sys.stderr)
    return 0


def _load_any(spec: str, overrides: Sequence[str]) -> Config:
    folder = pathlib.Path(spec)
    return recipes.load_recipe(str(folder / "config.json") if folder.is_dir() else spec, overrides)


def _shardings(config: Config, as_json: bool) -> int:
    """Every parameter with its spec and its bytes on one device, for devices that need not be here."""
    if not config.model.vocab_size:
        raise UserError("model.vocab_size=0 waits for the tokenizer; give --config.model.vocab_size to see the shardings.")
    import jax

    from gptjax.parallel.mesh import AXES, abstract_mesh, check_divides
    from gptjax.parallel.sharding import layout_table, use_rules
    from gptjax.train.step import init_params

    fixed = math.prod(size for axis in AXES if (size := getattr(config.mesh, axis)) != -1)
    mesh = abstract_mesh(config.mesh, max(fixed, jax.device_count() // fixed * fixed))
    check_divides(config, mesh)
    with use_rules(config.mesh):
        rows = layout_table(jax.eval_shape(lambda: init_params(config, jax.numpy.uint32(0))), mesh)
    if as_json:
        print_json({"mesh": dict(mesh.shape), "parameters": rows})
        return 0
    lines = [("parameter", "shape", "spec", "bytes a device")]
    for row in rows:
        axes = [axes if isinstance(axes, str) else "+".join(axes or ()) or "-" for axes in row["spec"]]
        lines.append((row["name"], str(tuple(row["shape"])), ", ".join(axes), f"{row['bytes_per_device']:,}"))
    widths = [max(len(line[column]) for line in lines) for column in range(4)]
    for line in lines:
        cells = [
            text.rjust(width) if column == 3 else text.ljust(width)
            for column, (text, width) in enumerate(zip(line, widths, strict=True))
        ]
        print("  ".join(cells).rstrip())
    total, held = (sum(row[key] for row in rows) for key in ("bytes", "bytes_per_device"))
    print(f"mesh {', '.join(f'{axis} {size}' for axis, size in mesh.shape.items())}: {held:,} bytes a device of {total:,}")
    return 0
