"""The contract of a cluster: what becomes of specs, and how it is asked."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

Spec = dict[str, Any]
Function = Callable[[Spec], Any]
Settled = Callable[[Spec], Any]


@dataclass(frozen=True)
class Done:
    """A spec and what its function returned, on which worker; None where the cluster drained before
    it was started.
    """

    spec: Spec
    result: Any
    worker: str = "this process"


@dataclass(frozen=True)
class Lost:
    """A spec no worker could finish, and why."""

    spec: Spec
    why: str


@dataclass(frozen=True)
class Retried:
    """A spec is tried again, because its worker died or left."""

    spec: Spec
    worker: str
    why: str


@dataclass(frozen=True)
class Slow:
    """A spec takes far longer than its peers; `doing` is the stack of its worker, the innermost
    call last.
    """

    spec: Spec
    worker: str
    seconds: float
    doing: list[str]


@dataclass(frozen=True)
class Refused:
    """A worker joined and cannot take part."""

    worker: str
    why: str


@dataclass(frozen=True)
class Waiting:
    """No worker is left; the cluster waits so long for one."""

    seconds: float


Outcome = Done | Lost | Retried | Slow | Refused | Waiting


class Cluster(Protocol):
    """One way to run a callable over specs.

    `device` is what workers compute on, None until they have told; `dashboard` the address of
    Dask's, where it is on.
    """

    device: str | None
    dashboard: str | None

    @property
    def workers(self) -> int:
        """Count the workers that work now."""

    @property
    def max_per_host(self) -> int:
        """The most that share a host."""

    @property
    def several_threads(self) -> Sequence[str]:
        """The workers that have more than one thread."""

    def deliver(self, data: bytes) -> str:
        """Put bytes where every worker finds them, also one that joins later; returns the key for
        `delivered`.
        """

    def check_workers(self, function: Function, spec: Spec) -> dict[str, Any]:
        """Return what a callable returns on each worker, before any gets work; late ones are asked
        the same.

        A worker whose answer holds `"error"`, or that gives none, does not take part.
        """

    def settle_on(self, device: str) -> None:
        """Compute on "cuda" or "cpu" from here on."""

    def map(
        self, function: Function, specs: Iterable[Spec], settled: Settled | None = None
    ) -> Generator[Outcome]:
        """Yield what becomes of each spec, as it comes; specs are taken from the iterable only when
        there is room.

        Args:
            function: at module level.
            specs: JSON-like.
            settled: the result of a spec whose worker left in the middle of it, or None while there
                is none.
        """
