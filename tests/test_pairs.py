"""Every pair of options: one training step with both, or a refusal that names both.

`FACTORS` holds each knob that has options, as the settings that switch them on. A covering array is built row by row: a row is
a whole config, and each two of its options are a pair that it covers (Cohen et al., 1997, "The AETG System"). What the config's
door refuses, it must refuse by a sentence that names both.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import random
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import config as schema
from gptjax.config import Config, UserError
from gptjax.parallel.mesh import make_mesh
from gptjax.parallel.sharding import laid_over
from gptjax.train.optimizers import Lengths
from gptjax.train.step import _new_state as new_state
from gptjax.train.step import _step as train_step
from tests.small import SIZES as SMALLEST
from tests.small import random_batch, random_params

SIZES = SMALLEST | {"model.head_dim": 8}  # half of a head still has two pairs to rotate

# Factor: option: what switches it on. Each factor's first option is its default.
Settings = dict[str, Any]
FACTORS: dict[str, dict[str, Settings]] = {}


def _choices(key: str, **needs: Settings) -> None:
    """A factor of a knob with named choices, of which some need further settings."""
    group, name = key.split(".")
    field = next(field for field in dataclasses.fields(getattr(Config(), group)) if field.name == name)
    options = [field.default, *(choice for choice in field.metadata["choices"] if choice != field.default)]
    FACTORS[key] = {option: {key: option} | needs.get(option, {}) for option in options}


def _switch(key: str, *values: Any, **needs: Any) -> None:
    """A factor of a knob that is off, or at its default, or at one of `values`."""
    group, name = key.split(".")
    default = getattr(getattr(Config(), group), name)
    further = {need.replace("__", "."): value for need, value in needs.items()}
    FACTORS[key] = {str(default): {key: default}} | {str(value): {key: value} | further for value in values}


_choices("model.norm")
_choices("model.norm_placement")
_switch("model.residual_scale", 0.5)
_switch("model.layer_scale", 0.1)
_choices("model.position")
_choices(
    "model.rope_scaling",
    **{name: {"model.position": "rotary", "model.rope_scaling_factor": 2.0} for name in ("linear", "dynamic", "llama3", "yarn")},
)
_switch("model.rotary_fraction", 0.5, model__position="rotary")
_choices("model.block")
_choices("model.attention_score")
_choices("model.attention_sink")
_switch("model.attention_sink_tokens", 2, model__attention_window=5)
FACTORS["model.attention_pattern"] = {
    "": {"model.attention_pattern": ()},
    "local,global": {"model.attention_pattern": ("local", "global"), "model.attention_window": 5},
}
FACTORS["model.position_pattern"] = {
    "": {"model.position_pattern": ()},
    "rotary,none": {"model.position_pattern": ("rotary", "none"), "model.position": "rotary"},
    "t5,alibi": {"model.position_pattern": ("t5", "alibi"), "model.position": "t5"},
}
_choices("model.attention_kind", latent={"model.kv_latent_dim": 8})
_choices("model.activation")
_switch("model.gated_mlp", True)
_switch("model.num_kv_heads", 1, 2)
_switch("model.query_key_norm", True)
_switch("model.attention_bias", False)
_switch("model.attention_window", 5)
_switch("model.attention_softcap", 2.0)
_switch("model.tied_embeddings", False)
_switch("model.num_experts", 4, model__router_normalize_top_k=True, objective__router_balance_loss=0.01)
_switch("model.embedding_scale", 0.0)
_switch("model.embedding_dim", 8)
_switch("model.logit_softcap", 5.0)
_switch("model.prediction_heads", 2)
_switch("model.stochastic_depth", 0.5)
_switch("model.attention_dropout", 0.1)
_switch("model.residual_dropout", 0.1)
_choices("model.dtype")
_choices("model.param_dtype")
_choices("model.remat")
_choices("model.quantization")
_choices("model.parameterization", mup={"model.mup_base_dim": 8})
_switch("model.scan_unroll", 0)
_choices("objective.name")
_switch("objective.z_loss", 1e-4)
_switch("objective.label_smoothing", 0.1)
_choices("optimizer.name")
_choices("optimizer.schedule", wsd={"optimizer.decay_steps": 5})
_switch("optimizer.ema_decay", 0.9)
_switch("optimizer.cautious", True)
_switch("optimizer.freeze_layers", ("0",))
_switch("optimizer.groups", ("embed=lr:0.1+decay:0",))
_choices("optimizer.state_dtype")
_switch("optimizer.clip_norm", 0.0)
_choices("data.packing")
_switch("train.accumulation_steps", 2)

# Knobs with named choices that no training step depends on, or that others stand for.
ELSEWHERE = {
    "model.attention": "tests/model/test_attention_backends.py compares all backends",
}

Pair = frozenset[tuple[str, str]]
Factors = dict[str, dict[str, Settings]]


def all_pairs(factors: Factors = FACTORS) -> Iterator[Pair]:
    for (a, options), (b, others) in itertools.combinations(factors.items(), 2):
        for option, other in itertools.product(options, others):
            yield frozenset({(a, option), (b, other)})


def settings(options: dict[str, str], factors: Factors = FACTORS) -> Settings:
    """What switches all of these options on. Raises `KeyError` where two of them want a knob to be different things."""
    found: Settings = {}
    for factor, option in options.items():
        for key, value in factors[factor][option].items():
            if found.setdefault(key, value) != value:
                raise KeyError(key)
    return found


def config_of(options: dict[str, str], factors: Factors = FACTORS) -> Config:
    """The small config with these options. Raises `UserError` as the door does."""
    values: dict[str, Any] = {}
    for key, value in (SIZES | settings(options, factors)).items():
        group, leaf = key.split(".")
        values.setdefault(group, {})[leaf] = value
    return schema.from_dict(values)


def refusal(pair: Pair, factors: Factors = FACTORS) -> str:
    """What the door says to the two options, each with what it needs of its own; "" where it lets them through."""
    (a, option), (b, other) = sorted(pair)
    try:
        config_of({a: option, b: other}, factors)
    except UserError as error:
        return str(error)
    except KeyError:  # one needs what the other is not: then the bare knobs must be refused
        bare = {a: factors[a][option][a], b: factors[b][other][b]}
        values: dict[str, Any] = {}
        for key, value in (SIZES | factors[a][option] | bare).items():
            group, leaf = key.split(".")
            values.setdefault(group, {})[leaf] = value
        try:
            schema.from_dict(values)
        except UserError as error:
            return str(error)
        return ""
    return ""


def names_both(sentence: str, pair: Pair) -> bool:
    return all(factor in sentence and option in sentence for factor, option in pair)


def covering_rows(pairs: set[Pair], seed: int = 0, factors: Factors = FACTORS) -> Iterator[dict[str, str]]:
    """Rows, each an option for every factor, that together hold all of `pairs`, which the door lets through.

    Sets of options are bits of whole numbers. Options that go together two by two have always gone together, so the door is
    asked about the whole row, and about each step of it only where it refused that.
    """
    draw = random.Random(seed)
    names = [(factor, option) for factor, options in factors.items() for option in options]
    number = {name: place for place, name in enumerate(names)}
    partners = [0] * len(names)
    for a, b in pairs:
        partners[number[a]] |= 1 << number[b]
        partners[number[b]] |= 1 << number[a]
    left = list(partners)
    in_order = [(number[a], number[b]) for a, b in sorted(sorted(pair) for pair in pairs)]

    def chosen(first: int, second: int, at_the_door: bool) -> dict[str, str]:
        row = dict((names[first], names[second]))
        taken = 1 << first | 1 << second
        others = [factor for factor in factors if factor not in row]
        draw.shuffle(others)
        for factor in others:
            options = [number[factor, option] for option in factors[factor]]
            fitting = [one for one in options if not taken & ~partners[one]]
            for one in sorted(fitting, key=lambda one: (-(left[one] & taken).bit_count(), draw.random())):
                if not at_the_door or _passes(row | dict([names[one]]), factors):
                    row |= dict([names[one]])
                    taken |= 1 << one
                    break
            else:
                raise AssertionError(f"no option of {factor} goes with {row}")
        return row

    while in_order := [(a, b) for a, b in in_order if left[a] >> b & 1]:
        first, second = draw.choice(in_order)
        row = chosen(first, second, at_the_door=False)
        if not _passes(row, factors):
            row = chosen(first, second, at_the_door=True)
        taken = sum(1 << number[name] for name in row.items())
        for name in row.items():
            left[number[name]] &= ~taken
        yield row


def _passes(row: dict[str, str], factors: Factors = FACTORS) -> bool:
    try:
        config_of(row, factors)
    except (UserError, KeyError):
        return False
    return True


# --- the tests --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def refusals() -> dict[Pair, str]:
    return {pair: refusal(pair) for pair in all_pairs()}


def test_every_knob_with_choices_is_a_factor() -> None:
    groups = ("model", "objective", "optimizer")
    named = {key for key, _, field in schema.walk(Config()) if field.metadata["choices"] and key.split(".")[0] in groups}
    assert named <= FACTORS.keys() | ELSEWHERE.keys()


def test_a_refusal_names_both_options(refusals: dict[Pair, str]) -> None:
    check_names(refusals)


def check_names(refusals: dict[Pair, str]) -> None:
    silent = {
        " with ".join("=".join(one) for one in sorted(pair)): said
        for pair, said in refusals.items()
        if said and not names_both(said, pair)
    }
    assert not silent


# The compiler's time is the test's: without any optimisation it takes a third of it.
QUICK = {"xla_backend_optimization_level": 0}


def two_steps(config: Config) -> list[tuple[Any, dict[str, Any]]]:
    """(state, metrics) of a first step, twice from the same state."""
    mesh, lengths = make_mesh(config.mesh), Lengths(20, 0, 5)
    with laid_over(mesh, config.mesh):
        given = random_params(config), jnp.uint32(0)
        state = jax.jit(functools.partial(new_state, config, lengths)).lower(*given).compile(QUICK)(*given)
        batch = random_batch(config)
        step = jax.jit(functools.partial(train_step, config, lengths)).lower(state, batch).compile(QUICK)
        return [jax.device_get(step(state, batch)) for _ in range(2)]


def check_rows(
    refusals: dict[Pair, str], part: int, capsys: pytest.CaptureFixture, factors: Factors = FACTORS, parts: int = 2
) -> None:
    """A step of each row of this part of `parts`, which are files of their own so that two processes share them."""
    allowed = {pair for pair, said in refusals.items() if not said}
    rows = list(covering_rows(allowed, factors=factors))
    covered = {frozenset(two) for row in rows for two in itertools.combinations(row.items(), 2)}
    assert covered >= allowed
    for row in rows[part::parts]:
        (state, metrics), again = two_steps(config_of(row, factors))
        said = f"the row {row}"
        assert np.isfinite(metrics["loss"]) and np.isfinite(metrics["gradient_norm"]) and not metrics["nonfinite_steps"], said
        assert all(np.isfinite(np.asarray(leaf, np.float32)).all() for leaf in jax.tree.leaves(state.params)), said
        for one, other in zip(jax.tree.leaves((state, metrics)), jax.tree.leaves(again), strict=True):
            assert np.asarray(one).tobytes() == np.asarray(other).tobytes(), said
    with capsys.disabled():
        print(
            f"\n{len(factors)} knobs, {len(refusals):,} pairs of options: {len(allowed):,} trained in {len(rows)} steps, "
            f"{len(rows[part::parts])} of them here, {len(refusals) - len(allowed):,} refused"
        )


def test_a_step_with_every_pair_of_options(refusals: dict[Pair, str], capsys: pytest.CaptureFixture) -> None:
    check_rows(refusals, 0, capsys)
