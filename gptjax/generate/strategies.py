"""Which way of generating some settings ask for, and all of them behind one call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from gptjax.config import ModelConfig, UserError
from gptjax.generate import beam, contrastive, decode, speculative
from gptjax.generate.asked import Prompts
from gptjax.generate.decode import Generated
from gptjax.generate.settings import GenerationConfig
from gptjax.generate.speculative import Draft


@dataclass(frozen=True)
class Strategy:
    """One entry of the table."""

    generate: Callable[..., Generated]  # with the arguments of decode.generate_tokens
    by_prompt: bool = False  # a prompt is given once, and gives num_return_sequences rows; else it is given for each of them
    by_step: bool = False  # takes guides and on_tokens


STRATEGIES: dict[str, Strategy] = {
    "decoding": Strategy(decode.generate_tokens, by_step=True),
    "beam search": Strategy(beam.generate_tokens, by_prompt=True),
    "contrastive search": Strategy(contrastive.generate_tokens),
    "speculative decoding": Strategy(speculative.generate_tokens),
}


def choose(settings: GenerationConfig, draft: Draft | None = None) -> str:
    """The name in `STRATEGIES` that the settings stand for, as in transformers' GenerationConfig.get_generation_mode.

    Raises `UserError` where they stand for two at once; transformers drops one of them.
    """
    asked = {
        "beam search": f"num_beams={settings.num_beams}" if settings.num_beams > 1 else "",
        "contrastive search": f"penalty_alpha={settings.penalty_alpha}" if settings.penalty_alpha else "",
        "speculative decoding": "a draft model"
        if draft is not None
        else f"prompt_lookup_num_tokens={settings.prompt_lookup_num_tokens}"
        if settings.prompt_lookup_num_tokens
        else "",
    }
    names = [name for name, key in asked.items() if key]
    if len(names) > 1:
        first, second = names[:2]
        raise UserError(
            f"{asked[first]} asks for {first} and {asked[second]} for {second}, which cannot be had together; keep one."
        )
    name = names[0] if names else "decoding"
    if name == "contrastive search" and settings.num_return_sequences > 1:
        raise UserError(
            f"num_return_sequences={settings.num_return_sequences} with penalty_alpha={settings.penalty_alpha}: contrastive "
            "search has one answer to a prompt; set one of them off."
        )
    return name


def generate(
    params: Any,
    config: ModelConfig,
    prompts: Prompts,
    *,
    settings: GenerationConfig,
    seed: int,
    eos_ids: Sequence[int],
    vocab_size: int,
    samples: Sequence[int] | None = None,
    guides: tuple[Any, ...] = (),
    on_tokens: Any = None,
    draft: Draft | None = None,
    prefix: bool = False,
) -> Generated:
    """`settings.num_return_sequences` continuations of each prompt, prompt by prompt, by the strategy of the settings.

    `samples`: one number a row that is returned, by which rows of one prompt differ (None: 0, 1, ... for each prompt); beam
    search takes that of a prompt's first row. `guides` and `on_tokens`: rows are those that are returned, in their order.
    `draft`: (parameters, config) of a smaller model of the same vocabulary. `prefix`: a prompt's tokens see each other both ways;
    raises `UserError` for a strategy that does not show them so. The other arguments as decode.generate_tokens has
    them. Beam search returns `beam.Searched`, speculative decoding `speculative.Speculated`.
    """
    name = choose(settings, draft)
    strategy, each = STRATEGIES[name], settings.num_return_sequences
    if prefix and name != "decoding":
        raise UserError(
            f"{name} does not show a prompt both ways, as the model's objective.name wants it; sample, or decode greedily."
        )
    if samples is None:
        samples = list(range(each)) * len(prompts)
    if len(samples) != each * len(prompts):
        raise ValueError(f"{len(samples)} numbers of samples for {len(prompts)} prompts with {each} rows each")
    if strategy.by_prompt:
        samples = samples[::each]
    else:
        prompts = [prompt for prompt in prompts for _ in range(each)]
    return strategy.generate(
        params,
        config,
        prompts,
        settings=settings,
        seed=seed,
        eos_ids=eos_ids,
        vocab_size=vocab_size,
        samples=samples,
        guides=guides,
        on_tokens=on_tokens,
        **({"draft": draft} if name == "speculative decoding" else {}),
        **({"prefix": True} if prefix else {}),
    )
