"""Folders that should load, and folders that should be refused; the models' outputs are checked in the files beside this one."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from gptjax.config import ModelConfig, UserError, from_dict
from gptjax.interop.huggingface import architecture_for, load, open_folder

safetensors_numpy = pytest.importorskip("safetensors.numpy")

ZEROS = np.zeros((11, 8), np.float32)
GPT2 = {
    "model_type": "gpt2",
    "vocab_size": 11,
    "n_layer": 2,
    "n_embd": 8,
    "n_head": 2,
    "n_inner": None,
    "n_positions": 6,
    "activation_function": "gelu_new",
    "layer_norm_epsilon": 2e-5,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 11,
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 6,
    "rms_norm_eps": 1e-6,
    "hidden_act": "silu",
    "rope_theta": 500.0,
    "tie_word_embeddings": False,
}


QWEN2 = LLAMA | {"model_type": "qwen2"}
NEOX = {
    "model_type": "gpt_neox",
    "vocab_size": 11,
    "num_hidden_layers": 2,
    "hidden_size": 8,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 6,
    "rotary_pct": 0.5,
    "rotary_emb_base": 700,
}


def neox_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {"gpt_neox.embed_in.weight": (11, 8), "embed_out.weight": (11, 8)}
    for name in (
        "gpt_neox.final_layer_norm",
        *(f"gpt_neox.layers.{i}.{n}_layernorm" for i in (0, 1) for n in ("input", "post_attention")),
    ):
        shapes |= {f"{name}.weight": (8,), f"{name}.bias": (8,)}
    block = {
        "attention.query_key_value": (24, 8),
        "attention.dense": (8, 8),
        "mlp.dense_h_to_4h": (12, 8),
        "mlp.dense_4h_to_h": (8, 12),
    }
    for layer in range(2):
        for name, shape in block.items():
            shapes |= {f"gpt_neox.layers.{layer}.{name}.weight": shape, f"gpt_neox.layers.{layer}.{name}.bias": shape[:1]}
    return shapes


def gpt2_shapes() -> dict[str, tuple[int, ...]]:
    shapes = {"wte.weight": (11, 8), "wpe.weight": (6, 8), "ln_f.weight": (8,), "ln_f.bias": (8,)}
    for layer in range(2):
        for name, shape in {"attn.c_attn": (8, 24), "attn.c_proj": (8, 8), "mlp.c_fc": (8, 32), "mlp.c_proj": (32, 8)}.items():
            shapes |= {f"h.{layer}.{name}.weight": shape, f"h.{layer}.{name}.bias": shape[1:]}
        for name in ("ln_1", "ln_2"):
            shapes |= {f"h.{layer}.{name}.weight": (8,), f"h.{layer}.{name}.bias": (8,)}
    return {f"transformer.{name}": shape for name, shape in shapes.items()}


def llama_shapes() -> dict[str, tuple[int, ...]]:
    shapes = {"model.embed_tokens.weight": (11, 8), "model.norm.weight": (8,), "lm_head.weight": (11, 8)}
    for layer in range(2):
        block = {
            "input_layernorm": (8,),
            "post_attention_layernorm": (8,),
            "self_attn.q_proj": (8, 8),
            "self_attn.k_proj": (4, 8),
            "self_attn.v_proj": (4, 8),
            "self_attn.o_proj": (8, 8),
            "mlp.gate_proj": (12, 8),
            "mlp.up_proj": (12, 8),
            "mlp.down_proj": (8, 12),
        }
        shapes |= {f"model.layers.{layer}.{name}.weight": shape for name, shape in block.items()}
    return shapes


def random_tensors(shapes: dict[str, tuple[int, ...]]) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def write(folder: pathlib.Path, config: dict[str, Any], tensors: dict[str, np.ndarray] | None) -> pathlib.Path:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if tensors is not None:
        safetensors_numpy.save_file(tensors, folder / "model.safetensors")
    return folder


def leaves(params: Any, prefix: str = "") -> dict[str, np.ndarray]:
    if isinstance(params, np.ndarray):
        return {prefix: params}
    return {path: leaf for name, child in params.items() for path, leaf in leaves(child, f"{prefix}/{name}").items()}


def assert_same(a: Any, b: Any) -> None:
    a, b = leaves(a), leaves(b)
    assert a.keys() == b.keys()
    for path, leaf in a.items():
        assert leaf.dtype == np.float32
        np.testing.assert_array_equal(leaf, b[path], err_msg=path)


def test_gpt2_lands_in_our_layout(tmp_path: pathlib.Path) -> None:
    tensors = random_tensors(gpt2_shapes())
    knobs, params = load(write(tmp_path, GPT2, tensors))
    config = ModelConfig(**knobs)
    assert (config.num_kv_heads, config.head_dim, config.mlp_dim) == (2, 4, 32)
    assert (config.norm_epsilon, config.activation) == (2e-5, "gelu_tanh")
    fused = tensors["transformer.h.1.attn.c_attn.weight"]
    attention = params["layers"]["attention"]
    for index, name in enumerate(("query", "key", "value")):
        np.testing.assert_array_equal(attention[name]["kernel"][1].reshape(8, 8), fused[:, 8 * index : 8 * index + 8])
    assert attention["output"]["kernel"].shape == (2, 2, 4, 8)
    np.testing.assert_array_equal(params["layers"]["mlp"]["down"]["kernel"][0], tensors["transformer.h.0.mlp.c_proj.weight"])


def test_llama_lands_in_our_layout(tmp_path: pathlib.Path) -> None:
    tensors = random_tensors(llama_shapes())
    knobs, params = load(write(tmp_path, LLAMA, tensors))
    assert (knobs["rope_base"], knobs["head_dim"], knobs["num_kv_heads"], knobs["tied_embeddings"]) == (500.0, 2, 2, False)
    attention = params["layers"]["attention"]
    key, output = attention["key"]["kernel"][1].reshape(8, 4), attention["output"]["kernel"][0].reshape(8, 8)
    np.testing.assert_array_equal(key, tensors["model.layers.1.self_attn.k_proj.weight"].T)
    np.testing.assert_array_equal(output, tensors["model.layers.0.self_attn.o_proj.weight"].T)
    np.testing.assert_array_equal(params["head"], tensors["lm_head.weight"].T)


def test_neox_interleaves_query_key_and_value_head_by_head(tmp_path: pathlib.Path) -> None:
    tensors = random_tensors(neox_shapes())
    knobs, params = load(write(tmp_path, NEOX, tensors))
    config = ModelConfig(**knobs)
    assert (config.block, config.rotary_fraction, config.rope_base, config.activation) == ("parallel", 0.5, 700.0, "gelu")
    fused, attention = tensors["gpt_neox.layers.1.attention.query_key_value.weight"], params["layers"]["attention"]
    for head in range(2):
        for part, name in enumerate(("query", "key", "value")):
            rows = slice(12 * head + 4 * part, 12 * head + 4 * part + 4)
            np.testing.assert_array_equal(attention[name]["kernel"][1, :, head], fused[rows].T)
            bias = tensors["gpt_neox.layers.1.attention.query_key_value.bias"][rows]
            np.testing.assert_array_equal(attention[name]["bias"][1, head], bias)


def knobs_of(tmp_path: pathlib.Path, config: dict[str, Any]) -> ModelConfig:
    """Without reading a tensor."""
    return open_folder(write(tmp_path, config, {"x": ZEROS})).config().model


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (LLAMA | {"rope_scaling": {"type": "linear", "factor": 3}}, {"rope_scaling": "linear", "rope_scaling_factor": 3.0}),
        (LLAMA | {"rope_scaling": {"rope_type": "default"}}, {"rope_scaling": "none", "rope_base": 500.0}),
        (
            LLAMA | {"head_dim": 4, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
            {"rope_scaling": "dynamic", "rope_original_max_seq_len": 6},
        ),
        (  # DeepSeek's: (0.1 * 2 * ln 4 + 1) / (0.1 * ln 4 + 1)
            LLAMA | {"rope_scaling": {"type": "yarn", "factor": 4, "mscale": 2.0, "mscale_all_dim": 1.0}},
            {"rope_attention_factor": pytest.approx(1.27725887 / 1.13862944), "rope_original_max_seq_len": 6},
        ),
        (
            LLAMA | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 9.0, "original_max_position_embeddings": 3}},
            {"rope_base": 9.0, "rope_scaling_factor": 2.0, "rope_original_max_seq_len": 3, "rope_attention_factor": 0.0},
        ),
        (LLAMA | {"model_type": "mistral", "sliding_window": None}, {"attention_window": 0, "attention_bias": False}),
        (LLAMA | {"model_type": "mistral"}, {"attention_window": 4096}),
        (QWEN2, {"attention_window": 0, "attention_bias": True, "attention_output_bias": False}),
        (QWEN2 | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 2}, {"attention_window": 0}),
        (QWEN2 | {"use_sliding_window": True, "sliding_window": 5, "max_window_layers": 0}, {"attention_window": 5}),
        (LLAMA | {"model_type": "qwen3"}, {"head_dim": 128, "query_key_norm": True, "attention_bias": False}),
        (NEOX | {"use_parallel_residual": False}, {"block": "serial", "num_kv_heads": 2, "tied_embeddings": False}),
    ],
)  # fmt: skip
def test_knobs(tmp_path: pathlib.Path, config: dict[str, Any], expected: dict[str, Any]) -> None:
    found = knobs_of(tmp_path, config)
    assert {name: getattr(found, name) for name in expected} == expected


@pytest.mark.parametrize("config", [GPT2, NEOX, LLAMA, QWEN2, LLAMA | {"model_type": "qwen3"}, LLAMA | {"model_type": "mistral"}])
def test_the_architecture_of_a_config_is_found_again(tmp_path: pathlib.Path, config: dict[str, Any]) -> None:
    kind = config["model_type"]
    assert architecture_for(knobs_of(tmp_path, config)) == kind


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"position": "none"}, r"nearest, gpt2, cannot do model.position='none' \(it has 'learned'\)"),
        ({"norm": "rmsnorm"}, "nearest, gpt2, cannot do model.norm='rmsnorm'"),
        ({"attention_softcap": 5.0}, "nearest, gpt2, cannot do model.attention_softcap=5.0"),
        ({"num_experts": 4}, "nearest, gpt2, cannot do model.num_experts=4"),
        (
            {"model_dim": 30, "head_dim": 5, "attention_softcap": 5.0},
            "with its model.model_dim=30, model.num_heads=4, model.head_dim=5",
        ),
        ({"block": "parallel"}, "nearest, gpt2, cannot do model.block='parallel'"),
        (
            {"position": "rotary", "norm": "rmsnorm", "gated_mlp": True, "activation": "silu", "query_key_norm": True},
            "llama, cannot do model.query_key_norm",
        ),
        (
            {"position": "rotary", "rotary_fraction": 0.5, "query_key_norm": True},
            "nearest, gpt_neox, cannot do model.query_key_norm=True",
        ),
    ],
)
def test_a_model_that_no_architecture_expresses_is_refused_by_its_knob(changes: dict[str, Any], named: str) -> None:
    values = {"model": {"vocab_size": 7, **changes}, "data": {"seq_len": 1}, "train": {"duration_steps": 1}}
    with pytest.raises(UserError, match=named):
        architecture_for(from_dict(values).model)


def test_without_prefix_with_buffers_and_a_tied_head(tmp_path: pathlib.Path) -> None:
    tensors = random_tensors(gpt2_shapes())
    expected = load(write(tmp_path / "plain", GPT2, tensors))
    bare = {name.removeprefix("transformer."): tensor for name, tensor in tensors.items()}
    bare |= {f"h.{layer}.attn.bias": np.ones((1, 1, 6, 6), np.uint8) for layer in range(2)}
    bare |= {f"h.{layer}.attn.masked_bias": np.float32(-1e4).reshape(1) for layer in range(2)}
    bare["lm_head.weight"] = bare["wte.weight"].copy()
    knobs, params = load(write(tmp_path / "bare", GPT2, bare))
    assert knobs == expected[0]
    assert_same(params, expected[1])


def test_shards(tmp_path: pathlib.Path) -> None:
    tensors = random_tensors(llama_shapes())
    expected = load(write(tmp_path / "one", LLAMA, tensors))[1]
    folder = write(tmp_path / "two", LLAMA, None)
    names = sorted(tensors)
    shards = {"model-00001-of-00002.safetensors": names[:9], "model-00002-of-00002.safetensors": names[9:]}
    for file, part in shards.items():
        safetensors_numpy.save_file({name: tensors[name] for name in part}, folder / file)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {name: file for file, part in shards.items() for name in part}}))
    assert_same(load(folder)[1], expected)
    (folder / "model-00002-of-00002.safetensors").unlink()
    with pytest.raises(UserError, match="model-00002-of-00002.safetensors, which is not in"):
        load(folder)
    index.write_text(json.dumps({"weight_map": {"x": "../one/model.safetensors"}}))
    with pytest.raises(UserError, match="which is not in"):
        load(folder)


@pytest.mark.parametrize("dtype", [ml_dtypes.bfloat16, np.float16, np.float64])
def test_bfloat16_stays_and_other_float_types_become_float32(tmp_path: pathlib.Path, dtype: Any) -> None:
    tensors = {name: tensor.astype(dtype) for name, tensor in random_tensors(gpt2_shapes()).items()}
    rounded = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    knobs, params = load(write(tmp_path / "a", GPT2, tensors))
    expected = "bfloat16" if dtype == ml_dtypes.bfloat16 else "float32"
    assert knobs["param_dtype"] == expected and {str(leaf.dtype) for leaf in leaves(params).values()} == {expected}
    assert_same(
        {path: leaf.astype(np.float32) for path, leaf in leaves(params).items()},
        leaves(load(write(tmp_path / "b", GPT2, rounded))[1]),
    )


@pytest.mark.parametrize(
    ("shapes", "config", "change", "named"),
    [
        (gpt2_shapes, GPT2, lambda t: t.pop("transformer.h.1.mlp.c_fc.bias"), "no tensor transformer.h.1.mlp.c_fc.bias"),
        (gpt2_shapes, GPT2, lambda t: t.update(score=np.zeros(1, np.float32)), "the tensor score has no place"),
        (gpt2_shapes, GPT2, lambda t: t.update({"lm_head.weight": ZEROS}), "lm_head.weight differs"),
        (gpt2_shapes, GPT2, lambda t: t.update({"transformer.wte.weight": ZEROS[:2]}), "transformer.wte.weight has shape"),
        (gpt2_shapes, GPT2, lambda t: t.update({"transformer.ln_f.bias": ZEROS[0].astype(np.int8)}), "ln_f.bias is of type I8"),
        (llama_shapes, LLAMA, lambda t: t.pop("lm_head.weight"), "no tensor lm_head.weight"),
        (llama_shapes, LLAMA, lambda t: t.update({"model.layers.0.self_attn.q_proj.bias": ZEROS[0]}), "q_proj.bias has no"),
    ],
)
def test_a_tensor_missing_left_over_or_misshapen_is_named(
    tmp_path: pathlib.Path, shapes: Any, config: dict[str, Any], change: Any, named: str
) -> None:
    tensors = random_tensors(shapes())
    change(tensors)
    with pytest.raises(UserError, match=named):
        load(write(tmp_path, config, tensors))


@pytest.mark.parametrize(
    ("config", "named"),
    [
        (GPT2 | {"scale_attn_by_inverse_layer_idx": True}, "scale_attn_by_inverse_layer_idx=True"),
        (GPT2 | {"scale_attn_weights": False}, "scale_attn_weights=False"),
        (GPT2 | {"reorder_and_upcast_attn": True}, "reorder_and_upcast_attn=True"),
        (GPT2 | {"activation_function": "tanh"}, "activation_function='tanh'"),
        (GPT2 | {"model_type": "bloom"}, "'bloom' is not known; known are gpt2, gpt_neox, llama, mistral, qwen2, qwen3"),
        (GPT2 | {"layer_norm_epsilon": []}, r"norm_epsilon=\[\] must be a number"),
        (GPT2 | {"n_layer": "two"}, "num_layers='two'"),
        (GPT2 | {"n_head": 3}, "num_heads=3 does not divide"),
        ({key: value for key, value in GPT2.items() if key != "n_embd"}, "no 'n_embd'"),
        (LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling=.* has no 'low_freq_factor'"),
        (LLAMA | {"rope_scaling": {"type": "longrope", "factor": 8.0}}, "rope_scaling=.* asks for rope_type 'longrope'"),
        (LLAMA | {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "mscale": 1.0}}, "rope_parameters=.* has 'mscale'"),
        (LLAMA | {"rope_parameters": {"rope_type": "yarn", "factor": "8"}}, "rope_scaling_factor='8' must be a number"),
        (LLAMA | {"rope_parameters": {"rope_type": "yarn", "original_max_position_embeddings": "8"}}, "value of the wrong kind"),
        (LLAMA | {"partial_rotary_factor": 0.5}, "partial_rotary_factor=0.5 is not of this architecture"),
        (LLAMA | {"sliding_window": 4096}, "sliding_window=4096"),
        (QWEN2 | {"use_sliding_window": True, "max_window_layers": 1}, "max_window_layers=1 gives some layers a sliding window"),
        (QWEN2 | {"layer_types": ["full_attention", "sliding_attention"]}, "layer_types=.* gives some layers"),
        (LLAMA | {"quantization_config": {"bits": 4}}, "quantization_config="),
    ],
)
def test_what_the_decoder_cannot_express_is_named(tmp_path: pathlib.Path, config: dict[str, Any], named: str) -> None:
    with pytest.raises(UserError, match=named) as refusal:
        load(write(tmp_path, config, None))
    assert str(tmp_path / "config.json") in str(refusal.value)


def test_the_architecture_is_read_from_the_class_where_the_type_is_absent(tmp_path: pathlib.Path) -> None:
    config = {key: value for key, value in GPT2.items() if key != "model_type"} | {"architectures": ["GPT2LMHeadModel"]}
    assert load(write(tmp_path, config, random_tensors(gpt2_shapes())))[0]["position"] == "learned"


def test_rope_base_of_newer_files(tmp_path: pathlib.Path) -> None:
    config = {key: value for key, value in LLAMA.items() if key != "rope_theta"}
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 700.0}
    assert load(write(tmp_path, config, random_tensors(llama_shapes())))[0]["rope_base"] == 700.0


def broken(content: bytes, change: str) -> bytes:
    length = int.from_bytes(content[:8], "little")
    return {
        "truncated": content[:-5],
        "cut in its header": content[:40],
        "empty": b"",
        "a length beyond the file": (10**9).to_bytes(8, "little") + content[8:],
        "no JSON": content[:8] + b"?" * length + content[8 + length :],
        "another size": content.replace(b'"shape":[11,8]', b'"shape":[11,9]'),
        "a negative size": content.replace(b'"shape":[11,8]', b'"shape":[-1,8]'),
    }[change]


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ("truncated", r"model.safetensors is truncated: its tensor \S+ ends at byte"),
        ("cut in its header", "header's length of"),
        ("empty", "header's length of 0 bytes, but the file has 0"),
        ("a length beyond the file", "header's length of 1000000000 bytes, but the file has"),
        ("no JSON", r"its header is damaged"),
        ("another size", r"\(11, 9\) of type F32 takes 396 bytes, not 352"),
        ("a negative size", "makes no sense"),
    ],
)
def test_a_damaged_file_is_refused_before_anything_is_read(tmp_path: pathlib.Path, change: str, named: str) -> None:
    path = write(tmp_path, GPT2, random_tensors(gpt2_shapes())) / "model.safetensors"
    path.write_bytes(broken(path.read_bytes(), change))
    with pytest.raises(UserError, match=named):
        load(tmp_path)


def test_folders_that_hold_no_model(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="is not a folder"):
        load(tmp_path / "absent")
    with pytest.raises(UserError, match="no config.json"):
        load(tmp_path)
    folder = write(tmp_path, GPT2, None)
    with pytest.raises(UserError, match="neither model.safetensors nor"):
        load(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x02")
    with pytest.raises(UserError, match=r"pytorch_model.bin, a pickle.*convert it to safetensors"):
        load(folder)
    (folder / "model.safetensors").write_bytes(b"no header here")
    with pytest.raises(UserError, match="cannot be read as safetensors"):
        load(folder)
    (folder / "config.json").write_text("{")
    with pytest.raises(UserError, match="not valid JSON"):
        load(folder)
