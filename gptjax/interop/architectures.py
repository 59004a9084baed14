"""Hugging Face's architectures: for each, what its config.json says in our knobs, and where its tensors go. Both directions.

An architecture is an entry of `ARCHITECTURES`. A key of config.json that stands for one knob is a line of its table; RoPE scaling
and sliding windows, which take several, are functions. What a knob has no key for is `fixed`; what a key may say that the decoder
has no knob for is refused (`must_be`).
"""

from __future__ import annotations

import dataclasses
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

from gptjax.config import ModelConfig, UserError
from gptjax.interop import rope
from gptjax.interop.layout import Row

Knobs = dict[str, Any]
REQUIRED = object()


class Source:
    """A config.json, or another format's metadata, with errors that name the file and the key."""

    def __init__(self, path: pathlib.Path, values: Mapping[str, Any]) -> None:
        self.path, self.values = path, values

    def get(self, key: str, default: Any = REQUIRED) -> Any:
        """The key's value; the default where it is absent or null. Without a default, the key is needed."""
        value = self.values.get(key)
        value = default if value is None else value
        if value is REQUIRED:
            raise UserError(f"{self.path} has no {key!r}.")
        return value

    def refuse(self, key: str, reason: str) -> UserError:
        return UserError(f"{self.path}: {key}={self.values.get(key)!r} {reason}")


@dataclasses.dataclass(frozen=True)
class Key:
    """The key of config.json that stands for a knob."""

    name: str
    default: Any = REQUIRED  # where it is absent or null: a value, or what gives one of the Source
    values: Mapping[Any, Any] | None = None  # theirs to ours

    def read(self, source: Source) -> Any:
        value = source.get(self.name, self.default(source) if callable(self.default) else self.default)
        if self.values is None:
            return value
        if not isinstance(value, (str, bool)) or value not in self.values:
            known = ", ".join(map(str, self.values))
            raise UserError(f"{source.path}: {self.name}={value!r} is not among those that the decoder has: {known}.")
        return self.values[value]

    def write(self, value: Any) -> Any:
        """Theirs for ours; None where they have none."""
        return value if self.values is None else next((theirs for theirs, ours in self.values.items() if ours == value), None)


@dataclasses.dataclass(frozen=True)
class Architecture:
    """One `model_type`."""

    classes: str  # the name of transformers' class
    keys: Mapping[str, Key]  # by our knob
    fixed: Knobs
    rows: Callable[[ModelConfig], list[Row]]
    prefix: str  # in front of every name but the head's, or absent throughout
    ignored: str  # regular expression of tensors that hold no parameters
    heads: tuple[str, ...] = ("lm_head.weight",)  # names of the output head, the first of them written
    must_be: Mapping[str, tuple[Any, ...]] = dataclasses.field(default_factory=dict)  # absent is the first
    read_more: tuple[Callable[[Source], Knobs], ...] = ()
    write_more: tuple[Callable[[ModelConfig], dict[str, Any]], ...] = ()


# The first of several that mean the same is written.
_ACTIVATIONS = {
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",  # the same formula, factored
    "gelu": "gelu",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
    "relu2": "relu2",
    "sigmoid": "sigmoid",
    "linear": "identity",
}


_BIASED: Knobs = {"norm": "layernorm", "norm_bias": True, "gated_mlp": False, "mlp_bias": True}


# --- GPT-2 ----------------------------------------------------------------------------------------------------------------------

_GPT2_KEYS = {
    "vocab_size": Key("vocab_size"),
    "num_layers": Key("n_layer"),
    "model_dim": Key("n_embd"),
    "num_heads": Key("n_head"),
    "mlp_dim": Key("n_inner", lambda source: 4 * _number(source, "n_embd")),
    "max_seq_len": Key("n_positions"),
    "norm_epsilon": Key("layer_norm_epsilon", 1e-5),
    "activation": Key("activation_function", "gelu_new", _ACTIVATIONS),
    "tied_embeddings": Key("tie_word_embeddings", True),
}


def _number(source: Source, key: str) -> int:
    value = source.get(key)
    if not isinstance(value, int):
        raise source.refuse(key, "must be a whole number.")
    return value


def _pairs(
    ours: str, theirs: str, ours_bias: str | None, kernel: tuple[str, str], bias: tuple[str, str], part: int = 0
) -> list[Row]:
    """The rows of a linear map: its kernel, and its bias where it has one."""
    rows = [Row(f"{ours}/kernel", kernel[0], f"{theirs}.weight", kernel[1], part)]
    return rows + ([Row(f"{ours}/{ours_bias}", bias[0], f"{theirs}.bias", bias[1], part)] if ours_bias else [])


def _norms(names: Mapping[str, str], has_bias: bool) -> list[Row]:
    rows = [Row(f"{ours}/scale", "D", f"{theirs}.weight", "D") for ours, theirs in names.items()]
    return rows + [Row(f"{ours}/bias", "D", f"{theirs}.bias", "D") for ours, theirs in names.items() if has_bias]


def _gpt2_rows(config: ModelConfig) -> list[Row]:
    rows = [Row("embed/tokens", "VD", "wte.weight", "V D"), Row("embed/positions", "SD", "wpe.weight", "S D")]
    rows += _norms({"layers/attention_norm": "h.{}.ln_1", "layers/mlp_norm": "h.{}.ln_2", "final_norm": "ln_f"}, True)
    attention, mlp = "layers/attention/", "layers/mlp/"
    for part, name in enumerate(("query", "key", "value")):  # Conv1D keeps its weight as [inputs, outputs]
        rows += _pairs(attention + name, "h.{}.attn.c_attn", "bias", ("DNH", "D 3NH"), ("NH", "3NH"), part)
    rows += _pairs(attention + "output", "h.{}.attn.c_proj", "bias", ("NHD", "NH D"), ("D", "D"))
    rows += _pairs(mlp + "up", "h.{}.mlp.c_fc", "bias", ("DF", "D F"), ("F", "F"))
    rows += _pairs(mlp + "down", "h.{}.mlp.c_proj", "bias", ("FD", "F D"), ("D", "D"))
    return rows


# --- GPT-NeoX -------------------------------------------------------------------------------------------------------------------

_NEOX_KEYS = {
    "vocab_size": Key("vocab_size"),
    "num_layers": Key("num_hidden_layers"),
    "model_dim": Key("hidden_size"),
    "num_heads": Key("num_attention_heads"),
    "mlp_dim": Key("intermediate_size"),
    "max_seq_len": Key("max_position_embeddings", 2048),
    "norm_epsilon": Key("layer_norm_eps", 1e-5),
    "activation": Key("hidden_act", "gelu", _ACTIVATIONS),
    "attention_bias": Key("attention_bias", True),
    "block": Key("use_parallel_residual", True, {True: "parallel", False: "serial"}),
    "tied_embeddings": Key("tie_word_embeddings", False),
}


def _neox_rows(config: ModelConfig) -> list[Row]:
    rows = [Row("embed/tokens", "VD", "embed_in.weight", "V D")]
    norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    rows += _norms({f"layers/{ours}": f"layers.{{}}.{theirs}" for ours, theirs in norms.items()}, True)
    rows += _norms({"final_norm": "final_layer_norm"}, True)
    attention, mlp, bias = "layers/attention/", "layers/mlp/", "bias" if config.attention_bias else None
    for part, name in enumerate(("query", "key", "value")):
        rows += _pairs(attention + name, "layers.{}.attention.query_key_value", bias, ("DNH", "N3H D"), ("NH", "N3H"), part)
    rows += _pairs(attention + "output", "layers.{}.attention.dense", bias, ("NHD", "D NH"), ("D", "D"))
    rows += _pairs(mlp + "up", "layers.{}.mlp.dense_h_to_4h", "bias", ("DF", "F D"), ("F", "F"))
    rows += _pairs(mlp + "down", "layers.{}.mlp.dense_4h_to_h", "bias", ("FD", "D F"), ("D", "D"))
    return rows


# --- Llama and its relatives ----------------------------------------------------------------------------------------------------

_LLAMA_KEYS = {
    "vocab_size": Key("vocab_size"),
    "num_layers": Key("num_hidden_layers"),
    "model_dim": Key("hidden_size"),
    "num_heads": Key("num_attention_heads"),
    "num_kv_heads": Key("num_key_value_heads", lambda source: source.get("num_attention_heads")),
    "head_dim": Key("head_dim", 0),
    "mlp_dim": Key("intermediate_size"),
    "max_seq_len": Key("max_position_embeddings", 2048),
    "norm_epsilon": Key("rms_norm_eps", 1e-6),
    "activation": Key("hidden_act", "silu", _ACTIVATIONS),
    "tied_embeddings": Key("tie_word_embeddings", False),
}
_LLAMA_FIXED: Knobs = {
    "norm": "rmsnorm",
    "norm_bias": False,
    "position": "rotary",
    "gated_mlp": True,
    "attention_bias": False,
    "mlp_bias": False,
}


def _llama_rows(config: ModelConfig) -> list[Row]:
    rows = [Row("embed/tokens", "VD", "embed_tokens.weight", "V D")]
    norms = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}
    rows += _norms({f"layers/{ours}": f"layers.{{}}.{theirs}" for ours, theirs in norms.items()}, False)
    rows += _norms({"final_norm": "norm"}, False)
    attention, mlp = "layers/attention/", "layers/mlp/"
    bias = "bias" if config.attention_bias else None
    mlp_bias = "bias" if config.mlp_bias else None
    rows += _pairs(attention + "query", "layers.{}.self_attn.q_proj", bias, ("DNH", "NH D"), ("NH", "NH"))
    rows += _pairs(attention + "key", "layers.{}.self_attn.k_proj", bias, ("DKH", "KH D"), ("KH", "KH"))
    rows += _pairs(attention + "value", "layers.{}.self_attn.v_proj", bias, ("DKH", "KH D"), ("KH", "KH"))
    output_bias = bias if config.attention_output_bias else None
    rows += _pairs(attention + "output", "layers.{}.self_attn.o_proj", output_bias, ("NHD", "D NH"), ("D", "D"))
    if config.query_key_norm:
        rows.append(Row(attention + "query_norm/scale", "H", "layers.{}.self_attn.q_norm.weight", "H"))
        rows.append(Row(attention + "key_norm/scale", "H", "layers.{}.self_attn.k_norm.weight", "H"))
    rows += _pairs(mlp + "gate", "layers.{}.mlp.gate_proj", mlp_bias, ("DF", "F D"), ("F", "F"))
    rows += _pairs(mlp + "up", "layers.{}.mlp.up_proj", mlp_bias, ("DF", "F D"), ("F", "F"))
    rows += _pairs(mlp + "down", "layers.{}.mlp.down_proj", mlp_bias, ("FD", "D F"), ("D", "D"))
    return rows


def _mistral_window(source: Source) -> Knobs:
    return {"attention_window": source.values.get("sliding_window", 4096) or 0}


def _qwen_window(source: Source) -> Knobs:
    """All layers have the window, or none: those from `max_window_layers` on, or as `layer_types` says."""
    window = source.values.get("sliding_window", 4096) if source.get("use_sliding_window", False) else None
    layers, first = _number(source, "num_hidden_layers"), source.get("max_window_layers", 28)
    types = source.get(
        "layer_types", [("sliding_attention" if window and i >= first else "full_attention") for i in range(layers)]
    )
    if len(set(types)) > 1 or len(types) != layers:
        key = "layer_types" if "layer_types" in source.values else "max_window_layers"
        raise source.refuse(key, "gives some layers a sliding window and others none; the decoder knows one for all.")
    return {"attention_window": window or 0 if types[0] == "sliding_attention" else 0}


def _write_qwen_window(config: ModelConfig) -> dict[str, Any]:
    window = config.attention_window
    shared = {"use_sliding_window": bool(window), "sliding_window": window or None}
    return shared | {"max_window_layers": 0 if window else config.num_layers}


def _llama_like(classes: str, keys: Mapping[str, Key], fixed: Knobs, window: bool, **more: Any) -> Architecture:
    return Architecture(
        classes=classes,
        keys=_LLAMA_KEYS | dict(keys),
        fixed={name: value for name, value in (_LLAMA_FIXED | fixed).items() if name not in keys},
        rows=_llama_rows,
        prefix="model.",
        ignored=r"layers\.\d+\.self_attn\.rotary_emb\.inv_freq",  # computed from rope_theta
        must_be={"logits_soft_cap": (None,)} | ({} if window else {"sliding_window": (None,)}),
        **more,
    )


ARCHITECTURES = {
    "gpt2": Architecture(
        classes="GPT2LMHeadModel",
        keys=_GPT2_KEYS,
        fixed=_BIASED | {"position": "learned", "attention_bias": True},
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
    "gpt_neox": Architecture(
        classes="GPTNeoXForCausalLM",
        keys=_NEOX_KEYS,
        fixed=_BIASED | {"position": "rotary"},
        rows=_neox_rows,
        prefix="gpt_neox.",
        ignored=r"layers\.\d+\.attention\.(bias|masked_bias|rotary_emb\.inv_freq)",  # masks and frequencies of old versions
        heads=("embed_out.weight", "lm_head.weight"),
        read_more=(rope.reader("rotary_emb_base", "rotary_pct", 0.25),),
        write_more=(rope.writer("rotary_emb_base", "rotary_pct"),),
    ),
    "llama": _llama_like(
        "LlamaForCausalLM",
        {"attention_bias": Key("attention_bias", False), "mlp_bias": Key("mlp_bias", False)},
        {},
        window=False,
        read_more=(rope.reader(),),
        write_more=(rope.writer(),),
    ),
    "mistral": _llama_like(
        "MistralForCausalLM",
        {"num_kv_heads": Key("num_key_value_heads", lambda source: 8 if "num_key_value_heads" not in source.values else 0)},
        {},
        window=True,
        read_more=(rope.reader(), _mistral_window),
        write_more=(rope.writer(), lambda config: {"sliding_window": config.attention_window or None}),
    ),
    "qwen2": _llama_like(
        "Qwen2ForCausalLM",
        {"max_seq_len": Key("max_position_embeddings", 32768)},
        {"attention_bias": True, "attention_output_bias": False},
        window=True,
        read_more=(rope.reader(), _qwen_window),
        write_more=(rope.writer(), _write_qwen_window),
    ),
    "qwen3": _llama_like(
        "Qwen3ForCausalLM",
        {
            "max_seq_len": Key("max_position_embeddings", 32768),
            "head_dim": Key("head_dim", 128),
            "attention_bias": Key("attention_bias", False),
        },
        {"query_key_norm": True},
        window=True,
        read_more=(rope.reader(), _qwen_window),
        write_more=(rope.writer(), _write_qwen_window),
    ),
}

# For every architecture.
MUST_BE: dict[str, tuple[Any, ...]] = {"quantization_config": (None,), "is_encoder_decoder": (False,)}


# --- both directions ------------------------------------------------------------------------------------------------------------


def read_knobs(source: Source, architecture: Architecture) -> Knobs:
    """What a config.json says. Raises `UserError`, naming file and key, for what the decoder cannot express."""
    for key, allowed in (MUST_BE | dict(architecture.must_be)).items():
        value = source.values.get(key, allowed[0])
        if value not in allowed:
            raise source.refuse(key, f"cannot be expressed by the decoder, which knows {allowed[0]!r}.")
    knobs = {knob: key.read(source) for knob, key in architecture.keys.items()} | architecture.fixed
    for more in architecture.read_more:
        knobs |= more(source)
    return knobs


def write_config(kind: str, config: ModelConfig) -> dict[str, Any]:
    """The config.json of a model, which may say less than the model is: `read_knobs` tells."""
    architecture = ARCHITECTURES[kind]
    values: dict[str, Any] = {"architectures": [architecture.classes], "model_type": kind}
    values |= {key.name: key.write(getattr(config, knob)) for knob, key in architecture.keys.items()}
    for more in architecture.write_more:
        values |= more(config)
    return values
