"""Run work in this process, on local Dask workers, or on those of another scheduler. A cluster gets
a callable and JSON-like specs, and knows no more.

`protocol` defines what an engine offers. `assignments` decides which worker gets which spec and
what a death costs, for engines whose workers come and go. The `dask_…` modules execute this on a
Dask scheduler, started by `dask_local` or reached by `dask_remote`; `inline` needs none of it. A
cluster drains when its `stop` event is set: running specs finish, waiting ones are not started.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

from ..errors import InputError
from .broadcast import delivered
from .config import ClusterConfig
from .dask_local import local_workers, on_this_host, visible_device
from .dask_remote import at_address
from .inline import Inline
from .protocol import (
    Cluster,
    Crew,
    Done,
    Lost,
    Outcome,
    Refused,
    Retried,
    Slow,
    Spec,
    Unusable,
    Waiting,
)

__all__ = [
    "Cluster",
    "ClusterConfig",
    "Crew",
    "Done",
    "Lost",
    "Outcome",
    "Refused",
    "Retried",
    "Slow",
    "Spec",
    "Unusable",
    "Waiting",
    "delivered",
    "local_workers",
    "open_cluster",
    "visible_device",
]


@contextlib.contextmanager
def open_cluster(
    where: ClusterConfig, device: str | None, stop: threading.Event
) -> Iterator[Cluster]:
    """Start or reach the cluster that `where` names, and restore its state afterwards.

    Args:
        where: inline, local, or the address of a scheduler.
        device: "cuda" or "cpu"; None for a GPU if there is one. At an address the workers decide.
        stop: drains the cluster when set.

    Raises:
        ResourceError: if workers do not start or cannot be reached.
        InputError: for an unknown kind, or options that do not belong to it.
    """
    where.check()
    if where.kind == "inline":
        opened: contextlib.AbstractContextManager[Cluster] = Inline.opened(
            device or visible_device(), stop
        )
    elif where.kind == "local":
        opened = on_this_host(where, device or visible_device(), stop)
    elif where.is_address:
        opened = at_address(where, device, stop)
    else:
        raise InputError(
            f"--cluster {where.kind!r} is unknown. Use local, inline, tcp://HOST:PORT, "
            "tls://HOST:PORT or file:SCHEDULER.json."
        )
    with opened as cluster:
        yield cluster
