"""What the answers are worth that a model wrote to prompts: `task.measures`, by the measures of gptjax/measures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from gptjax.config import TaskConfig
from gptjax.measures import answers, text
from gptjax.measures.measured import Measured


class Written(NamedTuple):
    """A prompt, all texts that are right, what the model wrote, and whether it came to an end by itself."""

    prompt: str
    references: tuple[str, ...]
    text: str
    ended: bool


References = Sequence[Sequence[str]]
Texts = Sequence[str]


def _diversity(references: References, texts: Texts) -> list[Measured]:
    words = [one.split() for one in texts]
    return [text.distinct(words, order) for order in (1, 2) if any(len(one) >= order for one in words)]


MEASURES: dict[str, Callable[[References, Texts], list[Measured]]] = {
    "bleu": lambda references, texts: [text.bleu(references, texts)],
    "bleu-zh": lambda references, texts: [text.bleu(references, texts, tokenize="zh")],
    "chrf": lambda references, texts: [text.chrf(references, texts)],
    "rouge": text.rouge,
    "rouge-mixed": lambda references, texts: text.rouge(references, texts, tokenize="mixed"),
    "em_f1": answers.squad,
    "em_f1-zh": lambda references, texts: answers.squad(references, texts, normaliser="mlqa-zh"),
    "distinct": _diversity,
    "self_bleu": lambda references, texts: [text.self_bleu(texts)] if len(texts) > 1 else [],
}


def measured(knobs: TaskConfig, written: Sequence[Written]) -> dict[str, float]:
    """{"written", how many there are, "ended", the share that came to an end, and what `knobs.measures` say: bleu, rouge_1, ...}.

    Raises `UserError` where a package is missing.
    """
    references, texts = [one.references for one in written], [one.text.strip() for one in written]
    found: dict[str, float] = {"written": len(written), "ended": sum(one.ended for one in written) / len(written)}
    for name in knobs.measures:
        for one in MEASURES[name](references, texts):
            found[one.name.lower().replace("-", "_").replace(" ", "_")] = one.value
    return found
