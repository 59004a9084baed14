"""The decoder's knobs, what they refuse, and which attention backend can do what."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gptjax.config import patterns
from gptjax.config.backends import attention_refusal
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

    norm: str = knob(
        "layernorm",
        "Normalisation in the blocks and at their end; none: nowhere.",
        choices=("layernorm", "rmsnorm", "none"),
    )
    norm_placement: str = knob(
        "pre",
        "Where a block's norms stand. pre: x + f(norm(x)), and one norm at the end (GPT-2). post: norm(x + f(x)), and none at "
        "the end (Vaswani et al., 2017). sandwich: x + norm(f(norm(x))), and one at the end (Gemma 2).",
        choices=("pre", "post", "sandwich"),
    )
    norm_epsilon: float = knob(1e-5, "Added to the variance.", above=0)
    norm_bias: bool = knob(True, "LayerNorm has a bias (RMSNorm never has one).")
    position: str = knob(
        "learned",
        "How a token knows its place. sinusoidal: fixed vectors added to the embedding (Vaswani et al., 2017). alibi (Press et "
        "al., 2021): scores fall with the distance, at a fixed slope for each head; t5 (Raffel et al., 2020): a learned number "
        "for each bucket of distances is added to them, in each layer its own.",
        choices=("learned", "sinusoidal", "rotary", "alibi", "t5", "none"),
    )
    position_pattern: tuple[str, ...] = knob(
        (),
        "Each layer's position, repeated through the layers: rotary,rotary,rotary,none is SmolLM3's and Llama 4's (iRoPE); "
        "empty: model.position in all.",
        choices=patterns.LAYER_POSITIONS,
    )
    t5_num_buckets: int = knob(
        32, "t5: buckets of distances; half of them hold one distance each, the others grow with its logarithm.", at_least=2
    )
    t5_max_distance: int = knob(128, "t5: distances from here on share the last bucket.", at_least=2)
    t5_bidirectional: bool = knob(
        False, "t5: half of the buckets are for keys that come after the query: for objectives that look ahead."
    )
    rope_base: float = knob(10000.0, "Base of the rotary frequencies.", above=1)
    local_rope_base: float = knob(
        0.0,
        "Base of the local layers of attention_pattern, which rope_scaling leaves as they are (Gemma 3); 0: as the others.",
        at_least=0,
    )
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
        "x + attention(norm(x)), then x + mlp(norm(x)); parallel: x + attention(norm(x)) + mlp(norm(x)), each norm its own "
        "(GPT-NeoX), or with norm_placement=post: norm(x + attention(x) + mlp(x)); parallel_shared: both read one norm (GPT-J).",
        choices=("serial", "parallel", "parallel_shared"),
    )
    residual_scale: float = knob(
        1.0,
        "What attention and MLP give is multiplied by it before it is added, as by 1 / sqrt(2 * num_layers); with "
        "norm_placement=post 1 / alpha is DeepNet's norm(alpha * x + f(x)) (Wang et al., 2022).",
        above=0,
    )
    layer_scale: float = knob(
        0.0,
        "What attention and MLP give is multiplied by a learned number for each channel, which starts here (LayerScale, Touvron "
        "et al., 2021); 0: off.",
        at_least=0,
    )
    activation: str = knob(
        "gelu_tanh",
        "Non-linearity of the MLP; relu2 is the square of relu (Primer, So et al., 2021).",
        choices=("gelu", "gelu_tanh", "relu", "relu2", "silu", "sigmoid", "identity"),
    )
    gated_mlp: bool = knob(
        False,
        "down(activation(gate(x)) * up(x)) in place of down(activation(up(x))): of Shazeer's variants (2020) sigmoid gives GLU, "
        "identity the bilinear one, relu ReGLU, gelu GEGLU, silu SwiGLU.",
    )
    attention_kind: str = knob(
        "multi_head",
        "multi_head: keys and values of each head, or of groups of heads where num_kv_heads says so; latent: keys and values "
        "made of one small vector a token, which is all that a cache holds (multi-head latent attention, DeepSeek-V2, 2024).",
        choices=("multi_head", "latent"),
    )
    kv_latent_dim: int = knob(0, "latent: width of the vector that keys and values are made of.", at_least=0)
    query_latent_dim: int = knob(0, "latent: width of a vector that queries are made of; 0: of the residual stream.", at_least=0)
    rotary_head_dim: int = knob(
        0,
        "latent: width of what rotary positions turn, beside head_dim in each query and in one key for all heads; "
        "0: half of head_dim where positions are rotary.",
        at_least=0,
    )
    attention_bias: bool = knob(
        True, "Biases on the query, key, value and output projections; not on latent's maps out of small vectors."
    )
    attention_output_bias: bool = knob(True, "With attention_bias: on the output projection too.")
    query_key_norm: bool = knob(False, "`norm` over each head's query and key, before they are rotated.")
    mlp_bias: bool = knob(True, "Biases in the MLP.")
    tied_embeddings: bool = knob(True, "The output head is the transposed token embedding.")
    embedding_scale: float = knob(
        1.0,
        "Factor on the token embeddings as they enter, not where they are the output head; 0: sqrt(model_dim), as in the "
        "original Transformer and Gemma.",
        at_least=0,
    )
    embedding_dim: int = knob(
        0,
        "Width of the token table, which a learned map takes to model_dim, and where it is tied back again (ALBERT, Lan et al., "
        "2020); 0: model_dim, without a map.",
        at_least=0,
    )
    logit_softcap: float = knob(0.0, "Logits become cap * tanh(logit / cap), as in Gemma 2; 0: off.", at_least=0)
    prediction_heads: int = knob(
        1,
        "Tokens that each position learns to predict: head k, from 2 on, is a block of its own on what the last layer gives, and "
        "predicts k tokens ahead through the same final norm and output head (Gloeckle et al., 2024). Evaluation and generation "
        "use the first.",
        at_least=1,
    )

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
    stochastic_depth: float = knob(
        0.0,
        "A row of the batch leaves out a sub-layer with a probability that rises with depth, from stochastic_depth / num_layers "
        "in the first layer to this in the last (Huang et al., 2016); the others are scaled to keep the mean.",
        at_least=0,
        below=1,
    )

    init_std: float = knob(0.02, "Standard deviation of initial weights and embeddings.", above=0)
    scaled_residual_init: bool = knob(
        True, "GPT-2's: projections into the residual stream start at init_std / sqrt(2 * num_layers)."
    )
    parameterization: str = knob(
        "standard",
        "How initial weights, learning rates and multipliers follow the width; mup: so that the best learning rate at "
        "mup_base_dim, where it equals standard, stays the best at other widths (Yang et al., 2022, Tensor Programs V, table 8).",
        choices=("standard", "mup"),
    )
    mup_base_dim: int = knob(
        0, "mup: the model_dim that others are measured by; mlp_dim and heads are taken to grow with model_dim.", at_least=0
    )
    mup_base_head_dim: int = knob(
        0, "mup: head_dim at mup_base_dim, where width grows by larger heads; 0: it grows by more of them.", at_least=0
    )

    dtype: str = knob(
        "float32", "Matrix products; norms, softmax, logits and loss are always float32.", choices=("float32", "bfloat16")
    )
    quantization: str = knob(
        "none",
        "Products of the blocks' projections with both operands rounded to 8 bits, a scale for each token and output channel; "
        "the backward pass takes rounding for the identity and stays in `dtype`. int8, or fp8 (e4m3), which hardware without it "
        "computes exactly in a wider type.",
        choices=("none", "int8", "fp8"),
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
    attention_score: str = knob(
        "scaled_dot",
        "How a query meets a key: scaled_dot, their product over sqrt(head_dim); dot, their product; cosine, that of their "
        "directions times a learned temperature for each head (Henry et al., 2020); additive, v tanh(query + key) with a learned "
        "v for each head (Bahdanau et al., 2015).",
        choices=("scaled_dot", "dot", "cosine", "additive"),
    )
    attention_window: int = knob(0, "Latest tokens that a query sees, its own included; 0: all.", at_least=0)
    attention_pattern: tuple[str, ...] = knob(
        (),
        "Layers that have attention_window, local, and that see everything, global, repeated through the layers (Gemma 2: "
        "local,global); empty: all have it.",
        choices=("local", "global"),
    )
    attention_softcap: float = knob(
        0.0, "Scores become cap * tanh(score / cap), as in Gemma 2, before positions are added to them; 0: off.", at_least=0
    )
    attention_sink: str = knob(
        "none",
        "learned: a number for each head stands among the scores and takes weight to no token, as in gpt-oss (after Xiao et al., "
        "2023).",
        choices=("none", "learned"),
    )
    attention_sink_tokens: int = knob(
        0,
        "First tokens of each text that stay visible to all after them whatever attention_window says, as in StreamingLLM "
        "(Xiao et al., 2023).",
        at_least=0,
    )

    @property
    def rotary_dim(self) -> int:
        """Numbers of each head that rotary positions turn."""
        return self.rotary_head_dim if self.attention_kind == "latent" else int(self.head_dim * self.rotary_fraction)

    @property
    def query_dim(self) -> int:
        """Width of one head's query and key."""
        return self.head_dim + self.rotary_head_dim

    @property
    def num_blocks(self) -> int:
        """Blocks that a training step runs: the layers, and one of each further prediction head."""
        return self.num_layers + self.prediction_heads - 1

    @property
    def token_scale(self) -> float:
        """Factor on the token embeddings."""
        return self.embedding_scale or math.sqrt(self.model_dim)


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
    if model.attention_kind == "latent" and "rotary" in patterns.positions(model):
        model = dataclasses.replace(model, rotary_head_dim=model.rotary_head_dim or _half(model.head_dim))
    if model.num_experts:
        model = dataclasses.replace(model, expert_mlp_dim=model.expert_mlp_dim or model.mlp_dim)
    return model


def _half(head_dim: int) -> int:
    """Of an even number, as rotary positions turn pairs."""
    return max(2, head_dim // 4 * 2)


def underived(model: ModelConfig) -> ModelConfig:
    """The sizes that follow from others set back to 0."""
    own = {"num_kv_heads": model.num_heads, "head_dim": model.model_dim // model.num_heads, "mlp_dim": 4 * model.model_dim}
    own |= {"expert_mlp_dim": model.mlp_dim, "rotary_head_dim": _half(model.head_dim)}
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
    patterns.check(model)
    for layer in patterns.layer_configs(model) if model.attention != "auto" else ():
        if refusal := attention_refusal(layer, model.attention, data.seq_len):
            raise UserError(refusal)
    if model.attention_sink_tokens and not model.attention_window:
        raise UserError(
            f"model.attention_sink_tokens={model.attention_sink_tokens} needs a window that they outlast, "
            "but model.attention_window=0."
        )
    _check_block(config)
    _check_latent(model)
    _check_rotary(model)
    _check_t5(model)
    _check_experts(config)
    if model.quantization != "none":
        _check_quantization(model)


def _check_quantization(model: ModelConfig) -> None:
    if model.num_experts:
        raise UserError(
            f"model.quantization={model.quantization} is for dense MLPs, but model.num_experts={model.num_experts}; drop one."
        )
    longest, most = max(model.model_dim, model.mlp_dim, model.num_heads * model.head_dim), 2**31 // 127**2
    if model.quantization == "int8" and longest > most:
        raise UserError(
            f"model.quantization=int8 sums at most {most} products exactly, but a projection of the model has {longest}."
        )


def _check_block(config: Config) -> None:
    model = config.model
    if model.norm == "none":
        if model.norm_placement != "pre":
            raise UserError(f"model.norm_placement={model.norm_placement} places norms, but model.norm=none; set one of them.")
        if model.query_key_norm:
            raise UserError("model.query_key_norm=True needs a norm, but model.norm=none; set one of them.")
    if model.norm_placement == "post" and model.block == "parallel_shared":
        raise UserError(
            "model.block=parallel_shared shares the norm before both branches, and model.norm_placement=post has none there; "
            "model.block=parallel gives norm(x + attention(x) + mlp(x))."
        )
    if model.prediction_heads == 1 and (weight := config.objective.prediction_heads_weight) != 1.0:
        raise UserError(
            f"objective.prediction_heads_weight={weight} weighs heads beyond the first, but model.prediction_heads=1; "
            "set one of them."
        )
    if model.prediction_heads > 1 and config.objective.name != "causal":
        raise UserError(
            f"model.prediction_heads={model.prediction_heads} predicts later tokens, for which "
            f"objective.name={config.objective.name} has no targets; use causal or set model.prediction_heads=1."
        )


def _check_t5(model: ModelConfig) -> None:
    if "t5" not in patterns.positions(model):
        if model.t5_bidirectional:
            raise UserError(f"model.t5_bidirectional=True needs model.position=t5, but model.position={model.position}.")
        return
    sides = 2 if model.t5_bidirectional else 1
    if model.t5_num_buckets % (2 * sides):
        raise UserError(
            f"model.t5_num_buckets={model.t5_num_buckets} must be a multiple of {2 * sides} where "
            f"model.t5_bidirectional={model.t5_bidirectional}: half of each direction's buckets hold one distance each."
        )
    if model.t5_max_distance <= (exact := model.t5_num_buckets // (2 * sides)):
        raise UserError(
            f"model.t5_max_distance={model.t5_max_distance} must be more than {exact}, the distances that have buckets of their "
            f"own with model.t5_num_buckets={model.t5_num_buckets}."
        )


# What latent attention leaves no choice in.
_LATENT_TAKES: dict[str, tuple[Any, ...]] = {
    "attention_score": ("scaled_dot", "dot"),
    "query_key_norm": (False,),
    "rotary_fraction": (1.0,),
}


def _check_latent(model: ModelConfig) -> None:
    kind = f"model.attention_kind={model.attention_kind}"
    if model.attention_kind != "latent":
        for name in ("kv_latent_dim", "query_latent_dim", "rotary_head_dim"):
            if value := getattr(model, name):
                raise UserError(f"model.{name}={value} is for model.attention_kind=latent, not for {kind}; change one of them.")
        return
    if not model.kv_latent_dim:
        raise UserError(f"{kind} needs model.kv_latent_dim, the width of what keys and values are made of; it is 0.")
    if model.num_kv_heads != model.num_heads:
        raise UserError(
            f"model.num_kv_heads={model.num_kv_heads} shares keys among model.num_heads={model.num_heads}, but {kind} makes each "
            "head's own of one vector; set model.num_kv_heads to 0."
        )
    for name, allowed in _LATENT_TAKES.items():
        if (value := getattr(model, name)) not in allowed:
            raise UserError(f"{kind} cannot do model.{name}={value}; it takes {', '.join(map(str, allowed))}.")
    if model.rotary_head_dim and "rotary" not in patterns.positions(model):
        raise UserError(
            f"model.rotary_head_dim={model.rotary_head_dim} is for rotary positions, but model.position={model.position}; "
            "change one of them."
        )


def _check_rotary(model: ModelConfig) -> None:
    if "rotary" not in patterns.positions(model):
        for name, idle in (("rope_scaling", "none"), ("rotary_fraction", 1.0)):
            if getattr(model, name) != idle:
                raise UserError(
                    f"model.{name}={getattr(model, name)} needs model.position=rotary, but {patterns.described(model)}."
                )
        return
    if model.attention_kind != "latent" and model.head_dim % 2:
        raise UserError(f"rotary positions need an even model.head_dim, not {model.head_dim}.")
    if model.attention_kind == "latent" and model.rotary_head_dim % 2:
        raise UserError(
            f"model.attention_kind=latent with model.position=rotary needs an even model.rotary_head_dim, not "
            f"{model.rotary_head_dim}."
        )
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
