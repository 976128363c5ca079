"""What all tests run under."""

from __future__ import annotations

import os

import pytest


@pytest.fixture(scope="session", autouse=True)
def unflushed() -> object:
    """Leave the disk alone: only a power cut tells a flushed file from another, and tests that count flushes count calls.

    Processes that tests start flush as always.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(os, "fsync", os.fstat)  # as an error for a descriptor that is closed stays one
        yield
