"""Hugging Face folders (config.json and safetensors) to our knobs and parameters.

An architecture is an entry of `ARCHITECTURES`: which knobs its config.json stands for, which of its keys must have one value since the
decoder knows no other, and a table of tensors. Every tensor of the file is used or named as ignored, and every parameter is found.
"""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib
import re
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from gptjax.config import ModelConfig, UserError, from_dict, to_dict
from gptjax.model.decoder import Decoder

Knobs = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Row:
    """Where one of our parameters comes from."""

    path: str  # ours
    name: str  # theirs, `{}` standing for the layer
    layout: str = "plain"  # plain: same axes; in_out: [inputs, outputs]; out_in: [outputs, inputs], as in torch's nn.Linear
    in_axes: int = 1  # how many of our leading axes are the inputs
    part: tuple[int, int] = (0, 1)  # (i, n): the i-th of n equal pieces of the outputs


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One `model_type`."""

    knobs: Callable[[Source], Knobs]
    rows: Callable[[ModelConfig], list[Row]]
    prefix: str  # in front of every name but the head's, or absent throughout
    ignored: str  # regular expression of tensors that hold no parameters
    must_be: dict[str, tuple[Any, ...]]  # the values of a key of config.json that the decoder can express; absent is the first


class Source:
    """A config.json with errors that name the file and the key."""

    def __init__(self, path: pathlib.Path, values: dict[str, Any]) -> None:
        self.path, self.values = path, values

    def get(self, key: str, default: Any = None) -> Any:
        """The key's value; the default where it is absent or null. Without a default, the key is needed."""
        value = self.values.get(key)
        value = default if value is None else value
        if value is None:
            raise UserError(f"{self.path} has no {key!r}.")
        return value

    def one_of(self, key: str, table: dict[str, str], default: str) -> str:
        value = self.get(key, default)
        if value not in table:
            raise UserError(f"{self.path}: {key}={value!r} is not among those that the decoder has: {', '.join(table)}.")
        return table[value]


# --- GPT-2 -------------------------------------------------------------------------------------------------------------------------

_ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",  # the same formula, factored
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}


def _gpt2_knobs(source: Source) -> Knobs:
    return {
        "vocab_size": source.get("vocab_size"),
        "num_layers": source.get("n_layer"),
        "model_dim": source.get("n_embd"),
        "num_heads": source.get("n_head"),
        "mlp_dim": source.get("n_inner", 4 * source.get("n_embd")),
        "max_seq_len": source.get("n_positions"),
        "norm": "layernorm",
        "norm_epsilon": source.get("layer_norm_epsilon", 1e-5),
        "norm_bias": True,
        "position": "learned",
        "activation": source.one_of("activation_function", _ACTIVATIONS, "gelu_new"),
        "gated_mlp": False,
        "attention_bias": True,
        "mlp_bias": True,
        "tied_embeddings": source.get("tie_word_embeddings", True),
    }


def _gpt2_rows(config: ModelConfig) -> list[Row]:
    rows = [Row("embed/tokens", "wte.weight"), Row("embed/positions", "wpe.weight")]
    for ours, theirs in {"layers/attention_norm": "h.{}.ln_1", "layers/mlp_norm": "h.{}.ln_2", "final_norm": "ln_f"}.items():
        rows += [Row(f"{ours}/scale", f"{theirs}.weight"), Row(f"{ours}/bias", f"{theirs}.bias")]
    linear = {
        "attention/query": ("attn.c_attn", 1, (0, 3)),
        "attention/key": ("attn.c_attn", 1, (1, 3)),
        "attention/value": ("attn.c_attn", 1, (2, 3)),
        "attention/output": ("attn.c_proj", 2, (0, 1)),
        "mlp/up": ("mlp.c_fc", 1, (0, 1)),
        "mlp/down": ("mlp.c_proj", 1, (0, 1)),
    }
    for ours, (theirs, in_axes, part) in linear.items():
        # Conv1D keeps its weight as [inputs, outputs].
        rows.append(Row(f"layers/{ours}/kernel", f"h.{{}}.{theirs}.weight", "in_out", in_axes, part))
        rows.append(Row(f"layers/{ours}/bias", f"h.{{}}.{theirs}.bias", "in_out", 0, part))
    return rows


# --- Llama -------------------------------------------------------------------------------------------------------------------------


def _llama_knobs(source: Source) -> Knobs:
    heads = source.get("num_attention_heads")
    return {
        "vocab_size": source.get("vocab_size"),
        "num_layers": source.get("num_hidden_layers"),
        "model_dim": source.get("hidden_size"),
        "num_heads": heads,
        "num_kv_heads": source.get("num_key_value_heads", heads),
        "head_dim": source.get("head_dim", 0),
        "mlp_dim": source.get("intermediate_size"),
        "max_seq_len": source.get("max_position_embeddings"),
        "norm": "rmsnorm",
        "norm_epsilon": source.get("rms_norm_eps", 1e-6),
        "norm_bias": False,
        "position": "rotary",
        "rope_base": _rope_base(source),
        "activation": source.one_of("hidden_act", _ACTIVATIONS, "silu"),
        "gated_mlp": True,
        "attention_bias": source.get("attention_bias", False),
        "mlp_bias": source.get("mlp_bias", False),
        "tied_embeddings": source.get("tie_word_embeddings", False),
    }


def _rope_base(source: Source) -> float:
    """`rope_theta`, or `rope_parameters.rope_theta` in newer files; a scaled variant is refused."""
    theta = source.values.get("rope_theta")
    for group in ("rope_scaling", "rope_parameters"):
        values = source.values.get(group)
        if values is None:
            continue
        kind = values.get("rope_type", values.get("type", "default")) if isinstance(values, dict) else values
        unknown = sorted(set(values) - {"rope_type", "type", "rope_theta"}) if isinstance(values, dict) else []
        if kind != "default" or unknown:
            raise UserError(f"{source.path}: {group}={values!r} is not among those that the decoder has: plain rotary positions.")
        theta = values.get("rope_theta", theta)
    return 10000.0 if theta is None else theta


def _llama_rows(config: ModelConfig) -> list[Row]:
    rows = [
        Row("embed/tokens", "embed_tokens.weight"),
        Row("layers/attention_norm/scale", "layers.{}.input_layernorm.weight"),
        Row("layers/mlp_norm/scale", "layers.{}.post_attention_layernorm.weight"),
        Row("final_norm/scale", "norm.weight"),
    ]
    linear = {
        "attention/query": ("self_attn.q_proj", 1, config.attention_bias),
        "attention/key": ("self_attn.k_proj", 1, config.attention_bias),
        "attention/value": ("self_attn.v_proj", 1, config.attention_bias),
        "attention/output": ("self_attn.o_proj", 2, config.attention_bias),
        "mlp/gate": ("mlp.gate_proj", 1, config.mlp_bias),
        "mlp/up": ("mlp.up_proj", 1, config.mlp_bias),
        "mlp/down": ("mlp.down_proj", 1, config.mlp_bias),
    }
    for ours, (theirs, in_axes, has_bias) in linear.items():
        rows.append(Row(f"layers/{ours}/kernel", f"layers.{{}}.{theirs}.weight", "out_in", in_axes))
        if has_bias:
            rows.append(Row(f"layers/{ours}/bias", f"layers.{{}}.{theirs}.bias", "in_out", 0))
    return rows


ARCHITECTURES = {
    "gpt2": Architecture(
        knobs=_gpt2_knobs,
        rows=_gpt2_rows,
        prefix="transformer.",
        ignored=r"h\.\d+\.attn\.(bias|masked_bias)",  # the causal mask, kept as a tensor by old versions
        must_be={
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "reorder_and_upcast_attn": (False,),
            "add_cross_attention": (False,),
        },
    ),
    "llama": Architecture(
        knobs=_llama_knobs,
        rows=_llama_rows,
        prefix="model.",
        ignored=r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",  # computed from rope_theta
        must_be={
            "sliding_window": (None,),
            "partial_rotary_factor": (None, 1, 1.0),
            "logits_soft_cap": (None,),
        },
    ),
}

# For every architecture.
_MUST_BE: dict[str, tuple[Any, ...]] = {"quantization_config": (None,), "is_encoder_decoder": (False,)}

HEAD = "lm_head.weight"


# --- reading -----------------------------------------------------------------------------------------------------------------------


def load(folder: pathlib.Path) -> tuple[Knobs, Any]:
    """(knobs of `ModelConfig`, parameters in our layout as a tree of float32 numpy arrays) of a Hugging Face folder.

    Tensors are read one at a time into their place, so memory stays near the model's size in float32. Raises `UserError`, naming file and
    key or tensor, for anything missing, left over, of another shape, or that the decoder cannot express.
    """
    folder = pathlib.Path(folder)
    source = _read_config(folder)
    architecture = _architecture(source)
    for key, allowed in (_MUST_BE | architecture.must_be).items():
        value = source.values.get(key, allowed[0])
        if value not in allowed:
            raise UserError(f"{source.path}: {key}={value!r} is not something that the decoder can express; it knows {allowed[0]!r}.")
    try:
        # The door of the schema checks types and bounds; what is not of the model only has to pass.
        knobs = architecture.knobs(source)
        config = from_dict({"model": knobs, "data": {"seq_len": 1}, "train": {"duration_steps": 1}}).model
    except UserError as error:
        raise UserError(str(error) if str(source.path) in str(error) else f"{source.path}: {error}") from None
    tensors = Tensors(folder)
    params = _fill(architecture, config, tensors)
    return {key: value for key, value in to_dict(config).items() if key in knobs or key == "head_dim"}, params


def _read_config(folder: pathlib.Path) -> Source:
    path = folder / "config.json"
    if not folder.is_dir():
        raise UserError(f"{folder} is not a folder.")
    if not path.is_file():
        raise UserError(f"{folder} has no config.json, so it is not a Hugging Face model folder.")
    return Source(path, _read_json(path))


def _read_json(path: pathlib.Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a JSON object.")
    return values


def _architecture(source: Source) -> Architecture:
    """By `model_type`; where it is absent, by the beginning of the class's name in `architectures`."""
    kind = source.values.get("model_type")
    if kind is None:
        classes = " ".join(source.values.get("architectures") or []).lower()
        kind = next((known for known in ARCHITECTURES if classes.startswith(known)), classes or None)
    if kind not in ARCHITECTURES:
        raise UserError(f"{source.path}: the architecture {kind!r} is not known; known are {', '.join(ARCHITECTURES)}.")
    return ARCHITECTURES[kind]


class Tensors:
    """The tensors of a folder's safetensors file or files, by name; shapes are known before anything is read."""

    def __init__(self, folder: pathlib.Path) -> None:
        self.where: dict[str, tuple[pathlib.Path, Any]] = {}
        for path in _weight_files(folder):
            handle = _open(path)
            for name in handle.keys():  # noqa: SIM118 - the handle is no mapping
                if name in self.where:
                    raise UserError(f"the tensor {name} is both in {self.where[name][0]} and in {path}.")
                self.where[name] = (path, handle)
        self.folder = folder

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self.where[name][1].get_slice(name).get_shape())

    def read(self, name: str) -> np.ndarray:
        """In float32."""
        path, handle = self.where[name]
        kind = handle.get_slice(name).get_dtype()
        if kind not in ("F64", "F32", "F16", "BF16"):
            raise UserError(f"{path}: the tensor {name} is of type {kind}; read are F64, F32, F16 and BF16.")
        return np.asarray(handle.get_tensor(name)).astype(np.float32)


def _open(path: pathlib.Path) -> Any:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError:
        raise UserError(f"reading {path} needs the package safetensors: pip install 'gptjax[huggingface]'.") from None
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}.") from None


def _weight_files(folder: pathlib.Path) -> list[pathlib.Path]:
    single, index = folder / "model.safetensors", folder / "model.safetensors.index.json"
    if single.is_file():
        return [single]
    if index.is_file():
        shards = _read_json(index).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise UserError(f"{index} has no weight_map of tensors to files.")
        files = [folder / name for name in sorted(set(shards.values()))]
        for path in files:
            if path.parent != folder or not path.is_file():
                raise UserError(f"{index} names the file {path.name}, which is not in {folder}.")
        return files
    pickles = sorted(path.name for pattern in ("*.bin", "*.pt", "*.pth", "*.bin.index.json") for path in folder.glob(pattern))
    if pickles:
        raise UserError(
            f"{folder} holds {pickles[0]}, a pickle, which can run any code when read; convert it to safetensors first: "
            "transformers' save_pretrained(folder, safe_serialization=True) writes it."
        )
    raise UserError(f"{folder} has neither model.safetensors nor model.safetensors.index.json.")


# --- into our layout ---------------------------------------------------------------------------------------------------------------


def _fill(architecture: Architecture, config: ModelConfig, tensors: Tensors) -> Any:
    abstract = nn.unbox(jax.eval_shape(lambda: Decoder(config).init(jax.random.key(0), jnp.zeros((1, 1), jnp.int32))["params"]))
    shapes = {"/".join(str(key.key) for key in path): leaf.shape for path, leaf in jax.tree_util.tree_leaves_with_path(abstract)}
    rows = architecture.rows(config)
    if not config.tied_embeddings:
        rows.append(Row("head", HEAD, "out_in"))
    assert {row.path for row in rows} == set(shapes), "the table and the decoder disagree"

    has_prefix = any(name.startswith(architecture.prefix) for name in tensors.where)
    prefix = architecture.prefix if has_prefix else ""
    # Everything is looked for before memory is taken.
    plan = [piece for row in rows for piece in _pieces(row, shapes[row.path], prefix)]
    for name, shape in {name: shape for _, _, name, shape in plan}.items():
        if name not in tensors.where:
            raise UserError(f"{tensors.folder} has no tensor {name}.")
        if tensors.shape(name) != shape:
            raise UserError(f"{tensors.folder}: the tensor {name} is of shape {tensors.shape(name)}, but config.json asks for {shape}.")
    _account_for_the_rest(architecture, config, tensors, prefix, {name for _, _, name, _ in plan})

    flat = {path: np.empty(shape, np.float32) for path, shape in shapes.items()}
    for row, layer, name, _ in plan:
        target = flat[row.path] if layer is None else flat[row.path][layer]
        target[...] = _laid_out(row, tensors.read(name)).reshape(target.shape)
    return _nested(flat)


def _pieces(row: Row, shape: tuple[int, ...], prefix: str) -> Iterator[tuple[Row, int | None, str, tuple[int, ...]]]:
    """(row, layer or None, their name, their shape) of each tensor that a parameter is made of."""
    stacked = "{}" in row.name
    ours = shape[1:] if stacked else shape
    if row.layout == "plain":
        theirs = ours
    else:
        inputs, outputs = math.prod(ours[: row.in_axes]), math.prod(ours[row.in_axes :]) * row.part[1]
        theirs = (outputs,) if row.in_axes == 0 else (inputs, outputs) if row.layout == "in_out" else (outputs, inputs)
    name = row.name if row.name == HEAD else prefix + row.name
    for layer in range(shape[0]) if stacked else (None,):
        yield row, layer, name if layer is None else name.format(layer), theirs


def _laid_out(row: Row, tensor: np.ndarray) -> np.ndarray:
    """[..., outputs] with the inputs in front, only the row's part of the outputs."""
    index, count = row.part
    return np.split(tensor.T if row.layout == "out_in" else tensor, count, axis=-1)[index]


def _account_for_the_rest(
    architecture: Architecture, config: ModelConfig, tensors: Tensors, prefix: str, used: set[str]
) -> None:
    """A tensor that is not used must be one that holds no parameters, or the embedding once more."""
    for name in sorted(set(tensors.where) - used):
        if re.fullmatch(architecture.ignored, name.removeprefix(prefix)):
            continue
        if name == HEAD and config.tied_embeddings:
            embedding = next(prefix + row.name for row in architecture.rows(config) if row.path == "embed/tokens")
            if tensors.shape(name) == tensors.shape(embedding) and np.array_equal(tensors.read(name), tensors.read(embedding)):
                continue
            raise UserError(f"{tensors.folder}: {HEAD} differs from {embedding}, although config.json ties them (tie_word_embeddings).")
        raise UserError(f"{tensors.where[name][0]}: the tensor {name} has no place in this architecture.")


def _nested(flat: dict[str, np.ndarray]) -> Any:
    tree: dict[str, Any] = {}
    for path, value in flat.items():
        *parents, leaf = path.split("/")
        node = tree
        for parent in parents:
            node = node.setdefault(parent, {})
        node[leaf] = value
    return tree
