"""A disk that is full, or becomes full, costs no number and leaves nothing in the way."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from lca_posthoc import results
from lca_posthoc.replay import driver
from tests.helpers.cli import (
    document,
    lca,
    refused,
)

from ..helpers.wrong_input import Place, before_span, completes_as, spans_of


class SmallDisk:
    """A file system of a given size."""

    def __init__(self, path: Path) -> None:
        self.path = path
        path.mkdir()

    def mount(self, options: str) -> None:
        made = subprocess.run(
            ["mount", "-t", "tmpfs", "-o", options, "tmpfs", self.path],
            capture_output=True,
            text=True,
            check=False,
        )
        if made.returncode:
            pytest.skip(f"cannot mount a small tmpfs: {made.stderr.strip()}")

    def fill(self) -> None:
        block = bytes(2**16)
        with (self.path / "filler").open("wb", buffering=0) as file:
            for size in (2**16, 2**12, 1):
                try:
                    while file.write(block[:size]) == size:
                        pass
                except OSError:
                    continue

    def free(self) -> None:
        (self.path / "filler").unlink()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    made = SmallDisk(tmp_path / "disk")
    try:
        yield made
    finally:
        while os.path.ismount(made.path):
            subprocess.run(["umount", made.path], check=True)


@pytest.fixture
def on_disk(place: Place, disk: SmallDisk) -> Place:
    place.out = disk.path / "run.lca"
    return place


def test_a_result_that_cannot_fit_is_refused_up_front_with_bytes_needed_and_free(
    on_disk: Place, disk: SmallDisk
) -> None:
    disk.mount("size=64k")
    line = refused(
        on_disk.run("--keep", "parameters"), str(disk.path), "--keep tensors", "--out", code=5
    )
    assert list(disk.path.iterdir()) == []
    amounts = re.findall(r"(\d[\d.,]*)\s?([kMG]?B)\b", line)
    assert len(amounts) == 3, line  # expected, at most, and free
    assert all(float(number.replace(",", "")) > 0 for number, _ in amounts), line


@pytest.mark.parametrize("kibibytes", [192, 256, 320, 384, 448, 512, 576, 1024])
def test_on_a_disk_somebody_else_fills_a_run_is_whole_or_says_there_is_no_space(
    on_disk: Place,
    disk: SmallDisk,
    clean_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    kibibytes: int,
) -> None:
    disk.mount(f"size={kibibytes}k")
    with monkeypatch.context() as patch:
        # as if the space went after the check
        patch.setattr("lca_posthoc.results.required_bytes", lambda *_: 0)
        result = on_disk.run()
    if result.exit_code:
        refused(result, "no space", code=5)
    disk.mount("remount,size=64m")
    completes_as(on_disk, clean_run)


@pytest.mark.parametrize("kibibytes", [80, 96, 128, 160, 192, 224, 256, 512])
def test_space_that_runs_out_while_a_run_is_created_leaves_nothing_in_the_way(
    on_disk: Place, disk: SmallDisk, monkeypatch: pytest.MonkeyPatch, kibibytes: int
) -> None:
    """Two checkpoints: the files that describe the arrays take more than the arrays."""
    disk.mount(f"size={kibibytes}k")
    options = ("--steps", "0:10")
    with monkeypatch.context() as patch:
        # as if the space went after the check
        patch.setattr("lca_posthoc.results.required_bytes", lambda *_: 0)
        result = on_disk.run(*options)
    if result.exit_code:
        refused(result, "no space", code=5)
    disk.mount("remount,size=64m")
    result = on_disk.run(*options)
    assert result.exit_code == 0, result.stderr
    assert [path.name for path in disk.path.iterdir()] == ["run.lca"]


@pytest.mark.parametrize("span", [0, 1, 2])
def test_space_that_runs_out_while_a_span_is_written_is_said_and_freed_the_run_completes(
    on_disk: Place, disk: SmallDisk, clean_run: Path, monkeypatch: pytest.MonkeyPatch, span: int
) -> None:
    disk.mount("size=8m")
    with monkeypatch.context() as patch:
        before_span(patch, span, disk.fill)
        refused(on_disk.run(), "no space left", "run again", code=5)
    assert spans_of(on_disk) == (span, 3, False)
    disk.free()
    completes_as(on_disk, clean_run)


def test_space_that_runs_out_before_the_first_span_is_said_and_freed_the_run_completes(
    on_disk: Place, disk: SmallDisk, clean_run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.mount("size=8m")
    create = results.create

    def create_and_fill(*arguments: Any) -> Any:
        made = create(*arguments)
        disk.fill()
        return made

    with monkeypatch.context() as patch:
        patch.setattr(results, "create", create_and_fill)
        refused(on_disk.run(), "no space left", "run again", code=5)
    disk.free()
    completes_as(on_disk, clean_run)


def test_space_that_runs_out_while_a_loss_is_added_leaves_the_others_readable(
    on_disk: Place, disk: SmallDisk, monkeypatch: pytest.MonkeyPatch
) -> None:
    disk.mount("size=8m")
    assert on_disk.run().exit_code == 0
    before = lca("summary", on_disk.out, "--json").stdout
    with monkeypatch.context() as patch:
        patch.setattr(driver.Driver, "_check_space", lambda *_: disk.fill())
        refused(on_disk.run("--loss", "all"), "no space left", code=5)
    assert lca("summary", on_disk.out, "--json").stdout == before
    disk.free()
    assert set(document(on_disk.run("--loss", "all", "--json"))["losses"]) == {
        "train",
        "validation",
    }
