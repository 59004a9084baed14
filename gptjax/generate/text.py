"""Text in, text out."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from gptjax.config import Config, UserError
from gptjax.config.adapter import context_of, describe_context
from gptjax.config.adapter import writing_refusal as adapter_refusal
from gptjax.config.objective import sees_prompt_both_ways, writing_part, writing_refusal
from gptjax.data.tokenizer_base import refuse_half_characters
from gptjax.generate import forward, strategies
from gptjax.generate.automata import TokenAutomaton, regex_automaton, schema_automaton
from gptjax.generate.chat import ChatTemplate
from gptjax.generate.decode import Generated
from gptjax.generate.guiding import language_guides, stop_guides
from gptjax.generate.settings import GenerationConfig
from gptjax.generate.speculative import Draft
from gptjax.generate.streaming import TextStream
from gptjax.generate.timing import Speed, Stopwatch
from gptjax.parallel.mesh import make_mesh
from gptjax.parallel.sharding import laid_over


class Tokenizer(Protocol):
    """What generation needs of a tokenizer."""

    vocab_size: int
    bos_id: int | None
    eos_id: int | None

    def encode(self, text: str) -> np.ndarray: ...

    def decode(self, ids: Any) -> str: ...

    def vocabulary(self) -> Sequence[bytes | None]: ...


class Model(Protocol):
    """What `generate` needs of a model; `gptjax.load` gives one."""

    @property
    def config(self) -> Config: ...

    @property
    def decoding_params(self) -> Any: ...

    @property
    def tokenizer(self) -> Any: ...

    @property
    def eos_ids(self) -> tuple[int, ...] | None: ...


# A text; its ids; or a conversation, as [{"role": "user", "content": "..."}], for the chat template.
Prompt = str | Sequence[int] | np.ndarray | Sequence[Mapping[str, Any]]

# Called with the number of a completion in the list that is returned, and the text that is new.
OnText = Callable[[int, str], None]


@dataclass(frozen=True)
class Completion:
    """One sample of one prompt."""

    prompt: str
    sample: int  # 0 .. num_return_sequences - 1
    text: str  # the continuation, without the prompt, the end-of-text token and the stop string
    tokens: tuple[int, ...]  # the new tokens, the end-of-text token or what completed the stop string included
    finish_reason: str  # 'eos': it ended by itself; 'stop': a stop string or a guide ended it; 'length': no room was left
    log_probs: tuple[float, ...] = ()  # of each token under the model's own distribution


def generate(
    model: Model,
    prompts: Prompt | Sequence[Prompt],
    *,
    seed: int = 0,
    stream: OnText | None = None,
    chat_template: str | None = None,
    speed: Speed | None = None,
    regex: str | None = None,
    json_schema: Any = None,
    draft: Model | None = None,
    **settings: Any,
) -> list[Completion]:
    """Continues each of `prompts`, or the one: `gptjax.generate(model, "Once", max_new_tokens=20, temperature=0.8)`.

    `settings` are the fields of `GenerationConfig`. `stream` is called as `stream(number of the completion, new text)` while the
    tokens are drawn; what it was given is in the end the completion's text. `chat_template`: Jinja source in place of the
    tokenizer's own, for prompts that are conversations. To `speed` is added what the call took. `regex`, `json_schema`: every
    text matches the whole expression (regex.py), or is JSON valid under the schema (json_schema.py). `draft`: a smaller model of
    the same vocabulary, whose guesses speed the text up without changing its distribution.

    Returns `num_return_sequences` completions of each prompt, prompt by prompt. Raises `UserError` for what a person can mend.
    """
    is_one = isinstance(prompts, str) or (len(prompts) > 0 and isinstance(prompts[0], (int, np.integer, Mapping)))
    each: list[Any] = [prompts] if is_one else list(prompts)
    ids = [prompt_ids(model.config, model.tokenizer, prompt, chat_template) for prompt in each]
    chosen = GenerationConfig(eos_token_id=model.eos_ids).replace(**settings)
    return generate_text(
        model.decoding_params, model.config, model.tokenizer, ids, chosen, seed=seed, on_text=stream, speed=speed,
        texts=[prompt if isinstance(prompt, str) else None for prompt in each],
        language=language_of(model, regex, json_schema, chosen),
        draft=None if draft is None else as_draft(draft),
    )  # fmt: skip


def as_draft(model: Model) -> Draft:
    """A model as speculative decoding takes it for the smaller one."""
    return model.decoding_params, forward.within(model.config.model, model.decoding_params)


def language_of(model: Model, regex: str | None, json_schema: Any, settings: GenerationConfig) -> TokenAutomaton | None:
    """What the texts are to be held to; None where nothing is asked for. Raises `UserError`."""
    if regex is None and json_schema is None:
        return None
    if regex is not None and json_schema is not None:
        raise UserError("a regular expression and a JSON schema are both given; keep one.")
    options = (model.tokenizer, model.config.model.vocab_size, settings.eos_ids(model.tokenizer.eos_id))
    return regex_automaton(regex, *options) if regex is not None else schema_automaton(json_schema, *options)


def generate_text(
    params: Any,
    config: Config,
    tokenizer: Tokenizer,
    prompts: Sequence[str | np.ndarray],
    settings: GenerationConfig,
    *,
    seed: int = 0,
    on_text: OnText | None = None,
    speed: Speed | None = None,
    texts: Sequence[str | None] | None = None,
    language: TokenAutomaton | None = None,
    draft: Draft | None = None,
    both_ways: bool | None = None,
) -> list[Completion]:
    """`settings.num_return_sequences` continuations of each prompt, prompt by prompt, drawn in one compiled call.

    A prompt begins with the begin-of-text token where `data.add_bos` is set and the tokenizer has one, as training documents do;
    one that is given as ids is taken as it is, and `texts` may tell how it reads. Sample i of a prompt is the same whatever other
    prompts and however many samples are asked for. `on_text` hears each completion's text as it is settled.
    `language`: what the texts are held to (automata.py); `draft`: a smaller model for speculative decoding; `both_ways`: whether
    the tokens of a prompt see each other both ways (None: as the model learnt to go on with a text).
    Raises `UserError` for a prompt that is too long, no text or, without a begin-of-text token, empty, and for a model whose
    objective does not go on with texts.
    """
    if both_ways is None and (refusal := writing_refusal(config.objective)):
        raise UserError(refusal)
    both_ways = sees_prompt_both_ways(config.objective) if both_ways is None else both_ways
    if refusal := adapter_refusal(config, both_ways):
        raise UserError(f"the model writes no text: {refusal}.")
    ids = [prompt_ids(config, tokenizer, prompt) if isinstance(prompt, str) else prompt for prompt in prompts]
    read = [text if text is not None else prompt for text, prompt in zip(texts or [None] * len(ids), prompts, strict=True)]
    shown = [text if isinstance(text, str) else tokenizer.decode(text) for text in read]
    requests = [(prompt, sample) for prompt in range(len(prompts)) for sample in range(settings.num_return_sequences)]
    eos_ids = settings.eos_ids(tokenizer.eos_id)
    streams = [TextStream(tokenizer, ids[prompt], settings.stop_strings) for prompt, _ in requests]
    hear = functools.partial(_show, streams, eos_ids, on_text) if on_text else None
    mesh = make_mesh(config.mesh)
    with laid_over(mesh, config.mesh) if mesh.size > 1 else contextlib.nullcontext():
        generated = _draw(params, config, tokenizer, ids, settings, seed, hear, speed, language, draft, both_ways)
    completions = []
    for i, (stream, new, stopped) in enumerate(zip(streams, generated.tokens, generated.stopped, strict=True)):
        body = new[:-1] if stopped else new
        text = "".join(stream.feed(token) for token in body[stream.fed :]) + stream.finish()
        if on_text and text:
            on_text(i, text)
        tokens = stream.tokens if stream.is_stopped else tuple(int(token) for token in new)
        ended = "stop" if stream.is_stopped or generated.guided[i] else "eos" if stopped else "length"
        log_probs = tuple(float(value) for value in generated.log_probs[i][: len(tokens)])
        prompt, sample = requests[i]
        completions.append(Completion(shown[prompt], sample, stream.text, tokens, ended, log_probs))
    return completions


def _draw(
    params: Any,
    config: Config,
    tokenizer: Tokenizer,
    prompts: Sequence[np.ndarray],
    settings: GenerationConfig,
    seed: int,
    hear: Callable[[np.ndarray, np.ndarray], None] | None,
    speed: Speed | None,
    language: TokenAutomaton | None,
    draft: Draft | None,
    both_ways: bool,
) -> Generated:
    """The one call that draws all tokens, by the strategy of the settings."""
    model = forward.within(config.model, params)
    options: dict[str, Any] = {
        "settings": settings,
        "seed": seed,
        "eos_ids": settings.eos_ids(tokenizer.eos_id),
        "vocab_size": tokenizer.vocab_size,
        "draft": draft,
        "prefix": both_ways,
    }
    name = strategies.choose(settings, draft)
    if not strategies.STRATEGIES[name].by_step:  # its texts come whole, and are cut at stop strings when they are there
        if language is not None:
            raise UserError(f"{name} cannot be held to a regular expression or a JSON schema; sample, or decode greedily.")
        if settings.stop_strings and name == "beam search":
            raise UserError(
                f"stop_strings={list(settings.stop_strings)}: beam search scores whole texts, and does not stop at them."
            )
        with Stopwatch(speed or Speed(), 0) as watch:
            generated = strategies.generate(params, model, prompts, **options)
            watch.drew(int(generated.num_new.sum()))
        return generated
    rows = len(prompts) * settings.num_return_sequences
    stops = stop_guides(tokenizer, settings.stop_strings, rows, config.model.vocab_size)
    options["guides"] = (*language_guides(language, rows, settings.max_new_tokens), *stops)
    if speed is None:
        return strategies.generate(params, model, prompts, on_tokens=hear, **options)
    with Stopwatch(speed, settings.num_return_sequences * sum(len(prompt) for prompt in prompts)) as watch:

        def on_tokens(tokens_B: np.ndarray, alive_B: np.ndarray) -> None:
            watch.hear(alive_B)
            if hear:
                hear(tokens_B, alive_B)

        return strategies.generate(params, model, prompts, on_tokens=on_tokens, **options)


def _show(streams: list[TextStream], eos_ids: Sequence[int], on_text: OnText, tokens_B: np.ndarray, alive_B: np.ndarray) -> None:
    """Tells of the text that one step settles."""
    for i, (stream, token, alive) in enumerate(zip(streams, tokens_B, alive_B, strict=True)):
        if alive and token not in eos_ids and (text := stream.feed(token)):
            on_text(i, text)


def _after_paradigm(config: Config, tokenizer: Any, ids: np.ndarray) -> np.ndarray:
    """Behind the token that told the model in training to go on with a text, where it has one."""
    part = writing_part(config.objective)
    number = tokenizer.token_id(part.token) if part is not None and part.token else None
    return ids if number is None else np.concatenate([np.array([number], np.int32), ids])


def prompt_ids(config: Config, tokenizer: Any, prompt: Prompt, chat_template: str | None = None) -> np.ndarray:
    """int32 ids of a prompt. Raises `UserError` where it is empty, too long, no text, or a conversation without a template."""
    if isinstance(prompt, str):
        refuse_half_characters(prompt)
        ids = np.asarray(tokenizer.encode(prompt), np.int32)
        if config.data.add_bos and tokenizer.bos_id is not None:
            ids = np.concatenate([np.array([tokenizer.bos_id], np.int32), ids])
        ids = _after_paradigm(config, tokenizer, ids)
    elif len(prompt) and isinstance(prompt[0], Mapping):
        ids = ChatTemplate.of(tokenizer, chat_template).encode(prompt, config.data.add_bos)  # type: ignore[arg-type]
    else:
        ids = np.asarray(prompt, np.int32)
    if len(ids) == 0:
        raise UserError(
            "the prompt is empty, and there is no begin-of-text token to start from; give a prompt of at least one character."
        )
    if len(ids) > context_of(config):
        raise UserError(f"the prompt has {len(ids)} tokens, more than {describe_context(config)}, the model's limit.")
    return ids
