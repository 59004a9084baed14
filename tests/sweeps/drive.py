"""A driver in a process of its own, to be killed: python drive.py FOLDER JOBS BEHAVIOUR,BEHAVIOUR,... [TIMEOUT]"""

import pathlib
import sys

from gptjax.sweeps import attempt
from gptjax.sweeps.definition import Sweep, Trial, make_trials
from gptjax.sweeps.driver import Driver
from gptjax.sweeps.folder import SweepFolder
from gptjax.sweeps.resources import Slot
from gptjax.sweeps.space import zip_
from gptjax.train.run import RunLock

RECIPE = str(pathlib.Path(__file__).resolve().parents[2] / "configs/stdlib_tiny.py")
STUB = (sys.executable, str(pathlib.Path(__file__).with_name("stub_trial.py")))


def prepare(path: pathlib.Path, behaviours: list[str]) -> tuple[SweepFolder, list[Trial]]:
    """A sweep of one trial for each word, the seeds counting from 0."""
    space = zip_({"train.seed": list(range(len(behaviours))), "evaluate.sample_prompt": behaviours})
    folder, trials = SweepFolder(path), make_trials(Sweep(RECIPE, space, {"train.duration_steps": 40}))
    folder.write_definition(trials, {"jobs": 2, "cores": 1})
    return folder, trials


def drive(path: pathlib.Path, jobs: int, behaviours: list[str], timeout: float = 0.0, **options) -> int:
    attempt.GRACE = 0.3
    folder, trials = prepare(path, behaviours)
    with RunLock(path):
        driver = Driver(folder, trials, [Slot((), {})] * jobs, timeout=timeout, command=STUB, interval=0.02, **options)
        return driver.run()


if __name__ == "__main__":
    sys.exit(drive(pathlib.Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3].split(","), float((sys.argv + ["0"])[4])))
