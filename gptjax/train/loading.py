"""A model to write with, from a run's folder or a Hugging Face folder: `gptjax.load(path)`."""

from __future__ import annotations

import json
import os
import pathlib
from collections.abc import Callable
from typing import Any

import jax

from gptjax.config import UserError, from_dict
from gptjax.data.tokenizers import tokenizer_of_folder
from gptjax.interop import huggingface
from gptjax.parallel.mesh import make_mesh
from gptjax.recipes import is_foreign
from gptjax.train.metrics import log_to_stderr
from gptjax.train.restore import ANY_LENGTHS, TrainedModel, load_run
from gptjax.train.step import abstract_state


def load(
    path: str | os.PathLike[str],
    *,
    step: int | None = None,
    weights: str | None = None,
    log: Callable[[str], None] = log_to_stderr,
) -> TrainedModel:
    """The newest intact checkpoint of a run's folder (or that of `step`), or the model of a Hugging Face folder.

    `weights`: "float32", "bfloat16" or "int8" for a model that generates alone, its weights stored so; None: the parameters as
    they are. Raises `UserError` where the folder holds neither, where it has no tokenizer, or where the tokenizer is not the
    model's.
    """
    model = _load(pathlib.Path(path), step, log)
    return model if weights is None else model.stored_as(weights)


def _load(folder: pathlib.Path, step: int | None, log: Callable[[str], None]) -> TrainedModel:
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder.")
    if not is_foreign(folder):
        return load_run(folder, log, step)
    if step is not None:
        raise UserError(f"step={step}: {folder} is a Hugging Face folder, which holds one model and no steps.")
    return _load_huggingface(folder)


def _load_huggingface(folder: pathlib.Path) -> TrainedModel:
    tokenizer = tokenizer_of_folder(folder)
    if tokenizer is None:
        raise UserError(f"{folder} has no tokenizer: neither tokenizer.json, nor vocab.json and merges.txt, nor tokenizer.model.")
    knobs, params = huggingface.load(folder)
    data = {"seq_len": 1, "add_bos": tokenizer.begins_with_bos}
    config = from_dict({"model": knobs, "data": data, "train": {"duration_steps": 1}})
    wanted = abstract_state(config, ANY_LENGTHS, make_mesh(config.mesh)).params
    placed = jax.tree.map(lambda leaf, like: jax.device_put(leaf.astype(like.dtype), like.sharding), params, wanted)
    return TrainedModel(config, placed, tokenizer, 0, _eos_ids(folder / "generation_config.json"))


def _eos_ids(path: pathlib.Path) -> tuple[int, ...] | None:
    """The tokens that end a text, where a generation_config.json names them; None: the tokenizer's."""
    if not path.is_file():
        return None
    try:
        ids: Any = json.loads(path.read_bytes()).get("eos_token_id")
        return None if ids is None else tuple(int(i) for i in (ids if isinstance(ids, list) else [ids]))
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
