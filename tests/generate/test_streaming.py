"""Text as tokens come: never taken back, and in the end what the tokenizer makes of the whole row."""

from __future__ import annotations

import io
import itertools
import pathlib
import random
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.config import DataConfig
from gptjax.data import tokenizers
from gptjax.data.sources import Document
from gptjax.generate.streaming import TextStream

WORDS = ["the", " the", "\n", "  ", "don't", "naïve", " 中文", "漢", "🦙", "👩‍🚀", "é", " a", "x1", "\t"]
PROSE = st.lists(st.sampled_from(WORDS)).map("".join)


class Corpus(list):
    def __getitem__(self, index):
        return Document(str(index), super().__getitem__(index))


CORPUS = Corpus(["The naïve llama 🦙 said: don't, 中文 x1.\n\tthe end\n" * 20, "漢字 the é 👩‍🚀 astronaut the the\n" * 20])


def with_prefix(byte_fallback: bool) -> tokenizers.Tokenizer:
    """A SentencePiece model that puts a space before every text, as Llama's does."""
    import sentencepiece

    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter("".join(CORPUS[i].text for i in range(2)).splitlines()),
        model_writer=model,
        vocab_size=330 if byte_fallback else 60,
        model_type="bpe",
        byte_fallback=byte_fallback,
        normalization_rule_name="identity",
        minloglevel=2,
        hard_vocab_limit=False,
    )
    return tokenizers.SentencePieceTokenizer(model.getvalue())


def huggingface(kind: str) -> tokenizers.Tokenizer:
    package = pytest.importorskip("tokenizers", reason="extra: huggingface")
    alphabet = {**{f"<0x{byte:02X}>": byte for byte in range(256)}}
    if kind == "byte-level":
        made = package.Tokenizer(package.models.BPE())
        made.pre_tokenizer, made.decoder = package.pre_tokenizers.ByteLevel(add_prefix_space=False), package.decoders.ByteLevel()
        alphabet_of = package.pre_tokenizers.ByteLevel.alphabet()
        trainer = package.trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet_of, special_tokens=["<|endoftext|>"])
        trainer.show_progress = False
        made.train_from_iterator([CORPUS[i].text for i in range(2)], trainer)
    elif kind == "metaspace":
        letters = {letter: 256 + i for i, letter in enumerate("\u2581abcdefghijklmnopqrstuvwxyz'")}
        made = package.Tokenizer(package.models.BPE(vocab=alphabet | letters, merges=[], byte_fallback=True))
        made.pre_tokenizer = package.pre_tokenizers.Metaspace()
        replace, decoders = package.decoders.Replace("\u2581", " "), package.decoders
        made.decoder = decoders.Sequence([replace, decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    else:
        words = ["[UNK]", "the", "##m", "don", "'", "t", ".", "a", "##b"]
        made = package.Tokenizer(package.models.WordPiece({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
        made.pre_tokenizer, made.decoder = package.pre_tokenizers.BertPreTokenizer(), package.decoders.WordPiece()
    return tokenizers.HuggingFaceTokenizer(made.to_str().encode())


@pytest.fixture(scope="module")
def kinds() -> dict[str, tokenizers.Tokenizer]:
    return {
        "byte": tokenizers.ByteTokenizer(),
        "char": tokenizers.CharTokenizer("".join(WORDS)),
        "sentencepiece": tokenizers.SentencePieceTokenizer(tokenizers.train_sentencepiece(CORPUS, 330)),
        "sentencepiece, space before, bytes": with_prefix(True),
        "sentencepiece, space before": with_prefix(False),
        "huggingface byte-level": huggingface("byte-level"),
        "huggingface metaspace": huggingface("metaspace"),
        "huggingface wordpiece": huggingface("wordpiece"),
    }


# Their decoders join bytes as UTF-8 is defined; the others have ideas of their own of how many U+FFFD broken bytes are.
EXACT = ["byte", "char", "sentencepiece", "huggingface byte-level"]
ROUND_TRIPPING = [*EXACT, "sentencepiece, space before, bytes", "huggingface metaspace"]


def streamed(tokenizer: Any, prompt_ids: Any, new_ids: Any) -> str:
    """What a stream shows, piece by piece; each piece is checked to be final."""
    stream = TextStream(tokenizer, prompt_ids)
    shown = ""
    for token in new_ids:
        piece = stream.feed(token)
        shown += piece
        assert stream.text == shown
    shown += stream.finish()
    assert stream.text == shown
    return shown


def behind(tokenizer: Any, prompt_ids: list[int], new_ids: list[int]) -> str:
    """The text of the whole row without that of the prompt."""
    before, whole = tokenizer.decode(prompt_ids), tokenizer.decode(prompt_ids + new_ids)
    assert whole.startswith(before)
    return whole[len(before) :]


@pytest.mark.parametrize("kind", EXACT)
def test_any_ids_give_the_text_of_the_whole_row(kinds, kind):
    tokenizer, rng = kinds[kind], random.Random(0)
    prompts = [[], tokenizer.encode("the").tolist(), tokenizer.encode(" 中文the").tolist()]
    for number in range(600):
        prompt = prompts[number % 3]
        new = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(12))]
        assert streamed(tokenizer, prompt, new) == behind(tokenizer, prompt, new)


@pytest.mark.parametrize("kind", ROUND_TRIPPING)
@given(prompt=PROSE, text=PROSE)
@settings(max_examples=60)
def test_texts_come_out_as_decoding_gives_them(kinds, kind, prompt, text):
    tokenizer = kinds[kind]
    if kind == "huggingface metaspace":  # it has letters, and bytes for the rest
        prompt, text = prompt.replace("\t", " "), text.replace("\t", " ")
    prompt_ids, new_ids = tokenizer.encode(prompt).tolist(), tokenizer.encode(text).tolist()
    expected = behind(tokenizer, prompt_ids, new_ids)
    assert streamed(tokenizer, prompt_ids, new_ids) == expected


def test_gpt2_too(shared_data: pathlib.Path):
    tokenizer = tokenizers.make_tokenizer(DataConfig(tokenizer="gpt2", tokenizer_path=str(shared_data / "gpt2_bpe")), {})
    rng = random.Random(1)
    for _ in range(300):
        new = [rng.randrange(tokenizer.vocab_size) for _ in range(rng.randrange(8))]
        new += tokenizer.encode(rng.choice(["🦙", "中文", ""])).tolist()[: rng.randrange(4)]
        assert streamed(tokenizer, [464], new) == behind(tokenizer, [464], new)


def test_a_space_at_the_beginning_of_a_text_is_the_tokenizers_and_behind_a_prompt_the_texts(kinds):
    for kind in ("sentencepiece, space before", "sentencepiece, space before, bytes", "huggingface metaspace"):
        tokenizer = kinds[kind]
        ids = tokenizer.encode("the end").tolist()
        assert streamed(tokenizer, [], ids) == "the end"
        assert streamed(tokenizer, tokenizer.encode("a").tolist(), ids) == " the end"


def test_a_character_is_shown_when_it_is_whole():
    stream = TextStream(tokenizers.ByteTokenizer(), [65])
    assert [stream.feed(byte) for byte in "é🦙".encode()] == ["", "é", "", "", "", "🦙"]
    assert [stream.feed(byte) for byte in b"\xe4\xb8"] == ["", ""]
    assert stream.finish() == "\ufffd"


def test_pieces_without_bytes_of_their_own_come_at_the_end(kinds):
    tokenizer = kinds["huggingface wordpiece"]
    ids = tokenizer.encode("the don't a.").tolist()
    stream = TextStream(tokenizer, tokenizer.encode("them").tolist())
    assert [stream.feed(token) for token in ids] == [""] * len(ids)
    assert "them" + stream.finish() == tokenizer.decode([*tokenizer.encode("them"), *ids])


def first_stop(text: str, stops: tuple[str, ...]) -> str:
    """By definition: characters are added one by one until one of the strings is there."""
    for end in range(len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            return text[: end - max(map(len, found))]
    return text


@given(st.text(alphabet="ab\n", max_size=14), st.lists(st.text(alphabet="ab\n", min_size=1, max_size=4), min_size=1, max_size=3))
def test_stop_strings_end_the_text_and_are_never_shown(text, stops):
    tokenizer, stops = tokenizers.ByteTokenizer(), tuple(stops)
    stream = TextStream(tokenizer, [65], stops)
    shown = ""
    expected = first_stop(text, stops)
    for byte in text.encode():
        shown += stream.feed(byte)
        assert expected.startswith(shown)
    assert shown + stream.finish() == expected
    assert stream.is_stopped == (expected != text or any(text.endswith(stop) for stop in stops))
    # All that could still have been shown has been: what was held back began a stop string.
    if not stream.is_stopped:
        ends = [text[len(text) - size :] for size in range(len(text) + 1)]
        assert len(text) - len(shown) == max(len(end) for end in ends if any(stop.startswith(end) for stop in stops))


def test_tokens_end_with_the_one_that_completes_the_stop_string():
    stream = TextStream(tokenizers.CharTokenizer("abc"), [0], ("bc",))
    assert [stream.feed(token) for token in (0, 1, 2, 0, 1)] == ["a", "", "", "", ""]
    assert stream.tokens == (0, 1, 2) and stream.fed == 5 and stream.finish() == ""


def test_every_way_of_cutting_gives_the_same_text(kinds):
    """Bytes of one text in pieces of any size: which tokens drew it does not matter."""
    tokenizer = kinds["byte"]
    ids = np.frombuffer("é<end>x".encode(), np.uint8)
    for cut in itertools.product([0, 1], repeat=3):
        stream = TextStream(tokenizer, [65], ("<end>", "x")[: 1 + cut[0]])
        assert "".join(stream.feed(token) for token in ids) + stream.finish() == "é"
