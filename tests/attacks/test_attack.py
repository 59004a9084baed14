"""Attacks on classifiers made by hand: what is found, what is counted, and what it depends on."""

import hashlib
import itertools
import math

import numpy as np
import pytest

from gptjax.attacks.attack import as_json, run_attack
from gptjax.attacks.constraints import Constraints
from gptjax.attacks.perturbations import PERTURBATIONS
from gptjax.attacks.recipes import RECIPES, Recipe, find_recipe
from gptjax.attacks.search import RANKINGS, SEARCHES, Goal, Problem
from gptjax.attacks.summary import examples, summary, table
from gptjax.attacks.words import STOP_WORDS, split
from gptjax.config import UserError
from gptjax.data.records import read_records
from tests.attacks.classifiers import Keywords, naive_bayes, records_of

MODEL = Keywords({"win": 2.0, "free": 1.5, "prize": 0.4, "meeting": -1.0, "gain": 0.1, "lunch": -2.0})
DELETE = Recipe(("delete_word",))
SPAM = "please win a free prize before the meeting"  # logit -1 + 2 + 1.5 + 0.4 - 1 = 1.9


def attack(records, recipe, model=MODEL, **options):
    return run_attack(Keywords(model.weights, model.bias).predict_proba, model.labels, records, recipe, **options)


# --- what is found ---


def test_greedy_by_deletion():
    (result,) = attack(records_of((SPAM, "spam")), DELETE)
    assert (result.before, result.after, result.outcome) == ("spam", "ham", "succeeded")
    assert result.changed == (("win", ""),) and result.perturbed == "please a free prize before the meeting"
    assert result.words == 8 and result.changed_share == 1 / 8
    assert result.queries == 5  # one a word that is no stop word; what the search tries then, it has asked for already
    (result,) = attack(records_of(("please win a free prize!", "spam")), DELETE)  # 2.9: without "win" it is still spam
    assert result.changed == (("win", ""), ("free", "")) and result.perturbed == "please a prize!"
    assert result.queries == 4 + 1


def test_the_order_of_words_is_by_what_their_loss_does():
    problem = Problem(SPAM, Goal(1), MODEL.predict_proba([SPAM])[0], DELETE, 0, {})
    for name, replaced in (("deletion", ""), ("unk", "[UNK]")):
        ranking = RANKINGS[name](problem)
        texts = next(ranking)
        with pytest.raises(StopIteration) as stop:
            ranking.send(MODEL.predict_proba(texts))
        words = split(SPAM).words
        by_hand = sorted(problem.open, key=lambda i: -MODEL.weights.get(words[i], 0.0))
        assert stop.value.value == by_hand, name
        assert set(texts) == {problem.words.replaced({i: replaced}) for i in problem.open}


def test_words_that_are_twice_in_a_text_are_ranked_alike():
    text = "win win lunch"
    problem = Problem(text, Goal(1), MODEL.predict_proba([text])[0], DELETE, 0, {})
    ranking = RANKINGS["deletion"](problem)
    assert next(ranking) == ["win lunch", "win win"]
    with pytest.raises(StopIteration) as stop:
        ranking.send(MODEL.predict_proba(["win lunch", "win win"]))
    assert stop.value.value == [0, 1, 2]


def scrambled(texts: list[str]) -> np.ndarray:
    """Probabilities of two classes that have nothing to do with one another from text to text; one in 40 is of the second."""
    numbers = [int.from_bytes(hashlib.blake2b(text.encode(), digest_size=4).digest(), "big") for text in texts]
    second = np.asarray([0.9 if number % 40 == 0 else 0.4 * (number / 2**32) for number in numbers])
    return np.stack([1 - second, second], axis=1)


@pytest.mark.parametrize("most", [1, 2, 3])
def test_a_wide_beam_finds_what_trying_everything_finds(most):
    words = ["alpha", "bravo", "charlie", "delta", "echo", "foxtrot"]
    texts = [text for text in (" ".join([*words, f"golf{n}"]) for n in range(40)) if scrambled([text]).argmax() == 0]
    records = records_of(*((text, "ham") for text in texts))
    found = {}
    for width in (1, 100):
        recipe = Recipe(("delete_word",), Constraints(max_words=most), search="beam", width=width)
        found[width] = [result.outcome for result in run_attack(scrambled, ("ham", "spam"), records, recipe)]
    possible = []
    for text in texts:
        subsets = itertools.chain.from_iterable(itertools.combinations(range(7), n) for n in range(1, most + 1))
        smaller = [" ".join(word for i, word in enumerate(text.split()) if i not in out) for out in subsets]
        possible.append("succeeded" if scrambled(smaller).argmax(axis=1).any() else "failed")
    assert found[100] == possible and set(possible) == {"succeeded", "failed"}
    assert (found[1] == possible) == (most == 1)


def test_a_word_that_may_not_change_does_not_change_places():
    recipe = Recipe(("swap_words",))
    problem = Problem("cats the dogs bark", Goal(0), np.asarray([0.9, 0.1]), recipe, 0, {})
    assert [list(problem.candidates({}, index)) for index in problem.open] == [[], [{2: "bark", 3: "dogs"}], []]
    assert list(problem.candidates({3: "brak"}, 2)) == []  # it has changed already


def test_a_target_class():
    labels = ("a", "b", "c")

    def predict_proba(texts):
        counts = np.asarray([[1 + 3 * text.count("x"), 1 + text.count("y"), 1 + text.count("z")] for text in texts], float)
        return counts / counts.sum(axis=1, keepdims=True)

    records = records_of(("xx yyy zz oh", "a"), ("yy zz oh", "b"), ("zz oh", "c"), ("xx zz oh", "c"), ("xx zz oh", "b"))
    recipe = Recipe(("delete_word",), Constraints(min_letters=1))
    results = run_attack(predict_proba, labels, records, recipe, target="c")
    assert [result.outcome for result in results] == ["succeeded", "succeeded", "skipped", "skipped", "skipped"]
    assert [result.after for result in results] == ["c", "c", "c", "a", "a"]
    assert results[0].perturbed == "zz oh" and results[1].perturbed == "zz oh"


def test_random_draws_change_as_many_words_as_they_may():
    texts = [(f"alpha bravo charlie delta echo foxtrot golf hotel india juliet {i}", "ham") for i in range(20)]
    model = Keywords({}, -1.0)
    asked = []

    def predict_proba(batch):
        asked.extend(batch)
        return model.predict_proba(batch)

    recipe = Recipe(("typo",), Constraints(max_share=0.28), search="random", draws=5)
    results = run_attack(predict_proba, model.labels, records_of(*texts), recipe)
    for text in asked[20:]:
        number = text.split()[-1]
        pairs = zip(f"alpha bravo charlie delta echo foxtrot golf hotel india juliet {number}".split(), text.split(), strict=True)
        assert sum(old != new for old, new in pairs) == 3  # int(0.28 * 11)
    assert {result.queries for result in results} == {5} and len(asked) == 120


# --- the constraints, in every recipe ---


@pytest.mark.parametrize("name", RECIPES)
def test_recipes_keep_their_constraints(name):
    recipe = RECIPES[name]
    limits = recipe.constraints
    texts = ["The lunch is not free, don't win it; we will gain a prize", "你未来的午餐不是免费的，大王", "No WIN at meeting 24"]
    sent = []

    def predict_proba(batch):
        sent.extend(batch)
        return np.tile([0.9, 0.1], (len(batch), 1))

    lexicon = {"free": ("gratis", "costless"), "prize": ("award",)}
    records = records_of(*((text, "ham") for text in texts))
    results = run_attack(predict_proba, ("ham", "spam"), records, recipe, lexicon=lexicon, side_by_side=1, max_queries=300)
    assert [result.outcome for result in results] == ["failed"] * 3 and sum(result.queries for result in results) > 0
    for text in texts:
        words = split(text)
        problem = Problem(text, Goal(0), np.asarray([0.9, 0.1]), recipe, 0, lexicon)
        for index in problem.open:
            for changes in problem.candidates({}, index):
                for i, new in changes.items():
                    old = words.words[i]
                    assert new != old and any(letter.isalpha() for letter in old)
                    assert not (limits.skip_stop_words and old.lower() in STOP_WORDS)
                    assert not limits.keep_ends or (old[0] == new[0] and old[-1] == new[-1])
                    assert len(old) >= limits.min_letters or old in "你未来的午餐不是免费的大王"
                    assert list(problem.candidates(changes, i)) == []  # a changed word is not changed again
                assert len(changes) <= max(1, limits.max_share * len(words))


def test_every_perturbation_is_of_some_recipe():
    assert {name for recipe in RECIPES.values() for name in recipe.perturbations} | {"typo"} == set(PERTURBATIONS)
    assert {recipe.search for recipe in RECIPES.values()} == set(SEARCHES)
    assert {recipe.ranking for recipe in RECIPES.values()} == set(RANKINGS)


# --- what is counted ---

MANY = [
    ("win a free prize today", "spam"),
    ("win win win free free lunch", "spam"),
    ("our meeting is at lunch", "ham"),
    ("free lunch prize", "ham"),
    ("win the prize", "ham"),  # taken for spam: skipped
    ("free prize and gain", "spam"),
    ("oh", "ham"),
    ("...", "ham"),
]


@pytest.mark.parametrize("recipe", ["deepwordbug", "pruthi", "random_typos", "case"])
@pytest.mark.parametrize("cap", [0, 1, 7])
def test_queries_are_counted_capped_and_batched(recipe, cap):
    model = Keywords(MODEL.weights)
    results = run_attack(
        model.predict_proba, model.labels, records_of(*MANY), RECIPES[recipe], max_queries=cap, batch_size=5, side_by_side=3
    )
    assert sum(result.queries for result in results) + len(MANY) == model.asked
    assert max(map(len, model.batches)) == 5
    assert not cap or max(result.queries for result in results) == cap
    for result in results:
        assert result.outcome != "skipped" or (result.queries == 0 and result.perturbed == result.original)
        answer = model.labels[int(model.predict_proba([result.perturbed]).argmax())]
        assert answer == result.after and (result.outcome == "succeeded") == (answer != result.label == result.before)


def test_no_text_is_asked_for_twice():
    model = Keywords(MODEL.weights)
    run_attack(model.predict_proba, model.labels, records_of((SPAM, "spam")), Recipe(("typo", "delete_word"), tries=4))
    asked = list(itertools.chain(*model.batches))
    assert len(asked) == len(set(asked)) > 5


def test_a_result_depends_on_seed_and_text_alone():
    records = records_of(*MANY * 3)
    recipe = RECIPES["random_typos"]
    whole = attack(records, recipe)
    assert attack(records, recipe, batch_size=1, side_by_side=1) == whole
    assert attack(records[::-1], recipe, side_by_side=5)[::-1] == whole
    assert attack(records[2:4], recipe) == whole[2:4]
    assert attack(records, recipe, seed=1) != whole
    drawn = attack(records, recipe, max_examples=7)
    assert len(drawn) == 7 and drawn == [result for result in whole if result in drawn]
    assert drawn != attack(records, recipe, max_examples=7, seed=1)
    assert attack(records, recipe, max_examples=99) == whole


def test_summary():
    results = attack(records_of(*MANY), RECIPES["deepwordbug"])
    outcomes = [result.outcome for result in results]
    assert outcomes[4] == "skipped" and {"succeeded", "failed"} < set(outcomes)
    figures = {figure.name: figure for figure in summary(results)}
    wins, n = outcomes.count("succeeded"), len(MANY)
    assert figures["accuracy before"].value == (n - 1) / n
    assert figures["accuracy under attack"].value == (n - 1 - wins) / n
    assert (figures["success rate"].value, figures["success rate"].n) == (wins / (n - 1), n - 1)
    shares = [len(result.changed) / len(split(result.original)) for result in results if result.outcome == "succeeded"]
    assert figures["changed share"].value == pytest.approx(np.mean(shares), rel=1e-12)
    assert figures["queries"].value == sum(result.queries for result in results) / (n - 1)
    for figure in figures.values():
        assert figure.low <= figure.value <= figure.high
    shown = table(summary(results))
    assert f"accuracy before        {100 * (n - 1) / n:.1f} % [" in shown and f", n={n}" in shown
    assert examples(results, 1).startswith("made.tsv, line 1: spam becomes ham: 'win' to ")
    assert as_json(results[0])["changed"][0][0] == "win"


def test_summary_of_nothing_attacked():
    figures = {figure.name: figure for figure in summary(attack(records_of(("win", "ham")), DELETE))}
    assert figures["accuracy before"].value == 0 and math.isnan(figures["success rate"].value)
    assert "success rate           no text" in table(list(figures.values()))


def test_attacks_of_a_real_classifier_are_worse_than_chance_errors(shared_data):
    found = read_records(str(shared_data / "sms_spam" / "sms.tsv"), columns=["label", "text"]).records
    model = naive_bayes(found[:4000])
    rates = {}
    for name in ("typos", "random_typos", "deepwordbug"):
        spam = [record for record in found[4000:] if record.values["label"] == "spam"]
        results = run_attack(model.predict_proba, model.labels, spam, RECIPES[name], max_examples=25)
        figures = {figure.name: figure.value for figure in summary(results)}
        rates[name] = figures["success rate"]
        assert figures["accuracy before"] > 0.8
    assert rates["typos"] <= rates["random_typos"] < rates["deepwordbug"]


# --- mistakes ---


@pytest.mark.parametrize(
    ("records", "options", "message"),
    [
        (records_of(("x", "eggs")), {}, "made.tsv, line 1 has the label 'eggs', none of ham, spam"),
        (records_of(("x", "ham"), (" ", "ham")), {}, "made.tsv, line 2 has no text as its field 'text'"),
        (records_of(("x", "ham")), {"text_field": "body"}, "line 1 has no text as its field 'body'"),
        (records_of(("x", "ham")), {"target": "spa"}, "target='spa' is none of the labels ham, spam; did you mean spam?"),
        ([], {}, "there is no text to attack"),
    ],
)
def test_mistakes(records, options, message):
    with pytest.raises(UserError, match=message):
        attack(records, DELETE, **options)


def test_mistakes_in_recipes():
    with pytest.raises(UserError, match="needs a lexicon"):
        attack(records_of(("x", "ham")), RECIPES["synonyms"])
    with pytest.raises(UserError, match="recipe='typo' is none of deepwordbug, .*; did you mean typos?"):
        find_recipe("typo")
    with pytest.raises(ValueError, match="perturbations='swap' is none of swap_letters, "):
        Recipe(("swap",))
    with pytest.raises(ValueError, match="search='depth'"):
        Recipe(("typo",), search="depth")


@pytest.mark.parametrize(
    ("answer", "message"),
    [(lambda n: np.ones((n, 3)), r"gave \(2, 3\) for 2 texts and 2"), (lambda n: np.full((n, 2), np.nan), "not finite")],
)
def test_a_model_that_answers_something_else(answer, message):
    with pytest.raises(ValueError, match=message):
        run_attack(lambda texts: answer(len(texts)), ("ham", "spam"), records_of(*MANY[:2]), DELETE)
