"""A search's driver in a process of its own, to be killed: python drive_search.py FOLDER JSON, the arguments of `drive`."""

import json
import pathlib
import sys

from gptjax.sweeps import attempt
from gptjax.sweeps.definition import Sweep
from gptjax.sweeps.driver import Driver
from gptjax.sweeps.folder import SweepFolder
from gptjax.sweeps.resources import Slot
from gptjax.sweeps.search import Search
from gptjax.sweeps.searcher import Searcher
from gptjax.sweeps.space import integers, log_uniform
from gptjax.train.run import RunLock

RECIPE = str(pathlib.Path(__file__).resolve().parents[2] / "configs/stdlib_tiny.py")
STUB = (sys.executable, "-S", str(pathlib.Path(__file__).with_name("stub_search_trial.py")))
SPACE = {"optimizer.learning_rate": log_uniform(1e-4, 0.4), "model.num_layers": integers(1, 6)}


def searcher(path, sampler="tpe", pruner="none", trials=12, space=None, overrides=None, prompt="", **options):
    settings = {"tpe": {"n_startup_trials": 4}}.get(sampler, {})
    pruner_settings = {"median": {"n_startup_trials": 3}}.get(pruner, {})
    search = Search(trials, sampler, pruner, seed=1, sampler_settings=settings, pruner_settings=pruner_settings)
    laid = {"train.duration_steps": 40, "evaluate.every_steps": 10, "evaluate.sample_prompt": prompt} | (overrides or {})
    sweep = Sweep(RECIPE, SPACE if space is None else space, laid, search=search)
    return Searcher(SweepFolder(path), sweep, about={"jobs": 1, "cores": 1}, **options)


def drive(path, jobs=1, command=STUB, retry_failed=False, worker="", **options):
    attempt.GRACE = 5.0
    with RunLock(path / "workers" / worker if worker else path):
        source = searcher(path, worker=worker, retry_failed=retry_failed, **options)
        return Driver(SweepFolder(path), source, [Slot((), {})] * jobs, command=command, interval=0.01).run()


if __name__ == "__main__":
    sys.exit(drive(pathlib.Path(sys.argv[1]), **json.loads(sys.argv[2])))
