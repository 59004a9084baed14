"""Foreign models to runs' folders and back: what `gptjax convert` does.

A folder appears under its name only when all of it is written and on the disk; whatever goes wrong before leaves nothing there.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
import pathlib
import shutil
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import ml_collections
import numpy as np

from gptjax import config as config_lib
from gptjax.adapters import peft
from gptjax.config import Config, UserError
from gptjax.config.adapter import LEADING
from gptjax.config.objective import sees_later_tokens
from gptjax.data.tokenizers import Tokenizer, load_tokenizer
from gptjax.interop import formats, huggingface, layout, tokens, verify
from gptjax.interop.foreign import Foreign
from gptjax.model import parameterization
from gptjax.recipes import apply_override
from gptjax.train import run
from gptjax.train.checkpoints import Checkpoints
from gptjax.train.restore import load_params

Log = Callable[[str], None]
TOLERANCE = 1e-4  # of the largest logit: two float32 computations in different orders of summation stay far below it

# Where a tokenizer of this kind is found again in a run's folder, for data.tokenizer_path.
_TOKENIZER_FILES = {"sentencepiece": "sentencepiece.model", "huggingface": "", "gpt2": ""}


class VerificationFailed(RuntimeError):
    """transformers computes other logits from the folder."""


@contextlib.contextmanager
def new_folder(path: pathlib.Path, num_bytes: int) -> Iterator[pathlib.Path]:
    """A folder to write into, which is given its name `path` at the end; on an error it is removed.

    Raises `UserError` where something is in the way, or the disk has no room for `num_bytes`.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"--output={path} exists and is not an empty folder; take another name.")
    path.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(path.parent).free
    if num_bytes > free:
        raise UserError(f"--output={path} needs {num_bytes / 1e9:.2f} GB, but its disk has {free / 1e9:.2f} GB free.")
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        partial.mkdir()
        yield partial
        for file in sorted(partial.rglob("*")):
            run.sync(file)
        if path.exists():
            path.rmdir()
        partial.rename(path)
        run.sync(path.parent)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


# --- in -------------------------------------------------------------------------------------------------------------------------


def import_model(
    source: pathlib.Path,
    output: pathlib.Path,
    log: Log,
    *,
    format: str = "",
    dtype: str = "",
    tokenizer_path: str = "",
    overrides: Sequence[str] = (),
    verified: bool = False,
    adapter: str = "",
) -> dict[str, Any]:
    """Writes a run's folder with the model at `source`: config.json, tokenizer, and a checkpoint of parameters at step 0; with
    the adapter of the PEFT folder `adapter` beside it, as a run that was trained with it has.

    `format`: a key of `formats.FORMATS`, "": told by what is there; `dtype`: of the parameters, "": as stored; `overrides` such
    as model.max_seq_len=8192 are laid over what the source says. Returns a summary. Raises `UserError`, OSError where the disk
    refuses, and `VerificationFailed`.
    """
    model = formats.open_model(source, format)
    if verified:
        verify.check_installed()
        if model.format != "huggingface":
            raise UserError(f"--verify compares with transformers, which does not read {source}, a {model.format} file.")
    if adapter and model.format != "huggingface":
        raise UserError(f"--adapter={adapter} is for a Hugging Face folder, not for {source}, a {model.format} file.")
    tokenizer, reason = _tokenizer(model, tokenizer_path)
    config = _run_config(model, tokenizer, output, dtype, overrides)
    model.check(config.model)
    shapes = layout.shapes(config.model)
    count = sum(map(math.prod, shapes.values()))
    size = count * np.dtype(config.model.param_dtype).itemsize
    fingerprint = {"tokenizer": tokenizer.encoding_fingerprint} if tokenizer is not None else {}
    about = {"format": model.format, "architecture": model.architecture, "kinds": model.kinds(config.model)}
    with new_folder(output, size + 2**20) as folder:
        params = model.read(config.model)
        if adapter:
            knobs, own = peft.read(pathlib.Path(adapter), model.architecture, config.model, params)
            config = _with_adapter(config, knobs)
        run.write_atomically(folder / "config.json", config_lib.to_json(config).encode())
        if tokenizer is not None:
            tokenizer.save(folder / "tokenizer")
        found = verify.compare(source, config.model, params) if verified else None
        if found:
            run.write_json(folder / "verify.json", found)
            _judge(found)
        params = params | ({"adapters": own} if adapter else {})
        state = {"params": jax.tree.map(functools.partial(jax.device_put, may_alias=True), params)}
        del params
        checkpoint = dataclasses.replace(config.checkpoint, asynchronous=False, max_failures=1)
        with Checkpoints(folder / "checkpoints", checkpoint, log) as checkpoints:
            checkpoints.save(0, state, {"source": about} | fingerprint, copied=False)
    if tokenizer is None:
        log(f"no tokenizer: {reason}; `gptjax generate` needs one: convert again with --tokenizer=FILE.")
    return {
        "output": str(output),
        "format": model.format,
        "architecture": model.architecture,
        "parameters": count,
        "dtype": config.model.param_dtype,
        "tokenizer": tokenizer.kind if tokenizer else None,
        "verify": found,
    }


def _with_adapter(config: Config, knobs: dict[str, Any]) -> Config:
    """The config of a run that was trained with such an adapter."""
    values = config_lib.to_dict(config)
    values["adapter"] = knobs
    if knobs["method"] in LEADING:
        longest = config.model.max_seq_len - knobs["prompt_length"]
        values["data"] |= {"packing": "windows", "seq_len": min(config.data.seq_len, longest)}
    return config_lib.from_dict(values)


def _tokenizer(model: Foreign, path: str) -> tuple[Tokenizer | None, str]:
    """The one that is asked for, else what the format found, with the reason where there is none."""
    if path == "none":
        return None, "--tokenizer=none"
    if not path:
        return model.tokenizer()
    found, reason = tokens.from_path(pathlib.Path(path))
    if found is None:
        raise UserError(f"--tokenizer={path}: {reason}.")
    return found, ""


def _run_config(
    model: Foreign, tokenizer: Tokenizer | None, output: pathlib.Path, dtype: str, overrides: Sequence[str]
) -> Config:
    values = config_lib.defaults()
    with values.unlocked():
        values.model.update(model.knobs)
    for override in [*([f"model.param_dtype={dtype}"] if dtype else []), *overrides]:
        apply_override(values, override)
    values.data.seq_len = min(1024, values.model.max_seq_len)
    values.train.duration_steps = values.train.duration_steps or 1
    if tokenizer is not None:
        values.data.tokenizer = tokenizer.kind
        values.data.add_bos = tokenizer.begins_with_bos
        if tokenizer.kind in _TOKENIZER_FILES:
            values.data.tokenizer_path = str(output.absolute() / "tokenizer" / _TOKENIZER_FILES[tokenizer.kind])
    config = _at_the_door(model, values)
    if tokenizer is not None and tokenizer.vocab_size > config.model.vocab_size:
        raise UserError(
            f"the tokenizer has {tokenizer.vocab_size} ids, but the model's embedding has {config.model.vocab_size} rows; "
            "name another with --tokenizer=FILE, or none with --tokenizer=none."
        )
    return config


def _at_the_door(model: Foreign, values: ml_collections.ConfigDict) -> Config:
    try:
        return config_lib.from_dict(values)
    except UserError as error:
        raise UserError(f"{model.source}: {error}") from None


# --- out ------------------------------------------------------------------------------------------------------------------------


def export_model(
    workdir: pathlib.Path,
    output: pathlib.Path,
    log: Log,
    *,
    step: int | None = None,
    dtype: str = "",
    shard_bytes: int = huggingface.SHARD_BYTES,
    verified: bool = False,
) -> dict[str, Any]:
    """Writes a Hugging Face folder of a run's model: the average where the run keeps one.

    `dtype`: float32, bfloat16 or float16, "": as it was read, or the parameters'. Returns a summary. Raises `UserError` where
    no architecture expresses the model, OSError where the disk refuses, and `VerificationFailed`.
    """
    if verified:
        verify.check_installed()
    if not (workdir / "config.json").is_file():
        raise UserError(f"{workdir} is not a run's folder: it has no config.json.")
    config = config_lib.from_json(workdir / "config.json")
    if sees_later_tokens(config.objective):
        raise UserError(
            f"{workdir} was trained with objective.name={config.objective.name}, whose tokens see later ones; the models of "
            "Hugging Face that could hold its parameters see only earlier ones."
        )
    if config.adapter.method in LEADING:
        raise UserError(
            f"{workdir} was trained with adapter.method={config.adapter.method}, whose places ahead of a text are in no "
            "parameter of a Hugging Face model; --to=peft writes them."
        )
    huggingface.architecture_for(parameterization.standard(config.model))  # refuses before anything is restored
    tokenizer = load_tokenizer(workdir / "tokenizer") if (workdir / "tokenizer").is_dir() else None
    trained = load_params(workdir, log, step, config)
    flat = run.named_leaves(trained.params)
    export = huggingface.prepare(config.model, flat, dtype, trained.metadata.get("source"))
    with new_folder(output, export.num_bytes + 2**20) as folder:
        for note in huggingface.write(folder, export, tokenizer, shard_bytes):
            log(note)
        found = None
        if verified:
            found = verify.compare(folder, export.config, huggingface.load(folder)[1])
            run.write_json(folder / "verify.json", found)
            _judge(found)
    return {
        "output": str(output),
        "architecture": export.kind,
        "step": trained.step,
        "bytes": export.num_bytes,
        "verify": found,
    }


def export_adapter(workdir: pathlib.Path, output: pathlib.Path, log: Log, *, step: int | None = None) -> dict[str, Any]:
    """Writes a PEFT folder of a run's adapter. Returns a summary. Raises `UserError` where the run has none that PEFT has, or no
    Hugging Face architecture expresses its decoder, and OSError where the disk refuses.
    """
    config = config_lib.from_json(workdir / "config.json")
    if config.adapter.method == "none":
        raise UserError(f"{workdir} was trained with adapter.method=none; --to=huggingface writes its model.")
    kind = huggingface.architecture_for(config.model)
    trained = load_params(workdir, log, step, config, merges=False)
    with new_folder(output, 2**20) as folder:
        peft.write(folder, kind, config, trained.params, config.init_from)
        size = sum(file.stat().st_size for file in folder.iterdir())
    return {
        "output": str(output),
        "architecture": f"an adapter of {kind}",
        "step": trained.step,
        "bytes": size,
        "verify": None,
    }


def _judge(found: dict[str, Any]) -> None:
    if not found["largest_error"] <= TOLERANCE * max(1.0, found["largest_logit"]):
        raise VerificationFailed(
            f"transformers' logits differ by up to {found['largest_error']:.3g} (they reach {found['largest_logit']:.3g}), "
            f"more than {TOLERANCE} of that; nothing is kept."
        )
