"""Every recipe in configs/ loads, holds in all its forms, and builds the shapes that its docstring speaks of."""

from __future__ import annotations

import ast
import pathlib

import jax
import jax.numpy as jnp
import pytest
from flax import linen as nn

from gptjax import config as config_lib
from gptjax import recipes
from gptjax.config import UserError
from gptjax.train.step import init_params

CONFIGS = pathlib.Path(__file__).resolve().parents[1] / "configs"
ARGUMENTS = {
    "fine_tune.py": ["", "sms_spam", "movie_reviews", "subjectivity", "csl", "slots", "xquad_en", "xquad_zh", "e2e", "dialogue"],
    "gpt2_124m.py": ["", "small", "medium", "large", "xl"],
    "gpt3_175b.py": [""],
    "in_context.py": [""],
    "llama_7b.py": [""],
    "llama_small.py": [""],
    "shakespeare_char.py": ["", "cpu", "gpu", "best"],
    "small_gpt.py": [""],
    "stdlib_tiny.py": [""],
}
CASES = [(name, argument) for name, arguments in ARGUMENTS.items() for argument in arguments]


@pytest.fixture(autouse=True)
def run_to_start_from(tmp_path, monkeypatch):
    """The folder that recipes of tasks take their model from, by the name that they have for it."""
    (tmp_path / "runs" / "small_gpt").mkdir(parents=True)
    config = load("small_gpt.py").with_vocab_size(8000)
    (tmp_path / "runs" / "small_gpt" / "config.json").write_text(config_lib.to_json(config))
    monkeypatch.chdir(tmp_path)


def load(name: str, argument: str = "", *overrides: str) -> config_lib.Config:
    return recipes.load_recipe(f"{CONFIGS / name}:{argument}" if argument else str(CONFIGS / name), overrides)


def count(config: config_lib.Config) -> int:
    shapes = jax.eval_shape(lambda: nn.unbox(init_params(config, jnp.uint32(0))))
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


def test_no_recipe_is_left_out():
    assert {path.name for path in CONFIGS.glob("*.py")} == set(ARGUMENTS)


@pytest.mark.parametrize(("name", "argument"), CASES)
def test_recipe_loads_and_builds_its_shapes(name, argument):
    config = load(name, argument)
    assert count(config if config.model.vocab_size else config.with_vocab_size(65)) > 0


@pytest.mark.parametrize("name", ARGUMENTS)
def test_docstring_gives_command_cost_and_expected_score(name):
    text = ast.get_docstring(ast.parse((CONFIGS / name).read_text(encoding="utf-8")))
    for word in ("Command:", "Cost:", "Expected:"):
        assert word in text
    assert f"--config=configs/{name}" in text


@pytest.mark.parametrize(
    ("size", "parameters"),  # as transformers counts GPT2LMHeadModel of each published config
    [("small", 124_439_808), ("medium", 354_823_168), ("large", 774_030_080), ("xl", 1_557_611_200)],
)
def test_gpt2_has_the_published_number_of_parameters(size, parameters):
    assert count(load("gpt2_124m.py", size, "model.vocab_size=50257")) == parameters


def test_llama_7b_has_the_published_number_of_parameters():
    """As transformers counts LlamaForCausalLM of Llama 2 7B's published config."""
    assert count(load("llama_7b.py")) == 6_738_415_616


def test_gpt3_has_the_parameters_that_its_published_sizes_make():
    """Brown et al., 2020, table 2.1, with GPT-2's vocabulary: 12 D^2 + 13 D a block, embeddings, and the last norm."""
    layers, width = 96, 12288
    by_hand = layers * (12 * width**2 + 13 * width) + (50257 + 2048) * width + 2 * width
    assert by_hand == 174_604_259_328  # about the 174,600 M that the table's sizes are known for
    assert count(load("gpt3_175b.py", "", "model.vocab_size=50257")) == by_hand


def test_shakespeare_cpu_has_nanogpts_number_of_parameters():
    """nanoGPT prints 0.80M, which leaves positions out."""
    assert count(load("shakespeare_char.py", "cpu").with_vocab_size(65)) - 64 * 128 == 795_904


def test_best_keeps_the_tokens_and_parameters_of_cpu():
    cpu, best = (load("shakespeare_char.py", argument).with_vocab_size(65) for argument in ("cpu", "best"))
    assert count(best) <= count(cpu)
    assert best.train.duration_steps * best.tokens_per_step <= cpu.train.duration_steps * cpu.tokens_per_step


@pytest.mark.parametrize("name", ["fine_tune.py", "gpt2_124m.py", "shakespeare_char.py"])
def test_unknown_argument_is_named(name):
    with pytest.raises(UserError, match="'nonsense'; it has"):
        load(name, "nonsense")


def test_the_model_of_init_from_is_taken_before_overrides(tmp_path):
    base = load("small_gpt.py")
    taken = load("fine_tune.py", "sms_spam", "model.residual_dropout=0.2")
    assert taken.model.model_dim == base.model.model_dim and taken.model.position == "rotary" and taken.model.vocab_size == 8000
    assert taken.model.residual_dropout == 0.2 and taken.data.tokenizer == "init_from"
    (tmp_path / "config.json").write_text(config_lib.to_json(taken))
    (tmp_path / "runs" / "small_gpt" / "config.json").unlink()
    assert recipes.load_recipe(str(tmp_path / "config.json")) == taken  # a run's own config says it all
    with pytest.raises(UserError, match="init_from=runs/small_gpt is neither a run's folder nor"):
        load("fine_tune.py", "sms_spam")
    with pytest.raises(UserError, match="init_model needs init_from"):
        load("stdlib_tiny.py", "", "init_model=true")


def test_the_model_of_a_hugging_face_folder_is_taken_too(shared_data):
    taken = load("fine_tune.py", "sms_spam", f"init_from={shared_data / 'tiny_random_gpt2'}", "data.seq_len=32")
    assert (taken.model.num_layers, taken.model.model_dim, taken.model.position) == (5, 32, "learned")
