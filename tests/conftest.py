"""What all tests run under."""

from __future__ import annotations

import os
import shutil
import uuid
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from .helpers import second_run

if TYPE_CHECKING:
    from .helpers.object_server import ObjectServer
    from .helpers.replayed_cases import Lab
    from .helpers.wrong_input import Place

# Before torch is imported, and for the processes tests start: with as many test processes as cores,
# threads of one wait for those of another, and small products take ten times as long.
os.environ["OMP_NUM_THREADS"] = "1"

# Those that take longest, in this order: three processes take a file each, and whatever is long must
# not be left to the end, when the others have nothing to do. Three on two cores, because tests of
# faults and of other processes mostly wait.
FIRST = (
    *("test_replay.py", "test_faults.py", "test_how_to.py", "test_examples.py"),
    *("test_terminal.py", "test_numerics.py", "test_report.py", "test_memory.py"),
    *("test_screen.py", "test_precision.py", "test_namespaces.py", "test_verify.py"),
    *("test_several_losses.py", "test_covered_steps.py", "test_still_runs.py", "test_groups.py"),
    *("test_remote.py", "test_export.py", "test_runs_at_an_address.py", "test_models.py"),
)


def pytest_addoption(parser: pytest.Parser) -> None:
    """Add options that say where and how precisely the numbers are computed, and what runs twice."""
    second_run.add_option(parser)
    group = parser.getgroup("numbers", "where the numbers under test are computed")
    group.addoption("--device", choices=("cpu", "cuda"), default="cpu", help="cpu by default")
    group.addoption(
        "--dtype", choices=("float32", "float64"), default="float32", help="float32 by default"
    )


def pytest_configure(config: pytest.Config) -> None:
    """Refuse a device that is not there; see to second runs."""
    second_run.register(config)
    if config.getoption("--device") == "cuda":
        import torch

        if not torch.cuda.is_available():
            raise pytest.UsageError("--device cuda: torch finds no CUDA device on this machine")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Order tests by their files: the longest first, the others as they were."""
    ranks = {name: rank for rank, name in enumerate(FIRST)}
    items.sort(key=lambda item: ranks.get(item.path.name, len(FIRST)))


@pytest.fixture(scope="session")
def device(pytestconfig: pytest.Config) -> str:
    """The device the numbers are computed on: `--device`."""
    return str(pytestconfig.getoption("--device"))


@pytest.fixture(scope="session")
def lab(pytestconfig: pytest.Config, device: str, tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """The cases, replayed on `--device` in `--dtype`, once for every file of this process."""
    from .helpers.replayed_cases import Lab

    return Lab(tmp_path_factory.mktemp("lab"), device, pytestconfig.getoption("--dtype"))


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


@pytest.fixture(scope="session", autouse=True)
def short_spans() -> Iterator[None]:
    """Cut the runs of one worker into two spans and more, so that short trajectories show what
    happens between spans; how a run is cut decides no number.

    Processes that tests start cut as always.
    """
    from lca_posthoc.replay import prepare

    rule = prepare.choose_span

    def shorter(segments: int, workers: int, *others: Any) -> int:
        return rule(max(1, segments // 2) if workers == 1 else segments, workers, *others)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(prepare, "choose_span", shorter)
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


@pytest.fixture(scope="session")
def object_store() -> Iterator[ObjectServer]:
    """A server that speaks like S3, which drivers of this process, and of those it starts, find by
    their environment.
    """
    from .helpers.object_server import object_server

    with object_server() as server, pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server


@pytest.fixture(params=["local", "memory", "s3"])
def home(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """An empty place of runs: in a file system, in memory, on a server."""
    from lca_posthoc.checkpoints.paths import path_of

    match request.param:
        case "local":
            return tmp_path / "home"
        case "memory":
            return path_of(f"memory://{uuid.uuid4().hex}")
        case _:
            server: ObjectServer = request.getfixturevalue("object_store")
            server.fate = lambda request: "through"
            return server.place()


@pytest.fixture
def no_warnings() -> Iterator[None]:
    """Make every warning an error: where one is due, the test expects it."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message=".*fewer than 32 bits", category=UserWarning)
        yield
