"""What an evaluation of tasks says: measures with their intervals, and those of simple predictors beside them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from gptjax.config import Config, tasks_of
from gptjax.config.task import WRITING
from gptjax.measures.baselines import five_gram, unigram
from gptjax.measures.bootstrap import Bootstrap
from gptjax.measures.measured import Measured, difference, table
from gptjax.tasks.base import Judged, Values
from gptjax.tasks.load import TaskDataset, encoder
from gptjax.tasks.table import TASKS


@dataclass(frozen=True)
class Report:
    """Of one task. `ahead` is the model's measure less the baseline's, on the same records, by baseline."""

    measured: list[Measured]
    baselines: dict[str, list[Measured]]
    ahead: dict[str, list[Measured]]
    text: str  # what the field's own package reports; "" where there is none

    def lines(self) -> list[str]:
        """The tables, for people."""
        found = table(self.measured)
        for name, measured in self.baselines.items():
            found += [f"baseline {name}:", *(f"  {line}" for line in table([*measured, *self.ahead[name]])[1:])]
        return found + (["", *self.text.rstrip().split("\n")] if self.text else [])


def reports(
    config: Config, dataset: TaskDataset, judged: Mapping[str, Sequence[Judged]], bootstrap: Bootstrap
) -> dict[str, Report]:
    """{task: its report} of what a model said of the evaluation split; baselines learn from the training split."""
    found = {}
    for name, knobs in tasks_of(config).items():
        task, known = TASKS[knobs.kind], [one for one in judged[name] if one.weight]
        train = [record.values for record in dataset.records["train"][name]]
        measured = task.measured(knobs, known, bootstrap)
        baselines, ahead = {}, {}
        said_by = task.baselines(knobs, train, known) | _language(config, dataset, name, known)
        for baseline, said in said_by.items():
            baselines[baseline] = task.measured(knobs, said, bootstrap)
            theirs = {one.name: one for one in baselines[baseline]}
            both = [(one, theirs[one.name]) for one in measured if one.name in theirs]
            differences = [difference(ours, other, bootstrap) for ours, other in both if ours.statistic and other.statistic]
            ahead[baseline] = [replace(one, name=f"model less baseline: {one.name.split(' - ')[0]}") for one in differences]
        found[name] = Report(measured, baselines, ahead, task.report(knobs, known))
    return found


def _language(config: Config, dataset: TaskDataset, name: str, known: Sequence[Judged]) -> dict[str, list[Judged]]:
    """How dear the right texts are to who knows the training records' texts by their tokens' frequencies, and by their 5-grams;
    neither sees a prompt.
    """
    knobs = tasks_of(config)[name]
    if knobs.kind not in WRITING:
        return {}
    encode, task = encoder(config, dataset.tokenizer), TASKS[knobs.kind]

    def written(record: Values) -> list[int]:
        return [int(token) for part in task.encode(knobs, record, encode) for token in part.tokens[part.read == 1]]

    train, new = [written(record.values) for record in dataset.records["train"][name]], [written(one.record) for one in known]
    found = {}
    for baseline, model in (("unigram", unigram), ("five_gram", five_gram)):
        nats, tokens = model(train, new, config.model.vocab_size)
        dear = zip(known, nats, tokens, strict=True)
        found[baseline] = [Judged(one.record, one.gold, None, own, count) for one, own, count in dear]
    return found
