"""The file system that loses what was not flushed: what it may lose, what it never does, and that
missing flushes are found by it.
"""

from __future__ import annotations

import fcntl
import mmap
import os
import random
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lca_posthoc.errors import LCAError
from tests.helpers.cli import contents
from tests.helpers.faults.power_of_runs import cut_runs
from tests.helpers.faults.power_of_trainings import cut_recorders
from tests.helpers.power_cut.disk import (
    DROPPED,
    LOSSES,
    PARTIAL,
    REORDERED,
    ROOT,
    SECTOR,
    TORN,
    Disk,
)
from tests.helpers.power_cut.mount import Mounted, why_not
from tests.helpers.power_cut.powered import Powered, powered

FILE, DIRECTORY = stat.S_IFREG | 0o644, stat.S_IFDIR | 0o755
SEEDS = range(40)
NEW = bytes(range(1, 251)) * 20  # ten sectors, none of zeros

mountable = pytest.mark.skipif(why_not() is not None, reason=why_not() or "")


def written(disk: Disk, path: str, data: bytes) -> int:
    """A file that is created and written, and not flushed; its number."""
    number = disk.create(path, FILE)
    for start in range(0, len(data), 1000):
        disk.write(number, start, data[start : start + 1000])
    return number


def files(disk: Disk) -> dict[str, bytes]:
    """The bytes of every file, by its path."""
    found = dict[str, bytes]()
    places = [("", ROOT)]
    while places:
        place, directory = places.pop()
        for name, number in disk.listing(directory):
            if disk.nodes[number].is_directory:
                places.append((f"{place}/{name}", number))
            else:
                found[f"{place}/{name}"] = bytes(disk.nodes[number].data)
    return found


def outcomes(disk: Disk, losses: tuple[str, ...] = LOSSES) -> list[dict[str, bytes]]:
    """What cuts leave, for many seeds."""
    return [files(disk.after_cut(loss, random.Random(seed))) for loss in losses for seed in SEEDS]


# --- what is flushed ------------------------------------------------------------------------------


def test_what_is_flushed_with_its_names_survives_every_cut() -> None:
    disk = Disk()
    directory = disk.create("/run", DIRECTORY)
    number = written(disk, "/run/kept", NEW)
    for flushed in (number, directory, ROOT):
        disk.flush(flushed)
    written(disk, "/run/other", NEW)
    disk.rename("/run/other", "/run/another")
    assert all(left["/run/kept"] == NEW for left in outcomes(disk))


@pytest.mark.parametrize("seed", SEEDS)
def test_whatever_is_done_what_is_flushed_and_left_alone_survives(seed: int) -> None:
    """A long random sequence of changes; the law is kept by a list of its own."""
    chance, disk = random.Random(seed), Disk()
    durable, numbers = dict[str, bytes](), dict[str, int]()
    for _ in range(200):
        name = f"/{chance.randrange(6)}"
        what = chance.choice(("write", "write", "rename", "remove", "flush", "flush names"))
        if what == "write" and name not in numbers:
            numbers[name] = written(disk, name, chance.randbytes(700))
        elif what == "write":
            disk.write(numbers[name], chance.randrange(900), chance.randbytes(300))
        elif what == "rename" and name in numbers:
            new = f"/{chance.randrange(6)}"
            disk.rename(name, new)
            numbers[new] = numbers.pop(name)
            durable.pop(new, None)
        elif what == "remove" and name in numbers:
            disk.remove(name)
            del numbers[name]
        elif what == "flush" and name in numbers:
            disk.flush(numbers[name])
            disk.flush(ROOT)
            durable[name] = bytes(disk.nodes[numbers[name]].data)
            continue
        elif what == "flush names":
            disk.flush(ROOT)
            continue
        durable.pop(name, None)
    assert files(disk).keys() == numbers.keys()
    for left in outcomes(disk):
        assert {name: left.get(name) for name in durable} == durable


def test_a_file_takes_the_place_of_another_whole_or_not_at_all() -> None:
    disk = Disk()
    disk.flush(written(disk, "/record", b"old"))
    disk.flush(ROOT)
    disk.flush(written(disk, "/record.tmp", NEW))
    disk.rename("/record.tmp", "/record")
    found = {left["/record"] for left in outcomes(disk)}
    assert found == {b"old", NEW}


def test_an_orderly_end_loses_nothing() -> None:
    disk = Disk()
    written(disk, "/file", NEW)
    disk.end()
    assert all(left == {"/file": NEW} for left in outcomes(disk))


# --- what is not ----------------------------------------------------------------------------------


def test_without_any_flush_nothing_may_be_left() -> None:
    disk = Disk()
    disk.create("/run", DIRECTORY)
    written(disk, "/run/file", NEW)
    assert {} in outcomes(disk, (DROPPED,))


def test_a_flushed_file_may_lose_its_name_and_a_name_its_directory() -> None:
    disk = Disk()
    directory = disk.create("/run", DIRECTORY)
    disk.flush(written(disk, "/run/file", NEW))
    assert all("/run/file" not in left for left in outcomes(disk, (DROPPED,)))
    disk.flush(directory)
    assert all("/run/file" not in left for left in outcomes(disk, (DROPPED,)))
    disk.flush(ROOT)
    assert all(left["/run/file"] == NEW for left in outcomes(disk))


def test_a_rename_may_be_there_before_the_bytes_of_its_file() -> None:
    disk = Disk()
    written(disk, "/step.tmp", NEW)
    disk.rename("/step.tmp", "/step")
    found = [left.get("/step") for left in outcomes(disk, (REORDERED,))]
    assert None in found
    assert b"" in found
    assert NEW in found
    assert any(data not in (None, b"", NEW) for data in found)


def test_writes_are_lost_from_the_end_on_or_in_whole_sectors() -> None:
    disk = Disk()
    written(disk, "/file", NEW)
    disk.flush(ROOT)
    prefixes = {left["/file"] for left in outcomes(disk, (PARTIAL,))}
    assert prefixes == {NEW[:size] for size in range(0, len(NEW) + 1, 1000)}
    torn = [left["/file"] for left in outcomes(disk, (TORN,))]
    assert len({*torn}) > len(SEEDS) / 2
    for data in torn:
        for start in range(0, len(data), SECTOR):
            part, whole = data[start : start + SECTOR], NEW[start : start + SECTOR]
            # a write of 1000 bytes ends within a sector, which then has a part of each
            assert all(byte in (0, right) for byte, right in zip(part, whole, strict=False))


def test_a_cut_is_drawn_from_its_seed() -> None:
    disks = [Disk(), Disk()]
    for disk in disks:
        written(disk, "/file", NEW)
        disk.rename("/file", "/other")
    assert outcomes(disks[0]) == outcomes(disks[1])
    assert outcomes(disks[0]) == outcomes(disks[0])


def test_a_disk_that_lies_keeps_nothing_and_one_that_writes_back_keeps_most() -> None:
    lying, lazy = Disk(lies=True), Disk(writes_back=10)
    for disk in (lying, lazy):
        for name in range(10):
            disk.flush(written(disk, f"/{name}", b"data"))
        disk.flush(ROOT)
    assert outcomes(lying, (DROPPED,))[0] == {}
    lazy = Disk(writes_back=10)
    for name in range(10):
        written(lazy, f"/{name}", b"data")
    assert len(outcomes(lazy, (DROPPED,))[0]) == 10
    written(lazy, "/last", b"data")
    assert "/last" not in outcomes(lazy, (DROPPED,))[0]


# --- mounted --------------------------------------------------------------------------------------


def work(place: Path) -> list[object]:
    """What a program does to files, and what it is told."""
    told = list[object]()
    (place / "deep" / "er").mkdir(parents=True)
    (place / "deep" / "file").write_bytes(NEW)
    os.replace(place / "deep" / "file", place / "deep" / "er" / "file")
    with (place / "log").open("a") as log, (place / "log").open("a") as other:
        for file in (log, other, log):
            file.write("line\n")
            file.flush()
    (place / "log").chmod(0o600)
    os.utime(place / "log", (5, 6))
    told += [(place / "log").stat().st_mtime, oct((place / "log").stat().st_mode)]
    with (place / "deep" / "er" / "file").open("r+b") as file:
        with mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as memory:
            told.append(memory[:])
        fcntl.flock(file, fcntl.LOCK_EX)
        with (place / "deep" / "er" / "file").open("rb") as second:
            try:
                fcntl.flock(second, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                told.append("locked")
        file.truncate(7)
        os.fsync(file.fileno())
        (place / "new").write_bytes(b"new")
        (place / "new").rename(place / "deep" / "er" / "file")  # while the old one is open
        told += [file.read(), os.fstat(file.fileno()).st_size]
    with (place / "gone").open("w+b") as file:
        (place / "gone").unlink()
        file.write(b"unseen")
        file.seek(0)
        told += [file.read(), (place / "gone").exists()]
    for refused in (place.rmdir, (place / "deep").rmdir, (place / "none").stat):
        try:
            refused()
        except OSError as error:
            told.append(type(error).__name__)
    shutil.copytree(place / "deep", place / "copy")
    shutil.rmtree(place / "deep")
    (place / "empty").mkdir()
    (place / "copy").rename(place / "empty")
    return told


@mountable
def test_it_is_a_file_system_like_any_other(tmp_path: Path) -> None:
    plain, mounted = tmp_path / "plain", tmp_path / "mounted"
    plain.mkdir()
    mounted.mkdir()
    wanted = work(plain)
    with Mounted(mounted, Disk()) as disk:
        assert shutil.disk_usage(mounted).free > 2**30
        assert work(mounted) == wanted
        assert contents(mounted) == contents(plain)
    kept = {f"/{path}": data for path, data in contents(plain).items() if data is not None}
    assert kept == files(disk.disk)
    assert [*mounted.iterdir()] == []
    with Mounted(mounted, disk.disk):
        assert contents(mounted) == contents(plain)


COUNTER = """
import os, sys
for number in range(10**6):
    with open(f"{sys.argv[1]}/{number}.tmp", "wb") as file:
        file.write(b"%d" % number)
    os.rename(f"{sys.argv[1]}/{number}.tmp", f"{sys.argv[1]}/{number}")
"""


@mountable
@pytest.mark.parametrize("changes", [1, 2, 3, 30, 31])
def test_after_a_number_of_changes_nothing_more_is_done(tmp_path: Path, changes: int) -> None:
    with Mounted(tmp_path, Disk(), changes) as mounted:
        process = subprocess.Popen([sys.executable, "-c", COUNTER, tmp_path])
        assert mounted.is_cut(os.pidfd_open(process.pid))
        process.kill()
        mounted.let_fail()
        assert process.wait() == -9  # it never saw an error
    whole, rest = divmod(changes, 3)  # a creation, a write, a rename
    wanted = {f"/{number}": b"%d" % number for number in range(whole)}
    if rest:
        wanted[f"/{whole}.tmp"] = b"%d" % whole if rest == 2 else b""
    assert (mounted.changes, files(mounted.disk)) == (changes, wanted)


# --- the faults would find a flush that is missing ------------------------------------------------


@mountable
@pytest.mark.moment
@pytest.mark.parametrize("cut", [cut_runs, cut_recorders])
def test_where_nothing_is_flushed_something_said_to_be_committed_is_lost(
    cut: Callable[[Powered, int], str],
) -> None:
    with (
        powered(1, lies=True) as disk,
        pytest.raises((AssertionError, LCAError), match=r"lost|damaged|cannot be read"),
    ):
        cut(disk, 10)
