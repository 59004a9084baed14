"""Factors of rate and decay by pattern, and freezing: what they do, what they save, and how they are refused."""

from __future__ import annotations

import pathlib
from typing import Any

import jax
import numpy as np
import pytest

from gptjax.config import CheckpointConfig, MeshConfig, UserError, to_json
from gptjax.config.optimizer import frozen_layers, parameter_groups
from gptjax.parallel.mesh import make_mesh
from gptjax.recipes import load_recipe
from gptjax.train.checkpoints import Checkpoints
from gptjax.train.groups import decay_multipliers, rate_multipliers, without_frozen
from gptjax.train.optimizers import OPTIMIZERS, Lengths, evaluation_params
from gptjax.train.step import abstract_state, init_state, make_train_step, summed_gradients
from tests.small import LLAMA, random_batch, random_params, small, tree_equal
from tests.train.test_optimizers import RULE, draw, named, updated
from tests.train.test_update_rules import SHAPES

MESH = make_mesh(MeshConfig(data=1))
GROUPS = ("tokens=lr:0.5", "layers/mlp=lr:2+decay:0.25", "kernel|head=decay:3", "bias=decay:7")


def test_the_first_matching_group_counts() -> None:
    config = small(LLAMA, optimizer__groups=GROUPS)
    rates, decays = (named(of(config, random_params(config))) for of in (rate_multipliers, decay_multipliers))
    attention = {f"layers/attention/{part}/kernel": (1.0, 3.0) for part in ("query", "key", "value", "output")}
    mlp = {f"layers/mlp/{part}/kernel": (2.0, 0.25) for part in ("up", "gate", "down")}
    norms = dict.fromkeys(("final_norm/scale", "layers/attention_norm/scale", "layers/mlp_norm/scale"), (1.0, 0.0))
    expected = attention | mlp | norms | {"embed/tokens": (0.5, 0.0), "head": (1.0, 3.0)}
    # layers/mlp_norm has "layers/mlp" in its path
    expected["layers/mlp_norm/scale"] = (2.0, 0.0)
    assert {name: (rates[name], decays[name]) for name in rates} == expected


@pytest.mark.parametrize("name", [name for name in OPTIMIZERS if name != "prodigy"])
def test_a_factor_is_another_rate_and_another_decay(name: str) -> None:
    """A group of all parameters is the same as other knobs, to rounding; prodigy's d is global, and tested elsewhere."""
    ours = {"optimizer.groups": ("norm=decay:9", ".=lr:0.5+decay:4"), "optimizer.weight_decay": 0.075}
    theirs = {"optimizer.learning_rate": RULE["optimizer.learning_rate"] / 2, "optimizer.muon_adam_learning_rate": 0.01}
    params, gradients = draw(0, SHAPES), [draw(seed, SHAPES) for seed in range(1, 4)]
    common = RULE | {"optimizer.name": name, "optimizer.muon_adam_learning_rate": 0.02}
    found = updated(small(common, ours), params, gradients)[-1]
    expected = updated(small(common, theirs), params, gradients)[-1]
    for path, value in named(expected).items():
        np.testing.assert_allclose(named(found)[path], value, rtol=2e-6, atol=1e-6, err_msg=path)


FREEZING = {"optimizer.freeze": ("embed", "up/bias"), "optimizer.freeze_layers": ("1",)}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_what_is_frozen_stays_and_the_rest_moves_as_before(name: str) -> None:
    knobs = RULE | {"optimizer.name": name, "optimizer.prodigy_initial_rate": 0.1}
    config = small(knobs, FREEZING)
    params, gradients = draw(0, SHAPES), [draw(seed, SHAPES) for seed in range(1, 4)]
    params["layers"]["mlp"]["up"]["kernel"][1, 0, 0] = -0.0  # which + 0 would change
    gradients = [without_frozen(config, gradient) for gradient in gradients]
    found, plain = (named(updated(c, params, gradients)[-1]) for c in (config, small(knobs)))
    for path, before in named(params).items():
        frozen = np.zeros(before.shape, bool)
        frozen[(slice(1, None) if path.startswith("layers") else slice(0, 0))] = True
        frozen |= path in ("embed/tokens", "layers/mlp/up/bias")
        assert found[path][frozen].tobytes() == before[frozen].tobytes(), path
        assert (frozen | (np.asarray(found[path]) != before)).all(), path
        if name != "prodigy":  # whose distance is global
            np.testing.assert_allclose(found[path][~frozen], plain[path][~frozen], rtol=1e-6, atol=1e-7, err_msg=path)


def is_frozen(path: str) -> bool:
    return any(part in path for part in ("mlp/", "_norm", "embed"))


def test_frozen_training_steps_and_their_resumption(tmp_path: pathlib.Path) -> None:
    """No state and no share of the norm for what is frozen; from a checkpoint the run goes on as without one."""
    knobs = RULE | {"optimizer.name": "soap", "optimizer.soap_refresh_every": 2, "optimizer.ema_decay": 0.9}
    knobs |= {"optimizer.freeze": ("embed", "mlp/", "_norm"), "optimizer.freeze_layers": ("1",)}
    knobs |= {"optimizer.groups": ("attention=lr:0.5",), "optimizer.clip_norm": 0.01, "model.attention_bias": False}
    config = small(knobs)
    lengths, params = Lengths.of(config, 1.0), random_params(config)
    step, state = make_train_step(config, lengths, MESH), init_state(config, lengths, MESH, params)
    held = {name for name in named(state.opt_state) if name.endswith(("kernel", "bias"))}
    assert len(held) == 6 * 4 and not any(is_frozen(name) for name in held)
    for number in range(3):
        state, metrics = step(state, random_batch(config, number))
        if number == 0:
            norm = float(metrics["gradient_norm"])
        if number == 1:
            with Checkpoints(tmp_path, CheckpointConfig(), print) as checkpoints:
                checkpoints.save(2, state, {})
                checkpoints.wait()
    before = named(params)
    for path, leaf in named(state.params).items():
        if is_frozen(path):
            tree_equal(leaf, before[path])
            tree_equal(named(state.ema_params)[path], before[path])
        else:
            changed = np.asarray(leaf != before[path])
            assert changed[0].any() and not changed[1].any(), path

    with Checkpoints(tmp_path, CheckpointConfig(), print, read_only=True) as checkpoints:
        restored = checkpoints.restore(abstract_state(config, lengths, MESH))
    assert restored is not None
    tree_equal(step(restored.state, random_batch(config, 2))[0], state)

    gradients, sums = jax.jit(lambda: summed_gradients(config, params, random_batch(config, 0), None))()
    moving = [np.asarray(g)[0] for path, g in named(gradients).items() if not is_frozen(path)]
    expected = np.sqrt(sum(np.square(g, dtype=np.float64).sum() for g in moving)) / float(sums["weight_sum"])
    np.testing.assert_allclose(norm, expected, rtol=1e-5)


def test_schedule_free_evaluates_frozen_parameters_as_they_are() -> None:
    config = small(FREEZING, optimizer__name="schedule_free_adamw", optimizer__freeze=("embed", "mlp/up"))
    lengths = Lengths.of(config, 1.0)
    state = init_state(config, lengths, MESH, random_params(config))
    found, params = named(evaluation_params(config, state)), named(state.params)
    assert found.keys() == params.keys()
    tree_equal(found["embed/tokens"], params["embed/tokens"])
    tree_equal(found["layers/mlp/up/kernel"], params["layers/mlp/up/kernel"])
    tree_equal(found["layers/mlp/down/kernel"][1], params["layers/mlp/down/kernel"][1])


def test_groups_on_the_command_line(tmp_path: pathlib.Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(to_json(small()))
    overrides = ["optimizer.groups=embed/(tokens|positions)=lr:0.1+decay:0,head=lr:2", "optimizer.freeze_layers=0-1,3"]
    optimizer = load_recipe(str(path), [*overrides, "model.num_layers=5"]).optimizer
    assert parameter_groups(optimizer) == (("embed/(tokens|positions)", 0.1, 0.0), ("head", 2.0, 1.0))
    assert frozen_layers(optimizer, 5) == {0, 1, 3}


REFUSALS: list[tuple[dict[str, Any], str]] = [
    ({"optimizer.groups": ("embd=lr:0.1",)}, r"optimizer.groups: 'embd' is found in no parameter; the nearest are embed/"),
    ({"optimizer.freeze": ("layers/mpl",)}, r"optimizer.freeze: 'layers/mpl' is found in no parameter; .* layers/mlp/"),
    ({"optimizer.freeze": (".",)}, "leave no parameter"),
    ({"optimizer.groups": ("embed",)}, "'embed' must be REGEX=lr:FACTOR"),
    ({"optimizer.groups": ("embed=rate:1",)}, "'embed=rate:1' must be REGEX=lr:FACTOR"),
    ({"optimizer.groups": ("embed=lr:x",)}, "'embed=lr:x' must be REGEX=lr:FACTOR"),
    ({"optimizer.groups": ("embed=lr:-1",)}, "'embed=lr:-1' must be REGEX=lr:FACTOR"),
    ({"optimizer.groups": ("embed=lr:nan",)}, "'embed=lr:nan' must be REGEX=lr:FACTOR"),
    ({"optimizer.groups": ("(=lr:1",)}, r"optimizer.groups: '\(' is not a regular expression"),
    ({"optimizer.freeze": ("*",)}, r"optimizer.freeze: '\*' is not a regular expression"),
    ({"optimizer.freeze_layers": ("2",)}, "'2' must be in ascending order and within model.num_layers=2"),
    ({"optimizer.freeze_layers": ("1-0",)}, "'1-0' must be in ascending order"),
    ({"optimizer.freeze_layers": ("-1",)}, "'-1' must be a layer's number"),
    ({"optimizer.cautious": True, "optimizer.name": "prodigy"}, "optimizer.cautious=True .* optimizer.name=prodigy"),
    ({"optimizer.cautious": True, "optimizer.name": "schedule_free_adamw"}, "optimizer.cautious=True .*=schedule_free_adamw"),
    ({"optimizer.beta1": 0.0, "optimizer.name": "ademamix"}, "optimizer.beta1=0 .* optimizer.name=ademamix"),
]


@pytest.mark.parametrize(("knobs", "said"), REFUSALS)
def test_refusals(knobs: dict[str, Any], said: str) -> None:
    with pytest.raises(UserError, match=said):
        config = small(knobs)
        abstract_state(config, Lengths.of(config, 1.0), MESH)
