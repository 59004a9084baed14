"""The trials of a search, made one by one: asks the study, lays the point over the recipe, watches, and tells how each ended.

What the study and the trials' folders say is all there is to know: a searcher that was killed is replaced by the next one, which
goes on with the trials that had not ended, under the parameters they had.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from optuna.trial import FrozenTrial, TrialState

from gptjax import recipes
from gptjax.config import UserError, from_dict
from gptjax.sweeps.definition import (
    Sweep,
    Trial,
    config_hash,
    describe,
    lay_point,
    readable_name,
    short_names,
)
from gptjax.sweeps.driver import Source
from gptjax.sweeps.folder import State, SweepFolder
from gptjax.sweeps.search import Search, describe_distribution
from gptjax.sweeps.study import Study, make_pruner, make_sampler
from gptjax.sweeps.table import total_steps
from gptjax.train.metrics import FILE_NAME, read_metrics
from gptjax.train.run import read_result

Evaluations = list[tuple[int, float]]


class Searcher(Source):
    """The source of a search's trials. `about` is what sweep.json says besides them; `say` gets a line for each refusal."""

    def __init__(
        self,
        folder: SweepFolder,
        sweep: Sweep,
        overrides: Sequence[str] = (),
        *,
        worker: str = "",
        about: dict[str, Any] | None = None,
        retry_failed: bool = False,
        say: Callable[[str], None] = lambda line: None,
    ):
        assert sweep.search is not None and isinstance(sweep.space, Mapping)
        self._folder, self._sweep, self._overrides, self._say = folder, sweep, tuple(overrides), say
        self._base = recipes.recipe_values(sweep.recipe)
        # A misspelt key, a setting that Optuna lacks: said before anything is written.
        self._search = with_resources(sweep.search, lay_point(sweep, {}, overrides, self._base))
        make_sampler(self._search, sweep.space, 0)
        make_pruner(self._search)
        self._about = dict(about or {})
        self._short = short_names(set(sweep.space))
        self.study = Study(folder.path, self._search, sweep.space, worker)
        self.study.check_declaration(declaration(sweep, overrides))
        self._retry_failed = retry_failed
        self._numbers: dict[str, list[int]] = {}  # of the trials that each folder stands for and that have not ended
        self._sizes: dict[str, int] = {}  # of metrics.jsonl, when it was last read
        self._judged: dict[str, int] = {}  # the last step that had no verdict
        self._verdicts: dict[str, int] = {}  # the step at which each is pruned
        self._asked_all = False
        self._pending = deque(self._unfinished())
        self.write_definition()

    def _unfinished(self) -> list[int]:
        """Numbers of this worker's trials that have not ended, and of failed ones where they are to run again."""
        if self._retry_failed:
            for trial in self.study.mine(TrialState.FAIL):
                self.study.reopen(trial.number)
        return [trial.number for trial in self.study.mine(TrialState.RUNNING)]

    # --- what the driver asks ---

    def take(self) -> Trial | None:
        while True:
            if self._pending:
                found: FrozenTrial | None = self.study.trials()[self._pending.popleft()]
                is_new = False
            else:
                found, is_new = self.study.ask(), True
            if found is None:
                self._asked_all = True
                return None
            trial = self._prepare(found)
            if trial is not None and self._is_to_run(trial, found.number, is_new):
                return trial

    def is_exhausted(self) -> bool:
        return self._asked_all and not self._pending

    def all_done(self) -> bool:
        return self.study.best() is not None and not self.study.mine(TrialState.RUNNING, TrialState.FAIL)

    def is_to_stop(self, trial: Trial) -> bool:
        if trial.name in self._verdicts:
            return True
        path = self._folder.trial(trial.name) / FILE_NAME
        size = path.stat().st_size if path.exists() else 0
        if size == self._sizes.get(trial.name):
            return False
        self._sizes[trial.name] = size
        evaluations = self._evaluations(trial)
        if not evaluations or evaluations[-1][0] <= self._judged.get(trial.name, -1):
            return False
        for number in self._numbers[trial.name]:
            verdict = self.study.judge(number, evaluations, self._judged.get(trial.name, -1))
            if verdict is not None:
                self._verdicts[trial.name] = verdict
                return True
        self._judged[trial.name] = evaluations[-1][0]
        return False

    def ended(self, trial: Trial, state: State) -> State:
        state = self._settled(trial, state)
        numbers = self._numbers.pop(trial.name)
        if state.status not in ("done", "failed", "pruned"):
            return state
        for number in numbers:
            self._tell(number, trial, state)
        return state

    # --- one suggestion ---

    def _prepare(self, found: FrozenTrial) -> Trial | None:
        """The trial of a suggestion, its folder made; None where the config's checks refuse it, which is recorded."""
        point = self.study.point(found)
        values = lay_point(self._sweep, point, self._overrides, self._base)
        try:
            config = from_dict(values)
        except UserError as error:
            self.study.tell(found.number, TrialState.PRUNED, why=str(error))
            self._say(f"{found.number:03d} {describe(point, self._short)}: refused: {error}")
            self.write_definition()
            return None
        digest = config_hash(config)
        known = next((trial for trial in self._listed() if trial["hash"] == digest), None)
        name = known["name"] if known else f"{found.number:03d},{readable_name(point, self._short, digest)}"
        if "trial" not in found.user_attrs:
            self.study.note(found.number, "trial", name)
        elif not found.user_attrs["trial"].endswith(digest):
            raise UserError(
                f"trial {found.number} of the search, {found.user_attrs['trial']}, would now have another config: the recipe "
                f"{self._sweep.recipe} or the defaults have changed since; take another --workdir."
            )
        trial = Trial(name, digest, point, config)
        self._folder.write_trial(trial)
        self.write_definition()
        return trial

    def _is_to_run(self, trial: Trial, number: int, is_new: bool) -> bool:
        """Whether the trial is to be started; one whose folder has ended already is told at once, and never done twice."""
        if trial.name in self._numbers:  # the same config is running: this one ends with it
            self._numbers[trial.name].append(number)
            return False
        self._numbers[trial.name] = [number]
        state = self._settled(trial, self._folder.observed(trial.name))
        again = self._retry_failed and not is_new and state.status == "failed"
        if state.status in ("done", "pruned", "failed") and not again:
            self._say(f"{trial.name}: {state.status} already")
            self.ended(trial, state)
            return False
        return True

    # --- how a trial ended ---

    def _settled(self, trial: Trial, state: State) -> State:
        """The state, which is `pruned` where an evaluation decided so, however the process ended after it."""
        if state.status == "running" or not self.is_to_stop(trial):
            return state
        step = self._verdicts[trial.name]
        value = dict(self._evaluations(trial))[step]
        why = f"at step {step:,}, where {self._search.metric} was {value:.4f}."
        pruned = dataclasses.replace(state, status="pruned", kind="", why=why, pruned_at=step, loss=None)
        self._folder.write_state(trial.name, pruned)
        return pruned

    def _tell(self, number: int, trial: Trial, state: State) -> None:
        if state.status == "failed":
            self.study.tell(number, TrialState.FAIL, why=f"{state.kind}: {state.why}")
        elif state.status == "pruned":
            self.study.tell(number, TrialState.PRUNED, why=state.why)
        else:
            result = read_result(self._folder.trial(trial.name)) or {}
            value = result.get("eval", {}).get(self._search.metric.removeprefix("eval/"))
            if isinstance(value, (int, float)) and math.isfinite(value):
                self.study.tell(number, TrialState.COMPLETE, value)
            else:
                self.study.tell(number, TrialState.FAIL, why=f"its {self._search.metric} is {value}.")

    def _evaluations(self, trial: Trial) -> Evaluations:
        """(step, metric) of the evaluations before the last step: at the end there is nothing left to prune."""
        folder, name = self._folder.trial(trial.name), self._search.metric
        if not (folder / FILE_NAME).exists():
            return []
        result = read_result(folder)
        last = result["steps"] if result else total_steps(trial.config) or math.inf
        return [(row["step"], row[name]) for row in read_metrics(folder / FILE_NAME) if name in row and row["step"] < last]

    # --- what others read ---

    def _listed(self) -> list[dict[str, Any]]:
        """One entry for each folder, in the order of the suggestions."""
        listed: dict[str, dict[str, Any]] = {}
        for trial in self.study.trials():
            if name := trial.user_attrs.get("trial"):
                entry = {"name": name, "hash": name.rsplit("-", 1)[-1], "overrides": self.study.point(trial)}
                listed.setdefault(name, entry)
        return list(listed.values())

    def _refused(self) -> list[dict[str, Any]]:
        return [
            {"number": trial.number, "overrides": self.study.point(trial), "why": trial.user_attrs["why"]}
            for trial in self.study.trials()
            if trial.state == TrialState.PRUNED and "trial" not in trial.user_attrs
        ]

    def write_definition(self) -> None:
        """`sweep.json`, from the study, for `gptjax status`, `compare` and whoever else reads a sweep's folder."""
        counts = {"limit": self.study.limit, "suggested": len(self.study.trials()), "refused": self._refused()}
        self._folder.write_list(self._listed(), self._about | {"search": dataclasses.asdict(self._search) | counts})

    def best(self) -> str:
        """The best trial in a line."""
        trial = self.study.best()
        if trial is None:
            return "no trial is done."
        return f"best {self._search.metric} {trial.value:.4f}, trial {trial.number:03d}: {describe(self.study.point(trial))}"


def with_resources(search: Search, values: Any) -> Search:
    """The search with Hyperband's smallest and largest number of steps: from one evaluation to the next, and the run's length.

    `values`: recipe and overrides, without a point. Raises `UserError` where they don't say.
    """
    if search.pruner != "hyperband" or {"min_resource", "max_resource"} <= search.pruner_settings.keys():
        return search
    try:
        config = from_dict(values)
    except UserError:
        config = None
    least, most = (config.duration("evaluate", "every", 0.0), total_steps(config)) if config else (0, 0)
    resources = {"min_resource": least, "max_resource": most} | dict(search.pruner_settings)
    if not 0 < resources["min_resource"] < resources["max_resource"]:
        raise UserError(
            f"Hyperband needs evaluations in a run's course, and finds one each {resources['min_resource']} of "
            f"{resources['max_resource']} steps; set evaluate.every_steps, or Search(pruner_settings={{'min_resource': STEPS, "
            f"'max_resource': STEPS}})."
        )
    return dataclasses.replace(search, pruner_settings=resources)


def declaration(sweep: Sweep, overrides: Sequence[str]) -> dict[str, Any]:
    """What may not change while a search goes on: all that its suggestions and verdicts follow from, but the number of them."""
    assert sweep.search is not None and isinstance(sweep.space, Mapping)
    search = {key: value for key, value in dataclasses.asdict(sweep.search).items() if key != "trials"}
    space = {f"space {key}": describe_distribution(distribution) for key, distribution in sweep.space.items()}
    laid = {f"override {key}": repr(value) for key, value in sweep.overrides.items()}
    return {"recipe": sweep.recipe, "overrides": list(overrides)} | search | space | laid
