"""The contract of an engine: five methods of `Cluster`, and what `Cluster.map` tells of each spec.

Another engine is one new file that offers these five, and its line in `open_cluster`. It decides
neither who gets which spec nor what a worker's death costs: `assignments` does, for any engine
whose workers may die, join and leave.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Protocol

Spec = dict[str, object]
Function = Callable[[Spec], object]
Question = Callable[[Spec], Spec]
Committed = Callable[[Spec], object]


@dataclass(frozen=True)
class Done:
    """A spec and what its function returned, on which worker; None where the cluster drained before
    it was started. `workers` is how many work now.
    """

    spec: Spec
    result: object
    worker: str = "this process"
    workers: int = 1


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


@dataclass(frozen=True, kw_only=True)
class Crew:
    """The workers that take part now.

    Attributes:
        workers: how many.
        device: "cuda" or "cpu", on which they compute; None until `Cluster.settle_on`.
        max_per_host: the most that share a host.
        several_threads: names of those that have more than one thread.
        dashboard: the address of the engine's own page, where it has one.
    """

    workers: int
    device: str | None
    max_per_host: int = 1
    several_threads: tuple[str, ...] = ()
    dashboard: str | None = None


class Cluster(Protocol):
    """One way to run a callable over specs."""

    def crew(self) -> Crew:
        """Return who takes part now."""

    def deliver(self, data: bytes) -> str:
        """Put bytes where every worker finds them, also one that joins later; returns the key for
        `delivered`.
        """

    def check_workers(self, question: Question, spec: Spec) -> dict[str, Spec]:
        """Return what a question returns on each worker, before any gets work; late ones are asked
        the same.

        A worker whose answer holds `"error"`, or that gives none, does not take part.
        """

    def settle_on(self, device: str) -> None:
        """Compute on "cuda" or "cpu" from here on.

        Raises:
            ResourceError: naming the workers that cannot.
        """

    def map(
        self, function: Function, specs: Iterable[Spec | None], committed: Committed | None = None
    ) -> Generator[Outcome]:
        """Yield what becomes of each spec, as it comes; specs are taken from the iterable only when
        there is room.

        Specs may follow from outcomes: the iterable gives None where there is none before another
        of those underway has ended, and is asked again then.

        Args:
            function: at module level.
            specs: JSON-like.
            committed: the result of a spec whose worker left in the middle of it, or None while
                there is none.
        """
