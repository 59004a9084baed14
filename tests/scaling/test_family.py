"""A family's runs: counts, tokens, rates; and the verb from the plan to a prediction that is held to."""

from __future__ import annotations

import json
import math
import pathlib

import numpy as np
import pytest

from gptjax import cli
from gptjax.config import UserError, from_json, to_json
from gptjax.scaling import family as families
from gptjax.scaling import observations
from gptjax.scaling.family import Family, HeldOut, by_aspect, by_parameters, iso_flops, log_spaced, make_plan, mup, shape
from gptjax.scaling.observations import Counted
from gptjax.sweeps.folder import SweepFolder
from gptjax.train.counts import count_parameters
from gptjax.train.flops import flops_per_token
from tests.scaling.simulated import family as simulated
from tests.small import KINDS, NEOX, small

RECIPE = str(pathlib.Path(__file__).resolve().parents[2] / "configs/stdlib_tiny.py")
FAMILY = """
from gptjax.scaling.family import Family, HeldOut, iso_flops, mup, shape

def get_family(arg=""):
    return Family(
        recipe=%(recipe)r,
        shapes=[shape(16 * n, layers, 16) for n in (1, 2) for layers in (1, 2)],
        tokens=iso_flops([4e8, 8e8, 16e8]),
        held_out=HeldOut(shape(48, 2, 16), tokens=20000),
        rate=mup(32),
        warmup=0.1,
        overrides={"data.source": "text", "data.path": %(text)r, "data.packing": "windows", "data.split_by": "tail",
                   "data.seq_len": 32, "data.batch_size": 4, "model.max_seq_len": 32, "optimizer.name": "adamw"},
        min_steps=10,
    )
"""


@pytest.fixture
def family_file(tmp_path) -> str:
    text, path = tmp_path / "words.txt", tmp_path / "family.py"
    text.write_text("the quick brown fox jumps over the lazy dog. " * 900, encoding="utf-8")
    path.write_text(FAMILY % {"recipe": RECIPE, "text": str(text)})
    return str(path)


def counter(config) -> Counted:
    return Counted(
        12 * config.model.num_layers * config.model.model_dim**2 + 1000, 12 * config.model.num_layers * config.model.model_dim**2
    )


def planned(**changes):
    values = {"recipe": RECIPE, "shapes": [shape(32, 2, 16)], "tokens": iso_flops([1e11]), "overrides": {"data.seq_len": 64}}
    return make_plan(Family(**(values | changes)), (), 257, 10**7, counter)


def test_parameters_are_counted_as_by_hand():
    """GPT-2: 12 L D^2 and biases and norms by hand; an untied head counts as an embedding, as a tied one does."""
    config = small(KINDS["gpt2"])
    m = config.model
    block = 12 * m.model_dim**2 + (4 + 4 + 1) * m.model_dim + 4 * m.model_dim  # kernels, biases, two norms
    rest = m.num_layers * block + 2 * m.model_dim
    assert count_parameters(config) == (rest + (m.vocab_size + m.max_seq_len) * m.model_dim, rest)
    tied, untied = count_parameters(small(NEOX, model__tied_embeddings=True)), count_parameters(small(NEOX))
    assert untied[1] == tied[1] and untied[0] - tied[0] == m.vocab_size * m.model_dim


def test_a_budget_is_what_a_run_costs():
    plan = planned(shapes=[shape(32, 2, 16), shape(64, 3, 16)], tokens=iso_flops([1e11, 4e11]))
    assert len(plan.runs) == 4
    for run, budget in zip(plan.runs, [1e11, 4e11] * 2, strict=True):
        config = plan.trials((), held_out=False)[plan.runs.index(run)].config
        assert run.flops == pytest.approx(budget, rel=0.01) and run.tokens == run.steps * 8 * 64
        assert run.flops == flops_per_token(config.with_vocab_size(257).model, 64) * run.tokens
        assert config.train.duration_steps == run.steps and run.epochs == run.tokens / 10**7


def test_rules_of_rates_and_warm_up():
    rule = families.power_of_width({"optimizer.learning_rate": 4e-3}, 64, -0.5)
    (run,) = planned(rate=rule, warmup=0.1).runs
    assert run.rate == pytest.approx(4e-3 * math.sqrt(2)) and run.point["optimizer.warmup_steps"] == round(0.1 * run.steps)
    (run,) = planned(rate=families.kaplan_rate).runs
    assert run.rate == pytest.approx(0.003239 - 0.0001395 * math.log(12 * 2 * 32**2))
    plan = planned(rate=mup(16))
    model = plan.trials((), held_out=False)[0].config.model
    assert (model.parameterization, model.mup_base_dim, model.model_dim) == ("mup", 16, 32)
    assert planned().trials((), held_out=False)[0].config.optimizer.warmup_steps == 50  # the recipe's


def test_rules_of_tokens():
    counted = Counted(2000, 1000)
    assert families.per_parameter([5, 20])(1.0, counted) == [10000, 40000]
    assert families.per_parameter([5], "non_embedding")(1.0, counted) == [5000]
    assert families.same_tokens([7])(1.0, counted) == [7]


def test_shapes_come_near_their_targets():
    targets = log_spaced(2e4, 2e7, 7)
    shapes = by_parameters(targets, aspect=32, head_dim=16)
    for target, each in zip(targets, shapes, strict=True):
        width, layers = each["model.model_dim"], each["model.num_layers"]
        assert abs(math.log(12 * layers * width**2 / target)) < 0.35 and width == 16 * each["model.num_heads"]
        assert layers * 32 / width >= 1 / 1.5 and (layers == 1 or layers * 32 / width <= 1.5)
    assert [each["model.num_layers"] for each in by_aspect([16, 64, 128], 32, 16)] == [1, 2, 4]
    with pytest.raises(UserError, match="both come to width"):
        by_parameters([1e6, 1.01e6], aspect=32, head_dim=16)
    with pytest.raises(UserError, match="heads of 16 do not divide the width 40"):
        shape(40, 1, 16)


def test_text_seen_twice_short_runs_and_a_held_out_run_of_the_family_are_refused():
    with pytest.raises(UserError, match=r"19,999,744 tokens are 2.00 epochs of the 10,000,000"):
        planned(tokens=families.same_tokens([2e7]))
    assert planned(tokens=families.same_tokens([2e7]), max_epochs=3.0).runs[0].epochs == pytest.approx(2, rel=1e-3)
    plan = planned(tokens=families.same_tokens([5e3, 5e5]))
    assert len(plan.runs) == 1 and "10 steps are fewer than min_steps=50" in plan.left_out[0]
    with pytest.raises(UserError, match="is one of the family's own"):
        planned(tokens=families.same_tokens([5e5]), held_out=HeldOut(shape(32, 2, 16), 5e5))


# --- tables ---


def test_a_table_is_read_and_written_back(tmp_path):
    seen = simulated()
    observations.write_csv(tmp_path / "points.csv", seen)
    again = observations.read_csv(tmp_path / "points.csv")
    for name in ("parameters", "tokens", "flops", "loss"):
        np.testing.assert_array_equal(getattr(again, name), getattr(seen, name))
    assert again.names == seen.names and not again.knows_non_embedding
    (tmp_path / "other.csv").write_text("N,FLOP,L\n1e6,6e13,2.5\n")
    other = observations.read_csv(tmp_path / "other.csv", {"parameters": "N", "flops": "FLOP", "loss": "L"})
    assert other.tokens[0] == pytest.approx(1e7) and other.names == ("line 2",)


@pytest.mark.parametrize(
    ("text", "columns", "complaint"),
    [
        ("N,tokens,loss\n", {}, "has no column 'parameters'"),
        ("parameters,loss\n1,2\n", {}, "needs a column tokens or flops"),
        ("parameters,tokens,loss\n1,2,3\n1,2,x\n", {}, "line 3: loss is 'x'"),
        ("parameters,tokens,loss\n1,-2,3\n", {}, "line 2: tokens is '-2'"),
        ("parameters,tokens,loss\n", {}, "has a header and no rows"),
        ("parameters,tokens,loss\n1,2,3\n", {"los": "x"}, "there is no los; did you mean loss"),
    ],
)
def test_a_bad_table_is_named_with_its_line(tmp_path, text, columns, complaint):
    path = tmp_path / "table.csv"
    path.write_text(text)
    with pytest.raises(UserError, match=complaint):
        observations.read_csv(path, columns)


# --- the verb ---


def finish(folder: SweepFolder, name: str, loss: float, tokens: int) -> None:
    """What a run that is done leaves, as far as anybody reads it."""
    config = from_json(folder.trial(name) / "requested.json").with_vocab_size(257)
    (folder.trial(name) / "config.json").write_text(to_json(config))
    (folder.trial(name) / "result.json").write_text(json.dumps({"eval": {"loss": loss}, "tokens": tokens, "steps": 1}))


def law(parameters: float, tokens: float) -> float:
    return 1.2 + 30 / parameters**0.4 + 60 / tokens**0.45


def test_from_plan_to_prediction_and_what_became_of_it(tmp_path, family_file, capsys, monkeypatch):
    """Runs that never train: what they would have written is planted, and the rest is the real thing."""
    workdir = tmp_path / "runs"
    assert cli.main(["scaling", "plan", family_file, "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    assert len(plan["runs"]) == 12 and plan["held_out"]["parameters"] > max(run["parameters"] for run in plan["runs"])

    tokens = {json.dumps(run["overrides"]): run for run in [*plan["runs"], plan["held_out"]]}
    rng = np.random.default_rng(0)

    def pretend(self) -> int:
        while (trial := self._source.take()) is not None:
            run = tokens[json.dumps(trial.overrides)]
            if not (self._folder.trial(trial.name) / "result.json").exists():
                finish(
                    self._folder,
                    trial.name,
                    law(run["parameters"], run["tokens"]) * math.exp(rng.normal(0, 0.002)),
                    run["tokens"],
                )
        return 0

    monkeypatch.setattr("gptjax.sweeps.driver.Driver.run", pretend)
    command = ["scaling", "run", family_file, f"--workdir={workdir}"]
    assert cli.main([*command, "--held_out"]) == 2
    assert "is not predicted yet" in capsys.readouterr().err
    assert cli.main(command) == 0
    assert len(list(workdir.glob("trials/*/result.json"))) == 12  # the held-out run is not among them

    capsys.readouterr()
    fast = ["--resamples=100", "--json"]
    assert cli.main(["scaling", "predict", str(workdir), *fast]) == 0
    first = json.loads(capsys.readouterr().out)
    assert first["outcome"] is None and len(first["prediction"]["fitted_to"]) == 12
    (file,) = workdir.glob("predictions/*.json")
    written = file.read_bytes()

    assert cli.main([*command, "--held_out"]) == 0
    capsys.readouterr()
    assert cli.main(["scaling", "predict", str(workdir), *fast]) == 0
    second = json.loads(capsys.readouterr().out)
    assert second["prediction"] == first["prediction"] and file.read_bytes() == written
    outcome = second["outcome"]
    predicted = first["prediction"]["losses"]["chinchilla, total"]["loss"]
    assert outcome["error"] == pytest.approx(outcome["loss"] / predicted - 1) and abs(outcome["error"]) < 0.02

    assert cli.main(["scaling", "fit", str(workdir), "--resamples=100", f"--out={tmp_path / 'report'}"]) == 0
    out = capsys.readouterr().out
    assert out.startswith("12 runs:") and "measured:" in out and "without embeddings" in out
    assert {path.name for path in (tmp_path / "report").iterdir()} >= {
        "report.md",
        "fit.json",
        "points.csv",
        "loss.png",
        "errors.png",
    }
    assert len(json.loads((tmp_path / "report/fit.json").read_text())["runs"]) == 12  # never the held-out one

    file.unlink()  # after the run: no prediction can be made any more
    assert cli.main(["scaling", "predict", str(workdir), *fast]) == 2
    assert "was started before its loss was predicted" in capsys.readouterr().err


def test_mistakes_are_one_sentence(tmp_path, family_file, capsys):
    table = tmp_path / "points.csv"
    observations.write_csv(table, simulated(noise=0.002))
    for words, complaint in (
        (["fit"], "needs either folders or --csv=FILE"),
        (["fit", str(tmp_path), f"--csv={table}"], "needs either folders or --csv=FILE"),
        (["fit", str(tmp_path)], "neither a run's folder nor a sweep's"),
        (["fit", f"--csv={table}", "--resamples=5"], "at least 100"),
        (["predict", str(tmp_path)], "is not the folder of `gptjax scaling run`"),
        (["predict", f"--csv={table}"], "needs one family's folder"),
        (["predict", f"--csv={table}", "--parameters=1e9"], "--parameters has 1 numbers and --tokens 0"),
        (["plan", RECIPE], "has no function get_family"),
        (["run", family_file], "needs --workdir"),
    ):
        assert cli.main(["scaling", *words]) == 2, words
        assert complaint in capsys.readouterr().err, words


def test_any_run_and_any_budget_can_be_asked_for(tmp_path, capsys):
    table = tmp_path / "points.csv"
    observations.write_csv(table, simulated(noise=0.002))
    words = [
        "scaling",
        "predict",
        f"--csv={table}",
        "--parameters=3e9",
        "--tokens=1e11",
        "--flops=1e21",
        "--resamples=100",
        "--json",
    ]
    assert cli.main(words) == 0
    run, best = json.loads(capsys.readouterr().out)["predictions"]
    assert run["low"] < 1.8172 + 482.01 / 3e9**0.3478 + 2085.43 / 1e11**0.3658 < run["high"]
    assert 6 * best["parameters"] * best["tokens"] == pytest.approx(1e21)
