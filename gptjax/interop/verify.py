"""Our logits against transformers', on the same folder (extra: parity)."""

from __future__ import annotations

import dataclasses
import pathlib
import warnings
from collections.abc import Mapping
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


def compare(
    folder: pathlib.Path, config: ModelConfig, params: Any, head: Mapping[str, Any] | None = None, suffix: str = ""
) -> dict[str, Any]:
    """The largest difference between the logits of a Hugging Face folder, computed by transformers, and ours, both in float32.

    {"largest_error", "largest_logit", "rows", "length", "versions"}, over random tokens. `params` is a tree of arrays. With a
    task's `head` ({"kernel": [D, K], "bias": [K]}) the logits are the head's, of transformers' class whose name ends in `suffix`
    (interop/task_heads.py).
    """
    torch, transformers = _packages()
    shape = (ROWS, min(LENGTH, config.max_seq_len))
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, shape)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        load = getattr(transformers, f"AutoModel{suffix or 'ForCausalLM'}").from_pretrained
        model = load(str(folder), dtype=torch.float32, attn_implementation="eager", local_files_only=True).eval()
        # row by row: the class for texts as a whole takes several only with a padding token, which it then looks for
        theirs = np.concatenate([_said(model(row[None])) for row in torch.from_numpy(tokens)])
    del model
    config = dataclasses.replace(config, dtype="float32", param_dtype="float32", attention="auto")
    params, head = jax.tree.map(lambda leaf: jnp.asarray(leaf, jnp.float32), (params, head))
    ours = _ours(config, params, head, tokens.astype(np.int32))
    ours = ours[:, -1] if suffix == "ForSequenceClassification" else ours
    assert ours.shape == theirs.shape, (ours.shape, theirs.shape)
    return {
        "largest_error": float(np.abs(ours - theirs).max()),
        "largest_logit": float(np.abs(theirs).max()),
        "rows": shape[0],
        "length": shape[1],
        "versions": {"torch": torch.__version__, "transformers": transformers.__version__, "jax": jax.__version__},
    }


def _said(outputs: Any) -> np.ndarray:
    """[1, T, K] of what a model of transformers returns, or [1, K] of a text as a whole."""
    if "start_logits" in outputs:
        return np.stack([outputs.start_logits.numpy(), outputs.end_logits.numpy()], axis=-1)
    return outputs.logits.numpy()


def _ours(config: ModelConfig, params: Any, head: Mapping[str, Any] | None, tokens_BT: np.ndarray) -> np.ndarray:
    """[B, T, V], or [B, T, K] of the head."""
    if head is None:
        return np.asarray(Decoder(config).apply({"params": params}, tokens_BT)[0])
    found: Any = Decoder(config).apply({"params": params}, tokens_BT, method=Decoder.hidden)
    return np.asarray(jnp.matmul(found[0], head["kernel"], precision="highest") + head.get("bias", 0.0))
