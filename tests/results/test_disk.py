"""The verbs by which files of a run are read and changed, and what each promises."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lca_posthoc.results import disk, local_files

KINDS: dict[str, tuple[Callable[[Path], object], str | None, str | None]] = {
    # what is made, its kind, and the kind of what it leads to
    "nothing": (lambda path: None, None, None),
    "file": (lambda path: path.write_bytes(b"x"), "file", "file"),
    "directory": (Path.mkdir, "directory", "directory"),
    "link to a directory": (lambda path: path.symlink_to(path.parent), "link", "directory"),
    "link to nothing": (lambda path: path.symlink_to("nothing"), "link", None),
    "link to itself": (lambda path: path.symlink_to(path.name), "link", None),
    "pipe": (os.mkfifo, "other", "other"),
}


@pytest.mark.parametrize("case", KINDS)
def test_a_kind_is_told_with_and_without_following_links(case: str, tmp_path: Path) -> None:
    make, kind, followed = KINDS[case]
    make(tmp_path / "x")
    assert disk.kind(tmp_path / "x") == kind
    assert disk.kind(tmp_path / "x", follow_links=True) == followed
    assert disk.exists(tmp_path / "x") is (followed is not None)


def test_below_a_file_there_is_nothing(tmp_path: Path) -> None:
    (tmp_path / "x").write_bytes(b"")
    assert disk.kind(tmp_path / "x" / "y") is None
    assert disk.names(tmp_path / "x") == disk.names(tmp_path / "y") == []


@pytest.mark.parametrize("durable", [False, True])
@pytest.mark.parametrize("temporary", [None, "its-own.tmp"])
def test_a_write_that_fails_leaves_the_old_bytes_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, durable: bool, temporary: str | None
) -> None:
    disk.write_whole(tmp_path / "x", b"old", durable)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", full)
        with pytest.raises(OSError, match="full"):
            disk.write_whole(tmp_path / "x", b"new", durable, temporary=temporary)
    assert disk.names(tmp_path) == ["x"]
    assert disk.read(tmp_path / "x") == b"old"
    disk.write_whole(tmp_path / "x", b"new", durable, temporary=temporary)
    assert disk.names(tmp_path) == ["x"]
    assert disk.read(tmp_path / "x") == b"new"


def test_a_write_replaces_a_link_and_not_what_it_leads_to(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_bytes(b"theirs")
    (tmp_path / "x").symlink_to("theirs")
    disk.write_whole(tmp_path / "x", b"ours", durable=False)
    assert (disk.read(tmp_path / "theirs"), disk.read(tmp_path / "x")) == (b"theirs", b"ours")
    assert disk.kind(tmp_path / "x") == "file"


def test_a_version_is_another_one_after_every_write(tmp_path: Path) -> None:
    versions = set()
    for _ in range(20):
        disk.write_whole(tmp_path / "x", b"same", durable=False)
        os.utime(tmp_path / "x", (0, 0))
        versions.add(disk.state(tmp_path / "x").version)
    assert len(versions) == 20


def test_a_directory_is_published_only_where_none_is(tmp_path: Path) -> None:
    for name in ("one", "two"):
        disk.create_directory(tmp_path / name)
        disk.write_whole(tmp_path / name / "x", name.encode(), durable=False)
    disk.publish(tmp_path / "one", tmp_path / "run", durable=True)
    with pytest.raises(FileExistsError):
        disk.publish(tmp_path / "two", tmp_path / "run", durable=True)
    assert disk.read(tmp_path / "run" / "x") == b"one"
    assert disk.names(tmp_path) == ["run", "two"]
    with pytest.raises(FileExistsError):
        disk.create_directory(tmp_path / "run")
    disk.ensure_directory(tmp_path / "run" / "a" / "b")


def test_what_is_gone_already_is_removed(tmp_path: Path) -> None:
    disk.remove(tmp_path / "x")
    (tmp_path / "x").symlink_to("y")
    disk.remove(tmp_path / "x")
    disk.remove_tree(tmp_path / "x")
    assert disk.names(tmp_path) == []
    with pytest.raises(FileNotFoundError):
        disk.remove_tree(tmp_path / "x", strict=True)


@settings(deadline=None)  # it writes files
@given(data=st.binary(max_size=60) | st.text("ab\n", max_size=60).map(str.encode))
@pytest.mark.parametrize("block", [1, 7, 1000])
def test_lines_from_the_end_are_the_lines_backwards(
    tmp_path_factory: pytest.TempPathFactory, block: int, data: bytes
) -> None:
    path = tmp_path_factory.mktemp("lines") / "log"
    path.write_bytes(data)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(local_files, "_BLOCK_FROM_THE_END", block)
        patch.setattr(local_files, "_BLOCK", block)
        assert list(disk.lines_from_the_end(path)) == data.split(b"\n")[::-1]
        assert b"".join(disk.blocks(path)) == disk.read(path) == data
    assert disk.read(path, 5) == data[:5]


def test_a_lock_is_one_holders_and_is_never_behind_a_link(tmp_path: Path) -> None:
    path = tmp_path / "lock"
    with pytest.raises(FileNotFoundError):
        disk.open_lock(path)
    with disk.open_lock(path, create=True) as file:
        assert file.acquire()
        file.write(b"a longer owner")
        file.write(b"owner")
        with disk.open_lock(path) as other:
            assert other.read(100) == b"owner"
            assert other.read(3) == b"own"
            with pytest.raises(BlockingIOError):
                other.acquire(shared=True)
        os.utime(path, (0, 0))
        assert file.age() > 10**9
        disk.beat(path)
        assert file.age() < 10**9
    with disk.open_lock(path) as other:
        assert other.acquire(shared=True)
    path.rename(tmp_path / "elsewhere")
    path.symlink_to("elsewhere")
    with pytest.raises(OSError, match=r"lock") as told:
        disk.open_lock(path, create=True)
    assert told.value.errno == errno.ELOOP
