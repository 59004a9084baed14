"""Heads of tasks against transformers' and PEFT's own classes: the same logits in both directions through `gptjax convert`."""

from __future__ import annotations

import json
import pathlib
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from gptjax import cli
from gptjax.adapters.compose import hidden_of_texts
from gptjax.config import Config
from gptjax.interop import safetensors
from gptjax.tasks.heads import affine
from gptjax.train.restore import load_run
from tests.interop.test_task_heads import with_tokenizer

pytestmark = pytest.mark.parity

TOKENS = np.random.default_rng(0).integers(0, 257, (2, 12)).astype(np.int64)
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 32, "bos_token_id": 256, "eos_token_id": 256},
    "llama": {
        "num_hidden_layers": 2, "hidden_size": 16, "num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24,
        "max_position_embeddings": 32, "bos_token_id": 256, "eos_token_id": 256, "tie_word_embeddings": False,
    },
    "gpt_neox": {
        "num_hidden_layers": 1, "hidden_size": 16, "num_attention_heads": 2, "intermediate_size": 24, "rotary_pct": 0.5,
        "max_position_embeddings": 32, "bos_token_id": 256, "eos_token_id": 256,
    },
}  # fmt: skip
for relative in ("mistral", "qwen2", "qwen3"):
    SIZES[relative] = SIZES["llama"] | ({"head_dim": 4} if relative == "qwen3" else {})
AUTO = {
    "classification": "AutoModelForSequenceClassification",
    "regression": "AutoModelForSequenceClassification",
    "tagging": "AutoModelForTokenClassification",
    "answers": "AutoModelForQuestionAnswering",
}
LABELS = {
    "classification": ("dog", "cat", "sun"),
    "regression": ("label",),
    "tagging": ("O", "B-A", "I-A"),
    "answers": ("0", "1"),
}


def theirs(kind: str, task: str) -> Any:
    """A model of their class, every number random, and the same at every call."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        import transformers
    named = {"id2label": dict(enumerate(LABELS[task]))} if task != "answers" else {}
    config = transformers.AutoConfig.for_model(kind, **({"vocab_size": 257, "pad_token_id": None} | SIZES[kind] | named))
    torch.manual_seed(0)
    model = getattr(transformers, AUTO[task]).from_config(config, attn_implementation="eager")
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


def their_logits(model: Any) -> np.ndarray:
    """[B, T or 1, K], row by row, since none has a padding token; without what PEFT gives of a prompt."""
    import torch

    found = []
    for row in torch.from_numpy(TOKENS):
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("ignore")
            said = model(input_ids=row[None])
        if "start_logits" in said:
            found.append(np.stack([said.start_logits.numpy(), said.end_logits.numpy()], axis=-1))
        else:
            found.append(np.atleast_3d(said.logits.numpy()) if said.logits.ndim == 3 else said.logits.numpy()[:, None])
    whole = np.concatenate(found)
    return whole[:, -TOKENS.shape[1] :]


def our_logits(run: pathlib.Path, single: bool) -> np.ndarray:
    """[B, T, K], or [B, 1, K] at the last token."""
    model = load_run(run, lambda line: None)
    config: Config = model.config

    @jax.jit
    def of(params: Any) -> jax.Array:
        return affine(params["task_heads"]["task"], hidden_of_texts(config, params, jnp.asarray(TOKENS, jnp.int32)))

    found = np.asarray(of(model.params))
    return found[:, -1:] if single else found


def converted(base: pathlib.Path, run: pathlib.Path, task: str, *more: str) -> None:
    words = [f"--config.task.kind={task}", f"--config.task.path={base}/train.jsonl", *more]
    assert cli.main(["convert", f"--from={base}", f"--output={run}", *words]) == 0


CASES = [(kind, task) for kind in ("gpt2", "llama") for task in AUTO]
CASES += [("gpt_neox", "tagging"), ("mistral", "answers"), ("qwen2", "answers"), ("qwen3", "tagging"), ("qwen3", "answers")]


@pytest.mark.parametrize(("kind", "task"), CASES)
def test_a_class_of_transformers_says_the_same_here_and_back_there(kind: str, task: str, tmp_path: pathlib.Path) -> None:
    import transformers

    model, base, run, out = theirs(kind, task), tmp_path / "base", tmp_path / "run", tmp_path / "out"
    model.save_pretrained(base)
    with_tokenizer(base)
    expected = their_logits(model)
    verify = ["--verify"] if task != "regression" else []
    converted(base, run, task, *verify)
    np.testing.assert_allclose(our_logits(run, expected.shape[1] == 1), expected, rtol=0, atol=1e-4)

    words = ["convert", f"--workdir={run}", "--to=huggingface", f"--output={out}", *verify]
    assert cli.main(words) == 0
    if verify:
        found = [json.loads((folder / "verify.json").read_text()) for folder in (run, out)]
        assert all(0 < one["largest_error"] < 1e-5 < 0.1 < one["largest_logit"] for one in found)
    back, info = getattr(transformers, AUTO[task]).from_pretrained(out, attn_implementation="eager", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and type(back) is type(model)
    np.testing.assert_array_equal(their_logits(back.eval()), expected)
    if task != "answers":
        assert tuple(back.config.id2label.values()) == LABELS[task]
    assert back.config.pad_token_id is None
    if (kind, task) == ("gpt2", "answers"):
        their_ids = transformers.AutoTokenizer.from_pretrained(out)("cat Zürich")["input_ids"]
        assert their_ids == load_run(run, lambda line: None).tokenizer.encode("cat Zürich").tolist()


ADAPTERS: dict[str, tuple[str, str, str, dict[str, Any]]] = {
    "gpt2, lora": ("gpt2", "classification", "LoraConfig", {"r": 3, "target_modules": ["c_attn", "mlp.c_proj"]}),
    "gpt2, ia3": ("gpt2", "answers", "IA3Config", {}),
    "gpt2, prompt": ("gpt2", "classification", "PromptTuningConfig", {"num_virtual_tokens": 5}),
    "gpt2, prefix": ("gpt2", "tagging", "PrefixTuningConfig", {"num_virtual_tokens": 5}),
    "llama, lora": ("llama", "classification", "LoraConfig", {"r": 3}),
    "llama, dora": ("llama", "tagging", "LoraConfig", {"r": 2, "use_dora": True, "target_modules": ["q_proj", "up_proj"]}),
    "llama, lora for questions": ("llama", "answers", "LoraConfig", {"r": 3}),
    "llama, prompt": ("llama", "answers", "PromptTuningConfig", {"num_virtual_tokens": 5}),
}
TYPES = {"classification": "SEQ_CLS", "tagging": "TOKEN_CLS", "answers": "QUESTION_ANS"}


@pytest.mark.parametrize("case", ADAPTERS)
def test_an_adapter_with_its_head_says_the_same_here_and_back_there(case: str, tmp_path: pathlib.Path) -> None:
    kind, task, name, values = ADAPTERS[case]
    model, base, adapter = theirs(kind, task), tmp_path / "base", tmp_path / "adapter"
    model.save_pretrained(base)
    with_tokenizer(base)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        peft = pytest.importorskip("peft")
        import torch
        import transformers

        adapted = peft.get_peft_model(model, getattr(peft, name)(task_type=TYPES[task], **values)).eval()
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in adapted.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
        adapted.save_pretrained(adapter)
    expected, run, out = their_logits(adapted), tmp_path / "run", tmp_path / "out"
    if case == "gpt2, lora":  # of a base without labels, as most are
        config = json.loads((base / "config.json").read_text())
        (base / "config.json").write_text(json.dumps({k: v for k, v in config.items() if "label" not in k}))
    labels = [f"--config.task.labels={','.join(LABELS[task])}"] if case == "gpt2, lora" else []
    converted(base, run, task, f"--adapter={adapter}", *labels)
    np.testing.assert_allclose(our_logits(run, expected.shape[1] == 1), expected, rtol=0, atol=1e-4)

    assert cli.main(["convert", f"--workdir={run}", "--to=peft", f"--output={out}"]) == 0
    one, other = (safetensors.read_header(folder / "adapter_model.safetensors") for folder in (adapter, out))
    assert {key: stored.shape for key, stored in one.items()} == {key: stored.shape for key, stored in other.items()}
    said = [json.loads((folder / "adapter_config.json").read_text()) for folder in (adapter, out)]
    assert said[0]["task_type"] == said[1]["task_type"]
    assert set(said[0]["modules_to_save"]) == set(said[1]["modules_to_save"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        again = peft.PeftModel.from_pretrained(theirs(kind, task), out).eval()
    np.testing.assert_allclose(their_logits(again), expected, rtol=0, atol=1e-5)
    if name == "LoraConfig":  # merged, it is a model of their class
        words = ["convert", f"--workdir={run}", "--to=huggingface", f"--output={tmp_path / 'merged'}"]
        assert cli.main(words) == 0
        whole = getattr(transformers, AUTO[task]).from_pretrained(tmp_path / "merged", attn_implementation="eager").eval()
        np.testing.assert_allclose(their_logits(whole), expected, rtol=0, atol=1e-4)
    assert np.abs(expected - their_logits(theirs(kind, task))[:, : expected.shape[1]]).max() > 1e-2  # the adapter counts
