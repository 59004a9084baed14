"""A picture of the block that a config gives, in text: what flows from x to x.

It is composed as the block is, from the same table of norms (forms.py): the stream runs down the left, a branch leaves it, goes
through its boxes, and comes back at a sum.
"""

from __future__ import annotations

import dataclasses
import textwrap
from typing import Any, NamedTuple

from gptjax.config import ModelConfig
from gptjax.model.forms import FORMS

# Knobs that a box mentions where they are not at their default, by the fronts of their names.
_ATTENTION_KNOBS = ("attention_", "rope_", "rotary_", "latent_", "position_")
_EXPERT_KNOBS = ("num_shared_experts", "expert_", "router_")
_BOX_WIDTH = 32


class Picture(NamedTuple):
    """Lines of one width; data comes in at the top and goes out at the bottom, in column `port`."""

    lines: list[str]
    port: int


def draw_block(model: ModelConfig) -> str:
    """The block of `model` from x to x: norms, attention, MLP, scales and dropout, each where it is applied."""
    form = FORMS[model.norm_placement, model.block]
    attention = [_attention(model), *_after(model, 0)]
    mlp = [_mlp(model), *_after(model, 1)]
    stages = [Picture(["x"], 0)]
    if form.shares_norm:
        norm = _norm(model, form.before[0])
        stages.append(_on_the_side(stack(*norm, beside(stack(*attention), stack(*mlp)))))
    elif form.parallel:
        branches = (stack(*_norm(model, form.before[0]), *attention), stack(*_norm(model, form.before[1]), *mlp))
        stages.append(_on_the_side(beside(*branches)))
    else:
        for number, branch in enumerate((attention, mlp)):
            stages.append(_on_the_side(stack(*_norm(model, form.before[number]), *branch)))
            stages += _norm(model, form.of_sum[number])
    if form.parallel:
        stages += _norm(model, form.of_sum[1])
    lines = stack(*stages, Picture(["x"], 0)).lines
    return "\n".join(line.rstrip() for line in lines) + "\n"


# --- what stands in the boxes --------------------------------------------------------------------------------------------


def _norm(model: ModelConfig, name: str) -> list[Picture]:
    if not name or model.norm == "none":
        return []
    bias = " without bias" if model.norm == "layernorm" and not model.norm_bias else ""
    return [box(name, f"{model.norm}{bias}")]


def _attention(model: ModelConfig) -> Picture:
    shared = f", {model.num_kv_heads} of keys and values" if model.num_kv_heads != model.num_heads else ""
    lines = [f"{model.num_heads} heads of {model.head_dim}{shared}", f"positions: {model.position}"]
    if model.query_key_norm:
        lines.append("query_norm and key_norm")
    return box("attention", *lines, *_settings(model, _ATTENTION_KNOBS))


def _mlp(model: ModelConfig) -> Picture:
    if not model.num_experts:
        return box("mlp", *_maps(model, model.mlp_dim))
    routed = f"{model.num_experts} of them, {model.experts_per_token} for each token"
    return box("experts", routed, *_maps(model, model.expert_mlp_dim), *_settings(model, _EXPERT_KNOBS))


def _maps(model: ModelConfig, hidden: int) -> list[str]:
    bias = "" if model.mlp_bias else ", without biases"
    act = "" if model.activation == "identity" else model.activation
    inner = f"{act}(gate) * up" if act else "gate * up"
    if not model.gated_mlp:
        inner = f"{act}(up)" if act else "up"
    return [f"{model.model_dim} to {hidden}: {inner}", f"{hidden} to {model.model_dim}: down{bias}"]


def _settings(model: ModelConfig, fronts: tuple[str, ...]) -> list[str]:
    """Knobs that are not at their default, and are no size that follows from others."""
    fields = [field for field in dataclasses.fields(model) if field.name.startswith(fronts) and field.name != "expert_mlp_dim"]
    return [f"{field.name} {_text(value)}" for field in fields if (value := getattr(model, field.name)) != field.default]


def _text(value: Any) -> str:
    return "+".join(map(str, value)) if isinstance(value, tuple) else str(value)


def _after(model: ModelConfig, number: int) -> list[Picture]:
    """What becomes of a branch's result before it is added, in the block's order."""
    boxes = _norm(model, FORMS[model.norm_placement, model.block].after[number])
    if model.residual_scale != 1:
        boxes.append(box(f"times {model.residual_scale:.4g}"))
    if model.layer_scale:
        boxes.append(box(f"{('attention', 'mlp')[number]}_layer_scale", f"each channel, from {model.layer_scale:.4g}"))
    if model.residual_dropout:
        boxes.append(box(f"dropout {model.residual_dropout:.4g}"))
    if model.stochastic_depth:
        first = model.stochastic_depth / model.num_layers
        boxes.append(box("stochastic depth", f"rows left out: {first:.3g} to {model.stochastic_depth:.3g}"))
    return boxes


# --- how pictures are put together ---------------------------------------------------------------------------------------


def box(*paragraphs: str) -> Picture:
    """A frame around texts, its ports in the middle."""
    lines = [line for text in paragraphs for line in textwrap.wrap(text, _BOX_WIDTH)]
    width = max(map(len, lines)) | 1  # odd, so that there is a middle
    port = width // 2 + 2
    edge = ["─"] * (width + 2)
    top, bottom = edge.copy(), edge.copy()
    top[port - 1], bottom[port - 1] = "┴", "┬"
    body = [f"│ {line:^{width}} │" for line in lines]
    return Picture(["╭" + "".join(top) + "╮", *body, "╰" + "".join(bottom) + "╯"], port)


def stack(*pictures: Picture) -> Picture:
    """One above the other, port on port, with an arrow between."""
    port = max(picture.port for picture in pictures)
    lines: list[str] = []
    for picture in pictures:
        if lines:
            lines.append(" " * port + "│")
        lines += [" " * (port - picture.port) + line for line in picture.lines]
    width = max(map(len, lines))
    return Picture([line.ljust(width) for line in lines], port)


def beside(left: Picture, right: Picture) -> Picture:
    """Two ways for what comes in, and their sum."""
    height = max(len(left.lines), len(right.lines))
    tall = [_prolonged(picture, height) for picture in (left, right)]
    gap = 2
    ports = left.port, len(left.lines[0]) + gap + right.port
    middle = sum(ports) // 2
    width = len(left.lines[0]) + gap + len(right.lines[0])
    split, join = ([" "] * width for _ in range(2))
    for column in range(ports[0], ports[1] + 1):
        split[column] = join[column] = "─"
    for line, corners, port in ((split, "╭╮", "┴"), (join, "╰╯", "┬")):
        line[ports[0]], line[ports[1]], line[middle] = *corners, port
    body = [a + " " * gap + b for a, b in zip(*(picture.lines for picture in tall), strict=True)]
    return Picture(["".join(split), *body, "".join(join)], middle)


def _prolonged(picture: Picture, height: int) -> Picture:
    line = (" " * picture.port + "│").ljust(len(picture.lines[0]))
    return Picture(picture.lines + [line] * (height - len(picture.lines)), picture.port)


def _on_the_side(branch: Picture) -> Picture:
    """The stream on the left, from which a branch leaves and to which it is added; the port is the stream's."""
    room = 5
    port = room + branch.port
    leaves = "├" + "─" * (port - 1) + "╮"
    comes = "⊕◀" + "─" * (port - 2) + "╯"
    body = ["│" + " " * (room - 1) + line for line in branch.lines]
    width = max(map(len, (leaves, *body, comes)))
    return Picture([line.ljust(width) for line in (leaves, *body, comes)], 0)
