"""Read the user's data in one thread, the same for the whole life of the process.

What data sets hold open (a connection of sqlite, a file of HDF5, a generator, what hangs on
`threading.local`) belongs to the thread that opened it. So a task is built, and its data are read,
in that one thread, whichever thread asks.
"""

from __future__ import annotations

import contextvars
import queue
import sys
import threading
from collections.abc import Callable, Generator
from concurrent.futures import Future
from typing import Any, TypeVar

import torch

Result = TypeVar("Result")
_Job = tuple[Future[Any], Callable[[], Any]]
_STARTING = threading.Lock()


class _Lane(threading.Thread):
    """Do one job after the other; a daemon, so that a read that never ends does not keep the
    process.
    """

    def __init__(self) -> None:
        super().__init__(name="lca-reader", daemon=True)
        self.jobs: queue.SimpleQueue[_Job] = queue.SimpleQueue()
        self.left = False

    def run(self) -> None:
        while True:
            self._do(*self.jobs.get())

    @staticmethod
    def _do(future: Future[Any], job: Callable[[], Any]) -> None:
        if not future.set_running_or_notify_cancel():
            return
        try:
            future.set_result(job())
        except BaseException as error:  # whatever it is, it is raised where the result is wanted
            future.set_exception(error)


_lane: _Lane | None = None


def _current() -> _Lane:
    """Return this process's thread, started where there is none yet: at first, after a fork, and
    when one was left in a read.
    """
    global _lane
    with _STARTING:
        if _lane is None or _lane.left or not _lane.is_alive():
            _lane = _Lane()
            _lane.start()
        return _lane


class Reader:
    """Run what builds a task and reads its data in the thread of this process that does so, in the
    context it is made in.

    While a module is being imported, work is done where it is asked for: another thread that
    imports the same module would wait for it.
    """

    def __init__(self) -> None:
        self._lane = None if _importing() else _current()
        self._context = contextvars.copy_context()

    def call(self, function: Callable[..., Result], *arguments: object) -> Result:
        """Return `function(*arguments)`, called in the thread; raises what it raises."""
        return self.result(self.submit(function, *arguments))

    def submit(self, function: Callable[..., Result], *arguments: object) -> Future[Result]:
        """Begin `function(*arguments)` in the thread, after what was begun before."""
        future: Future[Result] = Future()
        if self._lane is None or threading.current_thread() is self._lane:
            _Lane._do(future, lambda: function(*arguments))
            return future
        if self._lane.left or not self._lane.is_alive():
            # a thread that was left is still inside its own
            self._lane, self._context = (
                _current(),
                self._context.copy(),
            )
        threads = torch.get_num_threads()

        def job() -> Result:
            if torch.get_num_threads() != threads:
                torch.set_num_threads(threads)
            return self._context.run(function, *arguments)

        self._lane.jobs.put((future, job))
        return future

    def result(self, future: Future[Result]) -> Result:
        """Wait for what was begun; interrupted meanwhile, the thread is left to itself and another
        one reads from then on.
        """
        try:
            return future.result()
        except BaseException:
            if self._lane is not None and not future.done() and not future.cancel():
                self._lane.left = True
            raise

    def close(self, items: Generator[Any, None, None]) -> None:
        """Close a generator in the thread that ran it."""
        if self._lane is None or not (self._lane.left or sys.is_finalizing()):
            self.call(items.close)

    def build(self, function: Callable[[], Result]) -> Result:
        """Return `function()`, called in the thread; the caller's default device holds there, and
        one that is set there holds here.
        """
        device = torch.get_default_device()

        def job() -> tuple[Result, torch.device]:
            _use(device)
            return function(), torch.get_default_device()

        built, device = self.call(job)
        _use(device)
        return built


def _use(device: torch.device) -> None:
    if torch.get_default_device() != device:
        torch.set_default_device(None if device.type == "cpu" else device)


def _importing() -> bool:
    modules = list(sys.modules.values())
    return any(
        getattr(getattr(module, "__spec__", None), "_initializing", False) for module in modules
    )
