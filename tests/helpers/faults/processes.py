"""Drivers as processes that can be killed, forked from one that has imported everything; who works,
and how often on what.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import functools
import multiprocessing
import os
import runpy
import shutil
import signal
import sys
import tempfile
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import psutil

from lca_posthoc import results

from . import clean_runs

SITE = Path(__file__).with_name("site")
HANGS = 120.0  # seconds after which a process is taken to hang
MEMORY = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None
PRELOADED = (
    "distributed",
    "lca_posthoc.numerics.allocation",
    "lca_posthoc.cli.run",
    "lca_posthoc.cli.summary",
    "lca_posthoc.numerics.objective",
    "lca_posthoc.replay.worker.spans",
    "tests.helpers.faults.processes",
    "torch._dynamo",
    "zarr",
)
# CAP_DAC_OVERRIDE and CAP_DAC_READ_SEARCH: without them root is refused files like everybody
CAPABILITIES = (1, 2)


def counting(log: Path) -> dict[str, str]:
    """The environment of processes that note every begin of a span."""
    path = os.pathsep.join([str(SITE), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {"PYTHONPATH": path, "LCA_FAULTS_LOG": str(log)}


def held(released: Path, span: int) -> dict[str, str]:
    """The environment of processes whose spans from `span` on wait until the file `released`
    exists.
    """
    path = counting(Path())["PYTHONPATH"]
    return {"PYTHONPATH": path, "LCA_FAULTS_HELD": f"{span}:{released}"}


def begun(log: Path) -> Counter[int]:
    """How often each span was begun."""
    return (
        Counter(int(line.split()[0]) for line in log.read_text().splitlines())
        if log.exists()
        else Counter()
    )


def extra(log: Path) -> int:
    """How many executions there were beyond one of each span."""
    counts = begun(log)
    return counts.total() - len(counts)


class Driver:
    """A process of a session of its own, forked and not started anew: what it imports is there
    already.
    """

    def __init__(
        self, arguments: Sequence[str], place: Path, environment: Mapping[str, str], powerless: bool
    ) -> None:
        name = uuid.uuid4().hex
        self._err = place / f".{name}.err"
        streams = (str(place / f".{name}.out"), str(self._err))
        self._process = _server().Process(
            target=_main, args=(list(arguments), streams, dict(environment), powerless)
        )
        self._process.start()
        assert self._process.pid is not None
        self.pid: int = self._process.pid

    @property
    def returncode(self) -> int | None:
        """As of `subprocess`: minus the signal that ended it."""
        return self._process.exitcode

    @property
    def sentinel(self) -> int:
        """A descriptor that becomes readable when it ends."""
        return self._process.sentinel

    def wait(self, seconds: float) -> bool:
        """Whether it ended within so many seconds."""
        self._process.join(seconds)
        return self._process.exitcode is not None

    def until(self, ready: Callable[[], object]) -> bool:
        """Wait until `ready()` holds; False where the process ends before."""
        while not ready():
            if self.wait(0.005):
                return False
        return True

    def finished(self, seconds: float = HANGS) -> int:
        """Its exit code; one that hangs is killed and is a failure."""
        if not self.wait(seconds):
            self.kill()
            raise AssertionError(f"no end within {seconds} s: {self.said}")
        assert self.returncode is not None
        return self.returncode

    @property
    def said(self) -> str:
        """What it wrote to stderr."""
        return self._err.read_text() if self._err.exists() else ""

    def kill(self) -> None:
        """Kill -9 of this process and no other."""
        self._process.kill()
        self._process.join()

    def session(self) -> list[psutil.Process]:
        """Every process of its session that lives, itself among them."""
        processes = []
        for process in psutil.process_iter():
            with contextlib.suppress(ProcessLookupError):
                if os.getsid(process.pid) == self.pid:
                    processes.append(process)
        return processes

    def workers(self) -> list[psutil.Process]:
        """Its worker processes that live."""
        try:
            children = psutil.Process(self.pid).children(recursive=True)
        except psutil.NoSuchProcess:
            return []
        return [each for each in children if _is_worker(each)]


def drive(
    place: Path,
    out: Path,
    *options: object,
    environment: Mapping[str, str] | None = None,
    powerless: bool = False,
    span: int = clean_runs.SPAN,
    keep: str = "parameters",
) -> Driver:
    """`clean_runs.command` as such a process; `powerless` is root without its power over files."""
    options = ("--keep", keep, *options)
    with mock.patch.object(
        clean_runs, "SCRIPT", clean_runs.SCRIPT.replace(f"*_: {clean_runs.SPAN}", f"*_: {span}")
    ):
        return Driver(
            clean_runs.command(place, out, *options)[1:], place, environment or {}, powerless
        )


def _is_worker(process: psutil.Process) -> bool:
    try:
        return process.status() != psutil.STATUS_ZOMBIE and "spawn_main" in " ".join(
            process.cmdline()
        )
    except psutil.NoSuchProcess:
        return False


@functools.cache
def _server() -> multiprocessing.context.ForkServerContext:
    from multiprocessing import forkserver

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(PRELOADED))
    with mock.patch.dict(
        os.environ, {**counting(Path()), "LCA_FAULTS_LOG": "", "OMP_NUM_THREADS": "1"}
    ):
        forkserver.ensure_running()
    warm = context.Process(target=os.getpid)  # so that no measured driver waits for the imports
    warm.start()
    warm.join()
    return context


def _main(
    arguments: list[str], streams: Sequence[str], environment: Mapping[str, str], powerless: bool
) -> None:
    os.setsid()
    # PR_SET_PDEATHSIG: of a test that is killed, nothing stays behind
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)
    for descriptor, stream in enumerate(streams, 1):
        os.dup2(os.open(stream, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666), descriptor)
    os.environ.update(environment)
    if powerless and os.geteuid() == 0:
        _drop(CAPABILITIES)
    sys.argv = arguments
    try:
        runpy.run_path(arguments[0], run_name="__main__")
    finally:
        atexit._run_exitfuncs()  # which a forked process does not do by itself


def _drop(capabilities: Sequence[int]) -> None:
    """Take capabilities from this thread and from those it will start (capset(2), version 3)."""
    libc = ctypes.CDLL(None, use_errno=True)
    header, data = (ctypes.c_uint32 * 2)(0x20080522, 0), (ctypes.c_uint32 * 6)()
    assert libc.capget(header, data) == 0
    for at in range(3):  # effective, permitted, inheritable; the first of two words
        data[at] &= ~sum(1 << each for each in capabilities)
    assert libc.capset(header, data) == 0, os.strerror(ctypes.get_errno())


# --- a place with its clean run, laid out once ----------------------------------------------------


@functools.cache
def _laid(segments: int, span: int, keep: str) -> tempfile.TemporaryDirectory[str]:
    made = tempfile.TemporaryDirectory(prefix="lca-clean-", dir=MEMORY)
    place = clean_runs.lay_out(Path(made.name), segments)
    clean_runs.clean_run(place, place / "clean.lca", span=span, keep=keep)
    return made


@contextmanager
def laid_out(
    segments: int = 40, span: int = clean_runs.SPAN, keep: str = "parameters"
) -> Iterator[tuple[Path, Path]]:
    """A place of its own with checkpoints and a task, and their clean run, which is that of every
    fault of this process.

    In memory where there is such a place: what a killed process leaves is the same there, and
    flushing costs nothing.
    """
    shared = Path(_laid(segments, span, keep).name)
    with tempfile.TemporaryDirectory(
        prefix="lca-fault-", dir=MEMORY, ignore_cleanup_errors=True
    ) as made:
        place = Path(made)
        shutil.copytree(shared / "checkpoints", place / "checkpoints")
        shutil.copy(shared / "small_task.py", place)
        yield place, shared / "clean.lca"


# --- what must hold afterwards --------------------------------------------------------------------


def markers(out: Path) -> int:
    """How many spans of the first loss are committed."""
    return sum(name.startswith("0") for name in results.disk.names(out / "commits" / "train"))


def undamaged(out: Path) -> None:
    """Whatever a marker speaks for is whole, as `lca verify` sees it; a run that was never created
    is.
    """
    if results.disk.exists(out / "run.json"):
        damages = [found for found in results.verify(out) if isinstance(found, results.Damage)]
        assert damages == [], damages[:3]


def nothing_left(out: Path) -> None:
    """No temporary file in or beside a run, and nobody holds it."""
    if results.disk.is_object_store(out):
        assert [name for name in results.disk.names(out / "log") if name.startswith(".")] == []
        return
    left = [
        path for path in out.rglob("*") if ".partial" in path.name or path.name.endswith(".tmp")
    ]
    beside = [
        path for path in out.parent.iterdir() if path.name.lstrip(".").startswith(f"{out.name}.")
    ]
    assert [*left, *beside] == [], [*left, *beside]


def complete(
    place: Path, out: Path, clean: Path, keep: str = "parameters", **environment: str
) -> None:
    """Run to the end: the bytes are those of the clean run, and nothing temporary is left."""
    driver = drive(place, out, "--cluster", "inline", environment=environment, keep=keep)
    assert driver.finished() == 0, driver.said
    whole(out, clean)


def whole(out: Path, clean: Path) -> None:
    """A run that is done is the clean run, undamaged, with nothing temporary."""
    clean_runs.same_bytes(out, clean)
    undamaged(out)
    nothing_left(out)


def named(text: str, *words: object) -> str:
    """What was said, which is no traceback, nothing unexpected, and holds every one of `words`."""
    assert "Traceback" not in text, text
    assert "unexpected" not in text, text
    assert [word for word in words if str(word) not in text] == [], text
    return text


def nobody_left(*drivers: Driver) -> None:
    """Every process of these drivers' sessions ends by itself."""
    deadline = time.monotonic() + HANGS
    for driver in drivers:
        for process in driver.session():
            if process.pid != driver.pid:
                with contextlib.suppress(psutil.NoSuchProcess):
                    process.wait(max(0.1, deadline - time.monotonic()))


def signalled(driver: Driver, number: signal.Signals) -> None:
    """As a terminal sends Ctrl-C to all of a group, and a scheduler of jobs SIGTERM to the
    driver.
    """
    if number == signal.SIGINT:
        os.killpg(driver.pid, number)
    else:
        os.kill(driver.pid, number)
