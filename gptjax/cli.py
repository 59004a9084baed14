"""The command line: one function a verb.

Exit status: 0 done; 1 a fault of the machine or the run; 2 a mistake of the person's, said in one sentence; 75 stopped by
SIGTERM and saved; 130 stopped by Ctrl-C (and saved, while training).
"""

from __future__ import annotations

import argparse
import difflib
import json
import math
import pathlib
import signal
import sys
from collections.abc import Sequence
from typing import Any

import gptjax
from gptjax import config as config_lib
from gptjax import recipes, runtime
from gptjax.config import Config, UserError
from gptjax.parallel import hosts


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `gptjax` with these arguments (those of the process, by default) and returns its exit status."""
    runtime.keep_freed_memory()
    try:
        arguments, overrides = _parse(list(sys.argv[1:] if argv is None else argv))
        arguments.overrides = overrides
        if arguments.run in _USE_DEVICES:
            hosts.initialise()
        status = arguments.run(arguments)
        hosts.leave()
        return status
    except UserError as error:
        return _fault(str(error), 2)
    except hosts.HostsError as error:
        return _fault(str(error), 1)
    except KeyboardInterrupt:
        return _fault("stopped.", 130)
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`
        return 0
    except Exception as error:
        hosts.fail_with_traceback(error)
        raise
    finally:
        if argv is None:  # the process leaves now, all is on the disk: a late signal must not change its status
            signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _fault(text: str, status: int) -> int:
    """Says why this process ends; of several, all do."""
    hosts.fail(text, status)
    print(f"gptjax: {text}", file=sys.stderr)
    return status


# --- verbs: heavy imports wait until their arguments are known to be right ------------------------------------------------------


def _train(arguments: argparse.Namespace) -> int:
    config = recipes.load_recipe(_required(arguments, "config"), arguments.overrides)
    workdir = pathlib.Path(_required(arguments, "workdir"))
    allowed = [key for key in arguments.allow_changes.split(",") if key]
    from gptjax.train.checkpoints import CheckpointError
    from gptjax.train.loop import Interrupted, NonFiniteError, train

    try:
        result = train(config, workdir, allowed)
    except Interrupted as stopped:
        print(f"gptjax: {stopped}", file=sys.stderr)
        return 75 if stopped.signal_number == signal.SIGTERM else 130
    except (CheckpointError, NonFiniteError) as error:
        return _fault(str(error), 1)
    if arguments.json:
        _print_json(result)
    return 0


def _evaluate(arguments: argparse.Namespace) -> int:
    workdir, config = _run_config(arguments)
    from gptjax.parallel.mesh import make_mesh
    from gptjax.train.evaluate import evaluate
    from gptjax.train.loop import load_data
    from gptjax.train.restore import load_run

    model = load_run(workdir, _log, arguments.step, config)
    dataset = load_data(config, _log)
    if dataset.tokenizer.fingerprint != model.tokenizer.fingerprint:
        raise UserError(
            f"the tokenizer that data.tokenizer={config.data.tokenizer} gives is not the one that {workdir} was trained with."
        )
    figures = evaluate(config, model.params, dataset, make_mesh(config.mesh)) | {"step": model.step}
    if arguments.json:
        _print_json(figures)
    elif hosts.is_primary():
        print(
            f"step {figures['step']}: loss {figures['loss']:.4f} nats a token, perplexity {figures['perplexity']:.3f}, "
            f"{figures['bits_per_byte']:.4f} bits per byte over {figures['tokens']} tokens ({figures['bytes']} bytes)"
        )
    return 0


def _generate(arguments: argparse.Namespace) -> int:
    prompts = _prompts(arguments)
    workdir, config = _run_config(arguments)
    from gptjax.generate.text import generate_text
    from gptjax.train.restore import load_run

    model = load_run(workdir, _log, arguments.step, config)
    samples = generate_text(
        model.params,
        config,
        model.tokenizer,
        prompts,
        max_new_tokens=arguments.max_new_tokens,
        greedy=arguments.greedy,
        temperature=arguments.temperature,
        top_k=arguments.top_k,
        top_p=arguments.top_p,
        seed=arguments.seed,
        num_samples=arguments.num_samples,
    )
    if arguments.json:
        _print_json({"step": model.step, "samples": [_sample_as_dict(sample) for sample in samples]})
        return 0
    for index, sample in enumerate(samples if hosts.is_primary() else ()):
        if index:
            print("---")
        print(sample.prompt + sample.text)
    return 0


def _config(arguments: argparse.Namespace) -> int:
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
    if len(configs) == 1:
        print(config_lib.to_json(configs[0]), end="")
        return 0
    changed = config_lib.differences(configs[0], configs[1])
    if arguments.json:
        _print_json({key: list(pair) for key, pair in changed.items()})
        return 0
    width = max(map(len, changed), default=0)
    for key, (before, after) in changed.items():
        print(f"{key:<{width}}  {before!r} -> {after!r}")
    if not changed:
        print("the two are the same", file=sys.stderr)
    return 0


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
        _print_json({"mesh": dict(mesh.shape), "parameters": rows})
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


def _plan(arguments: argparse.Namespace) -> int:
    from gptjax.plan.chips import parse_topology
    from gptjax.plan.compiled import prepare

    topology = parse_topology(_required(arguments, "topology"))
    config = recipes.load_recipe(_required(arguments, "config"), arguments.overrides)
    prepare(topology)
    from gptjax.plan import report, search

    options = {"memory_gib": arguments.memory_gib, "efficiency": arguments.efficiency}
    if arguments.search:
        batch_sizes = arguments.batch_sizes or (config.data.batch_size,)
        rows = search.search(config, topology, batch_sizes=batch_sizes, compile_best=arguments.compile_best, log=_log, **options)
        result: dict[str, Any] = {"topology": topology.name, "search": rows, "fits": True}
        text = search.describe(rows)
    else:
        result = report.plan(config, topology, **options)
        text = report.describe(result)
    if arguments.output:
        _write_json(pathlib.Path(arguments.output), result)
    if arguments.json:
        _print_json(result)
    else:
        print(text)
    return 0 if result["fits"] else 1


# --- what the verbs share -------------------------------------------------------------------------------------------------------


def _required(arguments: argparse.Namespace, name: str) -> str:
    value = getattr(arguments, name)
    if not value:
        raise UserError(f"gptjax {arguments.verb} needs --{name}; `gptjax {arguments.verb} --help` shows an example.")
    return value


def _run_config(arguments: argparse.Namespace) -> tuple[pathlib.Path, Config]:
    """A run's folder, and its own config with the overrides laid over it. Raises `UserError` where they change the model."""
    workdir = pathlib.Path(_required(arguments, "workdir"))
    own = workdir / "config.json"
    if not own.is_file():
        raise UserError(f"{workdir} is not a run's folder: it has no config.json.")
    trained = config_lib.from_json(own)
    config = recipes.load_recipe(arguments.config or str(own), arguments.overrides).with_vocab_size(trained.model.vocab_size)
    shapes = {"vocab_size", "num_layers", "model_dim", "num_heads", "num_kv_heads", "head_dim", "mlp_dim", "max_seq_len"}
    shapes |= {"num_experts", "expert_mlp_dim", "num_shared_experts"}
    for key, (was, now) in config_lib.differences(trained, config).items():
        group, _, name = key.partition(".")
        if group == "model" and name in shapes:
            raise UserError(f"{key}={now!r}, but {workdir} was trained with {was!r}.")
    return workdir, config


def _load_any(spec: str, overrides: Sequence[str]) -> Config:
    folder = pathlib.Path(spec)
    return recipes.load_recipe(str(folder / "config.json") if folder.is_dir() else spec, overrides)


def _prompts(arguments: argparse.Namespace) -> list[str]:
    if arguments.prompt_file:
        if arguments.prompt is not None:
            raise UserError("--prompt and --prompt_file are both given; keep one.")
        path = pathlib.Path(arguments.prompt_file)
        try:
            return [path.read_text(encoding="utf-8")]
        except FileNotFoundError:
            raise UserError(f"--prompt_file={path} does not exist.") from None
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"--prompt_file={path} cannot be read: {error}.") from None
    return [arguments.prompt or ""]


def _sample_as_dict(sample: Any) -> dict[str, Any]:
    return {
        "prompt": sample.prompt,
        "sample": sample.sample,
        "text": sample.text,
        "tokens": [int(token) for token in sample.tokens],
        "finish_reason": sample.finish_reason,
    }


def _log(text: str) -> None:
    if hosts.is_primary():
        print(text, file=sys.stderr, flush=True)


def _print_json(value: Any) -> None:
    """One line of valid JSON: NaN and infinities, which JSON lacks, as null. Process 0 prints it."""
    if not hosts.is_primary():
        return
    print(json.dumps(_plain(value), ensure_ascii=False, allow_nan=False), flush=True)


def _write_json(path: pathlib.Path, value: Any) -> None:
    try:
        path.write_text(json.dumps(_plain(value), indent=2, ensure_ascii=False, allow_nan=False) + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"--output={path} cannot be written: {error.strerror}.") from None


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


_USE_DEVICES = (_train, _evaluate, _generate)  # where several processes, if the environment names them, join first


# --- arguments ------------------------------------------------------------------------------------------------------------------


class _Parser(argparse.ArgumentParser):
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


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} must be at least 1")
    return number


def _count(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"{number} must be at least 0")
    return number


def _rate(text: str) -> float:
    number = float(text)
    if not (math.isfinite(number) and number >= 0):
        raise argparse.ArgumentTypeError(f"{text} must be a finite number of at least 0")
    return number


def _sizes(text: str) -> tuple[int, ...]:
    return tuple(_positive(part) for part in text.split(","))


def _share(text: str) -> float:
    number = float(text)
    if not 0 < number <= 1:
        raise argparse.ArgumentTypeError(f"{text} must be above 0 and at most 1")
    return number


def _parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """Arguments, and the overrides `--config.KEY=VALUE` (or `--config.KEY VALUE`) taken out of them."""
    rest: list[str] = []
    overrides: list[str] = []
    words = iter(argv)
    for word in words:
        if not word.startswith("--config."):
            rest.append(word)
            continue
        override = word.removeprefix("--config.")
        overrides.append(override if "=" in override else f"{override}={next(words, '')}")
    parser = _build_parser()
    return parser.parse_args(rest), overrides


_OVERRIDES = (
    "Any knob is set by --config.GROUP.NAME=VALUE, as in --config.model.num_layers=4; `gptjax config RECIPE` lists them all."
)


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(prog="gptjax", description=gptjax.__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"gptjax {gptjax.__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=_Parser)

    train = _verb(
        verbs,
        "train",
        _train,
        "Train a model; the same command goes on where it stopped.",
        """example:
  gptjax train --config=configs/shakespeare_char.py:cpu --workdir=runs/shakespeare --config.train.seed=1

The run's folder gets config.json, metrics.jsonl, checkpoints/, samples/, tokenizer/ and, at the end, result.json and
loss_curve.png. SIGTERM and Ctrl-C save first; exit status 75 and 130. A changed config is refused, unless its keys are named by
--allow_changes.

Several processes, on one host or many, are one run where each has GPTJAX_COORDINATOR=HOST:PORT, GPTJAX_NUM_PROCESSES and
GPTJAX_PROCESS_ID in its environment, or GPTJAX_DISTRIBUTED=auto.""",
    )
    train.add_argument("--config", metavar="FILE.py[:ARG]", help="recipe, or a config.json")
    train.add_argument("--workdir", metavar="DIR", help="the run's folder")
    train.add_argument(
        "--allow_changes", metavar="KEY,KEY", default="", help="config keys that may differ from those the run began with"
    )

    evaluate = _verb(
        verbs,
        "evaluate",
        _evaluate,
        "Loss, perplexity and bits per byte over the whole evaluation split.",
        """example:
  gptjax evaluate --workdir=runs/shakespeare --config.evaluate.batch_size=64 --json""",
    )
    _add_run(evaluate)

    generate = _verb(
        verbs,
        "generate",
        _generate,
        "Write text with a trained model.",
        """example:
  gptjax generate --workdir=runs/shakespeare --prompt="ROMEO:" --max_new_tokens=200 --temperature=0.8 --num_samples=3""",
    )
    _add_run(generate)
    generate.add_argument("--prompt", help="text to go on from")
    generate.add_argument("--prompt_file", metavar="FILE", help="a file that holds the prompt")
    generate.add_argument("--max_new_tokens", type=_positive, default=100, metavar="N", help="tokens to write at most (100)")
    generate.add_argument("--greedy", action="store_true", help="always take the likeliest token")
    generate.add_argument("--temperature", type=_rate, default=1.0, metavar="X", help="divides the logits; 0 is greedy (1.0)")
    generate.add_argument("--top_k", type=_count, default=0, metavar="K", help="draw from the K likeliest; 0: off")
    generate.add_argument(
        "--top_p", type=_share, default=1.0, metavar="P", help="draw from the likeliest that hold probability P; 1: off"
    )
    generate.add_argument("--seed", type=_count, default=0, metavar="N", help="samples are a function of it")
    generate.add_argument("--num_samples", type=_positive, default=1, metavar="N", help="samples a prompt")

    show = _verb(
        verbs,
        "config",
        _config,
        "Print a resolved config, or how two differ.",
        """examples:
  gptjax config configs/gpt2_124m.py --config.model.num_layers=6
  gptjax config runs/a runs/b""",
    )
    show.add_argument("--shardings", action="store_true", help="every parameter with its mesh axes and bytes on one device")
    show.add_argument("files", nargs="*", metavar="RECIPE", help="FILE.py[:ARG], a config.json or a run's folder")
    show.add_argument("--config", metavar="FILE.py[:ARG]", help="the same as a RECIPE")
    _add_plan(verbs)
    return parser


def _add_plan(verbs: Any) -> None:
    plan = _verb(
        verbs,
        "plan",
        _plan,
        "Say whether a run fits hardware that is not here, what it moves and how long it takes.",
        """examples:
  gptjax plan --config=configs/llama_7b.py --topology=v5p:4x4x4
  gptjax plan --config=configs/gpt2_124m.py --topology=v5e:2x2 --search --compile_best=2
  gptjax plan --config=configs/gpt2_124m.py --topology=h100:8x16
  gptjax plan --config=configs/shakespeare_char.py:cpu --topology=cpu:8 --config.model.vocab_size=65

Topologies: TPU slices by their chips (v4, v5p, tpu7x: AxBxC; v5e, v6e: AxB; 1 for a single chip), for which libtpu compiles the
real training step (extra: tpu; minutes, and some GiB of this machine's memory); cpu:N virtual devices; GPUs (a100, h100, h200,
b200) as GPUs-a-node x nodes, by formula and without times. The table gives parameters, memory on one device, FLOPs by formula
and by the compiler, collectives by kind and mesh axes, and a step's time. cost_analysis counts a loop's body once, so products,
collectives and memory traffic are read from the compiled program and multiplied by the trips of the loops they stand in.

Times are a roofline of the compiled program: each instruction takes the longer of its arithmetic, at --efficiency of the
published peak, and its memory traffic; collectives take the bytes that a device sends over the links of its group, either
hidden behind all that or in turn with it. The truth lies between the two, a slow input pipeline aside.

Exit status 1 where the run does not fit.""",
    )
    plan.add_argument("--config", metavar="FILE.py[:ARG]", help="recipe, or a config.json")
    plan.add_argument("--topology", metavar="CHIP:SHAPE", help="v5p:4x4x4, v5e:2x2, tpu7x:2x2x1, cpu:8, h100:8x16, ...")
    plan.add_argument("--output", metavar="FILE", help="also write the plan there, as JSON")
    plan.add_argument("--memory_gib", type=_rate, default=0.0, metavar="X", help="memory of a device, in place of the chip's")
    plan.add_argument(
        "--efficiency", type=_share, default=0.8, metavar="X", help="share of the peak that products reach, an assumption (0.8)"
    )
    plan.add_argument(
        "--search", action="store_true", help="try data x fsdp x tensor, remat policies and micro-batches, and rank them"
    )
    plan.add_argument(
        "--batch_sizes", type=_sizes, default=(), metavar="N,N", help="--search: values of data.batch_size to try too"
    )
    plan.add_argument(
        "--compile_best", type=_count, default=3, metavar="N", help="--search: how many of the best are compiled (3)"
    )


def _verb(verbs: Any, name: str, run: Any, summary: str, epilog: str) -> argparse.ArgumentParser:
    parser = verbs.add_parser(
        name,
        help=summary,
        description=f"{summary} {_OVERRIDES}",
        epilog=epilog,
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--json", action="store_true", help="one JSON object on standard output; logs go to standard error")
    parser.set_defaults(run=run)
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--workdir", metavar="DIR", help="a run's folder")
    parser.add_argument("--config", metavar="FILE.py[:ARG]", help="recipe in place of the folder's own config.json")
    parser.add_argument("--step", type=_count, metavar="N", help="a checkpoint's step; by default the newest intact one")
