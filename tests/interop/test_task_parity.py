"""Heads of transformers' classes for tasks: the same logits from their folders, and the same losses while both are trained."""

from __future__ import annotations

import functools
import json
import warnings
from typing import Any

import numpy as np
import pytest

from gptjax import config as config_lib
from gptjax import recipes
from gptjax.data.pipeline import train_batches
from gptjax.parallel.mesh import make_mesh
from gptjax.tasks.load import load_tasks
from gptjax.train.optimizers import Lengths
from gptjax.train.restore import initial_params
from gptjax.train.step import init_state, make_train_step
from gptjax.train.task_evaluation import make_output_step

pytestmark = pytest.mark.parity

T, LABELS = 24, 3
KINDS = {
    "classification": "GPT2ForSequenceClassification",
    "tagging": "GPT2ForTokenClassification",
    "answers": "GPT2ForQuestionAnswering",
}
TAGS = ["O", "B-A", "I-A"]


@functools.cache
def theirs(kind: str) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torch
        import transformers
    config = transformers.GPT2Config(
        vocab_size=257, n_positions=T, n_embd=16, n_layer=2, n_head=2, num_labels=2 if kind == "answers" else LABELS,
        resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, classifier_dropout=0.0,
        pad_token_id=256, bos_token_id=256, eos_token_id=256,
    )  # fmt: skip
    if kind == "tagging":  # not in the order of ours, so that a head read by place would be wrong
        config.id2label = dict(enumerate(["I-A", "O", "B-A"]))
    torch.manual_seed(0)
    model = getattr(transformers, KINDS[kind])(config)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    return model.eval()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("theirs")
    for kind in KINDS:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            theirs(kind).save_pretrained(root / kind)
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(24):
        words = ["".join(rng.choice(list("abc"), rng.integers(1, 4))) for _ in range(rng.integers(2, 5))]
        context = " ".join(words)
        answer = words[int(rng.integers(len(words)))]
        rows.append({
            "text": context, "label": str(rng.integers(LABELS)), "words": words,
            "tags": ["B-A" if word == "a" or number == 0 else "O" for number, word in enumerate(words)],
            "question": "a", "context": context, "answers": [{"text": answer, "answer_start": context.index(answer)}],
        })  # fmt: skip
    rows[0]["tags"][:2] = ["B-A", "I-A"]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for split in ("train", "eval"):
        (root / f"{split}.jsonl").write_text(lines, encoding="utf-8")
    return root


def ours(kind: str, folder: Any, **changes: Any) -> config_lib.Config:
    values = config_lib.defaults()
    settings = {
        "init_from": folder / kind,
        "init_model": True,
        "task.kind": kind,
        "task.path": folder / "train.jsonl",
        "task.eval_path": folder / "eval.jsonl",
        "task.format": "jsonl",
        "data.seq_len": T,
        "data.batch_size": 4,
        "data.packing": "padded",
        "data.add_eos": "false",  # their class reads a text at the last token that is none of padding, by its id
        "optimizer.learning_rate": 1e-3,
        "optimizer.warmup_steps": 0,
        "optimizer.weight_decay": 0.0,
        "optimizer.clip_norm": 0.0,
        "optimizer.schedule": "constant",
        "train.duration_steps": 20,
    } | {key.replace("__", "."): value for key, value in changes.items()}
    recipes.apply_override(values, f"init_from={settings['init_from']}")
    recipes.adopt_model(values)
    recipes.apply_override(values, "data.tokenizer=byte")
    for key, value in settings.items():
        recipes.apply_override(values, f"{key}={value}")
    return config_lib.from_dict(values)


def prepared(kind: str, folder: Any, **changes: Any):
    config = ours(kind, folder, **changes)
    said: list[str] = []
    dataset = load_tasks(config, said.append)
    config = dataset.settled(config)
    mesh = make_mesh(config.mesh)
    params = initial_params(config, mesh, said.append)
    assert "the head of task is the one that was trained there." in said
    batches = [batch for _, batch in zip(range(20), train_batches(config, dataset.train, 0, np.arange(4), 0), strict=False)]
    return config, mesh, params, batches


def their_outputs(kind: str, model: Any, batch: dict[str, np.ndarray]) -> tuple[Any, Any]:
    """(logits [B, T, K] in our order of labels, loss) of their own classes' formulas."""
    import torch
    from torch.nn.functional import cross_entropy

    tokens, segments = (torch.tensor(batch[name][:, :-1].astype(np.int64)) for name in ("tokens", "segment_ids"))
    hidden = model.transformer(tokens, attention_mask=(segments > 0).long())[0]
    if kind == "classification":
        logits = model.score(hidden)
        labels = torch.tensor(batch["task/label"][:, :-1].astype(np.int64))
        return logits, cross_entropy(logits[labels > 0], labels[labels > 0] - 1)
    if kind == "tagging":
        logits = model.classifier(hidden)[..., [1, 2, 0]]  # O, B-A, I-A
        labels = torch.tensor(batch["task/tag"][:, :-1].astype(np.int64))
        return logits, cross_entropy(logits[labels > 0], labels[labels > 0] - 1)
    logits = model.qa_outputs(hidden)
    masked = logits.masked_fill((segments == 0)[..., None], -torch.inf)
    places = [torch.tensor(batch[f"task/{name}"][:, :-1].argmax(1)) for name in ("start", "end")]
    return logits, sum(cross_entropy(masked[..., k], places[k]) for k in range(2)) / 2


@pytest.mark.parametrize("kind", KINDS)
def test_the_logits_of_a_head_are_theirs(kind, folder):
    import torch

    config, mesh, params, batches = prepared(kind, folder)
    outputs = np.asarray(make_output_step(config, mesh)(params, batches[0])["task"])
    with torch.no_grad():
        logits, _ = their_outputs(kind, theirs(kind), batches[0])
        real = batches[0]["segment_ids"][:, :-1] > 0
        np.testing.assert_allclose(outputs[real][:, : logits.shape[-1]], logits.numpy()[real], atol=1e-4)
        if kind == "classification":  # what the class itself says of a text, read at its last token
            for row, length in enumerate(real.sum(1)):
                said = theirs(kind)(torch.tensor(batches[0]["tokens"][row : row + 1, :length].astype(np.int64))).logits
                np.testing.assert_allclose(outputs[row, length - 1], said[0].numpy(), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_head_of_a_model_whose_table_is_not_tied(kind, folder, tmp_path):
    """Llama's classes for tasks have no table to write with, and its questions' class another prefix."""
    import shutil

    import torch
    import transformers

    labels = {0: "I-A", 1: "O", 2: "B-A"} if kind == "tagging" else dict(enumerate(["LABEL_0", "LABEL_1", "LABEL_2"]))
    config = transformers.LlamaConfig(
        vocab_size=257, max_position_embeddings=T, hidden_size=16, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=24, id2label=dict(list(labels.items())[: 2 if kind == "answers" else LABELS]),
        pad_token_id=256, bos_token_id=256, eos_token_id=256, tie_word_embeddings=False,
    )  # fmt: skip
    torch.manual_seed(1)
    model = getattr(transformers, KINDS[kind].replace("GPT2", "Llama"))(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape))
    model.save_pretrained(tmp_path / kind)
    for split in ("train", "eval"):
        shutil.copy(folder / f"{split}.jsonl", tmp_path)
    config, mesh, params, batches = prepared(kind, tmp_path)
    assert config.model.tied_embeddings and "head" not in params
    outputs = np.asarray(make_output_step(config, mesh)(params, batches[0])["task"])
    tokens, real = batches[0]["tokens"][:, :-1], batches[0]["segment_ids"][:, :-1] > 0
    with torch.no_grad():
        hidden = model.base_model(torch.tensor(tokens.astype(np.int64)), attention_mask=torch.tensor(real).long())[0]
        logits = (model.qa_outputs if kind == "answers" else model.score)(hidden).numpy()
    logits = logits[..., [1, 2, 0]] if kind == "tagging" else logits
    np.testing.assert_allclose(outputs[real][:, : logits.shape[-1]], logits[real], atol=1e-4)


@pytest.mark.parametrize(("kind", "freeze"), [*((kind, "") for kind in KINDS), ("classification", "^(?!task_heads)")])
def test_twenty_steps_of_fine_tuning_cost_the_same(kind, freeze, folder):
    import copy

    import torch

    config, mesh, params, batches = prepared(kind, folder, **({"optimizer__freeze": freeze} if freeze else {}))
    lengths = Lengths.of(config, 1.0)
    state, step = init_state(config, lengths, mesh, params), make_train_step(config, lengths, mesh)
    model = copy.deepcopy(theirs(kind))
    trained = [p for name, p in model.named_parameters() if not freeze or not name.startswith("transformer.")]
    o = config.optimizer
    adamw = torch.optim.AdamW(trained, lr=o.learning_rate, betas=(o.beta1, o.beta2), eps=o.epsilon, weight_decay=0.0)
    losses: list[tuple[float, float]] = []
    for batch in batches:
        state, metrics = step(state, batch)
        adamw.zero_grad()
        _, loss = their_outputs(kind, model, batch)
        loss.backward()
        adamw.step()
        losses.append((float(metrics["loss"]), float(loss.detach())))
    found, wanted = np.asarray(losses).T
    np.testing.assert_allclose(found, wanted, atol=1e-3, rtol=0)
    assert np.abs(np.diff(wanted)).max() > 1e-2  # it moves
    if freeze:
        kept = np.asarray(state.params["layers"]["mlp"]["up"]["kernel"])
        np.testing.assert_array_equal(
            kept, np.asarray(initial_params(config, mesh, lambda line: None)["layers"]["mlp"]["up"]["kernel"])
        )
