"""The places where work runs: this process, local Dask workers, or those of a scheduler somewhere.
A cluster gets a callable and JSON-like specs; it knows no more.

`protocol` is what an engine offers; `assignments` decides who gets which spec and what a death
costs, for engines whose workers come and go; `dask` carries that out on a Dask `scheduler`, started
by `local` or reached by `remote`; `inline` needs none of it. A cluster drains when its `stop` event
is set: what runs is finished, what waits is not started.
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
    """Start or reach what `where` names and leave it as it was afterwards.

    Args:
        where: inline, local, or the address of a scheduler.
        device: "cuda" or "cpu"; None for a GPU where there is one. At an address the workers tell.
        stop: set by whoever wants the cluster to drain.

    Raises:
        ResourceError: where workers do not come up or cannot be reached.
        InputError: for another kind, or options that do not go with it.
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
            f"--cluster {where.kind!r} is not known. Use local, inline, tcp://HOST:PORT, "
            "tls://HOST:PORT or file:SCHEDULER.json."
        )
    with opened as cluster:
        yield cluster
