"""A `python` that is forked from one that has imported everything: tests start hundreds of commands,
and importing torch takes each of them longer than what is tested.

`programs()` is a directory with `python`, `lca` and `dask`, `program(name)` one of them. Each is a small process that
hands its arguments, environment, directory and open files to a server of the test process, waits
for what the server forks, and ends as that ends. It passes on every signal that it is sent, and
takes along what it stands for where it is killed.

A forked process differs from a new one in five ways. It has imported before it begins; it has the
hash seed of the server and what C libraries read from the environment when they are loaded; it is
in a process group of its own; its parent is the server; and it ends after its functions for the
exit, without taking modules apart. Where the environment asks for another
interpreter (encodings, warnings, threads), or options stand before the script, `python` is the real
one. Tests of what is imported, of memory and of groups of processes start real ones.
"""

from __future__ import annotations

import array
import atexit
import builtins
import contextlib
import ctypes
import fcntl
import functools
import gc
import importlib
import io
import marshal
import multiprocessing
import os
import pkgutil
import random
import runpy
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from types import ModuleType
from typing import NamedTuple, NoReturn, TextIO

import psutil

ROOT = Path(__file__).parents[2]
PRELOADED = (
    *("torch", "torch._dynamo", "torch.utils.data", "safetensors.torch", "numpy", "pandas"),
    *("distributed", "distributed.cli.dask_scheduler", "distributed.cli.dask_worker", "dask.array"),
    *("zarr", "xarray", "scipy.stats", "matplotlib.pyplot", "bokeh.plotting", "bokeh.embed"),
    *("psutil", "rich.progress", "rich.live", "rich.table", "rich.traceback", "jinja2.ext"),
)
PACKAGES = ("cli", "findings", "numerics", "plots", "recording", "replay", "report", "results")
MOST_FILES = 250  # that one message carries
# What may differ from the server's: a hash seed is what Dask gives its workers.
FREE = ("PYTHONPATH", "PYTHONUNBUFFERED", "PYTHONDONTWRITEBYTECODE", "PYTHONHASHSEED")
HIGH = 1000  # above the descriptors of servers and requests

# What a small process runs: it imports nothing that would make its own start long.
_SMALL = """\
#!{python} -IS
import _signal, _socket, array, marshal, os, sys

words = {script!r} + sys.argv[1:]
asked = {{
    name: value
    for name, value in os.environ.items()
    if name.startswith(("PYTHON", "LC_")) or name in ("LANG", "OMP_NUM_THREADS")
}}
for name in {free!r}:
    asked.pop(name, None)
if asked != {same!r} or words[:1] and words[0][:1] == "-" and words[0] not in ("-", "-c", "-m"):
    os.execv({python!r}, [{python!r}, *words])

passed = (1, 2, 3, 10, 12, 15, 18, 28)
ignored = [number for number in passed if _signal.getsignal(number) == _signal.SIG_IGN]
passed = [number for number in passed if number not in ignored]
_signal.pthread_sigmask(_signal.SIG_BLOCK, passed)
files = []
for name in os.listdir("/proc/self/fd"):
    try:
        os.fstat(int(name))
    except OSError:
        continue  # that of the listing
    files.append(int(name))
mask = os.umask(0)
request = marshal.dumps((words, os.getcwd(), dict(os.environ), files, ignored, mask))
try:
    server = _socket.socket(_socket.AF_UNIX, _socket.SOCK_STREAM)
    server.connect({address!r})
    rights = (_socket.SOL_SOCKET, _socket.SCM_RIGHTS, array.array("i", files))
    server.sendmsg([len(request).to_bytes(8, "little")], [rights] if files else [])
    server.sendall(request)
    for file in files:
        os.close(file)
    child = int.from_bytes(server.recv(8), "little", signed=True)
    with open("/proc/self/comm", "w") as name:
        name.write(f"{{child}}")

    def pass_on(number, frame):
        try:
            os.kill(child, number)
        except ProcessLookupError:
            pass

    for number in passed:
        _signal.signal(number, pass_on)
    _signal.pthread_sigmask(_signal.SIG_UNBLOCK, passed)
    code = int.from_bytes(server.recv(8), "little", signed=True)
except OSError:  # the server is gone
    os._exit(1)
if code < 0:
    try:
        _signal.signal(-code, _signal.SIG_DFL)
    except OSError:
        pass  # SIGKILL has no other action
    os.kill(os.getpid(), -code)
os._exit(code)
"""


class Request(NamedTuple):
    """What a small process asks for."""

    words: list[str]
    directory: str
    environment: dict[str, str]
    files: list[int]
    ignored: list[int]
    mask: int


@functools.cache
def programs() -> Path:
    """Return a directory with `python`, `lca` and `dask`, served as long as this process lives."""
    place = Path(tempfile.mkdtemp(prefix="lca-forked-"))
    address = place / "server"
    server = subprocess.Popen(
        [sys.executable, "-m", __name__, address],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "OPENBLAS_NUM_THREADS": "1",  # so that the server has one thread, as what is forked has
        },
        stdin=subprocess.PIPE,  # by whose end it knows that this process has ended
        stdout=subprocess.PIPE,
        cwd=place,
        start_new_session=True,
    )
    atexit.register(_end, server, place)
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n"
    return place


def program(name: str) -> str:
    """Return the path of `python`, `lca` or `dask`."""
    return str(programs() / name)


def forked(small: psutil.Process) -> psutil.Process:
    """Return what a running program of `programs` stands for, and the process itself where it is
    none of them.

    Raises:
        psutil.NoSuchProcess: if it is not there any more.
    """
    name = small.name()
    return psutil.Process(int(name)) if name.isdigit() else small


def _end(server: subprocess.Popen[bytes], place: Path) -> None:
    server.kill()
    server.communicate()
    shutil.rmtree(place)


# --- in the server --------------------------------------------------------------------------------


def _write_programs(place: Path, address: str) -> None:
    """Write the programs of this server beside its socket."""
    same = {
        name: value
        for name, value in os.environ.items()
        if name not in FREE
        and (name.startswith(("PYTHON", "LC_")) or name in ("LANG", "OMP_NUM_THREADS"))
    }
    here = Path(sys.executable).parent
    scripts = {"python": [], "lca": [str(here / "lca")], "dask": [str(here / "dask")]}
    for name, script in scripts.items():
        text = _SMALL.format(
            python=sys.executable, script=script, same=same, free=FREE, address=address
        )
        (place / name).write_text(text)
        (place / name).chmod(0o755)


def _import_all() -> None:
    for module in PRELOADED:
        importlib.import_module(module)
    for name in PACKAGES:
        package = importlib.import_module(f"lca_posthoc.{name}")
        for found in pkgutil.walk_packages(package.__path__, f"{package.__name__}."):
            importlib.import_module(found.name)


def _serve(address: str) -> Request:
    """Fork a process for each request, and tell how it ended, until the test process ends; returns
    in forked processes alone.
    """
    listener = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    kept = _open_files() - {listener.fileno()}
    listener.bind(address)
    listener.listen(128)
    waiting = selectors.DefaultSelector()
    waiting.register(listener, selectors.EVENT_READ)
    waiting.register(sys.stdin, selectors.EVENT_READ)
    children: dict[int, tuple[int, socket.socket]] = {}  # by their descriptors
    print("ready", flush=True)
    while True:
        for key, _ in waiting.select():
            if key.fileobj is sys.stdin:
                os._exit(0)
            elif key.fileobj is listener:
                small, _ = listener.accept()
                request, received = _received(small)
                if request is None:
                    small.close()
                    continue
                child = os.fork()
                if not child:
                    for each in (waiting, listener, small, *(one for _, one in children.values())):
                        each.close()  # before their numbers are given to others
                    _take(received, request.files, kept)
                    return request
                for file in received:
                    os.close(file)
                _tell(small, child)
                process = os.pidfd_open(child)
                children[process] = child, small
                waiting.register(process, selectors.EVENT_READ, process)
                waiting.register(small, selectors.EVENT_READ, process)
            elif key.data in children and key.fileobj == key.data:
                child, small = children.pop(key.data)
                _tell(small, os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
                with contextlib.suppress(KeyError):
                    waiting.unregister(small)
                small.close()
                waiting.unregister(key.data)
                os.close(key.data)
            elif key.data in children:  # the small process was killed
                child, small = children[key.data]
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
                    os.killpg(child, signal.SIGKILL)
                waiting.unregister(small)


def _tell(small: socket.socket, number: int) -> None:
    with contextlib.suppress(OSError):  # one that was killed hears nothing
        small.sendall(number.to_bytes(8, "little", signed=True))


def _received(small: socket.socket) -> tuple[Request | None, list[int]]:
    """Read a request, None of a process that was killed before it had sent it, and the descriptors
    that came with it.
    """
    files = array.array("i")
    length, messages, _, _ = small.recvmsg(8, socket.CMSG_SPACE(MOST_FILES * files.itemsize))
    for _, _, given in messages:
        files.frombytes(given)
    size = int.from_bytes(length, "little")
    with small.makefile("rb") as stream:
        sent = stream.read(size)
    if len(sent) < size or not size:
        for file in files:
            os.close(file)
        return None, []
    return Request(*marshal.loads(sent)), list(files)


def _open_files() -> set[int]:
    numbers = set[int]()
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the listing
            os.fstat(int(name))
            numbers.add(int(name))
    return numbers


# --- in a forked process --------------------------------------------------------------------------


def _take(received: list[int], wanted: list[int], kept: set[int]) -> None:
    """Give received descriptors the numbers they had, and close all others but those kept."""
    held = [fcntl.fcntl(file, fcntl.F_DUPFD, HIGH) for file in received]
    for file in _open_files() - {*held} - (kept - {0, 1, 2}):
        os.close(file)
    for file, number in zip(held, wanted, strict=True):
        os.dup2(file, number)
        os.close(file)


def _become(request: Request) -> None:
    """Take over what a new interpreter would have been given."""
    ctypes.CDLL(None).prctl(1, signal.SIGKILL)  # PR_SET_PDEATHSIG: it ends with its server
    os.setpgid(0, 0)
    for number in request.ignored:
        signal.signal(number, signal.SIG_IGN)
    os.umask(request.mask)
    os.chdir(request.directory)
    first = _paths()
    os.environ.clear()
    os.environ.update(request.environment)
    sys.path[:] = [*_paths(), *(path for path in sys.path if path not in first)]
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        stream = _stream(number, getattr(sys, name))
        setattr(sys, name, stream)
        setattr(sys, f"__{name}__", stream)

    import dask
    import numpy as np

    dask.config.refresh()
    random.seed()
    np.random.seed()
    sys.modules.pop("sitecustomize", None)
    with contextlib.suppress(ImportError):
        importlib.import_module("sitecustomize")


def _paths() -> list[str]:
    return [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path]


def _stream(number: int, like: TextIO) -> TextIO | None:
    """Open a standard stream as an interpreter does, None where its descriptor is closed."""
    mode = "r" if number == 0 else "w"
    try:
        binary = os.fdopen(number, f"{mode}b", closefd=False)
    except OSError:
        return None
    return io.TextIOWrapper(
        binary,
        like.encoding,
        like.errors,
        line_buffering=number == 2 or binary.isatty(),
        write_through=number > 0 and bool(os.environ.get("PYTHONUNBUFFERED")),
    )


def _run(words: list[str]) -> None:
    """Do what `python WORDS` does."""
    main = ModuleType("__main__")
    main.__dict__["__builtins__"] = builtins
    sys.modules["__main__"] = main
    kind, *rest = words or ["-"]
    if kind == "-m":
        sys.argv = ["-m", *rest[1:]]
        sys.path.insert(0, os.getcwd())
        runpy._run_module_as_main(rest[0])  # type: ignore[attr-defined]
    elif kind == "-c":
        sys.argv = ["-c", *rest[1:]]
        sys.path.insert(0, "")
        exec(compile(rest[0], "<string>", "exec"), main.__dict__)
    elif kind == "-":
        sys.argv = ["-", *rest]
        sys.path.insert(0, "")
        exec(compile(sys.stdin.read(), "<stdin>", "exec"), main.__dict__)
    else:
        sys.argv = [kind, *rest]
        sys.path.insert(0, str(Path(kind).resolve().parent))
        main.__file__ = kind
        exec(compile(Path(kind).read_bytes(), kind, "exec"), main.__dict__)


def _end_as_an_interpreter(words: list[str]) -> NoReturn:
    """Do what `python WORDS` does and end as it ends, but for taking modules apart, which takes
    longest where all are imported.
    """
    code: object = None
    try:
        _run(words)
    except SystemExit as error:
        code = error.code
    except BaseException as error:
        sys.excepthook(*sys.exc_info())
        code = -signal.SIGINT if isinstance(error, KeyboardInterrupt) else 1
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    if code is not None and not isinstance(code, int):
        print(code, file=sys.stderr)
        code = 1
    status = (code or 0) & 255
    for stream in filter(None, (sys.stdout, sys.stderr)):
        try:
            stream.flush()
        except ValueError:
            pass  # closed by the program
        except OSError:
            status = 120  # as of an interpreter that cannot write what is left
    if code == -signal.SIGINT:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        os.kill(os.getpid(), signal.SIGINT)
    os._exit(status)


def main(address: str) -> None:
    """Import everything, serve, and be what was asked for."""
    _import_all()
    assert threading.active_count() == 1, threading.enumerate()
    programs = Path(address).parent
    _write_programs(programs, address)
    sys.executable = str(programs / "python")
    multiprocessing.set_executable(sys.executable)
    gc.collect()
    gc.freeze()  # what is shared stays so
    request = _serve(address)
    _become(request)
    _end_as_an_interpreter(request.words)


if __name__ == "__main__":
    main(sys.argv[1])
