"""Optuna's part of a search (extra: search): what is suggested next, what is pruned, and the record of it.

The record is Optuna's own journal in the sweep's folder, study.journal, which its tools read: one line an operation, appended
and synced under a lock that file systems shared between hosts keep too (locks.py). SQLite would need fcntl's locks, which many
of those do not keep, and a kill leaves at worst an unfinished last line here, which is cut off.

Suggestions and verdicts are functions of the record: each is made by a fresh sampler or pruner, seeded by (seed, number of the
trial), on a copy of the record in memory. No state lives in the process, so a search that was killed goes on as if it had not.
"""

from __future__ import annotations

import contextlib
import math
import os
import pathlib
import typing
import warnings
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from gptjax.config import UserError
from gptjax.sweeps.locks import SharedLock
from gptjax.sweeps.search import Search, grid_values, points_in_grid
from gptjax.sweeps.space import Choice, Distribution, Uniform

try:
    import cmaes  # noqa: F401, for our module of CMA-ES
    import optuna
    from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
    from optuna.storages.journal import JournalFileBackend
    from optuna.trial import FrozenTrial, TrialState, create_trial

except ModuleNotFoundError:
    raise UserError("a search needs the packages optuna and cmaes, which are absent: pip install 'gptjax[search]'.") from None

from gptjax.sweeps.cmaes import GENERATION, CmaEs

FILE_NAME = "study.journal"
NAME = "search"  # of the study: Hyperband's brackets follow from it
RETRY = "retry_of"  # user attribute of what stands for an earlier trial that had failed: that one's number
RUNG = "completed_rung_"  # system attributes in which Hyperband keeps the values that it compared
Evaluations = Sequence[tuple[int, float]]  # (step, metric), the steps rising


class Study:
    """The record of one search, and what follows from it.

    Several processes may have it open; each goes on with the trials that it asked for itself, as `worker`. Trials are known by
    their number, from 0.
    """

    def __init__(self, folder: pathlib.Path, search: Search, space: Mapping[str, Distribution], worker: str = ""):
        self.search, self._space, self._worker = search, space, worker
        self._distributions = {key: as_optuna(distribution) for key, distribution in space.items()}
        self._ask_lock = SharedLock(folder / "study.ask")
        self._storage, self._id = open_journal(folder, search.maximize, create=True)
        self.limit = min(search.trials, points_in_grid(space)) if search.sampler == "grid" else search.trials

    def check_declaration(self, declaration: Mapping[str, Any]) -> None:
        """Keeps what the search is; raises `UserError` where the record is of another one."""
        kept = self._storage.get_study_user_attrs(self._id)
        if "declaration" not in kept:
            self._storage.set_study_user_attr(self._id, "declaration", dict(declaration))
            return
        before = kept["declaration"]
        changed = [key for key in {**before, **declaration} if before.get(key) != declaration.get(key)]
        if changed:
            changes = ", ".join(f"{key} from {before.get(key)!r} to {declaration.get(key)!r}" for key in changed)
            raise UserError(f"the folder's search is another one, which this would change in {changes}; take another --workdir.")

    # --- the record ---

    def trials(self) -> list[FrozenTrial]:
        """The trials in order of number."""
        return numbered(self._storage.get_all_trials(self._id, deepcopy=True))

    def point(self, trial: FrozenTrial) -> dict[str, Any]:
        """{dotted key: value} that was suggested."""
        return {key: _decoded(self._space[key], trial.params[key]) for key in self._space}

    def mine(self, *states: TrialState) -> list[FrozenTrial]:
        """This worker's trials in these states."""
        return [t for t in self.trials() if t.state in states and t.user_attrs.get("worker", "") == self._worker]

    def best(self) -> FrozenTrial | None:
        """The finished trial with the best metric."""
        complete = [trial for trial in self.trials() if trial.state == TrialState.COMPLETE]
        return (max if self.search.maximize else min)(complete, key=lambda trial: trial.values[0], default=None)

    def note(self, number: int, key: str, value: Any) -> None:
        """Keeps a fact about a trial that has not ended."""
        self._storage.set_trial_user_attr(self._trial_id(number), key, value)

    def tell(self, number: int, state: TrialState, value: float | None = None, why: str = "") -> None:
        """Records how a trial ended. One that had ended already is left as it was."""
        trial = self.trials()[number]
        if trial.state.is_finished():
            return
        if why:
            self._storage.set_trial_user_attr(trial._trial_id, "why", why)
        if state == TrialState.PRUNED and trial.intermediate_values:  # as Optuna's own loop does
            value = trial.intermediate_values[max(trial.intermediate_values)]
        is_number = value is not None and not math.isnan(value)
        self._storage.set_trial_state_values(trial._trial_id, state, [value] if is_number else None)

    def reopen(self, number: int) -> None:
        """Has a trial that failed run again: Optuna's ended trials do not change, so another one stands for it."""
        failed = self.trials()[number]
        attributes = {"worker": self._worker, RETRY: number, **{k: v for k, v in failed.user_attrs.items() if k == "trial"}}
        self._create(failed.params, attributes, {k: v for k, v in failed.system_attrs.items() if not k.startswith(RUNG)})

    def _create(self, params: dict[str, Any], user_attrs: dict[str, Any], system_attrs: dict[str, Any]) -> None:
        template = create_trial(
            state=TrialState.RUNNING,
            params=params,
            distributions=self._distributions,
            user_attrs=user_attrs,
            system_attrs=system_attrs,
        )
        self._storage.create_new_trial(self._id, template_trial=template)  # one line: a kill leaves all of it or nothing

    def _trial_id(self, number: int) -> int:
        return self.trials()[number]._trial_id

    # --- what follows from it ---

    def ask(self) -> FrozenTrial | None:
        """A new trial of this worker, or None where all have been suggested."""
        with _held(self._ask_lock):
            history = self.trials()
            number = len(history)
            if number >= self.limit:
                return None
            sampler = make_sampler(self.search, self._space, number)
            study, _ = self._copy(history, sampler)
            study.ask(self._distributions)
            asked = study.get_trials(deepcopy=False)[number]
            kept = asked.system_attrs | ({GENERATION: sampler.generation} if isinstance(sampler, CmaEs) else {})
            self._create(asked.params, {"worker": self._worker}, kept)
            return self.trials()[number]

    def judge(self, number: int, evaluations: Evaluations, judged: int = -1) -> int | None:
        """The first step after `judged` at which the trial is to be stopped, or None; evaluations up to there are recorded.

        They are compared one by one in a copy of the record in which the trial has none yet, so that it does not matter whether
        they were seen one at a time, or all at once by a driver that came later.
        """
        history = self.trials()
        own = history[number]
        fresh = {key: value for key, value in own.system_attrs.items() if not key.startswith(RUNG)}
        history[number] = create_trial(
            state=TrialState.RUNNING, params=own.params, distributions=own.distributions, system_attrs=fresh
        )
        study, storage = self._copy(history, optuna.samplers.RandomSampler(seed=0))
        identity = study.get_trials(deepcopy=False)[number]._trial_id
        verdict = None
        for step, metric in evaluations:
            storage.set_trial_intermediate_value(identity, step, metric)
            if study.pruner.prune(study, storage.get_trial(identity)) and step > judged:
                verdict = step
                break
        self._record(own, storage.get_trial(identity))
        return verdict

    def _record(self, own: FrozenTrial, copy: FrozenTrial) -> None:
        for key in copy.system_attrs.keys() - own.system_attrs.keys():
            self._storage.set_trial_system_attr(own._trial_id, key, copy.system_attrs[key])
        for step in sorted(copy.intermediate_values.keys() - own.intermediate_values.keys()):
            self._storage.set_trial_intermediate_value(own._trial_id, step, copy.intermediate_values[step])

    def _copy(
        self, history: Sequence[FrozenTrial], sampler: optuna.samplers.BaseSampler
    ) -> tuple[optuna.Study, optuna.storages.BaseStorage]:
        storage = optuna.storages.InMemoryStorage()
        study = optuna.create_study(
            storage=storage,
            study_name=NAME,
            sampler=sampler,
            pruner=make_pruner(self.search),
            direction="maximize" if self.search.maximize else "minimize",
        )
        study.add_trials(history)
        return study, storage


def numbered(trials: Sequence[FrozenTrial]) -> list[FrozenTrial]:
    """Optuna's trials by our numbers: one that failed and was run again has the later outcome, and the earlier number."""
    found: list[FrozenTrial] = []
    for trial in trials:
        number = trial.user_attrs.get(RETRY, len(found))
        found[number : number + 1] = [trial]
        trial.number = number
    return found


# --- samplers and pruners ---


def make_sampler(search: Search, space: Mapping[str, Distribution], number: int) -> optuna.samplers.BaseSampler:
    """The sampler for trial `number`. Raises `UserError` for settings that Optuna refuses."""
    seed = int(np.random.SeedSequence([search.seed, number]).generate_state(1)[0])
    if search.sampler == "grid":  # its seed shuffles the grid, once for all trials
        points = {key: [_encoded(d, value) for value in grid_values(d)] for key, d in space.items()}
        return _made("sampler", optuna.samplers.GridSampler, search.sampler_settings, search_space=points, seed=search.seed)
    if search.sampler == "cmaes":
        ranges = {key: as_optuna(distribution) for key, distribution in space.items()}
        return _made("sampler", CmaEs, search.sampler_settings, ranges=ranges, seed=seed)
    made = {"tpe": optuna.samplers.TPESampler, "random": optuna.samplers.RandomSampler}[search.sampler]
    return _made("sampler", made, search.sampler_settings, seed=seed)


def make_pruner(search: Search) -> optuna.pruners.BasePruner:
    """The pruner. Raises `UserError` for settings that Optuna refuses."""
    pruners = {
        "none": optuna.pruners.NopPruner,
        "median": optuna.pruners.MedianPruner,
        "hyperband": optuna.pruners.HyperbandPruner,
    }
    return _made("pruner", pruners[search.pruner], search.pruner_settings)


def _made(kind: str, cls: Any, settings: Mapping[str, Any], **own: Any) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
            return cls(**settings, **own)
    except (TypeError, ValueError) as error:
        raise UserError(f"Search({kind}_settings={dict(settings)!r}): {' '.join(str(error).split()).rstrip('.')}.") from None


def as_optuna(distribution: Distribution) -> BaseDistribution:
    """Optuna's name for it."""
    if isinstance(distribution, Choice):
        return CategoricalDistribution([_encoded(distribution, value) for value in distribution.values])
    if isinstance(distribution, Uniform):
        return FloatDistribution(distribution.low, distribution.high, log=distribution.log)
    return IntDistribution(distribution.low, distribution.high, log=distribution.log)


def _encoded(distribution: Distribution, value: Any) -> Any:
    """Lists, which Optuna does not store, as the text of them."""
    return repr(value) if isinstance(distribution, Choice) and isinstance(value, (list, tuple)) else value


def _decoded(distribution: Distribution, stored: Any) -> Any:
    if isinstance(distribution, Choice):
        return next(value for value in distribution.values if _encoded(distribution, value) == stored)
    return stored


# --- the journal ---


def open_journal(folder: pathlib.Path, maximize: bool = False, *, create: bool = False) -> tuple[Any, int]:
    """(storage, study's number) of the folder's record. Raises `UserError` where there is none, or it is damaged."""
    path = folder / FILE_NAME
    if not create and not path.exists():
        raise UserError(f"{folder} is not a search's folder: it has no {FILE_NAME}.")
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    folder.mkdir(parents=True, exist_ok=True)
    lock = SharedLock(path)
    backend = JournalFileBackend(str(path), lock_obj=typing.cast(Any, lock))  # it is asked to acquire and release, no more
    if create:
        with _held(lock):
            _cut_unfinished_line(path)
    try:
        storage = optuna.storages.JournalStorage(backend)
        if create and not storage.get_all_studies():
            direction = optuna.study.StudyDirection.MAXIMIZE if maximize else optuna.study.StudyDirection.MINIMIZE
            with contextlib.suppress(optuna.exceptions.DuplicatedStudyError):  # another worker was quicker
                storage.create_new_study([direction], NAME)
        return storage, storage.get_study_id_from_name(NAME)
    except (ValueError, KeyError) as error:
        raise UserError(f"{path} is damaged ({error}); Optuna's journal has one JSON object a line.") from None


def _cut_unfinished_line(path: pathlib.Path) -> None:
    """What a kill or a full disk left of a line; anything appended to it would make the journal unreadable."""
    with path.open("rb+") as file:
        content = file.read()
        if content and not content.endswith(b"\n"):
            file.truncate(content.rfind(b"\n") + 1)
            os.fsync(file.fileno())


@contextlib.contextmanager
def _held(lock: SharedLock) -> Iterator[None]:
    lock.acquire()
    try:
        yield
    finally:
        lock.release()
