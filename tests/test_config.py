"""The door: every mistake is one sentence that names the key."""

from __future__ import annotations

import dataclasses
import itertools
import json
import pathlib
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gptjax import config as c
from gptjax import recipes
from gptjax.config import Config, UserError

LENGTH = {"train": {"duration_steps": 10}}


def nested(flat: dict[str, object]) -> dict:
    """{"a.b": 1} as {"a": {"b": 1}}, over a run of ten steps."""
    values: dict = {"train": dict(LENGTH["train"])}
    for key, value in flat.items():
        *groups, leaf = key.split(".")
        node = values
        for group in groups:
            node = node.setdefault(group, {})
        node[leaf] = value
    return values


def one_sentence(error: UserError) -> str:
    text = str(error)
    assert "\n" not in text and len(text) < 400, text
    assert re.search(r"[^.?][.?]$", text), text
    return text


REFUSED = {
    "unknown key": ({"model.num_layer": 3}, "model.num_layer; did you mean model.num_layers?"),
    "unknown group": ({"modl": {}}, "modl; did you mean model?"),
    "key of another group": ({"train.learning_rate": 1.0}, "did you mean optimizer.learning_rate?"),
    "bool for int": ({"model.num_layers": True}, "model.num_layers=True must be a whole number"),
    "text for int": ({"model.num_layers": "3"}, "model.num_layers='3' must be a whole number"),
    "float for int": ({"model.num_layers": 3.0}, "model.num_layers=3.0 must be a whole number"),
    "text for float": ({"optimizer.learning_rate": "1e-3"}, "optimizer.learning_rate='1e-3' must be a number"),
    "bool for float": ({"optimizer.learning_rate": True}, "optimizer.learning_rate=True must be a number"),
    "int beyond floats": ({"optimizer.learning_rate": 10**400}, "optimizer.learning_rate="),
    "int for bool": ({"model.gated_mlp": 1}, "model.gated_mlp=1 must be True or False"),
    "number for text": ({"data.path": 3}, "data.path=3 must be a text"),
    "text for list": ({"optimizer.no_decay": "bias"}, "optimizer.no_decay='bias' must be a list of texts"),
    "list of numbers": ({"optimizer.no_decay": (1,)}, "optimizer.no_decay=(1,) must be a list of texts"),
    "value for group": ({"model": 3}, "model is 3, but it must be a group of keys"),
    "None": ({"model.num_layers": None}, "model.num_layers=None"),
    "None for float": ({"optimizer.learning_rate": None}, "optimizer.learning_rate=None"),
    "None for text": ({"data.path": None}, "data.path=None"),
    "NaN": ({"optimizer.learning_rate": float("nan")}, "optimizer.learning_rate=nan must be a finite number"),
    "infinity": ({"optimizer.weight_decay": float("inf")}, "optimizer.weight_decay=inf must be a finite number"),
    "heads": ({"model.model_dim": 10, "model.num_heads": 4}, "model.num_heads=4 does not divide model.model_dim=10"),
    "kv heads": ({"model.num_heads": 4, "model.num_kv_heads": 3}, "model.num_kv_heads=3 does not divide model.num_heads=4"),
    "odd rotary head": ({"model.position": "rotary", "model.head_dim": 7}, "model.head_dim"),
    "context": ({"data.seq_len": 65, "model.max_seq_len": 64}, "data.seq_len=65 is longer than model.max_seq_len=64"),
    "learning rate": ({"optimizer.learning_rate": -1e-3}, "optimizer.learning_rate=-0.001 must be at least 0"),
    "dropout of all": ({"model.residual_dropout": 1.0}, "model.residual_dropout=1.0 must be below 1"),
    "epsilon": ({"model.norm_epsilon": 0.0}, "model.norm_epsilon=0.0 must be above 0"),
    "share": ({"optimizer.final_fraction": 1.5}, "optimizer.final_fraction=1.5 must be at most 1"),
    "two durations": ({"train.duration_tokens": 9}, "train.duration_steps=10 and train.duration_tokens=9 are both given"),
    "two of another": (
        {"optimizer.warmup_steps": 2, "optimizer.warmup_epochs": 1.0},
        "optimizer.warmup_epochs=1.0 are both given",
    ),
    "no duration": ({"train.duration_steps": 0}, "train.duration_steps"),
    "choice": ({"optimizer.name": "adamv"}, "did you mean adamw?"),
    "accumulation": ({"train.accumulation_steps": 3, "data.batch_size": 16}, "train.accumulation_steps=3 does not divide"),
    "empty mesh": ({"mesh.data": 0}, "mesh.data=0"),
    "two axes take the rest": ({"mesh.tensor": -1}, "mesh.data=-1 and mesh.tensor=-1: only one axis"),
    "wsd": ({"optimizer.schedule": "wsd"}, "optimizer.decay_steps"),
    "schedule-free": ({"optimizer.name": "schedule_free_adamw", "optimizer.beta1": 0.0}, "optimizer.beta1"),
    "weights not held": ({"model.attention": "xla", "model.attention_dropout": 0.1}, "model.attention=xla"),
    "no path": ({"data.source": "text"}, "data.path"),
    "no name": ({"data.source": "tfds"}, "data.name"),
    "no tokenizer": ({"data.tokenizer": "gpt2"}, "data.tokenizer_path"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused_in_one_sentence_that_names_the_key(case: str) -> None:
    values, said = REFUSED[case]
    with pytest.raises(UserError) as error:
        c.from_dict(nested(values))
    assert said in one_sentence(error.value)


@pytest.mark.parametrize("bad", [None, float("nan"), float("inf"), -float("inf"), object(), [], {}])
def test_no_knob_takes_what_no_type_allows(bad: object) -> None:
    for key, value, _ in c.walk(Config()):
        if bad == [] and isinstance(value, tuple):
            continue
        with pytest.raises(UserError, match=re.escape(key)):
            c.from_dict(nested({key: bad}))


@pytest.fixture
def recipe(tmp_path: pathlib.Path):
    def write(body: str, name: str = "recipe.py") -> str:
        path = tmp_path / name
        path.write_text("from gptjax.config import UserError, defaults\n" + body)
        return str(path)

    return write


GOOD = "def get_config(arg='4'):\n    c = defaults()\n    c.train.duration_steps = int(arg)\n    return c\n"


def test_recipe_argument_and_overrides(recipe) -> None:
    path = recipe(GOOD)
    assert recipes.load_recipe(path).train.duration_steps == 4
    assert recipes.load_recipe(f"{path}:7").train.duration_steps == 7
    config = recipes.load_recipe(path, ["train.duration_steps=0", "train.duration_tokens=1e6", "model.num_layers=3"])
    assert (config.train.duration_steps, config.train.duration_tokens, config.model.num_layers) == (0, 1_000_000, 3)


def test_run_folders_config_is_a_recipe(tmp_path: pathlib.Path) -> None:
    config = c.from_dict(nested({"model.model_dim": 32}))
    path = tmp_path / "config.json"
    path.write_text(c.to_json(config))
    assert recipes.load_recipe(str(path)) == config
    assert recipes.load_recipe(str(path), ["optimizer.no_decay=norm,head"]).optimizer.no_decay == ("norm", "head")


RECIPES = {
    "raises": ("def get_config():\n    return 1 // 0\n", "recipe.py fails at line 3 with ZeroDivisionError"),
    "raises on import": ("import json\njson.loads('{')\n", "recipe.py fails at line 3 with JSONDecodeError"),
    "says it itself": ("def get_config():\n    raise UserError('no such size: huge.')\n", "no such size: huge."),
    "no get_config": ("x = 1\n", "recipe.py has no function get_config"),
    "not Python": ("def get_config(:\n", "recipe.py cannot be read: invalid syntax at line 2"),
    "misspelt": (
        "def get_config():\n    c = defaults()\n    c.model.num_layer = 3\n    return c\n",
        "num_layer; did you mean num_layers?",
    ),
    "wrong type": ("def get_config():\n    c = defaults()\n    c.model.num_layers = 'x'\n    return c\n", "num_layers"),
    "no argument taken": ("def get_config():\n    return defaults()\n", "get_config"),
    "nothing returned": ("def get_config(arg=''):\n    defaults()\n", "must return a ConfigDict, not NoneType"),
}


@pytest.mark.parametrize("case", RECIPES)
def test_recipe_that_fails(case: str, recipe) -> None:
    body, said = RECIPES[case]
    with pytest.raises(UserError) as error:
        recipes.load_recipe(recipe(body) + (":big" if case == "no argument taken" else ""), ["model.num_layers=2"])
    assert said in one_sentence(error.value)


def test_missing_recipe_names_the_nearest(recipe) -> None:
    path = pathlib.Path(recipe(GOOD, "shakespeare.py"))
    with pytest.raises(UserError) as error:
        recipes.load_recipe(str(path.with_name("shakespare.py")))
    assert "shakespare.py does not exist" in str(error.value) and "shakespeare.py?" in one_sentence(error.value)
    for missing in ("nowhere/at/all.py", str(path.parent / "none.json"), str(path.parent)):
        with pytest.raises(UserError, match=re.escape(missing)):
            recipes.load_recipe(missing)


@pytest.mark.parametrize("text", ["{", "[]", "null", '{"model": null}', '{"optimizer": {"learning_rate": NaN}}'])
def test_damaged_config_json(text: str, tmp_path: pathlib.Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(UserError):
        recipes.load_recipe(str(path))


OVERRIDES = {
    "model.num_layers": [("3", 3), ("1_000", 1000), ("1e6", 1_000_000), ("2.0", 2)],
    "optimizer.learning_rate": [("3", 3.0), ("1e-4", 1e-4)],
    "model.gated_mlp": [("true", True), ("False", False), ("1", True), ("0", False)],
    "data.path": [("a=b,c", "a=b,c"), ("", ""), ("None", "None")],
    "optimizer.no_decay": [("a,b", ("a", "b")), ("", ())],
    "init_from": [("runs/a", "runs/a")],
}


@pytest.mark.parametrize("key", OVERRIDES)
def test_override_is_read_as_the_declared_type(key: str) -> None:
    for text, expected in OVERRIDES[key]:
        values = c.defaults()
        values.train.duration_steps = 1
        recipes.apply_override(values, f"{key}={text}")
        value = c.flatten(c.from_dict(values))[key]
        assert value == expected and type(value) is type(expected)


@pytest.mark.parametrize(
    ("override", "said"),
    [
        ("model.num_layers", "has no value; write --config.model.num_layers=VALUE"),
        ("model=3", "model is a group of keys; set one of model.vocab_size"),
        ("model.num_layer=3", "did you mean model.num_layers?"),
        ("model.num_layers.x=3", "unknown config key model.num_layers.x"),
        ("=3", "unknown config key"),
        ("model.num_layers=3.5", "model.num_layers='3.5' must be a whole number"),
        ("model.num_layers=inf", "model.num_layers='inf' must be a whole number"),
        ("model.gated_mlp=maybe", "model.gated_mlp='maybe' must be True or False"),
        ("optimizer.learning_rate=fast", "optimizer.learning_rate='fast' must be a number"),
        ("optimizer.learning_rate=nan", "optimizer.learning_rate=nan must be a finite number"),
    ],
)
def test_override_refused(override: str, said: str) -> None:
    values = c.defaults()
    values.train.duration_steps = 1
    with pytest.raises(UserError) as error:
        recipes.apply_override(values, override)
        c.from_dict(values)
    assert said in str(error.value)
    assert "\n" not in str(error.value)


KEYS = [key for key, _, _ in c.walk(Config())]
VALUES = st.one_of(st.text(), st.integers().map(str), st.floats().map(str), st.from_regex(r"[0-9_.eE+-]{1,12}"))


@settings(max_examples=300, deadline=None)
@given(st.lists(st.one_of(st.text(), st.tuples(st.sampled_from(KEYS), VALUES).map("=".join)), max_size=3))
def test_no_override_escapes_as_anything_but_a_user_error(overrides: list[str]) -> None:
    values = c.defaults()
    values.train.duration_steps = 1
    try:
        for override in overrides:
            recipes.apply_override(values, override)
        config = c.from_dict(values)
    except UserError:
        return
    assert c.from_dict(c.to_dict(config)) == config


def test_defaults_are_locked_and_complete() -> None:
    values = c.defaults()
    with pytest.raises((AttributeError, KeyError)):
        values.model.num_layer = 3
    with pytest.raises((AttributeError, KeyError)):
        values.modell = 3
    values.train.duration_steps = 10
    assert c.from_dict(values) == c.from_dict(LENGTH)


def test_round_trips_and_hashes() -> None:
    config = c.from_dict(nested({"optimizer.no_decay": ["a", "b"], "model.model_dim": 48, "optimizer.learning_rate": 1}))
    again = c.from_dict(c.to_dict(config))
    assert again == config and hash(again) == hash(config)
    assert c.from_dict(json.loads(c.to_json(config))) == config
    assert list(c.to_dict(config)["model"]) == [field.name for field in dataclasses.fields(c.ModelConfig)]
    assert hash(dataclasses.replace(config, init_from="x")) != hash(config)


def test_sizes_given_as_0_are_filled_in() -> None:
    model = c.from_dict(nested({"model.model_dim": 48, "model.num_heads": 6})).model
    assert (model.num_kv_heads, model.head_dim, model.mlp_dim) == (6, 8, 192)
    model = c.from_dict(nested({"model.model_dim": 48, "model.num_heads": 5, "model.head_dim": 10, "model.mlp_dim": 7})).model
    assert (model.num_kv_heads, model.head_dim, model.mlp_dim) == (5, 10, 7)


def test_every_knob_says_what_it_means() -> None:
    meanings = {}
    for key, value, field in c.walk(Config()):
        meaning = field.metadata["meaning"]
        assert len(meaning) > 8 and meaning.rstrip().endswith("."), key
        assert isinstance(field.metadata["shapes_run"], bool)
        if field.metadata["choices"]:
            assert set(value if isinstance(value, tuple) else (value,)) <= set(field.metadata["choices"]), key
        meanings[key] = meaning
    assert len(meanings) == len(set(meanings)) > 80


def test_durations_in_any_unit() -> None:
    config = c.from_dict(
        nested({"data.batch_size": 4, "data.seq_len": 8, "optimizer.warmup_tokens": 65, "optimizer.decay_epochs": 0.5})
    )
    assert config.tokens_per_step == 32
    assert config.duration("train", "duration", 7.0) == 10
    assert config.duration("optimizer", "warmup", 7.0) == 3  # ceil(65 / 32)
    assert config.duration("optimizer", "decay", 7.0) == 4  # ceil(0.5 * 7)
    assert config.duration("checkpoint", "every", 7.0, default=5) == 5


def test_vocabulary_smaller_than_the_tokenizers_is_refused() -> None:
    config = c.from_dict(LENGTH)
    assert config.with_vocab_size(11).model.vocab_size == 11
    assert c.from_dict(nested({"model.vocab_size": 16})).with_vocab_size(11).model.vocab_size == 16
    with pytest.raises(UserError, match="model.vocab_size=10"):
        c.from_dict(nested({"model.vocab_size": 10})).with_vocab_size(11)


def test_differences() -> None:
    a = c.from_dict(LENGTH)
    b = c.from_dict(nested({"model.num_layers": 5, "checkpoint.keep_last": 3}))
    assert c.differences(a, a) == {}
    assert c.differences(a, b) == {"model.num_layers": (4, 5), "checkpoint.keep_last": (2, 3)}
    assert c.differences(a, b, shaping_only=True) == {"model.num_layers": (4, 5)}


def test_declared_choices_are_the_tables_keys() -> None:
    from gptjax.model.attention import ATTENTION_BACKENDS
    from gptjax.model.decoder import REMAT_POLICIES
    from gptjax.model.layers import ACTIVATIONS
    from gptjax.train.objectives import OBJECTIVES
    from gptjax.train.optimizers import OPTIMIZERS, SCHEDULES

    choices = {key: set(field.metadata["choices"]) for key, _, field in c.walk(Config())}
    assert choices["optimizer.schedule"] == set(SCHEDULES)
    assert choices["optimizer.name"] == set(OPTIMIZERS)
    assert choices["objective.name"] == set(OBJECTIVES)
    assert choices["model.activation"] == set(ACTIVATIONS)
    assert choices["model.attention"] == set(ATTENTION_BACKENDS) | {"auto"}
    assert choices["model.remat"] == set(REMAT_POLICIES) | {"none"}


def test_every_pair_of_a_family_is_refused() -> None:
    families = sorted({key.removesuffix("_tokens") for key in KEYS if key.endswith("_tokens") and f"{key[:-7]}_epochs" in KEYS})
    assert len(families) == 6
    for family, (one, two) in itertools.product(families, itertools.combinations(("steps", "tokens", "epochs"), 2)):
        values = {"train.duration_steps": 0, f"{family}_{one}": 1, f"{family}_{two}": 1}
        if family != "train.duration":
            values["train.duration_steps"] = 1
        with pytest.raises(UserError, match=f"{family}_{one}=.* and {family}_{two}=.* are both given"):
            c.from_dict(nested(values))


def test_sizes_of_a_saved_config_follow_what_they_follow_from(tmp_path):
    path = tmp_path / "config.json"
    values = c.defaults()
    values.train.duration_steps = 1
    path.write_text(c.to_json(c.from_dict(values)))
    wider = recipes.load_recipe(str(path), ["model.model_dim=256"]).model
    assert (wider.head_dim, wider.mlp_dim, wider.num_kv_heads) == (64, 1024, 4)
