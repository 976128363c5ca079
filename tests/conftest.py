"""What all tests run under."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from .helpers.wrong_input import Place

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


@pytest.fixture(scope="session")
def clean_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints and a finished run, to be copied: safetensors writes the same tensors in
    differing bytes.
    """
    from .helpers.cli import record
    from .helpers.wrong_input import Place

    clean = Place(tmp_path_factory.mktemp("clean"))
    record(clean.checkpoints)
    assert clean.run().exit_code == 0
    return clean.data


@pytest.fixture
def place(tmp_path: Path, clean_run: Path) -> Place:
    """A copy of the checkpoints of `clean_run` beside a task file; its run is still to come."""
    from .helpers.wrong_input import Place

    copied = Place(tmp_path)
    shutil.copytree(clean_run / "ck", copied.checkpoints)
    return copied


@pytest.fixture
def finished(place: Place, clean_run: Path) -> Place:
    """The same with its run, finished."""
    shutil.copytree(clean_run / "run.lca", place.out)
    return place
