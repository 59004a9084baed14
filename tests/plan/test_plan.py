"""The plan: topologies, the reader of compiled programs, memory, times by hand, and a real TPU compilation where libtpu is."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import pathlib
import subprocess
import sys

import pytest

from gptjax import cli
from gptjax.config import UserError
from gptjax.parallel.mesh import abstract_mesh
from gptjax.plan import hlo, roofline
from gptjax.plan import search as search_lib
from gptjax.plan.chips import GIB, parse_topology
from gptjax.plan.memory import estimate, estimate_over, saved_elements
from gptjax.recipes import load_recipe
from tests.small import LLAMA, small

REPOSITORY = pathlib.Path(__file__).resolve().parents[2]


def run(*words: str, seconds: int = 600) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "JAX_PLATFORMS": "cpu"}
    # Machine code is never read, and little of it is run.
    environment["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_backend_optimization_level=0".strip()
    command = [sys.executable, "-W", "error", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=REPOSITORY, timeout=seconds)


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict:
    done = run("-m", "tests.plan.on_eight_devices", str(tmp_path_factory.mktemp("plan")))
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


# --- topologies --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "devices", "gib"),
    [("v5p:4x4x4", 64, 95), ("v5e:2x2", 4, 16), ("v6e:1", 1, 32), ("tpu7x:2x2x1", 8, 96), ("h100:8x16", 128, 80e9 / GIB)],
)
def test_topologies(text, devices, gib):
    topology = parse_topology(text)
    assert (topology.name, topology.devices) == (text, devices)
    assert topology.device_memory == pytest.approx(gib * GIB)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("v5x:2x2", "unknown chip 'v5x'; did you mean v5"),
        ("H100:8", "unknown chip 'H100'; did you mean h100?"),
        ("zebra:2", "unknown chip 'zebra'; there are v4, v5e"),
        ("v5p", "as in v5p:4x4x4"),
        ("v5p:4x4", "v5p takes 3 sizes, not 2, as in v5p:4x4x4"),
        ("v5e:2x-2", "as in v5e:2x2"),
        ("v5e:3x4", "the nearest that they do is v5e:4x4"),
        ("cpu:2x4", "cpu takes 1 sizes, not 2, as in cpu:8"),
    ],
)
def test_a_wrong_topology_is_answered_in_one_sentence(text, complaint, capsys):
    assert cli.main(["plan", f"--topology={text}", "--config=configs/llama_7b.py"]) == 2
    said = capsys.readouterr().err
    assert complaint in said and said.count("\n") == 1


@pytest.mark.parametrize(
    ("overrides", "complaint"),
    [
        (["model.vocab_size=0"], "model.vocab_size=0 waits for the tokenizer"),
        (["mesh.fsdp=3", "mesh.data=1"], "mesh.fsdp=3 takes 3 of the 128 devices"),
        (["mesh.tensor=64"], "model.num_heads=32 does not divide over mesh.tensor=64"),
        (["mesh.fsdp=256"], "needs 256 devices, but there are 128"),
    ],
)
def test_a_run_that_cannot_be_there_is_refused(overrides, complaint, capsys):
    words = [f"--config.{override}" for override in overrides]
    assert cli.main(["plan", "--topology=h100:8x16", f"--config={REPOSITORY / 'configs' / 'llama_7b.py'}", *words]) == 2
    assert complaint in capsys.readouterr().err


# --- the reader of compiled programs -----------------------------------------------------------


def test_collectives_and_products_of_a_known_program(found):
    """On one device x is [6, 3] and w [3, 12] in float32, five times: a sum of [6, 12] over 4 devices, 288 bytes, of which a ring
    sends 2 * 3/4; then [6, 3] gathered from 2 devices, 72 bytes, of which half of the 144 are sent.
    """
    assert found["known"]["collectives"] == [["all-gather", 72, 144, 72, 2, 1], ["all-reduce", 288, 288, 432, 4, 5]]
    assert found["known"]["flops"] == 5 * 2 * 6 * 3 * 12
    assert found["known"]["unread"] == []


def test_flops_over_loops_are_those_of_the_same_program_without(found):
    flops = found["flops"]
    assert flops["loops"] == flops["flat"]
    assert flops["loops_once"] < 0.5 * flops["loops"]


def test_a_program_without_loops_has_the_products_of_xlas_own_count(found):
    """XLA's also counts elementwise arithmetic, much of it at these widths."""
    flops = found["flops"]
    assert flops["flat_once"] < flops["flat_cost_analysis"] < 2 * flops["flat_once"]


@pytest.mark.parametrize(
    ("attributes", "group"),
    [
        ("replica_groups={{0,2},{1,3}}, x=1", (0, 2)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2] {'axis_0'}", (0, 2, 4, 6)),
        ("replica_groups=mesh['a'=2,'b'=4] {'b':(1)2}", (0, 2)),
        ("source_target_pairs={{0,3},{3,0}}", (0, 3)),
    ],
)
def test_every_way_to_write_groups(attributes, group):
    assert hlo.first_group(attributes) == group


TPU_LOOP = """HloModule m

%cond (c: (s32[], f32[4,8])) -> pred[] {
  %limit = s32[]{:T(128)} constant(7)
  %c = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%c), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %limit), direction=LT
}

%fused (p0: f32[4,8], p1: f32[7,8,8], p2: s32[]) -> f32[4,8] {
  %p0 = f32[4,8]{1,0} parameter(0)
  %p1 = f32[7,8,8]{2,1,0} parameter(1)
  %p2 = s32[] parameter(2)
  %zero = s32[] constant(0)
  %slice = f32[1,8,8]{2,1,0} dynamic-slice(%p1, %p2, %zero, %zero), dynamic_slice_sizes={1,8,8}
  %w = f32[8,8]{1,0} bitcast(%slice)
  ROOT %y = f32[4,8]{1,0} convolution(%p0, %w), dim_labels=bf_io->bf
}

%scatter.1 (s0: f32[4,8]) -> f32[2,8] {
  %s0 = f32[4,8]{1,0} parameter(0)
  %ar = f32[4,8]{1,0} all-reduce(%s0), replica_groups=[2,2]<=[4], to_apply=%add
  ROOT %part = f32[2,8]{1,0} slice(%ar), slice={[0:2], [0:8]}
}

%body (b: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %b = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%b), index=0
  %x = f32[4,8]{1,0:T(8,128)} get-tuple-element(%b), index=1
  %ws = f32[7,8,8]{2,1,0:T(8,128)} custom-call(), custom_call_target="AllocateBuffer"
  %f = f32[4,8]{1,0:T(8,128)S(1)} fusion(%x, %ws, %j), kind=kOutput, calls=%fused
  %one = s32[]{:T(128)} constant(1)
  %next = s32[]{:T(128)} add(%j, %one)
  ROOT %t = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) tuple(%next, %f)
}

ENTRY %main (a: f32[4,8]) -> f32[2,8] {
  %a = f32[4,8]{1,0:T(8,128)} parameter(0)
  %two = s32[]{:T(128)} constant(2)
  %start = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) tuple(%two, %a)
  %loop = (s32[]{:T(128)}, f32[4,8]{1,0:T(8,128)}) while(%start), condition=%cond, body=%body
  %r = f32[4,8]{1,0:T(8,128)} get-tuple-element(%loop), index=1
  ROOT %rs = f32[2,8]{1,0:T(8,128)} fusion(%r), kind=kCustom, calls=%all-reduce-scatter.1
}
""".replace("%scatter.1", "%all-reduce-scatter.1")


def test_a_program_as_a_tpu_writes_it():
    """A loop from 2 to 7; a product as a convolution, of a slice of stacked weights; a result kept on the chip, S(1); a scattered
    sum as a fusion of an all-reduce.
    """
    program = hlo.parse(TPU_LOOP)
    assert program.times["body"] == 5 and program.unread == []
    assert program.matmul_flops() == 5 * 2 * 4 * 8 * 8
    (scatter,) = program.collectives()
    assert (scatter.kind, scatter.group, scatter.bytes, scatter.wire_bytes) == ("reduce-scatter", (0, 1), 128, 64)
    reads = [traffic for flops, traffic, _ in program.work() if flops]
    assert reads == [4 * 8 * 4 + 8 * 8 * 4 + 4]  # x, one slice, the counter; the result never reaches memory


def test_a_convolution_counts_only_what_meets_data():
    """A product over batches as TPUs write it: lhs dilated by the batch, so that each of 6 outputs meets one of 6 places."""
    text = """HloModule m
ENTRY %main (l: f32[6,5,4], r: f32[6,4,3]) -> f32[6,5,3] {
  %l = f32[6,5,4]{2,1,0} parameter(0)
  %r = f32[6,4,3]{2,1,0} parameter(1)
  ROOT %c = f32[6,5,3]{2,1,0} convolution(%l, %r), window={size=6 stride=5 lhs_dilate=6}, dim_labels=0bf_0io->0bf
}
"""
    assert hlo.parse(text).matmul_flops() == 6 * 2 * 5 * 4 * 3


def test_a_kernel_whose_description_goes_over_several_lines():
    """Two products of 3 x 2 heads of 8 queries with 16 keys of width 4; the product behind it is not lost."""
    text = """HloModule m
ENTRY %main (q: bf16[3,2,8,4], k: bf16[3,1,16,4], a: f32[2,2]) -> f32[2,2] {
  %q = bf16[3,2,8,4]{3,2,1,0} parameter(0)
  %k = bf16[3,1,16,4]{3,2,1,0} parameter(1)
  %a = f32[2,2]{1,0} parameter(2)
  %splash_mha_fwd_residuals.1 = bf16[3,2,8,4]{3,2,1,0} custom-call(%q, %k), custom_call_target="tpu_custom_call", m={
"note":"{}"
}}, metadata={op_name="f"}
  ROOT %dot.1 = f32[2,2]{1,0} dot(%a, %a), lhs_contracting_dims={1}, rhs_contracting_dims={0}
}
"""
    program = hlo.parse(text)
    assert program.kernels() == ["tpu_custom_call"]
    assert program.kernel_flops() == 2 * (2 * 3 * 2 * 8 * 16 * 4)
    assert program.matmul_flops() == 2 * 2 * 2 * 2


def test_a_loop_that_cannot_be_read_is_named():
    program = hlo.parse(TPU_LOOP.replace("direction=LT", "direction=NE"))
    assert program.unread == ["loop"] and program.times["body"] == 1


# --- memory and times --------------------------------------------------------------------------


def test_memory_is_that_of_the_state_and_of_the_compiled_program(found):
    memory = found["memory"]
    parts = memory["report"]["memory"]["parts"]
    assert parts["parameters"] == memory["parameters"]
    assert parts["parameters"] + parts["optimizer"] == memory["state"]
    assert memory["report"]["memory"]["total"] == sum(memory["compiled"])
    assert parts["batch"] == 3 * 4 * (8 // 4) * 13  # tokens, segments, positions; int32; 8 rows over data * fsdp; 13 tokens
    assert memory["report"]["fits"] and "fits" in memory["text"]
    assert {"fsdp", "tensor"} <= set(memory["axes"])


def test_a_run_that_does_not_fit_exits_with_1(found):
    assert found["too_big"]["status"] == 1
    assert json.loads(found["too_big"]["out"]) == found["too_big"]["file"]
    assert found["too_big"]["file"]["fits"] is False


def test_search_ranks_what_fits(found):
    rows = found["search"]
    assert rows[0]["plan"]["fits"] and all(row["plan"] is None for row in rows[1:])
    for row in rows:
        axes = [row["knobs"][f"mesh.{axis}"] for axis in ("data", "fsdp", "tensor")]
        assert axes[0] * axes[1] * axes[2] == 8 and row["knobs"]["data.batch_size"] == 16


def test_estimate_without_a_compiler_by_hand():
    """One layer of GPT-2's shape, V 32, D 8, F 32, N 2, T 16, float32, over fsdp 2: 1,272 parameters."""
    sizes = {"model.num_layers": 1, "model.model_dim": 8, "model.num_heads": 2, "model.vocab_size": 32, "data.seq_len": 16}
    config = small(sizes, data__batch_size=4, mesh__data=1, mesh__fsdp=2, model__remat="full")
    mesh, parts = estimate_over(config, 2)
    # Every parameter is split but the biases of query, key, value (8 each) and of the MLP's up (32), which stay whole.
    parameters = 32 * 8 + 16 * 8 + 4 * 8 * 8 + 2 * 8 * 32 + 2 * 8 + 2 * 8 + 2 * 8 + 4 * 8 + 32 + 8
    held = 4 * ((parameters - 56) // 2 + 56)
    assert dict(mesh.shape)["fsdp"] == 2
    assert parts["parameters"] == held and parts["gradients"] == held
    assert parts["optimizer"] == 2 * held + 6 * 4  # two moments; two counts, step, seed, non-finite steps twice
    assert parts["rounded"] == 0  # products take float32 as it is
    assert parts["saved activations"] == 2 * 16 * 8 * 4  # rows, tokens, width, float32
    # Four residual vectors, four arrays of the MLP (more than 12 bytes of each of 2 * 2 * 16 * 16 scores, or 4 * 4 of attention),
    # gathered weights and their gradient.
    layer = 2 * 16 * (4 * 8 + 4 * 32) * 4 + (4 * 8 * 8 + 2 * 8 * 32) * 8
    assert parts["working set"] == layer
    assert parts["total"] == sum(size for name, size in parts.items() if name != "total")


@pytest.mark.parametrize("name", ["gpt2_124m.v5e-2x2", "llama_7b.v5p-4x4x4", "gpt3_175b.v5p-8x8x16"])
def test_estimate_is_near_the_compiled_programs(name):
    """Of experiments/plans; `--search` leaves out what the estimate says does not fit."""
    compiled = json.loads((REPOSITORY / "experiments" / "plans" / f"{name}.json").read_text())
    config = load_recipe(str(REPOSITORY / "configs" / f"{name.partition('.')[0]}.py"))
    _, parts = estimate_over(config, compiled["devices"], "tpu")
    assert parts["total"] == pytest.approx(compiled["memory"]["total"], rel=0.1)


EXPERTS = {"model.num_experts": 8, "model.expert_mlp_dim": 24, "model.num_shared_experts": 1, "model.gated_mlp": True}


def test_estimate_of_experts_by_hand():
    """D 16, 8 experts of 24 and a shared one, 2 a token, T 12, rows of 2 on each of 4 devices: expert 2 by tensor 2."""
    config = small(EXPERTS, model__expert_capacity_factor=1.5, model__remat="dots", mesh__data=1, mesh__expert=2, mesh__tensor=2)
    mesh = abstract_mesh(config.mesh, 4)
    places = 8 * 5 / 12  # ceil(1.5 * 12 * 2 / 8) places an expert, for 12 tokens
    hidden = (places + 1) * 24 / 2
    # Input and logits; queries, keys, values (4 heads of 4 over 2); attention's output; up and gate; what experts return.
    assert saved_elements(config, mesh, "gpu") == pytest.approx(16 + 8 + 3 * 8 + 16 + 2 * hidden + places * 16)
    dropless = dataclasses.replace(config, model=dataclasses.replace(config.model, expert_capacity_factor=0.0, remat="none"))
    places = 2 * 2  # over 2 parts, each with room for both choices of every token
    hidden = (places + 1) * 24 / 2
    again = 2 * 16 + 8 + 2 * hidden + 2 * places * 16  # norms' results, attention's, act(gate) and its product, places twice more
    saved = 16 + 8 + 3 * 8 + 16 + 2 * hidden + places * 16 + again
    assert saved_elements(dropless, mesh, "gpu") == pytest.approx(saved)
    whole = small(EXPERTS, model__expert_capacity_factor=1.5, mesh__data=4)
    spared = estimate_over(whole, 4)[1]["parameters"] - estimate(config, mesh)["parameters"]
    assert spared > 2 * 8 * (3 * 16 * 24) * 4 * 3 / 4  # of two layers' experts a fourth lies on each device


def test_experts_flops_are_those_of_the_compiled_program(found):
    """Places are multiplied, filled or not, and again with remat; so are the router's and all other products."""
    experts = found["experts"]
    assert experts["formula"]["empty"] > 0.1 * experts["formula"]["executed"]
    assert experts["formula"]["recomputed"] > 0.1 * experts["formula"]["executed"]
    assert experts["compiler"] == pytest.approx(experts["formula"]["executed"], rel=0.01)


def test_search_compiles_what_may_fit_and_lists_only_what_fits(monkeypatch):
    """The estimate is 10 % above the limit for one micro-batch, and far above it without remat."""
    config = small(LLAMA, data__batch_size=16, train__duration_steps=1)
    compiled = []

    def estimated(candidate, devices, platform):
        assert platform == "tpu"
        size = {"full": 0.5, "dots": 1.1, "none": 3.0}[candidate.model.remat]
        return abstract_mesh(candidate.mesh, devices), {"total": size * 16 * GIB}

    def planned(candidate, topology, **options):
        compiled.append(candidate.model.remat)
        return {"fits": True, "memory": {"total": 15 * GIB}, "tokens_per_second": {"in_turn": 1.0}}

    monkeypatch.setattr(search_lib.memory, "estimate_over", estimated)
    monkeypatch.setattr(search_lib, "plan", planned)
    monkeypatch.setattr(search_lib, "quick_seconds", lambda candidate, *_: 2.0 if candidate.model.remat == "full" else 1.0)
    rows = search_lib.search(config, parse_topology("v5e:2x2"), compile_best=2)
    assert compiled == ["dots", "dots"]
    assert [row["knobs"]["model.remat"] for row in rows[:3]] == ["dots", "dots", "full"]
    assert {row["knobs"]["model.remat"] for row in rows[2:]} == {"full"}


def test_recomputed_flops_by_hand():
    """D 8, F 32, two heads of 4, T 12: attention is 4 T N H, full is also four products D x D and one D x F."""
    sizes = {"model.num_layers": 3, "model.model_dim": 8, "model.num_heads": 2}
    by_remat = {remat: small(sizes, model__remat=remat).model for remat in ("none", "dots", "full")}
    attention = 4 * 12 * 8
    found = {remat: roofline.recomputed_flops_per_token(model, 12) for remat, model in by_remat.items()}
    assert found == {"none": 0, "dots": 3 * attention, "full": 3 * (attention + 2 * 4 * 8 * 8 + 2 * 8 * 32)}


def test_places_of_experts_by_hand():
    """8 experts of 24, 2 a token, 12 tokens: a factor of 1.5 is 4.5 places, so 5; a factor of 0.5 is 1.5, so 2."""
    models = {factor: small(EXPERTS, model__expert_capacity_factor=factor).model for factor in (0.0, 0.5, 1.5)}
    places = {factor: roofline.expert_places(model, 12) for factor, model in models.items()}
    assert places == {0.0: 2, 0.5: 8 * 2 / 12, 1.5: 8 * 5 / 12}
    one = 6 * 2 * 3 * 16 * 24  # two layers of three matrices
    empty = {factor: roofline.empty_flops_per_token(model, 12) for factor, model in models.items()}
    assert empty == pytest.approx({0.0: 0, 0.5: one * (16 / 12 - 2), 1.5: one * (40 / 12 - 2)})


class Place:
    def __init__(self, *coords: int):
        self.coords = coords


def test_links_that_a_group_may_use():
    """On 4x4x8 of v5p: a whole dimension is a ring of two directions, a part of one is a line, and dimensions add up."""
    topology = parse_topology("v5p:4x4x8")
    devices = [Place(x, y, z) for z in range(8) for y in range(4) for x in range(4)]
    assert roofline.link_bandwidth([0, 1, 2, 3], devices, topology) == 2 * 100e9
    assert roofline.link_bandwidth([0, 1], devices, topology) == 100e9
    assert roofline.link_bandwidth(range(16), devices, topology) == 4 * 100e9
    assert roofline.link_bandwidth(range(64), devices, topology) == 5 * 100e9
    assert roofline.mesh_axes([0, 4, 8, 12], {"data": 2, "fsdp": 4, "tensor": 4}) == ("fsdp",)


def test_collective_seconds_by_hand():
    topology = parse_topology("v5e:2x2")
    devices = [Place(x, y, 0) for y in range(2) for x in range(2)]
    reduce = hlo.Collective("all-reduce", 4e9, (0, 1, 2, 3), 3, "r", "")
    assert reduce.wire_bytes == 2 * 3 / 4 * 4e9
    assert roofline.collective_seconds(reduce, devices, topology) == pytest.approx(3 * 6e9 / (2 * 50e9))


# --- libtpu ------------------------------------------------------------------------------------


def test_without_libtpu_the_extra_is_named(monkeypatch):
    from gptjax.plan.compiled import prepare

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=r'pip install "gptjax\[tpu\]"'):
        prepare(parse_topology("v5e:2x2"))


def test_compiles_for_a_tpu(tmp_path):
    if importlib.util.find_spec("libtpu") is None:
        pytest.skip("libtpu is not installed (extra: tpu)")
    sizes = ["num_layers=2", "model_dim=256", "num_heads=4", "vocab_size=512", "max_seq_len=128"]
    words = [f"--config.model.{size}" for size in sizes] + ["--config.data.batch_size=16", "--config.data.seq_len=128"]
    words += ["--config.mesh.data=1", "--config.mesh.fsdp=2", "--config.mesh.tensor=2", "--config.train.accumulation_steps=2"]
    recipe = REPOSITORY / "configs" / "gpt2_124m.py"
    done = run("-m", "gptjax", "plan", f"--config={recipe}", "--topology=v5e:2x2", f"--output={tmp_path / 'p'}", *words)
    assert done.returncode == 0, done.stderr
    report = json.loads((tmp_path / "p").read_text())
    assert report["flops"]["compiler_over_formula"] == pytest.approx(1, abs=0.05)
    assert 0 < report["mfu"]["in_turn"] <= report["mfu"]["overlapped"] < 1
    assert {"fsdp", "tensor"} <= {row["axes"] for row in report["collectives"]}
