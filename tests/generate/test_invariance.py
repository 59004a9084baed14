"""A row's tokens and bits alone, in batches of any size and order; what a call compiles and dispatches."""

from __future__ import annotations

from typing import Any

import jax
import numpy as np
import pytest

from gptjax.generate import decode, weights
from gptjax.generate.settings import GenerationConfig
from gptjax.model.cache import BLOCK
from tests.generate.small_models import FAMILIES, model_config, random_params

# Either side of a bucket's border and of a block's; new tokens take rows over both.
LENGTHS = (5, 1, 16, 17, BLOCK - 8, 60, BLOCK, BLOCK + 1)
VOCAB, COUNT = 101, 12
CASES = [("gpt2", "float32", ""), ("llama", "bfloat16", ""), ("llama", "float32", "int8"), ("scores", "float32", "")]
KNOBS = FAMILIES | {
    "scores": {
        "attention_score": "additive",
        "position": "t5",
        "attention_sink": "learned",
        "attention_window": 100,
        "attention_sink_tokens": 4,
        "tied_embeddings": False,
    }
}


@pytest.mark.parametrize(("family", "dtype", "kind"), CASES)
def test_a_row_has_the_same_bits_in_any_batch(family: str, dtype: str, kind: str) -> None:
    sizes: dict[str, Any] = {
        "max_seq_len": 256,
        "model_dim": 32,
        "mlp_dim": 48,
        "vocab_size": VOCAB,
        "num_layers": 1,
    }
    config = model_config(**sizes, dtype=dtype, **KNOBS[family])
    params = weights.prepare(random_params(config), config, kind)
    rng = np.random.default_rng(0)
    prompts = [rng.integers(0, VOCAB - 1, length).tolist() for length in LENGTHS]

    def run(numbers: Any, **changes: Any) -> list[tuple[list[int], bytes]]:
        """(ids, bits of the log-probabilities) of requests by number: prompts come round again as other samples."""
        settings = GenerationConfig(**{"max_new_tokens": COUNT, "temperature": 1.1, "top_p": 0.9} | changes)
        made = decode.generate_tokens(
            params,
            config,
            [prompts[n % len(prompts)] for n in numbers],
            settings=settings,
            seed=3,
            eos_ids=(7,),
            vocab_size=VOCAB - 1,
            samples=[int(n) for n in numbers],
        )
        return [(ids.tolist(), bits.tobytes()) for ids, bits in zip(made.tokens, made.log_probs, strict=True)]

    # As long as the batch allows: 16, 128 and 256 are the buckets of these prompts.
    alone = {number: run([number])[0] for number in (0, 4, 7)}
    assert len({str(row) for row in alone.values()}) == 3
    for size in (3, 8, 32):
        numbers = rng.permutation([0, 7, 4] if size == 3 else size)
        rows = dict(zip(numbers.tolist(), run(numbers), strict=True))
        assert {number: rows[number] for number in alone} == alone, size


def test_greedy_rows_have_the_same_bits_too() -> None:
    config = model_config(max_seq_len=64, model_dim=32, num_layers=1, **FAMILIES["llama"])
    params = random_params(config)
    prompts = [list(range(1, length)) for length in (2, 9, 16, 17, 30)]
    options: Any = {"settings": GenerationConfig(COUNT, do_sample=False), "seed": 0, "eos_ids": (), "vocab_size": 37}
    together = decode.generate_tokens(params, config, prompts, **options)
    for number in (0, 4):
        alone = decode.generate_tokens(params, config, [prompts[number]], **options)
        assert alone.tokens[0].tolist() == together.tokens[number].tolist()
        assert alone.log_probs[0].tobytes() == together.log_probs[number].tobytes()


def test_fifty_lengths_are_one_compilation_and_each_request_one_dispatch(monkeypatch: pytest.MonkeyPatch) -> None:
    config = model_config(max_seq_len=128, num_layers=1, vocab_size=41)  # of this test alone, so that it does compile
    params = weights.prepare(random_params(config), config)
    compiled: list[str] = []

    def listen(event: str, seconds: float, **labels: Any) -> None:
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(event)

    calls: list[tuple[Any, ...]] = []
    whole = decode.compiled_generate

    def count(*arguments: Any) -> Any:
        calls.append(arguments)
        return whole(*arguments)

    monkeypatch.setattr(decode, "compiled_generate", count)
    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        for length in range(65, 115):
            prompts = [[1] * length, [2] * (length - 60)]
            made = decode.generate_tokens(
                params, config, prompts, settings=GenerationConfig(8), seed=length, eos_ids=(), vocab_size=41
            )
            assert made.num_new.tolist() == [8, 8]
            assert len(calls) == length - 64, "one dispatch a request"
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)
    assert len(compiled) == 1, "fifty requests, one compilation of anything"
