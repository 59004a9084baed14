"""10,000 prompts of every bad kind: each is answered or refused in one sentence, and what is streamed is what is returned."""

from __future__ import annotations

import dataclasses
import random

import pytest

from gptjax.config import Config, UserError
from gptjax.data import tokenizers
from gptjax.generate.settings import GenerationConfig
from gptjax.generate.text import generate_text, prompt_ids
from tests.generate.small_models import GPT2_LIKE, model_config, random_params
from tests.generate.test_streaming import CORPUS, huggingface, with_prefix

COUNT = 10_000
ROWS = 1000  # in one call; all calls share one compilation
CONTEXT = 48
CONFIG = dataclasses.replace(Config(), model=model_config(max_seq_len=CONTEXT, vocab_size=257, num_layers=1, **GPT2_LIKE))
PARAMS = random_params(CONFIG.model, seed=5)


def fuzzed(rng: random.Random) -> str:
    """As a prompt may come from a command line or a JSON file."""
    kind = rng.randrange(8)
    size = rng.choice([0, 1, 2, 5, 15])
    if kind == 0:  # bytes of an argument that need not be UTF-8
        return rng.randbytes(size).decode(errors="surrogateescape")
    if kind == 1:
        return "".join(rng.choice(["\ud800", "\udfff", "\udc80", "a", "é"]) for _ in range(size))
    if kind == 2:
        return "".join(rng.choice(["\0", "\x1b[2J", "\x7f", "\ufeff", "\u202e", "\ufffd"]) for _ in range(size))
    if kind == 3:
        return rng.choice(["", " ", "\n", "\u2581", "\u2581\u2581 "])
    if kind == 4:
        return rng.choice(["x", "中", "\0", " "]) * rng.randrange(CONTEXT - 3, 300)
    if kind == 5:
        return rng.choice(["<|endoftext|>", "<s>", "</s>", "<0x0A>", "<unk>"]) * rng.randrange(4)
    if kind == 6:
        return "".join(chr(rng.randrange(0x110000)) for _ in range(size))
    return "".join(rng.choice("the quick brown fox 🦙中é\n\t ") for _ in range(size))


@pytest.fixture(scope="module")
def prompts() -> list[str]:
    rng = random.Random(0)
    return [fuzzed(rng) for _ in range(COUNT)]


def refusal(error: UserError) -> str:
    sentence = str(error)
    sentence.encode()  # it can be printed
    assert sentence.endswith(".") and "\n" not in sentence and len(sentence) < 300
    return sentence


def test_each_is_answered_or_refused_and_streams_what_it_returns(prompts):
    tokenizer = tokenizers.ByteTokenizer()
    settings = GenerationConfig(max_new_tokens=8, temperature=1.5, stop_strings=("\n", "ab"))
    accepted, refused = [], []
    for prompt in prompts:
        try:
            prompt_ids(CONFIG, tokenizer, prompt)
            accepted.append(prompt)
        except UserError as error:
            refused.append(refusal(error))
    assert len(accepted) + len(refused) == COUNT and min(len(accepted), len(refused)) > COUNT // 10
    for words in ("half a character", "not UTF-8", "more than model.max_seq_len"):
        assert any(words in line for line in refused)
    # One prompt of nearly the context's length in each call, so that all have one shape.
    ends = set()
    for start in range(0, len(accepted), ROWS - 1):
        rows = ["x" * (CONTEXT - 2), *accepted[start : start + ROWS - 1]]
        rows += ["x"] * (ROWS - len(rows))
        shown = [""] * ROWS

        def show(number: int, text: str, shown: list[str] = shown) -> None:
            shown[number] += text

        completions = generate_text(PARAMS, CONFIG, tokenizer, rows, settings, seed=start, on_text=show)
        for text, completion in zip(shown, completions, strict=True):
            ends.add(completion.finish_reason)
            assert text == completion.text
            assert len(completion.log_probs) == len(completion.tokens) and max(completion.log_probs) <= 0
            whole = tokenizer.decode(completion.tokens)
            cut = min((whole.find(stop) for stop in settings.stop_strings if stop in whole), default=len(whole))
            assert text == whole[:cut] and (cut < len(whole)) == (completion.finish_reason == "stop")
    assert ends == {"eos", "stop", "length"}


@pytest.mark.parametrize("kind", ["char", "sentencepiece", "sentencepiece, space before", "byte-level", "metaspace", "wordpiece"])
def test_every_kind_of_tokenizer_takes_or_refuses_them(prompts, kind):
    tokenizer = {
        "char": lambda: tokenizers.CharTokenizer("the quick brown fox\n "),
        "sentencepiece": lambda: tokenizers.SentencePieceTokenizer(tokenizers.train_sentencepiece(CORPUS, 330)),
        "sentencepiece, space before": lambda: with_prefix(True),
    }.get(kind, lambda: huggingface(kind))()
    taken = 0
    for prompt in prompts:
        try:
            ids = prompt_ids(CONFIG, tokenizer, prompt)
        except UserError as error:
            refusal(error)
            continue
        taken += 1
        assert 0 < len(ids) <= CONTEXT and ids.min() >= 0 and ids.max() < tokenizer.vocab_size
        tokenizer.decode(ids).encode()
    assert 0 < taken < COUNT
