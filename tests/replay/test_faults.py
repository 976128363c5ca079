"""Every fault of `tests.helpers.faults`, as often as minutes allow."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.faults import NOT_DONE, faults

FAULTS = faults()


@pytest.mark.moment
@pytest.mark.parametrize("row", FAULTS)
def test_a_fault_changes_no_number_or_is_named(row: str, tmp_path: Path) -> None:
    outcome = FAULTS[row].inject(FAULTS[row].ci, tmp_path)
    if outcome.startswith(NOT_DONE):
        pytest.skip(outcome)
    assert outcome
