"""Define the contract of an engine: the five methods of `Cluster`, and the outcomes that
`Cluster.map` yields.

Another engine is one new file with these five methods, and its line in `open_cluster`. It decides
neither which worker gets which spec nor what a worker's death costs: `assignments` does, for any
engine whose workers may die, join and leave.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from typing import Protocol

Spec = dict[str, object]
Function = Callable[[Spec], object]
Question = Callable[[Spec], Spec]
Committed = Callable[[Spec], object]


class Unusable(Exception):
    """Raised by a function whose process can compute nothing more: its worker is restarted and the
    spec retried once elsewhere.
    """


@dataclass(frozen=True)
class Done:
    """A spec, its function's result, and its worker; the result is None if the cluster drained
    before starting it.

    `workers` is how many work now.
    """

    spec: Spec
    result: object
    worker: str = "this process"
    workers: int = 1


@dataclass(frozen=True)
class Lost:
    """A spec that no worker could finish, and why."""

    spec: Spec
    why: str


@dataclass(frozen=True)
class Retried:
    """A spec is retried, because its worker died or left."""

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
    """A worker joined but cannot take part."""

    worker: str
    why: str


@dataclass(frozen=True)
class Waiting:
    """No worker is left; the cluster waits for one, for some seconds."""

    seconds: float


Outcome = Done | Lost | Retried | Slow | Refused | Waiting


@dataclass(frozen=True, kw_only=True)
class Crew:
    """The workers that take part now.

    Attributes:
        workers: how many.
        device: "cuda" or "cpu", on which they compute; None until `Cluster.settle_on`.
        max_per_host: the most that share a host.
        several_threads: names of those with more than one thread.
        dashboard: the address of the engine's own page, if it has one.
    """

    workers: int
    device: str | None
    max_per_host: int = 1
    several_threads: tuple[str, ...] = ()
    dashboard: str | None = None


class Cluster(Protocol):
    """A way to run a callable over specs."""

    def crew(self) -> Crew:
        """Return the workers that take part now."""

    def deliver(self, data: bytes) -> str:
        """Make bytes available to every worker, including later ones; return the key for
        `delivered`.
        """

    def check_workers(self, question: Question, spec: Spec) -> dict[str, Spec]:
        """Return a question's answer from each worker, before any gets work; later workers are
        asked too.

        A worker whose answer holds `"error"`, or that gives none, does not take part.

        Args:
            question: a function at module level.
            spec: its argument.
        """

    def settle_on(self, device: str) -> None:
        """Compute on "cuda" or "cpu" from now on.

        Raises:
            ResourceError: naming the workers that cannot.
        """

    def map(
        self, function: Function, specs: Iterable[Spec | None], committed: Committed | None = None
    ) -> Generator[Outcome]:
        """Yield the outcome of each spec as it arrives, taking specs from the iterable only when
        there is room.

        Specs may depend on outcomes: the iterable yields None while the next spec needs another
        outcome first, and is asked again after it.

        Args:
            function: at module level.
            specs: JSON-like.
            committed: returns the result of a spec whose worker left during it, or None while there
                is none.
        """
