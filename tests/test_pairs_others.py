"""The other half of the rows of test_pairs.py."""

from __future__ import annotations

import pytest

from tests.test_pairs import all_pairs, check_rows, refusal


def test_a_step_with_every_pair_of_options(capsys: pytest.CaptureFixture) -> None:
    check_rows({pair: refusal(pair) for pair in all_pairs()}, 1, capsys)
