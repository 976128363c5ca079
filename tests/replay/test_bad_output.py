"""A place that cannot take a result, and a run that cannot be read, are refused and left alone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.cli import (
    contents,
    lca,
    record,
    refused,
    says,
    write_task,
)

from ..helpers.wrong_input import RETURN, Place, spans_of

# --- where the result goes ------------------------------------------------------------------------


OUTPUTS: dict[str, Callable[[Path], object]] = {
    "a file": lambda out: out.write_text("mine"),
    "a directory with something in it": lambda out: (
        out.mkdir(),
        (out / "mine.txt").write_text("mine"),
    ),
    "an empty directory": lambda out: out.mkdir(),
}


@pytest.mark.parametrize("case", OUTPUTS)
def test_an_output_directory_that_is_something_else_is_refused(place: Place, case: str) -> None:
    OUTPUTS[case](place.out)
    place.refuses(str(place.out), "exists and is not a run directory", "--out")


def test_an_output_directory_below_a_file_is_refused(place: Place) -> None:
    (place.data / "mine.txt").write_text("mine")
    place.out = place.data / "mine.txt" / "run.lca"
    place.refuses("mine.txt", "--out")


def test_an_output_directory_that_is_a_broken_link_is_refused(place: Place) -> None:
    place.out.symlink_to(place.data / "nowhere")
    place.refuses(str(place.out), "--out")


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format": 99}', '{"format": 1}'])
def test_a_run_directory_whose_record_cannot_be_read_is_left_alone(
    finished: Place, text: str
) -> None:
    (finished.out / "run.json").write_text(text)
    finished.refuses(str(finished.out), code=1)


# --- tracebacks, and commands that read a run -----------------------------------------------------


def test_a_traceback_is_shown_when_asked_for(place: Place) -> None:
    write_task(place.task, RETURN, f"    raise KeyError('split')\n{RETURN}")
    result = lca("--debug", "run", place.checkpoints, "--task", place.task, "--cluster", "inline")
    assert result.exit_code == 2
    says(result.stderr, "Traceback (most recent call last)", "in task\n", "KeyError: 'split'")
    assert result.stderr.splitlines()[-1].startswith("lca: ")


NOT_RUNS: dict[str, Callable[[Path], object]] = {
    "nothing": lambda path: None,
    "a file": lambda path: path.write_text("mine"),
    "an empty directory": lambda path: path.mkdir(),
    "a directory of checkpoints": record,
}


@pytest.mark.parametrize("command", ["summary", "status"])
@pytest.mark.parametrize("case", NOT_RUNS)
def test_what_is_not_a_run_cannot_be_read_as_one(tmp_path: Path, command: str, case: str) -> None:
    NOT_RUNS[case](tmp_path / "it")
    before = contents(tmp_path)
    refused(
        lca(command, tmp_path / "it"), str(tmp_path / "it"), "is not a run directory", "lca run"
    )
    assert contents(tmp_path) == before


@pytest.mark.parametrize("command", ["summary", "status"])
@pytest.mark.parametrize(
    "text", ["", "{", "[]", "{}", '{"format": 99}', '{"format": 1}', '{"format": 1, "tensors": 3}']
)
def test_a_run_whose_record_is_damaged_is_a_failure_that_names_it(
    finished: Place, command: str, text: str
) -> None:
    (finished.out / "run.json").write_text(text)
    refused(lca(command, finished.out), str(finished.out), code=1)


def test_a_loss_the_run_does_not_have_is_refused_by_name(finished: Place) -> None:
    refused(lca("summary", finished.out, "--loss", "nope"), "no loss 'nope'", "'train'")


def test_a_run_without_a_finished_segment_has_no_summary(finished: Place) -> None:
    for each in (finished.out / "commits" / "train").iterdir():
        each.unlink()
    refused(lca("summary", finished.out), "'train'", "no finished segment", "lca run", code=1)
    assert spans_of(finished) == (0, 3, False)
