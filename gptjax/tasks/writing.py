"""What the answers are worth that a model wrote to prompts: `task.measures`, by the measures of gptjax/measures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from gptjax.config import TaskConfig
from gptjax.measures import answers, text
from gptjax.measures.baselines import nearest_neighbour
from gptjax.measures.bootstrap import Bootstrap
from gptjax.measures.measured import Measured
from gptjax.tasks.base import Judged


class Written(NamedTuple):
    """A prompt, all texts that are right, what the model wrote, and whether it came to an end by itself."""

    prompt: str
    references: tuple[str, ...]
    text: str
    ended: bool


References = Sequence[Sequence[str]]
Texts = Sequence[str]
Intervals = Bootstrap | None


def _diversity(texts: Texts, bootstrap: Intervals) -> list[Measured]:
    words = [one.split() for one in texts]
    return [text.distinct(words, order, bootstrap) for order in (1, 2) if any(len(one) >= order for one in words)]


MEASURES: dict[str, Callable[[References, Texts, Intervals], list[Measured]]] = {
    "bleu": lambda references, texts, how: [text.bleu(references, texts, bootstrap=how)],
    "bleu-zh": lambda references, texts, how: [text.bleu(references, texts, tokenize="zh", bootstrap=how)],
    "chrf": lambda references, texts, how: [text.chrf(references, texts, how)],
    "rouge": lambda references, texts, how: text.rouge(references, texts, bootstrap=how),
    "rouge-mixed": lambda references, texts, how: text.rouge(references, texts, tokenize="mixed", bootstrap=how),
    "em_f1": lambda references, texts, how: answers.squad(references, texts, bootstrap=how),
    "em_f1-zh": lambda references, texts, how: answers.squad(references, texts, normaliser="mlqa-zh", bootstrap=how),
    "distinct": lambda references, texts, how: _diversity(texts, how),
    "self_bleu": lambda references, texts, how: [text.self_bleu(texts, bootstrap=how)] if len(texts) > 1 else [],
}


def measured(knobs: TaskConfig, written: Sequence[Written], bootstrap: Intervals = None) -> list[Measured]:
    """What `knobs.measures` say of at least one written text. Raises `UserError` where a package is missing."""
    references, texts = [one.references for one in written], [one.text.strip() for one in written]
    return [one for name in knobs.measures for one in MEASURES[name](references, texts, bootstrap)]


def figures(knobs: TaskConfig, written: Sequence[Written]) -> dict[str, float]:
    """{"written", how many there are, "ended", the share that came to an end, and the measures: bleu, rouge_1, ...}."""
    found: dict[str, float] = {"written": len(written), "ended": sum(one.ended for one in written) / len(written)}
    named = {one.name.lower().replace("-", "_").replace(" ", "_"): one.value for one in measured(knobs, written)}
    return found | named


def rows(knobs: TaskConfig, judged: Sequence[Judged], bootstrap: Intervals) -> list[Measured]:
    """Perplexity, where somebody says how dear the right texts are, and what the written ones are worth, where there are any."""
    found = []
    if any(one.weight for one in judged):
        found.append(text.perplexity([one.nats for one in judged], [one.weight for one in judged], bootstrap))
    written = [one.written for one in judged if one.written is not None]
    return found + (measured(knobs, written, bootstrap) if written else [])


def neighbours(train: Sequence[tuple[str, str]], new: Sequence[Judged]) -> dict[str, list[Judged]]:
    """What is written by who answers as the training record with the nearest prompt: `train` has (prompt, text)."""
    asked = [one for one in new if one.written is not None]
    if not asked or not train:
        return {}
    prompts, texts = zip(*train, strict=True)
    return {"nearest_neighbour": instead(asked, nearest_neighbour(prompts, texts, [one.written.prompt for one in asked]))}


def instead(asked: Sequence[Judged], texts: Sequence[str]) -> list[Judged]:
    """The records with other texts in place of the model's."""
    return [
        Judged(one.record, one.gold, said, written=one.written._replace(text=said, ended=True))
        for one, said in zip(asked, texts, strict=True)
    ]
