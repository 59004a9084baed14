"""The decoder's knobs, what they refuse, and which attention backend can do what."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptjax.config.knobs import UserError, knob

if TYPE_CHECKING:
    from gptjax.config.schema import Config


@dataclass(frozen=True)
class ModelConfig:
    """The decoder."""

    vocab_size: int = knob(0, "Rows of the embedding; 0: the tokenizer's vocabulary.", at_least=0)
    num_layers: int = knob(4, "Transformer blocks.", at_least=1)
    model_dim: int = knob(128, "Width of the residual stream.", at_least=1)
    num_heads: int = knob(4, "Query heads.", at_least=1)
    num_kv_heads: int = knob(0, "Key and value heads; 0: as many as query heads.", at_least=0)
    head_dim: int = knob(0, "Width of one head; 0: model_dim / num_heads.", at_least=0)
    mlp_dim: int = knob(0, "Hidden width of the MLP; 0: 4 * model_dim.", at_least=0)
    max_seq_len: int = knob(1024, "Longest sequence that the model may see: the rows of learned positions.", at_least=1)

    norm: str = knob("layernorm", "Normalisation before each sub-layer and at the end.", choices=("layernorm", "rmsnorm"))
    norm_epsilon: float = knob(1e-5, "Added to the variance.", above=0)
    norm_bias: bool = knob(True, "LayerNorm has a bias (RMSNorm never has one).")
    position: str = knob("learned", "How a token knows its place.", choices=("learned", "rotary", "none"))
    rope_base: float = knob(10000.0, "Base of the rotary frequencies.", above=1)
    rotary_fraction: float = knob(1.0, "Share of each head that rotary positions turn, from its front.", above=0, at_most=1)
    rope_scaling: str = knob(
        "none", "How rotary frequencies stretch to longer contexts.", choices=("none", "linear", "dynamic", "llama3", "yarn")
    )
    rope_scaling_factor: float = knob(1.0, "How many times longer the context is to become.", at_least=1)
    rope_original_max_seq_len: int = knob(
        0, "dynamic, llama3, yarn: context before it was stretched; 0: max_seq_len.", at_least=0
    )
    rope_low_freq_factor: float = knob(
        1.0, "llama3: a frequency that turns fewer times in the original context is divided by the factor.", above=0
    )
    rope_high_freq_factor: float = knob(4.0, "llama3: one that turns more often stays.", above=0)
    rope_beta_fast: float = knob(32.0, "yarn: a frequency that turns more often in the original context stays.", above=0)
    rope_beta_slow: float = knob(1.0, "yarn: one that turns fewer times is divided by the factor.", above=0)
    rope_truncate: bool = knob(True, "yarn: the two bounds are rounded outwards to whole pairs.")
    rope_attention_factor: float = knob(
        0.0, "yarn: rotated queries and keys are multiplied by it; 0: 0.1 * ln(rope_scaling_factor) + 1.", at_least=0
    )
    block: str = knob(
        "serial",
        "x + attention(norm(x)), then x + mlp(norm(x)); parallel: x + attention(norm(x)) + mlp(norm(x)), each norm its own.",
        choices=("serial", "parallel"),
    )
    activation: str = knob("gelu_tanh", "Non-linearity of the MLP.", choices=("gelu", "gelu_tanh", "relu", "silu"))
    gated_mlp: bool = knob(False, "down(activation(gate(x)) * up(x)) in place of down(activation(up(x))).")
    attention_bias: bool = knob(True, "Biases on the query, key, value and output projections.")
    attention_output_bias: bool = knob(True, "With attention_bias: on the output projection too.")
    query_key_norm: bool = knob(False, "`norm` over each head's query and key, before they are rotated.")
    mlp_bias: bool = knob(True, "Biases in the MLP.")
    tied_embeddings: bool = knob(True, "The output head is the transposed token embedding.")

    num_experts: int = knob(0, "Routed experts in place of each block's MLP; 0: a dense MLP.", at_least=0)
    experts_per_token: int = knob(2, "Experts that each token goes to.", at_least=1)
    expert_mlp_dim: int = knob(0, "Hidden width of one expert; 0: mlp_dim.", at_least=0)
    num_shared_experts: int = knob(0, "Experts that every token goes to, beside its routed ones.", at_least=0)
    expert_capacity_factor: float = knob(
        0.0,
        "Places an expert has in each row, over the even share seq_len * experts_per_token / num_experts; "
        "what finds none is dropped; 0: dropless.",
        at_least=0,
    )
    router_normalize_top_k: bool = knob(
        True, "A token's weights on its experts sum to 1; otherwise they are their probabilities among all experts."
    )

    embedding_dropout: float = knob(0.0, "Dropout rate on the embeddings.", at_least=0, below=1)
    attention_dropout: float = knob(0.0, "Dropout rate on the attention weights.", at_least=0, below=1)
    residual_dropout: float = knob(0.0, "Dropout rate on each sub-layer's output.", at_least=0, below=1)

    init_std: float = knob(0.02, "Standard deviation of initial weights and embeddings.", above=0)
    scaled_residual_init: bool = knob(
        True, "GPT-2's: projections into the residual stream start at init_std / sqrt(2 * num_layers)."
    )

    dtype: str = knob(
        "float32", "Matrix products; norms, softmax, logits and loss are always float32.", choices=("float32", "bfloat16")
    )
    param_dtype: str = knob("float32", "Parameters.", choices=("float32", "bfloat16"))
    remat: str = knob(
        "none",
        "What the backward pass computes again: nothing, all but matrix products, everything.",
        choices=("none", "dots", "full"),
    )
    scan_unroll: int = knob(1, "Layers in one iteration of the scan over layers; 0: all of them.", at_least=0)
    attention: str = knob(
        "auto",
        "Attention backend; auto takes the platform's first that can do what is asked.",
        choices=("auto", "dense", "blockwise", "xla", "cudnn", "splash"),
    )
    attention_window: int = knob(0, "Latest tokens that a query sees, its own included; 0: all.", at_least=0)
    attention_softcap: float = knob(0.0, "Scores become cap * tanh(score / cap), as in Gemma 2; 0: off.", at_least=0)

    @property
    def rotary_dim(self) -> int:
        """Numbers of each head that rotary positions turn."""
        return int(self.head_dim * self.rotary_fraction)


# What each attention backend can do besides causal attention over packed segments with grouped heads. "context": over a sequence
# that mesh.context shares out. "prefix": of which some keys are seen from before them.
ATTENTION_CAPABILITIES: dict[str, frozenset[str]] = {
    "dense": frozenset({"attention_dropout", "attention_window", "attention_softcap", "prefix"}),
    "blockwise": frozenset({"attention_dropout", "attention_window", "attention_softcap", "context"}),
    "xla": frozenset({"attention_window"}),
    "cudnn": frozenset({"attention_window"}),
    "splash": frozenset({"attention_window", "attention_softcap", "context"}),
}


def attention_refusal(model: ModelConfig, backend: str, seq_len: int, context: int = 1, prefix: bool = False) -> str:
    """Why `backend` cannot do what `model` asks of it, in one sentence that names a backend which can; "" where it can.

    `context`: parts that the sequence is cut into. `prefix`: some keys are seen from before them.
    """
    wanted = {name: getattr(model, name) for name in ("attention_dropout", "attention_window", "attention_softcap")}
    needs = [(name, f"model.{name}={value}") for name, value in wanted.items() if value]
    needs += [("context", f"mesh.context={context}")] if context > 1 else []
    needs += [("prefix", "attention to later tokens")] if prefix else []
    for name, key in needs:
        if name not in ATTENTION_CAPABILITIES[backend]:
            able = [other for other, abilities in ATTENTION_CAPABILITIES.items() if name in abilities]
            return f"model.attention={backend} cannot do {key}; {' and '.join(able)} can."
    if backend == "cudnn":
        if model.dtype != "bfloat16":
            return f"model.attention=cudnn needs model.dtype=bfloat16, not {model.dtype}; model.attention=dense takes both."
        if model.head_dim % 8 or model.head_dim > 128:
            return f"model.attention=cudnn needs a model.head_dim of 8, 16, ..., 128, not {model.head_dim}; dense takes any."
        if seq_len % 2:
            return f"model.attention=cudnn needs an even data.seq_len, not {seq_len}; dense takes any."
    if backend == "splash":
        if model.head_dim % 64:
            return f"model.attention=splash needs a model.head_dim that 64 divides, not {model.head_dim}; dense takes any."
        if seq_len % (128 * context):
            over = f"128 * mesh.context={128 * context}" if context > 1 else "128"
            return f"model.attention=splash needs a data.seq_len that {over} divides, not {seq_len}; blockwise takes others."
    return ""


# --- what model knobs refuse ---------------------------------------------------------------------------------------------


def derive(model: ModelConfig) -> ModelConfig:
    """Sizes given as 0 become the sizes they stand for."""
    if not model.head_dim and model.model_dim % model.num_heads:
        raise UserError(
            f"model.num_heads={model.num_heads} does not divide model.model_dim={model.model_dim}; "
            "change one, or set model.head_dim."
        )
    model = dataclasses.replace(
        model,
        num_kv_heads=model.num_kv_heads or model.num_heads,
        head_dim=model.head_dim or model.model_dim // model.num_heads,
        mlp_dim=model.mlp_dim or 4 * model.model_dim,
    )
    if model.num_experts:
        model = dataclasses.replace(model, expert_mlp_dim=model.expert_mlp_dim or model.mlp_dim)
    return model


def underived(model: ModelConfig) -> ModelConfig:
    """The sizes that follow from others set back to 0."""
    own = {"num_kv_heads": model.num_heads, "head_dim": model.model_dim // model.num_heads, "mlp_dim": 4 * model.model_dim}
    own["expert_mlp_dim"] = model.mlp_dim
    follow: dict[str, Any] = {name: 0 for name, size in own.items() if getattr(model, name) == size}
    return dataclasses.replace(model, **follow)


def check(config: Config) -> None:
    """Raises `UserError` for model knobs that don't go together."""
    model, data = config.model, config.data
    if model.num_heads % model.num_kv_heads:
        raise UserError(f"model.num_kv_heads={model.num_kv_heads} does not divide model.num_heads={model.num_heads}.")
    if data.seq_len > model.max_seq_len:
        raise UserError(
            f"data.seq_len={data.seq_len} is longer than model.max_seq_len={model.max_seq_len}, the positions that the model has."
        )
    if model.attention != "auto" and (refusal := attention_refusal(model, model.attention, data.seq_len)):
        raise UserError(refusal)
    _check_rotary(model)
    _check_experts(config)


def _check_rotary(model: ModelConfig) -> None:
    if model.position != "rotary":
        for name, idle in (("rope_scaling", "none"), ("rotary_fraction", 1.0)):
            if getattr(model, name) != idle:
                raise UserError(
                    f"model.{name}={getattr(model, name)} needs model.position=rotary, but model.position={model.position}."
                )
        return
    if model.head_dim % 2:
        raise UserError(f"rotary positions need an even model.head_dim, not {model.head_dim}.")
    if model.rotary_dim % 2 or not model.rotary_dim:
        raise UserError(
            f"model.rotary_fraction={model.rotary_fraction} of model.head_dim={model.head_dim} is {model.rotary_dim} numbers, "
            "but rotary positions turn pairs; make it an even number of at least 2."
        )
    if model.rope_scaling == "dynamic" and model.rotary_dim == 2:
        raise UserError("model.rope_scaling=dynamic needs more than one pair to rotate; raise model.rotary_fraction or head_dim.")
    if model.rope_scaling == "dynamic" and model.rope_original_max_seq_len > model.max_seq_len:
        raise UserError(
            f"model.rope_original_max_seq_len={model.rope_original_max_seq_len} is more than "
            f"model.max_seq_len={model.max_seq_len}; model.rope_scaling=dynamic stretches the one to the other."
        )
    for low, high in (("rope_low_freq_factor", "rope_high_freq_factor"), ("rope_beta_slow", "rope_beta_fast")):
        if getattr(model, low) >= getattr(model, high):
            raise UserError(f"model.{low}={getattr(model, low)} must be below model.{high}={getattr(model, high)}.")


def _check_experts(config: Config) -> None:
    model, objective = config.model, config.objective
    if not model.num_experts:
        idle = {
            f"model.{name}": getattr(model, name) for name in ("expert_mlp_dim", "num_shared_experts", "expert_capacity_factor")
        }
        idle |= {f"objective.{name}": getattr(objective, name) for name in ("router_balance_loss", "router_z_loss")}
        for key, value in idle.items():
            if value:
                raise UserError(f"{key}={value} is for a mixture of experts, but model.num_experts=0; set one of them.")
        return
    if model.experts_per_token > model.num_experts:
        raise UserError(f"model.experts_per_token={model.experts_per_token} is more than model.num_experts={model.num_experts}.")
    if model.experts_per_token == 1 and model.router_normalize_top_k:
        raise UserError(
            "model.router_normalize_top_k=True makes every weight 1 with model.experts_per_token=1, from which the router learns "
            "nothing; set it to False."
        )
