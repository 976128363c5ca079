"""A failed test that depends on timing is run once more, alone; every other failure stands.

A device the suite is told to run on and does not find is wrong usage.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

CONFTEST = """
from tests.helpers import second_run

def pytest_addoption(parser):
    second_run.add_option(parser)

def pytest_configure(config):
    config.addinivalue_line("markers", "moment: depends on timing")
    second_run.register(config)
"""
TESTS = """
import pathlib, pytest

def count(name):
    path = pathlib.Path(__file__).with_name(name)
    runs = path.read_text() if path.exists() else ""
    path.write_text(runs + "x")
    return len(runs) + 1

def test_right():
    assert count("right") == 1
"""
ONCE = """
@pytest.mark.moment
@pytest.mark.parametrize("where", ["here", "a b [::1]"])
def test_fails_once(where):
    assert count(where[0]) == 2, "too early"
"""
TWICE = """
@pytest.mark.moment
def test_fails_twice():
    assert count("twice") == 3, "never in time"
"""
AT_ONCE = """
def test_unmarked():
    assert count("unmarked") == 2, "simply wrong"
"""
IN_SETUP = """
@pytest.fixture
def late():
    assert count("setup") == 2, "not up yet"

@pytest.mark.moment
def test_with_a_setup_that_fails_once(late):
    assert count("body") == 1
"""
HERE = Path(__file__).parents[1]


def pytest_in(place: Path, *arguments: str) -> tuple[int, str]:
    """Run pytest there; return the exit status and what is printed."""
    environment = {name: text for name, text in os.environ.items() if "PYTEST" not in name}
    # no plugin but xdist: others import large libraries
    environment |= {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1", "PYTEST_PLUGINS": "xdist.plugin"}
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *arguments],
        cwd=place,
        env={**environment, "PYTHONPATH": str(HERE)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    return done.returncode, done.stdout


def run_tests(place: Path, *parts: str, options: tuple[str, ...]) -> tuple[int, str]:
    """Run tests with the plugin; return the exit status and what is printed."""
    (place / "conftest.py").write_text(CONFTEST)
    (place / "pytest.ini").write_text("[pytest]\naddopts = --strict-markers -q\n")
    (place / "test_first.py").write_text(TESTS + "".join(parts))
    (place / "test_second.py").write_text(TESTS.replace('"right"', '"right too"'))
    status, said = pytest_in(place, *options)
    assert (place / "right").read_text() == (place / "right too").read_text() == "x"
    return status, said


@pytest.fixture(params=["-n0", "-n2"])
def options(request: pytest.FixtureRequest) -> tuple[str, ...]:
    return (request.param, "--dist", "loadfile")


def runs(place: Path, name: str) -> int:
    return len((place / name).read_text())


def test_a_test_of_a_moment_that_fails_once_passes_and_both_outcomes_are_printed(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    status, said = run_tests(tmp_path, ONCE, options=options)
    assert status == 0, said
    for test in ("test_fails_once[here]", "test_fails_once[a b [::1]]"):
        assert f"test_first.py::{test}: failed, then passed" in said
    assert "too early" in said
    assert (runs(tmp_path, "h"), runs(tmp_path, "a")) == (2, 2)


def test_a_test_of_a_moment_that_fails_twice_fails_with_what_its_second_run_printed(
    tmp_path: Path, options: tuple[str, ...]
) -> None:
    status, said = run_tests(tmp_path, TWICE, ONCE, options=options)
    assert status == 1
    assert "test_first.py::test_fails_twice: failed, then failed" in said
    assert "test_first.py::test_fails_once[here]: failed, then passed" in said
    assert said.count("AssertionError: never in time") >= 2
    assert runs(tmp_path, "twice") == 2


def test_any_other_failure_stands(tmp_path: Path, options: tuple[str, ...]) -> None:
    status, said = run_tests(tmp_path, AT_ONCE, ONCE, options=options)
    assert status == 1
    assert "test_unmarked: failed, then" not in said
    assert "test_first.py::test_fails_once[here]: failed, then passed" in said
    assert runs(tmp_path, "unmarked") == 1


def test_a_setup_that_fails_is_set_up_again(tmp_path: Path, options: tuple[str, ...]) -> None:
    status, said = run_tests(tmp_path, IN_SETUP, options=options)
    assert status == 0, said
    assert "test_with_a_setup_that_fails_once: failed, then passed" in said
    assert (runs(tmp_path, "setup"), runs(tmp_path, "body")) == (2, 1)


def test_a_file_that_cannot_be_read_stands(tmp_path: Path) -> None:
    (tmp_path / "test_broken.py").write_text("import no_such_module\n")
    status, said = run_tests(tmp_path, ONCE, options=("-n0", "--continue-on-collection-errors"))
    assert status == 1
    assert "test_first.py::test_fails_once[here]: failed, then passed" in said


def test_a_suite_that_stops_at_the_first_failure_has_no_second_runs(tmp_path: Path) -> None:
    status, said = run_tests(
        tmp_path, ONCE, options=("-n0", "-x", "test_second.py", "test_first.py")
    )
    assert status == 1
    assert "then passed" not in said


@pytest.mark.skipif(torch.cuda.is_available(), reason="a CUDA device is there")
def test_a_device_that_is_not_there_is_wrong_usage() -> None:
    status, said = pytest_in(HERE, "-n0", "--device", "cuda", "tests/base/test_text.py")
    assert status == pytest.ExitCode.USAGE_ERROR
    assert "--device cuda: torch finds no CUDA device on this machine" in said
