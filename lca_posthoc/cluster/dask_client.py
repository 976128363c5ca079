"""Wrap a Dask scheduler: its workers, one task for one worker, its answer.

Dask transports, starts and cancels; it decides nothing. A task is restricted to one worker and is
never retried by Dask itself.
"""

from __future__ import annotations

import contextlib
import importlib
import uuid
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..errors import ResourceError
from . import broadcast
from .assignments import ANSWER_SECONDS, SILENT
from .protocol import Function, Spec

if TYPE_CHECKING:
    from distributed import Client, Event, Future, Worker, WorkerPlugin

RESULT_SECONDS = 10.0  # for the few kilobytes of a result
WITHOUT_US = f"has no lca_posthoc: it needs `pip install lca_posthoc=={__version__}`"


class DaskClient:
    """The scheduler behind a Dask client.

    Args:
        client: connected to it.
    """

    def __init__(self, client: Client) -> None:
        self.client = client
        self._stopping = f"lca-stop-{uuid.uuid4().hex}"
        self._delivered: list[str] = []
        self._names: dict[str, str] = {}

    @classmethod
    @contextlib.contextmanager
    def opened(cls, client: Client) -> Iterator[DaskClient]:
        """Open the scheduler, and leave nothing behind on the workers afterwards."""
        scheduler = cls(client)
        try:
            yield scheduler
        finally:
            if client.status == "running":  # otherwise nobody can be told
                with contextlib.suppress(OSError, TimeoutError):
                    for key in scheduler._delivered:
                        client.unregister_worker_plugin(key)

    # --- who is there

    def running(self) -> set[str]:
        """Return the addresses of the workers, without leaving ones."""
        client = self.client
        return set(self.ask(lambda: client.sync(client.scheduler.ncores_running)))

    def info(self) -> dict[str, dict[str, Any]]:
        """Return the scheduler's information on each worker, by address."""
        workers: dict[str, dict[str, Any]] = self.ask(self.client.scheduler_info)["workers"]
        return workers

    def threads(self) -> dict[str, int]:
        """Return the number of threads of each worker, by address."""
        threads: dict[str, int] = self.ask(self.client.nthreads)
        return threads

    def without_gpu(self, addresses: Iterable[str]) -> list[str]:
        """Return the workers that do not offer `GPU=1`."""
        info = self.info()
        return [
            address
            for address in addresses
            if info.get(address, {}).get("resources", {}).get("GPU", 0) < 1
        ]

    def learn_names(self, addresses: Iterable[str]) -> None:
        """Remember the workers' names, for when they are gone."""
        info = self.info()
        self._names |= {
            address: str(info[address]["name"]) for address in addresses if address in info
        }

    def named(self, address: str) -> str:
        """Return a worker's readable name and address."""
        name = self._names.get(address, address)
        return address if name == address else f"{name} ({address})"

    def told_to_leave(self, address: str) -> bool:
        """Tell whether a lost worker was told to leave, and so may still finish its current task."""
        with contextlib.suppress(OSError, TimeoutError):
            for _, event in reversed(self.client.get_events(address)):
                if event.get("action") == "remove-worker":
                    return bool(event.get("expected"))
            return address in self.info()
        return False

    # --- tasks

    def submit(self, place: str, spec: Spec, address: str, *, on_gpu: bool) -> Future:
        """Submit a spec to a worker.

        Args:
            place: key of the function, from `place_of`.
            spec: JSON-like.
            address: of the worker.
            on_gpu: whether the task takes the worker's GPU.
        """
        return self.client.submit(
            _work,
            place,
            spec,
            self._stopping,
            key=f"lca-{uuid.uuid4().hex}",
            pure=False,
            retries=0,
            workers=[address],
            allow_other_workers=False,
            resources={"GPU": 1} if on_gpu else None,
        )

    def ask_for_us(self, address: str) -> Future:
        """Ask whether this package is installed on a worker, which could not report its absence
        itself.
        """
        return self.client.submit(
            has_us(), key=f"lca-{uuid.uuid4().hex}", pure=False, workers=[address]
        )

    def stack(self, key: str) -> list[str]:
        """Return the stack of a running task, innermost call last."""
        with contextlib.suppress(Exception):
            stacks_by_worker = self.client.sync(
                self.client.scheduler.call_stack, keys=[key], callback_timeout=5
            )
            for stacks in stacks_by_worker.values():
                return [" ".join(frame.split()) for frame in stacks[key]]
        return []

    def restart(self, address: str) -> None:
        """End a worker's process; its nanny, if it has one, starts another."""
        from distributed import TimeoutError as DaskTimeoutError

        with contextlib.suppress(DaskTimeoutError, TimeoutError):
            try:
                self.ask(
                    self.client.restart_workers,
                    [address],
                    timeout=ANSWER_SECONDS,
                    raise_for_error=False,
                )
            except ValueError:  # it has no nanny
                self.ask(self.client.retire_workers, [address], close_workers=True, remove=True)

    def stop(self) -> None:
        """Stop the workers from starting waiting tasks."""
        self.ask(_event(self._stopping, self.client).set)

    # --- bytes

    def deliver(self, data: bytes) -> str:
        """Send bytes to every worker process, including later ones; return their key."""
        key = f"lca-{uuid.uuid4().hex}"
        self.ask(self.client.register_plugin, _delivery(key, data), name=key)
        self._delivered.append(key)
        return key

    # --- a scheduler that is gone

    def ask(self, question: Callable[..., Any], *arguments: object, **named: object) -> Any:
        """Ask the scheduler.

        Args:
            question: a function that calls the scheduler.
            arguments: of the function.
            named: further arguments of the function.

        Raises:
            ResourceError: if the scheduler is gone.
        """
        from distributed.client import ClosedClientError

        try:
            return question(*arguments, **named)
        except (OSError, TimeoutError, ClosedClientError) as error:
            raise self.gone(error) from None

    def gone(self, error: object) -> ResourceError:
        """Return the error for a scheduler that is gone."""
        return ResourceError(
            f"the scheduler is gone ({shortly(error)}). Committed results are kept; start it and "
            "run the same command again."
        )


def answer_of(future: Future, seconds: float) -> Any:
    """Return the answer to a question, or the reason for its absence under `"error"`.

    Args:
        future: of the question.
        seconds: to wait.
    """
    from distributed import TimeoutError as DaskTimeoutError

    try:
        return future.result(timeout=seconds)
    except (DaskTimeoutError, TimeoutError):
        future.cancel()
        return {"error": SILENT}
    except Exception as error:
        return {"error": shortly(error)}


def result_of(future: Future) -> list[object]:
    """Return a finished task's result in a list; [] if its worker is gone."""
    from distributed import TimeoutError as DaskTimeoutError

    if future.status == "finished":
        with contextlib.suppress(DaskTimeoutError, TimeoutError):
            return [future.result(timeout=RESULT_SECONDS)]
    return []


def has_us() -> Callable[[], bool]:
    """Return a function, pickled by value, that tells whether this package is installed where it
    runs.
    """

    def is_there() -> bool:
        import importlib.util

        try:
            return importlib.util.find_spec("lca_posthoc") is not None
        except ImportError:
            return False

    return is_there


def place_of(function: Function) -> str:
    """Return the key of a callable, so that a scheduler need not import it."""
    return f"{function.__module__}:{function.__qualname__}"


def shortly(error: object) -> str:
    """Return an error or a message on one line of bounded length."""
    text = " ".join(str(error).split())
    return (
        f"{type(error).__name__}: {text}"[:300] if isinstance(error, BaseException) else text[:300]
    )


def _work(place: str, spec: Spec, stop: str) -> object:
    """Run a spec on a worker unless the driver is draining."""
    from distributed import get_client

    if _event(stop, get_client()).is_set():
        return None
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)(spec)


def _event(name: str, client: Client) -> Event:
    from distributed import Event

    return Event(name, client=client)


def _delivery(key: str, data: bytes) -> WorkerPlugin:
    from distributed import WorkerPlugin

    class Delivery(WorkerPlugin):  # type: ignore[misc]
        """Sends bytes to every worker process, including later ones."""

        name = key

        def setup(self, worker: Worker) -> None:
            broadcast.take_in(key, data)

        def teardown(self, worker: Worker) -> None:
            broadcast.drop(key)

    return Delivery()
