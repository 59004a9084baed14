"""Rotary positions in config.json: `rope_theta` and `rope_scaling`, or `rope_parameters` as transformers 5 writes them."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from gptjax.config import ModelConfig, UserError

if TYPE_CHECKING:
    from gptjax.interop.architectures import Source

# For each scaling, our knob by their key. "attention_factor" of yarn may also be given by two others.
_ORIGINAL = {"original_max_position_embeddings": "rope_original_max_seq_len"}
KEYS: dict[str, dict[str, str]] = {
    "none": {},
    "linear": {"factor": "rope_scaling_factor"},
    "dynamic": {"factor": "rope_scaling_factor"},
    "llama3": {
        "factor": "rope_scaling_factor",
        "low_freq_factor": "rope_low_freq_factor",
        "high_freq_factor": "rope_high_freq_factor",
        **_ORIGINAL,
    },
    "yarn": {
        "factor": "rope_scaling_factor",
        "beta_fast": "rope_beta_fast",
        "beta_slow": "rope_beta_slow",
        "truncate": "rope_truncate",
        "attention_factor": "rope_attention_factor",
        **_ORIGINAL,
    },
}
_NEEDED = ("factor", "low_freq_factor", "high_freq_factor")
_MSCALE = {"mscale", "mscale_all_dim"}


def reader(
    base_key: str = "rope_theta", fraction_key: str = "partial_rotary_factor", fraction: float = 1.0
) -> Callable[[Source], dict[str, Any]]:
    """What reads an architecture's rotary knobs, where the base and the rotated share of a head have these keys.

    With a `fraction` of 1 by default the architecture rotates whole heads, whatever its file says; another share is refused.
    """

    def read(source: Source) -> dict[str, Any]:
        group = next((name for name in ("rope_scaling", "rope_parameters") if source.values.get(name)), "rope_scaling")
        values = source.values.get(group) or {}
        if not isinstance(values, dict):
            raise source.refuse(group, "is not a group of keys.")
        own = {"rope_theta": source.get(base_key, 10000.0), "partial_rotary_factor": source.get(fraction_key, fraction)}
        own |= {key: values[key] for key in own if values.get(key) is not None}
        if fraction == 1 and own["partial_rotary_factor"] != 1:
            raise UserError(f"{source.path}: partial_rotary_factor={own['partial_rotary_factor']!r} is not of this architecture.")
        knobs = {"rope_base": own["rope_theta"], "rotary_fraction": own["partial_rotary_factor"]}
        rest = {key: value for key, value in values.items() if key not in own and value is not None}
        named = rest.pop("rope_type", None) or rest.pop("type", None) or "default"
        rest.pop("type", None)
        return knobs | _scaling(source, group, "none" if named == "default" else named, rest)

    return read


def _scaling(source: Source, group: str, kind: str, values: dict[str, Any]) -> dict[str, Any]:
    if kind not in KEYS:
        raise source.refuse(group, f"asks for rope_type {kind!r}, which the decoder does not have; it has {', '.join(KEYS)}.")
    values = dict(values)
    length = source.get("max_position_embeddings")
    if kind == "none":
        values.pop("factor", None)  # which says nothing
    if kind in ("llama3", "yarn"):
        values.setdefault("original_max_position_embeddings", source.get("original_max_position_embeddings", length))
    if kind == "yarn":
        values.setdefault("factor", length / values["original_max_position_embeddings"])
        values = _with_attention_factor(values)
    unknown = sorted(set(values) - set(KEYS[kind]))
    if unknown:
        raise source.refuse(group, f"has {unknown[0]!r}, which the decoder does not know of rope_type {kind!r}.")
    missing = [key for key in _NEEDED if key in KEYS[kind] and key not in values]
    if missing:
        raise source.refuse(group, f"has no {missing[0]!r}, which rope_type {kind!r} needs.")
    knobs = {"rope_scaling": kind} | {KEYS[kind][key]: value for key, value in values.items()}
    # Theirs stretches from max_position_embeddings as rows grow longer; ours from there to max_seq_len.
    return knobs | ({"rope_original_max_seq_len": length} if kind == "dynamic" else {})


def _with_attention_factor(values: dict[str, Any]) -> dict[str, Any]:
    """DeepSeek's pair of numbers, from which transformers computes the factor unless it is given."""
    one, all_dimensions = values.get("mscale"), values.get("mscale_all_dim")
    rest = {key: value for key, value in values.items() if key not in _MSCALE}
    if "attention_factor" not in rest and one and all_dimensions:
        rest["attention_factor"] = yarn_scale(rest["factor"], one) / yarn_scale(rest["factor"], all_dimensions)
    return rest


def yarn_scale(factor: float, weight: float = 1.0) -> float:
    """0.1 * weight * ln(factor) + 1 (Peng et al., 2023, equation 22)."""
    return 0.1 * weight * math.log(factor) + 1.0 if factor > 1 else 1.0


def writer(base_key: str = "rope_theta", fraction_key: str = "") -> Callable[[ModelConfig], dict[str, Any]]:
    """What writes them: in the older form, which all versions of transformers read."""

    def write(config: ModelConfig) -> dict[str, Any]:
        values: dict[str, Any] = {base_key: config.rope_base}
        if fraction_key:
            values[fraction_key] = config.rotary_fraction
        if config.rope_scaling == "none":
            return values | {"rope_scaling": None}
        scaling = {theirs: getattr(config, ours) for theirs, ours in KEYS[config.rope_scaling].items()}
        if "original_max_position_embeddings" in scaling:
            scaling["original_max_position_embeddings"] = config.rope_original_max_seq_len or config.max_seq_len
        if not scaling.get("attention_factor", 1):
            del scaling["attention_factor"]
        return values | {"rope_scaling": {"rope_type": config.rope_scaling, **scaling}}

    return write
