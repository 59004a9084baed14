"""Every knob of a run: declared once, with its default, its meaning and its check.

The frozen dataclasses below are the schema. A recipe (`configs/*.py`) returns the `ConfigDict` that `defaults()` makes, edited;
command-line overrides are laid over it (recipes.py); then `from_dict` turns it into dataclasses, once. Past that door there is no
ConfigDict. The dataclasses are hashable, so a compiled function can be cached by its config.

Everything a person can get wrong here raises `UserError` with one sentence that names the key.
"""

from __future__ import annotations

import dataclasses
import difflib
import json
import math
import pathlib
import reprlib
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import ml_collections


class UserError(Exception):
    """A mistake that a person can mend: one sentence naming the file or key. The command line exits with status 2."""


def knob(
    default: Any,
    meaning: str,
    *,
    choices: tuple[str, ...] = (),
    at_least: float | None = None,
    above: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    shapes_run: bool = True,
) -> Any:
    """A dataclass field. `shapes_run=False` marks a knob that may change between the start and the resumption of a run."""
    bounds = {"at_least": at_least, "above": above, "at_most": at_most, "below": below}
    return dataclasses.field(
        default=default,
        metadata={
            "meaning": meaning,
            "choices": choices,
            "bounds": {name: bound for name, bound in bounds.items() if bound is not None},
            "shapes_run": shapes_run,
        },
    )


def duration(unit: str, meaning: str, shapes_run: bool = True) -> Any:
    """One member of a `_steps`, `_tokens`, `_epochs` family; at most one of the three is given, 0 means not given."""
    return knob(0.0 if unit == "epochs" else 0, f"{meaning}, in {unit}; 0: not given.", at_least=0, shapes_run=shapes_run)


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
# that mesh.context shares out.
ATTENTION_CAPABILITIES: dict[str, frozenset[str]] = {
    "dense": frozenset({"attention_dropout", "attention_window", "attention_softcap"}),
    "blockwise": frozenset({"attention_dropout", "attention_window", "attention_softcap", "context"}),
    "xla": frozenset({"attention_window"}),
    "cudnn": frozenset({"attention_window"}),
    "splash": frozenset({"attention_window", "attention_softcap", "context"}),
}


def attention_refusal(model: ModelConfig, backend: str, seq_len: int, context: int = 1) -> str:
    """Why `backend` cannot do what `model` asks of it, in one sentence that names a backend which can; "" where it can.

    `context`: parts that the sequence is cut into.
    """
    wanted = {name: getattr(model, name) for name in ("attention_dropout", "attention_window", "attention_softcap")}
    needs = [(name, f"model.{name}={value}") for name, value in wanted.items() if value]
    needs += [("context", f"mesh.context={context}")] if context > 1 else []
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


@dataclass(frozen=True)
class DataConfig:
    """Documents to batches."""

    source: str = knob("stdlib", "Where documents come from.", choices=("stdlib", "text", "jsonl", "tfds"))
    path: str = knob("", "text, jsonl: a file, a glob, or several separated by commas; tfds: its data_dir.")
    eval_path: str = knob("", "text, jsonl: files held out for evaluation; empty: eval_fraction of `path`.")
    name: str = knob("", "tfds: the data set's name, as in tiny_shakespeare or tiny_shakespeare:1.0.0.")
    train_split: str = knob("train", "tfds: split to train on.")
    eval_split: str = knob("validation", "tfds: split to evaluate on, as in validation+test.")
    text_field: str = knob("text", "jsonl, tfds: the field that holds the text.")
    split_by: str = knob(
        "hash",
        "How eval_fraction is held out: documents by a hash of their name, or the tail of the text.",
        choices=("hash", "tail"),
    )
    eval_fraction: float = knob(0.1, "Share held out for evaluation.", above=0, below=1)

    unicode_form: str = knob("none", "Unicode normalisation of each document.", choices=("none", "NFC", "NFD", "NFKC", "NFKD"))
    drop_control_characters: bool = knob(False, "Remove control characters other than tab and newline.")
    drop_duplicates: bool = knob(False, "Keep the first of documents with exactly the same cleaned text.")

    tokenizer: str = knob("byte", "Text to ids.", choices=("byte", "char", "sentencepiece", "gpt2", "huggingface"))
    tokenizer_path: str = knob(
        "",
        "sentencepiece: a .model file (empty: train one on the source); gpt2: the folder of encoder.json and vocab.bpe; "
        "huggingface: a tokenizer.json.",
    )
    tokenizer_vocab_size: int = knob(8192, "Vocabulary of a SentencePiece model trained on the source.", at_least=300)
    add_eos: bool = knob(True, "End each document with the end-of-text token, where the tokenizer has one.")
    add_bos: bool = knob(True, "Begin each document with the begin-of-text token, where the tokenizer has one.")

    packing: str = knob(
        "packed",
        "packed: rows of whole documents and pieces, which never see each other; "
        "windows: consecutive windows of the concatenated text, in random order.",
        choices=("packed", "windows"),
    )
    seq_len: int = knob(256, "Tokens a row that are predicted.", at_least=1)
    batch_size: int = knob(16, "Rows a step, over all hosts and micro-batches.", at_least=1)
    shuffle: bool = knob(True, "Visit rows in an order drawn from the seed, anew each epoch.")
    prefetch: int = knob(16, "Batches prepared ahead of the step.", at_least=0, shapes_run=False)


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is predicted and what it costs."""

    name: str = knob("causal", "Batch to inputs, targets and weights.", choices=("causal",))
    z_loss: float = knob(0.0, "Weight of the squared log-normaliser (PaLM uses 1e-4).", at_least=0)
    label_smoothing: float = knob(0.0, "Share of the target's probability spread over the vocabulary.", at_least=0, below=1)
    router_balance_loss: float = knob(
        0.0, "Weight of the experts' load-balancing loss, 1 where the load is even (Switch Transformer uses 0.01).", at_least=0
    )
    router_z_loss: float = knob(0.0, "Weight of the router's squared log-normaliser (ST-MoE uses 0.001).", at_least=0)
    loss_chunk: int = knob(0, "Positions whose logits are held at once in training; 0: chosen from the shapes.", at_least=0)


@dataclass(frozen=True)
class OptimizerConfig:
    """Gradients to updates."""

    name: str = knob("adamw", "Update rule.", choices=("adamw", "lion", "adafactor", "sgd", "muon", "schedule_free_adamw"))
    learning_rate: float = knob(1e-3, "Peak learning rate.", at_least=0)
    schedule: str = knob(
        "cosine", "Learning rate after the warm-up.", choices=("constant", "cosine", "linear", "wsd", "inverse_sqrt")
    )
    warmup_steps: int = duration("steps", "Linear rise from 0")
    warmup_tokens: int = duration("tokens", "Linear rise from 0")
    warmup_epochs: float = duration("epochs", "Linear rise from 0")
    decay_steps: int = duration(
        "steps",
        "cosine, linear: steps from 0 at which the floor is reached (not given: the run's end); wsd: length of the final fall",
    )
    decay_tokens: int = duration("tokens", "The same")
    decay_epochs: float = duration("epochs", "The same")
    final_fraction: float = knob(0.1, "The schedule's floor as a share of learning_rate.", at_least=0, at_most=1)
    beta1: float = knob(0.9, "Decay of the first moment; sgd: momentum.", at_least=0, below=1)
    beta2: float = knob(0.95, "Decay of the second moment.", at_least=0, below=1)
    epsilon: float = knob(1e-8, "Added to the second moment's root.", above=0)
    weight_decay: float = knob(0.1, "Decoupled weight decay.", at_least=0)
    no_decay: tuple[str, ...] = knob(
        ("norm", "bias", "embed"), "Regular expressions; a parameter whose path one of them matches has no weight decay."
    )
    muon_adam_learning_rate: float = knob(
        3e-4, "muon: learning rate of embeddings, head, norms and biases, which take AdamW.", at_least=0
    )
    clip_norm: float = knob(1.0, "Gradients are scaled to at most this global norm; 0: never.", at_least=0)
    ema_decay: float = knob(0.0, "Decay of a moving average of parameters, used for evaluation; 0: none.", at_least=0, below=1)


@dataclass(frozen=True)
class TrainConfig:
    """The run."""

    duration_steps: int = duration("steps", "Length of the run")
    duration_tokens: int = duration("tokens", "Length of the run")
    duration_epochs: float = duration("epochs", "Length of the run")
    seed: int = knob(0, "Initial parameters, data order and dropout are functions of it.", at_least=0, at_most=2**31 - 1)
    accumulation_steps: int = knob(1, "Micro-batches that a batch is split into.", at_least=1)
    max_nonfinite_steps: int = knob(
        10, "Steps in a row with a non-finite gradient that end the run.", at_least=1, shapes_run=False
    )


@dataclass(frozen=True)
class CheckpointConfig:
    """What is kept of the run while it runs."""

    every_steps: int = duration("steps", "Interval between checkpoints (none of the three: only at the end)", shapes_run=False)
    every_tokens: int = duration("tokens", "Interval between checkpoints", shapes_run=False)
    every_epochs: float = duration("epochs", "Interval between checkpoints", shapes_run=False)
    keep_last: int = knob(2, "Latest checkpoints kept.", at_least=1, shapes_run=False)
    keep_every_steps: int = knob(
        0, "Checkpoints at multiples of this many steps are kept for good; 0: none.", at_least=0, shapes_run=False
    )
    max_failures: int = knob(3, "Failed saves in a row that end the run.", at_least=1, shapes_run=False)
    asynchronous: bool = knob(True, "Write while training goes on.", shapes_run=False)


@dataclass(frozen=True)
class MetricsConfig:
    """What the run says."""

    every_steps: int = duration("steps", "Interval between rows of metrics.jsonl (none of the three: 10 steps)", shapes_run=False)
    every_tokens: int = duration("tokens", "Interval between rows of metrics.jsonl", shapes_run=False)
    every_epochs: float = duration("epochs", "Interval between rows of metrics.jsonl", shapes_run=False)
    tensorboard: bool = knob(False, "Also write TensorBoard event files (extra: tensorboard).", shapes_run=False)
    wandb: bool = knob(False, "Also write an offline Weights & Biases run (extra: wandb).", shapes_run=False)
    peak_tflops: float = knob(
        0.0, "Peak TFLOP/s of one device, for the MFU; 0: looked up by the device's name.", at_least=0, shapes_run=False
    )


@dataclass(frozen=True)
class EvaluateConfig:
    """Evaluation during training and by `gptjax evaluate`."""

    every_steps: int = duration("steps", "Interval between evaluations (none of the three: only at the end)", shapes_run=False)
    every_tokens: int = duration("tokens", "Interval between evaluations", shapes_run=False)
    every_epochs: float = duration("epochs", "Interval between evaluations", shapes_run=False)
    batch_size: int = knob(
        0, "Rows evaluated at once; 0: data.batch_size / train.accumulation_steps.", at_least=0, shapes_run=False
    )
    max_batches: int = knob(
        0,
        "Batches of the evaluation inside the run; 0: the whole split. The last one is always whole.",
        at_least=0,
        shapes_run=False,
    )
    sample_prompt: str = knob("", "Prompt of the sample at each evaluation.", shapes_run=False)
    sample_tokens: int = knob(0, "Length of the sample at each evaluation; 0: no sample.", at_least=0, shapes_run=False)
    sample_temperature: float = knob(0.8, "Temperature of that sample.", at_least=0, shapes_run=False)
    sample_top_k: int = knob(0, "Top-k of that sample; 0: off.", at_least=0, shapes_run=False)


@dataclass(frozen=True)
class MeshConfig:
    """How devices are arranged."""

    data: int = knob(-1, "Parts of the batch; -1, for one of the axes: what the others leave.", at_least=-1, shapes_run=False)
    fsdp: int = knob(1, "Parts of the batch that also share out parameters and optimizer state.", at_least=-1, shapes_run=False)
    tensor: int = knob(1, "Parts of heads, MLP and vocabulary.", at_least=-1, shapes_run=False)
    context: int = knob(1, "Parts of the sequence.", at_least=-1, shapes_run=False)
    expert: int = knob(1, "Parts of the experts, and of the batch.", at_least=-1, shapes_run=False)
    stage: int = knob(1, "Parts of the layers, as a pipeline.", at_least=-1, shapes_run=False)
    micro_batches: int = knob(
        0,
        "stage above 1: parts of a batch that go through the pipeline one behind the other; 0: as many as stages.",
        at_least=0,
        shapes_run=False,
    )
    rules: tuple[str, ...] = knob(
        (), "Logical names laid over other mesh axes than gptjax/parallel/sharding.py says: NAME=AXIS+AXIS.", shapes_run=False
    )


@dataclass(frozen=True)
class Config:
    """A whole run. Checks that join several knobs are in `check`."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    objective: ObjectiveConfig = ObjectiveConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    train: TrainConfig = TrainConfig()
    checkpoint: CheckpointConfig = CheckpointConfig()
    metrics: MetricsConfig = MetricsConfig()
    evaluate: EvaluateConfig = EvaluateConfig()
    mesh: MeshConfig = MeshConfig()
    init_from: str = knob(
        "", "A run's folder or a Hugging Face folder whose parameters the run starts from; empty: from scratch."
    )

    @property
    def tokens_per_step(self) -> int:
        """Predicted positions in one step, padding included."""
        return self.data.batch_size * self.data.seq_len

    def duration(self, group: str, name: str, steps_per_epoch: float, default: int = 0) -> int:
        """Steps of `{group}.{name}_steps|_tokens|_epochs`; `default` where none is given.

        Tokens and epochs round up to a whole step.
        """
        section = getattr(self, group)
        steps = getattr(section, f"{name}_steps")
        tokens = getattr(section, f"{name}_tokens")
        epochs = getattr(section, f"{name}_epochs")
        if steps:
            return steps
        if tokens:
            return math.ceil(tokens / self.tokens_per_step)
        return math.ceil(epochs * steps_per_epoch) if epochs else default

    def with_vocab_size(self, tokenizer_vocab_size: int) -> Config:
        """The config with the embedding's rows settled. Raises `UserError` where the tokenizer has more ids than the model."""
        rows = self.model.vocab_size or tokenizer_vocab_size
        if rows < tokenizer_vocab_size:
            raise UserError(
                f"model.vocab_size={rows} is smaller than the tokenizer's {tokenizer_vocab_size} ids; set it to 0 or to that."
            )
        return dataclasses.replace(self, model=dataclasses.replace(self.model, vocab_size=rows))


# --- the door: ConfigDict to dataclasses --------------------------------------------------------------------------------


def defaults() -> ml_collections.ConfigDict:
    """All knobs at their defaults, for a recipe to edit. It is locked: a misspelt name raises."""
    return ml_collections.ConfigDict(to_dict(Config())).lock()


def to_dict(config: Any) -> dict[str, Any]:
    """Nested plain dicts of a (part of a) config, in the order of declaration."""
    return {
        field.name: to_dict(value) if dataclasses.is_dataclass(value := getattr(config, field.name)) else value
        for field in dataclasses.fields(config)
    }


def to_json(config: Config) -> str:
    return json.dumps(to_dict(config), indent=2, ensure_ascii=False) + "\n"


def from_json(path: pathlib.Path) -> Config:
    """Reads a `config.json` that a run wrote."""
    try:
        return from_dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        raise UserError(f"{path} does not exist.") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}.") from None


def flatten(config: Config) -> dict[str, Any]:
    """{"model.num_layers": 4, ...}"""
    return {key: value for key, value, _ in walk(config)}


def walk(config: Any, prefix: str = "") -> Iterator[tuple[str, Any, dataclasses.Field]]:
    """(dotted key, value, field) of every knob, in the order of declaration."""
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from walk(value, f"{prefix}{field.name}.")
        else:
            yield f"{prefix}{field.name}", value, field


def from_dict(values: Mapping[str, Any] | ml_collections.ConfigDict) -> Config:
    """Strict keys, strict types, bounds and cross-field checks; sizes given as 0 are filled in."""
    config = _build(Config, values, "")
    config = _derive(config)
    _check(config)
    return config


def _build(cls: type, values: Any, prefix: str) -> Any:
    if not isinstance(values, (Mapping, ml_collections.ConfigDict)):
        raise UserError(f"{prefix.rstrip('.') or 'the config'} is {values!r}, but it must be a group of keys.")
    types = typing.get_type_hints(cls)
    fields = {field.name: field for field in dataclasses.fields(cls)}
    for key in values:
        if key not in fields:
            raise unknown_key(f"{prefix}{key}")
    arguments = {}
    for name, field in fields.items():
        if name not in values:
            continue
        value = values[name]
        if dataclasses.is_dataclass(types[name]):
            arguments[name] = _build(types[name], value, f"{prefix}{name}.")
        else:
            arguments[name] = _typed(f"{prefix}{name}", value, types[name], field)
    return cls(**arguments)


TYPE_NAMES = {int: "a whole number", float: "a number", bool: "True or False", str: "a text", tuple[str, ...]: "a list of texts"}


def _typed(key: str, value: Any, expected: Any, field: dataclasses.Field) -> Any:
    """`value` as exactly the declared type and within its bounds."""
    mismatch = UserError(f"{key}={reprlib.repr(value)} must be {TYPE_NAMES[expected]}.")
    if expected == tuple[str, ...]:
        if not isinstance(value, (tuple, list)) or not all(isinstance(item, str) for item in value):
            raise mismatch
        return tuple(value)
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            value = float(value)
        except OverflowError:
            raise mismatch from None
    if type(value) is not expected:
        raise mismatch
    if expected is float and not math.isfinite(value):
        raise UserError(f"{key}={value!r} must be a finite number.")
    choices, bounds = field.metadata["choices"], field.metadata["bounds"]
    if choices and value not in choices:
        near = difflib.get_close_matches(str(value), choices, n=1)
        hint = f"; did you mean {near[0]}?" if near else "."
        raise UserError(f"{key}={value!r} must be one of {', '.join(choices)}{hint}")
    tests = {
        "at_least": (lambda x, y: x >= y, "at least"),
        "above": (lambda x, y: x > y, "above"),
        "at_most": (lambda x, y: x <= y, "at most"),
        "below": (lambda x, y: x < y, "below"),
    }
    for name, bound in bounds.items():
        holds, words = tests[name]
        if not holds(value, bound):
            raise UserError(f"{key}={value!r} must be {words} {bound}.")
    return value


def unknown_key(key: str) -> UserError:
    """The error for a dotted key that the schema lacks, with the nearest that it has."""
    known = list(flatten(Config())) + [field.name for field in dataclasses.fields(Config)]
    leaf = key.rsplit(".", 1)[-1]
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.75)
    near = near or [name for name in known if name.rsplit(".", 1)[-1] == leaf][:1]
    near = near or difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    return UserError(f"unknown config key {key}{f'; did you mean {near[0]}?' if near else '.'}")


def _derive(config: Config) -> Config:
    """Sizes given as 0 become the sizes they stand for."""
    model = config.model
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
    return dataclasses.replace(config, model=model)


def underived(config: Config) -> Config:
    """The config with sizes that follow from others set back to 0, so that they follow again when those are overridden."""
    model = config.model
    own = {"num_kv_heads": model.num_heads, "head_dim": model.model_dim // model.num_heads, "mlp_dim": 4 * model.model_dim}
    own["expert_mlp_dim"] = model.mlp_dim
    follow: dict[str, Any] = {name: 0 for name, size in own.items() if getattr(model, name) == size}
    return dataclasses.replace(config, model=dataclasses.replace(model, **follow))


def _check(config: Config) -> None:
    """Checks that join several knobs, none of which needs the data."""
    model, data = config.model, config.data
    if model.num_heads % model.num_kv_heads:
        raise UserError(f"model.num_kv_heads={model.num_kv_heads} does not divide model.num_heads={model.num_heads}.")
    _check_rotary(model)
    if data.seq_len > model.max_seq_len:
        raise UserError(
            f"data.seq_len={data.seq_len} is longer than model.max_seq_len={model.max_seq_len}, the positions that the model has."
        )
    if data.batch_size % config.train.accumulation_steps:
        raise UserError(
            f"train.accumulation_steps={config.train.accumulation_steps} does not divide data.batch_size={data.batch_size}."
        )
    if model.attention != "auto" and (refusal := attention_refusal(model, model.attention, data.seq_len)):
        raise UserError(refusal)
    _check_experts(config)
    _check_mesh(config.mesh)
    _check_durations(config)
    _check_source(data)


def _check_rotary(model: ModelConfig) -> None:
    if model.position != "rotary":
        if model.rope_scaling != "none":
            raise UserError(f"model.rope_scaling={model.rope_scaling} needs model.position=rotary, not {model.position}.")
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


def _check_mesh(mesh: MeshConfig) -> None:
    sizes = {f"mesh.{name}": size for name, size in to_dict(mesh).items() if name not in ("rules", "micro_batches")}
    for key, size in sizes.items():
        if size == 0:
            raise UserError(f"{key}=0 must be -1 (what the other axes leave) or at least 1.")
    rest = [f"{key}=-1" for key, size in sizes.items() if size == -1]
    if len(rest) > 1:
        raise UserError(f"{' and '.join(rest)}: only one axis may take what the others leave; give the others a size.")


def _check_durations(config: Config) -> None:
    values = flatten(config)
    for key in values:
        if not key.endswith(("_steps", "_tokens", "_epochs")):
            continue
        stem = key.rsplit("_", 1)[0]
        family = [f"{stem}_{unit}" for unit in ("steps", "tokens", "epochs") if f"{stem}_{unit}" in values]
        given = [f"{name}={values[name]}" for name in family if values[name]]
        if len(family) == 3 and len(given) > 1:
            raise UserError(f"{' and '.join(given)} are both given; keep one and set the other to 0.")
    train = config.train
    if not (train.duration_steps or train.duration_tokens or train.duration_epochs):
        raise UserError("the run has no length: set train.duration_steps, train.duration_tokens or train.duration_epochs.")
    optimizer = config.optimizer
    if optimizer.name == "schedule_free_adamw" and not optimizer.beta1:
        raise UserError("optimizer.beta1=0 leaves nothing to average; optimizer.name=schedule_free_adamw needs it above 0.")
    if optimizer.schedule == "wsd" and not (optimizer.decay_steps or optimizer.decay_tokens or optimizer.decay_epochs):
        raise UserError(
            "optimizer.schedule=wsd needs the length of its final fall: set optimizer.decay_steps, decay_tokens or decay_epochs."
        )


def _check_source(data: DataConfig) -> None:
    if data.source in ("text", "jsonl") and not data.path:
        raise UserError(f"data.source={data.source} needs data.path, a file or a glob.")
    if data.source == "tfds" and not data.name:
        raise UserError("data.source=tfds needs data.name, the data set's name.")
    if data.tokenizer in ("gpt2", "huggingface") and not data.tokenizer_path:
        what = "the folder of encoder.json and vocab.bpe" if data.tokenizer == "gpt2" else "a tokenizer.json"
        raise UserError(f"data.tokenizer={data.tokenizer} needs data.tokenizer_path, {what}.")


def differences(a: Config, b: Config, shaping_only: bool = False) -> dict[str, tuple[Any, Any]]:
    """{key: (value in a, value in b)} where the two differ; `shaping_only` leaves out knobs that a resumed run may change."""
    other = flatten(b)
    return {
        key: (value, other[key])
        for key, value, field in walk(a)
        if value != other[key] and (field.metadata["shapes_run"] or not shaping_only)
    }
