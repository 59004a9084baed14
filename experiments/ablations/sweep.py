"""Ablations of the small Shakespeare model, one line of the config each: see README.md."""

from gptjax.config import UserError
from gptjax.sweeps.definition import Sweep
from gptjax.sweeps.space import chain, grid, seeds, zip_

RECIPE = "configs/shakespeare_char.py:cpu"

# Sizes that keep the number of parameters where a variant would have more of them: a gated MLP has three matrices for two.
MLPS = zip_(
    {
        "model.activation": ["relu", "relu2", "gelu", "silu"],
        "model.gated_mlp": [False, False, False, True],
        "model.mlp_dim": [512, 512, 512, 341],
    }
)

NORM_PLACEMENTS = zip_(
    {
        "model.norm_placement": ["pre", "post", "sandwich", "post"],
        "model.block": ["serial", "serial", "serial", "parallel"],  # the last: norm(x + attention(x) + mlp(x))
    }
)

# Each rule with rates around the one its authors recommend beside AdamW's; the table compares each at its best.
OPTIMIZERS = chain(
    grid({"optimizer.name": ["adamw"], "optimizer.learning_rate": [7.5e-4, 1.5e-3, 3e-3, 6e-3]}),
    # The paper's slow average, of a half-life of 6,931 steps, is for longer runs; this one's is 693.
    grid(
        {"optimizer.name": ["ademamix"], "optimizer.learning_rate": [7.5e-4, 1.5e-3, 3e-3], "optimizer.ademamix_beta3": [0.999]}
    ),
    grid({"optimizer.name": ["soap"], "optimizer.learning_rate": [1.5e-3, 3e-3, 6e-3]}),
    grid({"optimizer.name": ["lion"], "optimizer.learning_rate": [1.5e-4, 3e-4, 6e-4]}),
    grid(
        {"optimizer.name": ["muon"], "optimizer.learning_rate": [1e-2, 2e-2, 4e-2], "optimizer.muon_adam_learning_rate": [4e-3]}
    ),
)

# Sinusoids are as large as 1 and fresh token embeddings as 0.02: as in the paper, embeddings times sqrt(width) beside them.
EMBEDDING_SCALES = grid({"model.position": ["sinusoidal"], "model.embedding_scale": [1.0, 0.0]})

ABLATIONS = {
    "attention_score": grid({"model.attention_score": ["scaled_dot", "dot", "cosine", "additive"]}),
    "position": grid({"model.position": ["learned", "sinusoidal", "rotary", "alibi", "t5"]}),
    "embedding_scale": EMBEDDING_SCALES,
    "norm_placement": NORM_PLACEMENTS,
    "mlp": MLPS,
    "optimizer": OPTIMIZERS,
}


def get_sweep(arg: str = ""):
    """One of `ABLATIONS`; all of them where none is named."""
    if arg not in ("", *ABLATIONS):
        raise UserError(f"experiments/ablations/sweep.py has no ablation {arg!r}; it has {', '.join(ABLATIONS)}.")
    return Sweep(
        recipe=RECIPE,
        space=grid(ABLATIONS[arg] if arg else chain(*ABLATIONS.values()), seeds(3)),
        overrides={"evaluate.sample_tokens": 0},
        timeout=3600,
    )
