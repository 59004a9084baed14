"""What the maximal update parameterization asks of other knobs. Its rules are in model/parameterization.py."""

from __future__ import annotations

from typing import TYPE_CHECKING

from gptjax.config.knobs import UserError

if TYPE_CHECKING:
    from gptjax.config.schema import Config

# Which column of the rules each `optimizer.name` follows; one that is not here cannot go with model.parameterization=mup.
# "adam": the size of an update does not depend on the gradient's, as under a sign. "sgd": it is in proportion to it.
# "muon": matrices of the blocks move by orthogonal matrices, everything else as under "adam".
UPDATE_KINDS = {
    "adamw": "adam",
    "lion": "adam",
    "adafactor": "adam",
    "schedule_free_adamw": "adam",
    "sgd": "sgd",
    "muon": "muon",
}


def check(config: Config) -> None:
    """Raises `UserError` for knobs that don't go with the parameterization."""
    model, rule = config.model, config.optimizer.name
    if model.parameterization == "standard":
        for name in ("mup_base_dim", "mup_base_head_dim"):
            if value := getattr(model, name):
                raise UserError(f"model.{name}={value} is for model.parameterization=mup, not standard; set it to 0.")
        return
    if not model.mup_base_dim:
        raise UserError(
            "model.parameterization=mup needs model.mup_base_dim, the model_dim at which it equals the standard parameterization."
        )
    for key, value, wanted in (
        ("attention_kind", model.attention_kind, "multi_head"),
        ("embedding_dim", model.embedding_dim, 0),
    ):
        if value != wanted:
            raise UserError(f"model.parameterization=mup has no rules for model.{key}={value}; set it to {wanted}.")
    if model.mup_base_head_dim and model.attention_score != "scaled_dot":
        raise UserError(
            f"model.mup_base_head_dim={model.mup_base_head_dim} changes the scale of scaled_dot, but model.attention_score="
            f"{model.attention_score}; change one of them."
        )
    if rule not in UPDATE_KINDS:
        raise UserError(
            f"model.parameterization=mup has no learning rates for optimizer.name={rule}; it has them for "
            f"{', '.join(UPDATE_KINDS)}."
        )
