"""Six knobs of a small Shakespeare model, searched by one sampler with one seed: see README.md."""

from gptjax.config import UserError
from gptjax.sweeps.definition import Sweep
from gptjax.sweeps.search import SAMPLERS, Search
from gptjax.sweeps.space import integers, log_uniform, uniform

SPACE = {
    "optimizer.learning_rate": log_uniform(1e-4, 1.0),
    "optimizer.beta1": uniform(0.0, 0.99),
    "optimizer.beta2": uniform(0.8, 0.999),
    "optimizer.weight_decay": log_uniform(1e-3, 10.0),
    "optimizer.warmup_steps": integers(0, 100),
    "model.init_std": log_uniform(1e-3, 1.0),
}

# 1 layer of width 32, 19 thousand parameters; 120 steps of 16 * 32 = 512 tokens; evaluation on 64 * 32 * 8 = 16 thousand targets.
OVERRIDES = {
    "model.num_layers": 1,
    "model.model_dim": 32,
    "model.num_heads": 2,
    "data.seq_len": 32,
    "model.max_seq_len": 32,
    "data.batch_size": 16,
    "train.duration_steps": 120,
    "evaluate.every_steps": 0,
    "evaluate.batch_size": 64,
    "evaluate.max_batches": 8,
    "evaluate.sample_tokens": 0,
    "checkpoint.every_steps": 0,
    "metrics.every_steps": 60,
}


def get_sweep(arg: str = "tpe,0"):
    """SAMPLER,SEED"""
    sampler, _, seed = arg.partition(",")
    if sampler not in SAMPLERS or not seed.isdigit():
        raise UserError(f"experiments/search/sweep.py takes SAMPLER,SEED such as tpe,0, not {arg!r}.")
    search = Search(trials=50, sampler=sampler, seed=int(seed))
    return Sweep("configs/shakespeare_char.py:cpu", SPACE, OVERRIDES, timeout=600, search=search)
