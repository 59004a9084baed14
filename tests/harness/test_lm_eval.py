"""The harness with this package's model and with its own `hf` model, on the same weights and items."""

from __future__ import annotations

import json
import math
import pathlib
import socket
from typing import Any

import numpy as np
import pytest

import gptjax
from gptjax import cli
from gptjax.config import UserError

pytestmark = [
    pytest.mark.parity,
    pytest.mark.filterwarnings("ignore"),  # those of lm_eval, datasets and transformers, at import and at work
]
pytest.importorskip("lm_eval")

NOUNS = ("dog", "cat", "sun", "rain", "train", "winter", "king", "theatre")
TASKS = {
    "choices": "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: '{{choices}}'\ndoc_to_target: label\n"
    "metric_list:\n  - metric: acc\n  - metric: acc_norm\n",
    "last_word": "output_type: loglikelihood\ndoc_to_text: '{{question}} '\ndoc_to_target: '{{answer}}'\n"
    "metric_list:\n  - metric: perplexity\n  - metric: acc\n",
    "whole": "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
    "metric_list:\n  - metric: word_perplexity\n  - metric: bits_per_byte\n",
    "written": "output_type: generate_until\ndoc_to_text: '{{question}}'\ndoc_to_target: '{{answer}}'\n"
    "generation_kwargs:\n  until: ['\\n', 'e', ' th']\n  max_gen_toks: 12\n  do_sample: false\n"
    "metric_list:\n  - metric: exact_match\n",
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Task files and their items, and the model."""
    from tests.harness.tiny_gpt2 import write_folder

    folder = tmp_path_factory.mktemp("harness")
    rng = np.random.default_rng(0)
    items = []
    for number in range(12):
        words = [str(word) for word in rng.choice(NOUNS, 3 + number % 5)]
        choices = [f"the {rng.choice(NOUNS)} of {rng.choice(NOUNS)}" for _ in range(3)]
        question = "In the " + " and the ".join(words) + (" is over the horizon" * (number == 7)) + ":"
        text = " ".join(str(word) for word in rng.choice(NOUNS, 4 + 4 * number))  # the longest needs several windows
        item = {"question": question, "choices": choices, "label": int(rng.integers(3)), "answer": words[0], "text": text}
        items.append(item)
    (folder / "items.jsonl").write_text("".join(json.dumps(item) + "\n" for item in items))
    for name, body in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder}/items.jsonl\ntest_split: test\n"
        (folder / f"{name}.yaml").write_text(head + "fewshot_split: test\n" + body)
    (folder / "model").mkdir()
    write_folder(folder / "model")
    return folder


@pytest.fixture(scope="module")
def no_network(tmp_path_factory: pytest.TempPathFactory):
    """Anything that would reach out fails; what `datasets` prepares goes into a folder of its own."""
    with pytest.MonkeyPatch.context() as patch:

        def refuse(*arguments: Any) -> None:
            raise AssertionError(f"the network was touched: {arguments[1:]}")

        import datasets

        patch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path_factory.mktemp("datasets"))
        patch.setattr(socket.socket, "connect", refuse)
        yield


@pytest.fixture(scope="module")
def model(folder: pathlib.Path) -> Any:
    return gptjax.load(folder / "model", log=lambda text: None)


@pytest.fixture(scope="module")
def theirs(folder: pathlib.Path) -> Any:
    from lm_eval.models.huggingface import HFLM

    return HFLM(pretrained=str(folder / "model"), device="cpu", batch_size=4, dtype="float32")


def results_of(lm: Any, folder: pathlib.Path, tasks: list[str], num_fewshot: int) -> Any:
    from lm_eval import evaluator
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(folder), include_defaults=False)
    return evaluator.simple_evaluate(lm, tasks=tasks, task_manager=manager, num_fewshot=num_fewshot, bootstrap_iters=0)


@pytest.fixture(scope="module")
def expected(no_network: None, folder: pathlib.Path, theirs: Any) -> Any:
    return results_of(theirs, folder, list(TASKS), 1)


def scores(found: Any) -> dict[str, float]:
    return {
        f"{task} {name}": value
        for task, own in found["results"].items()
        for name, value in own.items()
        if isinstance(value, float) and "stderr" not in name
    }


def answers(found: Any, task: str) -> list[Any]:
    """(what was asked, what came back) of each item, in order."""
    samples = sorted(found["samples"][task], key=lambda sample: sample["doc_id"])
    return [(asked, answer[0]) for sample in samples for asked, answer in zip(sample["arguments"], sample["resps"], strict=True)]


@pytest.mark.parametrize("batch_size", [1, 3, 8])
def test_every_score_is_that_of_the_harness_own_model(
    no_network: None, folder: pathlib.Path, model: Any, expected: Any, batch_size: int
):
    from gptjax.harness.lm_eval_model import GptjaxLM

    found = results_of(GptjaxLM(model, batch_size=batch_size), folder, list(TASKS), 1)
    wanted = scores(expected)
    assert len(wanted) == 7 and scores(found) == pytest.approx(wanted, rel=1e-5)
    assert {name: value for name, value in scores(found).items() if "acc" in name} == {
        name: value for name, value in wanted.items() if "acc" in name
    }
    for task in TASKS:
        for (asked, ours), (asked_too, other) in zip(answers(found, task), answers(expected, task), strict=True):
            assert asked == asked_too
            if task == "written":
                assert ours == other
            elif task == "whole":
                assert ours == pytest.approx(other, abs=5e-4)  # sums over hundreds of tokens
            else:
                assert ours == (pytest.approx(other[0], abs=1e-4), other[1])
    assert len({text for _, text in answers(found, "written")}) > 3
