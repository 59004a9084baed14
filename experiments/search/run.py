"""Every sampler with every seed, then the table of README.md: python experiments/search/run.py --workdir=runs/search --jobs=2

Further words go to `gptjax sweep`, such as --config.data.source=text --config.data.path=input.txt. Started
again, it runs what is missing. `--table` only reads.
"""

import argparse
import concurrent.futures
import csv
import os
import pathlib
import queue
import subprocess
import sys
import time

import numpy as np

from gptjax.sweeps.resources import available_cores, bound_to
from gptjax.sweeps.statistics import paired
from gptjax.sweeps.study import open_journal

SAMPLERS, SEEDS = ("tpe", "random"), range(5)
AFTER = (10, 15, 20, 25, 30, 35, 40, 45, 50)
HERE = pathlib.Path(__file__).resolve().parent


def run(folder: pathlib.Path, sampler: str, seed: int, cores: queue.Queue, words: list[str]) -> int:
    """One search, its trials one after the other, on a core of its own; the exit status."""
    command = [sys.executable, "-m", "gptjax", "sweep", f"{HERE / 'sweep.py'}:{sampler},{seed}", f"--workdir={folder}"]
    # What no knob of the space changes is compiled once.
    cache = {"JAX_COMPILATION_CACHE_DIR": str(folder.parent / "compiled"), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    began, core = time.time(), cores.get()
    with (folder.parent / f"{sampler}_{seed}.log").open("ab") as log, bound_to((core,)):
        status = subprocess.run([*command, *words], env=os.environ | cache, stderr=log, check=False).returncode
    cores.put(core)
    print(f"{sampler} {seed}: exit status {status} after {time.time() - began:.0f} s", flush=True)
    return status


def best_so_far(folder: pathlib.Path) -> np.ndarray:
    """[trials] the lowest loss up to each; infinite before the first that finished."""
    storage, study = open_journal(folder)
    values = [trial.value if trial.value is not None else np.inf for trial in storage.get_all_trials(study)]
    return np.minimum.accumulate(values)


def table(workdir: pathlib.Path) -> None:
    best = {(sampler, seed): best_so_far(workdir / f"{sampler}_{seed}") for sampler in SAMPLERS for seed in SEEDS}
    with (workdir / "best.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["sampler", "seed", "trial", "best"])
        writer.writerows((*key, trial, value) for key, course in best.items() for trial, value in enumerate(course, 1))
    print("| trials | " + " | ".join(SAMPLERS) + " | difference, 95 % interval | seeds won | p |\n|---|---|---|---|---|---|")
    for trials in AFTER:
        ours, theirs = (np.array([best[sampler, seed][trials - 1] for seed in SEEDS]) for sampler in SAMPLERS)
        test = paired(ours - theirs)
        low, high = test.interval
        won = f"{(ours < theirs).sum()} of {len(ours)}"
        means = f"{ours.mean():.4f} | {theirs.mean():.4f}"
        print(f"| {trials} | {means} | {test.difference:+.4f} ({low:+.4f} to {high:+.4f}) | {won} | {test.p:.3f} |")
    for sampler in SAMPLERS:
        print(f"{sampler}: {', '.join(f'{best[sampler, seed][-1]:.4f}' for seed in SEEDS)} (seeds 0 to 4, after all trials)")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--jobs", type=int, default=1, help="searches at a time; the trials of each are one after the other")
    parser.add_argument("--table", action="store_true")
    arguments, words = parser.parse_known_args()
    if not arguments.table:
        arguments.workdir.mkdir(parents=True, exist_ok=True)
        cores: queue.Queue = queue.Queue()
        for core in available_cores()[: arguments.jobs]:
            cores.put(core)
        with concurrent.futures.ThreadPoolExecutor(arguments.jobs) as pool:
            started = [
                pool.submit(run, arguments.workdir / f"{sampler}_{seed}", sampler, seed, cores, words)
                for seed in SEEDS
                for sampler in SAMPLERS
            ]
            for search in concurrent.futures.as_completed(started):
                if search.result() > 1:  # 1: some trials failed, which is a result
                    pool.shutdown(wait=False, cancel_futures=True)
                    sys.exit(f"a search was refused or stopped; its log lies in {arguments.workdir}")
    table(arguments.workdir)


if __name__ == "__main__":
    main()
