"""A disk that fills up, files and directories that may not be read or written."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from . import NOT_DONE, fault
from .processes import (
    Driver,
    complete,
    drive,
    held,
    laid_out,
    markers,
    named,
    nobody_left,
    undamaged,
    whole,
)

INLINE = ("--cluster", "inline")
LOCAL = ("--cluster", "local", "--workers", 2)


@contextlib.contextmanager
def _small_disk(place: Path) -> Iterator[str | None]:
    """A file system of 20 MB at `place`; gives why not where it cannot be had."""
    place.mkdir()
    made = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", place],
        capture_output=True,
        text=True,
        check=False,
    )
    try:
        yield " ".join(made.stderr.split()) or "mount failed" if made.returncode else None
    finally:
        while os.path.ismount(place):
            subprocess.run(["umount", "--lazy", place], check=True)


def _fill(filler: Path) -> None:
    with filler.open("wb", buffering=0) as file:
        for size in (2**16, 2**12, 1):
            with contextlib.suppress(OSError):
                while file.write(bytes(size)) == size:
                    pass


@fault("R5", "the disk full in the middle of a run", ci=2, full=10)
def disk_full(count: int, _: Path) -> str:
    chance, done = random.Random(5), 0
    with laid_out() as (place, clean):
        for number in range(count):
            cluster = (INLINE, LOCAL)[number % 2]
            with _small_disk(place / f"disk-{number}") as refused:
                if refused is not None:
                    return f"{NOT_DONE}no file system of 20 MB can be mounted here ({refused})"
                disk = place / f"disk-{number}"
                out, wanted = disk / "run.lca", chance.randint(0, 15)
                driver = drive(
                    place,
                    out,
                    *cluster,
                    environment=held(released := place / f"released-{number}", 15),
                )
                assert driver.until(
                    lambda out=out, wanted=wanted: out.exists() and markers(out) >= wanted
                ), driver.said
                _fill(disk / "filler")
                released.touch()
                assert driver.finished() == 5, (driver.returncode, driver.said)
                assert "no space left" in named(driver.said), driver.said
                done += markers(out)
                nobody_left(driver)
                undamaged(out)
                (disk / "filler").unlink()
                complete(place, out, clean)
    return f"{count} times exit 5, {done} spans kept, bytes equal once there was space"


# --- permissions ----------------------------------------------------------------------------------

Deny = Callable[[Path, Path], Path]


def _run_read_only(place: Path, out: Path) -> Path:
    """Its driver was killed while it wrote a chunk, and what that left cannot be removed."""
    (out / "data.zarr" / ".0.partial").touch()
    for directory, _, _ in os.walk(out):
        Path(directory).chmod(0o555)
    return out


def _parent_read_only(place: Path, out: Path) -> Path:
    out.parent.chmod(0o555)
    return out.parent


def _somebody_elses(mode: int) -> Deny:
    def deny(place: Path, out: Path) -> Path:
        file = place / "checkpoints" / "step_00000020.safetensors"
        if os.geteuid() == 0:
            os.chown(file, 65534, 65534)
            file.chmod(mode)
        else:
            file.chmod(0)
        return file

    return deny


def _task_unreadable(place: Path, out: Path) -> Path:
    (place / "small_task.py").chmod(0)
    return place / "small_task.py"


def _checkpoints_unreadable(place: Path, out: Path) -> Path:
    (place / "checkpoints").chmod(0)
    return place / "checkpoints"


DENIED: dict[str, tuple[bool, Deny]] = {
    "a read-only run": (True, _run_read_only),
    "a read-only parent": (False, _parent_read_only),
    "a checkpoint of mode 0600 of another owner": (False, _somebody_elses(0o600)),
    "a checkpoint of mode 0000": (True, _somebody_elses(0)),
    "a task file that cannot be read": (False, _task_unreadable),
    "a directory of checkpoints that cannot be read": (False, _checkpoints_unreadable),
}


def _says_what_and_what_to_do(driver: Driver, path: Path) -> None:
    assert driver.finished() > 0, (driver.returncode, driver.said)
    *notes, line = named(driver.said, path).splitlines()
    assert all(note.startswith("note: ") for note in notes), driver.said
    assert line.startswith("lca: "), driver.said
    assert ". " in line, line  # what to do


@fault("R16", "what may not be read or written", ci=6, full=6)
def denied(count: int, _: Path) -> str:
    """As an ordinary user sees it, also where root runs the tests."""
    wrong: list[str] = []
    with laid_out() as (base, clean):
        begun = drive(base, base / "begun.lca", *INLINE)
        assert begun.until(lambda: markers(base / "begun.lca") >= 3), begun.said
        begun.kill()
        for number, (what, (exists, deny)) in enumerate(list(DENIED.items())[:count]):
            place = base / f"place-{number}"
            shutil.copytree(base / "checkpoints", place / "checkpoints")
            shutil.copy(base / "small_task.py", place)
            out = place / "results" / "run.lca"
            out.parent.mkdir()
            if exists:
                shutil.copytree(base / "begun.lca", out)
            modes = {path: path.stat() for path in [place, *place.rglob("*")]}
            path = deny(place, out)
            try:
                _says_what_and_what_to_do(drive(place, out, *INLINE, powerless=True), path)
            except AssertionError as error:
                wrong.append(f"{what}: {error}")
            finally:
                for each, before in modes.items():
                    if os.geteuid() == 0:
                        os.chown(each, before.st_uid, before.st_gid)
                    each.chmod(before.st_mode & 0o7777)
            undamaged(out)
            complete(place, out, clean)
            whole(out, clean)
    assert wrong == [], "\n".join(wrong)
    return f"{count} refusals, each with the path and what to do, bytes equal once it was allowed"
