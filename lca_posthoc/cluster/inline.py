"""Run specs in this process, one after the other."""

from __future__ import annotations

import contextlib
import threading
import uuid
from collections.abc import Generator, Iterable, Iterator

from . import broadcast
from .protocol import (
    Cluster,
    Committed,
    Crew,
    Done,
    Function,
    Lost,
    Outcome,
    Question,
    Spec,
    Unusable,
)


class Inline:
    """An engine without workers; see `Cluster`."""

    def __init__(self, device: str, stop: threading.Event) -> None:
        self._device, self._stop = device, stop
        self._delivered: list[str] = []

    @classmethod
    @contextlib.contextmanager
    def opened(cls, device: str, stop: threading.Event) -> Iterator[Cluster]:
        """Open a cluster that forgets delivered bytes at the end.

        Args:
            device: "cuda" or "cpu".
            stop: drains the cluster when set.
        """
        cluster = cls(device, stop)
        try:
            yield cluster
        finally:
            for key in cluster._delivered:
                broadcast.drop(key)

    def crew(self) -> Crew:
        """Return this process as the crew, see `Cluster.crew`."""
        return Crew(workers=1, device=self._device)

    def deliver(self, data: bytes) -> str:
        """Keep bytes in this process, see `Cluster.deliver`."""
        self._delivered.append(uuid.uuid4().hex)
        broadcast.take_in(self._delivered[-1], data)
        return self._delivered[-1]

    def check_workers(self, question: Question, spec: Spec) -> dict[str, Spec]:
        """Ask this process, see `Cluster.check_workers`.

        Args:
            question: a function.
            spec: its argument.
        """
        try:
            return {"this process": question(spec)}
        except Unusable as error:
            return {"this process": {"error": str(error)}}

    def settle_on(self, device: str) -> None:
        """Compute on a device from now on, see `Cluster.settle_on`."""
        self._device = device

    def map(
        self, function: Function, specs: Iterable[Spec | None], committed: Committed | None = None
    ) -> Generator[Outcome]:
        """Yield the outcome of each spec, see `Cluster.map`.

        Args:
            function: to run.
            specs: JSON-like.
            committed: unused; no worker can leave.
        """
        for spec in specs:
            if self._stop.is_set():
                return
            assert spec is not None, "nothing is underway that a spec could follow from"
            try:
                result = function(spec)
            except Unusable as error:
                yield Lost(spec, str(error))
            else:
                yield Done(spec, result)
