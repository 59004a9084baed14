"""How text is generated: `GenerationConfig`, its fields named as in Hugging Face's."""

from __future__ import annotations

import math
from dataclasses import dataclass

from gptjax.config import UserError


@dataclass(frozen=True)
class GenerationConfig:
    """Settings of one call of `generate`. The defaults draw from the model's own distribution; each strategy is off until set."""

    # Length, in tokens.
    max_new_tokens: int = 100
    min_new_tokens: int = 0  # no end-of-text token before

    # Drawing the next token, in the order of processors.PROCESSORS.
    do_sample: bool = True  # False, or a temperature of 0: the most probable token
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    no_repeat_ngram_size: int = 0
    bad_words_ids: tuple[tuple[int, ...], ...] = ()
    suppress_tokens: tuple[int, ...] = ()
    begin_suppress_tokens: tuple[int, ...] = ()
    forced_bos_token_id: int | None = None
    forced_eos_token_id: int | None = None
    temperature: float = 1.0  # logits are divided by it
    top_k: int = 0  # only the k most probable tokens; 0: all
    top_p: float = 1.0  # only the most probable tokens that together reach p; 1: all
    min_p: float = 0.0
    typical_p: float = 1.0

    # Beam search, where num_beams > 1.
    num_beams: int = 1
    num_beam_groups: int = 1
    diversity_penalty: float = 0.0
    length_penalty: float = 1.0
    early_stopping: bool | str = False  # True, False or "never"

    # Contrastive search, where penalty_alpha > 0 and top_k > 1.
    penalty_alpha: float = 0.0

    # Speculative decoding, where a draft model is given or prompt_lookup_num_tokens > 0.
    num_assistant_tokens: int = 20
    prompt_lookup_num_tokens: int = 0
    max_matching_ngram_size: int = 2

    # What is returned.
    num_return_sequences: int = 1
    stop_strings: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            raise UserError(f"temperature={self.temperature} must be a finite number, at least 0.")
        if not 0 <= self.top_k < 2**31:
            raise UserError(f"top_k={self.top_k} must be at least 0 (0: all tokens).")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p={self.top_p} must be above 0 and at most 1 (1: all tokens).")
        if self.max_new_tokens < 0:
            raise UserError(f"max_new_tokens={self.max_new_tokens} must be at least 0.")
        if self.num_return_sequences < 1:
            raise UserError(f"num_return_sequences={self.num_return_sequences} must be at least 1.")

    @property
    def greedy(self) -> bool:
        """Whether the most probable token is taken."""
        return not self.do_sample or self.temperature == 0
