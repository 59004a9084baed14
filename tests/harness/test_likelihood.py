"""Likelihoods against float64 written out, in batches of any size; how text becomes ids; windows; what is refused."""

from __future__ import annotations

import dataclasses

import jax
import numpy as np
import pytest

from gptjax.config import UserError
from gptjax.data.tokenizers import ByteTokenizer, CharTokenizer
from gptjax.harness import likelihood
from gptjax.harness.likelihood import Likelihood, Row, padded_length
from tests.harness.small_models import brute_log_probs, random_params, tiny_config, tiny_model
from tests.parallel.run_module import run_module

BOS = 256
# Either side of a padded length's border, an empty context, and one that has to be cut: the model reads 48 tokens.
LENGTHS = [(3, 2), (0, 5), (15, 1), (16, 2), (17, 8), (1, 1), (38, 8), (60, 9), (30, 48)]


def pairs_of(lengths: list[tuple[int, int]]) -> list[tuple[str, str]]:
    rng = np.random.default_rng(1)

    def text(length: int) -> str:
        return "".join(map(chr, rng.integers(97, 123, length)))

    return [(text(before), text(after)) for before, after in lengths]


def brute(context: list[int], ids: list[int], prefix: bool = False) -> tuple[np.ndarray, bool]:
    whole = (context + ids)[-49:]
    log_probs = brute_log_probs(whole[:-1], len(whole) - len(ids) if prefix else 0)[-len(ids) :]
    return log_probs[np.arange(len(ids)), ids], bool((log_probs.argmax(-1) == ids).all())


def test_a_continuation_gets_what_float64_gives_it_and_the_same_in_any_batch():
    """With jax 0.10 to the bit; 0.12 multiplies few rows otherwise than many, which is 5e-7 of a token."""
    pairs = pairs_of(LENGTHS)
    heard: list[str] = []
    scores = {size: Likelihood(tiny_model(), batch_size=size, log=heard.append).of_pairs(pairs) for size in (1, 3, 9)}
    for (context, continuation), *found in zip(pairs, *scores.values(), strict=True):
        expected, greedy = brute(list(context.encode()) or [BOS], list(continuation.encode()))
        np.testing.assert_allclose(found[0].log_probs, expected, rtol=0, atol=1e-4)
        assert found[0].total == pytest.approx(expected.sum(), abs=3e-4) and found[0].is_greedy == greedy
        for other in found[1:]:
            assert other.total == pytest.approx(found[0].total, abs=1e-5) and other.is_greedy == found[0].is_greedy
            if jax.__version__.startswith("0.10."):
                assert other.log_probs.tobytes() == found[0].log_probs.tobytes()
    assert heard == ["2 of 9 contexts were cut from the left to model.max_seq_len=48."] * 3


def test_order_and_company_change_no_bit():
    pairs = pairs_of(LENGTHS)
    forth, back = (Likelihood(tiny_model(), batch_size=4).of_pairs(own) for own in (pairs, pairs[::-1]))
    assert [one.log_probs.tobytes() for one in forth] == [one.log_probs.tobytes() for one in back[::-1]]


def test_greedy_is_said_of_the_models_own_choice():
    context = list(b"the quick")
    best = []
    for _ in range(3):
        best.append(int(brute_log_probs(context + best)[-1].argmax()))
    own, other = Likelihood(tiny_model()).of_ids([(context, best), (context, [*best[:-1], (best[-1] + 1) % 257])])
    assert own.is_greedy and not other.is_greedy


def test_a_whole_text_is_predicted_token_by_token_through_windows():
    """48 tokens are read at once: the second window begins at the 49th, the last one reaches back over all 48."""
    text = pairs_of([(0, 110)])[0][1]
    ids = list(text.encode())
    expected = [brute_log_probs([BOS, *ids[:47]])[np.arange(48), ids[:48]]]
    expected.append(brute_log_probs(ids[47:95])[np.arange(48), ids[48:96]])
    expected.append(brute_log_probs(ids[61:109])[-14:][np.arange(14), ids[96:110]])
    found = Likelihood(tiny_model(), batch_size=2).of_texts([text, "", text[:48]])
    np.testing.assert_allclose(found[0].log_probs, np.concatenate(expected), rtol=0, atol=1e-4)
    np.testing.assert_array_equal(found[2].log_probs, found[0].log_probs[:48])
    assert found[1].total == 0.0 and found[1].log_probs.shape == (0,)


def test_a_prefix_models_context_sees_itself_both_ways():
    model = dataclasses.replace(tiny_model(), config=tiny_config(name="prefix"))
    pairs = pairs_of([(20, 6), (3, 9)])
    for (context, continuation), found in zip(pairs, Likelihood(model).of_pairs(pairs), strict=True):
        expected, _ = brute(list(context.encode()), list(continuation.encode()), prefix=True)
        np.testing.assert_allclose(found.log_probs, expected, rtol=0, atol=1e-4)


class Joining(ByteTokenizer):
    """Bytes, but a blank belongs to the letter behind it, as in byte-pair encodings, and "ab" is one token."""

    def encode(self, text: str) -> np.ndarray:
        ids = []
        for byte in text.encode():
            if ids and ids[-1] == 32 and byte != 32:
                ids[-1] = byte - 64
            elif ids and (ids[-1], byte) == (97, 98):
                ids[-1] = 1
            else:
                ids.append(byte)
        return np.array(ids, np.int32)


def with_tokenizer(tokenizer: object, **data: object) -> Likelihood:
    config = tiny_config()
    config = dataclasses.replace(config, data=dataclasses.replace(config.data, **data))
    return Likelihood(dataclasses.replace(tiny_model(), tokenizer=tokenizer, config=config))


def test_blanks_at_a_contexts_end_belong_to_the_continuation():
    like = with_tokenizer(Joining())
    for pair in (("is ", "so"), ("is", " so")):
        context, ids = like.encode_pair(*pair)
        assert (context.tolist(), ids.tolist()) == ([105, 115], [115 - 64, 111])


@pytest.mark.parametrize("add_bos", [False, True])
def test_the_begin_of_text_token_stands_once_before_a_text(add_bos: bool):
    like = with_tokenizer(ByteTokenizer(), add_bos=add_bos)
    assert like.encode_pair("a", "b")[0].tolist() == [BOS] * add_bos + [97]
    assert [ids.tolist() for ids in like.encode_pair("", "bc")] == [[BOS], [98, 99]]
    assert [ids.tolist() for ids in like.encode_pair("  ", "b")] == [[BOS], [32, 32, 98]]


def test_what_cannot_be_scored_is_refused_in_one_sentence():
    with pytest.raises(UserError, match=r"'b' has no token of its own behind 'a'"):
        with_tokenizer(Joining()).encode_pair("a", "b")
    with pytest.raises(UserError, match=r"continuation of 49 tokens is longer than model\.max_seq_len=48"):
        Likelihood(tiny_model()).of_pairs([("a", "b" * 49)])
    with pytest.raises(UserError, match=r"neither a begin-of-text nor an end-of-text token"):
        with_tokenizer(CharTokenizer("abc\n")).of_pairs([("", "abc")])
    with pytest.raises(UserError, match=r"objective\.name=masked does not write on"):
        Likelihood(dataclasses.replace(tiny_model(), config=tiny_config(name="masked")))


def test_a_stated_prefix_stands_before_a_text_where_no_token_does():
    config = tiny_config()
    model = dataclasses.replace(tiny_model(), tokenizer=CharTokenizer("abc\n"), config=config)
    (found,) = Likelihood(model, prefix="\n").of_texts(["abca"])
    expected = brute_log_probs([0, 1, 2, 3])[np.arange(4), [1, 2, 3, 1]]  # "\n" has the lowest code point
    np.testing.assert_allclose(found.log_probs, expected, rtol=0, atol=1e-4)


def test_rows_are_padded_to_few_lengths():
    lengths = [padded_length(n, 1000) for n in range(1, 1001)]
    assert sorted(set(lengths)) == [16, 24, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1000]
    assert all(n <= padded <= max(16, 1.5 * n) for n, padded in enumerate(lengths, 1))
    assert padded_length(20, 64, 16) == 32


def test_few_rows_need_few_compilations():
    config, mesh = tiny_config(), Likelihood(tiny_model()).mesh
    rows = [Row(np.arange(n), 1) for n in (3, 9, 14, 20, 21, 22, 40)]
    made = list(likelihood._batches(config, rows, mesh, 2))
    assert made == [([6], 48, 2), ([3, 4], 24, 2), ([5], 24, 2), ([0, 1], 16, 2), ([2], 16, 2)]


def test_experts_with_places_drop_nothing_that_is_scored():
    """A row's number would depend on its padding: places are counted by the padded length."""
    experts = {"num_experts": 4, "experts_per_token": 1, "expert_mlp_dim": 8}
    models = []
    for factor in (0.0, 0.3):
        config = tiny_config()
        own = dataclasses.replace(config.model, num_layers=1, expert_capacity_factor=factor, **experts)
        config = dataclasses.replace(config, model=own)
        models.append(dataclasses.replace(tiny_model(), config=config, params=random_params(config)))
    free, crowded = (Likelihood(model).of_pairs([("abcdefgh", "ijk")])[0] for model in models)
    assert free.log_probs.tobytes() == crowded.log_probs.tobytes()


def test_a_mesh_changes_no_more_than_rounding():
    found = run_module("harness_devices")
    for mesh in ("tensor", "context", "stage"):
        np.testing.assert_allclose(found[mesh], found["alone"], rtol=0, atol=1e-4, err_msg=mesh)
    assert found["refused"] == "model.max_seq_len=48 does not divide over 2 * mesh.context=10; change one of them."
