"""A Hugging Face generation_config.json, as transformers 4 and 5 write it, to the fields of `GenerationConfig` and back."""

from __future__ import annotations

import difflib
import json
import os
import pathlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gptjax.config import UserError

# Keys that change nothing about the text that is written here: of the file itself, of caches and compilation, of what is returned
# beside the text, of encoder-decoder models, and of how many tokens a draft may propose from one step to the next.
WITHOUT_EFFECT = frozenset(
    {
        "transformers_version",
        "_from_model_config",
        "_commit_hash",
        "use_cache",
        "cache_implementation",
        "cache_config",
        "max_cache_len",
        "return_legacy_cache",
        "compile_config",
        "disable_compile",
        "continuous_batching_config",
        "low_memory",
        "prefill_chunk_size",
        "output_attentions",
        "output_hidden_states",
        "output_scores",
        "output_logits",
        "return_dict_in_generate",
        "decoder_start_token_id",
        "num_assistant_tokens_schedule",
        "assistant_confidence_threshold",
        "assistant_lookbehind",
        "target_lookbehind",
    }
)

# Keys that ask for what is not done here, with the values that ask for nothing.
NOT_DONE: dict[str, tuple[Any, ...]] = {
    "max_time": (),
    "guidance_scale": (1,),
    "watermarking_config": (),
    "token_healing": (False,),
    "constraints": (),
    "force_words_ids": (),
    "dola_layers": (),
    "use_mtp": (False,),
    "is_assistant": (False,),
    "assistant_early_exit": (),
    "assistant_ensemble_weight": (),
    "speculation_type": (),
}

# transformers' defaults where they differ from ours.
DEFAULTS: dict[str, Any] = {"do_sample": False, "top_k": 50}
DEFAULT_MAX_NEW_TOKENS = 20

# Fields that transformers does not have.
OURS = frozenset({"presence_penalty", "frequency_penalty", "forced_prefix_ids"})


def read(source: str | os.PathLike[str] | Mapping[str, Any]) -> tuple[dict[str, Any], str]:
    """(keys and values, what to call their source in a message) of a file, its folder or a mapping."""
    if isinstance(source, Mapping):
        return dict(source), "generation config"
    path = pathlib.Path(source)
    path = path / "generation_config.json" if path.is_dir() else path
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read as JSON: {error}.") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds {type(values).__name__}, but it must hold an object of settings.")
    return values, str(path)


def to_fields(values: Mapping[str, Any], fields: Sequence[str]) -> dict[str, Any]:
    """The fields of `GenerationConfig` that `values` sets. Raises `UserError` naming a key."""
    for key, value in values.items():
        if key in NOT_DONE and value is not None and value not in NOT_DONE[key]:
            raise UserError(f"{key}={value!r} asks for what gptjax does not do; leave it out.")
        if key not in WITHOUT_EFFECT and key not in NOT_DONE and key not in fields:
            near = difflib.get_close_matches(key, [*fields, *NOT_DONE, *WITHOUT_EFFECT], n=1)
            raise UserError(f"unknown key {key}{f'; did you mean {near[0]}?' if near else '.'}")
    chosen = DEFAULTS | {key: value for key, value in values.items() if key in fields and value is not None}
    # A limit on new tokens goes before one on the whole length.
    if "max_new_tokens" in chosen:
        chosen.pop("max_length", None)
    else:
        chosen["max_new_tokens"] = chosen.get("max_length", DEFAULT_MAX_NEW_TOKENS)
    if "min_new_tokens" in chosen:
        chosen.pop("min_length", None)
    if isinstance(chosen.get("stop_strings"), str):
        chosen["stop_strings"] = [chosen["stop_strings"]]
    if isinstance(chosen.get("sequence_bias"), Mapping):
        chosen["sequence_bias"] = [[_ids_of(key), bias] for key, bias in chosen["sequence_bias"].items()]
    return chosen


def _ids_of(key: Any) -> Any:
    """The ids of a key of `sequence_bias` in its older form, a dict: a tuple, which JSON has as the text "(1, 2)"."""
    if isinstance(key, str) and re.fullmatch(r"\(\s*\d+\s*(,\s*\d+\s*)*,?\s*\)", key):
        return [int(number) for number in re.findall(r"\d+", key)]
    return key


def from_fields(max_new_tokens: int, max_length: int, do_sample: bool, top_k: int, changed: Mapping[str, Any]) -> dict[str, Any]:
    """Keys and values of a generation_config.json for the fields in `changed`, those that are not at their defaults."""
    ours = [name for name in changed if name in OURS]
    if ours:
        raise UserError(f"{ours[0]}={changed[ours[0]]} has no counterpart in a generation_config.json.")
    if max_length > 0 and max_new_tokens < max_length:
        raise UserError(
            f"max_new_tokens={max_new_tokens} and max_length={max_length} cannot both stand in a generation_config.json: "
            "there the first replaces the second."
        )
    limit = {"max_length": max_length} if max_length else {"max_new_tokens": max_new_tokens}
    rest = {name: value for name, value in changed.items() if name not in ("max_new_tokens", "max_length")}
    return json.loads(json.dumps({"do_sample": do_sample, "top_k": top_k} | limit | rest))
