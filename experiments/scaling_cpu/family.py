"""Eight models at three or four budgets each, and a larger run to predict, on the standard library's own source: see README.md.

`get_family("tiny")` is the same in small: three of the models, for a look at what the commands do.
"""

from gptjax.scaling.family import Family, HeldOut, iso_flops, mup, shape

SHAPES = [
    shape(width, layers, head_dim=16)
    for width, layers in ((32, 1), (32, 2), (48, 2), (48, 3), (64, 2), (64, 3), (80, 3), (96, 3))
]
BUDGETS = [3e11, 7.5e11, 1.9e12, 4.8e12]
EPOCH = 1.18e7  # tokens; of the two smallest models a run of 4.8e12 FLOPs would be longer, and no run sees a byte twice


def within_an_epoch(cost, counted):
    return [tokens for tokens in iso_flops(BUDGETS)(cost, counted) if tokens < EPOCH]


OVERRIDES = {
    "data.packing": "windows",  # rows are full, so a token of the plan is a token that is trained on
    "data.seq_len": 128,
    "data.batch_size": 2,  # 2 * 128 = 256 tokens a step: the shortest run, of 117,000 tokens, then has 456 steps
    "data.eval_fraction": 0.03,
    "model.max_seq_len": 128,
    "optimizer.name": "adamw",
    "optimizer.learning_rate": 4e-3,  # at width 64; muP takes it to the others
    "optimizer.beta2": 0.99,
    "optimizer.final_fraction": 0.0,
    "metrics.every_steps": 100,
    "evaluate.every_steps": 0,  # at the end only
    "evaluate.batch_size": 16,
    "evaluate.sample_tokens": 0,
    "checkpoint.every_steps": 2000,
}


def get_family(arg: str = ""):
    tiny = arg == "tiny"
    return Family(
        recipe="configs/stdlib_tiny.py",
        shapes=SHAPES[:3] if tiny else SHAPES,
        tokens=iso_flops([2e10, 4e10, 8e10]) if tiny else within_an_epoch,
        held_out=HeldOut(shape(48, 3, 16), tokens=3e5) if tiny else HeldOut(shape(128, 4, 16), tokens=4e6),
        rate=mup(64),
        warmup=0.05,
        overrides=OVERRIDES,
        timeout=7200,
    )
