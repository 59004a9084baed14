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
from gptjax.config import HEADED, Config, TaskConfig, UserError, tasks_of
from gptjax.config.adapter import LEADING
from gptjax.config.objective import sees_later_tokens
from gptjax.config.task import OF_TEXTS
from gptjax.data.tokenizers import Tokenizer, load_tokenizer
from gptjax.interop import formats, huggingface, layout, task_heads, tokens, verify
from gptjax.interop.foreign import Foreign
from gptjax.model import parameterization
from gptjax.recipes import apply_override
from gptjax.tasks.losses import HEADS
from gptjax.tasks.table import TASKS
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
    the adapter of the PEFT folder `adapter` beside it, as a run that was trained with it has. Where `overrides` name a task, the
    head that either has becomes that task's.

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
    is_foreign = model.format == "huggingface"
    base_head = task_heads.head_of(source) if is_foreign else None
    head = (peft.read_head(pathlib.Path(adapter)) if adapter else None) or base_head
    config, heads = _with_head(config, head, task_heads.labels_of(source) if is_foreign and head else (), source, log)
    shapes = layout.shapes(config.model)
    count = sum(map(math.prod, shapes.values()))
    size = count * np.dtype(config.model.param_dtype).itemsize
    fingerprint = {"tokenizer": tokenizer.encoding_fingerprint} if tokenizer is not None else {}
    about = {"format": model.format, "architecture": model.architecture, "kinds": _kinds(model, config, base_head)}
    with new_folder(output, size + 2**20) as folder:
        params = model.read(config.model)
        if adapter:
            knobs, own = peft.read(pathlib.Path(adapter), model.architecture, config.model, params)
            config = _with_adapter(config, knobs)
        run.write_atomically(folder / "config.json", config_lib.to_json(config).encode())
        if tokenizer is not None:
            tokenizer.save(folder / "tokenizer")
        found = None
        if verified:  # what the class of the folder says, whether its head is kept or not
            own_head = (base_head.params, base_head.suffix) if base_head else ()
            found = verify.compare(source, config.model, params, *own_head)
            run.write_json(folder / "verify.json", found)
            _judge(found)
        params = params | ({"adapters": own} if adapter else {}) | heads
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
        "task": config.task.kind if heads else None,
        "verify": found,
    }


def _kinds(model: Foreign, config: Config, head: task_heads.Head | None) -> dict[str, Any]:
    """The encodings of the tensors, the head's with them, to write the same ones again."""
    kinds = model.kinds(config.model)
    own = {} if head is None else {name: kind for name, kind in head.encodings.items() if kind != kinds["default"]}
    return kinds | {"others": kinds["others"] | own}


def _with_head(
    config: Config, head: task_heads.Head | None, names: tuple[str, ...], source: pathlib.Path, log: Log
) -> tuple[Config, dict[str, Any]]:
    """(the config, with the labels of its task; {"task_heads": the head as the task's own}, {} where the run has none).

    `names`: the labels in the base's config.json. Raises `UserError` where the task needs a head and there is none that fits.
    """
    tasks = {name: knobs for name, knobs in tasks_of(config).items() if knobs.kind in HEADED}
    if not tasks:
        if head is not None:
            log(
                f"{head.described()}, is left behind; --config.task.path=FILE and --config.task.kind={' or '.join(head.kinds)} "
                "keep it."
            )
        return config, {}
    if config.task.mixture:
        raise UserError(f"task.mixture has a head each for {', '.join(tasks)}, and a folder has one: convert with task.kind.")
    ((name, task),) = tasks.items()
    if head is None:
        raise UserError(
            f"task.kind={task.kind} reads what it says off a head, and there is none in {source}: `gptjax train` with "
            "--config.init_from trains one."
        )
    task, params = task_heads.labelled(head, task, names, log)
    params = _fitting(head, task, params, config, log)
    labels = f", of {', '.join(task.labels)}" if task.labels else ""
    log(
        f"{head.described()}, is that of task.kind={task.kind}{labels}. Texts are read with data.add_bos={config.data.add_bos} "
        f"and data.add_eos={config.data.add_eos}: set them as they were when it was trained."
    )
    config = config_lib.with_tasks(config, {name: task})
    return config_lib.from_dict(config_lib.to_dict(config)), {HEADS: {name: params}}


def _fitting(
    head: task_heads.Head, task: TaskConfig, params: dict[str, np.ndarray], config: Config, log: Log
) -> dict[str, np.ndarray]:
    """The head's parameters in `model.param_dtype`. Raises `UserError` where they have other shapes than the task's."""
    wanted = {part: parameter.shape for part, parameter in TASKS[task.kind].head(task, config.model).items()}
    if (found := {part: array.shape for part, array in params.items()}) != wanted:
        raise UserError(f"{head.described()}, has the shapes {found}, but task.kind={task.kind} asks for {wanted}.")
    dtype = np.dtype(config.model.param_dtype)
    placed = {part: np.ascontiguousarray(array, dtype) for part, array in params.items()}
    if any(not np.array_equal(placed[part].astype(np.float64), array.astype(np.float64)) for part, array in params.items()):
        log(f"{head.described()}, is rounded to model.param_dtype={dtype}; --dtype=float32 keeps it as it is.")
    return placed


def _with_adapter(config: Config, knobs: dict[str, Any]) -> Config:
    """The config of a run that was trained with such an adapter."""
    values = config_lib.to_dict(config)
    values["adapter"] = knobs
    if knobs["method"] in LEADING:
        longest = config.model.max_seq_len - knobs["prompt_length"]
        packing = "padded" if tasks_of(config) else "windows"
        values["data"] |= {"packing": packing, "seq_len": min(config.data.seq_len, longest)}
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
    told = {override.partition("=")[0] for override in overrides}
    if "data.seq_len" not in told:
        values.data.seq_len = min(1024, values.model.max_seq_len)
    if "data.add_eos" not in told and values.task.kind in HEADED:
        values.data.add_eos = False  # transformers' tokenizers put nothing behind a text, and its last token is read
    values.train.duration_steps = values.train.duration_steps or 1
    if tokenizer is not None:
        values.data.tokenizer = tokenizer.kind
        if "data.add_bos" not in told:
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
    task: str = "",
) -> dict[str, Any]:
    """Writes a Hugging Face folder of a run's model: the average where the run keeps one. Of a run whose task has a head, it is
    the class for such tasks, with the head in the place of the output table.

    `dtype`: float32, bfloat16 or float16, "": as it was read, or the parameters'; `task`: as `task_heads.headed`. Returns a
    summary. Raises `UserError` where no architecture expresses the model, OSError where the disk refuses, and
    `VerificationFailed`.
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
    name = task_heads.headed(tasks_of(config), task)
    tokenizer = load_tokenizer(workdir / "tokenizer") if (workdir / "tokenizer").is_dir() else None
    trained = load_params(workdir, log, step, config)
    flat = run.named_leaves({part: tree for part, tree in trained.params.items() if part != HEADS})
    head = None
    if name:
        knobs = tasks_of(config)[name]
        head = huggingface.TaskHead(knobs.kind, knobs.labels, trained.params[HEADS][name])
    export = huggingface.prepare(config.model, flat, dtype, trained.metadata.get("source"), head)
    with new_folder(output, export.num_bytes + 2**20) as folder:
        for note in huggingface.write(folder, export, tokenizer, shard_bytes):
            log(note)
        found = None
        if verified:
            found = _compared(huggingface.open_folder(folder), folder, task_heads.head_of(folder))
            run.write_json(folder / "verify.json", found)
            _judge(found)
    if name:
        _say_how_it_reads(config, name, workdir, log)
    return {
        "output": str(output),
        "architecture": export.name,
        "step": trained.step,
        "bytes": export.num_bytes,
        "verify": found,
    }


def _compared(model: Foreign, folder: pathlib.Path, head: task_heads.Head | None) -> dict[str, Any]:
    """What `verify` finds of a folder that was written, as it is read again."""
    config = model.config().model
    return verify.compare(folder, config, model.read(config), *((head.params, head.suffix) if head else ()))


def _say_how_it_reads(config: Config, name: str, workdir: pathlib.Path, log: Log) -> None:
    """What a head's numbers hang on beside the weights, and no file of these formats says."""
    put = []
    if (workdir / "tokenizer").is_dir():
        tokenizer = load_tokenizer(workdir / "tokenizer")
        put += [f"token {tokenizer.bos_id} ahead of it"] if config.data.add_bos and tokenizer.bos_id is not None else []
        put += [f"token {tokenizer.eos_id} behind it"] if config.data.add_eos and tokenizer.eos_id is not None else []
    log(
        f"the head of {name} reads a text with {' and '.join(put) or 'nothing around it'}: give transformers the same tokens, "
        "which its tokenizer may not add."
    )
    if tasks_of(config)[name].kind in OF_TEXTS:
        log(
            "pad_token_id is not set, since a text may end in the end-of-text token, which would be taken for padding: for "
            "batches set it to a token that no text ends in."
        )


def export_adapter(
    workdir: pathlib.Path, output: pathlib.Path, log: Log, *, step: int | None = None, task: str = ""
) -> dict[str, Any]:
    """Writes a PEFT folder of a run's adapter, with the head of its task where that has one. `task`: as `task_heads.headed`.

    Returns a summary. Raises `UserError` where the run has none that PEFT has, or no Hugging Face architecture expresses its
    decoder, and OSError where the disk refuses.
    """
    if not (workdir / "config.json").is_file():
        raise UserError(f"{workdir} is not a run's folder: it has no config.json.")
    config = config_lib.from_json(workdir / "config.json")
    if config.adapter.method == "none":
        raise UserError(f"{workdir} was trained with adapter.method=none; --to=huggingface writes its model.")
    kind = huggingface.architecture_for(config.model)
    name = task_heads.headed(tasks_of(config), task)
    trained = load_params(workdir, log, step, config, merges=False)
    with new_folder(output, 2**20) as folder:
        peft.write(folder, kind, config, trained.params, config.init_from, name)
        size = sum(file.stat().st_size for file in folder.iterdir())
    base = kind
    if name:
        knobs = tasks_of(config)[name]
        base = task_heads.form_of(knobs.kind, kind).class_of(kind)
        labels = f" with num_labels={len(knobs.labels)} ({', '.join(knobs.labels)}, in this order)" if knobs.labels else ""
        log(f"PEFT loads it onto {base} of the base model{labels}.")
        _say_how_it_reads(config, name, workdir, log)
    return {
        "output": str(output),
        "architecture": f"an adapter of {base}",
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
