"""Rules from logical names to mesh axes, and the table of parameters that they give."""

from __future__ import annotations

import pathlib

import jax.numpy as jnp
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec as P

from gptjax import cli
from gptjax.config import MeshConfig, UserError
from gptjax.parallel.mesh import abstract_mesh, axis_sizes
from gptjax.parallel.sharding import RULES, layout_table, parameter_specs, rules_of, spec, use_rules

ROOT = pathlib.Path(__file__).resolve().parents[2]
GOLDEN = ROOT / "tests/golden/gpt2_124m_shardings.txt"
MESH = ["--config.mesh.data=2", "--config.mesh.fsdp=2", "--config.mesh.tensor=2"]


def boxed(*names: str | None, shape: tuple[int, ...] = (8, 8)) -> dict[str, nn.LogicallyPartitioned]:
    return {"kernel": nn.LogicallyPartitioned(jnp.zeros(shape), names)}


def test_golden_table_of_gpt2_124m(capsys) -> None:
    assert cli.main(["config", str(ROOT / "configs/gpt2_124m.py"), "--shardings", *MESH]) == 0
    assert capsys.readouterr().out == GOLDEN.read_text(encoding="utf-8")


def test_the_golden_table_by_hand() -> None:
    """Bytes a device from the shapes of the published model: which of a parameter's dimensions are split, and by how much."""
    lines = {line.split()[0]: int(line.split()[-1].replace(",", "")) for line in GOLDEN.read_text().splitlines()[1:-1]}
    layers, width, heads, head, mlp, vocab, places = 12, 768, 12, 64, 3072, 50304, 1024
    by_2, by_4 = 4 // 2, 4 // 4  # bytes of a float32 split over fsdp or tensor, and over both
    expected = {"embed/tokens": vocab * width * by_4, "embed/positions": places * width * by_2}
    for name in ("query", "key", "value"):
        expected[f"layers/attention/{name}/kernel"] = layers * width * heads * head * by_4
        expected[f"layers/attention/{name}/bias"] = layers * heads * head * by_2
    expected["layers/attention/output/kernel"] = layers * heads * head * width * by_4
    expected["layers/mlp/up/kernel"] = expected["layers/mlp/down/kernel"] = layers * width * mlp * by_4
    expected["layers/mlp/up/bias"] = layers * mlp * by_2
    for name in ("attention/output/bias", "mlp/down/bias", "attention_norm/scale", "attention_norm/bias"):
        expected[f"layers/{name}"] = layers * width * by_2
    expected["layers/mlp_norm/scale"] = expected["layers/mlp_norm/bias"] = layers * width * by_2
    expected["final_norm/scale"] = expected["final_norm/bias"] = width * by_2
    assert lines == expected


def test_rules_may_be_changed() -> None:
    mesh = abstract_mesh(MeshConfig(data=1, fsdp=2, tensor=4), 8)
    assert parameter_specs(boxed("embed", "mlp"), mesh)["kernel"] == P("fsdp", "tensor")
    with use_rules(MeshConfig(rules=("embed=fsdp+tensor", "mlp="))):
        assert parameter_specs(boxed("embed", "mlp"), mesh)["kernel"] == P(("fsdp", "tensor"), None)
        (row,) = layout_table(boxed("embed", "mlp"), mesh)
        assert (row["bytes"], row["bytes_per_device"]) == (256, 32)
    assert rules_of(MeshConfig()) == RULES


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ("vocb=tensor", "unknown name vocb; did you mean vocab"),
        ("vocab=tensr", "unknown mesh axis tensr; did you mean tensor"),
        ("vocab", "must be NAME=AXIS"),
    ],
)
def test_wrong_rules_are_refused(rule: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        rules_of(MeshConfig(rules=(rule,)))


def test_a_misspelt_name_a_collision_and_what_does_not_divide_name_the_parameter() -> None:
    mesh = abstract_mesh(MeshConfig(data=1, fsdp=2, tensor=4), 8)
    with pytest.raises(KeyError, match="parameter kernel has the logical name 'mpl'"):
        parameter_specs(boxed("embed", "mpl"), mesh)
    with (
        use_rules(MeshConfig(rules=("mlp=fsdp",))),
        pytest.raises(UserError, match=r"parameter kernel \['embed', 'mlp'\]: 'embed' and 'mlp' are both laid over mesh.fsdp"),
    ):
        parameter_specs(boxed("embed", "mlp"), mesh)
    with pytest.raises(UserError, match=r"parameter kernel \(8, 6\): mlp=6 does not divide over mesh tensor=4"):
        parameter_specs(boxed("embed", "mlp", shape=(8, 6)), mesh)


def test_a_command_line_rule_that_collides_is_one_sentence(capsys) -> None:
    command = ["config", str(ROOT / "configs/gpt2_124m.py"), "--shardings", *MESH, "--config.mesh.rules=mlp=fsdp"]
    assert cli.main(command) == 2
    said = "parameter layers/mlp/up/kernel ['embed', 'mlp']: 'embed' and 'mlp' are both laid over mesh.fsdp"
    assert said in capsys.readouterr().err


def test_one_axis_takes_what_the_others_leave() -> None:
    assert axis_sizes(MeshConfig(data=-1, fsdp=2, tensor=2), 8)["data"] == 2
    assert axis_sizes(MeshConfig(data=1, fsdp=-1, tensor=2), 8)["fsdp"] == 4
    assert spec("batch", "length", "heads", None) == P(("data", "fsdp", "expert"), "context", "tensor", None)
