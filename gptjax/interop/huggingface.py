"""Hugging Face folders (config.json and safetensors), in and out.

Every tensor of a folder is used or ignored by name; no parameter is missed. The tables are in architectures.py.
"""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable
from typing import Any

from gptjax.config import ModelConfig, UserError, to_dict
from gptjax.data.tokenizers import Tokenizer
from gptjax.interop import foreign, layout, safetensors, task_heads, tokens
from gptjax.interop.architectures import ARCHITECTURES, Architecture, Knobs, Source, read_knobs, write_config
from gptjax.interop.foreign import Foreign
from gptjax.interop.layout import Row
from gptjax.interop.tensors import Tensors
from gptjax.model import parameterization

SHARD_BYTES = 5 * 10**9  # as transformers cuts them


# --- in -------------------------------------------------------------------------------------------------------------------------


def load(folder: pathlib.Path) -> tuple[Knobs, Any]:
    """(knobs of `ModelConfig`, parameters in our layout as a tree of numpy arrays) of a Hugging Face folder.

    Parameters are bfloat16 where all tensors of the folder are, else float32. Raises `UserError`, naming file and key or tensor,
    for anything missing, left over, of another shape, or that the decoder cannot express.
    """
    model = open_folder(pathlib.Path(folder))
    return _settled(model), model.read(model.config().model)


def model_knobs(folder: pathlib.Path) -> Knobs:
    """The first of what `load` gives, without reading a parameter."""
    return _settled(open_folder(folder))


def _settled(model: Foreign) -> Knobs:
    settled = {*model.knobs, "num_kv_heads", "head_dim", "mlp_dim"}
    return {name: value for name, value in to_dict(model.config().model).items() if name in settled}


def open_folder(folder: pathlib.Path) -> Foreign:
    """The model of a folder, checked but for its tensors' shapes. Raises as `load`."""
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder.")
    path = folder / "config.json"
    if not path.is_file():
        raise UserError(f"{folder} has no config.json, so it is not a Hugging Face model folder.")
    source = Source(path, safetensors.read_json(path))
    kind = _architecture(source)
    architecture = ARCHITECTURES[kind]
    try:
        knobs = read_knobs(source, architecture)
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"{path} has a value of the wrong kind: {error}.") from None
    Foreign("", "", path, knobs, Tensors(folder, {}), architecture.rows, bool).config()  # the door's checks
    tensors = safetensors.open_folder(folder)
    prefixes = (architecture.prefix, "transformer.")  # the second is that of LlamaForQuestionAnswering
    prefix = next((one for one in prefixes if any(name.startswith(one) for name in tensors)), "")
    found = next((name for name in architecture.heads if name in tensors), None)
    head = found or architecture.heads[0]
    if found is None and any(name in tensors for name in task_heads.TENSORS):
        knobs["tied_embeddings"] = True  # a class for a task has no table to write with, and the embedding's costs nothing

    def rows(config: ModelConfig) -> list[Row]:
        return named_rows(architecture, config, prefix, head)

    tied = knobs["tied_embeddings"]
    return Foreign(
        format="huggingface",
        architecture=kind,
        source=path,
        knobs=knobs | {"param_dtype": foreign.param_dtype(_kinds(architecture, tensors, prefix))},
        tensors=tensors,
        rows=rows,
        ignored=_ignored(architecture, tensors, prefix, head, tied),
        tokenizer=lambda: tokens.from_folder(folder),
        canonical=lambda name: architecture.heads[0] if name == head else architecture.prefix + name.removeprefix(prefix),
    )


def _kinds(architecture: Architecture, tensors: Tensors, prefix: str) -> set[str]:
    skipped = layout.matches(architecture.ignored)
    return {stored.kind for name, stored in tensors.items() if not skipped(name.removeprefix(prefix))}


def _architecture(source: Source) -> str:
    """By `model_type`; where it is absent, by the beginning of the class's name in `architectures`."""
    kind = source.values.get("model_type")
    if kind is None:
        classes = " ".join(map(str, source.values.get("architectures") or []))
        kind = next((known for known, found in ARCHITECTURES.items() if classes.startswith(found.classes)), classes or None)
    if kind not in ARCHITECTURES:
        raise UserError(f"{source.path}: the architecture {kind!r} is not known; known are {', '.join(ARCHITECTURES)}.")
    return str(kind)


def named_rows(architecture: Architecture, config: ModelConfig, prefix: str, head: str) -> list[Row]:
    """The architecture's rows with the names as they stand in the file, the head's with them where it is not tied."""
    rows = [dataclasses.replace(row, name=prefix + row.name) for row in architecture.rows(config)]
    return rows if config.tied_embeddings else [*rows, Row("head", "DV", head, "V D")]


def _ignored(architecture: Architecture, tensors: Tensors, prefix: str, head: str, tied: bool) -> Callable[[str], bool]:
    """Whether a tensor that is not used may be there: it holds no parameters, or the embedding once more."""
    embedding = next(prefix + row.name for row in _embedding(architecture))

    def ignored(name: str) -> bool:
        if name in task_heads.TENSORS or layout.matches(architecture.ignored)(name.removeprefix(prefix)):
            return True
        if name == head and tied:
            tensors.check_kind(head)
            if tensors.equal(head, embedding):
                return True
            raise UserError(f"{tensors.source}: {head} differs from {embedding}, but tie_word_embeddings ties them.")
        return False

    return ignored


def _embedding(architecture: Architecture) -> list[Row]:
    return [row for row in architecture.rows(ModelConfig()) if row.path == "embed/tokens"]


# --- out ------------------------------------------------------------------------------------------------------------------------

# Knobs that have no part in what a trained model computes.
_NOT_THE_MODEL = {
    "embedding_dropout",
    "attention_dropout",
    "residual_dropout",
    "stochastic_depth",
    "init_std",
    "scaled_residual_init",
    "dtype",
    "param_dtype",
    "remat",
    "scan_unroll",
    "attention",
    "expert_mlp_dim",
    "expert_capacity_factor",
    "router_normalize_top_k",
    "experts_per_token",
}


def architecture_for(config: ModelConfig) -> str:
    """The first architecture whose config.json, read again, gives every knob of this model.

    Raises `UserError` naming the knobs that the nearest one has otherwise.
    """
    differing: dict[str, dict[str, tuple[Any, Any]]] = {}
    for kind in ARCHITECTURES:
        lost_knobs = _lost(kind, config)
        if lost_knobs == {}:
            return kind
        if lost_knobs is not None:
            differing[kind] = lost_knobs
    if not differing:
        sizes = ", ".join(f"model.{name}={getattr(config, name)}" for name in ("model_dim", "num_heads", "head_dim"))
        raise UserError(f"no Hugging Face architecture expresses this model, with its {sizes}.")
    nearest = min(differing, key=lambda kind: len(differing[kind]))
    lost = ", ".join(f"model.{name}={ours!r} (it has {theirs!r})" for name, (ours, theirs) in differing[nearest].items())
    raise UserError(f"no Hugging Face architecture expresses this model; the nearest, {nearest}, cannot do {lost}.")


def _lost(kind: str, config: ModelConfig) -> dict[str, tuple[Any, Any]] | None:
    """{knob: (this model's, what is read again)} where the two differ; None where nothing can be read again."""
    path, architecture = pathlib.Path("config.json"), ARCHITECTURES[kind]
    try:
        knobs = read_knobs(Source(path, write_config(kind, config)), architecture)
        found = Foreign("", kind, path, knobs, Tensors(path, {}), architecture.rows, bool).config().model
    except UserError:  # its sizes make no model of this kind
        return None
    ours, theirs = _what_counts(config), _what_counts(found)
    return {name: (ours.get(name), theirs.get(name)) for name in ours | theirs if ours.get(name) != theirs.get(name)}


def _what_counts(config: ModelConfig) -> dict[str, Any]:
    """The knobs that have a part in what the model computes, each in one form."""
    values = {name: value for name, value in to_dict(config).items() if name not in _NOT_THE_MODEL}
    rotary = config.position == "rotary"
    for name in [name for name in values if name.startswith(("rope_", "rotary_")) and name not in ("rope_base", "rope_scaling")]:
        if not rotary or (name.startswith("rope_") and name not in _USED_BY[config.rope_scaling]):
            del values[name]
    if not rotary:
        del values["rope_base"]
    if config.position != "t5":
        values = {name: value for name, value in values.items() if not name.startswith("t5_")}
    if "rope_original_max_seq_len" in values:
        values["rope_original_max_seq_len"] = config.rope_original_max_seq_len or config.max_seq_len
    values["norm_bias"] = config.norm_bias and config.norm != "rmsnorm"
    values["attention_output_bias"] = config.attention_bias and config.attention_output_bias
    return values


_USED_BY: dict[str, set[str]] = {
    "none": set(),
    "linear": {"rope_scaling_factor"},
    "dynamic": {"rope_scaling_factor", "rope_original_max_seq_len"},
    "llama3": {"rope_scaling_factor", "rope_original_max_seq_len", "rope_low_freq_factor", "rope_high_freq_factor"},
    "yarn": {
        "rope_scaling_factor",
        "rope_original_max_seq_len",
        "rope_beta_fast",
        "rope_beta_slow",
        "rope_truncate",
        "rope_attention_factor",
    },
}

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}
_TORCH = {kind: name for name, kind in DTYPES.items()} | {"F64": "float64"}


@dataclasses.dataclass(frozen=True)
class Export:
    """A model that is about to be written."""

    kind: str
    config: ModelConfig
    tensors: list[safetensors.Write]
    encodings: dict[str, str]
    about: dict[str, Any]  # what config.json says of a task's head

    @property
    def name(self) -> str:
        """The architecture, or the class where it is one for a task."""
        return self.about["architectures"][0] if self.about else self.kind

    @property
    def num_bytes(self) -> int:
        return sum(map(safetensors.num_bytes, self.tensors))


@dataclasses.dataclass(frozen=True)
class TaskHead:
    """A head that is to be written in the place of the output table."""

    kind: str  # of its task
    labels: tuple[str, ...]
    params: dict[str, Any]  # "kernel" [D, K], "bias" [K]


def prepare(
    config: ModelConfig,
    flat: dict[str, Any],
    dtype: str = "",
    source: dict[str, Any] | None = None,
    head: TaskHead | None = None,
) -> Export:
    """What is to be written of a model; `flat` is {path: array}.

    `dtype`: float32, bfloat16 or float16 for all tensors; "": those of the folder that the model was read from, which `source`
    tells ({"format", "architecture", "kinds"}), else the parameters' own. The multipliers of model.parameterization=mup go into
    the weights. With `head` it becomes the architecture's class for that task. Raises `UserError` where no architecture expresses
    the model.
    """
    flat, config = parameterization.folded(config, flat), parameterization.standard(config)
    source = source if source and source.get("format") == "huggingface" else {}
    kind = str(source.get("architecture", ""))
    if kind not in ARCHITECTURES or _lost(kind, config) != {}:
        kind = architecture_for(config)
    architecture = ARCHITECTURES[kind]
    kinds = source.get("kinds", {}) if kind == source.get("architecture") else {}
    default = DTYPES[dtype or config.param_dtype] if dtype or not kinds else kinds["default"]
    others = {} if dtype else kinds.get("others", {})
    form = task_heads.form_of(head.kind, kind) if head else None
    prefix = form.prefix_of(kind) if form else architecture.prefix
    rows = named_rows(architecture, config, prefix, architecture.heads[0])
    own = len(prefix)

    def kind_of(name: str) -> str:
        return others.get(architecture.prefix + name[own:] if name.startswith(prefix) else name, default)

    tensors = list(layout.writes([row for row in rows if not (form and row.path == "head")], config, flat, kind_of))
    about: dict[str, Any] = {}
    if head and form:
        tensors += task_heads.writes(form, head.params, kind_of)
        about = task_heads.config_of(form, kind, head.labels)
    return Export(kind, config, tensors, {name: encoding for name, encoding, *_ in tensors}, about)


def write(folder: pathlib.Path, export: Export, tokenizer: Tokenizer | None, shard_bytes: int = SHARD_BYTES) -> list[str]:
    """Writes config.json, tensors and, where it can be expressed, the tokenizer into an empty folder.

    Returns what is to be said about it. Raises OSError where the disk refuses.
    """
    kinds = set(export.encodings.values())
    values = write_config(export.kind, export.config) | export.about
    values["torch_dtype"] = _TORCH[next(iter(kinds))] if len(kinds) == 1 else "float32"
    ids = {"bos_token_id": tokenizer.bos_id if tokenizer else None, "eos_token_id": tokenizer.eos_id if tokenizer else None}
    (folder / "config.json").write_text(json.dumps(values | ids, indent=2) + "\n", encoding="utf-8")
    safetensors.write_folder(folder, export.tensors, shard_bytes)
    return tokens.to_folder(folder, tokenizer) if tokenizer else ["the run has no tokenizer, so the folder has none."]
