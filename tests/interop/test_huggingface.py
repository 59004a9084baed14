"""Folders that should load, and folders that should be refused; the models' outputs are checked in the files beside this one."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
import pytest

from gptjax.config import ModelConfig, UserError
from gptjax.interop.huggingface import load

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
def test_other_float_types_become_float32(tmp_path: pathlib.Path, dtype: Any) -> None:
    tensors = {name: tensor.astype(dtype) for name, tensor in random_tensors(gpt2_shapes()).items()}
    rounded = {name: tensor.astype(np.float32) for name, tensor in tensors.items()}
    assert_same(load(write(tmp_path / "a", GPT2, tensors))[1], load(write(tmp_path / "b", GPT2, rounded))[1])


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
        (GPT2 | {"model_type": "bloom"}, "'bloom' is not known; known are gpt2, llama"),
        (GPT2 | {"n_layer": "two"}, "num_layers='two'"),
        (GPT2 | {"n_head": 3}, "num_heads=3 does not divide"),
        ({key: value for key, value in GPT2.items() if key != "n_embd"}, "no 'n_embd'"),
        (LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, "rope_scaling="),
        (LLAMA | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, "rope_parameters="),
        (LLAMA | {"sliding_window": 4096}, "sliding_window=4096"),
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
