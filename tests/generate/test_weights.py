"""Kernels in float32, bfloat16 and int8 against brute force in float64."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.config import ModelConfig, UserError
from gptjax.generate import weights
from gptjax.model.kernels import BASE, DIGITS, Kernel, in_digits
from tests.generate.small_models import FAMILIES, full_logits, model_config, random_params


@pytest.fixture(scope="module", params=sorted(FAMILIES))
def model(request: pytest.FixtureRequest) -> tuple[Any, ModelConfig]:
    config = model_config(**FAMILIES[request.param])
    return random_params(config), config


def test_int8_is_off_by_half_a_scale_and_no_more() -> None:
    kernel_OI = np.random.default_rng(0).normal(size=(9, 50)).astype(np.float32)
    kernel_OI[3] = 0
    kernel_OI[4] *= 1e-20
    quantised_OI, scale_O = (np.asarray(leaf) for leaf in weights.quantised(jnp.asarray(kernel_OI)))
    assert quantised_OI.dtype == np.int8
    np.testing.assert_allclose(scale_O, np.abs(kernel_OI).max(1) / 127, rtol=1e-6)
    off_OI = np.abs(quantised_OI.astype(np.float64) * scale_O[:, None] - kernel_OI)
    # Half a unit, and the float32 rounding of a quotient of up to 127.
    assert (off_OI <= scale_O[:, None] * (0.5 + 127 * 2.0**-23)).all()
    assert (np.abs(quantised_OI).max(1)[scale_O > 0] == 127).all()
    assert (quantised_OI[3] == 0).all()


def test_digits_stand_for_the_activations() -> None:
    x_MI = np.random.default_rng(1).normal(size=(5, 70)).astype(np.float32) * np.float32([[1e-30], [1e-3], [1], [30], [1e30]])
    x_MI[2, 0] = x_MI[2].max() * 127
    x_MI = np.concatenate([x_MI, np.zeros((1, 70), np.float32)])
    unit_M1, digits_JMI = (np.asarray(leaf, np.float64) for leaf in in_digits(jnp.asarray(x_MI)))
    stands_for_MI = unit_M1 * sum(digits_JMI[j] / BASE**j for j in range(DIGITS))
    # 1 % for the rounding of rests to float32 on their way.
    assert (np.abs(stands_for_MI - x_MI) <= unit_M1 * 0.5 / BASE ** (DIGITS - 1) * 1.01).all()
    assert (unit_M1[:-1, 0] <= 2 * np.abs(x_MI[:-1]).max(1) / 127).all()
    assert np.abs(digits_JMI).max() == 127


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("kind", weights.WEIGHTS)
def test_a_product_is_that_of_its_stored_weights(kind: str, rows: int) -> None:
    rng = np.random.default_rng(2)
    inputs, outputs = 96, 40
    stored_IO = rng.normal(size=(inputs, outputs)).astype(np.float32)
    kernel = weights._kernel(jnp.asarray(stored_IO), 1, kind)
    x_MI = rng.normal(size=(rows, inputs)).astype(np.float32)
    values_OI = np.asarray(kernel.rows(jnp.arange(outputs)), np.float64)
    operand_MI = np.asarray(jnp.asarray(x_MI).astype("bfloat16" if kind == "bfloat16" else "float32"), np.float64)
    got_MO = np.asarray(jax.jit(Kernel.__call__)(kernel, jnp.asarray(x_MI)))
    sizes_MO = np.abs(operand_MI) @ np.abs(values_OI).T
    # A float32 sum in any order: each of I terms is rounded at most I times. int8: activations too, by 1.3e-7 of a row's largest.
    bound_MO = inputs * 2.0**-24 * sizes_MO
    if kind == "int8":
        bound_MO = 4 * 2.0**-24 * sizes_MO + 1.3e-7 * np.abs(x_MI).max(1, keepdims=True) * np.abs(values_OI).sum(1)
    assert (np.abs(got_MO - operand_MI @ values_OI.T) <= bound_MO).all()


def test_rounded_is_the_models_own_tree_with_the_stored_weights(model: tuple[Any, ModelConfig]) -> None:
    params, config = model
    for kind, worst in (("float32", 0.0), ("bfloat16", 2.0**-8), ("int8", 0.5 / 127)):
        back = weights.rounded(params, config, kind)
        assert jax.tree.structure(back) == jax.tree.structure(params)
        kernel, stored = (np.asarray(tree["layers"]["mlp"]["up"]["kernel"], np.float64) for tree in (params, back))
        largest = np.abs(kernel) if kind == "bfloat16" else np.abs(kernel).max(1, keepdims=True)
        assert (np.abs(stored - kernel) <= worst * largest * 1.0001).all()
        assert (kind == "float32") == (stored == kernel).all()
        # Output channels of the head are the vocabulary's.
        head, stored = (np.asarray(tree["head"], np.float64) for tree in (params, back))
        largest = np.abs(head) if kind == "bfloat16" else np.abs(head).max(0, keepdims=True)
        assert (np.abs(stored - head) <= worst * largest * 1.0001).all()


def test_logits_of_int8_weights_are_those_of_the_rounded_model(model: tuple[Any, ModelConfig]) -> None:
    from gptjax.generate import forward
    from gptjax.model.attention import Cache

    params, config = model
    tokens = list(range(11))
    expected_TV = full_logits(weights.rounded(params, config, "int8"), config, tokens)
    prepared = weights.prepare(params, config, "int8")
    assert weights.prepare(prepared, config, "bfloat16") is prepared
    inputs = jnp.asarray([tokens]), jnp.arange(11)[None], Cache.empty(config, 1, 11)
    several = jax.jit(lambda params, *inputs: forward.several(params, config, *inputs)[0])
    # Logits are of size 10; a float32 sum of 16 products in another order is off by some 1e-6 of that.
    np.testing.assert_allclose(np.asarray(several(prepared, *inputs))[0], expected_TV, atol=2e-5)
    assert np.abs(full_logits(params, config, tokens) - expected_TV).max() > 1e-3, "int8 should be seen"


def test_what_cannot_be_prepared_is_refused() -> None:
    config = model_config()
    with pytest.raises(UserError, match="weights=int4 must be one of float32, bfloat16, int8"):
        weights.prepare({"layers": {}}, config, "int4")
    with pytest.raises(UserError, match="model.num_experts=4"):
        weights.prepare({"layers": {}}, model_config(num_experts=4), "int8")
    with pytest.raises(UserError, match="133144 products exactly, but a kernel has 140000"):
        weights.prepare({"layers": {}}, model_config(mlp_dim=140000), "int8")
