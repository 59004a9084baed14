"""Layers that differ: what each one is, from the patterns that the model's knobs repeat through the layers."""

from __future__ import annotations

import dataclasses
import functools
from typing import TYPE_CHECKING

from gptjax.config.knobs import UserError

if TYPE_CHECKING:
    from gptjax.config.model import ModelConfig

# Positions that a layer has by itself, so that they can differ from layer to layer; the others are added to the embedding.
LAYER_POSITIONS = ("rotary", "alibi", "t5", "none")


def positions(model: ModelConfig) -> tuple[str, ...]:
    """Every way in which some layer's tokens know their place."""
    return model.position_pattern or (model.position,)


def described(model: ModelConfig) -> str:
    """The knob that says which positions the layers have, with its value."""
    pattern = ",".join(model.position_pattern)
    return f"model.position_pattern={pattern}" if pattern else f"model.position={model.position}"


@functools.lru_cache
def layer_configs(model: ModelConfig) -> tuple[ModelConfig, ...]:
    """The configs of the first p layers, of which all others are repetitions: layer n is as layer n % p, and p is the least.

    A layer's config says for it alone what the patterns say for all: its own window, position and rotary base. Layers that are
    alike are one config, the model's own where no pattern is given.
    """
    all_layers = [_layer_config(model, number) for number in range(model.num_layers)]
    period = next(p for p in range(1, len(all_layers) + 1) if all_layers[p:] == all_layers[:-p])
    return tuple(all_layers[:period])


def _layer_config(model: ModelConfig, number: int) -> ModelConfig:
    is_local = not model.attention_pattern or model.attention_pattern[number % len(model.attention_pattern)] == "local"
    own_base = is_local and model.local_rope_base > 0
    return dataclasses.replace(
        model,
        attention_pattern=(),
        position_pattern=(),
        local_rope_base=0.0,
        attention_window=model.attention_window if is_local else 0,
        position=positions(model)[number % len(positions(model))],
        rope_base=model.local_rope_base if own_base else model.rope_base,
        rope_scaling="none" if own_base else model.rope_scaling,
    )


def check(model: ModelConfig) -> None:
    """Raises `UserError` for patterns that say nothing, or another thing than the knobs beside them."""
    attention, position = ",".join(model.attention_pattern), ",".join(model.position_pattern)
    window, base = f"model.attention_window={model.attention_window}", f"model.local_rope_base={model.local_rope_base}"
    if "local" in model.attention_pattern and not model.attention_window:
        raise UserError(f"model.attention_pattern={attention} has local layers, but {window} says not how far they see; set it.")
    if attention and "local" not in model.attention_pattern and model.attention_window:
        raise UserError(f"model.attention_pattern={attention} has no local layer, for which {window} is; change one of them.")
    if position and model.position != model.position_pattern[0]:
        raise UserError(
            f"model.position_pattern={position} says each layer's position, and model.position={model.position} is not "
            f"the first's; set it to {model.position_pattern[0]}."
        )
    if model.local_rope_base:
        if model.local_rope_base <= 1:
            raise UserError(f"{base} must be above 1, or 0 for model.rope_base.")
        if "local" not in model.attention_pattern:
            raise UserError(
                f"{base} is for local layers, but model.attention_pattern=({attention}) has none; change one of them."
            )
        if "rotary" not in positions(model):
            raise UserError(f"{base} is for rotary positions, but model.position={model.position}; change one of them.")


def check_stages(model: ModelConfig, stages: int) -> None:
    """Raises `UserError` where a stage of a pipeline would not hold whole periods: all stages must hold the same layers."""
    period = len(layer_configs(model))
    if stages > 1 and model.num_layers // stages % period:
        raise UserError(
            f"model.num_layers={model.num_layers} over mesh.stage={stages} leaves {model.num_layers // stages} layers a stage, "
            f"not whole repetitions of the {period} of model.attention_pattern and model.position_pattern; change one of them."
        )
