"""Stands for `gptjax train` in a search: a curve that follows from the config at once, or slowly where a test is to kill it.

The loss falls towards a bowl's height at (learning rate, layers), the lower the better from the first step on. With
`evaluate.sample_prompt` "slow", each step takes a while; a learning rate above 0.5 raises.
"""

import json
import math
import os
import pathlib
import signal
import sys
import time

TOTAL, EVERY = 40, 10


def height(config):
    rate, layers = config["optimizer"]["learning_rate"], config["model"]["num_layers"]
    return 1 + (math.log10(rate) + 2) ** 2 + 0.3 * (layers - 3) ** 2


def main(config, workdir):
    with (workdir / "starts").open("a") as starts:
        starts.write(f"{os.getpid()}\n")
    stop = []
    signal.signal(signal.SIGTERM, lambda number, frame: stop.append(number))
    if config["optimizer"]["learning_rate"] > 0.5:
        raise ValueError("it diverged at once")
    pause = {"slow": 0.01, "": 0.0}[config["evaluate"]["sample_prompt"]]
    saved = workdir / "saved"
    first = int(saved.read_text()) if saved.exists() else 0
    kept = (workdir / "metrics.jsonl").read_text().splitlines(True) if first else []
    kept = [line for line in kept if line.endswith("\n") and json.loads(line)["step"] <= first]
    (workdir / "metrics.jsonl").write_text("".join(kept))
    with (workdir / "metrics.jsonl").open("a") as metrics:
        for step in range(first + 1, TOTAL + 1):
            time.sleep(pause)
            if step % EVERY == 0:
                loss = height(config) + 3 * math.exp(-step / 10)
                metrics.write(json.dumps({"step": step, "tokens": step, "eval/loss": loss}) + "\n")
                metrics.flush()
            if step % 5 == 0 or stop:
                (workdir / "saving").write_text(str(step))
                (workdir / "saving").replace(saved)
            if stop:
                sys.exit(75)
    (workdir / "result.json").write_text(json.dumps({"steps": TOTAL, "eval": {"loss": height(config)}}))


if __name__ == "__main__":
    words = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:])
    main(json.loads(pathlib.Path(words["config"]).read_text()), pathlib.Path(words["workdir"]))
