"""A task of configs/fine_tune.py from the small GPT of configs/small_gpt.py, 3 seeds: see README.md."""

from gptjax.sweeps.definition import Sweep
from gptjax.sweeps.space import seeds


def get_sweep(arg: str = "sms_spam"):
    return Sweep(recipe=f"configs/fine_tune.py:{arg}", space=seeds(3), timeout=3600)
