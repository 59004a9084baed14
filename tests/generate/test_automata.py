"""Token automata against brute force, and 1,000 answers of random logits, every one valid."""

import itertools
import re
import time

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax.config import DataConfig, UserError
from gptjax.data import tokenizers
from gptjax.generate import automata
from gptjax.generate.automata import joined_bytes, regex_automaton, token_automaton
from gptjax.generate.patterns import compile_pattern
from gptjax.generate.regex import parse_regex
from tests.generate.vocabularies import EOS, MODEL_VOCAB, VOCABULARY, random_answers, random_texts

# For brute force: characters whole, in halves, and over one another's ends.
SMALL: list[bytes | None] = [b"a", b"b", b"ab", b"ba", b"\xc3", b"\xa9", "é".encode(), b"\xa9a", b"", None]
SMALL_EOS = 9
LONGEST = 4


def small_automaton(expression: str, vocab_size: int = 12) -> automata.TokenAutomaton:
    return token_automaton(compile_pattern(parse_regex(expression)), SMALL, vocab_size, [SMALL_EOS])


def sequences(length: int) -> list[tuple[int, ...]]:
    return list(itertools.product(range(8), repeat=length))  # ids 8 and 9 write nothing


@pytest.mark.parametrize("expression", ["a*", "(ab|é)+", "aba?", "é{1,2}", "(a|b){3}é", ".", "[^a]b*", "", "(aé|b)*b"])
def test_equals_brute_force_over_all_token_sequences(expression):
    found = small_automaton(expression)
    texts = {ids: b"".join(SMALL[i] for i in ids) for length in range(LONGEST + 2) for ids in sequences(length)}
    whole = set()
    for ids, text in texts.items():
        try:
            matches = re.fullmatch(expression, text.decode()) is not None
        except UnicodeDecodeError:
            matches = False
        if matches:
            whole.add(ids)
    # How few tokens end a text, for everything that some text begins with.
    fewest: dict[tuple[int, ...], int] = {}
    for ids in whole:
        for cut in range(len(ids) + 1):
            fewest[ids[:cut]] = min(fewest.get(ids[:cut], 99), len(ids) - cut)
    for ids in texts:
        state = found.state_after(ids)
        assert (state >= 0 and bool(found.accepting_S[state])) == (ids in whole)
        # Whatever may follow ends within two tokens, so up to here the lists above know all of it.
        if len(ids) < LONGEST:
            assert (state >= 0) == (ids in fewest), ids
        if len(ids) < LONGEST and state >= 0:
            assert found.distance_S[state] == fewest[ids]
        if len(ids) < LONGEST - 1 and state >= 0:
            follow = {i for i in range(12) if found.dense()[state, i] >= 0}
            assert follow == {i for i in range(8) if (*ids, i) in fewest} | ({SMALL_EOS} if ids in whole else set())
            assert found.finished_S[state] == (follow == {SMALL_EOS})
            assert ids not in whole or found.dense()[state, SMALL_EOS] == state


_allowed = jax.jit(lambda constraint, logits, states, left: constraint.allowed(logits, states, left))
_advance = jax.jit(lambda constraint, states, tokens: constraint.advance(states, tokens))
_FAR = np.iinfo(np.int32).max


def test_compiled_equals_tables():
    logits = np.random.default_rng(0).normal(size=(16, 12)).astype(np.float32)
    for expression in ("a*", "(ab|é)+", "(aé|b)*b", "(a|b){3}é"):
        found = small_automaton(expression)
        constraint = found.constraint()
        states = (np.arange(16) % found.num_states).astype(np.int32)  # one shape for all
        targets = found.dense()[states]
        after = np.where(targets >= 0, found.distance_S[targets], _FAR)
        for left in (np.full(16, 1), np.full(16, 2), np.full(16, _FAR), np.arange(16) % 3):
            kept = np.asarray(_allowed(constraint, logits, states, left.astype(np.int32)))
            np.testing.assert_array_equal(kept, np.where(after < left[:, None], logits, -np.inf))
        for token in range(12):
            moved = np.asarray(_advance(constraint, states, np.full_like(states, token)))
            may = targets[:, token] >= 0
            np.testing.assert_array_equal(moved[may], targets[may, token])
            stuck = np.asarray(_allowed(constraint, logits, moved, np.full(16, _FAR, np.int32)))
            assert np.isinf(stuck[~may]).all()  # behind what was not allowed, nothing is
        np.testing.assert_array_equal(np.asarray(constraint.finished(states)), found.finished_S[states])
    np.testing.assert_array_equal(constraint.allowed(logits, states), np.where(targets >= 0, logits, -np.inf))


REGEXES = [
    r"-?\d+(\.\d+)?",
    r"[a-z]+@[a-z]+\.(com|org)",
    "(é|中|🦙)*",
    ".{0,20}",
    r"(yes|no|perhaps)( (yes|no))?",
    r"[^a]{3}",
    r"\d{4}-\d\d-\d\d",
    "",
]


@pytest.mark.parametrize("expression", REGEXES)
def test_a_thousand_answers_all_match(expression):
    found = token_automaton(compile_pattern(parse_regex(expression)), VOCABULARY, MODEL_VOCAB, [EOS])
    texts = random_texts(found, 0, 24)
    texts += random_texts(found, 1, max(1, int(found.distance_S[0])))  # no token to spare
    assert len(texts) == 2000
    assert all(re.fullmatch(expression, text.decode(), re.ASCII) for text in texts)


def test_a_thousand_answers_without_an_end_of_text():
    for expression in (r"\d{3}(,\d{3})?", "[ab]+", ""):
        found = token_automaton(compile_pattern(parse_regex(expression)), VOCABULARY, MODEL_VOCAB)
        texts = random_texts(found, 0, 12, eos_id=None)
        assert all(re.fullmatch(expression, text.decode()) for text in texts)


def test_a_thousand_answers_in_numpy(gpt2):
    """The tables alone, without jax, with GPT-2's vocabulary: tokens drawn with random weights, 40 at most."""
    vocabulary = gpt2.vocabulary()
    numbers = np.random.default_rng(0)
    for expression in (r"\w+@\w+\.(com|org)", r'"([^"\\\x00-\x1f]|\\["\\/bfnrt])*"'):
        found = regex_automaton(expression, gpt2, 50257)
        allowed: dict[int, tuple[np.ndarray, np.ndarray]] = {}
        for _ in range(1000):
            state, tokens = 0, []
            for left in range(40, 0, -1):
                if state not in allowed:
                    ids = np.flatnonzero(found.next_SC[state, found.classes_V] >= 0)
                    allowed[state] = ids, found.distance_S[found.next_SC[state, found.classes_V[ids]]]
                ids, after = allowed[state]
                token = int(numbers.choice(ids[after < left]))
                if token == gpt2.eos_id:
                    break
                tokens.append(token)
                state = int(found.next_SC[state, found.classes_V[token]])
            assert re.fullmatch(expression, joined_bytes(vocabulary, tokens).decode(), re.ASCII)


@pytest.fixture(scope="module")
def gpt2(shared_data):
    return tokenizers.make_tokenizer(DataConfig(tokenizer="gpt2", tokenizer_path=str(shared_data / "gpt2_bpe")), {})


def test_large_vocabularies_build_in_seconds(gpt2):
    """GPT-2's 50,257 ids and some hundreds of states; two columns checked byte by byte."""
    began = time.process_time()
    found = regex_automaton(".{0,60}", gpt2, 50257)
    seconds = time.process_time() - began
    assert found.num_states == 481 and len(found.classes_V) == 50257
    assert found.next_SC.nbytes < 1e6  # the dense table would have 97 MB
    assert seconds < 5
    plain = compile_pattern(parse_regex(".{0,60}"))
    for token in gpt2.encode(" tokenization 中文").tolist():
        for state in range(0, 481, 37):
            target = state
            for byte in gpt2.vocabulary()[token]:
                target = int(plain.next_state[target, plain.classes[byte]]) if target >= 0 else -1
            assert (target < 0) == (found.state_after([token], _same(found, gpt2, state, plain)) < 0)


def _same(found, tokenizer, state, plain):
    """The token automaton's state for one of the byte automaton's: both by the shortest way there, byte by byte."""
    single = {piece: i for i, piece in enumerate(tokenizer.vocabulary()) if piece is not None and len(piece) == 1}
    ways = {0: b""}
    waiting = [0]
    for here in waiting:
        for byte in range(256):
            target = int(plain.next_state[here, plain.classes[byte]])
            if target >= 0 and target not in ways:
                ways[target] = ways[here] + bytes([byte])
                waiting.append(target)
    return found.state_after([single[bytes([byte])] for byte in ways[state]])


def test_one_compilation_for_patterns_of_like_size():
    shapes = set()
    before = None
    for number, expression in enumerate(["a+", r"\d{1,5}", "x|yz", "(ab)*c?", "[^z]{2,4}"]):
        found = token_automaton(compile_pattern(parse_regex(expression)), VOCABULARY, MODEL_VOCAB, [EOS])
        constraint = found.constraint()
        shapes.add((constraint.next_SC.shape, constraint.distance_S.shape))
        random_answers(constraint, np.uint32(number), np.int32(8 + number), batch=4, room=16, eos_id=EOS)
        before = before or random_answers._cache_size()
    assert shapes == {((64, 64), (64,))}
    assert random_answers._cache_size() == before


def test_models_with_other_numbers_of_ids():
    pattern = compile_pattern(parse_regex("(a|é)*"))
    more = token_automaton(pattern, SMALL, 20, [SMALL_EOS])
    assert more.dense().shape == (more.num_states, 20) and (more.dense()[:, 10:] < 0).all()
    fewer = token_automaton(pattern, SMALL, 5)
    assert fewer.dense().shape[1] == 5
    # b"\xc3" is there, but what would end the character is not.
    assert np.flatnonzero((fewer.dense() >= 0).any(0)).tolist() == [0]


def test_states_that_no_token_brings_to_an_end_are_left_out():
    found = token_automaton(compile_pattern(parse_regex("aé|ab")), [b"a", b"b", b"\xc3", None], 4)
    assert found.state_after([0, 1]) >= 0 and found.state_after([0, 2]) == -1
    with pytest.raises(UserError, match="no sequence of the tokenizer's 2 ids"):
        token_automaton(compile_pattern(parse_regex("c")), [b"a", None], 2)
    with pytest.raises(UserError, match="no sequence"):
        token_automaton(compile_pattern(parse_regex("ab")), [b"a", b""], 2)


def test_room():
    found = small_automaton("(ab){3}a?")
    found.check_room(3)
    with pytest.raises(UserError, match="takes 3 tokens, more than max_new_tokens=2"):
        found.check_room(2)


def test_too_large_a_table(monkeypatch):
    monkeypatch.setattr(automata, "MAX_ENTRIES", 1000)
    with pytest.raises(UserError, match="81 states .* more than 1000 entries"):
        token_automaton(compile_pattern(parse_regex(".{0,10}")), VOCABULARY, MODEL_VOCAB, [EOS])


@given(st.lists(st.integers(0, 255), max_size=8))
@settings(max_examples=50)
def test_a_tokenizers_constraint_accepts_what_the_expression_does(ids):
    tokenizer = tokenizers.ByteTokenizer()
    found = regex_automaton("([a-z]|é)*", tokenizer, 300)
    state = found.state_after(ids)
    matches = re.fullmatch("([a-z]|é)*", bytes(ids).decode(errors="replace")) is not None
    assert (state >= 0 and bool(found.accepting_S[state])) == matches
    assert joined_bytes(tokenizer.vocabulary(), [*ids, 256, 299]) == bytes(ids)
    assert found.dense()[0, tokenizer.eos_id] == 0 and (found.dense()[:, 257:] < 0).all()
