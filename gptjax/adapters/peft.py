"""Adapters in PEFT's format: a folder of adapter_config.json and adapter_model.safetensors, in and out.

PEFT adapts the modules of a Hugging Face model; which of our kernels a module's matrix is, the tables of interop/architectures.py
say, so that a file's factors are ours but for the order of axes. Where a module holds queries, keys and values in one matrix
(GPT-2's c_attn, GPT-NeoX's query_key_value), its update has one first factor and three parts of the second: ours with
`adapter.shared_input`.
"""

from __future__ import annotations

import functools
import json
import math
import pathlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

from gptjax.adapters.attach import SHARING, contracted_axes, rescales_inputs
from gptjax.config import Config, ModelConfig, UserError, tasks_of
from gptjax.config.adapter import LEADING, LOW_RANK
from gptjax.interop import layout, safetensors, task_heads
from gptjax.interop.architectures import ARCHITECTURES
from gptjax.interop.tensors import Tensors

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
ROOT = "base_model.model."
OUTER = "base_model."  # in front of a head's name where the method changes no module: prompts and prefixes

# What a config may say of a method without changing what it computes here; anything else is refused.
_MUST_BE: dict[str, tuple[Any, ...]] = {
    "bias": (None, "none"),
    **dict.fromkeys(("lora_bias", "use_qalora", "use_bdlora", "prefix_projection"), (None, False)),
    **dict.fromkeys(("rank_pattern", "alpha_pattern", "layer_replication"), (None, {}, [])),
    **dict.fromkeys(("target_parameters", "trainable_token_indices", "alora_invocation_tokens"), (None, [])),
}

Flat = dict[str, np.ndarray]


class Part(NamedTuple):
    """One of our projections, and the module, or the part of it, that it is in PEFT's names."""

    path: str  # "layers/attention/query"
    module: str  # "h.{}.attn.c_attn"
    inputs: str  # letters of our kernel's axes, as in interop/layout.py
    outputs: str
    file_inputs: str  # those of the module's inputs and outputs in the file's order, "3" where several are fused
    file_outputs: str
    part: int

    @property
    def is_fused(self) -> bool:
        return "3" in self.file_outputs

    @property
    def name(self) -> str:
        return self.path.rsplit("/", 1)[-1]


def parts_of(kind: str, model: ModelConfig) -> list[Part]:
    """The projections of the layers of an architecture."""
    found = []
    for row in ARCHITECTURES[kind].rows(model):
        path, _, leaf = row.path.rpartition("/")
        if leaf != "kernel" or not path.startswith("layers/"):
            continue
        axes = contracted_axes(path.rsplit("/", 1)[-1])
        inputs, outputs = row.ours[:axes], row.ours[axes:]
        one, other = row.theirs.split()
        file_inputs, file_outputs = (one, other) if set(one) == set(inputs) else (other, one)
        found.append(Part(path, row.name.removesuffix(".weight"), inputs, outputs, file_inputs, file_outputs, row.part))
    return found


def modules_of(kind: str, model: ModelConfig) -> dict[str, list[Part]]:
    """{module: its parts}."""
    found: dict[str, list[Part]] = {}
    for part in parts_of(kind, model):
        found.setdefault(part.module, []).append(part)
    return found


# --- the order of axes ----------------------------------------------------------------------------------------------------------


def _into_file(ours: str, theirs: str, pieces: Mapping[int, np.ndarray], size: Mapping[str, int]) -> np.ndarray:
    """[prod(theirs), *more] of arrays [*ours, *more], each one part of what is fused; `ours` are letters of axes."""
    letters = theirs.replace("3", "")
    turned = {}
    for number, piece in pieces.items():
        more = range(len(ours), piece.ndim)
        turned[number] = piece.transpose([ours.index(letter) for letter in letters] + list(more))
    more_shape = next(iter(turned.values())).shape[len(letters) :]
    if "3" not in theirs:
        return turned[0].reshape(-1, *more_shape)
    whole = np.stack([turned[number] for number in range(3)], axis=theirs.index("3"))
    return whole.reshape(math.prod(size[letter] for letter in theirs), *more_shape)


def _out_of_file(ours: str, theirs: str, array: np.ndarray, part: int, size: Mapping[str, int]) -> np.ndarray:
    """[*ours, *more] of [prod(theirs), *more]: the inverse of `_into_file`, of one part."""
    letters, more_shape = theirs.replace("3", ""), array.shape[1:]
    split = array.reshape(*(size[letter] for letter in theirs), *more_shape)
    if "3" in theirs:
        split = split.take(part, axis=theirs.index("3"))
    return split.transpose([letters.index(letter) for letter in ours] + list(range(len(letters), split.ndim)))


# --- in -------------------------------------------------------------------------------------------------------------------------


def read(folder: pathlib.Path, kind: str, model: ModelConfig, params: Any) -> tuple[dict[str, Any], Any]:
    """(knobs of `AdapterConfig`, the tree of "adapters" in numpy) of a PEFT folder, for a base model of architecture `kind`.

    `params`: the base's, whose biases prefix tuning's keys and values are counted without. Raises `UserError`, naming file and
    key or tensor, for what has no place here.
    """
    values, stored = _opened(folder)
    method = values.get("peft_type")
    if method not in _READERS:
        raise UserError(f"{folder / CONFIG}: peft_type={method!r} is not known; known are {', '.join(_READERS)}.")
    tensors = _File(stored, kind)
    tensors.used.update(_head_names(folder, values, stored).values())
    knobs, flat = _READERS[method](values, tensors, modules_of(kind, model), model, params)
    if left := tensors.unused():
        raise UserError(f"{folder / WEIGHTS}: the tensor {left[0]} has no place in a {kind} with {method}.")
    return knobs, layout.nested({path: np.ascontiguousarray(array, np.float32) for path, array in flat.items()})


def read_head(folder: pathlib.Path) -> task_heads.Head | None:
    """The head of a task that a PEFT folder has beside its adapter; None where it has none. Raises `UserError` as `read`."""
    values, tensors = _opened(folder)
    return task_heads.head_in(tensors, _head_names(folder, values, tensors))


def _opened(folder: pathlib.Path) -> tuple[dict[str, Any], Tensors]:
    """(what the config says, the tensors) of a PEFT folder."""
    if not (folder / CONFIG).is_file():
        raise UserError(f"{folder} is not a PEFT folder: it has no {CONFIG}.")
    if not (folder / WEIGHTS).is_file():
        raise UserError(f"{folder} has no {WEIGHTS}; PEFT's save_pretrained writes it.")
    values = safetensors.read_json(folder / CONFIG)
    for key, allowed in _MUST_BE.items():
        if values.get(key) not in allowed:
            raise UserError(f"{folder / CONFIG}: {key}={values[key]!r} has no counterpart here.")
    return values, Tensors(folder / WEIGHTS, safetensors.read_header(folder / WEIGHTS))


def _head_names(folder: pathlib.Path, values: Mapping[str, Any], tensors: Tensors) -> dict[str, str]:
    """{"score.weight": its name in the file} of the modules that are saved whole. Raises `UserError` for one that is no head."""
    saved = values.get("modules_to_save") or []
    for module in saved if isinstance(saved, list) else [saved]:
        if module not in task_heads.MODULES:
            raise UserError(
                f"{folder / CONFIG}: modules_to_save has {module!r}, which has no counterpart here; read are the heads of tasks, "
                f"{', '.join(task_heads.MODULES)}."
            )
    names = {name.removeprefix(ROOT).removeprefix(OUTER): name for name in tensors}
    found = {name: names[name] for name in task_heads.TENSORS if name in names and name.partition(".")[0] in saved}
    if saved and not found:
        raise UserError(f"{folder / WEIGHTS} has no tensor of {', '.join(dict.fromkeys(saved))}, which modules_to_save names.")
    return found


class _File:
    """The tensors of a file by the base model's own names, with or without the prefix of its head's class."""

    def __init__(self, tensors: Tensors, kind: str) -> None:
        self.tensors = tensors
        prefixes = (ARCHITECTURES[kind].prefix, task_heads.form_of("answers", kind).prefix_of(kind))
        self.names: dict[str, str] = {}
        for full in tensors:
            name = full.removeprefix(ROOT)
            prefix = next((prefix for prefix in prefixes if name.startswith(prefix)), "")
            self.names[name.removeprefix(prefix)] = full
        self.used: set[str] = set()  # full names

    def has(self, name: str) -> bool:
        return name in self.names

    def get(self, name: str, shape: tuple[int, ...]) -> np.ndarray:
        if name not in self.names:
            raise UserError(f"{self.tensors.source} has no tensor for {name}; adapters of some layers alone have no place here.")
        stored, full = self.tensors[self.names[name]], self.names[name]
        if stored.shape != shape:
            raise UserError(f"{self.tensors.source}: the tensor {full} has shape {stored.shape}, but {shape} is asked for.")
        self.tensors.check_kind(full)
        self.used.add(full)
        return self.tensors.rows(full, 0, shape[0]).astype(np.float32)

    def unused(self) -> list[str]:
        return sorted(set(self.tensors) - self.used)


def _stacked(tensors: _File, module: str, name: str, shape: tuple[int, ...], model: ModelConfig) -> np.ndarray:
    """[L, *shape]: a module's tensor of each layer."""
    return np.stack([tensors.get(f"{module.format(layer)}.{name}", shape) for layer in range(model.num_layers)])


def _targeted(tensors: _File, modules: Mapping[str, list[Part]], suffix: str, model: ModelConfig) -> dict[str, list[Part]]:
    """The modules that some layer has a tensor of."""
    return {
        module: parts
        for module, parts in modules.items()
        if any(tensors.has(f"{module.format(layer)}.{suffix}") for layer in range(model.num_layers))
    }


def _length(letters: str, model: ModelConfig) -> int:
    return math.prod(layout.sizes(model)[letter] for letter in letters)


def _read_low_rank(values: Any, tensors: _File, modules: Any, model: ModelConfig, params: Any) -> tuple[dict[str, Any], Flat]:
    rank, has_magnitude, size = int(values["r"]), bool(values.get("use_dora")), layout.sizes(model)
    flat: Flat = {}
    targets: list[str] = []
    shares = False
    for module, parts in _targeted(tensors, modules, "lora_A.weight", model).items():
        first, shares = parts[0], shares or parts[0].is_fused
        inputs, outputs = _length(first.file_inputs, model), _length(first.file_outputs, model)
        a_LRI = _stacked(tensors, module, "lora_A.weight", (rank, inputs), model)
        b_LOR = _stacked(tensors, module, "lora_B.weight", (outputs, rank), model)
        where = first.path.rpartition("/")[0] if first.is_fused else first.path
        flat[f"{where}/lora_a"] = np.stack([_out_of_file(first.inputs, first.file_inputs, a_RI.T, 0, size) for a_RI in a_LRI])
        for part in parts:
            targets.append(part.path)
            out = part.outputs, part.file_outputs
            b = np.stack([_out_of_file(*out, b_OR, part.part, size) for b_OR in b_LOR])
            flat[f"{part.path}/lora_b"] = np.moveaxis(b, -1, 1)
            if has_magnitude:
                lengths_LO = _stacked(tensors, module, "lora_magnitude_vector", (outputs,), model)
                flat[f"{part.path}/magnitude"] = np.stack([_out_of_file(*out, one, part.part, size) for one in lengths_LO])
    knobs: dict[str, Any] = {"method": "dora" if has_magnitude else "lora", "rank": rank, "alpha": float(values["lora_alpha"])}
    knobs |= {"dropout": float(values.get("lora_dropout") or 0.0)}
    knobs |= {"rank_stabilised": bool(values.get("use_rslora")), "shared_input": shares, "targets": _exactly(targets)}
    return knobs, flat


def _exactly(paths: list[str]) -> tuple[str, ...]:
    """Patterns of these projections' kernels and no others."""
    return tuple(f"^{path}/kernel$" for path in paths)


def _read_factors(values: Any, tensors: _File, modules: Any, model: ModelConfig, params: Any) -> tuple[dict[str, Any], Flat]:
    flat, targets, size = {}, [], layout.sizes(model)
    for module, parts in _targeted(tensors, modules, "ia3_l", model).items():
        of_inputs = rescales_inputs(parts[0].name)
        theirs = parts[0].file_inputs if of_inputs else parts[0].file_outputs
        shape = (1, _length(theirs, model)) if of_inputs else (_length(theirs, model), 1)
        factors_LI = _stacked(tensors, module, "ia3_l", shape, model).reshape(model.num_layers, -1)
        for part in parts:
            targets.append(part.path)
            ours = part.inputs if of_inputs else part.outputs
            flat[f"{part.path}/rescale"] = np.stack([_out_of_file(ours, theirs, one, part.part, size) for one in factors_LI])
    return {"method": "ia3", "targets": _exactly(targets)}, flat


def _read_prompt(values: Any, tensors: _File, modules: Any, model: ModelConfig, params: Any) -> tuple[dict[str, Any], Flat]:
    length = int(values["num_virtual_tokens"])
    prompt_PD = tensors.get("prompt_embeddings", (length, model.model_dim))
    return {"method": "prompt", "prompt_length": length}, {"embed/prompt": prompt_PD}


def _read_prefix(values: Any, tensors: _File, modules: Any, model: ModelConfig, params: Any) -> tuple[dict[str, Any], Flat]:
    length = int(values["num_virtual_tokens"])
    _check_prefix(model)
    shape = (length, model.num_layers, 2, model.num_kv_heads, model.head_dim)
    stored = tensors.get("prompt_embeddings", (length, math.prod(shape[1:]))).reshape(shape)
    flat = {}
    for number, name in enumerate(("key", "value")):
        prefix_LPKH = stored[:, :, number].swapaxes(0, 1)
        flat[f"layers/attention/{name}/prefix"] = prefix_LPKH - _bias(params, name)
    return {"method": "prefix", "prompt_length": length}, flat


def _check_prefix(model: ModelConfig) -> None:
    """Raises `UserError` where keys are changed between the projection, whose place a prefix takes, and PEFT's cache."""
    if model.position == "rotary" or model.query_key_norm:
        raise UserError(
            "PEFT's prefix tuning holds keys after rotary positions and norms, ours before; it is read and written for models "
            f"without, but model.position={model.position} and model.query_key_norm={model.query_key_norm}."
        )


def _bias(params: Any, name: str) -> np.ndarray | float:
    """[L, 1, K, H]: what is added to a projection's result, a prefix too."""
    own = params["layers"]["attention"][name]
    return np.asarray(own["bias"], np.float32)[:, None] if "bias" in own else 0.0


_READERS: dict[str, Callable[..., tuple[dict[str, Any], Flat]]] = {
    "LORA": _read_low_rank,
    "IA3": _read_factors,
    "PROMPT_TUNING": _read_prompt,
    "PREFIX_TUNING": _read_prefix,
}


# --- out ------------------------------------------------------------------------------------------------------------------------


def write(folder: pathlib.Path, kind: str, config: Config, params: Any, base: str = "", task: str = "") -> None:
    """Writes the two files of a run's adapters into an existing folder, for a base model of architecture `kind`.

    `params`: the run's, in which "adapters" stand; `base`: the name or path of the base model, for PEFT to find; `task`: the one
    whose head is written with them, for the base's class of such tasks. Raises `UserError` where PEFT has no such adapter,
    OSError where the disk refuses.
    """
    method, model = config.adapter.method, config.model
    if method not in _WRITERS:
        raise UserError(f"adapter.method={method} has no form in PEFT; {', '.join(_WRITERS)} have.")
    flat = {path: np.asarray(leaf, np.float32) for path, leaf in _flat(params["adapters"]).items()}
    values, arrays = _WRITERS[method](config, flat, modules_of(kind, model), params)
    form = task_heads.form_of(tasks_of(config)[task].kind, kind) if task else None
    prefix = ROOT + (form.prefix_of(kind) if form else ARCHITECTURES[kind].prefix)
    named = {name if name == "prompt_embeddings" else prefix + name: array for name, array in arrays.items()}
    common: dict[str, Any] = {"base_model_name_or_path": base or None, "task_type": "CAUSAL_LM", "inference_mode": True}
    if form:
        common |= {"task_type": form.task_type, "modules_to_save": list(form.saved)}
        outer = OUTER if method in LEADING else ROOT
        named |= {outer + name: array for name, array in task_heads.tensors_of(form, params["task_heads"][task]).items()}
    (folder / CONFIG).write_text(json.dumps(common | values, indent=2) + "\n", encoding="utf-8")
    tensors: list[safetensors.Write] = [
        (name, "F32", array.shape, functools.partial(_whole, array)) for name, array in named.items()
    ]
    safetensors.write_file(folder / WEIGHTS, tensors)


def _whole(array: np.ndarray) -> list[np.ndarray]:
    return [np.ascontiguousarray(array, "<f4")]


def _flat(tree: Any, path: str = "") -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in tree.items():
        found |= _flat(value, f"{path}{name}/") if isinstance(value, Mapping) else {path + name: value}
    return found


def _adapted(flat: Flat, modules: Mapping[str, list[Part]], leaf: str) -> dict[str, list[Part]]:
    """The modules of which a part is adapted. Raises `UserError` where the architecture has no module for an adapted kernel."""
    found = {module: parts for module, parts in modules.items() if any(f"{part.path}/{leaf}" in flat for part in parts)}
    known = {f"{part.path}/{leaf}" for parts in found.values() for part in parts}
    for path in flat:
        assert not path.endswith(leaf) or path in known, path
    return found


def _short(module: str) -> str:
    """A module's name within its layer, by which PEFT finds it: "attn.c_attn"."""
    return module.split("{}.", 1)[1]


def _write_low_rank(config: Config, flat: Flat, modules: Any, params: Any) -> tuple[dict[str, Any], Flat]:
    c, size, arrays = config.adapter, layout.sizes(config.model), {}
    targeted = _adapted(flat, modules, "lora_b")
    for module, parts in targeted.items():
        first = parts[0]
        if first.is_fused:
            _check_fused(config, flat, parts)
        at_a = f"{first.path.rpartition('/')[0]}/lora_a" if c.shared_input and first.name in SHARING else f"{first.path}/lora_a"
        for layer in range(config.model.num_layers):
            name, pieces, magnitudes = module.format(layer), {}, {}
            for part in parts:
                own = flat.get(f"{part.path}/lora_b")
                shape = (c.rank, *(size[letter] for letter in part.outputs))
                pieces[part.part] = np.moveaxis(np.zeros(shape, np.float32) if own is None else own[layer], 0, -1)
                if c.method == "dora":
                    magnitudes[part.part] = flat[f"{part.path}/magnitude"][layer]
            a = _into_file(first.inputs, first.file_inputs, {0: flat[at_a][layer]}, size)
            arrays[f"{name}.lora_A.weight"] = a.T
            arrays[f"{name}.lora_B.weight"] = _into_file(first.outputs, first.file_outputs, pieces, size)
            if magnitudes:
                vector = _into_file(first.outputs, first.file_outputs, magnitudes, size)
                arrays[f"{name}.lora_magnitude_vector"] = vector
    values = {"peft_type": "LORA", "r": c.rank, "lora_alpha": c.alpha, "lora_dropout": c.dropout, "bias": "none"}
    values |= {"use_rslora": c.rank_stabilised, "use_dora": c.method == "dora"}
    values |= {"target_modules": [_short(module) for module in targeted], "fan_in_fan_out": _is_conv1d(modules)}
    return values, arrays


def _is_conv1d(modules: Mapping[str, list[Part]]) -> bool:
    """Whether the architecture's matrices are [inputs, outputs], as GPT-2's are, which PEFT wants to be told."""
    return any(".attn.c_attn" in module for module in modules)


def _check_fused(config: Config, flat: Flat, parts: list[Part]) -> None:
    if not config.adapter.shared_input:
        raise UserError(
            f"adapter.shared_input=False has a first factor each for queries, keys and values, but {_short(parts[0].module)} "
            "holds them in one matrix, whose update has one in PEFT; train with adapter.shared_input=True."
        )
    missing = [part.path for part in parts if f"{part.path}/lora_b" not in flat]
    if missing and config.adapter.method == "dora":
        raise UserError(
            f"adapter.method=dora without {missing[0]} has no magnitudes for a third of {_short(parts[0].module)}, which PEFT "
            "has; adapt all three of query, key and value."
        )


def _write_factors(config: Config, flat: Flat, modules: Any, params: Any) -> tuple[dict[str, Any], Flat]:
    size, arrays, targeted = layout.sizes(config.model), {}, _adapted(flat, modules, "rescale")
    for module, parts in targeted.items():
        of_inputs = rescales_inputs(parts[0].name)
        ours, theirs = (parts[0].inputs, parts[0].file_inputs) if of_inputs else (parts[0].outputs, parts[0].file_outputs)
        ones = np.ones([config.model.num_layers, *(size[letter] for letter in ours)], np.float32)
        for layer in range(config.model.num_layers):
            pieces = {part.part: flat.get(f"{part.path}/rescale", ones)[layer] for part in parts}
            vector = _into_file(ours, theirs, pieces, size)
            arrays[f"{module.format(layer)}.ia3_l"] = vector[None] if of_inputs else vector[:, None]
    inner = [_short(module) for module, parts in targeted.items() if rescales_inputs(parts[0].name)]
    values = {"peft_type": "IA3", "target_modules": [_short(module) for module in targeted], "feedforward_modules": inner}
    return values | {"fan_in_fan_out": _is_conv1d(modules)}, arrays


def _leading_values(config: Config, kind: str) -> dict[str, Any]:
    model = config.model
    values = {"peft_type": kind, "num_virtual_tokens": config.adapter.prompt_length, "token_dim": model.model_dim}
    return values | {
        "num_transformer_submodules": 1,
        "num_attention_heads": model.num_heads,
        "num_layers": model.num_layers,
    }


def _write_prompt(config: Config, flat: Flat, modules: Any, params: Any) -> tuple[dict[str, Any], Flat]:
    return _leading_values(config, "PROMPT_TUNING"), {"prompt_embeddings": flat["embed/prompt"]}


def _write_prefix(config: Config, flat: Flat, modules: Any, params: Any) -> tuple[dict[str, Any], Flat]:
    _check_prefix(config.model)
    names = ("key", "value")
    stored = [flat[f"layers/attention/{name}/prefix"] + _bias(params, name) for name in names]  # [L, P, K, H] each
    stacked = np.stack(stored, axis=1).transpose(2, 0, 1, 3, 4)  # [P, L, 2, K, H]
    values = _leading_values(config, "PREFIX_TUNING") | {"prefix_projection": False}
    return values | {"encoder_hidden_size": config.model.model_dim}, {
        "prompt_embeddings": stacked.reshape(config.adapter.prompt_length, -1)
    }


_WRITERS: dict[str, Callable[..., tuple[dict[str, Any], Flat]]] = {
    **dict.fromkeys(LOW_RANK, _write_low_rank),
    "ia3": _write_factors,
    "prompt": _write_prompt,
    "prefix": _write_prefix,
}
