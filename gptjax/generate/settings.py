"""How text is generated: `GenerationConfig`, its fields named as in Hugging Face's, and the command line's options for them."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import reprlib
import typing
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from gptjax.config import UserError, knob
from gptjax.generate import huggingface_settings

Ids = tuple[int, ...]
Biases = tuple[tuple[Ids, float], ...]


@dataclass(frozen=True)
class GenerationConfig:
    """Settings of one call of `generate`. The defaults draw from the model's own distribution; each strategy is off until set.

    Lists are taken where tuples are declared. Raises `UserError` for a value of the wrong type or out of range, and for settings
    that contradict each other.
    """

    # Length, in tokens.
    max_new_tokens: int = knob(100, "Tokens to write at most.", at_least=0)
    max_length: int = knob(0, "Tokens of prompt and continuation together at most; 0: only max_new_tokens counts.", at_least=0)
    min_new_tokens: int = knob(0, "Tokens to write before the text may end.", at_least=0)
    min_length: int = knob(0, "Tokens of prompt and continuation together before the text may end.", at_least=0)
    eos_token_id: int | Ids | None = knob(None, "Tokens that end the text; none: the tokenizer's; []: no token does.")
    bos_token_id: int | None = knob(None, "Kept for `to_huggingface`; prompts begin with the tokenizer's own.")
    pad_token_id: int | None = knob(None, "Kept for `to_huggingface`; no padding is seen here.")

    # Drawing the next token: processors, in the order of processors.PROCESSORS.
    do_sample: bool = knob(True, "Draw the next token; false, or a temperature of 0: take the most probable.")
    sequence_bias: Biases = knob((), "Pairs of ids and bias: it is added to the last id's logit where the others come before.")
    encoder_repetition_penalty: float = knob(1.0, "Above 1 makes tokens of the prompt likelier, below 1 less likely.", above=0)
    repetition_penalty: float = knob(1.0, "Above 1 makes tokens of prompt and continuation less likely.", above=0)
    presence_penalty: float = knob(0.0, "Taken off the logits of tokens that were written.")
    frequency_penalty: float = knob(0.0, "Taken off the logits of tokens that were written, once for each time.")
    no_repeat_ngram_size: int = knob(0, "No n tokens occur twice in prompt and continuation; 0: off.", at_least=0)
    encoder_no_repeat_ngram_size: int = knob(0, "No n tokens of the prompt occur again; 0: off.", at_least=0)
    bad_words_ids: tuple[Ids, ...] = knob((), "Lists of ids that are never written.")
    forced_bos_token_id: int | None = knob(None, "The second token of all, where the prompt is one token.")
    forced_eos_token_id: int | Ids | None = knob(None, "The last token, where the text does not end before its limit.")
    remove_invalid_values: bool = knob(False, "Replace NaN and infinite logits by finite ones.")
    exponential_decay_length_penalty: tuple[int, float] | None = knob(
        None, "[start, factor]: n tokens past start, the end's logit grows by its size times factor**n - 1."
    )
    suppress_tokens: Ids = knob((), "Ids that are never written.")
    begin_suppress_tokens: Ids = knob((), "Ids that are not written first.")
    forced_prefix_ids: Ids = knob((), "Ids that the continuation begins with.")
    temperature: float = knob(1.0, "Logits are divided by it; 0: take the most probable.", at_least=0)
    top_h: float = knob(0.0, "Keep the most probable tokens that hold this share of the entropy; 0: off.", at_least=0, at_most=1)
    top_k: int = knob(0, "Keep the k most probable tokens; 0: all.", at_least=0)
    top_p: float = knob(1.0, "Keep the most probable tokens that together reach p; 1: all.", above=0, at_most=1)
    min_p: float = knob(0.0, "Keep tokens at least this share as probable as the most probable; 0: all.", at_least=0, at_most=1)
    typical_p: float = knob(1.0, "Keep the most typical tokens that together reach this; 1: all.", above=0, at_most=1)
    epsilon_cutoff: float = knob(0.0, "Keep tokens of at least this probability; 0: all.", at_least=0, below=1)
    eta_cutoff: float = knob(0.0, "The same, with a bound that falls as the entropy rises; 0: all.", at_least=0, below=1)
    renormalize_logits: bool = knob(False, "Log-probabilities are of what the processors left.")

    # Beam search, where num_beams > 1.
    num_beams: int = knob(1, "Beams of beam search; 1: off.", at_least=1)
    num_beam_groups: int = knob(1, "Groups of beams that are kept apart.", at_least=1)
    diversity_penalty: float = knob(0.0, "Taken off a token's score for each earlier group that wrote it here.", at_least=0)
    length_penalty: float = knob(1.0, "A beam's score is its log-probability over its length to this power.")
    early_stopping: bool | str = knob(
        False, "End with num_beams finished; false: by a guess at the best still to come; never: by its bound."
    )

    # Contrastive search, where penalty_alpha > 0 and top_k > 1.
    penalty_alpha: float = knob(
        0.0, "Weight of the likeness to earlier states in contrastive search; 0: off.", at_least=0, at_most=1
    )

    # Speculative decoding, where a draft model is given or prompt_lookup_num_tokens > 0.
    num_assistant_tokens: int = knob(20, "Tokens that a draft model proposes at a time.", at_least=1)
    prompt_lookup_num_tokens: int = knob(0, "Tokens proposed at a time by looking back for the last n-gram; 0: off.", at_least=0)
    max_matching_ngram_size: int = knob(2, "Longest n-gram that is looked for.", at_least=1)

    # What is returned.
    num_return_sequences: int = knob(1, "Samples of each prompt.", at_least=1)
    stop_strings: tuple[str, ...] = knob((), "Strings that end the text.")

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _checked(field, getattr(self, field.name)))
        for contradiction in _contradictions(self):
            raise UserError(contradiction)

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken."""
        return not self.do_sample or self.temperature == 0

    def eos_ids(self, of_tokenizer: int | None) -> Ids:
        """The ids that end a text: `eos_token_id`, or the tokenizer's where that is None."""
        chosen = of_tokenizer if self.eos_token_id is None else self.eos_token_id
        if chosen is None:
            return ()
        return (chosen,) if isinstance(chosen, int) else tuple(sorted(set(chosen)))

    def limits(self, prompt_lengths: np.ndarray) -> np.ndarray:
        """The length, prompt included, at which each row ends. Raises `UserError` for a prompt that leaves no room to go on."""
        limits = prompt_lengths + self.max_new_tokens
        if self.max_length == 0:
            return limits
        for number, length in enumerate(prompt_lengths):
            if length >= self.max_length and self.max_new_tokens:
                raise UserError(
                    f"prompt {number} has {length} tokens, which max_length={self.max_length} leaves no room to follow."
                )
        return np.minimum(limits, self.max_length)

    def replace(self, **changes: Any) -> GenerationConfig:
        """The settings with `changes`; a limit given in new tokens replaces one on the whole length, and the other way round."""
        changes = dict(changes)
        if "max_new_tokens" in changes:
            changes.setdefault("max_length", 0)
        elif changes.get("max_length"):
            changes["max_new_tokens"] = changes["max_length"]
        if "min_new_tokens" in changes:
            changes.setdefault("min_length", 0)
        elif "min_length" in changes:
            changes["min_new_tokens"] = 0
        return dataclasses.replace(self, **changes)

    @classmethod
    def from_huggingface(cls, source: str | os.PathLike[str] | Mapping[str, Any]) -> GenerationConfig:
        """A generation_config.json, its folder, or what it holds; keys that are absent or null have transformers' defaults.

        Raises `UserError`, naming file and key, for a value that is refused, a key that asks for what is not done here, and an
        unknown key.
        """
        values, where = huggingface_settings.read(source)
        try:
            return cls(**huggingface_settings.to_fields(values, [field.name for field in dataclasses.fields(cls)]))
        except UserError as error:
            raise UserError(f"{where}: {error}") from None

    def to_huggingface(self) -> dict[str, Any]:
        """What a generation_config.json of these settings holds. Raises `UserError` for one that transformers does not have."""
        changed = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        changed = {name: value for name, value in changed.items() if value != GenerationConfig.__dataclass_fields__[name].default}
        return huggingface_settings.from_fields(self.max_new_tokens, self.max_length, self.do_sample, self.top_k, changed)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """One option for each setting, --generation_config=FILE for what they are laid over, and --greedy for --do_sample=false."""
    group = parser.add_argument_group("how text is generated", "named as in a Hugging Face generation_config.json")
    group.add_argument("--generation_config", metavar="FILE", help="a generation_config.json, or its folder, to start from")
    group.add_argument("--greedy", action="store_true", help="short for --do_sample=false")
    for field in dataclasses.fields(GenerationConfig):
        if field.name in NO_OPTION:
            continue
        kind = KINDS[HINTS[field.name]]
        meaning = field.metadata["meaning"]
        default = "" if field.default in ((), None) else f" ({json.dumps(field.default)})"
        group.add_argument(
            f"--{field.name}",
            type=_parser_of(kind, field.name),
            metavar=kind.metavar,
            default=argparse.SUPPRESS,
            help=(meaning[0].lower() + meaning[1:].rstrip(".") + default).replace("%", "%%"),
        )


def from_arguments(arguments: argparse.Namespace, base: GenerationConfig | None = None) -> GenerationConfig:
    """What the options of `add_arguments` ask for, over --generation_config, `base` or the defaults: the first that is given."""
    given = {
        field.name: getattr(arguments, field.name) for field in dataclasses.fields(GenerationConfig) if field.name in arguments
    }
    if arguments.greedy:
        if given.get("do_sample"):
            raise UserError("--greedy and --do_sample=true contradict each other; keep one.")
        given["do_sample"] = False
    if arguments.generation_config is not None:
        base = GenerationConfig.from_huggingface(arguments.generation_config)
    return (base or GenerationConfig()).replace(**given)


# Types of the fields.
HINTS = typing.get_type_hints(GenerationConfig)

# Settings that are only carried.
NO_OPTION = frozenset({"bos_token_id", "pad_token_id"})


@dataclass(frozen=True)
class Kind:
    """One type of setting."""

    words: str  # what a value must be
    metavar: str  # a value, in the command line's help
    checked: Callable[[Any], Any]  # a value as its exact type; raises TypeError or ValueError


def _is_int(value: Any) -> int:
    # An integer of 32 bits is what compiled code takes.
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or not -(2**31) <= value < 2**31:
        raise TypeError
    return int(value)


def _is_id(value: Any) -> int:
    if _is_int(value) < 0:
        raise ValueError
    return int(value)


def _is_float(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float, np.number)) or not math.isfinite(value):
        raise TypeError
    return float(value)


def _is_bool(value: Any) -> bool:
    if not isinstance(value, bool):
        raise TypeError
    return value


def _is_str(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError
    return value


def _is_list_of(each: Callable[[Any], Any], at_least: int = 0) -> Callable[[Any], tuple[Any, ...]]:
    def checked(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, (tuple, list, np.ndarray)) or len(value) < at_least:
            raise TypeError
        return tuple(each(item) for item in value)

    return checked


def _is_pair_of(first: Callable[[Any], Any], second: Callable[[Any], Any]) -> Callable[[Any], tuple[Any, Any]]:
    def checked(value: Any) -> tuple[Any, Any]:
        if not isinstance(value, (tuple, list)):
            raise TypeError
        a, b = value
        return first(a), second(b)

    return checked


def _is_id_or_ids(value: Any) -> int | Ids:
    return _is_list_of(_is_id)(value) if isinstance(value, (tuple, list, np.ndarray)) else _is_id(value)


def _is_none_or(checked: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda value: None if value is None else checked(value)


_is_ids = _is_list_of(_is_id)
_is_word = _is_list_of(_is_id, at_least=1)

# By the declared type of a field.
KINDS: dict[Any, Kind] = {
    int: Kind("a whole number below 2**31 in size", "N", _is_int),
    float: Kind("a finite number", "X", _is_float),
    bool: Kind("true or false", "true|false", _is_bool),
    bool | str: Kind("true, false or never", "true|false|never", lambda value: value if value == "never" else _is_bool(value)),
    int | None: Kind("a token's id, or none", "ID", _is_none_or(_is_id)),
    int | Ids | None: Kind("a token's id or a list of them, or none", "ID|[ID,...]", _is_none_or(_is_id_or_ids)),
    Ids: Kind("a list of token ids", "[ID,...]", _is_ids),
    tuple[Ids, ...]: Kind("a list of lists of token ids, none empty", "[[ID,...],...]", _is_list_of(_is_word)),
    tuple[str, ...]: Kind("a list of strings, none empty", '["TEXT",...]', _is_list_of(_is_str)),
    tuple[int, float] | None: Kind(
        "[tokens, factor above 0], or none", "[N,X]", _is_none_or(_is_pair_of(_is_id, lambda value: _positive(_is_float(value))))
    ),
    Biases: Kind(
        "a list of pairs of a list of token ids and a finite number",
        "[[[ID,...],X],...]",
        _is_list_of(_is_pair_of(_is_word, _is_float)),
    ),
}


def _positive(value: float) -> float:
    if value <= 0:
        raise ValueError
    return value


def _parser_of(kind: Kind, name: str) -> Callable[[str], Any]:
    """Reads an option: JSON, where words need no quotes."""

    def parse(text: str) -> Any:
        words = {"none": None, "true": True, "false": False, "never": "never"}
        try:
            return kind.checked(words[text.lower()] if text.lower() in words else json.loads(text))
        except (TypeError, ValueError, RecursionError):
            raise argparse.ArgumentTypeError(f"{name}={reprlib.repr(text)} must be {kind.words}") from None

    return parse


def _checked(field: dataclasses.Field[Any], value: Any) -> Any:
    """`value` as exactly the declared type and within its bounds."""
    kind = KINDS[HINTS[field.name]]
    try:
        value = kind.checked(value)
    except (TypeError, ValueError):
        raise UserError(f"{field.name}={reprlib.repr(value)} must be {kind.words}.") from None
    bounds = field.metadata["bounds"]
    holds = {
        "at_least": lambda bound: value >= bound,
        "above": lambda bound: value > bound,
        "at_most": lambda bound: value <= bound,
        "below": lambda bound: value < bound,
    }
    if not all(holds[name](bound) for name, bound in bounds.items()):
        words = " and ".join(f"{name.replace('_', ' ')} {bound}" for name, bound in bounds.items())
        raise UserError(f"{field.name}={value} must be {words}.")
    return value


def _contradictions(s: GenerationConfig) -> Iterator[str]:
    """One sentence for each pair of settings that cannot both be obeyed."""
    if s.min_new_tokens and s.min_length:
        yield f"min_new_tokens={s.min_new_tokens} and min_length={s.min_length} are both given; keep one."
    if s.min_new_tokens > s.max_new_tokens:
        yield f"min_new_tokens={s.min_new_tokens} is more than max_new_tokens={s.max_new_tokens}."
    if 0 < s.max_length < s.min_length:
        yield f"min_length={s.min_length} is more than max_length={s.max_length}."
    yield from _forced_contradictions(s)
    yield from _strategy_contradictions(s)


def _forced_contradictions(s: GenerationConfig) -> Iterator[str]:
    forced_eos = () if s.forced_eos_token_id is None else s.forced_eos_token_id
    for name, value in (
        ("forced_bos_token_id", () if s.forced_bos_token_id is None else (s.forced_bos_token_id,)),
        ("forced_eos_token_id", (forced_eos,) if isinstance(forced_eos, int) else forced_eos),
    ):
        if value and set(value) <= set(s.suppress_tokens):
            yield f"{name}={getattr(s, name)} is forced, but suppress_tokens rules it out."
    if s.forced_prefix_ids and s.forced_bos_token_id is not None:
        yield "forced_prefix_ids and forced_bos_token_id both say what the text begins with; keep one."
    if len(s.forced_prefix_ids) > s.max_new_tokens:
        yield f"forced_prefix_ids has {len(s.forced_prefix_ids)} ids, more than max_new_tokens={s.max_new_tokens}."


def _strategy_contradictions(s: GenerationConfig) -> Iterator[str]:
    samples = f"num_return_sequences={s.num_return_sequences}"
    if s.num_beams > 1 and s.num_return_sequences > s.num_beams:
        yield f"{samples} is more than num_beams={s.num_beams}."
    if s.num_beams == 1 and s.greedy and s.num_return_sequences > 1:
        yield f"{samples} asks for copies of one text, because the most probable token is always taken; set do_sample=true."
    if s.num_beams % s.num_beam_groups:
        yield f"num_beams={s.num_beams} is not a multiple of num_beam_groups={s.num_beam_groups}."
    if s.num_beam_groups > 1 and s.do_sample:
        yield f"num_beam_groups={s.num_beam_groups} needs do_sample=false: groups of beams are not drawn."
    if (s.diversity_penalty > 0) != (s.num_beam_groups > 1):
        yield f"diversity_penalty={s.diversity_penalty} and num_beam_groups={s.num_beam_groups} go together: above 0 and above 1."
    if s.penalty_alpha > 0:
        if s.do_sample or s.num_beams > 1 or s.top_k < 2:
            yield (
                f"penalty_alpha={s.penalty_alpha}, contrastive search, needs do_sample=false, num_beams=1 and top_k above 1, "
                f"but they are {str(s.do_sample).lower()}, {s.num_beams} and {s.top_k}."
            )
        if s.prompt_lookup_num_tokens:
            yield f"prompt_lookup_num_tokens={s.prompt_lookup_num_tokens} cannot go with penalty_alpha={s.penalty_alpha}."
    if s.prompt_lookup_num_tokens and s.num_beams > 1:
        yield f"prompt_lookup_num_tokens={s.prompt_lookup_num_tokens} cannot go with num_beams={s.num_beams}."
