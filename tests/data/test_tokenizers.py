"""Every tokenizer gives texts back exactly, counts their bytes exactly, and survives being saved."""

import functools
import hashlib
import pathlib
import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.config import DataConfig, UserError
from gptjax.data import tokenizers
from gptjax.data.byte_pairs import word_pattern
from gptjax.data.sources import Document

TEXT = st.text() | st.text(alphabet=" \n\t\u2581a'\u4e2d\u00e91\U0001f600\x1c\u00a0<s>")
# Words, repeated and pressed together, reach merges that random characters never do.
PROSE = st.lists(st.sampled_from(["the", " the", "'ll", " 12", "\n\n", "   ", "naïve", "don't", "中文", "🦙", "s", "  x"])).map(
    "".join
)


class Texts(list):
    """A source of the given texts."""

    def __getitem__(self, index):
        return Document(str(index), super().__getitem__(index))


CORPUS = Texts(
    ["def f(x):\n    return x + 1\n\n\nclass Café:\n\tpass  # 中文 😀\n" * 20, "for i in range(10):\n    print(i)\n" * 30]
)


@pytest.fixture(scope="module")
def trained() -> tokenizers.Tokenizer:
    return tokenizers.SentencePieceTokenizer(tokenizers.train_sentencepiece(CORPUS, 320))


@pytest.fixture(scope="module")
def gpt2(shared_data: pathlib.Path) -> tokenizers.Tokenizer:
    config = DataConfig(tokenizer="gpt2", tokenizer_path=str(shared_data / "gpt2_bpe"))
    return tokenizers.make_tokenizer(config, {})


@pytest.fixture(scope="module")
def huggingface(shared_data: pathlib.Path) -> tokenizers.Tokenizer:
    """GPT-2's vocabulary as a tokenizer.json, made by the package itself."""
    package = pytest.importorskip("tokenizers", reason="extra: huggingface")
    files = (str(shared_data / "gpt2_bpe" / name) for name in ("encoder.json", "vocab.bpe"))
    made = package.Tokenizer(package.models.BPE.from_file(*files))
    made.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = package.decoders.ByteLevel()
    made.add_special_tokens(["<|endoftext|>"])
    return tokenizers.HuggingFaceTokenizer(made.to_str().encode())


def check_round_trip(tokenizer: tokenizers.Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert tokenizer.token_bytes()[ids].sum() == len(text.encode())


@given(TEXT | PROSE)
def test_bytes_round_trip(text):
    tokenizer = tokenizers.ByteTokenizer()
    check_round_trip(tokenizer, text)
    assert tokenizer.encode(text).tolist() == list(text.encode())


@given(st.text(min_size=1), st.data())
def test_characters_round_trip_over_their_alphabet(alphabet, data):
    tokenizer = tokenizers.CharTokenizer(alphabet)
    check_round_trip(tokenizer, data.draw(st.text(alphabet=sorted(set(alphabet)))))


@given(TEXT | PROSE)
@settings(max_examples=300)
def test_trained_sentencepiece_round_trips(trained, text):
    check_round_trip(trained, text)


@given(TEXT | PROSE)
@settings(max_examples=300)
def test_gpt2_round_trips(gpt2, text):
    check_round_trip(gpt2, text)


@given(TEXT | PROSE)
def test_huggingface_round_trips(huggingface, text):
    if "<|endoftext|>" not in text:
        check_round_trip(huggingface, text)


def conformance_cases(folder: pathlib.Path) -> list[tuple[str, list[int]]]:
    texts = (folder / "ggml-vocab-gpt-2.gguf.inp").read_text(encoding="utf-8").split("\n__ggml_vocab_test__\n")
    lines = (folder / "ggml-vocab-gpt-2.gguf.out").read_text().split("\n")
    return [(text, [int(i) for i in line.split()]) for text, line in zip(texts, lines, strict=True)]


def test_gpt2_conformance(gpt2, shared_data):
    cases = conformance_cases(shared_data / "gpt2_bpe")
    assert len(cases) >= 46
    for text, expected in cases:
        assert gpt2.encode(text).tolist() == expected, text


def test_gpt2_special_token_spelt_out_is_plain_text(gpt2):
    assert gpt2.eos_id == gpt2.bos_id == 50256
    assert 50256 not in gpt2.encode("a<|endoftext|>b")
    assert gpt2.decode([64, 50256, 65]) == "ab"
    assert gpt2.token_bytes()[50256] == 0


def test_gpt2_merges_equal_the_definition_on_long_words(gpt2):
    """Against the published loop: find the earliest-learnt pair, replace all its occurrences, repeat."""
    ids = {piece: i for i, piece in enumerate(gpt2.pieces)}
    lines = gpt2.files()["vocab.bpe"].decode().split("\n")[1:]
    ranks = {tuple(tokenizers.piece_bytes(p) for p in line.split()): rank for rank, line in enumerate(lines) if line}

    def by_definition(word: bytes) -> list[int]:
        parts = [word[i : i + 1] for i in range(len(word))]
        while pairs := [pair for pair in zip(parts, parts[1:], strict=False) if pair in ranks]:
            best = min(pairs, key=ranks.__getitem__)
            out: list[bytes] = []
            while parts:
                take = 2 if tuple(parts[:2]) == best else 1
                out.append(b"".join(parts[:take]))
                parts = parts[take:]
            parts = out
        return [ids[part] for part in parts]

    for word in ("a" * 257, "中文漢字" * 20, "mississippi" * 9, "thethethe" * 8, "aaaaaab" * 11):
        assert gpt2.encode(word).tolist() == by_definition(word.encode()), word


PATTERN = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"


def test_gpt2_words():
    assert word_pattern().findall("we're I've it's 'd") == ["we", "'re", " I", "'ve", " it", "'s", " '", "d"]
    assert word_pattern().findall("I'm you'll can't x'd") == ["I", "'m", " you", "'ll", " can", "'t", " x", "'d"]
    assert word_pattern().findall("ab12 ½x  \n\n c") == ["ab", "12", " ½", "x", "  \n\n", " c"]
    assert word_pattern().findall("a\x1c!") == ["a", "\x1c!"]  # not Unicode white space, though `re` takes it for that


# Unassigned code points may have been assigned since this Python's Unicode tables were made.
ASSIGNED = st.text(alphabet=st.characters(exclude_categories=["Cs", "Cn"]))


@pytest.mark.parity
@given(ASSIGNED | PROSE)
@settings(max_examples=1000)
def test_gpt2_words_equal_the_regex_package(text):
    regex = pytest.importorskip("regex")
    assert word_pattern().findall(text) == regex.findall(PATTERN, text)


@pytest.mark.parity
@given(ASSIGNED | PROSE)
@settings(max_examples=1000)
def test_gpt2_equals_tiktoken_and_tokenizers(gpt2, huggingface, text):
    tiktoken = pytest.importorskip("tiktoken")
    reference = tiktoken_encoding(tiktoken, gpt2)
    assert gpt2.encode(text).tolist() == reference.encode_ordinary(text)
    assert gpt2.encode(text).tolist() == huggingface.encode(text).tolist() or "<|endoftext|>" in text


def test_huggingface_counts_bytes_as_gpt2_does(gpt2, huggingface):
    np.testing.assert_array_equal(gpt2.token_bytes(), huggingface.token_bytes())


@functools.cache
def tiktoken_encoding(package, gpt2):
    ranks = {piece: rank for rank, piece in enumerate(gpt2.pieces) if piece is not None}
    return package.Encoding("gpt2-here", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 50256})


def test_sentencepiece_matches_its_own_package_on_a_foreign_model(shared_data):
    sentencepiece = pytest.importorskip("sentencepiece")
    path = shared_data / "sentencepiece" / "test_model.model"
    tokenizer = tokenizers.make_tokenizer(DataConfig(tokenizer="sentencepiece", tokenizer_path=str(path)), {})
    reference = sentencepiece.SentencePieceProcessor(model_file=str(path))
    text = (shared_data / "sentencepiece" / "botchan.txt").read_text(encoding="utf-8")[:5000]
    assert tokenizer.encode(text).tolist() == reference.encode(text)
    assert tokenizer.decode(tokenizer.encode(text)) == reference.decode(reference.encode(text))
    assert (tokenizer.bos_id, tokenizer.eos_id) == (reference.bos_id(), reference.eos_id())


def test_training_sentencepiece_is_deterministic(trained):
    assert tokenizers.train_sentencepiece(CORPUS, 320) == trained.files()["sentencepiece.model"]
    assert trained.vocab_size == 320 and trained.bos_id == 1 and trained.eos_id == 2


def test_sentencepiece_vocabulary_too_large_for_the_source():
    with pytest.raises(UserError, match="data.tokenizer_vocab_size=8000 .* value <= "):
        tokenizers.train_sentencepiece(Texts(["abc"]), 8000)


def test_unknown_character_is_named():
    with pytest.raises(UserError, match=r"'z' \(U\+007A\)"):
        tokenizers.CharTokenizer("abc").encode("abz")
    with pytest.raises(UserError, match=r"U\+1F600"):
        tokenizers.CharTokenizer("abc").encode("a\U0001f600b")


def test_characters_are_taken_from_all_splits():
    made = tokenizers.make_tokenizer(DataConfig(tokenizer="char"), {"train": Texts(["ba"]), "eval": Texts(["c"])})
    assert made.vocab_size == 3 and made.encode("abc").tolist() == [0, 1, 2]
    assert made.bos_id is None and made.eos_id is None


def test_ids_outside_the_vocabulary_are_refused():
    for bad in (-1, 257):
        with pytest.raises(ValueError, match=f"id {bad} "):
            tokenizers.ByteTokenizer().decode([65, bad])
        with pytest.raises(ValueError, match=f"id {bad} "):
            tokenizers.CharTokenizer("ab").decode([0, bad])
    assert tokenizers.ByteTokenizer().decode([65, 256, 0xE4, 0xB8]) == "A\ufffd"


def check_vocabulary(tokenizer: tokenizers.Tokenizer, seed: int = 0) -> None:
    """The bytes of ids drawn at random, joined, are what decoding gives behind other text; each has as many as are counted."""
    vocabulary = tokenizer.vocabulary()
    assert len(vocabulary) == tokenizer.vocab_size
    assert tokenizer.token_bytes().tolist() == [len(piece or b"") for piece in vocabulary]
    begin = tokenizer.encode("a").tolist()  # a space in front of a whole text, where one is put, is not asked about here
    written = [i for i, piece in enumerate(vocabulary) if piece]
    whole = [i for i in written if vocabulary[i].decode(errors="replace").find("\ufffd") < 0]
    numbers = np.random.default_rng(seed)
    before = tokenizer.decode(begin)
    compared = 0
    for _ in range(300):
        ids = [int(i) for i in numbers.choice(written if numbers.random() < 0.3 else whole, 5)]
        try:
            text = b"".join(vocabulary[i] for i in ids).decode()
        except UnicodeDecodeError:
            continue
        compared += 1
        assert tokenizer.decode(begin + ids) == before + text, ids
    assert compared > 100


@pytest.mark.parametrize("kind", ["byte", "char", "sentencepiece", "gpt2", "huggingface"])
def test_vocabulary(kind, request, trained):
    makers = {
        "byte": tokenizers.ByteTokenizer,
        "char": lambda: tokenizers.CharTokenizer("hae é\n中"),
        "sentencepiece": lambda: trained,
    }
    check_vocabulary(makers[kind]() if kind in makers else request.getfixturevalue(kind))


@pytest.mark.parametrize("name", ["test_model.model", "test_ja_model.model"])
def test_vocabulary_of_foreign_sentencepiece(name, shared_data):
    path = shared_data / "sentencepiece" / name
    check_vocabulary(tokenizers.make_tokenizer(DataConfig(tokenizer="sentencepiece", tokenizer_path=str(path)), {}))


def metaspace_tokenizer(package, decoder):
    """Pieces of Llama's kind: a space is U+2581, other bytes are <0x41>, and some tokens are added."""
    names = ["<unk>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "\u2581", "a", "b", "é", "\u2581a", "ab", "中"]
    vocab = {name: i for i, name in enumerate(names)}
    made = package.Tokenizer(
        package.models.BPE(vocab=vocab, merges=[("\u2581", "a"), ("a", "b")], byte_fallback=True, unk_token="<unk>")
    )
    made.normalizer = package.normalizers.Sequence(
        [package.normalizers.Prepend("\u2581"), package.normalizers.Replace(" ", "\u2581")]
    )
    made.add_special_tokens(["<unk>", "</s>"])
    made.add_tokens([package.AddedToken("  x", normalized=False), "é\u2581", "<tag>"])
    made.decoder = decoder
    return tokenizers.HuggingFaceTokenizer(made.to_str().encode())


def test_vocabulary_of_huggingface_decoders():
    package = pytest.importorskip("tokenizers", reason="extra: huggingface")
    decoders = package.decoders
    llama = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    for decoder in (llama, decoders.Metaspace(), decoders.Sequence([decoders.Metaspace(prepend_scheme="never")])):
        check_vocabulary(metaspace_tokenizer(package, decoder))
    tokenizer = metaspace_tokenizer(package, llama)
    assert tokenizer.vocabulary()[:4] == [None, None, b"\x00", b"\x01"]
    assert tokenizer.vocabulary()[-3:] == [b"  x", b" \xc3\xa9 ", b" <tag>"]
    bytewise = package.Tokenizer(
        package.models.BPE(vocab={piece: i for i, piece in enumerate(package.pre_tokenizers.ByteLevel.alphabet())}, merges=[])
    )
    bytewise.pre_tokenizer = package.pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytewise.decoder = decoders.ByteLevel()
    bytewise.add_tokens(["   ", "éa", "中", "<tag>"])  # é is how that decoder writes the byte E9
    tokenizer = tokenizers.HuggingFaceTokenizer(bytewise.to_str().encode())
    assert tokenizer.vocabulary()[256:] == [b"   ", b"\xe9a", "中".encode(), b"<tag>"]
    check_vocabulary(tokenizer)


def test_pieces_without_bytes_of_their_own_are_refused():
    package = pytest.importorskip("tokenizers", reason="extra: huggingface")
    made = package.Tokenizer(package.models.WordPiece({"[UNK]": 0, "a": 1, "##b": 2}, unk_token="[UNK]"))
    for decoder, name in ((None, "null"), (package.decoders.WordPiece(), "WordPiece")):
        if decoder:
            made.decoder = decoder
        tokenizer = tokenizers.HuggingFaceTokenizer(made.to_str().encode())
        with pytest.raises(UserError, match=f"joins its pieces by the decoder {name}, "):
            tokenizer.vocabulary()
        assert tokenizer.token_bytes().shape == (3,)


def test_ids_by_name(trained, huggingface, gpt2):
    for tokenizer, name, i in ((trained, "</s>", 2), (huggingface, "<|endoftext|>", 50256), (gpt2, "<|endoftext|>", 50256)):
        assert tokenizer.token_id(name) == i and tokenizer.token_id("<|no such thing|>") is None
    assert tokenizers.ByteTokenizer().token_id("a") is None


@pytest.mark.parametrize("kind", ["byte", "char", "sentencepiece", "gpt2", "huggingface"])
def test_save_and_load(kind, tmp_path, request, trained):
    makers = {
        "byte": tokenizers.ByteTokenizer,
        "char": lambda: tokenizers.CharTokenizer("hello é\n"),
        "sentencepiece": lambda: trained,
    }
    tokenizer = makers[kind]() if kind in makers else request.getfixturevalue(kind)
    tokenizer.save(tmp_path / "tokenizer")
    tokenizer.save(tmp_path / "tokenizer")  # again over itself
    loaded = tokenizers.load_tokenizer(tmp_path / "tokenizer")
    assert type(loaded) is type(tokenizer) and loaded.fingerprint == tokenizer.fingerprint
    assert loaded.vocab_size == tokenizer.vocab_size and loaded.eos_id == tokenizer.eos_id
    np.testing.assert_array_equal(loaded.encode("hello"), tokenizer.encode("hello"))
    assert re.fullmatch("[0-9a-f]{64}", loaded.fingerprint)


def test_fingerprint_depends_on_kind_and_content():
    kinds = [tokenizers.ByteTokenizer(), tokenizers.CharTokenizer("ab"), tokenizers.CharTokenizer("abc")]
    assert len({tokenizer.fingerprint for tokenizer in kinds}) == 3
    name, content = hashlib.sha256(b"alphabet.json").digest(), hashlib.sha256(b'"ab"').digest()
    assert kinds[1].fingerprint == hashlib.sha256(b"char" + name + content).hexdigest()


def test_damaged_or_missing_tokenizer_is_refused(tmp_path):
    with pytest.raises(UserError, match="no tokenizer in"):
        tokenizers.load_tokenizer(tmp_path)
    tokenizers.CharTokenizer("abc").save(tmp_path)
    (tmp_path / "alphabet.json").write_text('"abd"')
    with pytest.raises(UserError, match="is damaged"):
        tokenizers.load_tokenizer(tmp_path)
    (tmp_path / "descriptor.json").write_text('{"kind"')
    with pytest.raises(UserError, match="is damaged"):
        tokenizers.load_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", ["gpt2", "sentencepiece", "huggingface"])
def test_tokenizer_path_mistakes(kind, tmp_path):
    with pytest.raises(UserError, match="data.tokenizer_path: .* does not exist"):
        tokenizers.make_tokenizer(DataConfig(tokenizer=kind, tokenizer_path=str(tmp_path / "absent")), {})
    for name in ("encoder.json", "vocab.bpe", "tokenizer.json", "x.model"):
        (tmp_path / name).write_text("{}")
    path = tmp_path / "x.model" if kind == "sentencepiece" else tmp_path
    if kind == "huggingface":
        pytest.importorskip("tokenizers")
    with pytest.raises(UserError, match=f"data.tokenizer_path: .* holds no {kind} tokenizer"):
        tokenizers.make_tokenizer(DataConfig(tokenizer=kind, tokenizer_path=str(path)), {})
