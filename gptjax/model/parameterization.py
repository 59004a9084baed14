"""How initial weights, learning rates and forward multipliers follow the width: the maximal update parameterization, muP.

Yang et al., 2022 ("Tensor Programs V"), in the form of their table 8, relative to a base width as in their section "base shapes":
at `model.mup_base_dim` everything equals the standard parameterization, and with r = model_dim / mup_base_dim

    role         parameters                              initial std   Adam-like   SGD-like   Muon    forward
    embedding    tokens (tied ones too), positions       1             1           r          1
    head         an untied head                          1             1           r          1
    hidden       kernels from width to width             1 / sqrt(r)   1 / r       1          1
    router       from width to experts                   1 / r         1 / r       1 / r      1 / sqrt(r)
    vector       norms' scales, biases                   1             1           r          1
    head_vector  scales and biases of a head's norm      1             1           h          1

in which the columns are factors of `init_std` and of the learning rate, and h = head_dim / mup_base_head_dim. All ratios are
taken to be r: MLP, experts, and heads grow with the width. Beside them, in the forward pass, the final hidden vector is
multiplied by 1 / r, for training, evaluation and generation alike, which gives logits their 1 / r whether the embedding is tied
or not; and queries by 1 / sqrt(h), so that scores are q . k * sqrt(mup_base_head_dim) / head_dim, as 1 / head_dim is muP's scale.
The usual way to grow is by heads of one size, where h = 1 and scores are the standard ones.

The router's rule is the table 3 form (no multiplier) of the same output role. Its Muon factor, and the 1 of hidden matrices, come
from the spectral condition (Yang, Simon and Bernstein, 2023: an update's spectral norm is to be in proportion to
sqrt(outputs / inputs)): Muon's updates have the spectral norm sqrt(max(1, outputs / inputs)) here (Jordan et al., 2024), which
does not depend on the width where both grow; of the router's only the inputs do. What Muon leaves to AdamW has Adam's factors.

Weight decay: learning rate times weight decay stays as it is at the base width, for all roles, as in the authors' package (which
multiplies Adam's weight decay by what it divides the learning rate by) and as Wortsman et al. (2023) find best across widths. So
the factors apply to the update before decay is added. Adam's epsilon is not scaled: gradients of hidden kernels shrink as 1 / r,
and must stay well above it.
"""

from __future__ import annotations

import dataclasses
import math
import re
from typing import Any, NamedTuple

from gptjax.config import Config, ModelConfig, UserError
from gptjax.config.parameterization import UPDATE_KINDS


class Powers(NamedTuple):
    """Exponents of the width's ratio: of the initial standard deviation, and of the learning rate by kind of update."""

    std: float
    adam: float
    sgd: float
    muon: float


ROLES = {
    "embedding": Powers(std=0, adam=0, sgd=1, muon=0),
    "head": Powers(std=0, adam=0, sgd=1, muon=0),
    "hidden": Powers(std=-0.5, adam=-1, sgd=0, muon=0),
    "router": Powers(std=-1, adam=-1, sgd=-1, muon=-0.5),
    "vector": Powers(std=0, adam=0, sgd=1, muon=0),
    "head_vector": Powers(std=0, adam=0, sgd=1, muon=0),  # of the heads' ratio
}

_BLOCK = "(layers|prediction_heads)/"

# Role of each parameter by a regular expression of its whole path. A new parameter needs a line: its role cannot be guessed.
PATTERNS = {
    r"embed/(tokens|positions)": "embedding",
    r"head": "head",
    _BLOCK + r"attention/(query|key|value|output)/kernel": "hidden",
    _BLOCK + r"(mlp|experts|experts/shared)/(up|gate|down)/kernel": "hidden",
    _BLOCK + r"experts/router/kernel": "router",
    _BLOCK + r"attention/(query|key)_norm/(scale|bias)": "head_vector",
    _BLOCK + r"attention/(score_vector|cosine_norm_scale|sink_bias|distance_bias)": "head_vector",
    _BLOCK + r"\w+_norm/(scale|bias)": "vector",
    _BLOCK + r"\w+_layer_scale": "vector",
    _BLOCK + r"(attention|mlp|experts|experts/shared)/\w+/bias": "vector",
    r"final_norm/(scale|bias)": "vector",
}


def role_of(path: str) -> str:
    """The role of the parameter at 'layers/mlp/up/kernel'. Raises `UserError` where the rules have none for it."""
    for pattern, role in PATTERNS.items():
        if re.fullmatch(pattern, path):
            return role
    raise UserError(f"model.parameterization=mup has no rule for the parameter {path}.")


def _ratio(config: ModelConfig, role: str) -> float:
    if config.parameterization == "standard":
        return 1.0
    return head_ratio(config) if role == "head_vector" else config.model_dim / config.mup_base_dim


def head_ratio(config: ModelConfig) -> float:
    """Width of a head over that at the base width; 1 where it does not grow."""
    return config.head_dim / (config.mup_base_head_dim or config.head_dim)


def initial_std(config: ModelConfig, role: str) -> float:
    """Standard deviation of a new parameter; projections into the residual stream divide it further."""
    return config.init_std * _ratio(config, role) ** ROLES[role].std


def output_multiplier(config: ModelConfig) -> float:
    """What the final hidden vector is multiplied by."""
    return 1.0 / _ratio(config, "head")


def query_multiplier(config: ModelConfig) -> float:
    """What queries are multiplied by, besides the 1 / sqrt(head_dim) of their scores."""
    return 1.0 / math.sqrt(_ratio(config, "head_vector"))


def learning_rate_multiplier(config: Config, path: str) -> float:
    """The factor of the update of the parameter at `path`, before weight decay is added; 1 in the standard parameterization.

    Raises `UserError` for a parameter that has no rule.
    """
    if config.model.parameterization == "standard":
        return 1.0
    role = role_of(path)
    return _ratio(config.model, role) ** getattr(ROLES[role], UPDATE_KINDS[config.optimizer.name])


def standard(config: ModelConfig) -> ModelConfig:
    """The config of the model that `folded` parameters make."""
    return dataclasses.replace(config, parameterization="standard", mup_base_dim=0, mup_base_head_dim=0)


def folded(config: ModelConfig, flat: dict[str, Any]) -> dict[str, Any]:
    """The parameters {path: array} of the `standard` model that computes the same: the final norm takes the output's multiplier,
    and what makes queries theirs.

    No number is rounded where the ratios are powers of two (of four, for heads), and once otherwise. Raises `UserError` where
    bfloat16 parameters would be rounded.
    """
    queries = "query_norm/(scale|bias)" if config.query_key_norm else "query/(kernel|bias)"
    multipliers = {"final_norm/(scale|bias)": output_multiplier(config), f"layers/attention/{queries}": query_multiplier(config)}
    for pattern, multiplier in multipliers.items():
        if config.param_dtype == "bfloat16" and math.frexp(multiplier)[0] != 0.5:
            raise UserError(
                f"model.mup_base_dim={config.mup_base_dim} and mup_base_head_dim={config.mup_base_head_dim} give the factor "
                f"{multiplier:.6g}, by which model.param_dtype=bfloat16 cannot be multiplied without a rounding."
            )
        if multiplier != 1.0:
            flat = {path: leaf * multiplier if re.fullmatch(pattern, path) else leaf for path, leaf in flat.items()}
    return flat
