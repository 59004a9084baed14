"""What a replayed step says: lines for a person, plain values for a machine."""

from __future__ import annotations

import collections
import math
from collections.abc import Iterable, Sequence
from typing import Any

from gptjax.train.documents import Document
from gptjax.train.replay import Norms, Replay

_TEXT = 48  # characters of a document that a line shows


def as_json(found: Replay) -> dict[str, Any]:
    """All of it: each document with its ids and the loss of each target, each parameter's norms layer by layer."""
    rewinds = {"followed": found.rewinds, "of": found.of_rewinds}
    return {
        "run": str(found.folder),
        "step": found.step,
        "from_step": found.from_step,
        "rewinds": rewinds,
        "figures": {name: value for name, value in found.figures.items() if name != "step"},
        "median_of_steps_before": found.before,
        "recorded": found.agreement.as_json(),
        "relative_gaps": found.gaps,
        "documents": [_document_json(one) for one in found.documents],
        "layers": [{"part": part, **norms} for part, norms in by_layer(found.norms).items()],
        "parameters": [vars(one) for one in found.norms],
        "notes": list(found.notes),
    }


def _document_json(one: Document) -> dict[str, Any]:
    about: dict[str, Any] = {"row": one.row, "segment": one.segment, "source": one.source, "document": one.name}
    about |= {"begin": one.begin, "loss": one.loss, "nats": one.nats, "targets": one.weight, "mean_loss": one.mean}
    about |= {"text": one.text, "shown": one.shown, "ids": list(one.ids), "positions": list(one.positions)}
    return about | {"target_losses": [[target.position, target.id, target.loss] for target in one.targets]}


def by_layer(norms: Sequence[Norms]) -> dict[str, dict[str, float]]:
    """{part of the model, such as layers/0: norms over all its parameters, and its share of the squared gradient}."""
    squares: dict[str, list[float]] = collections.defaultdict(lambda: [0.0, 0.0, 0.0])
    for one in norms:
        sums = squares[part_of(one)]
        for i, norm in enumerate((one.gradient, one.update, one.parameters)):
            sums[i] += norm * norm
    total = sum(sums[0] for sums in squares.values())
    return {
        part: {
            "gradient": math.sqrt(sums[0]),
            "share": sums[0] / total if total else math.nan,
            "update": math.sqrt(sums[1]),
            "parameters": math.sqrt(sums[2]),
        }
        for part, sums in squares.items()
    }


def part_of(one: Norms) -> str:
    """'layers/0', 'embed', 'adapters/layers/3', ..."""
    if one.layer is None:
        return one.name.partition("/")[0]
    return f"{one.name.partition('layers/')[0]}layers/{one.layer}"


# --- for a person -------------------------------------------------------------------------------------------------------------


def lines(found: Replay, top: int, spots: int = 3) -> list[str]:
    """The step in figures, its `top` dearest documents with the dearest `spots` targets of each, norms by layer and parameter."""
    return [
        *_head(found),
        "",
        *_documents(found, top, spots),
        "",
        *_layers(found.norms),
        "",
        *_parameters(found.norms),
        *found.notes,
    ]


def _head(found: Replay) -> list[str]:
    figures, numbers = found.figures, found.agreement
    start = f"the checkpoint of step {found.from_step}" if found.from_step else "the run's beginning"
    rewinds = f", {found.rewinds} of the run's {found.of_rewinds} rewinds followed" if found.of_rewinds else ""
    said = [f"{found.folder}, step {found.step}: {found.step - found.from_step} steps from {start}{rewinds}."]
    if numbers.is_exact:
        steps = f"steps {numbers.first_step} to {numbers.last_step}"
        steps = steps if numbers.first_step != numbers.last_step else f"step {numbers.last_step}"
        said.append(f"bit for bit: all {numbers.compared} numbers that the run wrote down of {steps} came out the same.")
    elif numbers.differing:
        said.append(
            f"NOT the recorded numbers: {len(numbers.differing)} of {numbers.compared} differ by up to {numbers.largest:.2g} "
            f"(relative), the first {numbers.differing[0]}."
        )
    else:
        said.append("the run wrote down no number of these steps: whether they are the same cannot be told.")
    clock = f"learning rate {figures['learning_rate']:.4g}"
    said.append(f"loss {figures['train/loss']:.6g}  nll {figures['train/nll']:.6g}  {_gradient(found)}  {clock}")
    if found.before:
        ratios = [f"{name.rpartition('/')[2]} {value:.6g}" for name, value in found.before.items()]
        said.append(f"median of the {found.step - found.from_step - 1} steps before: {', '.join(ratios)}.".replace("_", " "))
    return said


def _gradient(found: Replay) -> str:
    norm, clip = found.figures["gradient_norm"], found.config.optimizer.clip_norm
    clipped = f", clipped to {clip:g}" if clip and norm > clip else ""
    return f"gradient norm {norm:.6g}{clipped}"


def _documents(found: Replay, top: int, spots: int) -> list[str]:
    rows = 1 + max((one.row for one in found.documents), default=-1)
    said = [
        f"{len(found.documents)} documents in {rows} rows, the dearest a target first; their losses add up to the step's "
        f"(relative {found.gaps['train/loss']:.1g})."
    ]
    cells = [("loss", "sum", "targets", "row", "document", "text")]
    for one in found.documents[:top]:
        source = f"{one.source}:" if one.source else ""
        where = f"{source}{one.name}[{one.begin}:{one.begin + len(one.ids)}]"
        sums = (f"{one.mean:.4f}", f"{one.loss:.2f}", f"{one.weight:g}", f"{one.row}.{one.segment}")
        cells.append((*sums, where, _short(one.text)))
        for target in one.worst(spots):
            cells.append(
                (
                    f"{target.loss:.4f}",
                    "",
                    "",
                    f"@{target.position}",
                    "",
                    f"... {_before(one, target.position)} -> {target.token!r}",
                )
            )
    said += _table(cells, right=4)
    if len(found.documents) > top:
        said.append(f"and {len(found.documents) - top} more (--top, --json).")
    return said


def _before(one: Document, position: int) -> str:
    """The tokens in front of a target, as the document's targets have them."""
    return repr("".join(target.token for target in one.targets if position - 12 <= target.position < position)[-24:])


def _short(text: str) -> str:
    shown = repr(text)
    return shown if len(shown) <= _TEXT else f"{shown[: _TEXT - 4]}...{shown[0]}"


def _layers(norms: Sequence[Norms]) -> list[str]:
    cells = [("gradient", "share", "update", "parameters", "layer")]
    for part, of in by_layer(norms).items():
        cells.append((f"{of['gradient']:.4g}", f"{of['share']:.1%}", f"{of['update']:.3g}", f"{of['parameters']:.4g}", part))
    return ["norms by layer: gradient of the mean loss before clipping, update, parameters before it.", *_table(cells, right=4)]


def _parameters(norms: Sequence[Norms]) -> list[str]:
    names = dict.fromkeys(one.name for one in norms)
    cells = [("gradient", "update", "parameters", "parameter", "largest in")]
    for name in names:
        own = [one for one in norms if one.name == name]
        norms_of = [math.sqrt(sum(getattr(one, of) ** 2 for one in own)) for of in ("gradient", "update", "parameters")]
        gradient, update, parameters = (f"{norm:.4g}" for norm in norms_of)
        largest = max(own, key=lambda one: math.inf if math.isnan(one.gradient) else one.gradient)
        where = "" if largest.layer is None else f"layer {largest.layer} ({largest.gradient:.3g})"
        cells.append((gradient, update, parameters, name, where))
    return ["norms by parameter:", *_table(cells, right=3)]


def _table(cells: Sequence[Sequence[str]], right: int) -> list[str]:
    """Columns two blanks apart, the first `right` of them flush right."""
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    return ["  ".join(_aligned(row, widths, right)).rstrip() for row in cells]


def _aligned(row: Sequence[str], widths: Sequence[int], right: int) -> Iterable[str]:
    for i, (cell, width) in enumerate(zip(row, widths, strict=True)):
        yield cell.rjust(width) if i < right else cell.ljust(width)
