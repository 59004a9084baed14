"""The harness with this package's model and with its own `hf` model, on the same weights and items."""

from __future__ import annotations

import copy
import dataclasses
import json
import pathlib
import socket
import zipfile
from typing import Any

import numpy as np
import pytest

import gptjax
from gptjax import cli
from gptjax.config import UserError
from gptjax.harness.likelihood import Likelihood
from gptjax.harness.suites import SUITES

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
        place = f"dataset_path: json\ndataset_kwargs:\n  data_files:\n    test: {folder}/items.jsonl\n"
        head = f"task: {name}\n{place}test_split: test\n"
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


def test_both_paths_through_blimp_are_identical(
    no_network: None, tmp_path: pathlib.Path, tmp_path_factory: pytest.TempPathFactory, shared_data: pathlib.Path
):
    """The suite, and the harness by its own task files for BLiMP with the data set's place changed: 20 pairs of each paradigm."""
    from lm_eval import tasks as theirs_tasks

    from gptjax.harness.lm_eval_model import GptjaxLM
    from tests.harness.tiny_gpt2 import write_folder

    model = gptjax.load(write_folder(tmp_path_factory.mktemp("model"), 160), log=lambda text: None)
    template = (pathlib.Path(theirs_tasks.__file__).parent / "blimp" / "_template_yaml").read_text()
    template = template.replace("dataset_path: nyu-mll/blimp", "dataset_path: json")
    names = []
    with zipfile.ZipFile(shared_data / "blimp_quarter" / "blimp_17of67.zip") as archive:
        for name in archive.namelist():
            file = tmp_path / name
            file.write_bytes(b"".join(archive.read(name).splitlines(keepends=True)[:20]))
            names.append(f"blimp_{file.stem}")
            place = f"dataset_kwargs:\n  data_files:\n    train: {file}\n"
            (tmp_path / f"{file.stem}.yaml").write_text(f"task: {names[-1]}\n{place}{template}")
    harness = results_of(GptjaxLM(model, batch_size=32), tmp_path, names, 0)["results"]
    suite = SUITES["blimp"].measure(Likelihood(model, batch_size=48), tmp_path, 0)
    ours = {score.group.replace("paradigm ", "blimp_"): score.value for score in suite if score.group.startswith("paradigm ")}
    assert ours == {name: harness[name]["acc,none"] for name in names} and len(ours) == 17
    assert len(set(ours.values())) > 5
    overall = next(score for score in suite if (score.group, score.metric) == ("all", "accuracy"))
    assert overall.value == pytest.approx(np.mean(list(ours.values()))) and overall.n == 340


def test_the_verb_prints_the_harness_table_or_one_object(no_network: None, folder: pathlib.Path, expected: Any, capsys: Any):
    asked = ["evaluate", str(folder / "model"), "--tasks=choices,last_word", f"--include_path={folder}"]
    assert cli.main([*asked, "--num-fewshot=1", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    for name in ("choices", "last_word"):
        assert found["results"][name]["acc,none"] == expected["results"][name]["acc,none"]
    assert found["results"]["choices"]["acc_stderr,none"] > 0
    assert found["n-shot"] == {"choices": 1, "last_word": 1} and found["n-samples"]["choices"]["effective"] == 12
    assert cli.main([*asked, "--num_fewshot=1", "--limit=2"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("|  Tasks  |") and "|last_word|" in out.replace(" ", "")


def test_an_unknown_task_is_named(folder: pathlib.Path, capsys: Any, monkeypatch: pytest.MonkeyPatch):
    from lm_eval import tasks as theirs_tasks

    class OwnOnly(theirs_tasks.TaskManager):
        """Their thousands of files take half a minute to read."""

        def __init__(self, **options: Any) -> None:
            super().__init__(**options | {"include_defaults": False})

    monkeypatch.setattr(theirs_tasks, "TaskManager", OwnOnly)
    assert cli.main(["evaluate", str(folder / "model"), "--tasks=choises", f"--include_path={folder}"]) == 2
    assert "--tasks: choises is neither in " in (said := capsys.readouterr().err) and "did you mean choices?" in said


def test_settings_of_a_task_that_draws(model: Any):
    from gptjax.harness.lm_eval_model import GptjaxLM

    settings = GptjaxLM(model)._settings
    drawn = settings({"until": "x", "max_gen_toks": 5, "temperature": 0.7, "do_sample": True, "top_p": 0.9})
    assert (drawn.max_new_tokens, drawn.temperature, drawn.do_sample, drawn.top_p) == (5, 0.7, True, 0.9)
    assert drawn.stop_strings == ("x", "<|endoftext|>")
    assert not settings({"max_gen_toks": 5, "temperature": 0.7, "do_sample": False}).do_sample
    with pytest.raises(UserError, match=r"generation_kwargs\.colour of a task is not a setting"):
        settings({"max_gen_toks": 5, "colour": 1})
    with pytest.raises(UserError, match=r"max_gen_toks=256, .* must be below model\.max_seq_len=96"):
        settings({})


def test_chat_templates_are_the_tokenizers(model: Any):
    from gptjax.harness.lm_eval_model import GptjaxLM

    source = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    tokenizer = copy.copy(model.tokenizer)
    tokenizer.chat_templates = lambda: {"default": source}
    lm = GptjaxLM(dataclasses.replace(model, tokenizer=tokenizer))
    talk = [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "so "}]
    assert lm.chat_template(False) is None and lm.chat_template(True) == source
    assert lm.apply_chat_template(talk[:1]) == "<user>hi\n<assistant>"
    assert lm.apply_chat_template(talk, add_generation_prompt=False) == "<user>hi\n<assistant>so"
    assert lm.tokenizer_name != GptjaxLM(model).tokenizer_name
