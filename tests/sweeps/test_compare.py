"""`gptjax compare`: groups, pairs, and the sentences in which it names a winner or refuses to."""

from __future__ import annotations

import json
import pathlib

import numpy as np
import pytest
from scipy import stats

from gptjax import cli
from gptjax import config as config_lib
from gptjax.config import UserError
from gptjax.sweeps.compare import compare, lines
from gptjax.sweeps.curves import curve_of, on_common_grid
from gptjax.sweeps.folder import State
from gptjax.sweeps.groups import figure, group_runs, read_runs
from tests.sweeps.drive import prepare

NOISE = [0.003, -0.004, 0.001, 0.002, -0.002, 0.0]


def make_run(folder: pathlib.Path, seed: int, loss: float, *, rate: float = 1e-3, every: int = 0, finished: bool = True):
    """A run's folder: 4 evaluations that fall from 3 to `loss`, 100 tokens and 2 seconds a step."""
    values = config_lib.defaults()
    values.train.duration_steps = 40
    values.train.seed = seed
    values.optimizer.learning_rate = rate
    values.metrics.every_steps = every
    folder.mkdir(parents=True)
    config = config_lib.from_dict(values).with_vocab_size(65)
    (folder / "config.json").write_text(config_lib.to_json(config))
    rows = []
    for step in (10, 20, 30, 40):
        rows.append({"step": step, "tokens": 100 * step, "train/loss": 3.0, "seconds": 2.0 * step})
        rows.append({"step": step, "tokens": 100 * step, "eval/loss": 3 + (loss - 3) * (step - 10) / 30})
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if finished:
        (folder / "result.json").write_text(json.dumps({"steps": 40, "seconds": 80.0, "eval": {"loss": loss}}))
    return folder


def make_groups(tmp_path: pathlib.Path, means: dict[float, float], seeds: int = 6) -> list[str]:
    """For each learning rate runs of these seeds, around that loss; the seed's share is the same in all."""
    folders = []
    for rate, mean in means.items():
        for seed in range(seeds):
            own = float(np.random.default_rng((seed, round(rate * 1e6))).normal(0, 0.0005))
            folders.append(str(make_run(tmp_path / f"{rate}-{seed}", seed, mean + NOISE[seed] + own, rate=rate)))
    return folders


def groups_of(folders: list[str]):
    return group_runs(read_runs(folders))


def test_runs_are_grouped_by_config_and_paired_by_seed(tmp_path):
    folders = make_groups(tmp_path, {1e-3: 1.90, 2e-3: 1.88})
    groups = groups_of(folders)
    assert [group.label for group in groups] == ["learning_rate=0.001", "learning_rate=0.002"]
    assert [run.seed for run in groups[1].runs] == list(range(6))
    report = compare(groups)
    (comparison,) = report.comparisons
    losses = [
        [json.loads((pathlib.Path(f) / "result.json").read_text())["eval"]["loss"] for f in folders[i : i + 6]] for i in (0, 6)
    ]
    assert comparison.paired.difference == pytest.approx(np.mean(losses[1]) - np.mean(losses[0]), rel=1e-12)
    assert comparison.paired.p == pytest.approx(stats.ttest_rel(losses[1], losses[0]).pvalue, rel=1e-9)
    assert comparison.winner is groups[1] and comparison.more_seeds == 0
    assert comparison.verdict.startswith("2 (learning_rate=0.002) is better: eval/loss is lower by 0.0")
    text = "\n".join(lines(report))
    assert f"{np.mean(losses[0]):.5g}" in text and "2 - 1" in text


def test_what_does_not_shape_a_run_does_not_part_a_group(tmp_path):
    folders = [str(make_run(tmp_path / str(seed), seed, 1.9, every=seed)) for seed in range(3)]
    assert len(groups_of(folders)) == 1


def test_no_winner_where_the_interval_holds_zero(tmp_path):
    report = compare(groups_of(make_groups(tmp_path, {1e-3: 1.9, 2e-3: 1.9001}, seeds=4)))
    (comparison,) = report.comparisons
    assert comparison.winner is None and comparison.paired.interval[0] < 0 < comparison.paired.interval[1]
    assert "holds zero; " in comparison.verdict and comparison.verdict.count(". ") == 0
    assert comparison.more_seeds is None or comparison.more_seeds > 0


def test_no_winner_with_two_seeds_however_far_apart(tmp_path):
    report = compare(groups_of(make_groups(tmp_path, {1e-3: 1.9, 2e-3: 0.5}, seeds=2)))
    (comparison,) = report.comparisons
    assert comparison.winner is None
    assert comparison.verdict == "no winner: 2 seeds are paired (0, 1), and at least 3 are needed."


def test_only_seeds_that_both_have_count(tmp_path):
    folders = make_groups(tmp_path, {1e-3: 1.9, 2e-3: 1.8})
    report = compare(groups_of([folder for folder in folders if not folder.endswith(("0.001-0", "0.002-5"))]))
    assert report.comparisons[0].seeds == (1, 2, 3, 4)


def test_a_p_value_that_the_correction_undoes_wins_nothing(tmp_path):
    # One comparison is near the edge; eight more raise its p-value above it.
    folders = make_groups(tmp_path, {1e-3: 1.9, 2e-3: 1.8988})
    alone = compare(groups_of(folders)).comparisons[0]
    assert alone.paired.p < 0.05 and alone.paired.excludes_zero and alone.winner is not None
    more = make_groups(tmp_path / "more", dict.fromkeys([rate / 1000 for rate in range(11, 18)], 1.9))
    report = compare(groups_of(folders + more), baseline=1)
    first = report.comparisons[0]
    assert first.paired == alone.paired and first.p_holm > 0.05 and first.winner is None
    assert len(report.comparisons) == 8 and "Holm's correction for 8 comparisons" in first.verdict


def test_a_group_that_lost_runs_is_not_the_winner(tmp_path):
    folders = make_groups(tmp_path, {1e-3: 1.9, 2e-3: 1.8})
    for name in ("0.002-0", "0.002-3"):
        (tmp_path / name / "result.json").unlink()
    (comparison,) = compare(groups_of(folders)).comparisons
    assert comparison.winner is None and comparison.paired.excludes_zero
    assert (
        "2 of the runs of 2 (learning_rate=0.002) have no eval/loss (it has not finished), and leaving them out favours it"
        in (comparison.verdict)
    )


def test_before_and_after_with_the_same_configs_are_two_groups(tmp_path):
    folders = [
        str(make_run(tmp_path / when / str(seed), seed, loss + NOISE[seed]))
        for when, loss in (("a", 1.9), ("b", 1.8))
        for seed in range(3)
    ]
    groups = groups_of(folders)
    assert [group.label for group in groups] == [str(tmp_path / "a"), str(tmp_path / "b")]
    assert [len(group.runs) for group in groups] == [3, 3] and compare(groups).comparisons[0].winner is groups[1]
    with pytest.raises(UserError, match="have one config and seed, and lie in one folder"):
        groups_of([folders[0], str(make_run(tmp_path / "a" / "again", 0, 1.9))])


def test_a_sweeps_folder_says_which_trials_failed(tmp_path):
    folder, trials = prepare(tmp_path / "sweep", ["a"] * 4)
    for trial in trials[:3]:
        (folder.trial(trial.name) / "result.json").write_text(json.dumps({"eval": {"loss": 1.5}}))
    folder.write_state(trials[3].name, State("failed", "nonfinite", "the gradient was not finite."))
    (group,) = groups_of([str(tmp_path / "sweep")])
    assert [run.seed for run in group.runs] == [0, 1, 2, 3] and group.label == "all runs"
    assert figure(group.runs[3], "eval/loss").missing == "failed (nonfinite)"
    assert "there is one group" in "\n".join(lines(compare([group])))


def test_tokens_and_time_to_loss(tmp_path):
    (run,) = read_runs([str(make_run(tmp_path / "a", 0, 1.5))])
    # losses 3, 2.5, 2, 1.5 at steps 10, 20, 30, 40; 2.2 lies 3/5 of the way from 20 to 30
    assert figure(run, "tokens_to_loss", 2.2).value == pytest.approx(2600)
    assert figure(run, "time_to_loss", 2.2).value == pytest.approx(52)
    assert figure(run, "tokens_to_loss", 2.0).value == 3000 and figure(run, "tokens_to_loss", 3.5).value == 1000
    assert figure(run, "tokens_to_loss", 1.0).missing == "it never reached 1"
    assert figure(run, "seconds").value == 80 and figure(run, "train/loss").value == 3.0
    assert figure(run, "eval/loss").value == 1.5 and figure(run, "accuracy").missing == "it has no accuracy"


def test_the_direction_of_a_metric(tmp_path):
    folders = make_groups(tmp_path, {1e-3: 1.9, 2e-3: 1.8})
    assert compare(groups_of(folders), higher_is_better=True).comparisons[0].winner.number == 1
    assert compare(groups_of(folders)).comparisons[0].winner.number == 2


def test_curves_on_a_common_grid():
    a, b = np.array([[0.0, 4.0], [10.0, 2.0], [30.0, 1.0]]), np.array([[5.0, 3.0], [20.0, 1.5]])
    tokens, losses = on_common_grid([a, b])
    assert tokens.tolist() == [5, 10, 20] and losses.tolist() == [[3, 2, 1.5], [3, 2.5, 1.5]]


def test_the_verb(tmp_path, capsys):
    folders = make_groups(tmp_path, {1e-3: 1.9, 2e-3: 1.8}, seeds=5)
    plot = tmp_path / "curves.png"
    assert cli.main(["compare", *folders, "--target=2", f"--plot={plot}", "--json"]) == 0
    reports = json.loads(capsys.readouterr().out)["reports"]
    assert [report["metric"] for report in reports] == ["eval/loss", "tokens_to_loss", "time_to_loss"]
    assert [report["comparisons"][0]["winner"] for report in reports] == [2, 2, 2]
    assert plot.read_bytes().startswith(b"\x89PNG") and len(curve_of(read_runs(folders)[0])) == 4
    assert cli.main(["compare", *folders]) == 0
    assert "2 (learning_rate=0.002) is better" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["nowhere"], "neither a run's folder nor a sweep's"),
        (["{run}", "--metric=accuracy"], "no run has the metric accuracy: it has no accuracy"),
        (["{run}", "--metric=time_to_loss"], "needs --target=LOSS"),
        (["{run}", "--baseline=2"], "numbered 1 to 1"),
        (["{run}", "--confidence=1"], "must be below 1"),
    ],
)
def test_a_mistake_is_one_sentence(tmp_path, capsys, arguments, sentence):
    folder = make_run(tmp_path / "run", 0, 1.5)
    assert cli.main(["compare", *(word.format(run=folder) for word in arguments)]) == 2
    err = capsys.readouterr().err
    assert sentence in err and err.count("\n") == 1
