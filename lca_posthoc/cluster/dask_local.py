"""Run single-threaded Dask workers on this host: one per visible GPU, or one per core."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from typing import TYPE_CHECKING

from ..base.text import duration
from ..errors import ResourceError
from .assignments import ANSWER_SECONDS
from .config import ClusterConfig
from .dask_workers import Workers
from .protocol import Cluster

if TYPE_CHECKING:
    from distributed import Client, SpecCluster, Worker, WorkerPlugin

_SILENT = logging.CRITICAL + 1  # Dask logs a client that has left as critical, with a traceback
_FIRST_PAUSE, _LONGEST_PAUSE = 1.0, 60.0  # seconds after a worker that did not start
_SETTINGS = {
    "distributed.scheduler.worker-ttl": "30 minutes",
    "distributed.scheduler.work-stealing": False,
    "distributed.scheduler.allowed-failures": 0,
    "distributed.nanny.pre-spawn-environ": {
        # Dask returns freed memory at once, but a replay frees and takes the same blocks at every
        # batch, and page faults then cost as much as the arithmetic. 32 MiB is the most that glibc
        # accepts for the second setting.
        "MALLOC_TRIM_THRESHOLD_": 256 * 2**20,
        "MALLOC_MMAP_THRESHOLD_": 32 * 2**20,
        "OMP_NUM_THREADS": 1,
        "MKL_NUM_THREADS": 1,
        "OPENBLAS_NUM_THREADS": 1,
    },
    # of the messages to each worker, each of which holds its spec
    "distributed.admin.low-level-log-length": 10,
    "distributed.worker.daemon": False,
    "distributed.worker.profile.enabled": False,
    "distributed.worker.memory.target": False,
    "distributed.worker.memory.spill": False,
    "distributed.worker.memory.pause": False,
    "distributed.worker.memory.terminate": False,
}


@contextlib.contextmanager
def on_this_host(where: ClusterConfig, device: str, stop: threading.Event) -> Iterator[Cluster]:
    """Start workers, and end them afterwards.

    Args:
        where: how many workers, and whether to serve the dashboard.
        device: "cuda" or "cpu".
        stop: drains the cluster when set.
    """
    import dask

    if getattr(multiprocessing.current_process(), "_inheriting", False):
        sys.exit(1)  # a worker imports a script without a `__main__` guard; the driver reports it
    specs = _worker_specs(device, where.workers or local_workers(device))
    with contextlib.ExitStack() as stack:
        stack.enter_context(dask.config.set(_SETTINGS))
        cluster, client = _start(stack, specs, dashboard=where.dashboard)
        _wait_for(client, len(specs))
        with Workers.opened(client, device, stop) as workers:
            workers.dashboard = client.dashboard_link if where.dashboard else None
            workers.full_strength = len(specs)
            workers.replace = _Replacement(cluster, len(specs))
            yield workers


def _worker_specs(device: str, count: int) -> dict[int, dict[str, object]]:
    """Return worker specifications for a `SpecCluster`."""
    from distributed import Nanny

    environments = gpu_environments() if device == "cuda" else [{}]
    return {
        index: {
            "cls": Nanny,
            "options": {
                "nthreads": 1,
                "memory_limit": 0,
                "host": "127.0.0.1",
                "dashboard_address": None,
                "resources": {"GPU": 1} if device == "cuda" else {},
                "env": environments[index % len(environments)],
                "silence_logs": _SILENT,
            },
        }
        for index in range(count)
    }


def _scheduler_spec(*, dashboard: bool) -> dict[str, object]:
    """Return a scheduler specification for a `SpecCluster`."""
    from distributed import Scheduler

    options = {
        "host": "127.0.0.1",
        "port": 0,
        "dashboard": dashboard,
        "dashboard_address": "127.0.0.1:0",
    }
    return {"cls": Scheduler, "options": options}


def _start(
    stack: contextlib.ExitStack, specs: dict[int, dict[str, object]], *, dashboard: bool
) -> tuple[SpecCluster, Client]:
    """Start a scheduler with its workers, and a client; `stack` ends them.

    Raises:
        ResourceError: if the workers do not start.
    """
    from distributed import Client, SpecCluster

    scheduler = _scheduler_spec(dashboard=dashboard)
    try:
        cluster = stack.enter_context(
            SpecCluster(workers=specs, scheduler=scheduler, silence_logs=_SILENT)
        )
        return cluster, stack.enter_context(Client(cluster, timeout=ANSWER_SECONDS))
    except (RuntimeError, OSError) as error:
        raise ResourceError(
            f"local workers did not start ({' '.join(str(error).split())[:120]}). A script that "
            "calls run() needs `if __name__ == '__main__':` around it, because workers import the "
            "script; or use cluster='inline'."
        ) from error


def _wait_for(client: Client, count: int) -> None:
    """Wait until all workers are connected, and prepare their processes.

    Raises:
        ResourceError: if some do not connect in time.
    """
    from distributed import TimeoutError as DaskTimeoutError

    try:
        client.wait_for_workers(count, timeout=ANSWER_SECONDS)
        client.register_plugin(_settle_in())
    except (DaskTimeoutError, TimeoutError, OSError) as error:
        raise ResourceError(
            f"only {len(client.scheduler_info()['workers'])} of {count} local workers started "
            f"within {duration(ANSWER_SECONDS)} ({error}). Ask for fewer with --workers, or run in this "
            "process with --cluster inline."
        ) from None


class _Replacement:
    """Starts workers in place of lost ones, also of those whose nanny gave up because its worker
    died at startup. After each of these it pauses, for twice as long as the last time.

    Dask forgets a nanny when the scheduler loses its worker. It keeps one whose worker never
    connected, and counts it as a worker.

    Args:
        cluster: of the workers.
        count: how many there should be.
    """

    def __init__(self, cluster: SpecCluster, count: int) -> None:
        self.cluster, self._count = cluster, count
        self._due, self._pause = 0.0, _FIRST_PAUSE

    def __call__(self) -> None:
        """Start what is missing, unless it is too early; return at once."""
        if time.monotonic() >= self._due:
            self.cluster.loop.add_callback(self._start)

    def _start(self) -> None:
        from distributed import Status

        workers = self.cluster.workers
        failed = [name for name, nanny in workers.items() if nanny.status == Status.failed]
        for name in failed:
            del workers[name]
        if failed:
            self._due = time.monotonic() + self._pause
            self._pause = min(2 * self._pause, _LONGEST_PAUSE)
        else:
            self.cluster.scale(self._count)


def _settle_in() -> WorkerPlugin:
    from distributed import WorkerPlugin

    class SettleIn(WorkerPlugin):  # type: ignore[misc]
        """Ignores Ctrl-C, which reaches every process of the terminal although only the driver
        decides, and redirects prints of tasks away from the results.
        """

        name = "lca-settle-in"

        def setup(self, worker: Worker) -> None:
            signal.signal(signal.SIGINT, signal.SIG_IGN)
            os.dup2(2, 1)

    return SettleIn()


def local_workers(device: str) -> int:
    """Return the default number of workers: one per visible GPU, or one per core that this process
    may use.
    """
    if device == "cuda":
        return len(gpu_environments())
    from dask.system import cpu_count

    return int(cpu_count())


def gpu_environments() -> list[dict[str, str]]:
    """Return an environment for a worker per visible GPU.

    A list inherited from a job scheduler (indices, UUIDs, MIG ids) is split, never renumbered.

    Raises:
        ResourceError: if no GPU is visible.
    """
    inherited = os.environ.get("CUDA_VISIBLE_DEVICES")
    if inherited is None:
        import torch

        devices = [str(index) for index in range(torch.cuda.device_count())]
    else:
        listed = [device.strip() for device in inherited.split(",")]
        # as CUDA reads it
        ends = [
            position for position, device in enumerate(listed) if device in ("", "-1", "NoDevFiles")
        ]
        devices = listed[: ends[0]] if ends else listed
    if not devices:
        raise ResourceError(
            "no GPU is visible. Use --device cpu, or make one visible with CUDA_VISIBLE_DEVICES."
        )
    return [{"CUDA_VISIBLE_DEVICES": device} for device in devices]


def visible_device() -> str:
    """Return the device for `--device auto`: "cuda" if torch sees a GPU, else "cpu"."""
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
