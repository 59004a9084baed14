"""A gptjax model as lm-evaluation-harness knows models (extra: harness).

    import lm_eval, gptjax
    from gptjax.harness.lm_eval_model import GptjaxLM
    lm_eval.simple_evaluate(GptjaxLM(gptjax.load("runs/a")), tasks=["lambada_openai"])

Scores are those of its own `hf` model on the same weights. All processes of a run are given all requests and work on each batch
together, so to the harness there is one.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from gptjax.config import UserError
from gptjax.config.adapter import describe_context
from gptjax.generate.chat import ChatTemplate, PlainTemplate
from gptjax.generate.decode import bucket
from gptjax.generate.settings import GenerationConfig
from gptjax.generate.text import generate_text
from gptjax.harness.likelihood import Likelihood

try:
    from lm_eval.api.model import LM
except ImportError as error:
    raise UserError(f"tasks of lm-evaluation-harness need the extra harness: pip install 'gptjax[harness]' ({error}).") from None

NEW_TOKENS = 256  # that are written where a task does not say how many, as the harness' own models do

# What a task may call the number of tokens to write; the first that is given counts.
NEW_TOKEN_NAMES = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")


class GptjaxLM(LM):
    """`model`: what `gptjax.load` gives; `batch_size` rows are worked on at once, which changes no score; `prefix` as
    `Likelihood` has it; `seed` is for tasks that draw texts.
    """

    def __init__(
        self,
        model: Any,
        *,
        batch_size: int = 32,
        prefix: str | None = None,
        seed: int = 0,
        log: Callable[[str], None] | None = None,
    ) -> None:
        super().__init__()
        self.model, self.batch_size, self.seed = model, batch_size, seed
        self.likelihood = Likelihood(model, batch_size=batch_size, prefix=prefix, log=log)
        self._template: ChatTemplate | PlainTemplate | None = None  # the tokenizer's own default

    # --- likelihoods --------------------------------------------------------------------------------------------------------

    def loglikelihood(self, requests: Sequence[Any]) -> list[tuple[float, bool]]:
        pairs = [request.args for request in requests]
        answers = [(scored.total, scored.is_greedy) for scored in self.likelihood.of_pairs(pairs)]
        for pair, answer in zip(pairs, answers, strict=True):
            self.cache_hook.add_partial("loglikelihood", pair, answer)
        return answers

    def loglikelihood_rolling(self, requests: Sequence[Any]) -> list[float]:
        """Each text's log-probability. As in the harness' own models, the begin-of-text token that a model's texts begin with is
        itself predicted, after another one.
        """
        like = self.likelihood
        before = like.before_text()
        found = like.rolling_ids([(before, like.encode(*request.args)) for request in requests])
        for request, scored in zip(requests, found, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, scored.total)
        return [scored.total for scored in found]

    # --- texts --------------------------------------------------------------------------------------------------------------

    def generate_until(self, requests: Sequence[Any]) -> list[str]:
        """The text of each (context, settings) up to the first of its stop strings; contexts are cut from the left so that there
        is room for all new tokens.
        """
        groups: dict[tuple[str, int], list[int]] = {}
        ids, settings = [], []
        for number, request in enumerate(requests):
            context, wanted = request.args
            settings.append(self._settings(wanted))
            room = self.likelihood.max_length - settings[-1].max_new_tokens
            ids.append(self.likelihood.encode(context)[-room:])
            if len(ids[-1]) == 0:
                ids[-1] = self.likelihood.before_text()
            groups.setdefault((repr(settings[-1]), bucket(len(ids[-1]))), []).append(number)
        texts: dict[int, str] = {}
        for numbers in groups.values():
            for start in range(0, len(numbers), self.batch_size):
                members = numbers[start : start + self.batch_size]
                # A power of two, so that the last ones need few compilations.
                rows = min(self.batch_size, 1 << (len(members) - 1).bit_length())
                filled = members + members[:1] * (rows - len(members))
                made = generate_text(
                    self.model.decoding_params, self.model.config, self.model.tokenizer, [ids[number] for number in filled],
                    settings[members[0]], seed=self.seed,
                )  # fmt: skip
                texts |= {number: completion.text for number, completion in zip(members, made, strict=False)}
        for number, request in enumerate(requests):
            self.cache_hook.add_partial("generate_until", request.args, texts[number])
        return [texts[number] for number in range(len(requests))]

    def _settings(self, wanted: Mapping[str, Any]) -> GenerationConfig:
        """What a task's generation_kwargs ask for. Raises `UserError` for what is not known here."""
        values = dict(wanted)
        until = values.pop("until", None) or []
        named = [int(values.pop(name)) for name in NEW_TOKEN_NAMES if values.get(name) is not None]
        count = named[0] if named else NEW_TOKENS
        longest = self.likelihood.max_length
        if count >= longest:
            raise UserError(
                f"max_gen_toks={count}, the tokens that a task writes, must be below {describe_context(self.model.config)}; set "
                "generation_kwargs.max_gen_toks in the task."
            )
        temperature = float(values.pop("temperature", None) or 0.0)
        do_sample = values.pop("do_sample", None)
        draws = temperature > 0 if do_sample is None else bool(do_sample) and temperature > 0
        known = {field.name for field in dataclasses.fields(GenerationConfig)} - {"max_length", "num_return_sequences"}
        if unknown := sorted(values.keys() - known):
            raise UserError(f"generation_kwargs.{unknown[0]} of a task is not a setting of gptjax generate.")
        stops = tuple(text for text in ([until] if isinstance(until, str) else until) if text)
        eos = self._spelt_eos()
        base = GenerationConfig(eos_token_id=self.model.eos_ids)
        return base.replace(
            max_new_tokens=count,
            do_sample=draws,
            **({"temperature": temperature} if draws else {}),
            stop_strings=stops + ((eos,) if eos and eos not in stops else ()),
            **values,
        )

    def _spelt_eos(self) -> str | None:
        """How the end-of-text token is spelt, which ends a text also where the model writes it letter by letter."""
        eos = self.model.tokenizer.eos_id
        return next((name for name, i in self.model.tokenizer.special_tokens().items() if i == eos), None)

    # --- chat templates -----------------------------------------------------------------------------------------------------

    @property
    def tokenizer_name(self) -> str:
        """Names tokenizer and templates in the harness' caches of requests."""
        tokenizer = self.model.tokenizer
        templates = hashlib.sha256(repr(sorted(tokenizer.chat_templates().items())).encode()).hexdigest()
        return f"{tokenizer.kind}-{tokenizer.encoding_fingerprint[:16]}-{templates[:16]}"

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The source of the template that is meant, None for none; and that one is used from here on. Raises `UserError` where
        the tokenizer does not have it.
        """
        if chat_template is False:
            return None
        name = chat_template if isinstance(chat_template, str) else "default"
        self._template = ChatTemplate.of(self.model.tokenizer, name=name)
        return self.model.tokenizer.chat_templates()[name]

    def apply_chat_template(self, chat_history: Sequence[Mapping[str, str]], add_generation_prompt: bool = True) -> str:
        """The conversation as text; without a generation prompt it ends where the last message does, to be gone on with."""
        template = self._template or ChatTemplate.of(self.model.tokenizer)
        text = template.render(chat_history, add_generation_prompt=add_generation_prompt)
        if add_generation_prompt:
            return text
        last = chat_history[-1]["content"].strip()
        return text[: text.rindex(last) + len(last)]
