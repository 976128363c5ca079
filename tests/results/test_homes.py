"""The files of a run are the same in every home: in a file system, in a process's memory, on a
server that speaks like S3.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import lca_posthoc
from lca_posthoc import open_run
from lca_posthoc.errors import InputError, LCAError, ResourceError
from lca_posthoc.numerics.schema import KEEP
from lca_posthoc.replay.events import SpanDone
from lca_posthoc.replay.repair import repair
from lca_posthoc.results import Damage, Leftover, disk, hold, lock, verify
from lca_posthoc.results import object_store as stores
from lca_posthoc.results.commits import COMMITS, DATA, Commits
from lca_posthoc.results.lock import is_held
from lca_posthoc.results.packs import is_packed
from lca_posthoc.results.runfile import refuse_other
from tests.helpers.cli import lca
from tests.helpers.faults.clean_runs import lay_out, stored_chunks
from tests.helpers.object_server import SECRETS, ObjectServer

SEGMENTS, SPAN = 9, 2

# --- verbs ----------------------------------------------------------------------------------------


def filled(home: Path) -> dict[str, bytes]:
    files = {"a": b"", "b/c": b"one", "b/d e/f%2Fg": b"two" * 1000, "b/ü/h": b"\0\xff"}
    for name, data in files.items():
        path = home / name
        disk.ensure_directory(path.parent)
        disk.write_whole(path, data, durable=True)
    return files


def test_a_file_has_the_bytes_that_were_written_last(home: Path) -> None:
    for name, data in filled(home).items():
        assert disk.read(home / name) == data
        assert disk.read(home / name, 2) == data[:2]
        assert b"".join(disk.blocks(home / name)) == data
        assert disk.state(home / name).size == len(data)
        assert (disk.kind(home / name), disk.exists(home / name)) == ("file", True)
        before = disk.state(home / name).version
        disk.write_blocks(home / name, iter([b"an", b"other"]), durable=True)
        assert disk.read(home / name) == b"another"
        assert disk.state(home / name).version != before


@pytest.mark.parametrize(("start", "size"), [(0, 0), (0, 3), (2, 1), (2, 9), (5999, 1), (7000, 2)])
def test_a_part_ends_where_the_file_does(home: Path, start: int, size: int) -> None:
    filled(home)
    whole = disk.read(home / "b/d e/f%2Fg")
    assert disk.read_part(home / "b/d e/f%2Fg", start, size) == whole[start : start + size]


def test_names_and_sizes_are_those_of_what_is_there(home: Path) -> None:
    files = filled(home)
    assert disk.names(home) == ["a", "b"]
    assert disk.names(home / "b") == ["c", "d e", "ü"]
    assert disk.names(home / "missing") == []
    assert disk.kind(home / "b") == "directory"
    assert disk.kind(home / "b" / "missing") is None
    assert disk.sizes([home / name for name in files]) == [*map(len, files.values())]
    assert disk.sizes([home / "missing", home / "b/c"]) == [None, 3]
    assert disk.sizes([]) == []
    found = {
        (place / name).relative_to(home).as_posix()
        for place, _, names in disk.walk(home)
        for name in names
    }
    assert found == files.keys()


def test_a_walk_does_not_enter_what_is_taken_out(home: Path) -> None:
    filled(home)
    places = []
    for place, directories, _ in disk.walk(home):
        places.append(place)
        directories[:] = [name for name in directories if name != "d e"]
    assert {*places} == {home, home / "b", home / "b" / "ü"}


def test_what_is_removed_is_gone(home: Path) -> None:
    filled(home)
    disk.remove(home / "a")
    disk.remove(home / "a")
    assert not disk.exists(home / "a")
    with pytest.raises(FileNotFoundError):
        disk.read(home / "a")
    with pytest.raises(FileNotFoundError):
        disk.read_part(home / "a", 0, 1)
    with pytest.raises(FileNotFoundError):
        disk.state(home / "a")
    disk.remove_tree(home / "b")
    disk.remove_tree(home / "b", strict=not isinstance(home, Path))
    assert disk.names(home) == []


def test_lines_come_back_from_the_last_to_the_first(
    home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stores, "_LINES", 40)  # several parts
    disk.ensure_directory(home)
    lines = [f"line {number}" for number in range(20)]
    for line in lines:
        disk.append(home / "log", f"{line}\n")
    assert [*filter(None, disk.lines_from_the_end(home / "log"))] == [
        line.encode() for line in reversed(lines)
    ]


# --- one driver -----------------------------------------------------------------------------------


@pytest.fixture
def run_place(home: Path) -> Path:
    place = home / "run.lca"
    disk.ensure_directory(place / "log")
    return place


def test_a_second_driver_is_refused(run_place: Path) -> None:
    assert not is_held(run_place)
    with hold(run_place) as held:
        assert not held.unclean
        assert is_held(run_place)
        with pytest.raises(ResourceError, match=f"process {os.getpid()} on .* never share a run"):
            hold(run_place).__enter__()
    assert not is_held(run_place)
    with hold(run_place) as again:
        assert not again.unclean


def test_of_many_drivers_at_once_one_has_the_run(run_place: Path) -> None:
    start, over, outcomes = threading.Barrier(6), threading.Event(), list[str]()
    done = threading.Semaphore(0)

    def compete() -> None:
        start.wait()
        try:
            with hold(run_place):
                outcomes.append("has it")
                done.release()
                over.wait()
        except ResourceError:
            outcomes.append("refused")
            done.release()

    threads = [threading.Thread(target=compete) for _ in range(6)]
    for thread in threads:
        thread.start()
    for _ in threads:
        done.acquire()
    over.set()
    for thread in threads:
        thread.join()
    assert sorted(outcomes) == ["has it", *["refused"] * 5]


KILLED = """
import os, signal, sys
from lca_posthoc.checkpoints.paths import path_of
from lca_posthoc.results import hold
with hold(path_of(sys.argv[1])) as held:
    held.unclean = True
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_lock_of_a_driver_of_this_host_that_was_killed_is_taken_over_at_once(
    run_place: Path,
) -> None:
    if str(run_place).startswith("memory:"):
        pytest.skip("memory is that of one process: nobody who was killed has left a lock there")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(run_place)], check=False)
    assert killed.returncode == -9
    assert not is_held(run_place)
    with hold(run_place) as held:
        assert held.unclean


def test_the_lock_of_another_host_counts_as_long_as_its_heart_beats(
    run_place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    owner = {"host": "another", "pid": 1, "id": "x", "began": 1.0, "processes": "others"}
    disk.write_whole(run_place / "lock", json.dumps(owner).encode(), durable=False)
    assert is_held(run_place)
    with pytest.raises(ResourceError, match="process 1 on another"):
        hold(run_place).__enter__()
    monkeypatch.setattr(lock, "_STALE", -10.0)
    assert not is_held(run_place)
    with hold(run_place) as held:
        assert held.unclean


def test_another_machine_of_the_same_name_is_another_host(
    run_place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if isinstance(run_place, Path):
        pytest.skip("of one file system the kernel tells who works on it")
    owner = {**lock._identity(), "pid": 2**22 + 1, "processes": "of another machine"}
    disk.write_whole(run_place / "lock", json.dumps(owner).encode(), durable=False)
    with pytest.raises(ResourceError, match="never share a run"):
        hold(run_place).__enter__()


def test_a_driver_learns_that_it_was_taken_over_and_leaves_the_lock_to_the_other(
    run_place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lock, "_HEARTBEAT", 0.01)
    other = json.dumps({"host": "another", "pid": 1, "id": "x"}).encode()
    with hold(run_place) as held:
        disk.write_whole(run_place / "lock", other, durable=False)
        assert held.lost.wait(60)
    assert disk.read(run_place / "lock") == other


BROKEN: dict[str, tuple[Callable[[Any], bool], str]] = {
    "puts that ignore conditions": (
        lambda request: "if-none-match" in request.headers,
        "overwrites an existing file",
    ),
    "replacing without looking": (
        lambda request: "if-match" in request.headers,
        "replaces a file that has changed",
    ),
}


@pytest.mark.parametrize("case", BROKEN)
def test_a_store_that_breaks_a_promise_is_refused_with_the_reason(
    case: str, object_store: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    ignored, reason = BROKEN[case]
    monkeypatch.setattr(stores, "_FOUND_OUT", [])
    monkeypatch.setattr(
        object_store, "fate", lambda request: "unconditional" if ignored(request) else "through"
    )
    place = object_store.place() / "run.lca"
    with pytest.raises(ResourceError, match=reason):
        hold(place).__enter__()
    assert disk.names(place) == disk.names(place / "log") == []


def test_what_a_killed_driver_tried_is_removed_by_the_next(
    object_store: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    place = object_store.place() / "run.lca"
    host, dead = socket.gethostname(), 2**22 + 1
    for name in (f"{host}-{dead}-a", f"{host}-{os.getpid()}-b", "another-host-1-c"):
        disk.write_whole(place / "log" / f".trial-{name}", b"", durable=False)
    with hold(place):
        left = disk.names(place / "log")
    assert sorted(left) == sorted([".trial-another-host-1-c", f".trial-{host}-{os.getpid()}-b"])
    monkeypatch.setattr(stores, "_OLD", -60.0)
    with hold(place):
        assert disk.names(place / "log") == [f".trial-{host}-{os.getpid()}-b"]


def test_a_store_that_refuses_to_write_is_said_to(
    object_store: ObjectServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lca_posthoc.checkpoints.paths import path_of

    with pytest.raises(ResourceError, match=r"cannot write to s3://not-there/run\.lca") as caught:
        hold(path_of("s3://not-there/run.lca")).__enter__()
    assert not any(secret in str(caught.value) for secret in SECRETS)


# --- runs -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints and a task."""
    return lay_out(tmp_path_factory.mktemp("place"), SEGMENTS)


@pytest.fixture(scope="module")
def clean(place: Path) -> Callable[[str], Path]:
    """Returns an undisturbed run of a level in a file system."""

    def made(keep: str) -> Path:
        out = place / f"{keep}.lca"
        if not out.exists():
            replayed(place, out, keep)
        return out

    return made


def replayed(place: Path, out: Path, keep: str = "parameters", **options: Any) -> list[Any]:
    """Run every loss; the events."""
    events: list[Any] = []
    options = {"losses": ["all"], "span": SPAN, "keep": keep, **options}
    lca_posthoc.run(
        place / "checkpoints",
        place / "small_task.py",
        out=str(out),
        cluster="inline",
        progress=events.append,
        **options,
    )
    return events


def spans_done(events: list[Any]) -> list[tuple[int, tuple[str, ...]]]:
    return [(event.span, tuple(event.losses)) for event in events if isinstance(event, SpanDone)]


@pytest.mark.parametrize("keep", KEEP)
def test_a_run_has_the_same_bytes_in_every_home(
    keep: str, home: Path, place: Path, clean: Callable[[str], Path]
) -> None:
    out = home / "run.lca"
    replayed(place, out, keep)
    assert stored_chunks(out) == stored_chunks(clean(keep))
    assert [*verify(out)] == []
    assert not is_held(out)
    before = {name: disk.read(out / name) for name in ("run.json",)}
    assert spans_done(replayed(place, out, keep)) == []  # nothing is left to do
    assert before == {name: disk.read(out / name) for name in before}


def test_a_run_that_lost_spans_goes_on_to_the_same_bytes(
    home: Path, place: Path, clean: Callable[[str], Path]
) -> None:
    out = home / "run.lca"
    replayed(place, out)
    before = stored_chunks(out)
    for span in (1, 4):
        disk.remove(out / COMMITS / "train" / marker_name(out, "train", span))
    assert not lca_posthoc.open_run(out)["train"].progress()["complete"]
    assert spans_done(replayed(place, out)) == [(1, ("train",)), (4, ("train",))]
    assert stored_chunks(out) == before == stored_chunks(clean("parameters"))


def marker_name(out: Path, loss: str, span: int) -> str:
    return Commits(out, open_run(out).manifest, loss).marker(span).name


def test_losses_come_and_go_without_touching_each_other(
    home: Path, place: Path, clean: Callable[[str], Path]
) -> None:
    out = home / "run.lca"
    replayed(place, out, losses=["train"])
    train = stored_chunks(out)
    replayed(place, out, losses=["train", "validation"])
    both = stored_chunks(out)
    assert train.items() <= both.items()
    assert {path for path in both if "/train/" in path} == train.keys()
    assert lca("remove", out, "--loss", "validation").exit_code == 0
    assert stored_chunks(out) == train
    assert [*verify(out)] == []
    left = [place for place, _, names in disk.walk(out) if "validation" in str(place) and names]
    assert left == []


def test_a_run_takes_up_new_checkpoints(home: Path, place: Path, tmp_path: Path) -> None:
    shorter = tmp_path / "shorter"
    (shorter / "checkpoints").mkdir(parents=True)
    shutil.copy(place / "small_task.py", shorter)
    files = sorted((place / "checkpoints").glob("*.safetensors"))
    for file in files[:7]:
        shutil.copy2(file, shorter / "checkpoints")
    runs = home / "run.lca", tmp_path / "beside.lca"
    for out in runs:
        replayed(shorter, out)
    for file in files[7:]:
        shutil.copy2(file, shorter / "checkpoints")
    for out in runs:
        assert [span for span, _ in spans_done(replayed(shorter, out))] == [3, 4]
        assert [*verify(out)] == []
    assert stored_chunks(runs[0]) == stored_chunks(runs[1])


CHANGES: dict[str, Callable[[bytes], bytes | None]] = {
    "deleted": lambda data: None,
    "empty": lambda data: b"",
    "half": lambda data: data[: len(data) // 2],
    "a bit flipped": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "zeroed": lambda data: bytes(len(data)),
}


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("what", ["chunks", "marker"])
def test_changed_bytes_are_found_and_computed_again_alone(
    what: str, change: str, home: Path, place: Path, clean: Callable[[str], Path]
) -> None:
    out = home / "run.lca"
    replayed(place, out, "units")
    commits = Commits(out, open_run(out).manifest, "train")
    file = commits.marker(2) if what == "marker" else with_chunks_of(commits, 2)
    changed = CHANGES[change](disk.read(file))
    disk.remove(file)
    if changed is not None:
        disk.write_whole(file, changed, durable=False)
    if what == "marker" and changed is None:
        assert spans_done(replayed(place, out, "units")) == [(2, ("train",))]
    else:
        found = [each for each in verify(out) if isinstance(each, Damage)]
        assert {(each.loss, each.span) for each in found} == {("train", 2)}
        # an empty marker counts as none: the span is pending, and no number of it is read
        refusal = pytest.raises(LCAError, match=r"steps 4 to 6")
        with contextlib.nullcontext() if (what, change) == ("marker", "empty") else refusal:
            for part in ("tensors", "units", "steps"):
                getattr(open_run(out)["train"], part).load()
        events: list[Any] = []
        repair(str(out), place / "small_task.py", cluster="inline", progress=events.append)
        assert spans_done(events) == [(2, ("train",))]
    assert stored_chunks(out) == stored_chunks(clean("units"))
    assert [*verify(out)] == []


def with_chunks_of(commits: Commits, span: int) -> Path:
    """The pack of a span, or the file of one of its chunks."""
    seals = commits.load(span)["files"]
    packed = [path for path, seal in seals.items() if is_packed(seal)]
    return commits.pack(commits.marker(span)) if packed else commits.path / min(seals)


def test_large_chunks_are_files_of_their_own(
    home: Path, place: Path, clean: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lca_posthoc.results.chunk_writer.LARGEST", 120)
    out = home / "run.lca"
    replayed(place, out)
    seals = Commits(out, open_run(out).manifest, "train").load(0)["files"]
    kinds = {is_packed(seal) for seal in seals.values()}
    assert kinds == ({False} if isinstance(home, Path) else {False, True})
    assert stored_chunks(out) == stored_chunks(clean("parameters"))
    assert [*verify(out)] == []
    path, seal = next((path, seal) for path, seal in seals.items() if not is_packed(seal))
    disk.write_whole(out / path, bytes(seal[0]), durable=False)
    assert [damage.path for damage in verify(out) if isinstance(damage, Damage)] == [path]
    repair(str(out), place / "small_task.py", cluster="inline")
    assert [*verify(out)] == []


def test_what_nobody_speaks_for_is_a_leftover(home: Path, place: Path) -> None:
    out = home / "run.lca"
    replayed(place, out, "units")
    stray = out / DATA / "train" / "packs" / "000099-2"
    disk.ensure_directory(stray.parent)
    disk.write_whole(stray, b"x", durable=False)
    assert [*verify(out)] == [Leftover(f"{DATA}/train/packs/000099-2")]
    assert repair(str(out), place / "small_task.py", cluster="inline").leftovers == 1
    assert [*verify(out)] == []


def test_a_creation_that_was_killed_is_no_obstacle(
    home: Path, place: Path, clean: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = home / "run.lca"

    class Killed(BaseException):
        """What no clean-up stops for."""

    def killed(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("lca_posthoc.results.writer.write_manifest", killed)
        with pytest.raises(Killed):
            replayed(place, out, "units")
    disk.ensure_directory(out.parent)
    with pytest.raises(InputError, match="is not a run directory"):
        open_run(out)
    replayed(place, out, "units")
    assert stored_chunks(out) == stored_chunks(clean("units"))
    assert [*verify(out)] == []


def test_what_is_no_run_is_not_written_into(home: Path, place: Path) -> None:
    disk.ensure_directory(home / "run.lca")
    disk.write_whole(home / "run.lca" / "notes.txt", b"mine", durable=False)
    with pytest.raises(InputError, match="exists and is not a run directory"):
        replayed(place, home / "run.lca")
    assert disk.names(home / "run.lca") == ["notes.txt"]


def test_a_run_that_another_driver_has_just_created_is_no_obstacle(
    object_store: ObjectServer, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = object_store.place() / "run.lca"
    replayed(place, out)
    # asked before the other driver had written run.json
    monkeypatch.setattr("lca_posthoc.results.runfile.exists", lambda _: False)
    refuse_other(out)


# --- a store as users meet it ---------------------------------------------------------------------


def test_every_command_reads_a_run_at_a_url(
    object_store: ObjectServer, place: Path, tmp_path: Path
) -> None:
    out = object_store.place() / "run.lca"
    arguments = (place / "checkpoints", "--task", place / "small_task.py", "--out", out)
    ran = lca("run", *arguments, "--loss", "all", "--cluster", "local", "--workers", 2)
    assert ran.exit_code == 0, ran.output
    assert f"results in {out}" in ran.stdout
    for command in (
        ("status", out),
        ("status", out, "--json"),
        ("summary", out),
        ("verify", out),
        ("plot", out, "layers", "-o", tmp_path / "layers.png"),
        ("report", out, "-o", tmp_path / "report.html"),
        ("export", out, "-o", tmp_path / "tables", "--format", "csv"),
        ("compare", out, f"again={out}"),
        ("plan", *arguments),
    ):
        result = lca(*command)
        assert result.exit_code == 0, (command, result.output)
        assert "Traceback" not in result.output
    assert (tmp_path / "report.html").stat().st_size > 10_000


def test_reading_a_finished_run_lists_nothing(object_store: ObjectServer, place: Path) -> None:
    out = object_store.place() / "run.lca"
    replayed(place, out)
    object_store.requests.clear()
    run = open_run(out)
    for name in run:
        assert run[name].progress()["complete"]
        run[name].tensors.load()
        run[name].allocation.load()
        run[name].totals.load()
    listings = [one.path for one in object_store.requests if "list-type" in one.path]
    assert listings == []


def test_reading_all_arrays_of_a_table_requests_each_marker_and_small_pack_once(
    object_store: ObjectServer, place: Path
) -> None:
    out = object_store.place() / "run.lca"
    replayed(place, out, "tensors", losses=["train"])
    run = open_run(out)
    object_store.requests.clear()
    assert len(run["train"].steps.load().data_vars) > 3
    requested = Counter(one.path for one in object_store.requests if one.method == "GET")
    packs = [path for path in requested if "/packs/" in path]
    assert len(packs) == run["train"].manifest.spans
    assert {*requested.values()} == {1}, requested


@pytest.mark.parametrize("keep", KEEP)
def test_a_span_is_few_puts(keep: str, object_store: ObjectServer, place: Path) -> None:
    """Of each loss a pack, a marker, and totals that wait; and lines of the log."""
    puts = {}
    for segments in (4, 8):
        out = object_store.place() / "run.lca"
        object_store.requests.clear()
        replayed(place, out, keep, losses=["train"], steps=f":{segments}")
        puts[segments] = object_store.counted()["PUT"]
    most = 4 if keep in ("statistics", "parameters") else 3
    assert puts[8] - puts[4] <= 2 * most


def test_a_copy_on_a_file_system_reads_the_same(
    object_store: ObjectServer, place: Path, tmp_path: Path
) -> None:
    out, copy = object_store.place() / "run.lca", tmp_path / "copy.lca"
    replayed(place, out)
    for directory, _, names in disk.walk(out):
        for name in names:
            target = copy / (directory / name).relative_to(out).as_posix()
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(disk.read(directory / name))
    assert stored_chunks(copy) == stored_chunks(out)
    assert [*verify(copy)] == []
    disk.remove(copy / COMMITS / "train" / marker_name(copy, "train", 1))
    assert spans_done(replayed(place, copy)) == [(1, ("train",))]
    assert stored_chunks(copy) == stored_chunks(out)


def test_no_secret_is_in_a_run_or_an_error(
    object_store: ObjectServer, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = object_store.place() / "run.lca"
    arguments = ("run", place / "checkpoints", "--task", place / "small_task.py")
    ran = lca(*arguments, "--out", out, "--cluster", "inline")
    said = [ran.output]
    for directory, _, names in disk.walk(out):
        for name in names:
            data = disk.read(directory / name)
            assert not any(secret.encode() in data for secret in SECRETS), name
    monkeypatch.setattr(object_store, "fate", lambda request: "refused")
    monkeypatch.setattr(stores, "_RETRIES", 0)
    stores._store.cache_clear()
    said.append(lca("summary", object_store.place() / "run.lca").output)
    key = f"s3://{SECRETS[0]}:{SECRETS[1]}@{object_store.bucket}/run.lca"
    refusal = lca(*arguments, "--out", key, "--cluster", "inline")
    assert refusal.exit_code == 2, refusal.output
    said += [refusal.output, lca("summary", key).output, lca("status", key).output]
    assert not any(secret in text for secret in SECRETS for text in said)


def test_a_url_without_its_driver_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    monkeypatch.delitem(sys.modules, stores.__name__)
    monkeypatch.delattr(lca_posthoc.results, "object_store")
    with pytest.raises(ResourceError, match=r"pip install 'lca_posthoc\[remote\]'"):
        open_run("s3://nowhere/run.lca")
