"""Read the user's data in one thread, the same for the whole life of the process.

Resources that data sets hold open (a connection of sqlite, an HDF5 file, a generator, anything in
`threading.local`) belong to the thread that opened them. A task is therefore built, and its data
read, in that one thread, whichever thread asks.
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
    """Run jobs one after the other, in a daemon thread, so that a read that never returns does not
    keep the process alive.
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
        except BaseException as error:  # any error is raised where the result is used
            future.set_exception(error)


_lane: _Lane | None = None


def _current() -> _Lane:
    """Return this process's thread, and start one if there is none: at first, after a fork, or
    after one was abandoned in a read.
    """
    global _lane
    with _STARTING:
        if _lane is None or _lane.left or not _lane.is_alive():
            _lane = _Lane()
            _lane.start()
        return _lane


class Reader:
    """Run code that builds a task and reads its data in the reader thread of this process, in the
    context where the reader was made.

    While a module is being imported, run the code directly: another thread that imports the same
    module would wait for it.
    """

    def __init__(self) -> None:
        self._lane = None if _importing() else _current()
        self._context = contextvars.copy_context()

    def call(self, function: Callable[..., Result], *arguments: object) -> Result:
        """Return `function(*arguments)`, called in the thread; re-raise its exceptions.

        Args:
            function: the function.
            arguments: its arguments.
        """
        return self.result(self.submit(function, *arguments))

    def submit(self, function: Callable[..., Result], *arguments: object) -> Future[Result]:
        """Start `function(*arguments)` in the thread, after what was started before.

        Args:
            function: the function.
            arguments: its arguments.
        """
        future: Future[Result] = Future()
        if self._lane is None or threading.current_thread() is self._lane:
            _Lane._do(future, lambda: function(*arguments))
            return future
        if self._lane.left or not self._lane.is_alive():
            # an abandoned thread still uses its context
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
        """Wait for what was started.

        If interrupted meanwhile, abandon the thread; another one reads from then on.

        Raises:
            BaseException: whatever the function raised.
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
        """Return `function()`, called in the thread; a default device set by the caller or by the
        function applies in both threads.
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
