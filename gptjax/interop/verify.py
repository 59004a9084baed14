"""Our logits against transformers', on the same folder (extra: parity)."""

from __future__ import annotations

import dataclasses
import pathlib
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from gptjax.config import ModelConfig, UserError
from gptjax.model.decoder import Decoder

ROWS, LENGTH = 3, 64


def check_installed() -> None:
    """Raises `UserError` where torch or transformers is missing."""
    try:
        _packages()
    except ImportError as error:
        raise UserError(
            f"--verify compares with transformers, but {error.name} is missing: pip install 'gptjax[parity]'."
        ) from None


def _packages() -> tuple[Any, Any]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, at import
        import torch
        import transformers
    transformers.utils.logging.disable_progress_bar()
    return torch, transformers


def compare(folder: pathlib.Path, config: ModelConfig, params: Any) -> dict[str, Any]:
    """The largest difference between the logits of a Hugging Face folder, computed by transformers, and ours, both in float32.

    {"largest_error", "largest_logit", "rows", "length", "versions"}, over random tokens. `params` is a tree of arrays.
    """
    torch, transformers = _packages()
    shape = (ROWS, min(LENGTH, config.max_seq_len))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        load = transformers.AutoModelForCausalLM.from_pretrained
        model = load(str(folder), dtype=torch.float32, attn_implementation="eager", local_files_only=True).eval()
        theirs = model(torch.from_numpy(tokens)).logits.numpy()
    del model
    config = dataclasses.replace(config, dtype="float32", param_dtype="float32", attention="auto")
    params = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), params)
    ours = np.asarray(Decoder(config).apply({"params": params}, tokens.astype(np.int32))[0])
    return {
        "largest_error": float(np.abs(ours - theirs).max()),
        "largest_logit": float(np.abs(theirs).max()),
        "rows": shape[0],
        "length": shape[1],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "jax": jax.__version__},
    }
