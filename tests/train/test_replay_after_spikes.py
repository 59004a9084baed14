"""A step of a run that went back from spikes: the one that was taken last, and on request the spike itself."""

from __future__ import annotations

import pytest

from gptjax.config import UserError
from gptjax.train.replay import _same_way, replay
from gptjax.train.rewind import Rewind, skipped_before
from tests.train.runs import quiet
from tests.train.test_rewind import config, undisturbed  # noqa: F401 (fixtures)

FIRST = Rewind(27, 26, 24, 9.0, 3.0, 16)
SECOND = Rewind(26, 25, 24, 9.0, 3.0, 28)
EARLIER = Rewind(30, 29, 20, 9.0, 3.0, 60)


def test_rows_passed_over_before_each_step():
    assert [skipped_before((FIRST, SECOND), step) for step in (1, 24, 25, 40)] == [0, 0, 28, 28]
    assert [skipped_before((FIRST, EARLIER), step) for step in (20, 21, 25, 40)] == [0, 60, 60, 60]
    assert [skipped_before((EARLIER, SECOND), step) for step in (20, 21, 24, 25)] == [0, 60, 60, 28]


def test_a_checkpoint_serves_where_its_steps_took_the_same_rows():
    assert _same_way((), (FIRST,), 24) and not _same_way((), (FIRST,), 25)
    assert _same_way((FIRST,), (), 24) and not _same_way((FIRST,), (FIRST, SECOND), 30)
    assert _same_way((FIRST, SECOND), (FIRST, SECOND), 40) and not _same_way((FIRST,), (FIRST, EARLIER), 24)


def test_a_step_behind_a_rewind_is_the_one_that_was_taken_last(undisturbed):  # noqa: F811
    folder, _ = undisturbed
    last = replay(folder, 26, log=quiet)
    assert last.rewinds == last.of_rewinds == 2 and last.agreement.is_exact
    assert last.agreement.compared == 6 * (26 - last.from_step)
    assert set("".join(one.text for one in last.documents)) <= set("0123456789"), "the letters were passed over"


@pytest.mark.parametrize(("rewinds", "step"), [(0, 27), (1, 26)])
def test_the_spike_itself_is_shown_with_the_value_by_which_it_was_found(undisturbed, rewinds: int, step: int):  # noqa: F811
    folder, result = undisturbed
    found = replay(folder, step, rewinds, log=quiet)
    assert result["rewinds"][rewinds]["found_at"] == step and result["rewinds"][rewinds]["value"] == found.figures["train/loss"]
    assert found.agreement.is_exact and found.agreement.last_step == step and found.from_step == 0
    assert not set(found.documents[0].text) <= set("0123456789")
    assert found.figures["train/loss"] > 1.8 * found.before["train/loss"]
    with pytest.raises(UserError, match=f"went back at step {step}, and had not come so far"):
        replay(folder, step + 1, rewinds, log=quiet)
