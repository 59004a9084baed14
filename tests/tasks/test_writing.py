"""What a model writes inside a run: by the prompts of the records, as `generate` writes, measured by the field's packages."""

from __future__ import annotations

import dataclasses
import json
import math
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from gptjax.config import AdapterConfig, UserError
from gptjax.generate.settings import GenerationConfig
from gptjax.generate.text import generate_text
from gptjax.measures.bootstrap import Bootstrap
from gptjax.parallel.mesh import make_mesh
from gptjax.tasks.base import Judged
from gptjax.tasks.load import load_tasks
from gptjax.tasks.report import reports
from gptjax.tasks.table import TASKS
from gptjax.tasks.writing import Written, figures
from gptjax.train.task_evaluation import evaluate_tasks
from gptjax.train.task_writing import settings_of
from tests.small import random_params
from tests.tasks.text_cases import alone

KNOBS = {
    "task__generate_records": 3,
    "task__max_new_tokens": 5,
    "task__completion": "{completion}",
    "model__max_seq_len": 64,
    "data__seq_len": 64,
}


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """(config, data, parameters, (figures, judged)) of records of which two share a prompt."""
    folder = tmp_path_factory.mktemp("writing")
    pairs = [("ab:", "x"), ("longer than a bucket of sixteen:", "y y"), ("ab:", "z"), ("c:", ["u v", "w"]), ("d:", "never asked")]
    lines = [json.dumps({"prompt": prompt, "completion": completion}) for prompt, completion in pairs]
    (folder / "records.jsonl").write_text("\n".join(lines) + "\n")
    knobs = KNOBS | {"task__eval_path": str(folder / "records.jsonl"), "task__measures": ("distinct",)}
    config = alone("completion", folder, evaluate__batch_size=2, **knobs)
    data = load_tasks(config, lambda line: None)
    params = random_params(config)
    return config, data, params, evaluate_tasks(config, params, data, make_mesh(config.mesh), 1)


def test_the_first_prompts_are_answered_as_generate_answers_them(written):
    config, data, params, (figures, judged) = written
    assert figures["written"] == 3
    settings = GenerationConfig(max_new_tokens=5, temperature=0)
    for one in judged["task"]:
        if one.record["prompt"] == "d:":
            assert one.predicted is None
            continue
        answer = generate_text(params, config, data.tokenizer, [one.record["prompt"]], settings)[0]
        assert one.predicted == answer.text
        shown = TASKS["completion"].show(config.task, one).splitlines()
        assert shown[0] == one.record["prompt"] and shown[1] == f"-> {answer.text}".splitlines()[0]
    assert len({one.predicted for one in judged["task"]}) > 2  # not all the same, as from parameters of 0


def test_adapters_have_a_part_in_what_is_written(written):
    from gptjax.adapters.merge import merged
    from gptjax.train.step import init_params
    from gptjax.train.task_writing import answer

    config, data, _, _ = written
    adapted = dataclasses.replace(config, adapter=AdapterConfig(method="lora", alpha=400.0))
    params = nn.unbox(init_params(adapted, jnp.uint32(0)))
    params["adapters"] = jax.tree.map(lambda leaf: leaf + 0.1, params["adapters"])
    base = {name: part for name, part in params.items() if name != "adapters"}
    records = data.records["eval"]
    found = answer(adapted, params, data.tokenizer, records)
    assert found == answer(*merged(adapted, params), data.tokenizer, records)
    assert found != answer(config, base, data.tokenizer, records)


def test_records_of_one_prompt_share_their_references(written):
    from gptjax.train.task_writing import answer

    config, data, params, _ = written
    (own,) = answer(config, params, data.tokenizer, data.records["eval"]).values()
    assert [one.references for one in own.values()] == [("x", "z"), ("y y",), ("u v", "w")]
    assert [one.prompt for one in own.values()] == ["ab:", "longer than a bucket of sixteen:", "c:"]


def test_the_perplexity_is_that_of_all_right_texts(written):
    config, _, _, (figures, judged) = written
    known = [one for one in judged["task"] if one.weight]
    nats, tokens = sum(one.nats for one in known), sum(one.weight for one in known)
    assert figures["perplexity"] == pytest.approx(math.exp(nats / tokens)) and figures["loss"] == pytest.approx(nats / tokens)
    many = next(one for one in known if one.record["prompt"] == "c:")
    assert many.gold == ["u v", "w"] and many.weight == len("u v") + len("w") + 2  # each with its end of text


def test_answers_are_measured_against_all_their_references():
    pytest.importorskip("sacrebleu", reason="extra: evaluate")
    import sacrebleu

    texts = ["the cat sat on the mat", "a dog barks"]
    references = [("a cat sat on a mat", "the cat sat on the mat today"), ("a dog barked",)]
    done = [Written("", refs, f" {text} ", ended) for text, refs, ended in zip(texts, references, (True, False), strict=True)]
    config = alone("completion", pathlib.Path("nowhere"), **KNOBS)
    knobs = dataclasses.replace(config.task, measures=("bleu", "chrf", "em_f1", "distinct"))
    found = figures(knobs, done)
    streams = [[references[0][0], references[1][0]], [references[0][1], None]]
    assert found["bleu"] == pytest.approx(sacrebleu.corpus_bleu(texts, streams).score)
    assert found["chrf2"] == pytest.approx(sacrebleu.corpus_chrf(texts, streams).score)
    assert found["ended"] == 0.5 and found["written"] == 2 and found["exact_match"] == 50.0  # articles do not count
    assert found["f1"] == pytest.approx(100 * (1 + 1 / 2) / 2)
    assert found["distinct_1"] == 8 / 9 and found["distinct_2"] == 1.0


def test_the_report_has_intervals_and_baselines_of_what_is_written(written):
    """The nearest prompt's text and token frequencies of training texts, on the very records that the model answered."""
    pytest.importorskip("sklearn", reason="extra: evaluate")
    config, data, _, (_, judged) = written
    records = {"train": data.records["eval"], "eval": data.records["eval"]}  # so that the nearest prompt is the prompt itself
    report = reports(config, dataclasses.replace(data, records=records), judged, Bootstrap(50))["task"]
    assert [one.name for one in report.measured][:2] == ["perplexity", "distinct-1"]
    assert all(one.low <= one.value <= one.high for one in report.measured[:1])
    asked = [one.written for one in judged["task"] if one.written is not None]
    assert len(asked) == 3  # the second record of a prompt brings no second answer
    said = {name: one.written.text for name, one in zip("abc", _of(config, records, judged, "nearest_neighbour"), strict=True)}
    assert said == {"a": "x", "b": "y y", "c": "u v"}

    texts = [[ord(letter) for letter in text] for text in ("x", "y y", "z", "u v", "w", "never asked")]
    end = data.tokenizer.eos_id
    tokens = [token for text in texts for token in [*data.tokenizer.encode("".join(map(chr, text))), end]]
    counts = {token: tokens.count(token) for token in tokens}
    share = {token: (count + 1) / (len(tokens) + config.model.vocab_size) for token, count in counts.items()}
    expected = math.exp(-sum(math.log(share[token]) for token in tokens) / len(tokens))
    assert report.baselines["unigram"][0].value == pytest.approx(expected)
    assert [one.name for one in report.ahead["unigram"]] == ["model less baseline: perplexity"]


def _of(config, records, judged, name):
    task = TASKS["completion"]
    train = [record.values for record in records["train"]["task"]]
    return task.baselines(config.task, train, judged["task"])[name]


def test_a_summary_has_its_lead_beside_it():
    config = alone("completion", pathlib.Path("nowhere"), **KNOBS)
    text = "One is here. Two is there. Three was. Four comes. Five ends."
    record = {"prompt": text, "completion": "One."}
    judged = Judged(record, ["One."], "said", 1.0, 1.0, written=Written(text, ("One.",), "said", True))
    leads = TASKS["completion"].baselines(config.task, [record], [judged])["lead_3"]
    assert [one.written.text for one in leads] == ["One is here. Two is there. Three was."]
    short = dataclasses.replace(judged, record={"prompt": "One is here.", "completion": "One."})
    assert "lead_3" not in TASKS["completion"].baselines(config.task, [record], [short])


def test_beams_and_stop_strings_reach_the_generation(tmp_path):
    config = alone("completion", tmp_path, **KNOBS, task__num_beams=3)
    assert (settings_of(config.task).num_beams, settings_of(config.task).do_sample) == (3, False)
    config = alone("completion", tmp_path, **KNOBS, task__stop_strings=("\n",), task__temperature=0.5)
    settings = settings_of(config.task)
    assert (settings.stop_strings, settings.temperature, settings.max_new_tokens) == (("\n",), 0.5, 5)


def test_a_long_prompt_keeps_its_end_and_leaves_room(written):
    config, data, _, _ = written
    from gptjax.tasks.load import encoder

    record = {"prompt": "".join(map(chr, range(33, 33 + 90))), "completion": "x"}
    ids = TASKS["completion"].request(config.task, record, encoder(config, data.tokenizer)).ids
    np.testing.assert_array_equal(ids, [256, *range(33 + 90 - 58, 33 + 90)])


@pytest.mark.parametrize(
    ("knobs", "fault"),
    [
        ({"task__max_new_tokens": 64}, "task.max_new_tokens=64 leaves no room for a prompt in data.seq_len=64"),
        ({"task__generate_records": 0, "task__measures": ("bleu",)}, "task.measures=bleu needs task.generate_records"),
        ({"task__measures": ("blue",)}, "task.measures='blue' must be one of .*; did you mean bleu"),
    ],
)
def test_a_mistake_in_the_knobs_is_told_in_a_sentence(tmp_path, knobs, fault):
    with pytest.raises(UserError, match=fault):
        alone("completion", tmp_path, **KNOBS | knobs)
    with pytest.raises(UserError, match="task.generate_records=1: preference writes nothing"):
        alone("preference", tmp_path, task__generate_records=1)
