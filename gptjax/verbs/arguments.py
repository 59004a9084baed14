"""What the verbs take: their parser, the kinds of numbers, and the config of a run."""

from __future__ import annotations

import argparse
import difflib
import math
import pathlib
from typing import Any

from gptjax import config as config_lib
from gptjax import recipes
from gptjax.config import Config, UserError

OVERRIDES = (
    "Any knob is set by --config.GROUP.NAME=VALUE, as in --config.model.num_layers=4; `gptjax config RECIPE` lists them all."
)


class Parser(argparse.ArgumentParser):
    """argparse, answering a mistake in one sentence with the nearest right name."""

    def error(self, message: str) -> Any:
        parsers = [self, *(parser for action in self._actions for parser in _choices(action))]
        known = [option for parser in parsers for action in parser._actions for option in action.option_strings]
        words = [word.partition("=")[0] for word in message.split() if word.startswith("--")]
        near = difflib.get_close_matches(words[0], known, n=1) if "unrecognized" in message and words else []
        hint = f"; did you mean {near[0]}?" if near else f"; see `{self.prog} --help`."
        raise UserError(f"{message}{hint}")


def _choices(action: argparse.Action) -> list[argparse.ArgumentParser]:
    """The parsers of the verbs, where `action` is what chooses one."""
    return list(action.choices.values()) if isinstance(action, argparse._SubParsersAction) else []


def add_verb(
    verbs: Any, name: str, run: Any, summary: str, epilog: str, *, uses_devices: bool = False, add_help: bool = True
) -> argparse.ArgumentParser:
    """The parser of one verb. `run` takes the arguments and returns the exit status. `add_help=False`: the verb has its own."""
    parser = verbs.add_parser(
        name,
        help=summary,
        description=f"{summary} {OVERRIDES}",
        epilog=epilog,
        allow_abbrev=False,
        add_help=add_help,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output; logs go to standard error")
    parser.set_defaults(run=run, uses_devices=uses_devices)
    return parser


def add_run(parser: argparse.ArgumentParser) -> None:
    """The arguments that name a run, for `run_config`."""
    parser.add_argument("--workdir", metavar="DIR", help="a run's folder")
    parser.add_argument("--config", metavar="FILE.py[:ARG]", help="recipe in place of the folder's own config.json")
    parser.add_argument("--step", type=count, metavar="N", help="a checkpoint's step; by default the newest intact one")


def positive(text: str) -> int:
    """A whole number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} must be at least 1")
    return number


def count(text: str) -> int:
    """A whole number of at least 0."""
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} must be at least 0")
    return number


def rate(text: str) -> float:
    """A finite number of at least 0."""
    number = float(text)
    if not (math.isfinite(number) and number >= 0):
        raise argparse.ArgumentTypeError(f"{text} must be a finite number of at least 0")
    return number


def share(text: str) -> float:
    """A number above 0 and at most 1."""
    number = float(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text} must be above 0 and at most 1")
    return number


def sizes(text: str) -> tuple[int, ...]:
    """Whole numbers, with commas between."""
    return tuple(positive(part) for part in text.split(","))


def required(arguments: argparse.Namespace, name: str) -> str:
    """The value of --name. Raises `UserError` where it is missing."""
    value = getattr(arguments, name)
    if not value:
        raise UserError(f"gptjax {arguments.verb} needs --{name}; `gptjax {arguments.verb} --help` shows an example.")
    return value


def run_config(arguments: argparse.Namespace) -> tuple[pathlib.Path, Config]:
    """A run's folder, and its own config with the overrides laid over it. Raises `UserError` where they change the model."""
    workdir = pathlib.Path(required(arguments, "workdir"))
    own = workdir / "config.json"
    if not own.is_file():
        raise UserError(f"{workdir} is not a run's folder: it has no config.json.")
    trained = config_lib.from_json(own)
    config = recipes.load_recipe(arguments.config or str(own), arguments.overrides).with_vocab_size(trained.model.vocab_size)
    shapes = {"vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "max_seq_len"}
    shapes |= {"attention_kind", "kv_latent_dim", "query_latent_dim", "rotary_head_dim"}
    shapes |= {"num_experts", "expert_mlp_dim", "num_shared_experts"}
    for key, (was, now) in config_lib.differences(trained, config).items():
        group, _, name = key.partition(".")
        if group == "model" and name in shapes:
            raise UserError(f"{key}={now!r}, but {workdir} was trained with {was!r}.")
    return workdir, config
