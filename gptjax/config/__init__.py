"""Every knob of a run: declared once, with its default, its meaning and its check.

One file a group: its frozen dataclass and what its knobs refuse. A recipe (`configs/*.py`) returns the `ConfigDict` that
`defaults()` makes, edited; command-line overrides are laid over it (recipes.py); then `from_dict` turns it into dataclasses,
once (door.py). Past that door there is no ConfigDict. The dataclasses are hashable, so a compiled function can be cached by
its config.

Everything a person can get wrong here raises `UserError` with one sentence that names the key.
"""

from gptjax.config.backends import ATTENTION_CAPABILITIES, DISTANCE_POSITIONS, PRODUCT_SCORES, attention_refusal
from gptjax.config.data import DataConfig
from gptjax.config.door import (
    defaults,
    differences,
    flatten,
    from_dict,
    from_json,
    to_dict,
    to_json,
    underived,
    unknown_key,
    walk,
)
from gptjax.config.knobs import TYPE_NAMES, UserError, duration, knob, parsed
from gptjax.config.mixture import mixture_sources, mixture_weights
from gptjax.config.model import ModelConfig
from gptjax.config.objective import ObjectiveConfig
from gptjax.config.optimizer import OptimizerConfig
from gptjax.config.patterns import check_stages, layer_configs
from gptjax.config.run import CheckpointConfig, EvaluateConfig, MeshConfig, MetricsConfig, TrainConfig
from gptjax.config.schema import Config
from gptjax.config.stages import Stage, Stages
from gptjax.config.task import HEADED, TaskConfig, task_weights, tasks_of, tasks_refusal, with_tasks

__all__ = [
    "TYPE_NAMES",
    "defaults",
    "differences",
    "flatten",
    "from_dict",
    "from_json",
    "mixture_sources",
    "mixture_weights",
    "to_dict",
    "to_json",
    "underived",
    "unknown_key",
    "walk",
    "UserError",
    "duration",
    "knob",
    "parsed",
    "ATTENTION_CAPABILITIES",
    "DISTANCE_POSITIONS",
    "PRODUCT_SCORES",
    "attention_refusal",
    "check_stages",
    "layer_configs",
    "ModelConfig",
    "DataConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "CheckpointConfig",
    "EvaluateConfig",
    "MeshConfig",
    "MetricsConfig",
    "TrainConfig",
    "Config",
    "Stage",
    "Stages",
    "HEADED",
    "TaskConfig",
    "task_weights",
    "tasks_of",
    "tasks_refusal",
    "with_tasks",
]
