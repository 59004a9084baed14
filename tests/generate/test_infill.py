"""Infill prompts: the order of the parts, the tokens that tell them apart, and no space that wasn't in the text."""

import pytest

from gptjax.config import DataConfig, UserError
from gptjax.data import tokenizers
from gptjax.generate.infill import Sentinels, find_sentinels, infill_prompt


def made(special: list[str]) -> tokenizers.Tokenizer:
    """A byte-level tokenizer.json with the special tokens."""
    package = pytest.importorskip("tokenizers", reason="extra: huggingface")
    alphabet = sorted(package.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = package.Tokenizer(package.models.BPE(vocab={piece: i for i, piece in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = package.decoders.ByteLevel()
    tokenizer.add_special_tokens(special)
    return tokenizers.HuggingFaceTokenizer(tokenizer.to_str().encode())


@pytest.mark.parametrize(
    ("names", "end"),
    [
        (["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"], False),
        (["<fim_prefix>", "<fim_suffix>", "<fim_middle>"], False),
        (["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"], True),
        (["<PRE>", "<SUF>", "<MID>"], False),
    ],
)
def test_sentinels_are_found_by_their_names(names, end):
    tokenizer = made(names)
    found = find_sentinels(tokenizer)
    assert found == Sentinels(256, 257, 258, 259 if end else None)
    a, b, c, x, y = (int(tokenizer.encode(letter)[0]) for letter in "abcxy")
    assert infill_prompt(tokenizer, "ab", "cx").tolist() == [256, a, b, 257, c, x, 258]
    assert infill_prompt(tokenizer, "ab", "cx", "spm").tolist() == [256, 257, c, x, 258, a, b]
    assert infill_prompt(tokenizer, "", "y").tolist() == [256, 257, y, 258]
    assert infill_prompt(tokenizer, "y", "", "spm").tolist() == [256, 257, 258, y]


def test_named_sentinels_and_mistakes():
    tokenizer = tokenizers.ByteTokenizer()
    assert infill_prompt(tokenizer, "a", "b", sentinels=Sentinels(1, 2, 3)).tolist() == [1, 97, 2, 98, 3]
    with pytest.raises(UserError, match=r"no tokens for filling in \(none of <\|fim_prefix\|>, "):
        infill_prompt(tokenizer, "a", "b")
    with pytest.raises(UserError, match="'middle' is not one of psm, spm"):
        infill_prompt(tokenizer, "a", "b", "middle")
    with pytest.raises(UserError, match="no tokens for filling in"):
        find_sentinels(made(["<fim_prefix>", "<fim_suffix>"]))  # not whole


def test_no_space_is_put_before_the_suffix(shared_data):
    path = shared_data / "sentencepiece" / "test_model.model"
    tokenizer = tokenizers.make_tokenizer(DataConfig(tokenizer="sentencepiece", tokenizer_path=str(path)), {})
    marks = Sentinels(*(tokenizer.vocab_size + i for i in range(3)))
    ids = infill_prompt(tokenizer, "Hello", "world", sentinels=marks).tolist()
    pieces = [*tokenizer.vocabulary(), b"<PRE>", b"<SUF>", b"<MID>"]
    assert b"".join(pieces[i] for i in ids) == b"<PRE> Hello<SUF>world<MID>"
    ids = infill_prompt(tokenizer, "Hello", " world", sentinels=marks).tolist()
    assert b"".join(pieces[i] for i in ids).endswith(b"<SUF> world<MID>")
