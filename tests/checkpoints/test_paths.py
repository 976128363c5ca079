"""Checkpoints behind URLs: the numbers of those on disk, each file fetched once, and what is out of
reach is said.
"""

from __future__ import annotations

import functools
import http.server
import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from safetensors.torch import save_file

import lca_posthoc
from lca_posthoc import open_trajectory
from lca_posthoc.checkpoints import paths
from lca_posthoc.checkpoints.cache import Cache
from lca_posthoc.checkpoints.cache import cache as cache_of_this_machine
from lca_posthoc.checkpoints.trajectory import read_checkpoint
from lca_posthoc.errors import InputError, ResourceError, SpanError
from tests.helpers.cli import STEPS, iterates, lca, record, refused, run_lca, step_file, write_task
from tests.helpers.followed_training import train


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of this test's own."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "lca_posthoc"


class Ranged(http.server.SimpleHTTPRequestHandler):
    """Serves a directory, parts of files as well, and notes what was asked for."""

    asked: list[str]

    def do_GET(self) -> None:
        self.asked.append(self.path)
        path = Path(self.translate_path(self.path))
        wanted = self.headers.get("Range")
        if wanted is None or not path.is_file():
            super().do_GET()
            return
        first, last = wanted.removeprefix("bytes=").split("-")
        data = path.read_bytes()
        part = data[int(first) : int(last) + 1 if last else None]
        self.send_response(206)
        self.send_header("Content-Range", f"bytes {first}-{int(first) + len(part) - 1}/{len(data)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        self.wfile.write(part)

    def end_headers(self) -> None:
        self.send_header("Accept-Ranges", "bytes")
        super().end_headers()

    def log_message(self, *given: Any) -> None:
        pass


@pytest.fixture
def served(tmp_path: Path) -> Iterator[tuple[str, list[str]]]:
    """The URL under which `tmp_path` is served, and the paths that were asked for."""
    asked: list[str] = []
    handler = functools.partial(
        type("Handler", (Ranged,), {"asked": asked}), directory=str(tmp_path)
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}", asked
        server.shutdown()
        thread.join()


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[str]:
    """The small iterates in fsspec's own memory."""
    files = fsspec.filesystem("memory")
    files.put(str(record(tmp_path / "on disk")), "/ck", recursive=True)
    yield "memory://ck"
    files.rm("/ck", recursive=True)


def arrays(run: Path) -> dict[str, Any]:
    opened = lca_posthoc.open_run(run)["train"]
    return {name: opened.allocation[name].values for name in opened.allocation.data_vars}


def same(one: Path, other: Path) -> None:
    ours, theirs = arrays(one), arrays(other)
    assert ours.keys() == theirs.keys()
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize("cluster", ["inline", "local"])
def test_a_run_over_http_is_that_of_the_directory(
    tmp_path: Path, served: tuple[str, list[str]], cluster: str, cache: Path
) -> None:
    url, asked = served
    task = write_task(tmp_path / "task.py")
    assert run_lca(record(tmp_path / "ck"), task, tmp_path / "near.lca").exit_code == 0
    where = ("--cluster", cluster, *(("--workers", 2) if cluster == "local" else ()))
    done = lca("run", f"{url}/ck", "--task", task, "--out", tmp_path / "far.lca", *where)
    assert done.exit_code == 0, done.stderr
    same(tmp_path / "near.lca", tmp_path / "far.lca")
    assert len(list(cache.iterdir())) == len(STEPS)
    asked.clear()
    again = ("--loss", "validation", "--cluster", "inline")
    assert (
        lca("run", f"{url}/ck", "--task", task, "--out", tmp_path / "far.lca", *again).exit_code
        == 0
    )
    of_the_run = sum(path.endswith(".safetensors") for path in asked)
    asked.clear()
    open_trajectory(f"{url}/ck")
    # workers asked for nothing
    assert of_the_run == sum(path.endswith(".safetensors") for path in asked) > 0
    assert lca("verify", tmp_path / "far.lca").exit_code == 0
    assert lca("repair", tmp_path / "far.lca", "--task", task).exit_code == 0


def test_causes_over_http_are_those_of_the_directory_and_take_no_other_moments(
    tmp_path: Path, served: tuple[str, list[str]]
) -> None:
    train(tmp_path, 3)
    task, (url, _) = write_task(tmp_path / "task.py"), served
    for checkpoints, out in ((tmp_path / "checkpoints", "near"), (f"{url}/checkpoints", "far")):
        done = run_lca(checkpoints, task, tmp_path / out, "--causes")  # type: ignore[arg-type]
        assert done.exit_code == 0, done.stderr
    near, far = (lca_posthoc.open_run(tmp_path / out) for out in ("near", "far"))
    assert near.manifest.checkpoints == far.manifest.checkpoints
    assert near["train"].causes.identical(far["train"].causes)
    moments = near.manifest.checkpoints[2].moments_file
    copy = (tmp_path / "checkpoints" / moments).read_bytes()
    (tmp_path / "checkpoints" / moments).write_bytes(copy[:-1] + bytes([copy[-1] ^ 1]))
    again = run_lca(f"{url}/checkpoints", task, tmp_path / "far")  # type: ignore[arg-type]
    refused(again, f"{url}/checkpoints/{moments} (step 2)", "is another file")


def test_a_run_over_memory_is_that_of_the_directory(tmp_path: Path, memory: str) -> None:
    task = write_task(tmp_path / "task.py")
    assert run_lca(tmp_path / "on disk", task, tmp_path / "near.lca").exit_code == 0
    assert run_lca(memory, task, tmp_path / "far.lca").exit_code == 0  # type: ignore[arg-type]
    same(tmp_path / "near.lca", tmp_path / "far.lca")


def test_layouts_and_steps_are_found_as_on_disk(
    tmp_path: Path, served: tuple[str, list[str]]
) -> None:
    for step in (10, 20):
        tensors = list(iterates()[step // 10].items())
        for part, held in enumerate((tensors[:2], tensors[2:])):
            (tmp_path / f"checkpoint-{step}").mkdir(exist_ok=True)
            save_file(
                dict(held),
                tmp_path / f"checkpoint-{step}" / f"model-0000{part + 1}-of-00002.safetensors",
            )
        names = {
            name: f"model-0000{1 + (at >= 2)}-of-00002.safetensors"
            for at, (name, _) in enumerate(tensors)
        }
        text = '{"weight_map": ' + str(names).replace("'", '"') + "}"
        (tmp_path / f"checkpoint-{step}" / "model.safetensors.index.json").write_text(text)
        (tmp_path / f"checkpoint-{step}" / "trainer_state.json").write_text(
            f'{{"global_step": {step + 1}}}'
        )
    files = fsspec.filesystem("memory")
    files.put(str(tmp_path), "/hub", recursive=True)
    near = open_trajectory(tmp_path)
    for far in (
        open_trajectory("memory://hub"),
        open_trajectory(served[0]),
        open_trajectory(served[0] + "/"),
    ):
        assert far.steps == near.steps == [11, 21]
        assert far.tensors == near.tensors
        assert [(each.size, each.fingerprint) for each in far.checkpoints] == [
            (each.size, each.fingerprint) for each in near.checkpoints
        ]
    files.rm("/hub", recursive=True)


def test_a_cached_file_is_read_once_and_one_that_changed_is_not_taken(
    tmp_path: Path, memory: str, cache: Path
) -> None:
    trajectory = open_trajectory(memory)
    names = dict.fromkeys(iterates()[0])
    first = trajectory.checkpoints[0]
    before = read_checkpoint(first, {name: name for name in names})
    files = fsspec.filesystem("memory")
    files.pipe(
        "/ck/step_00000000.safetensors", step_file(tmp_path / "on disk", STEPS[1]).read_bytes()
    )
    assert all((read_checkpoint(first, {name: name})[name] == before[name]).all() for name in names)
    (kept,) = cache.iterdir()
    kept.write_bytes(kept.read_bytes()[:-20])  # what a power failure leaves
    with pytest.raises(SpanError, match="changed since the run was created"):
        read_checkpoint(first, {name: name for name in names})


# what is asked for, in order, of files of 100 bytes; what is fetched with room for three of them
USES = {
    "each once": ("abc", "abc"),
    "again": ("abcabc", "abc"),
    "the first goes first": ("abcdbcd", "abcd"),
    "what was used last stays": ("abcadab", "abcdb"),
    "more than fit, round and round": ("abcdabcd", "abcdabcd"),
}


@pytest.mark.parametrize("case", USES)
def test_what_was_used_longest_ago_leaves_the_cache(
    tmp_path: Path, case: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, fetched = USES[case]
    clock = iter(range(1000))
    touch = os.utime
    monkeypatch.setattr(os, "utime", lambda path: touch(path, (0, next(clock) + 10**6)))
    kept, log = Cache(tmp_path / "kept", 3 * 104 + 50), ""
    for name in asked:

        def fetch(name: str = name) -> bytes:
            nonlocal log
            log += name
            return name.encode() * 100

        assert kept.take(name, 7, fetch) == name.encode() * 100
        for path in sorted((tmp_path / "kept").iterdir(), key=lambda path: path.stat().st_mtime):
            if path.stat().st_mtime > 10**8:  # just written: give it the next moment too
                os.utime(path)
        assert sum(path.stat().st_size for path in (tmp_path / "kept").iterdir()) <= kept.size
    assert log == fetched


def test_many_processes_share_the_cache_within_its_bound(tmp_path: Path) -> None:
    """Each asks for all files, in an order of its own, and measures after each."""
    code = (
        "import random, sys\nfrom pathlib import Path\n"
        "from lca_posthoc.base.locks import alone_in\n"
        "from lca_posthoc.checkpoints.cache import Cache\n"
        "place, seed = Path(sys.argv[1]), int(sys.argv[2])\n"
        "kept, order, most = Cache(place, 40_000), [*range(20)] * 15, 0\n"
        "random.Random(seed).shuffle(order)\n"
        "for name in order:\n"
        "    data = bytes([name]) * (5000 + name)\n"
        "    assert kept.take(str(name), 1, lambda: data) == data\n"
        "    with alone_in(place):\n"
        "        most = max(most, sum(path.stat().st_size for path in place.iterdir()))\n"
        "assert most <= 40_000, most\n"
    )
    workers = [
        subprocess.Popen([sys.executable, "-c", code, str(tmp_path / "kept"), str(seed)])
        for seed in range(4)
    ]
    assert [worker.wait(timeout=120) for worker in workers] == [0] * 4
    sizes = [path.stat().st_size for path in (tmp_path / "kept").iterdir()]
    assert len(sizes) == 7
    assert not list((tmp_path / "kept").glob("*.tmp"))


def test_what_a_killed_process_left_unfinished_goes(tmp_path: Path) -> None:
    kept = Cache(tmp_path, 500)
    left = tmp_path / ".killed.tmp"
    left.write_bytes(bytes(450))
    assert kept.take("a", 1, lambda: b"a" * 100) == b"a" * 100
    assert [path.name for path in tmp_path.iterdir()] == [".killed.tmp"]  # perhaps still written
    os.utime(left, (0, time.time() - 7200))
    kept.take("a", 1, lambda: b"a" * 100)
    (copy,) = tmp_path.iterdir()
    assert copy.stat().st_size == 104


SIZES = {"0": 0, "50GB": 50 * 10**9, "1.5 tb": 15 * 10**11, "300": 300, "2 kB": 2000}


@pytest.mark.parametrize("text", SIZES)
def test_the_bound_is_read_from_the_environment(
    tmp_path: Path, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LCA_CACHE_SIZE", text)
    monkeypatch.setenv("LCA_CACHE", str(tmp_path / "elsewhere"))
    expected = Cache(tmp_path / "elsewhere", SIZES[text]) if SIZES[text] else None
    assert cache_of_this_machine() == expected


@pytest.mark.parametrize("text", ["much", "-1", "5G", "1e9", "50 GB of it"])
def test_a_bound_that_makes_no_sense_is_refused(
    memory: str, text: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LCA_CACHE_SIZE", text)
    with pytest.raises(InputError, match=r"\$LCA_CACHE_SIZE is .*, which is not a number of bytes"):
        open_trajectory(memory)


def test_files_larger_than_the_bound_are_not_kept(
    memory: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LCA_CACHE_SIZE", "1kB")
    first = open_trajectory(memory).checkpoints[0]
    assert set(read_checkpoint(first, {name: name for name in iterates()[0]})) == set(iterates()[0])
    assert not cache.exists()


def test_a_cache_that_cannot_be_written_to_harms_nothing(memory: str, cache: Path) -> None:
    cache.parent.mkdir(parents=True)
    cache.write_text("a file where the directory would be")
    first = open_trajectory(memory).checkpoints[0]
    assert set(read_checkpoint(first, {name: name for name in iterates()[0]})) == set(iterates()[0])


def test_a_url_of_this_machines_own_files_is_a_path(tmp_path: Path, cache: Path) -> None:
    found = open_trajectory(f"file://{record(tmp_path / 'ck')}")
    assert found.root == tmp_path / "ck"
    read_checkpoint(found.checkpoints[0], {name: name for name in iterates()[0]})
    assert not cache.exists()


@pytest.mark.parametrize(
    ("where", "kind", "message"),
    [
        ("memory://nothing", InputError, "memory://nothing is not a directory of checkpoints"),
        (
            "http://127.0.0.1:9/ck",
            InputError,
            r"cannot look into http://127.0.0.1:9/ck: "
            r".*[Cc]onnect",
        ),
        (
            "http://me:secret@127.0.0.1:9/ck",
            InputError,
            "it holds no passwords and no queries; this http one does",
        ),
        (
            "http://127.0.0.1:9/ck?signature=7",
            InputError,
            "it holds no passwords and no queries; this http one does",
        ),
        ("gopher://somewhere/ck", ResourceError, "fsspec knows no 'gopher'. Install its driver"),
    ],
)
def test_what_is_out_of_reach_is_said(where: str, kind: type[Exception], message: str) -> None:
    with pytest.raises(kind, match=message):
        open_trajectory(where)


WITHOUT = """
import sys
sys.modules.update(dict.fromkeys(sys.argv[1:]))
from lca_posthoc import errors, open_trajectory
try:
    open_trajectory("s3://bucket/ck")
except errors.ResourceError as error:
    print(error)
"""


@pytest.mark.parametrize(
    ("absent", "message"),
    [
        (["s3fs", "obstore.fsspec"], "s3://bucket/ck: Install s3fs to access S3."),
        (["upath"], "needs universal_pathlib: pip install 'lca_posthoc[remote]'."),
    ],
)
def test_a_driver_that_is_not_installed_is_named(absent: list[str], message: str) -> None:
    """In a process of its own, as fsspec remembers the driver that it found for a kind of URL."""
    command = [sys.executable, "-c", WITHOUT, *absent]
    said = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert message in said


def test_what_a_driver_says_is_told_on_one_line() -> None:
    with pytest.raises(OSError, match="403") as caught, paths.reached(Path("anywhere")):
        raise OSError("Generic S3 error: 403\n\nDebug source:\nGeneric { store }")
    assert caught.value.strerror == "OSError: Generic S3 error: 403"


def test_results_of_remote_checkpoints_go_where_they_are_told_to(
    tmp_path: Path, memory: str
) -> None:
    task = write_task(tmp_path / "task.py")
    message = "memory://ck is remote: name a directory or a writable URL"
    refused(lca("run", memory, "--task", task, "--cluster", "inline"), message)
    assert lca("plan", memory, "--task", task).exit_code == 0
    for out in ("memory://results/run.lca", f"file://{tmp_path}/run.lca"):
        ran = lca("run", memory, "--task", task, "--cluster", "inline", "--out", out)
        assert ran.exit_code == 0, ran.output
        assert lca("summary", out).exit_code == 0
    refused(
        lca("import", "http://127.0.0.1/saved", tmp_path / "made"),
        "http://127.0.0.1/saved is a URL, and an import reads",
    )


def test_a_driver_that_fails_in_its_own_way_is_said(
    tmp_path: Path, memory: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Odd(Exception):
        """What some driver raises, neither an OSError nor ours."""

    def fails(*given: Any, **more: Any) -> None:
        raise Odd("no parts")

    monkeypatch.setattr(type(fsspec.filesystem("memory")), "_open", fails)
    with pytest.raises(
        InputError,
        match=r"cannot read checkpoint file memory://ck/step_00000000.safetensors: "
        r"Odd: no parts",
    ):
        open_trajectory(memory)
    assert paths.is_remote(paths.located(memory))
