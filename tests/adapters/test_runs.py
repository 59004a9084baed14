"""Runs with adapters: where they start from, what they say, how they are loaded and converted, and what is refused."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import cli
from gptjax import config as c
from gptjax.adapters import peft
from gptjax.adapters.merge import merged
from gptjax.config import AdapterConfig, UserError
from gptjax.data.tokenizers import ByteTokenizer
from gptjax.generate import weights
from gptjax.interop import huggingface
from gptjax.parallel.mesh import make_mesh
from gptjax.train.loading import load
from gptjax.train.loop import train
from gptjax.train.optimizers import Lengths
from gptjax.train.restore import initial_params, load_params
from gptjax.train.run import named_leaves
from gptjax.train.step import abstract_state, init_state
from tests.adapters.cases import case, drawn
from tests.small import GPT2, SIZES, random_params, small, tree_close, tree_equal

ROWS = ByteTokenizer().vocab_size
LORA: dict[str, Any] = {"adapter.method": "lora", "adapter.rank": 2, "adapter.targets": ("attention/",)}
LORA |= {"adapter.shared_input": True}


def silent(line: str) -> None: ...


def knobs_of(*parts: dict[str, Any], init_from: str) -> c.Config:
    values: dict[str, Any] = {"init_from": init_from}
    for key, value in {name: value for part in (SIZES, *parts) for name, value in part.items()}.items():
        group, leaf = key.split(".")
        values.setdefault(group, {})[leaf] = value
    return c.from_dict(values)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, Any]:
    """A Hugging Face folder without a tokenizer, and its parameters."""
    folder = tmp_path_factory.mktemp("base")
    config = small(GPT2, {"model.vocab_size": ROWS})
    params = random_params(config)
    export = huggingface.prepare(config.model, named_leaves(params))
    huggingface.write(folder, export, None)
    return folder, params


@pytest.mark.parametrize("stored", ["as_it_is", "int8"])
def test_a_run_starts_from_a_base_with_the_adapters_of_its_seed(base: tuple[pathlib.Path, Any], stored: str) -> None:
    config = knobs_of(LORA, {"model.vocab_size": ROWS, "adapter.base": stored}, init_from=str(base[0]))
    mesh = make_mesh(config.mesh)
    params = initial_params(config, mesh, silent)
    fresh = init_state(dataclasses.replace(config, init_from=""), Lengths.of(config, 1.0), mesh).params
    tree_equal(params["adapters"], fresh["adapters"])
    assert jax.tree.map(lambda leaf: leaf.sharding, params) == jax.tree.map(lambda leaf: leaf.sharding, fresh)
    decoder = {name: value for name, value in params.items() if name != "adapters"}
    if stored == "as_it_is":
        tree_equal(decoder, base[1])
        return
    for name, leaf in named_leaves(merged(config, params)[1]).items():  # B is 0
        own = np.asarray(named_leaves(base[1])[name])
        axes = (1, 2) if name.endswith("output/kernel") else (1,)
        step = np.abs(own).max(axes, keepdims=True) / 127 if name.endswith("kernel") else 0
        assert (np.abs(np.asarray(leaf) - own) <= 0.501 * step).all(), name


def test_a_run_says_what_it_trains_and_is_loaded_merged(
    base: tuple[pathlib.Path, Any], tmp_path: pathlib.Path, capfd: pytest.CaptureFixture
) -> None:
    (tmp_path / "text.txt").write_text("It was the best of times, it was the worst of times. " * 40, encoding="utf-8")
    data = {"data.source": "text", "data.path": str(tmp_path / "text.txt"), "data.split_by": "tail", "model.vocab_size": 0}
    run = {"train.duration_steps": 2, "optimizer.learning_rate": 0.1, "evaluate.sample_tokens": 2}
    result = train(knobs_of(LORA, data, run, init_from=str(base[0])), tmp_path / "run")
    # 2 layers; A is 16 x 2 twice, B 2 x 16 four times
    assert f"trained: 384 of {sum(leaf.size for leaf in jax.tree.leaves(base[1])) + 384:,} parameters" in capfd.readouterr().err
    model = load(tmp_path / "run", log=silent)
    assert model.config.adapter == AdapterConfig() and "adapters" not in model.params
    moved = model.params["layers"]["attention"]["query"]["kernel"] - base[1]["layers"]["attention"]["query"]["kernel"]
    assert np.abs(moved).max() > 1e-3
    tree_equal(model.params["layers"]["mlp"], base[1]["layers"]["mlp"])
    capfd.readouterr()
    assert cli.main(["evaluate", f"--workdir={tmp_path / 'run'}", "--json"]) == 0
    assert json.loads(capfd.readouterr().out)["loss"] == pytest.approx(result["eval"]["loss"], abs=1e-5)


def test_conversion_there_and_back(base: tuple[pathlib.Path, Any], tmp_path: pathlib.Path) -> None:
    """A base and a PEFT folder to a run; the run to a PEFT folder, the same, and to a model folder, merged."""
    config = knobs_of(LORA, {"model.vocab_size": ROWS}, init_from="")
    params = drawn(config)
    given, run, back, whole = (tmp_path / name for name in ("given", "run", "back", "whole"))
    given.mkdir()
    peft.write(given, "gpt2", config, params)
    assert cli.main(["convert", f"--from={base[0]}", f"--adapter={given}", f"--output={run}", "--tokenizer=none"]) == 0
    found = load_params(run, silent, merges=False)
    tree_equal(found.params["adapters"], params["adapters"])
    assert found.config.adapter.scale == config.adapter.scale
    assert cli.main(["convert", f"--workdir={run}", "--to=peft", f"--output={back}"]) == 0
    assert (back / peft.WEIGHTS).read_bytes() == (given / peft.WEIGHTS).read_bytes()
    assert json.loads((back / peft.CONFIG).read_text())["target_modules"] == ["attn.c_attn", "attn.c_proj"]
    assert cli.main(["convert", f"--workdir={run}", "--to=huggingface", f"--output={whole}"]) == 0
    wanted = merged(config, base[1] | {"adapters": params["adapters"]})[1]
    tree_close(huggingface.load(whole)[1], wanted, rtol=0, atol=1e-6)


def test_what_an_adapter_cannot_be_written_as(tmp_path: pathlib.Path) -> None:
    apart = small(LORA, {"adapter.shared_input": False})
    with pytest.raises(UserError, match=r"attn.c_attn holds them in one matrix.*shared_input=True"):
        peft.write(tmp_path, "gpt2", apart, drawn(apart))
    some = small(LORA, {"adapter.method": "dora", "adapter.targets": ("query", "value")})
    with pytest.raises(UserError, match="without layers/attention/key has no magnitudes for a third of attn.c_attn"):
        peft.write(tmp_path, "gpt2", some, drawn(some))
    with pytest.raises(UserError, match="adapter.method=bitfit has no form in PEFT"):
        peft.write(tmp_path, "gpt2", case("bitfit"), {})
    for name in ("prompt", "prefix"):
        with pytest.raises(UserError, match="merge.for_writing makes of them"):
            weights.prepare(drawn(case(name)), case(name).model)


PROMPT = {"adapter.method": "prompt", "adapter.prompt_length": 3}
WINDOWS = {"data.packing": "windows"}
REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"adapter.method": "lora", "adapter.targets": ("atention/",)}, r"'atention/' is found in no kernel .* layers/attention/"),
    ({"adapter.method": "lora", "adapter.targets": ("(",)}, r"adapter.targets: '\(' is not a regular expression"),
    ({"adapter.method": "bitfit", "adapter.targets": ("mlp",)}, "adapter.targets is for lora, dora, ia3, not for .*bitfit"),
    ({"adapter.base": "int8"}, "adapter.base=int8 freezes .* adapter.method=none has nothing to train"),
    ({"adapter.method": "lora", "model.quantization": "int8"}, "model.quantization=int8 rounds"),
    ({"adapter.method": "lora", "adapter.base": "int8", "optimizer.ema_decay": 0.9}, "optimizer.ema_decay=0.9 keeps an average"),
    ({"adapter.method": "bitfit", "model.attention_bias": False, "model.mlp_bias": False, "model.norm": "rmsnorm"}, "bitfit"),
    (PROMPT, "data.packing=packed puts several documents into one"),
    (PROMPT | WINDOWS | {"adapter.prompt_length": 5}, "prompt_length=5 and data.seq_len=12 are more than model.max_seq_len=16"),
    (PROMPT | WINDOWS | {"mesh.context": 2}, "mesh.context=2 cannot share out"),
    (
        PROMPT | WINDOWS | {"evaluate.sample_tokens": 5, "objective.name": "prefix"},
        "sample_tokens=5 writes a sample, but places of adapter.method=prompt see a prompt whose tokens all see each other",
    ),
    (
        PROMPT | WINDOWS | {"evaluate.sample_tokens": 5, "objective.name": "mixture", "objective.mixture": ("S=1", "causal=1")},
        "sample_tokens=5 writes a sample, but places of adapter.method=prompt",
    ),
    ({"adapter.method": "lora", "adapter.rank": 0}, "adapter.rank=0 must be at least 1"),
    ({"adapter.method": "lorra"}, "did you mean lora"),
]


@pytest.mark.parametrize(("knobs", "said"), REFUSALS)
def test_refusals(knobs: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        config = small(knobs)
        abstract_state(config, Lengths.of(config, 1.0), make_mesh(config.mesh))


def test_a_plan_refuses_adapters(tmp_path: pathlib.Path, capfd: pytest.CaptureFixture) -> None:
    (tmp_path / "config.json").write_text(c.to_json(small(LORA)))
    assert cli.main(["plan", f"--config={tmp_path / 'config.json'}", "--topology=cpu:1"]) == 2
    assert "adapter.method=lora" in capfd.readouterr().err


def test_a_leading_run_is_no_hugging_face_model(tmp_path: pathlib.Path, capfd: pytest.CaptureFixture) -> None:
    (tmp_path / "config.json").write_text(c.to_json(case("prefix")))
    assert cli.main(["convert", f"--workdir={tmp_path}", "--to=huggingface", f"--output={tmp_path / 'out'}"]) == 2
    assert "--to=peft writes them" in capfd.readouterr().err


def test_adapters_are_float32_beside_a_bfloat16_base() -> None:
    config = small(LORA, {"model.param_dtype": "bfloat16"})
    params = abstract_state(config, Lengths.of(config, 1.0), make_mesh(config.mesh)).params
    assert {leaf.dtype for leaf in jax.tree.leaves(params["adapters"])} == {jnp.dtype("float32")}
    assert params["embed"]["tokens"].dtype == jnp.bfloat16
