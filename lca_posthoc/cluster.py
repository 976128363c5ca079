"""Where work runs: in this process, or on local Dask workers. It is given a callable and JSON-like specs; it knows no more.

A cluster keeps a window of two specs per worker in flight, submits each under a new key, tries a spec a second time when its
worker died, and drains when its `stop` event is set: what runs is finished, what waits is not started.
"""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import queue
import signal
import sys
import threading
import uuid
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from .errors import InputError, ResourceError

Spec = dict[str, Any]
Function = Callable[[Spec], Any]
_WINDOW = 2
_TRIES = 2
_PROBE_SECONDS = 120


@dataclass(frozen=True)
class Done:
    """A spec and what came of it: `result`, or `lost` (why no worker could finish it), or neither where it was not started."""

    spec: Spec
    result: Any = None
    lost: str | None = None


class Cluster(Protocol):
    """One way to run a callable over specs."""

    workers: int

    def map(self, function: Function, specs: Iterable[Spec]) -> Iterator[Done]:
        """Each spec's outcome as it comes; specs are taken from the iterable only when there is room."""


class Inline:
    """Runs everything in this process, one spec after the other."""

    workers = 1

    def __init__(self, stop: threading.Event) -> None:
        self._stop = stop

    def map(self, function: Function, specs: Iterable[Spec]) -> Iterator[Done]:
        """See `Cluster.map`."""
        for spec in specs:
            if self._stop.is_set():
                return
            yield Done(spec, function(spec))


class Local:
    """Runs specs on single-threaded Dask worker processes of this machine."""

    def __init__(self, client: Any, workers: int, stop: threading.Event) -> None:
        self._client, self.workers, self._stop = client, workers, stop
        self._stopping = f"lca-stop-{uuid.uuid4().hex}"

    def map(self, function: Function, specs: Iterable[Spec]) -> Iterator[Done]:
        """See `Cluster.map`."""
        source = iter(specs)
        arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
        flying: dict[str, tuple[Spec, int]] = {}

        def submit(spec: Spec, attempt: int) -> None:
            future = self._client.submit(
                _guarded, function, spec, self._stopping, key=f"lca-{uuid.uuid4().hex}", pure=False, retries=0
            )
            flying[future.key] = (spec, attempt)
            future.add_done_callback(arrived.put)

        told = False
        while True:
            while not self._stop.is_set() and len(flying) < _WINDOW * self.workers:
                if (spec := next(source, None)) is None:
                    break
                submit(spec, 1)
            if self._stop.is_set() and not told:
                _event(self._stopping, self._client).set()
                told = True
            if not flying:
                return
            future = _next(arrived)
            if future is None:
                continue
            spec, attempt = flying.pop(future.key)
            if future.status == "finished":
                yield Done(spec, future.result())
            elif attempt < _TRIES and not self._stop.is_set():
                submit(spec, attempt + 1)
            else:
                yield Done(spec, lost=f"{type(future.exception()).__name__}: {future.exception()}"[:300])


def _next(arrived: queue.SimpleQueue[Any]) -> Any:
    """The next future, waking up now and then so that signals are handled."""
    with contextlib.suppress(queue.Empty):
        return arrived.get(timeout=0.5)
    return None


def _event(name: str, client: Any) -> Any:
    from distributed import Event

    return Event(name, client=client)


def _guarded(function: Function, spec: Spec, stop: str) -> Any:
    """Run a spec on a worker unless the driver is draining."""
    from distributed import get_client

    return None if _event(stop, get_client()).is_set() else function(spec)


def _settle_in() -> None:
    """Ctrl-C reaches every process of the terminal, but only the driver decides; what tasks print is no result."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.dup2(2, 1)


def _answer() -> str:
    return "ready"


@contextlib.contextmanager
def open_cluster(kind: str, workers: int | None, device: str, stop: threading.Event) -> Iterator[Cluster]:
    """Start what `kind` names and close it afterwards.

    Args:
        kind: "inline" or "local".
        workers: how many local workers; None for one per visible GPU, or one per core on a CPU.
        device: "cuda" or "cpu".
        stop: set by whoever wants the cluster to drain.

    Raises:
        ResourceError: where workers do not come up.
        InputError: for another kind.
    """
    if kind == "inline":
        yield Inline(stop)
    elif kind == "local":
        with _local(workers, device, stop) as cluster:
            yield cluster
    else:
        raise InputError(f"--cluster {kind!r} is not known. Use local or inline.")


@contextlib.contextmanager
def _local(workers: int | None, device: str, stop: threading.Event) -> Iterator[Local]:
    import dask
    from distributed import Client, Nanny, Scheduler, SpecCluster

    if getattr(multiprocessing.current_process(), "_inheriting", False):
        sys.exit(1)  # a worker importing a script without a `__main__` guard; the driver says so
    environments = _gpu_environments() if device == "cuda" else [{} for _ in range(_cores())]
    count = workers or local_workers(device)
    specs = {
        index: {
            "cls": Nanny,
            "options": {
                "nthreads": 1,
                "memory_limit": 0,
                "host": "127.0.0.1",
                "dashboard_address": None,
                "resources": {"GPU": 1} if device == "cuda" else {},
                "env": environments[index % len(environments)],
                "silence_logs": "CRITICAL",
            },
        }
        for index in range(count)
    }
    scheduler = {
        "cls": Scheduler,
        "options": {"host": "127.0.0.1", "port": 0, "dashboard": False, "dashboard_address": "127.0.0.1:0"},
    }
    with contextlib.ExitStack() as stack:
        stack.enter_context(dask.config.set(_SETTINGS))
        try:
            cluster = stack.enter_context(SpecCluster(workers=specs, scheduler=scheduler, silence_logs="CRITICAL"))
            client = stack.enter_context(Client(cluster, timeout=_PROBE_SECONDS))
        except (RuntimeError, OSError) as error:
            raise ResourceError(
                f"local workers did not start ({' '.join(str(error).split())[:120]}). A script that calls run() needs "
                "`if __name__ == '__main__':` around it, for workers import the script; or use cluster='inline'."
            ) from error
        _check(client, count)
        yield Local(client, count, stop)


_SETTINGS = {
    "distributed.scheduler.worker-ttl": "30 minutes",
    "distributed.scheduler.work-stealing": False,
    "distributed.scheduler.allowed-failures": 0,
    "distributed.nanny.pre-spawn-environ": {
        # Dask's own choice hands freed memory back at once; a replay frees and takes the same blocks at every batch, and
        # page faults then cost as much as the arithmetic. 32 MiB is the most glibc takes for the second one.
        "MALLOC_TRIM_THRESHOLD_": 256 * 2**20,
        "MALLOC_MMAP_THRESHOLD_": 32 * 2**20,
        "OMP_NUM_THREADS": 1,
        "MKL_NUM_THREADS": 1,
        "OPENBLAS_NUM_THREADS": 1,
    },
    "distributed.worker.daemon": False,
    "distributed.worker.profile.enabled": False,
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": False,
}


def _check(client: Any, count: int) -> None:
    """A small task with a time-out on every worker, before anything long is asked of them."""
    from distributed import TimeoutError as DaskTimeoutError

    try:
        client.wait_for_workers(count, timeout=_PROBE_SECONDS)
        client.register_plugin(_worker_plugin())
        client.run(_answer)
    except (DaskTimeoutError, TimeoutError, OSError) as error:
        raise ResourceError(
            f"only {len(client.scheduler_info()['workers'])} of {count} local workers came up within {_PROBE_SECONDS} s ({error}). "
            "Ask for fewer with --workers, or run in this process with --cluster inline."
        ) from None


def _worker_plugin() -> Any:
    from distributed import WorkerPlugin

    class SettleIn(WorkerPlugin):  # type: ignore[misc]
        name = "lca-settle-in"

        def setup(self, worker: Any) -> None:
            _settle_in()

    return SettleIn()


def local_workers(device: str) -> int:
    """How many workers this host has unless told: one per visible GPU, or one per core."""
    return len(_gpu_environments()) if device == "cuda" else _cores()


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _gpu_environments() -> list[dict[str, str]]:
    """One worker per visible GPU; a list inherited from a job scheduler is split, never renumbered."""
    inherited = os.environ.get("CUDA_VISIBLE_DEVICES")
    if inherited is None:
        import torch

        devices = [str(index) for index in range(torch.cuda.device_count())]
    else:
        devices = [device for device in inherited.split(",") if device.strip()]
    if not devices:
        raise ResourceError("no GPU is visible. Use --device cpu, or make one visible with CUDA_VISIBLE_DEVICES.")
    return [{"CUDA_VISIBLE_DEVICES": device} for device in devices]


def visible_device() -> str:
    """What `--device auto` means here: "cuda" where torch sees a GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
