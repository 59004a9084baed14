"""Learning rate and warm-up of the small standard-library model: see README.md."""

from gptjax.sweeps.definition import Sweep
from gptjax.sweeps.space import grid, seeds


def get_sweep(arg: str = ""):
    space = grid({"optimizer.learning_rate": [5e-3, 1e-2, 2e-2, 4e-2]}, seeds(5))
    return Sweep(
        recipe="configs/stdlib_tiny.py",
        space=space,
        overrides={"evaluate.sample_tokens": 0, "evaluate.every_steps": 50},
        timeout=3600,
    )
