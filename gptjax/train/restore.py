"""Trained parameters from outside the run: another run's folder, or a Hugging Face folder."""

from __future__ import annotations

import dataclasses
import functools
import pathlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jax.sharding import Mesh

from gptjax import config as config_lib
from gptjax.adapters.merge import for_writing, merged
from gptjax.config import AdapterConfig, Config, ModelConfig, UserError, tasks_of
from gptjax.data.reserved import text_tokenizer
from gptjax.data.tokenizers import Tokenizer, load_tokenizer, tokenizer_of_folder
from gptjax.generate import weights
from gptjax.interop import huggingface, task_heads
from gptjax.model.parameterization import output_multiplier, query_multiplier, standard
from gptjax.parallel.mesh import make_mesh
from gptjax.parallel.sharding import laid_over
from gptjax.tasks.losses import HEADS
from gptjax.train.checkpoints import Checkpoints
from gptjax.train.optimizers import Lengths, evaluation_params
from gptjax.train.run import named_leaves
from gptjax.train.state import TrainState
from gptjax.train.step import abstract_state, decoder_params, init_params, with_adapters

# A schedule's lengths don't change the shape of any state.
ANY_LENGTHS = Lengths(total=1, warmup=0, decay=1)


@dataclass(frozen=True)
class TrainedParams:
    """The parameters of a run, without its tokenizer."""

    config: Config
    params: Any  # those to evaluate with: the average where the run keeps one; adapters are merged where they can be
    step: int
    metadata: dict[str, Any]  # what was saved with the checkpoint


@dataclass(frozen=True)
class TrainedModel:
    """What evaluation and generation need of a run."""

    config: Config
    params: Any  # those to evaluate with: the average where the run keeps one
    tokenizer: Tokenizer
    step: int
    eos_ids: tuple[int, ...] | None = None  # that end a text, where they are not the tokenizer's alone

    @functools.cached_property
    def decoding_params(self) -> Any:
        """The parameters as generation reads them, made at the first use and kept: a copy of the model's size."""
        return weights.prepare(for_writing(self.config, self.params)[1], self.config.model)

    def stored_as(self, kind: str) -> TrainedModel:
        """The model for generation alone, its weights as `kind` ("float32", "bfloat16", "int8"; "": model.dtype) has them.

        Raises `UserError` as `weights.prepare` does.
        """
        return dataclasses.replace(
            self, params=weights.prepare(for_writing(self.config, self.params)[1], self.config.model, kind)
        )


def load_run(
    workdir: pathlib.Path, log: Callable[[str], None], step: int | None = None, config: Config | None = None
) -> TrainedModel:
    """The newest intact checkpoint of a run's folder, or that of `step`; `config`, where given, takes the place of the folder's.

    Nothing in the folder is changed, so a live run is not disturbed. Raises `UserError` where there is none.
    """
    found = load_params(workdir, log, step, config)
    tokenizer = _own_tokenizer(workdir, found.metadata)
    if tokenizer is None:
        raise UserError(f"there is no tokenizer in {workdir}, which has no folder of that name.")
    return TrainedModel(found.config, found.params, tokenizer, found.step)


def load_params(
    workdir: pathlib.Path,
    log: Callable[[str], None],
    step: int | None = None,
    config: Config | None = None,
    merges: bool = True,
) -> TrainedParams:
    """As `load_run`, of a folder that may have no tokenizer. Of the state, only what evaluation needs is read.

    Adapters are merged where they can be, unless `merges` is False.
    """
    if not (workdir / "config.json").is_file():
        raise UserError(f"{workdir} is not a run's folder: it has no config.json.")
    config = config or config_lib.from_json(workdir / "config.json")
    mesh = make_mesh(config.mesh)
    with Checkpoints(workdir / "checkpoints", config.checkpoint, log, read_only=True) as checkpoints:
        restored = checkpoints.restore(_needed(config, abstract_state(config, ANY_LENGTHS, mesh)), step, partial=True)
    if restored is None:
        raise UserError(f"{workdir} has no checkpoint yet.")
    params = evaluation_params(config, restored.state)
    if merges:
        config, params = merged(config, params)
    return TrainedParams(config, params, restored.step, restored.metadata)


def _needed(config: Config, state: TrainState) -> TrainState:
    """The part of a state that `evaluation_params` looks at; a converted model's checkpoint holds no more."""
    needed: dict[str, Any] = {"params": state.params}
    if state.ema_params is not None:
        needed = {"ema_params": state.ema_params}
    elif config.optimizer.name == "schedule_free_adamw":
        needed["opt_state"] = state.opt_state
    fields: dict[str, Any] = {field.name: needed.get(field.name) for field in dataclasses.fields(TrainState)}
    return TrainState(**fields)


def _own_tokenizer(workdir: pathlib.Path, metadata: Mapping[str, Any]) -> Tokenizer | None:
    """The run's tokenizer, None where it has none. Raises `UserError` where the checkpoint was made with another one; older
    checkpoints don't say.
    """
    if not (workdir / "tokenizer").is_dir():
        return None
    tokenizer = load_tokenizer(workdir / "tokenizer")
    _check_own_tokenizer(workdir, tokenizer, metadata)
    return tokenizer


def _check_own_tokenizer(workdir: pathlib.Path, tokenizer: Tokenizer, metadata: Mapping[str, Any]) -> None:
    trained_with = metadata.get("tokenizer")
    if trained_with not in (None, tokenizer.encoding_fingerprint):
        raise UserError(
            f"{workdir / 'tokenizer'} is not the tokenizer that the checkpoint was made with: its fingerprint begins with "
            f"{tokenizer.encoding_fingerprint[:12]}, the checkpoint's with {trained_with[:12]}."
        )


def initial_params(config: Config, mesh: Mesh, log: Callable[[str], None], tokenizer: Tokenizer | None = None) -> Any:
    """The parameters that `init_from` names, laid over the mesh; None where it is empty.

    Raises `UserError` where they don't fit, or were trained with another tokenizer than the run's.
    """
    if not config.init_from:
        return None
    folder = pathlib.Path(config.init_from)
    if not (folder / "config.json").is_file():
        raise UserError(f"init_from={folder} is neither a run's folder nor a Hugging Face folder: it has no config.json.")
    theirs: Tokenizer | None
    if (folder / "checkpoints").is_dir():
        found = load_params(folder, log)
        params, theirs, model = found.params, _own_tokenizer(folder, found.metadata), found.config.model
        if HEADS in params:
            params = params | {HEADS: _by_label(config, found.config, params[HEADS])}
    else:
        params, theirs, model = huggingface.load(folder)[1], tokenizer_of_folder(folder), standard(config.model)
        params |= _foreign_heads(config, folder)
    _check_multipliers(folder, model, config.model)
    if tokenizer is not None:
        _check_same_tokenizer(folder, theirs, tokenizer, log)
    plain = dataclasses.replace(config, adapter=AdapterConfig())
    wanted = abstract_state(plain, ANY_LENGTHS, mesh).params
    params, heads = decoder_params(params), params.get(HEADS)
    if theirs is not None and tokenizer is not None and theirs.vocab_size < tokenizer.vocab_size:
        params = _with_new_tokens(plain, params, decoder_params(wanted), log)
    _check_fit(folder, params, decoder_params(wanted))
    params = _with_heads(plain, params, heads, wanted, log)
    log(f"initial parameters from {folder}.")
    params = jax.tree.map(lambda leaf, like: jax.device_put(leaf.astype(like.dtype), like.sharding), params, wanted)
    return params if config == plain else _with_adapters(config, params, mesh)


def _with_adapters(config: Config, params: Any, mesh: Mesh) -> Any:
    """A decoder's parameters, frozen, and fresh adapters of the run's seed, laid over the mesh."""
    names = jax.eval_shape(lambda: init_params(dataclasses.replace(config, adapter=AdapterConfig()), jnp.uint32(0)))

    def attach(params: Any, seed: jax.Array) -> Any:
        boxed = jax.tree.map(lambda box, leaf: box.replace_boxed(leaf), names, params, is_leaf=_is_box)
        return nn.unbox(with_adapters(config, boxed, seed))

    shardings = jax.tree.map(lambda like: like.sharding, abstract_state(config, ANY_LENGTHS, mesh).params)
    with laid_over(mesh, config.mesh):
        return jax.jit(attach, out_shardings=shardings)(params, jnp.uint32(config.train.seed))


def _is_box(leaf: Any) -> bool:
    return isinstance(leaf, nn.LogicallyPartitioned)


def _check_same_tokenizer(folder: pathlib.Path, theirs: Tokenizer | None, ours: Tokenizer, log: Callable[[str], None]) -> None:
    """Raises `UserError` where the rows of the embedding would stand for other tokens than they were trained for."""
    if theirs is None:
        log(f"{folder} has no tokenizer: whether its model was trained with this run's cannot be told.")
        return
    if not (theirs.has_ids_of(ours) or theirs.has_ids_of(text_tokenizer(ours))):
        raise UserError(
            f"init_from={folder} was trained with another tokenizer ({theirs.kind}, {theirs.vocab_size} ids) than this run's "
            f"({ours.kind}, {ours.vocab_size} ids); set data.tokenizer and data.tokenizer_path to that one."
        )


def _check_multipliers(folder: pathlib.Path, theirs: ModelConfig, ours: ModelConfig) -> None:
    """Raises `UserError` where the same parameters would make another function in this run's parameterization."""
    for multiplier in (output_multiplier, query_multiplier):
        if multiplier(theirs) != multiplier(ours):
            names = ("parameterization", "mup_base_dim", "mup_base_head_dim")
            here, there = (", ".join(f"model.{name}={getattr(c, name)}" for name in names) for c in (ours, theirs))
            raise UserError(f"init_from={folder} was trained with {there}; with {here} its parameters compute something else.")


def _with_new_tokens(config: Config, params: Any, wanted: Any, log: Callable[[str], None]) -> Any:
    """The parameters with rows of `train.seed` for the tokens that the objective has and their model had not: where a table of a
    row a token has fewer rows than wanted.
    """
    fresh = decoder_params(nn.unbox(init_params(config, jnp.uint32(config.train.seed))))
    theirs, ours = named_leaves(params).keys(), named_leaves(wanted).keys()
    if theirs != ours:  # `_check_fit` says how
        return params
    rows = config.model.vocab_size

    def grown(theirs: Any, like: Any, new: Any) -> Any:
        short = [axis for axis, (a, b) in enumerate(zip(theirs.shape, like.shape, strict=False)) if a < b == rows]
        if theirs.ndim != like.ndim or len(short) != 1:
            return theirs
        (axis,) = short
        log(f"{rows - theirs.shape[axis]} tokens of objective.name={config.objective.name} are new: their rows are random.")
        rest = jax.lax.slice_in_dim(new, theirs.shape[axis], rows, axis=axis)
        return jnp.concatenate([jnp.asarray(theirs), rest.astype(theirs.dtype)], axis=axis)

    return jax.tree.map(grown, params, wanted, fresh)


def _with_heads(config: Config, params: Any, heads: Any, wanted: Any, log: Callable[[str], None]) -> Any:
    """The parameters with the heads of the run's tasks: those of the model where they fit, else of `train.seed`."""
    if HEADS not in wanted:
        if heads:
            log(f"the heads of {', '.join(heads)} are left behind: this run has no such task.")
        return params
    fresh = nn.unbox(init_params(config, jnp.uint32(config.train.seed)))[HEADS]
    for name, like in wanted[HEADS].items():
        shapes = jax.tree.map(lambda leaf: leaf.shape, (like, (heads or {}).get(name)))
        if shapes[0] == shapes[1]:
            fresh[name] = heads[name]
        log(f"the head of {name} is {'the one that was trained there' if shapes[0] == shapes[1] else 'new'}.")
    return params | {HEADS: fresh}


def _by_label(config: Config, theirs: Config, heads: Mapping[str, Any]) -> dict[str, Any]:
    """A run's heads, their outputs in the order of this run's labels; one of another kind or of other labels says something else,
    whatever its shape, and is left out. Heads of tasks that this run has not come along.
    """
    found = {}
    for name, head in heads.items():
        here, there = tasks_of(config).get(name), tasks_of(theirs)[name]
        if here is None or here.labels == there.labels and here.kind == there.kind:
            found[name] = head
        elif set(here.labels) == set(there.labels) and here.kind == there.kind:
            found[name] = _reordered(head, there.labels, here.labels)
    return found


def _reordered(head: Mapping[str, Any], theirs: Sequence[str], ours: Sequence[str]) -> dict[str, Any]:
    """A head's outputs in the order of our labels, which are the same ones."""
    order = np.array([theirs.index(label) for label in ours])
    return {part: array[..., order] for part, array in head.items()}


def _foreign_heads(config: Config, folder: pathlib.Path) -> dict[str, Any]:
    """A Hugging Face folder's head, as that of each of the run's tasks of its kind whose labels it has, in their order."""
    head = task_heads.head_of(folder)
    if head is None:
        return {}
    labels, heads = task_heads.labels_of(folder), {}
    for name, knobs in tasks_of(config).items():
        if knobs.kind not in head.kinds:
            continue
        if not labels or knobs.kind == "answers":
            heads[name] = head.params
        elif set(knobs.labels) == set(labels):
            heads[name] = _reordered(head.params, labels, knobs.labels)
    return {HEADS: heads} if heads else {}


def _check_fit(folder: pathlib.Path, params: Any, wanted: Any) -> None:
    """Raises `UserError` naming the first parameter that only one side has, or that has another shape."""
    here, there = named_leaves(wanted), named_leaves(params)
    for name in sorted(here.keys() | there.keys()):
        ours = here[name].shape if name in here else "absent"
        theirs = there[name].shape if name in there else "absent"
        if ours != theirs:
            raise UserError(f"init_from={folder}: {name} is {theirs} there and {ours} in this config's model.")
