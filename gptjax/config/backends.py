"""Which attention backend can do what."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from gptjax.config.model import ModelConfig

# What each attention backend can do besides causal attention by (scaled) products over packed segments with grouped heads.
# "attention_score": other scores; "distance": numbers that are added to scores by the distance. "context": over a sequence that
# mesh.context shares out. "prefix": of which some keys are seen from before them.
_EVERYTHING = frozenset(
    ("attention_dropout", "attention_window", "attention_softcap", "attention_score", "attention_sink", "attention_sink_tokens")
) | {"distance", "prefix"}
ATTENTION_CAPABILITIES: dict[str, frozenset[str]] = {
    "dense": _EVERYTHING,
    "blockwise": _EVERYTHING | {"context"},
    "xla": frozenset({"attention_window"}),
    "cudnn": frozenset({"attention_window"}),
    "splash": frozenset({"attention_window", "attention_softcap", "context"}),
}

# Scores that are a number times the product of query and key, which every backend can do.
PRODUCT_SCORES = ("scaled_dot", "dot", "cosine")
# Positions that are added to scores.
DISTANCE_POSITIONS = ("alibi", "t5")


def attention_refusal(model: ModelConfig, backend: str, seq_len: int, context: int = 1, prefix: bool = False) -> str:
    """Why `backend` cannot do what `model` asks of it, in one sentence that names a backend which can; "" where it can.

    `context`: parts that the sequence is cut into. `prefix`: some keys are seen from before them.
    """
    wanted = {name: getattr(model, name) for name in ("attention_dropout", "attention_window", "attention_softcap")}
    wanted["attention_score"] = "" if model.attention_score in PRODUCT_SCORES else model.attention_score
    wanted["attention_sink"] = "" if model.attention_sink == "none" else model.attention_sink
    wanted["attention_sink_tokens"] = model.attention_sink_tokens
    needs = [(name, f"model.{name}={value}") for name, value in wanted.items() if value]
    needs += [("distance", f"model.position={model.position}")] if model.position in DISTANCE_POSITIONS else []
    needs += [("context", f"mesh.context={context}")] if context > 1 else []
    needs += [("prefix", "attention to later tokens")] if prefix else []
    for name, key in needs:
        if name not in ATTENTION_CAPABILITIES[backend]:
            able = [other for other, abilities in ATTENTION_CAPABILITIES.items() if name in abilities]
            return f"model.attention={backend} cannot do {key}; {' and '.join(able)} can."
    width = "model.head_dim" + (" + model.rotary_head_dim" if model.rotary_head_dim else "")
    if backend == "cudnn":
        if model.dtype != "bfloat16":
            return f"model.attention=cudnn needs model.dtype=bfloat16, not {model.dtype}; model.attention=dense takes both."
        if model.query_dim % 8 or model.query_dim > 128:
            return f"model.attention=cudnn needs a {width} of 8, 16, ..., 128, not {model.query_dim}; dense takes any."
        if seq_len % 2:
            return f"model.attention=cudnn needs an even data.seq_len, not {seq_len}; dense takes any."
    if backend == "splash":
        if model.query_dim % 64:
            return f"model.attention=splash needs a {width} that 64 divides, not {model.query_dim}; dense takes any."
        if seq_len % (128 * context):
            over = f"128 * mesh.context={128 * context}" if context > 1 else "128"
            return f"model.attention=splash needs a data.seq_len that {over} divides, not {seq_len}; blockwise takes others."
    return ""
