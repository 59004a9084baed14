"""The command line: finds the verb and runs it.

Exit status: 0 done; 1 a fault of the machine or the run; 2 a mistake of the person's, said in one sentence; 75 stopped by
SIGTERM and saved; 130 stopped by Ctrl-C (and saved, while training).
"""

from __future__ import annotations

import argparse
import signal
import sys
from collections.abc import Sequence

import gptjax
from gptjax import runtime
from gptjax.config import UserError
from gptjax.parallel import hosts
from gptjax.verbs import (
    analyze,
    attack,
    compare,
    config,
    convert,
    coordinates,
    evaluate,
    generate,
    importance,
    plan,
    predict,
    replay,
    report,
    reproduce,
    scaling,
    speedrun,
    status,
    sweep,
    train,
)
from gptjax.verbs.arguments import Parser
from gptjax.verbs.output import fault

VERBS = (
    *(train, evaluate, predict, generate, convert, config, plan, coordinates),
    *(sweep, status, compare, report, importance, scaling, speedrun),
    *(reproduce, replay, analyze, attack),
)


def main(argv: Sequence[str] | None = None) -> int:
    """Runs `gptjax` with these arguments (those of the process, by default) and returns its exit status."""
    runtime.keep_freed_memory()
    try:
        arguments = _parse(list(sys.argv[1:] if argv is None else argv))
        if arguments.uses_devices:  # several processes, if the environment names them, join first
            hosts.initialise()
        status: int = arguments.run(arguments)
        hosts.leave()
        return status
    except UserError as error:
        return fault(str(error), 2)
    except hosts.HostsError as error:
        return fault(str(error), 1)
    except KeyboardInterrupt:
        return fault("stopped.", 130)
    except BrokenPipeError:  # the reader of our output has gone, as with `| head`
        return 0
    except Exception as error:
        hosts.fail_with_traceback(error)
        raise
    finally:
        if argv is None:  # the process leaves now, all is on the disk: a late signal must not change its status
            signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _parse(argv: list[str]) -> argparse.Namespace:
    """Arguments; the overrides `--config.KEY=VALUE` (or `--config.KEY VALUE`) are taken out of them into `overrides`."""
    rest: list[str] = []
    overrides: list[str] = []
    words = iter(argv)
    for word in words:
        if not word.startswith("--config."):
            rest.append(word)
            continue
        override = word.removeprefix("--config.")
        overrides.append(override if "=" in override else f"{override}={next(words, '')}")
    parser = Parser(prog="gptjax", description=gptjax.__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"gptjax {gptjax.__version__}")
    verbs = parser.add_subparsers(dest="verb", metavar="VERB", required=True, parser_class=Parser)
    for verb in VERBS:
        verb.add(verbs)
    arguments = parser.parse_args(rest)
    arguments.overrides = overrides
    return arguments
