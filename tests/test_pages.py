"""`gptjax config --help GROUP` and `--picture`: made from the declarations, so that they cannot go stale."""

from __future__ import annotations

import dataclasses
import os
import pathlib
import re
import subprocess
import sys

import pytest

from gptjax import cli
from gptjax.config import Config, UserError, pages

ROOT = pathlib.Path(__file__).resolve().parents[1]
RECIPE = str(ROOT / "configs" / "gpt2_124m.py")


@pytest.mark.parametrize("width", [60, 130])
@pytest.mark.parametrize("group", pages.groups())
def test_a_page_has_every_knob_with_type_default_choices_bounds_and_meaning(group: str, width: int) -> None:
    page = pages.group_page(group, width)
    assert max(map(len, page.splitlines())) <= width
    first = re.compile(rf"^{group}\.(\w+): ", re.MULTILINE)
    fields = {field.name: field for field in dataclasses.fields(getattr(Config(), group))}
    assert first.findall(page) == list(fields)
    texts = dict(zip(fields, [" ".join(text.split()) for text in first.split(page)[2::2]], strict=True))
    for name, field in fields.items():
        assert " ".join(field.metadata["meaning"].split()) in texts[name]
        for choice in field.metadata["choices"]:
            assert re.search(rf"one of .*(?<!\w){re.escape(choice)}(?!\w)", texts[name]), name
        for bound in field.metadata["bounds"].values():
            assert re.search(rf"(at least|above|at most|below) {re.escape(str(bound))},", texts[name]), name
        assert ("A resumed run may change it." in texts[name]) != field.metadata["shapes_run"]
        if not isinstance(field.default, (tuple, str)):
            assert f"default {field.default} " in texts[name], name
    assert "default 'norm' 'bias' 'embed'" in pages.group_page("optimizer", 200)


def test_the_plain_help_lists_the_groups_and_the_knob_that_has_none(capsys: pytest.CaptureFixture) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(["config", "--help"])
    out = capsys.readouterr().out
    assert stopped.value.code == 0 and "--shardings" in out
    for group in pages.groups():
        assert re.search(rf"^  {group} +\S.* \d+ knobs\.$", out, re.MULTILINE), group
    assert "\ninit_from: a text, default ''\n" in out


def test_a_misspelt_group_is_one_sentence(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["config", "--help", "modle"]) == 2
    assert capsys.readouterr().err.strip().splitlines() == ["gptjax: there is no group of knobs modle; did you mean model?"]
    with pytest.raises(UserError, match="there are model, data, objective"):
        pages.group_page("zzz")


def test_the_command_prints_page_and_picture_without_jax() -> None:
    code = "import sys; from gptjax import cli; cli.main(sys.argv[1:]); sys.exit('jax' in sys.modules)"  # --help has left before
    environment = os.environ | {"COLUMNS": "70", "PYTHONPATH": str(ROOT)}

    def out(*words: str) -> str:
        done = subprocess.run([sys.executable, "-c", code, *words], check=True, cwd=ROOT, env=environment, capture_output=True)
        return done.stdout.decode()

    assert out("config", "--help", "model") == pages.group_page("model", 70)
    picture = out("config", RECIPE, "--picture", "--config.model.norm_placement=post", "--config.model.block=parallel")
    assert picture.count("block_norm") == 1 and "12 heads of 64" in picture and picture.count("⊕") == 1


def test_a_picture_is_of_one_recipe(capsys: pytest.CaptureFixture) -> None:
    assert cli.main(["config", RECIPE, RECIPE, "--picture"]) == 2
    assert "--picture takes one recipe" in capsys.readouterr().err
