"""Stands for `gptjax train` where a test wants a trial to fail in seconds: what it does is said by evaluate.sample_prompt.

It takes the same two arguments, saves, resumes and answers SIGTERM as a run does, and says in `twice` if it ever finds another
process of the same trial alive.
"""

import json
import os
import pathlib
import signal
import sys
import time

TOTAL, SECONDS = 40, 0.03


def main(config, workdir):
    behaviour, seed = config["evaluate"]["sample_prompt"], config["train"]["seed"]
    with (workdir / "starts").open("a") as starts:
        starts.write(f"{os.getpid()}\n")
    stop = []
    signal.signal(signal.SIGTERM, lambda number, frame: stop.append(number))
    if behaviour == "crash":
        raise ValueError(f"seed {seed} is unlucky")
    if behaviour == "nonfinite":
        sys.exit("gptjax: the gradient was not finite in 10 steps in a row, the last one step 12; lower the learning rate.")
    if behaviour == "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    if behaviour == "exhausted":
        raise RuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 8796093022208 bytes.")
    if behaviour == "stuck":
        time.sleep(120)  # the handler above returns into it
    saved = workdir / "saved"
    first = int(saved.read_text()) if saved.exists() else 0
    with (workdir / "metrics.jsonl").open("a") as metrics:
        for step in range(first + 1, TOTAL + 1):
            time.sleep(SECONDS)
            metrics.write(json.dumps({"step": step, "train/loss": 5 - 0.1 * step, "seconds": step * SECONDS}) + "\n")
            metrics.flush()
            if step % 5 == 0 or stop:
                saved.write_text(str(step))
            if stop:
                print("gptjax: stopped by SIGTERM and saved", file=sys.stderr)
                sys.exit(75)
    (workdir / "result.json").write_text(json.dumps({"steps": TOTAL, "eval": {"loss": 1 + seed / 7}}))


def alone(workdir):
    """Whether no other process has this folder."""
    try:
        os.close(os.open(workdir / "alive", os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        pid = int((workdir / "alive").read_text() or 0)
        if pid and pathlib.Path(f"/proc/{pid}").exists():
            (workdir / "twice").touch()
            return False
    (workdir / "alive").write_text(str(os.getpid()))
    return True


if __name__ == "__main__":
    words = dict(word.removeprefix("--").split("=", 1) for word in sys.argv[1:])
    folder = pathlib.Path(words["workdir"])
    assert alone(folder)
    try:
        main(json.loads(pathlib.Path(words["config"]).read_text()), folder)
    finally:
        (folder / "alive").unlink()
