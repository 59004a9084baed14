"""Knobs of parameter-efficient fine-tuning: what is trained beside a frozen decoder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptjax.config.knobs import UserError, knob
from gptjax.config.objective import sees_prompt_both_ways
from gptjax.config.task import tasks_of

if TYPE_CHECKING:
    from gptjax.config.schema import Config

# Kernels that a method adapts where adapter.targets is empty: those of the papers.
DEFAULT_TARGETS: dict[str, tuple[str, ...]] = {
    "lora": ("attention/(query|value)/",),
    "dora": ("attention/(query|value)/",),
    "ia3": ("attention/(key|value)/", "mlp/down/"),
}

LOW_RANK = ("lora", "dora")
# Methods that put places of their own ahead of each row's tokens.
LEADING = ("prompt", "prefix")


@dataclass(frozen=True)
class AdapterConfig:
    """Parameters beside a frozen decoder."""

    method: str = knob(
        "none",
        "none: all parameters are trained; lora: low-rank updates of kernels (Hu et al., 2021); dora: these with a magnitude of "
        "each output beside (Liu et al., 2024); ia3: factors of keys, values and the MLP's inner activations (Liu et al., 2022); "
        "prompt: vectors ahead of each row (Lester et al., 2021); prefix: keys and values ahead of each row, in each layer (Li "
        "and Liang, 2021); bitfit: the decoder's own biases (Ben Zaken et al., 2021).",
        choices=("none", *LOW_RANK, "ia3", *LEADING, "bitfit"),
    )
    targets: tuple[str, ...] = knob(
        (),
        "lora, dora, ia3: regular expressions; a kernel of the layers whose path one of them is found in is adapted, such as "
        "attention/query/ or mlp/. Empty: as in the papers, queries and values; ia3: keys, values and mlp/down.",
    )
    rank: int = knob(8, "lora, dora: rank of an update.", at_least=1)
    alpha: float = knob(16.0, "lora, dora: an update is multiplied by alpha / rank.", above=0)
    rank_stabilised: bool = knob(False, "lora, dora: by alpha / sqrt(rank) in its place (rsLoRA, Kalajdzievski, 2023).")
    dropout: float = knob(
        0.0,
        "lora, dora: share of the inputs of an update that a training step leaves out, while the frozen kernel sees all (PEFT's "
        "lora_dropout); one mask for all that share a first factor.",
        at_least=0,
        below=1,
    )
    shared_input: bool = knob(
        False,
        "lora, dora: queries, keys and values share the first factor of their updates, as they do in PEFT where a model has the "
        "three in one matrix: GPT-2 and GPT-NeoX.",
    )
    prompt_length: int = knob(16, "prompt, prefix: places ahead of each row.", at_least=1)
    base: str = knob(
        "as_it_is",
        "int8: the layers' frozen kernels are stored as int8 with a scale for each output channel, and multiplied in model.dtype "
        "(in the manner of QLoRA, Dettmers et al., 2023).",
        choices=("as_it_is", "int8"),
    )

    @property
    def scale(self) -> float:
        """What the product of a low-rank update's factors is multiplied by."""
        return self.alpha / (self.rank**0.5 if self.rank_stabilised else self.rank)

    @property
    def patterns(self) -> tuple[str, ...]:
        """Regular expressions of the kernels that are adapted."""
        return self.targets or DEFAULT_TARGETS.get(self.method, ())

    @property
    def leading(self) -> int:
        """Places ahead of each row's tokens."""
        return self.prompt_length if self.method in LEADING else 0

    def trains(self, name: str) -> bool:
        """Whether the method leaves the parameter at 'layers/mlp/up/kernel' to be trained."""
        if self.method == "none" or name.startswith(("adapters/", "task_heads/")):
            return True
        return self.method == "bitfit" and name.rsplit("/", 1)[-1] == "bias"


def context_of(config: Config) -> int:
    """Tokens that a text may have: the model's positions but those that an adapter puts ahead of it."""
    return config.model.max_seq_len - config.adapter.leading


def describe_context(config: Config) -> str:
    """The limit as a refusal names it: 'model.max_seq_len=64'."""
    limit = f"model.max_seq_len={config.model.max_seq_len}"
    places = config.adapter.leading
    return limit if not places else f"{limit} less the {places} places that adapter.method={config.adapter.method} puts ahead"


def writing_refusal(config: Config, both_ways: bool) -> str:
    """Why texts are not written with the adapter, as part of a sentence; "" where they are. `both_ways`: tokens of a prompt see
    each other both ways."""
    if config.adapter.method != "prompt" or not both_ways:
        return ""
    return "places of adapter.method=prompt see a prompt whose tokens all see each other, and are computed without it in writing"


def check(config: Config) -> None:
    """Raises `UserError` for adapters that don't go with the other knobs."""
    adapter, model = config.adapter, config.model
    method = f"adapter.method={adapter.method}"
    if adapter.base == "int8" and adapter.method == "none":
        raise UserError(f"adapter.base=int8 freezes the decoder's kernels, but {method} has nothing to train in their place.")
    if adapter.targets and adapter.method not in DEFAULT_TARGETS:
        raise UserError(f"adapter.targets is for {', '.join(DEFAULT_TARGETS)}, not for {method}; leave it empty.")
    if adapter.dropout and adapter.method not in LOW_RANK:
        raise UserError(f"adapter.dropout={adapter.dropout} is for {' and '.join(LOW_RANK)}, not for {method}; set it to 0.")
    if adapter.dropout and config.mesh.stage != 1:
        raise UserError(
            f"adapter.dropout={adapter.dropout} draws masks by row of the batch, which mesh.stage={config.mesh.stage} cuts up; "
            "set one of them back."
        )
    for pattern in adapter.targets:
        try:
            re.compile(pattern)
        except re.error as error:
            raise UserError(f"adapter.targets: {pattern!r} is not a regular expression: {error}.") from None
    if adapter.method == "none":
        return
    if model.parameterization == "mup" and adapter.method != "bitfit":
        raise UserError(f"model.parameterization=mup has no rule for the learning rate of {method}; only bitfit goes with it.")
    if model.quantization != "none" and (adapter.method in DEFAULT_TARGETS or adapter.base == "int8"):
        raise UserError(
            f"model.quantization={model.quantization} rounds the layers' kernels for each product, which {method} with "
            f"adapter.base={adapter.base} puts something else in the place of; set it to none."
        )
    if config.optimizer.ema_decay and adapter.base == "int8":
        raise UserError(
            f"optimizer.ema_decay={config.optimizer.ema_decay} keeps an average of all parameters in float32, which "
            "adapter.base=int8 would no longer be; set one of them back."
        )
    if adapter.leading:
        _check_leading(config, method)


def _check_leading(config: Config, method: str) -> None:
    adapter, model, data = config.adapter, config.model, config.data
    length = f"adapter.prompt_length={adapter.prompt_length}"
    if data.packing == "packed":
        raise UserError(
            f"{method} puts its places ahead of a row, but data.packing=packed puts several documents into one, which would not "
            "see them; set data.packing=padded or windows."
        )
    if data.seq_len + adapter.prompt_length > model.max_seq_len:
        raise UserError(
            f"{length} and data.seq_len={data.seq_len} are more than model.max_seq_len={model.max_seq_len}, the positions that "
            "the model has."
        )
    if refusal := writing_refusal(config, sees_prompt_both_ways(config.objective)):
        if config.evaluate.sample_tokens:
            raise UserError(
                f"evaluate.sample_tokens={config.evaluate.sample_tokens} writes a sample, but {refusal}; set it to 0."
            )
        if writing := [name for name, task in tasks_of(config).items() if task.generate_records]:
            raise UserError(f"the task {writing[0]} has answers written (task.generate_records), but {refusal}; set it to 0.")
    if config.mesh.context != 1:
        raise UserError(f"{method} lengthens rows by {length}, which mesh.context={config.mesh.context} cannot share out; use 1.")
    if adapter.method != "prefix":
        return
    if model.attention_kind == "latent":
        raise UserError(f"{method} gives each layer keys and values, which model.attention_kind=latent makes of something else.")
    if model.num_experts:
        raise UserError(f"{method} has places without tokens, but model.num_experts={model.num_experts} would route them.")
