"""PEFT's adapters read and written, against PEFT itself: logits, counts of what is trained, and twenty steps of training."""

from __future__ import annotations

import dataclasses
import json
import pathlib
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax.adapters import peft as ours
from gptjax.adapters.merge import merged
from gptjax.config import Config, UserError, from_dict
from gptjax.interop import huggingface, safetensors
from gptjax.model import decoder
from gptjax.parallel.mesh import make_mesh
from gptjax.train.groups import trained_count
from gptjax.train.objectives import Example
from gptjax.train.optimizers import Lengths
from gptjax.train.step import abstract_state, hidden_states, init_state, make_train_step
from tests.interop.transformer_models import random_transformer
from tests.small import tree_equal

KINDS: dict[str, dict[str, int]] = {
    "gpt2": {"n_layer": 2, "n_embd": 16, "n_head": 4, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0},
    "llama": {
        "num_hidden_layers": 2,
        "hidden_size": 16,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "intermediate_size": 24,
        "max_position_embeddings": 32,
    },
}
LORA: dict[str, Any] = {"r": 3, "lora_alpha": 5, "task_type": "CAUSAL_LM"}
DROPPED = {"lora_dropout": 0.2}
CASES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "gpt2": ("gpt2", "LoraConfig", LORA | {"target_modules": ["c_attn", "mlp.c_proj"]}),
    "gpt2, rank stabilised": (
        "gpt2",
        "LoraConfig",
        LORA | {"target_modules": ["c_attn", "attn.c_proj"], "use_rslora": True} | DROPPED,
    ),
    "gpt2, dora": ("gpt2", "LoraConfig", LORA | {"target_modules": ["c_attn", "mlp.c_fc"], "use_dora": True}),
    "llama": ("llama", "LoraConfig", LORA),
    "llama, dora": ("llama", "LoraConfig", LORA | {"target_modules": ["k_proj", "o_proj", "gate_proj"], "use_dora": True}),
    "gpt2, ia3": ("gpt2", "IA3Config", {"task_type": "CAUSAL_LM"}),
    "llama, ia3": ("llama", "IA3Config", {"task_type": "CAUSAL_LM"}),
    "gpt2, prompt": ("gpt2", "PromptTuningConfig", {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}),
    "gpt2, prefix": ("gpt2", "PrefixTuningConfig", {"task_type": "CAUSAL_LM", "num_virtual_tokens": 5}),
}
TOKENS = np.random.default_rng(0).integers(0, 101, (3, 12))


def theirs(case: str, folder: pathlib.Path) -> Any:
    """PEFT's model, every adapter's number random; base and adapter are saved in `folder`."""
    pytest.importorskip("torch")
    kind, config, values = CASES[case]
    model = random_transformer(kind, **KINDS[kind])
    model.save_pretrained(folder / "base")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # theirs, at import and of models without a name
        peft = pytest.importorskip("peft")
        import torch

        adapted = peft.get_peft_model(model, getattr(peft, config)(**values)).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        adapted.save_pretrained(folder / "adapter")
    return adapted


def read(folder: pathlib.Path, kind: str, **knobs: Any) -> tuple[Config, Any]:
    """(config, parameters with adapters) of what `theirs` saved."""
    model, params = huggingface.load(folder / "base")
    shape = {"model": model, "train": {"duration_steps": 20}, "data": {"seq_len": 12, "batch_size": 3, "packing": "windows"}}
    adapter, own = ours.read(folder / "adapter", kind, from_dict(shape).model, params)
    config = from_dict(shape | {"adapter": adapter} | knobs)
    return config, jax.tree.map(jnp.asarray, params | {"adapters": own})


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
def test_an_adapter_of_peft_computes_the_same_here_and_back_there(case: str, tmp_path: pathlib.Path) -> None:
    adapted = theirs(case, tmp_path)
    import peft
    import torch

    with torch.no_grad():
        expected = adapted(torch.tensor(TOKENS)).logits.numpy()
    config, params = read(tmp_path, CASES[case][0])
    count, _ = trained_count(config, params)
    assert count == adapted.get_nb_trainable_parameters()[0]
    # fresh ones of the same knobs have the same shapes
    abstract = abstract_state(config, Lengths.of(config, 1.0), make_mesh(config.mesh)).params
    assert jax.tree.map(jnp.shape, params) == jax.tree.map(jnp.shape, abstract)

    length = expected.shape[1] - TOKENS.shape[1]  # PEFT gives logits of a prompt, too
    found = logits(config, params)
    np.testing.assert_allclose(found, expected[:, length:], rtol=0, atol=1e-4)
    if not config.adapter.leading:
        plain, whole = merged(config, params)
        np.testing.assert_allclose(logits(plain, whole), found, rtol=0, atol=1e-5)

    out = tmp_path / "out"
    out.mkdir()
    ours.write(out, CASES[case][0], config, params, str(tmp_path / "base"))
    again_config, again = ours.read(out, CASES[case][0], config.model, params)
    assert dataclasses.replace(config.adapter, **again_config) == config.adapter
    (tree_equal if config.adapter.method != "prefix" else close)(again, jax.tree.map(np.asarray, params["adapters"]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = random_transformer(CASES[case][0], **KINDS[CASES[case][0]])
        loaded = peft.PeftModel.from_pretrained(base, out).eval()
    with torch.no_grad():
        np.testing.assert_allclose(loaded(torch.tensor(TOKENS)).logits.numpy(), expected, rtol=0, atol=1e-5)


def close(a: Any, b: Any) -> None:
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=0, atol=1e-6), a, b)


def logits(config: Config, params: Any) -> np.ndarray:
    """[B, T, V]"""
    positions = np.broadcast_to(np.arange(TOKENS.shape[1]), TOKENS.shape)
    ones = jnp.ones(TOKENS.shape)
    example = Example(jnp.asarray(TOKENS), jnp.asarray(TOKENS), ones, jnp.asarray(positions), ones.astype(jnp.int32))

    @jax.jit
    def run(params: Any) -> jax.Array:
        hidden, _ = hidden_states(config, params, example)
        return decoder.logits(hidden, decoder.output_table(params, config.model), config.model)

    return np.asarray(run(params))


@pytest.mark.parity
@pytest.mark.parametrize("case", ["gpt2", "llama, dora"])
def test_twenty_steps_lose_what_torch_loses(case: str, tmp_path: pathlib.Path) -> None:
    """Cross-entropy of the next token, AdamW without decay; the base is frozen on both sides."""
    adapted = theirs(case, tmp_path)
    import torch

    rate, betas = 1e-2, (0.9, 0.95)
    optimizer = torch.optim.AdamW(
        [p for p in adapted.parameters() if p.requires_grad], lr=rate, betas=betas, eps=1e-8, weight_decay=0.0
    )
    rng, batches, expected = np.random.default_rng(3), [], []
    for _ in range(20):
        batches.append(rng.integers(0, 101, (3, 13)))
        tokens = torch.tensor(batches[-1])
        optimizer.zero_grad()
        scores = adapted(tokens[:, :-1]).logits
        loss = torch.nn.functional.cross_entropy(scores.reshape(-1, scores.shape[-1]), tokens[:, 1:].reshape(-1))
        loss.backward()
        optimizer.step()
        expected.append(loss.item())

    own = {"learning_rate": rate, "schedule": "constant", "clip_norm": 0.0, "weight_decay": 0.0, "beta1": 0.9, "beta2": 0.95}
    config, params = read(tmp_path, CASES[case][0], optimizer=own)
    lengths, mesh = Lengths.of(config, 1.0), make_mesh(config.mesh)
    step, state = make_train_step(config, lengths, mesh), init_state(config, lengths, mesh, params)
    losses = []
    for tokens in batches:
        positions = np.broadcast_to(np.arange(13, dtype=np.int32), tokens.shape)
        batch = {"tokens": tokens.astype(np.int32), "segment_ids": np.ones(tokens.shape, np.int32), "positions": positions}
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    np.testing.assert_allclose(losses, expected, rtol=0, atol=1e-3)
    assert expected[-1] < expected[0] - 0.01  # so that twenty steps that do nothing would show
    for name, parameter in adapted.named_parameters():
        assert parameter.requires_grad == ("lora_" in name)


# --- what has no place here -----------------------------------------------------------------------------------------------------


def folder_of(tmp_path: pathlib.Path, values: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> pathlib.Path:
    (tmp_path / ours.CONFIG).write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4} | values))
    made: list[safetensors.Write] = [
        (ours.ROOT + name, "F32", shape, lambda shape=shape: [np.ones(shape, np.float32)]) for name, shape in tensors.items()
    ]
    safetensors.write_file(tmp_path / ours.WEIGHTS, made)
    return tmp_path


ONE = {"transformer.h.0.attn.c_attn.lora_A.weight": (2, 16), "transformer.h.0.attn.c_attn.lora_B.weight": (48, 2)}


@pytest.mark.parametrize(
    ("values", "tensors", "message"),
    [
        ({"peft_type": "VERA"}, {}, "peft_type='VERA' is not known; known are LORA"),
        ({"bias": "all"}, {}, "bias='all' has no counterpart here"),
        ({"rank_pattern": {"c_attn": 4}}, {}, "rank_pattern=.* has no counterpart"),
        ({}, ONE, "no tensor for h.1.attn.c_attn.lora_A.weight; adapters of some layers alone"),
        ({"r": 3}, ONE, r"c_attn.lora_A.weight has shape \(2, 16\), but \(3, 16\) is asked for"),
        ({}, {"transformer.wte.lora_embedding_A": (2, 101)}, "wte.lora_embedding_A has no place in a gpt2 with LORA"),
    ],
)
def test_what_is_not_ours_is_refused_by_name(tmp_path: pathlib.Path, values: Any, tensors: Any, message: str) -> None:
    model = from_dict({"model": {"num_layers": 2, "model_dim": 16, "num_heads": 4}, "train": {"duration_steps": 1}}).model
    with pytest.raises(UserError, match=message):
        ours.read(folder_of(tmp_path, values, tensors), "gpt2", model, {})


def test_a_folder_without_an_adapter_says_so(tmp_path: pathlib.Path) -> None:
    with pytest.raises(UserError, match="is not a PEFT folder: it has no adapter_config.json"):
        ours.read(tmp_path, "gpt2", from_dict({"train": {"duration_steps": 1}}).model, {})
