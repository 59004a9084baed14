"""Generation's settings: their checks, generation_config.json in and out, the command line."""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
from typing import Any

import numpy as np
import pytest

from gptjax.config import UserError
from gptjax.generate.settings import GenerationConfig, add_arguments, from_arguments

EVERY_FIELD = {
    "max_length": 30,
    "min_new_tokens": 2,
    "eos_token_id": [3, 4],
    "bos_token_id": 1,
    "pad_token_id": 0,
    "do_sample": True,
    "sequence_bias": [[[1, 2], -1.5], [[3], 2.0]],
    "encoder_repetition_penalty": 1.1,
    "repetition_penalty": 1.2,
    "no_repeat_ngram_size": 3,
    "encoder_no_repeat_ngram_size": 2,
    "bad_words_ids": [[5], [6, 7]],
    "forced_bos_token_id": 8,
    "forced_eos_token_id": [3],
    "remove_invalid_values": True,
    "exponential_decay_length_penalty": [4, 1.5],
    "suppress_tokens": [9],
    "begin_suppress_tokens": [10, 11],
    "temperature": 0.7,
    "top_h": 0.4,
    "top_k": 12,
    "top_p": 0.9,
    "min_p": 0.05,
    "typical_p": 0.8,
    "epsilon_cutoff": 0.0003,
    "eta_cutoff": 0.0004,
    "renormalize_logits": True,
    "num_beams": 4,
    "length_penalty": 0.5,
    "early_stopping": "never",
    "num_assistant_tokens": 5,
    "max_matching_ngram_size": 4,
    "num_return_sequences": 2,
    "stop_strings": ["\n\n", "END"],
}


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 must be at least 0."),
        ({"temperature": float("nan")}, "temperature=nan must be a finite number."),
        ({"temperature": "1"}, "temperature='1' must be a finite number."),
        ({"top_k": -1}, "top_k=-1 must be at least 0."),
        ({"top_k": 1.5}, "top_k=1.5 must be a whole number"),
        ({"top_k": 2**31}, "top_k=2147483648 must be a whole number below 2..31 in size."),
        ({"top_k": True}, "top_k=True must be a whole number"),
        ({"top_p": 0.0}, "top_p=0.0 must be above 0 and at most 1."),
        ({"top_p": 1.1}, "top_p=1.1 must be above 0 and at most 1."),
        ({"eta_cutoff": 1}, "eta_cutoff=1.0 must be at least 0 and below 1."),
        ({"max_new_tokens": -1}, "max_new_tokens=-1 must be at least 0."),
        ({"num_return_sequences": 0}, "num_return_sequences=0 must be at least 1."),
        ({"repetition_penalty": 0}, "repetition_penalty=0.0 must be above 0."),
        ({"do_sample": 1}, "do_sample=1 must be true or false."),
        ({"early_stopping": "soon"}, "early_stopping='soon' must be true, false or never."),
        ({"suppress_tokens": [-1]}, r"suppress_tokens=\[-1\] must be a list of token ids."),
        ({"suppress_tokens": 3}, "suppress_tokens=3 must be a list of token ids."),
        ({"bad_words_ids": [[1], []]}, "bad_words_ids=.* must be a list of lists of token ids, none empty."),
        ({"stop_strings": [""]}, "stop_strings=.* must be a list of strings, none empty."),
        ({"sequence_bias": [[[1], "x"]]}, "sequence_bias=.* must be a list of pairs"),
        ({"sequence_bias": [[[1], 1.0, 2]]}, "sequence_bias=.* must be a list of pairs"),
        ({"sequence_bias": [[[1], float("-inf")]]}, "sequence_bias=.* must be a list of pairs"),
        ({"exponential_decay_length_penalty": [1]}, r"exponential_decay_length_penalty=\[1\] must be \[tokens, factor above 0\]"),
        ({"exponential_decay_length_penalty": [1, 0]}, "exponential_decay_length_penalty=.* factor above 0"),
        ({"eos_token_id": "x"}, "eos_token_id='x' must be a token's id or a list of them, or none."),
        ({"min_new_tokens": 2, "min_length": 3}, "min_new_tokens=2 and min_length=3 are both given"),
        ({"min_new_tokens": 101}, "min_new_tokens=101 is more than max_new_tokens=100"),
        ({"min_length": 9, "max_length": 8}, "min_length=9 is more than max_length=8"),
        ({"forced_bos_token_id": 3, "suppress_tokens": [3]}, "forced_bos_token_id=3 is forced, but suppress_tokens"),
        ({"forced_eos_token_id": [3, 4], "suppress_tokens": [3, 4]}, r"forced_eos_token_id=\(3, 4\) is forced"),
        ({"forced_bos_token_id": 3, "forced_prefix_ids": [3]}, "both say what the text begins with"),
        ({"forced_prefix_ids": [3] * 4, "max_new_tokens": 3}, "forced_prefix_ids has 4 ids, more than max_new_tokens=3"),
        ({"num_return_sequences": 3, "do_sample": False}, "num_return_sequences=3 asks for copies"),
        ({"num_return_sequences": 3, "num_beams": 2}, "num_return_sequences=3 is more than num_beams=2"),
        ({"num_beams": 3, "num_beam_groups": 2}, "num_beams=3 is not a multiple of num_beam_groups=2"),
        ({"num_beams": 4, "num_beam_groups": 2, "diversity_penalty": 1}, "num_beam_groups=2 needs do_sample=false"),
        ({"num_beams": 4, "num_beam_groups": 2, "do_sample": False}, "diversity_penalty=0.0 and num_beam_groups=2 go together"),
        ({"diversity_penalty": 1}, "diversity_penalty=1.0 and num_beam_groups=1 go together"),
        ({"penalty_alpha": 0.5, "top_k": 4}, "penalty_alpha=0.5, contrastive search, needs do_sample=false"),
        ({"penalty_alpha": 0.5, "do_sample": False, "top_k": 1}, "top_k above 1, but they are false, 1 and 1"),
        ({"prompt_lookup_num_tokens": 3, "num_beams": 2}, "prompt_lookup_num_tokens=3 cannot go with num_beams=2"),
    ],
)
def test_what_cannot_be_obeyed_is_refused_in_a_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence) as caught:
        GenerationConfig(**changes)
    assert "\n" not in str(caught.value) and str(caught.value).endswith(".")


def test_lists_and_numpy_numbers_become_what_is_declared() -> None:
    settings = GenerationConfig(
        bad_words_ids=[[1, np.int32(2)]], top_k=np.int64(3), top_p=np.float32(0.5), eos_token_id=np.array([4, 5]), temperature=2
    )
    assert settings == GenerationConfig(bad_words_ids=((1, 2),), top_k=3, top_p=0.5, eos_token_id=(4, 5), temperature=2.0)
    assert len({settings, dataclasses.replace(settings)}) == 1, "they are hashable"


def test_the_end_is_the_tokenizers_unless_it_is_given() -> None:
    assert GenerationConfig().eos_ids(7) == (7,) and GenerationConfig().eos_ids(None) == ()
    assert GenerationConfig(eos_token_id=0).eos_ids(7) == (0,)
    assert GenerationConfig(eos_token_id=[9, 3, 9]).eos_ids(7) == (3, 9)
    assert GenerationConfig(eos_token_id=[]).eos_ids(7) == ()


def test_limits_of_rows() -> None:
    lengths = np.array([3, 9])
    assert GenerationConfig(max_new_tokens=5).limits(lengths).tolist() == [8, 14]
    assert GenerationConfig(max_new_tokens=5, max_length=10).limits(lengths).tolist() == [8, 10]
    with pytest.raises(UserError, match="prompt 1 has 9 tokens, which max_length=9 leaves no room to follow"):
        GenerationConfig(max_length=9).limits(lengths)


def test_a_limit_in_new_tokens_and_one_on_the_whole_length_replace_each_other() -> None:
    whole = GenerationConfig(max_new_tokens=30, max_length=30, min_length=4)
    assert whole.replace(max_new_tokens=5) == GenerationConfig(max_new_tokens=5, min_length=4)
    assert whole.replace(max_length=50) == GenerationConfig(max_new_tokens=50, max_length=50, min_length=4)
    assert whole.replace(max_length=0) == GenerationConfig(max_new_tokens=30, min_length=4)
    assert whole.replace(min_new_tokens=3) == GenerationConfig(max_new_tokens=30, max_length=30, min_new_tokens=3)
    assert whole.replace(min_new_tokens=3).replace(min_length=4) == whole


def test_absent_and_null_keys_take_transformers_defaults(tmp_path: pathlib.Path) -> None:
    expected = GenerationConfig(do_sample=False, top_k=50, max_new_tokens=20)
    # As transformers 4 writes for GPT-2, and as transformers 5 may.
    for values in (
        {"_from_model_config": True, "bos_token_id": None, "transformers_version": "4.26.0"},
        dict.fromkeys([field.name for field in dataclasses.fields(GenerationConfig)]) | {"use_cache": True, "max_time": None},
    ):
        (tmp_path / "generation_config.json").write_text(json.dumps(values))
        assert GenerationConfig.from_huggingface(tmp_path) == expected
        assert GenerationConfig.from_huggingface(str(tmp_path / "generation_config.json")) == expected
        assert GenerationConfig.from_huggingface(values) == expected


def test_a_published_file_loads_as_it_is() -> None:
    # The keys of Llama 3.1's, and some of older ones.
    values = {"bos_token_id": 128000, "do_sample": True, "eos_token_id": [128001, 128008, 128009], "temperature": 0.6}
    values |= {
        "max_length": 4096,
        "top_p": 0.9,
        "transformers_version": "4.43.0.dev0",
        "guidance_scale": 1.0,
    }
    assert GenerationConfig.from_huggingface(values) == GenerationConfig(
        do_sample=True,
        eos_token_id=(128001, 128008, 128009),
        temperature=0.6,
        top_p=0.9,
        top_k=50,
        bos_token_id=128000,
        max_new_tokens=4096,
        max_length=4096,
    )


def test_new_tokens_go_before_lengths_and_the_older_forms_are_read() -> None:
    got = GenerationConfig.from_huggingface(
        {
            "max_length": 9,
            "max_new_tokens": 7,
            "min_length": 3,
            "min_new_tokens": 2,
            "stop_strings": "END",
            "sequence_bias": {"(1, 2)": 0.5, "(3,)": -1.0},
        }
    )
    expected = GenerationConfig(max_new_tokens=7, min_new_tokens=2, stop_strings=("END",), do_sample=False, top_k=50)
    assert got == dataclasses.replace(expected, sequence_bias=(((1, 2), 0.5), ((3,), -1.0)))


def test_all_that_a_file_can_say_survives_the_round_trip() -> None:
    settings = GenerationConfig.from_huggingface(EVERY_FIELD)
    assert settings.to_huggingface() == EVERY_FIELD
    assert GenerationConfig.from_huggingface(settings.to_huggingface()) == settings
    for settings in (
        GenerationConfig(),
        GenerationConfig(do_sample=False, num_beams=4, num_beam_groups=2, diversity_penalty=0.5),
    ):
        assert GenerationConfig.from_huggingface(json.loads(json.dumps(settings.to_huggingface()))) == settings


@pytest.mark.parametrize(
    ("values", "sentence"),
    [
        ({"guidance_scale": 1.5}, "guidance_scale=1.5 asks for what gptjax does not do; leave it out."),
        ({"watermarking_config": {"bias": 2.0}}, "watermarking_config=.* asks for what gptjax does not do"),
        ({"max_time": 3}, "max_time=3 asks for"),
        ({"top_kk": 3}, "unknown key top_kk; did you mean top_k?"),
        ({"qqqq": 3}, "unknown key qqqq."),
        ({"top_k": -3}, "top_k=-3 must be at least 0."),
        ({"sequence_bias": {"(1, x)": 0.5}}, "sequence_bias=.* must be a list of pairs"),
        ({"sequence_bias": [5]}, "sequence_bias=.* must be a list of pairs"),
    ],
)
def test_a_file_that_asks_for_what_is_not_there_is_refused(tmp_path: pathlib.Path, values: dict[str, Any], sentence: str) -> None:
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=sentence) as caught:
        GenerationConfig.from_huggingface(path)
    assert str(path) in str(caught.value)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\xff", "[" * 100_000])
def test_a_file_that_is_no_object_is_refused(tmp_path: pathlib.Path, text: str) -> None:
    path = tmp_path / "generation_config.json"
    path.write_bytes(text.encode("latin-1"))
    with pytest.raises(UserError, match="generation_config.json"):
        GenerationConfig.from_huggingface(path)
    with pytest.raises(UserError, match="does not exist"):
        GenerationConfig.from_huggingface(tmp_path / "other.json")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"presence_penalty": 0.5}, "presence_penalty=0.5 has no counterpart"),
        ({"max_new_tokens": 5, "max_length": 9}, "max_new_tokens=5 and max_length=9 cannot both stand"),
    ],
)
def test_what_transformers_does_not_have_is_not_written(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(UserError, match=sentence):
        GenerationConfig(**changes).to_huggingface()


def parsed(*options: str, base: GenerationConfig | None = None) -> GenerationConfig:
    parser = argparse.ArgumentParser(allow_abbrev=False, exit_on_error=False)
    add_arguments(parser)
    return from_arguments(parser.parse_args(options), base)


def test_every_setting_is_an_option() -> None:
    fields = {name: value for name, value in EVERY_FIELD.items() if name not in ("bos_token_id", "pad_token_id")}
    expected = GenerationConfig(**fields, max_new_tokens=30)
    options = [f"--{name}={value if isinstance(value, str) else json.dumps(value)}" for name, value in fields.items()]
    assert parsed(*options) == expected
    named = {field.name for field in dataclasses.fields(GenerationConfig)} - {"bos_token_id", "pad_token_id"}
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    assert {action.dest for action in parser._actions} == named | {"help", "greedy", "generation_config"}
    assert "no n tokens occur twice" in " ".join(parser.format_help().split())


def test_options_lie_over_a_file_or_a_base(tmp_path: pathlib.Path) -> None:
    (tmp_path / "generation_config.json").write_text(
        '{"max_length": 40, "temperature": 0.5, "do_sample": true, "eos_token_id": 3}'
    )
    base = GenerationConfig(top_p=0.5)
    assert parsed() == GenerationConfig()
    assert parsed(base=base) == base
    assert parsed("--top_k=3", base=base) == GenerationConfig(top_p=0.5, top_k=3)
    from_file = parsed(f"--generation_config={tmp_path}", "--max_new_tokens=6", "--eos_token_id=none", base=base)
    assert from_file == GenerationConfig(max_new_tokens=6, temperature=0.5, top_k=50)


def test_greedy_is_short_for_do_sample_false() -> None:
    assert parsed("--greedy") == parsed("--do_sample=false") == parsed("--do_sample=False") == GenerationConfig(do_sample=False)
    with pytest.raises(UserError, match="--greedy and --do_sample=true"):
        parsed("--greedy", "--do_sample=true")


@pytest.mark.parametrize(
    ("option", "sentence"),
    [
        ("--top_k=x", "top_k='x' must be a whole number"),
        ("--top_k=1.5", "top_k='1.5' must be a whole number"),
        ("--do_sample=yes", "do_sample='yes' must be true or false"),
        ("--bad_words_ids=1,2", "bad_words_ids='1,2' must be a list of lists of token ids"),
        ("--suppress_tokens=" + "[" * 100_000, "suppress_tokens=.* must be a list of token ids"),
    ],
)
def test_an_option_of_the_wrong_type_is_named(option: str, sentence: str) -> None:
    with pytest.raises(argparse.ArgumentError, match=sentence):
        parsed(option)
