"""In this process, one spec after the other."""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Generator, Iterable, Iterator

from . import broadcast
from .protocol import Cluster, Committed, Crew, Done, Function, Outcome, Question, Spec


class Inline:
    """See `Cluster`."""

    def __init__(self, device: str, stop: threading.Event) -> None:
        self._device, self._stop = device, stop
        self._delivered: list[str] = []

    @classmethod
    @contextlib.contextmanager
    def opened(cls, device: str, stop: threading.Event) -> Iterator[Cluster]:
        """Open a cluster that forgets what was delivered when it is over."""
        cluster = cls(device, stop)
        try:
            yield cluster
        finally:
            for key in cluster._delivered:
                broadcast.drop(key)

    def crew(self) -> Crew:
        """See `Cluster.crew`."""
        return Crew(workers=1, device=self._device)

    def deliver(self, data: bytes) -> str:
        """See `Cluster.deliver`."""
        self._delivered.append(uuid.uuid4().hex)
        broadcast.take_in(self._delivered[-1], data)
        return self._delivered[-1]

    def check_workers(self, question: Question, spec: Spec) -> dict[str, Spec]:
        """See `Cluster.check_workers`."""
        return {"this process": question(spec)}

    def settle_on(self, device: str) -> None:
        """See `Cluster.settle_on`."""
        self._device = device

    def map(
        self, function: Function, specs: Iterable[Spec | None], committed: Committed | None = None
    ) -> Generator[Outcome]:
        """See `Cluster.map`."""
        for spec in specs:
            if self._stop.is_set():
                return
            assert spec is not None, "nothing is underway that a spec could follow from"
            yield Done(spec, function(spec))
