"""Knobs of a run: its length, what it keeps and says, and the devices it runs on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import TYPE_CHECKING

from gptjax.config.knobs import UserError, duration, knob
from gptjax.config.model import attention_refusal

if TYPE_CHECKING:
    from gptjax.config.schema import Config


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

    batch_warmup_start: int = knob(
        0,
        "Rows of the first steps in a warm-up of the batch size, which double until they are data.batch_size, each size for as "
        "many steps; 0: none. The learning rate follows steps, not rows.",
        at_least=0,
    )
    batch_warmup_steps: int = duration("steps", "Length of the warm-up of batches")
    batch_warmup_tokens: int = duration("tokens", "Length of the warm-up of batches")
    batch_warmup_epochs: float = duration("epochs", "Length of the warm-up of batches")
    seq_len_warmup_start: int = knob(
        0,
        "Tokens of a row in the first steps of a warm-up of the sequence length (Li et al., 2022), which double until they are "
        "data.seq_len, each length for as many steps; 0: none. Rows are cut into more and shorter ones, so no token is lost.",
        at_least=0,
    )
    seq_len_warmup_steps: int = duration("steps", "Length of the warm-up of rows")
    seq_len_warmup_tokens: int = duration("tokens", "Length of the warm-up of rows")
    seq_len_warmup_epochs: float = duration("epochs", "Length of the warm-up of rows")

    spike_threshold: float = knob(
        0.0,
        "A step whose spike_metric is so many robust standard deviations (1.4826 times the median absolute deviation) above the "
        "median of the spike_window good steps before it belongs to a spike, from which the run goes back to a checkpoint before "
        "it and passes over the data that led there (PaLM, Chowdhery et al., 2022); 0: none does.",
        at_least=0,
    )
    spike_metric: str = knob("loss", "What is watched for spikes.", choices=("loss", "gradient_norm"))
    spike_window: int = knob(100, "Good steps that a step is compared with; before there are so many, none is.", at_least=2)
    spike_steps: int = knob(3, "Steps in a row that make a spike.", at_least=1)
    spike_checkpoint_steps: int = knob(100, "With spike_threshold: steps between the checkpoints to go back to.", at_least=1)
    spike_skip_steps: int = knob(
        0, "Batches passed over after those between the checkpoint and the spike's last step.", at_least=0
    )
    spike_max_rewinds: int = knob(3, "Spikes from which the run goes back; later ones are left alone.", at_least=1)


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
        "Batches of the evaluation inside the run, of each source of a mixture; 0: the whole split. "
        "The last evaluation is always whole.",
        at_least=0,
        shapes_run=False,
    )
    sample_prompt: str = knob("", "Prompt of the sample at each evaluation.", shapes_run=False)
    sample_tokens: int = knob(0, "Length of the sample at each evaluation; 0: no sample.", at_least=0, shapes_run=False)
    sample_temperature: float = knob(0.8, "Temperature of that sample.", at_least=0, shapes_run=False)
    sample_top_k: int = knob(0, "Top-k of that sample; 0: off.", at_least=0, shapes_run=False)
    show_examples: int = knob(2, "Records of each task that are shown at each evaluation.", at_least=0, shapes_run=False)


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


def check(config: Config) -> None:
    """Raises `UserError` for a run without an end, and for a mesh of which more than one axis, or none, is open."""
    train = config.train
    if not (train.duration_steps or train.duration_tokens or train.duration_epochs):
        raise UserError("the run has no length: set train.duration_steps, train.duration_tokens or train.duration_epochs.")
    _check_warmup(config, "batch", config.data.batch_size, "data.batch_size")
    _check_warmup(config, "seq_len", config.data.seq_len, "data.seq_len")
    _check_spikes(train)
    if train.seq_len_warmup_start and config.objective.name not in ("causal", "prefix"):
        raise UserError(
            f"train.seq_len_warmup_start={train.seq_len_warmup_start} cuts rows into pieces, in which what "
            f"objective.name={config.objective.name} puts into a row would be torn apart; set it to 0."
        )
    names = (field.name for field in dataclasses.fields(MeshConfig) if field.name not in ("rules", "micro_batches"))
    sizes = {f"mesh.{name}": getattr(config.mesh, name) for name in names}
    for key, size in sizes.items():
        if size == 0:
            raise UserError(f"{key}=0 must be -1 (what the other axes leave) or at least 1.")
    rest = [f"{key}=-1" for key, size in sizes.items() if size == -1]
    if len(rest) > 1:
        raise UserError(f"{' and '.join(rest)}: only one axis may take what the others leave; give the others a size.")


def _check_warmup(config: Config, name: str, full: int, full_key: str) -> None:
    train, model = config.train, config.model
    key, start = f"train.{name}_warmup_start", getattr(train, f"{name}_warmup_start")
    lengths = {f"train.{name}_warmup_{unit}": getattr(train, f"{name}_warmup_{unit}") for unit in ("steps", "tokens", "epochs")}
    given = [f"{length}={value}" for length, value in lengths.items() if value]
    if not start:
        if given:
            raise UserError(f"{given[0]} is the length of a warm-up that {key}=0 turns off; set one of them.")
        return
    if not given:
        raise UserError(f"{key}={start} needs the length of its warm-up: set {', '.join(lengths)}.")
    smaller = [full >> number for number in range(1, full.bit_length()) if not full % (1 << number)]
    if start not in smaller:
        raise UserError(
            f"{key}={start} cannot be doubled to {full_key}={full}; "
            + (f"make it {' or '.join(map(str, smaller))}." if smaller else f"make {full_key} even.")
        )
    if name == "batch" and start % train.accumulation_steps:
        raise UserError(f"train.accumulation_steps={train.accumulation_steps} does not divide {key}={start}.")
    if name == "seq_len" and model.attention != "auto" and (refusal := attention_refusal(model, model.attention, start)):
        raise UserError(f"{key}={start} makes rows so short: {refusal}")


def _check_spikes(train: TrainConfig) -> None:
    every = train.spike_checkpoint_steps
    if not train.spike_threshold:
        return
    if every > train.spike_window:
        raise UserError(
            f"train.spike_checkpoint_steps={every} is more than train.spike_window={train.spike_window}, so that the first spike "
            "could come before the first checkpoint to go back to."
        )
    if train.spike_steps > every:
        raise UserError(f"train.spike_steps={train.spike_steps} is more than train.spike_checkpoint_steps={every}.")
