"""Sweep files: combinators, strict keys, trials that are known again by their config."""

from __future__ import annotations

import collections
import math
import pathlib

import numpy as np
import pytest

from gptjax import recipes
from gptjax.config import UserError, from_json, to_json
from gptjax.sweeps.definition import Sweep, as_override, config_hash, load_sweep, make_trials
from gptjax.sweeps.folder import SweepFolder
from gptjax.sweeps.space import Space, chain, choice, grid, integers, log_uniform, sample, seeds, uniform, zip_

ROOT = pathlib.Path(__file__).resolve().parents[2]
RECIPE = str(ROOT / "configs/stdlib_tiny.py")
LR, LAYERS = "optimizer.learning_rate", "model.num_layers"


def test_grid_varies_its_last_part_fastest_and_takes_spaces():
    space = grid({LR: [0.1, 0.2]}, seeds(2))
    assert list(space) == [
        {LR: 0.1, "train.seed": 0},
        {LR: 0.1, "train.seed": 1},
        {LR: 0.2, "train.seed": 0},
        {LR: 0.2, "train.seed": 1},
    ]
    assert grid({LR: [0.1, 0.2], LAYERS: [1, 2, 3]}) == grid({LR: [0.1, 0.2]}, {LAYERS: [1, 2, 3]})
    assert list(grid()) == [{}]


def test_zip_chain_and_seeds():
    side_by_side = zip_({"model.model_dim": [64, 128], "model.num_heads": [2, 4]})
    assert list(side_by_side) == [
        {"model.model_dim": 64, "model.num_heads": 2},
        {"model.model_dim": 128, "model.num_heads": 4},
    ]
    assert list(chain(side_by_side, seeds([7]))) == [*side_by_side, {"train.seed": 7}]


def test_sample_is_a_function_of_its_seed_and_keeps_its_first_points():
    distributions = {
        LR: log_uniform(1e-4, 1e-1),
        "optimizer.beta1": uniform(0.8, 0.95),
        LAYERS: integers(1, 8),
        "model.norm": choice(["layernorm", "rmsnorm"]),
    }
    few, many = sample(10, distributions, seed=1), sample(2000, distributions, seed=1)
    assert few.points == many.points[:10] and few != sample(10, distributions, seed=2)
    rates = np.array([point[LR] for point in many])
    assert rates.min() >= 1e-4 and rates.max() <= 1e-1
    decades = np.histogram(np.log10(rates), bins=[-4, -3, -2, -1])[0]
    assert np.abs(decades - 2000 / 3).max() < 4 * math.sqrt(2000 / 3 * 2 / 3), "each decade alike, within four deviations"
    layers = collections.Counter(point[LAYERS] for point in many)
    assert set(layers) == set(range(1, 9)) and min(layers.values()) > 170
    assert all(type(point[LAYERS]) is int and type(point[LR]) is float for point in few)
    small = collections.Counter(point[LAYERS] for point in sample(2000, {LAYERS: integers(1, 8, log=True)}))
    assert set(small) == set(range(1, 9)) and small[1] > 4 * small[8]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: grid({LR: [1.0]}, {LR: [2.0]}), "grid: optimizer.learning_rate is set by two of its parts"),
        (lambda: grid({LR: []}), "grid: optimizer.learning_rate has no values"),
        (lambda: grid({"model.norm": "rmsnorm"}), "grid: model.norm needs a list of values, not 'rmsnorm'"),
        (lambda: zip_({LR: [1.0, 2.0], LAYERS: [1]}), "optimizer.learning_rate has 2, model.num_layers has 1"),
        (lambda: sample(3, {LR: [1, 2]}), "needs uniform, log_uniform, integers or choice"),
        (lambda: sample(0, {LR: uniform(0, 1)}), "at least 1, not 0"),
        (lambda: log_uniform(0, 1), "lower bound above 0"),
        (lambda: uniform(2, 1), "must lie below"),
        (lambda: integers(0.5, 3), "whole numbers"),
    ],
)
def test_a_mistake_in_a_combinator_is_one_sentence(make, sentence):
    with pytest.raises(UserError, match=sentence):
        make()


@pytest.mark.parametrize(
    ("point", "sentence"),
    [
        ({"optimizer.learning_rat": 1.0}, "unknown config key optimizer.learning_rat; did you mean optimizer.learning_rate?"),
        ({LR: "fast"}, "optimizer.learning_rate='fast' must be a number"),
        ({LAYERS: 2.0}, "model.num_layers=2.0 must be a whole number"),
        ({"model": 3}, "model is a group of keys"),
        ({"model.num_heads": 3}, "does not divide model.model_dim=128"),
    ],
)
def test_the_second_point_is_refused_before_the_first_trial_runs(point, sentence):
    with pytest.raises(UserError) as refused:
        make_trials(Sweep(RECIPE, Space(({LR: 0.1}, point))))
    assert str(refused.value).startswith("point 2 of the sweep (") and sentence in str(refused.value)


def test_points_that_give_the_same_config_are_one_trial():
    default = recipes.load_recipe(RECIPE)
    trials = make_trials(Sweep(RECIPE, chain(grid({LR: [0.02, 0.03]}), grid({LAYERS: [4]}), seeds(2))))
    assert [trial.overrides for trial in trials] == [{LR: 0.02}, {LR: 0.03}, {"train.seed": 1}], "0.02, 4 and 0 are the recipe's"
    assert trials[0].config == default


def test_overrides_lie_below_the_points_and_below_the_command_lines():
    sweep = Sweep(RECIPE, grid({LR: [0.5]}), {LR: 0.1, LAYERS: 2})
    (trial,) = make_trials(sweep)
    assert (trial.config.optimizer.learning_rate, trial.config.model.num_layers) == (0.5, 2)
    (trial,) = make_trials(sweep, ["optimizer.learning_rate=0.7"])
    assert trial.config.optimizer.learning_rate == 0.7


def test_a_trial_is_known_by_its_config_alone(tmp_path):
    sweep = Sweep(RECIPE, grid({LR: [0.1, 0.2]}))
    trials = make_trials(sweep)
    folder = SweepFolder(tmp_path)
    folder.write_definition(trials, {})
    (tmp_path / "config.json").write_text(to_json(trials[0].config))
    assert config_hash(from_json(tmp_path / "config.json")) == trials[0].hash
    wider = make_trials(Sweep(RECIPE, grid({LR: [0.1, 0.2]}, seeds(2))))  # the same two, under other names, and two more
    assert wider[0].name != trials[0].name and wider[0].hash == trials[0].hash
    assert [trial.name for trial in folder.settle_names(wider)] == [
        trials[0].name,
        wider[1].name,
        trials[1].name,
        wider[3].name,
    ]


def test_names_are_readable_and_fit_a_file_system():
    long = make_trials(Sweep(RECIPE, grid({"evaluate.sample_prompt": ["/etc/../x y\n" * 40, "b"], LR: [1e-3]})))
    assert all(len(trial.name) <= 91 and trial.name.isprintable() and "/" not in trial.name for trial in long)
    assert make_trials(Sweep(RECIPE, grid({LR: [1e-3, 0.5], LAYERS: [2]})))[0].name.startswith("learning_rate=0.001-")


@pytest.mark.parametrize("value", [0.1 + 0.2, 3, True, "a text", ("norm", "bias")])
def test_an_override_in_words_says_the_same(value):
    keys = {float: LR, int: LAYERS, bool: "model.norm_bias", str: "evaluate.sample_prompt", tuple: "optimizer.no_decay"}
    key = keys[type(value)]
    (typed,) = make_trials(Sweep(RECIPE, grid({key: [value]})))
    assert recipes.load_recipe(RECIPE, [as_override(key, value)]) == typed.config


def test_a_list_with_a_comma_in_it_has_no_words():
    with pytest.raises(UserError, match="has a comma"):
        as_override("optimizer.no_decay", ("a,b",))


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("", "the sweep file .* has no function get_sweep"),
        ("def get_sweep(): return 3", "must return a gptjax.sweeps.definition.Sweep, not int"),
        ("def get_sweep(): return 1 / 0", "fails at line 1 with ZeroDivisionError: division by zero"),
        ("def get_sweep(:", "cannot be read"),
        (
            "from gptjax.sweeps.definition import Sweep\nfrom gptjax.sweeps.space import grid\n"
            "def get_sweep(): return Sweep('x.py', grid({'a': [1]}), timeout=-1)",
            "timeout=-1 must be a number of at least 0",
        ),
    ],
)
def test_a_mistake_in_a_sweep_file_is_one_sentence(tmp_path, text, sentence):
    (tmp_path / "sweep.py").write_text(text)
    with pytest.raises(UserError, match=sentence):
        load_sweep(str(tmp_path / "sweep.py"))


def test_the_example_sweeps_load(monkeypatch, tmp_path):
    for folder in ("configs", "experiments"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    base = recipes.load_recipe("configs/small_gpt.py").with_vocab_size(8000)
    pathlib.Path("runs/small_gpt").mkdir(parents=True)
    pathlib.Path("runs/small_gpt/config.json").write_text(to_json(base))
    for path in sorted(pathlib.Path("experiments").glob("*/sweep.py")):
        sweep = load_sweep(str(path))
        assert sweep.search is not None or len(make_trials(sweep)) > 1  # a search's are not known before it runs
        assert (path.parent / "README.md").is_file()
