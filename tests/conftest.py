"""What all tests run under."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest

# Before torch is imported, and for the processes tests start: with as many test processes as cores,
# threads of one wait for those of another, and small products take ten times as long.
os.environ["OMP_NUM_THREADS"] = "1"


@pytest.fixture(scope="session", autouse=True)
def unflushed() -> Iterator[None]:
    """Leave the disk alone: only a power cut tells a flushed file from another, and tests that
    count flushes count calls.

    Processes that tests start flush as always.
    """
    with pytest.MonkeyPatch.context() as patch:
        # as an error for a descriptor that is closed stays one
        patch.setattr(os, "fsync", os.fstat)
        yield
