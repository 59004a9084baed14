"""Knobs of what is predicted."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

from gptjax.config.backends import ATTENTION_CAPABILITIES, attention_refusal
from gptjax.config.knobs import UserError, knob

if TYPE_CHECKING:
    from gptjax.config.schema import Config


@dataclass(frozen=True)
class ObjectiveConfig:
    """What is predicted and what it costs."""

    name: str = knob(
        "causal",
        "What is predicted: each token from those before it (causal); masked tokens from all others (masked, BERT); the rest of "
        "a text from a beginning that sees itself both ways (prefix, a prefix LM); also the middle of a text from both its sides "
        "(infill, Bavarian et al., 2022); spans cut out of a text (span, T5); or several of these by weights (mixture, UL2).",
        choices=("causal", "masked", "prefix", "infill", "span", "mixture"),
    )
    mask_rate: float = knob(0.15, "masked: share of the text's tokens that are predicted.", above=0, at_most=1)
    mask_token_rate: float = knob(0.8, "masked: share of these that the mask token stands for.", at_least=0, at_most=1)
    mask_random_rate: float = knob(
        0.1, "masked: share of these that a random token stands for; the rest is seen as it is.", at_least=0, at_most=1
    )
    infill_rate: float = knob(0.5, "infill: share of the documents whose middle comes last.", at_least=0, at_most=1)
    infill_spm_rate: float = knob(
        0.5,
        "infill: share of these whose suffix is shown before their prefix (SPM) and not after it (PSM).",
        at_least=0,
        at_most=1,
    )
    span_rate: float = knob(0.15, "span: share of the tokens that are cut out.", above=0, below=1)
    span_mean_length: float = knob(3.0, "span: mean length in tokens of what is cut out in one place.", at_least=1)
    mixture: tuple[str, ...] = knob(
        ("R/3/0.15=1", "R/8/0.15=1", "X/3/0.5=1", "X/8/0.5=1", "X/64/0.15=1", "X/64/0.5=1", "S=1"),
        "mixture: NAME=WEIGHT of each part, of which each document gets one at random. R and X cut spans out, as "
        "R/MEAN_LENGTH/RATE, after the tokens [R] and [X]; S is a prefix LM after the token [S]; causal and infill are the "
        "objectives of these names, without a token. UL2 (Tay et al., 2022) has the seven parts given here.",
    )
    z_loss: float = knob(0.0, "Weight of the squared log-normaliser (PaLM uses 1e-4).", at_least=0)
    label_smoothing: float = knob(0.0, "Share of the target's probability spread over the vocabulary.", at_least=0, below=1)
    router_balance_loss: float = knob(
        0.0, "Weight of the experts' load-balancing loss, 1 where the load is even (Switch Transformer uses 0.01).", at_least=0
    )
    router_z_loss: float = knob(0.0, "Weight of the router's squared log-normaliser (ST-MoE uses 0.001).", at_least=0)
    prediction_heads_weight: float = knob(1.0, "Weight of the loss of each of model.prediction_heads but the first.", at_least=0)
    loss_chunk: int = knob(0, "Positions whose logits are held at once in training; 0: chosen from the shapes.", at_least=0)


class Part(NamedTuple):
    """One way in which a document is shown; every objective is a weighted list of them."""

    method: str  # causal, masked, prefix, infill, span
    weight: float = 1.0
    token: str = ""  # stands before the document, UL2's paradigm token; "": none
    span_mean_length: float = 0.0
    span_rate: float = 0.0


# Names that a part of a mixture may have: its method, and the token before the document.
PARTS = {"R": ("span", "[R]"), "X": ("span", "[X]"), "S": ("prefix", "[S]"), "causal": ("causal", ""), "infill": ("infill", "")}


def parts(objective: ObjectiveConfig) -> tuple[Part, ...]:
    """What the objective is made of, one part unless it is a mixture. Raises `UserError` for a part that cannot be read."""
    if objective.name == "mixture":
        return tuple(_part(text) for text in objective.mixture)
    if objective.name == "span":
        return (Part("span", 1.0, "", objective.span_mean_length, objective.span_rate),)
    return (Part(objective.name),)


def _part(text: str) -> Part:
    name, _, weight = text.partition("=")
    name, *numbers = name.split("/")
    wanted = f"objective.mixture has {text!r}, which is none of {', '.join(PARTS)} as in 'R/3/0.15=1' and 'S=1'"
    if name not in PARTS:
        raise UserError(f"{wanted}.")
    method, token = PARTS[name]
    try:
        part = Part(method, float(weight), token, *(float(number) for number in numbers))
    except (ValueError, TypeError):
        raise UserError(f"{wanted}.") from None
    if len(numbers) != (2 if method == "span" else 0):
        raise UserError(f"{wanted}: R and X take a mean length and a rate, the others no number.")
    if not 0 < part.weight < float("inf"):
        raise UserError(f"objective.mixture has {text!r}, whose weight must be above 0.")
    if method == "span" and not (1 <= part.span_mean_length < float("inf") and 0 < part.span_rate < 1):
        raise UserError(f"objective.mixture has {text!r}, but a mean length is at least 1, and a rate above 0 and below 1.")
    return part


def loss_refusal(trained: ObjectiveConfig, asked: ObjectiveConfig) -> str:
    """Why a model trained for one objective has no loss under another, in one sentence; "" where it has.

    It has under what it was trained for, and one that writes text, however it reads what stands before, under both ways to read.
    """
    name = f"objective.name={trained.name}"
    methods, wanted = ({part.method for part in parts(objective)} for objective in (trained, asked))
    if wanted <= methods:
        return ""
    if "masked" in methods | wanted:
        return (
            f"a model trained with {name} has no loss with objective.name={asked.name}: "
            "a masked model predicts a token at its own place, the others the one after it."
        )
    if wanted <= {"causal", "prefix"} and writing_part(trained) is not None:
        return ""
    return f"a model trained with {name} was not trained for objective.name={asked.name}."


def sees_later_tokens(objective: ObjectiveConfig) -> bool:
    """Whether some tokens see tokens behind them."""
    return any(part.method in ("masked", "prefix", "span") for part in parts(objective))


def writing_part(objective: ObjectiveConfig) -> Part | None:
    """The part by which the model goes on with a text, token by token; None where it does not learn to."""
    order = ("prefix", "causal", "infill")
    able = [part for part in parts(objective) if part.method in order]
    return min(able, key=lambda part: order.index(part.method)) if able else None


def sees_prompt_both_ways(objective: ObjectiveConfig) -> bool:
    """Whether the tokens of a prompt that the model goes on with see each other both ways."""
    part = writing_part(objective)
    return part is not None and part.method == "prefix"


def writing_refusal(objective: ObjectiveConfig) -> str:
    """Why the model does not go on with a text, in one sentence that says what it does; "" where it does."""
    if writing_part(objective) is not None:
        return ""
    gaps = "[MASK]" if objective.name == "masked" else "gaps, marked <extra_id_0>, <extra_id_1>, ...,"
    return (
        f"a model trained with objective.name={objective.name} does not write on from a prompt: it fills {gaps} in a text "
        "(gptjax.generate.filling.fill, or a --prompt that has some)."
    )


def check(config: Config) -> None:
    """Raises `UserError` for an objective that contradicts itself, or that the attention, data or sample of the run refuse."""
    objective = config.objective
    name = f"objective.name={objective.name}"
    if not parts(objective):
        raise UserError("objective.mixture is empty; give it parts as 'R/3/0.15=1' and 'S=1'.")
    if objective.mask_token_rate + objective.mask_random_rate > 1 + 1e-9:
        raise UserError(
            f"objective.mask_token_rate={objective.mask_token_rate} and "
            f"objective.mask_random_rate={objective.mask_random_rate} are more than 1 together."
        )
    if sees_later_tokens(objective):
        _check_attention(config, name)
    if config.data.seq_len < SHORTEST and objective.name not in ("causal", "masked", "prefix"):
        raise UserError(
            f"{name} puts tokens of its own into a row, for which data.seq_len={config.data.seq_len} is too short; "
            f"give it {SHORTEST} at least."
        )


# A row that holds a document of some tokens and all that an objective puts beside them.
SHORTEST = 12


def _check_attention(config: Config, name: str) -> None:
    model, context = config.model, config.mesh.context
    backends = [model.attention] if model.attention != "auto" else list(ATTENTION_CAPABILITIES)

    def able(names: list[str], prefix: bool) -> list[str]:
        return [b for b in names if not attention_refusal(model, b, config.data.seq_len, max(context, 1), prefix)]

    if able(backends, True) or not able(backends, False):  # or refused whatever the objective is, elsewhere
        return
    others = able(list(ATTENTION_CAPABILITIES), True)
    if model.attention != "auto" and others:
        raise UserError(
            f"{name} lets tokens see later ones, which model.attention={model.attention} cannot do; {' and '.join(others)} can."
        )
    raise UserError(f"{name} lets tokens see later ones, which no model.attention does over mesh.context={context} parts.")
