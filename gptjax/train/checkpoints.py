"""What is kept of a run while it runs: Orbax writes the arrays; around it, what Orbax does not do.

    checkpoints/00000100/metadata.json   step, shape and dtype of every leaf, what the caller gave (config, data position)
    checkpoints/00000100/arrays/         Orbax: one flat mapping from a leaf's path, "params/blocks/mlp/kernel", to its array
    checkpoints/00000100/manifest.json   size and sha256 of every file, written last: without it the checkpoint does not exist

A save is finished, hashed and, on the same background thread, followed by the removal of what `CheckpointConfig` no longer
keeps. A kill at any moment leaves the older checkpoints as they were.

On several hosts every process calls `save` and `restore` with the same steps and sees the same folder. Orbax has all of them
finish before process 0 returns from its part; process 0 alone writes metadata and manifest, verifies, and removes. A save that
fails on one host alone holds the others at Orbax's barrier until it times out there.
"""

from __future__ import annotations

import dataclasses
import errno
import json
import pathlib
import re
import shutil
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import jax
import numpy as np
from orbax.checkpoint import v1 as ocp

from gptjax.config import CheckpointConfig, UserError
from gptjax.train import manifest, run


class CheckpointError(RuntimeError):
    """A checkpoint that cannot be written or read, through no mistake in the config."""


class CheckpointsFailing(CheckpointError):
    """`checkpoint.max_failures` saves in a row have failed."""


class CheckpointsDamaged(CheckpointError):
    """There are checkpoints, and not one of them is intact."""


@dataclass(frozen=True)
class Restored:
    """A checkpoint: `state` has the structure, dtypes and shardings that were asked for; `metadata` was saved with it."""

    step: int
    state: Any
    metadata: dict[str, Any]


@dataclass
class _Save:
    step: int
    folder: pathlib.Path
    started: float
    thread: threading.Thread | None = None
    size: int = 0
    seconds: float = 0.0
    error: BaseException | None = None
    notes: list[str] = dataclasses.field(default_factory=list)
    held: Collection[int] = ()


_FOLDER = re.compile(r"\d{8,}")
_REPLACED, _DELETED = ".replaced", ".deleted"


class Checkpoints:
    """The checkpoints of one run. `log` is called on the calling thread only.

    `read_only` is for evaluation and sampling, perhaps beside a live run: nothing in the folder is changed. Otherwise the
    caller holds the run's lock, and what a killed save or removal left behind is cleaned up at once.
    """

    def __init__(self, directory: pathlib.Path, config: CheckpointConfig, log: Callable[[str], None], read_only: bool = False):
        self.directory = pathlib.Path(directory).absolute()
        self._config = config
        self._log = log
        self._read_only = read_only
        self._save: _Save | None = None
        self._failures = 0
        self._intact: set[int] = set()  # steps that this process saved or verified
        self._damaged: set[int] = set()  # steps that it found damaged
        if not read_only:
            self.directory.mkdir(parents=True, exist_ok=True)
            if _is_primary():
                self._clean_up()
        self._last_saved_step = max(self.steps(), default=None)

    def __enter__(self) -> Checkpoints:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    @property
    def last_saved_step(self) -> int | None:
        """Step of the newest complete checkpoint; None where there is none."""
        return self._last_saved_step

    def steps(self) -> list[int]:
        """Steps of the complete checkpoints, in ascending order; their bytes are not verified."""
        return [step for step, folder in self._folders() if manifest.exists(folder)]

    def metadata(self, step: int) -> dict[str, Any]:
        """What the caller gave with the checkpoint of `step`. Raises `CheckpointsDamaged` where it cannot be read."""
        path = self._folder(step) / "metadata.json"
        try:
            return dict(json.loads(path.read_text(encoding="utf-8"))["metadata"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointsDamaged(f"{path} cannot be read ({error}).") from None

    # --- save -----------------------------------------------------------------------------------------------------------------

    def save(self, step: int, state: Any, metadata: dict[str, Any], copied: bool = True, held: Collection[int] = ()) -> None:
        """Saves `state`, a pytree of jax arrays, and `metadata`, which JSON can hold.

        Waits for the save before it. When it returns the state's buffers may be donated: they have been copied to the host. A
        failure is reported, not raised, until `checkpoint.max_failures` in a row raise `CheckpointsFailing`. A step that this
        process saved or restored is not saved again. `copied=False` saves memory where the caller leaves the buffers alone until
        `wait` returns. Checkpoints of the steps in `held` are kept beside those that the config keeps.
        """
        if self._read_only:
            raise ValueError("these checkpoints were opened to be read.")
        self.wait()
        if step in self._intact:
            return
        leaves = run.named_leaves(state)
        for name, leaf in leaves.items():
            if not isinstance(leaf, jax.Array):
                raise TypeError(f"the state's {name} is a {type(leaf).__name__}, not a jax array.")
        about = {"step": step, "leaves": {name: _describe(leaf) for name, leaf in leaves.items()}, "metadata": metadata}
        save = self._save = _Save(step, self._folder(step), time.monotonic(), held=held)
        try:
            if _is_primary():
                self._prepare(save.folder, about)
            with _orbax():
                response = ocp.save_async(
                    save.folder / "arrays", {name: _own(leaf) if copied else leaf for name, leaf in leaves.items()}
                )
        except (OSError, ValueError, RuntimeError) as error:  # ValueError: tensorstore's, for every refusal of the disk
            self._abandon(save, error)
        else:
            save.thread = threading.Thread(target=self._finish, args=(save, response), name=f"checkpoint-{step}")
            save.thread.start()
        if not self._config.asynchronous or save.thread is None:
            self.wait()

    def poll(self) -> None:
        """Reports a save that has ended since the last call. Raises `CheckpointsFailing`."""
        if self._save is not None and (self._save.thread is None or not self._save.thread.is_alive()):
            self.wait()

    def wait(self) -> None:
        """Returns when nothing is being written, and reports as `poll` does."""
        save = self._save
        if save is None:
            return
        if save.thread is not None:
            save.thread.join()  # Ctrl-C may break in here; the save is then still known
        self._save = None
        for note in save.notes:
            self._log(note)
        if save.error is None:
            self._failures = 0
            self._last_saved_step = save.step
            self._log(f"checkpoint {save.step}: {save.size / 1e6:.1f} MB in {save.seconds:.2f} s.")
            return
        self._failures += 1
        kept = "there is no older one" if self._last_saved_step is None else f"checkpoint {self._last_saved_step} is kept"
        reason = _first_line(save.error)
        self._log(f"checkpoint {save.step} could not be saved ({self._failures} in a row): {reason}; {kept}.")
        if self._failures >= self._config.max_failures:
            raise CheckpointsFailing(
                f"{self._failures} checkpoints in a row could not be saved, the last one: {reason}; {kept}."
            ) from save.error

    def close(self) -> None:
        """Waits for what is being written."""
        self.wait()

    def _prepare(self, folder: pathlib.Path, about: dict[str, Any]) -> None:
        if folder.exists():  # damaged, or of another future of this run; put aside until the new one is complete
            folder.rename(folder.with_name(folder.name + _REPLACED))
        folder.mkdir()
        run.write_json(folder / "metadata.json", about)

    def _finish(self, save: _Save, response: ocp.AsyncResponse[None]) -> None:
        """On the background thread, which alone can tell of a failure now: Orbax would at the next save."""
        try:
            response.result()
            if _is_primary():
                save.size = manifest.write(save.folder)
        except BaseException as error:
            self._abandon(save, error)
            return
        save.seconds = time.monotonic() - save.started
        self._intact.add(save.step)
        self._damaged.discard(save.step)
        try:
            if _is_primary():
                self._retire(save)
        except OSError as error:
            save.notes.append(f"an old checkpoint could not be removed: {error}.")

    def _abandon(self, save: _Save, error: BaseException) -> None:
        save.error = error
        if not _is_primary():
            return
        replaced = save.folder.with_name(save.folder.name + _REPLACED)
        try:
            _remove(save.folder)
            if replaced.exists():
                replaced.rename(save.folder)
        except OSError as trouble:
            save.notes.append(f"{save.folder}, which is incomplete, could not be removed: {trouble}.")

    # --- keep -----------------------------------------------------------------------------------------------------------------

    def _retire(self, save: _Save) -> None:
        """Removes what is no longer kept, now that the checkpoint of `save` is complete.

        A place among the `keep_last` is only given to a checkpoint known to be intact, so that a damaged one never pushes out a
        good one. Later steps are left alone: they are damaged, or the run went back to an older checkpoint, and they are
        replaced when it comes to them.
        """
        _remove(save.folder.with_name(save.folder.name + _REPLACED))
        kept = 0
        every = self._config.keep_every_steps
        for step in reversed([step for step in self.steps() if step <= save.step]):
            if kept < self._config.keep_last and self._verify(step, save.notes.append):
                kept += 1
            elif not (every and step % every == 0) and step not in save.held:
                self._delete(step)

    def go_back(self, step: int) -> None:
        """Removes the checkpoints of later steps, the latest first, and lets `step` be saved anew."""
        self.wait()
        if _is_primary():
            for later in reversed([saved for saved in self.steps() if saved > step]):
                self._delete(later)
        self._intact = {saved for saved in self._intact if saved < step}
        self._last_saved_step = step

    def _delete(self, step: int) -> None:
        folder = self._folder(step)
        doomed = folder.with_name(folder.name + _DELETED)
        folder.rename(doomed)  # in one moment, so that no half of a checkpoint is ever taken for one
        self._intact.discard(step)
        self._damaged.discard(step)
        _remove(doomed)

    def _clean_up(self) -> None:
        for path in sorted(self.directory.iterdir()):
            final = path.with_name(path.name.removesuffix(_REPLACED))
            if path.suffix == _REPLACED and manifest.exists(path) and not manifest.exists(final):
                _remove(final)
                path.rename(final)
                self._log(f"put back checkpoint {int(final.name)}, whose replacement was not finished.")
            elif path.suffix in (_REPLACED, _DELETED):
                _remove(path)
        for step, folder in self._folders():
            if not manifest.exists(folder):
                _remove(folder)
                self._log(f"removed checkpoint {step}, which was not finished.")

    # --- restore --------------------------------------------------------------------------------------------------------------

    def restore(self, abstract_state: Any, step: int | None = None, partial: bool = False) -> Restored | None:
        """The newest intact checkpoint, or that of `step`; None where there is none at all.

        `abstract_state` is a pytree of `jax.ShapeDtypeStruct` (or arrays), whose shardings the arrays get; without one, a
        single device's. With `partial` the checkpoint may hold more than is asked for, such as optimizer state beside
        `{"params": ...}`.

        Raises `UserError` where the checkpoint is not of this state's names, shapes and dtypes, or `step` is not there, and
        `CheckpointsDamaged` where no checkpoint is intact.
        """
        self.wait()
        chosen = _from_process_0(self._choose(step) if _is_primary() else 0)
        if chosen == _NONE:
            return None
        if chosen == _ABSENT:
            raise UserError(
                f"{self.directory} has no checkpoint of step {step}; it has {', '.join(map(str, self.steps())) or 'none'}."
            )
        if chosen == _DAMAGED:
            which = "no checkpoint" if step is None else f"checkpoint {step}"
            raise CheckpointsDamaged(
                f"{which} in {self.directory} is {'intact' if step is None else 'damaged'}; bring back a copy, "
                f"or remove the folder to start from the beginning."
            )
        self._intact.add(chosen)
        folder = self._folder(chosen)
        about = json.loads((folder / "metadata.json").read_text(encoding="utf-8"))
        wanted = {name: _with_sharding(leaf) for name, leaf in run.named_leaves(abstract_state).items()}
        _compare(f"checkpoint {chosen}", about["leaves"], wanted, partial)
        context = ocp.Context()
        context.pytree_options.loading.partial_load = partial
        with context:
            leaves = ocp.load(folder / "arrays", wanted)
        # Orbax casts to the dtype that is asked for, in silence.
        _compare(f"what was restored of checkpoint {chosen}", {name: _describe(leaf) for name, leaf in leaves.items()}, wanted)
        paths, structure = jax.tree_util.tree_flatten_with_path(abstract_state)
        names = [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
        # A typed key may come back with an equivalent sharding that is not equal, for which the step would be compiled anew.
        placed = [jax.device_put(leaves[name], wanted[name].sharding) for name in names]
        return Restored(chosen, jax.tree.unflatten(structure, placed), about["metadata"])

    def _choose(self, step: int | None) -> int:
        steps = self.steps()
        if step is not None and step not in steps:
            return _ABSENT
        for candidate in [step] if step is not None else reversed(steps):
            if self._verify(candidate, self._log):
                return candidate
        # A live run may have removed the older ones while a reader was verifying them.
        if step is None and self.steps() != steps:
            return self._choose(None)
        return _DAMAGED if steps else _NONE

    def _verify(self, step: int, tell: Callable[[str], None]) -> bool:
        if step in self._intact:
            return True
        fault = manifest.first_fault(self._folder(step))
        if not self._folder(step).exists():  # removed by a live run, beside which we read
            return False
        if fault is None:
            self._intact.add(step)
        elif step not in self._damaged:
            self._damaged.add(step)
            tell(f"checkpoint {step} is damaged and is not used: {self._folder(step)}: {fault}.")
        return fault is None

    def _folder(self, step: int) -> pathlib.Path:
        return self.directory / f"{step:08d}"

    def _folders(self) -> list[tuple[int, pathlib.Path]]:
        if not self.directory.is_dir():
            return []
        return sorted(
            (int(path.name), path) for path in self.directory.iterdir() if _FOLDER.fullmatch(path.name) and path.is_dir()
        )


_NONE, _ABSENT, _DAMAGED = -1, -2, -3  # in place of a step


def _is_primary() -> bool:
    return jax.process_index() == 0


def _from_process_0(number: int) -> int:
    if jax.process_count() == 1:
        return number
    from jax.experimental import multihost_utils

    return int(multihost_utils.broadcast_one_to_all(np.int32(number)))


def _orbax() -> ocp.Context:
    """Uncompressed: zstd saves 8 % of random-looking float32 and takes time from the step's own cores."""
    context = ocp.Context()
    context.array_options.saving.use_compression = False
    context.array_options.saving.enable_write_sharding_file = False  # the shardings are given at restore
    return context


def _own(leaf: jax.Array) -> jax.Array:
    """On a CPU, a copy: Orbax would refer to the step's buffer, and a donating step then stalls while XLA copies all of them."""
    on_host = all(device.platform == "cpu" for device in leaf.devices())
    return jax.device_put(leaf, leaf.sharding, may_alias=False) if on_host else leaf


def _describe(leaf: Any) -> list[Any]:
    return [str(leaf.dtype), list(leaf.shape)]


def _with_sharding(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None) or jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _compare(what: str, saved: dict[str, Any], wanted: dict[str, Any], partial: bool = False) -> None:
    """Raises `UserError` naming the first leaf in which the two differ."""
    for name in sorted(saved.keys() | wanted.keys()):
        if name not in wanted:
            if partial:
                continue
            raise UserError(f"{what} holds {name}, which the state of this config does not have.")
        if name not in saved:
            if all(kept.startswith("params/") for kept in saved):
                raise UserError(
                    f"{what} holds the parameters of a converted model and no state to go on from; "
                    "train in a folder of its own, with --config.init_from naming this one."
                )
            raise UserError(f"{what} lacks {name}, which the state of this config has.")
        (old_type, old_shape), (new_type, new_shape) = saved[name], _describe(wanted[name])
        if (old_type, old_shape) != (new_type, new_shape):
            raise UserError(
                f"{what} has {name} as {old_type}{old_shape}, but the state of this config has {new_type}{new_shape}."
            )


def _remove(path: pathlib.Path) -> None:
    """Removes a folder, if it is there. Writers that a failed save left behind may still add to it for a moment."""
    for attempt in range(20):
        try:
            shutil.rmtree(path)
        except FileNotFoundError:
            if not path.exists():
                return
        except OSError as error:
            if error.errno != errno.ENOTEMPTY or attempt == 19:
                raise
            time.sleep(0.1)


def _first_line(error: BaseException) -> str:
    """Orbax's and tensorstore's messages go on for pages."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0][:300].rstrip(".")
