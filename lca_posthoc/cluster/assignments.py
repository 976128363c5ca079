"""Decide which worker gets which spec, and how specs end, independently of an engine.

`Assignments` receives events: a worker came, answered or left, a spec finished, time passed. It
answers with actions: submit a spec to a worker, cancel it, ask a newcomer, or report an `Outcome`.
It reads no clock and starts nothing, so that equal events have equal answers.

Its laws:

* A worker has at most `WINDOW` specs: one it works on, and others that wait there.
* A spec that is taken ends as `Done` or as `Lost`, once; after `drain`, specs that were not
submitted end without either.
* A death counts against the spec its worker was working on, not against those that waited there.
* An answer that arrives after its spec ended, or twice, changes nothing.
"""

from __future__ import annotations

import itertools
import statistics
from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from ..base.text import duration
from .protocol import Done, Lost, Outcome, Refused, Retried, Spec, Waiting

WINDOW = 2  # specs of a worker: the one it works on, and one that waits there
TRIES = 2  # deaths after which a spec is lost
LEAVES = 4  # workers that left during a spec after which it is lost
ANSWER_SECONDS = 120.0  # for a worker to start, or to answer a small question
ALONE_SECONDS = 300.0  # without any worker
QUIET_SECONDS = 10.0  # of these, in which a nanny starts a new one
LEAVE_SECONDS = 45.0  # Dask lets a leaving worker's task run for 30
SLOW_SECONDS = 60.0  # and ten times as long as its peers
SILENT = (
    f"did not answer within {duration(ANSWER_SECONDS)}: it is busy with other work, stuck, or "
    "lacks lca_posthoc"
)
DIED = "its worker died or cannot be reached"
LEFT = "its worker left before finishing it"


@dataclass(frozen=True)
class Submit:
    """Submit a spec to a worker; its answer carries the number of the attempt."""

    attempt: int
    worker: str
    spec: Spec


@dataclass(frozen=True)
class Cancel:
    """Cancel an attempt that nobody needs any more."""

    attempt: int


@dataclass(frozen=True)
class Ask:
    """Ask a newcomer whether it can take part."""

    attempt: int
    worker: str


@dataclass(frozen=True)
class Overdue:
    """Report an attempt that takes far longer than its peers; `worker` is its readable name."""

    attempt: int
    spec: Spec
    worker: str
    seconds: float


@dataclass(frozen=True)
class Abandoned:
    """Give up: no worker is left, and none came in so many seconds."""

    seconds: float


Action = Submit | Cancel | Ask | Overdue | Abandoned | Outcome


@dataclass
class InFlight:
    """A spec underway, with the numbers of workers that died or left during it."""

    spec: Spec
    deaths: int = 0
    leaves: int = 0


@dataclass
class WorkerSlot:
    """A worker that takes part: its specs by attempt (it works on the first), since when, and when
    it was last reported as slow.
    """

    name: str
    flights: dict[int, InFlight] = field(default_factory=dict)
    since: float = 0.0
    reported: float = 0.0


@dataclass(frozen=True)
class _Newcomer:
    """A worker that was asked, and when."""

    worker: str
    name: str
    since: float


@dataclass(frozen=True)
class _Leaver:
    """A spec whose worker was told to leave, and the time until which it may finish."""

    flight: InFlight
    name: str
    deadline: float


class Assignments:
    """Assigns specs to workers.

    Args:
        specs: taken one by one when there is room; yields None while the next one needs another
            outcome first.
        now: seconds on any clock, as in every event.
        leave_seconds: for which a worker that was told to leave may finish its current spec.
    """

    def __init__(
        self, specs: Iterable[Spec | None], now: float, leave_seconds: float = LEAVE_SECONDS
    ) -> None:
        self._specs = iter(specs)
        self._leave_seconds = leave_seconds
        self._exhausted = False
        self._draining = False
        self._attempts = itertools.count()
        self._again: deque[InFlight] = deque()
        self._slots: dict[str, WorkerSlot] = {}
        self._newcomers: dict[int, _Newcomer] = {}
        self._leavers: dict[int, _Leaver] = {}
        self._durations: deque[float] = deque(maxlen=200)
        self._alone_since = now
        self._reported_alone = False

    # --- state

    @property
    def is_over(self) -> bool:
        """Tell whether nothing is underway and nothing will be."""
        underway = self._leavers or any(slot.flights for slot in self._slots.values())
        return not underway and (self._draining or (self._exhausted and not self._again))

    @property
    def attempts(self) -> list[int]:
        """Return the attempts that workers have now."""
        return [attempt for slot in self._slots.values() for attempt in slot.flights]

    @property
    def newcomers(self) -> dict[int, str]:
        """Return, by attempt, the workers that were asked and have not answered yet."""
        return {attempt: newcomer.worker for attempt, newcomer in self._newcomers.items()}

    @property
    def leaving(self) -> dict[int, Spec]:
        """Return, by attempt, the specs that workers which left may still finish."""
        return {attempt: leaver.flight.spec for attempt, leaver in self._leavers.items()}

    # --- workers come and go

    def take_in(self, worker: str, name: str) -> None:
        """Let a worker take part.

        Args:
            worker: its address.
            name: its readable name.
        """
        self._slots[worker] = WorkerSlot(name)

    def came(self, worker: str, name: str, now: float) -> list[Action]:
        """Ask a worker that joined before it takes part.

        Args:
            worker: its address.
            name: its readable name.
            now: seconds on the clock.
        """
        attempt = next(self._attempts)
        self._newcomers[attempt] = _Newcomer(worker, name, now)
        return [Ask(attempt, worker)]

    def answered(self, attempt: int, refusal: str | None) -> list[Action]:
        """Let a newcomer take part, or reject it.

        Args:
            attempt: of the question.
            refusal: the reason; None to accept.
        """
        newcomer = self._newcomers.pop(attempt, None)
        if newcomer is None:  # it was rejected for not answering in time
            return []
        if refusal is not None:
            return [Refused(newcomer.name, refusal)]
        self.take_in(newcomer.worker, newcomer.name)
        return []

    def gone(self, worker: str, now: float, *, may_finish: bool, why: str = DIED) -> list[Action]:
        """Count a death against the current spec of a lost worker, unless it may still finish;
        reassign specs that waited there.

        Args:
            worker: its address.
            now: seconds on the clock.
            may_finish: whether the worker was told to leave, and may finish its current spec.
            why: the cause of the death.
        """
        slot = self._slots.pop(worker, None)
        if slot is None:
            return []
        actions: list[Action] = [Cancel(attempt) for attempt in slot.flights]
        if self._draining:
            return actions
        for position, (attempt, flight) in enumerate(slot.flights.items()):
            if position > 0:
                self._again.append(flight)
            elif may_finish:
                deadline = now + self._leave_seconds
                self._leavers[attempt] = _Leaver(flight, slot.name, deadline)
            else:
                flight.deaths += 1
                actions.append(self._try_again(flight, slot.name, why))
        return actions

    # --- specs

    def assign(self, now: float) -> list[Submit]:
        """Submit one spec to every worker first, then one that waits there."""
        submitted: list[Submit] = []
        for filled in range(WINDOW):
            for worker, slot in self._slots.items():
                if len(slot.flights) == filled:
                    flight = self._next_flight()
                    if flight is None:
                        return submitted
                    submitted.append(self._hand(worker, slot, flight, now))
        return submitted

    def finished(self, attempt: int, result: object, now: float) -> list[Action]:
        """Report the result of a spec.

        Args:
            attempt: of the spec.
            result: of its function.
            now: seconds on the clock.
        """
        leaver = self._leavers.pop(attempt, None)
        if leaver is not None:
            return [Done(leaver.flight.spec, result, leaver.name, len(self._slots))]
        slot = self._slot_of(attempt)
        if slot is None:
            return []
        self._durations.append(now - slot.since)
        slot.since = slot.reported = now
        flight = slot.flights.pop(attempt)
        return [Done(flight.spec, result, slot.name, len(self._slots))]

    def failed(self, attempt: int, why: str) -> list[Action]:
        """Count an uncaught exception like a death.

        Args:
            attempt: of the spec.
            why: describes the exception.
        """
        slot = self._slot_of(attempt)
        if slot is None:
            return []
        flight = slot.flights.pop(attempt)
        flight.deaths += 1
        return [self._try_again(flight, slot.name, why)]

    def drain(self) -> None:
        """Submit nothing more; specs underway may end."""
        self._draining = True

    # --- time passes

    def tick(self, now: float) -> list[Action]:
        """Give up newcomers that do not answer and leavers that do not finish; report slow specs,
        and that no worker is left.
        """
        return [
            *self._silent_newcomers(now),
            *self._late_leavers(now),
            *self._slow(now),
            *self._alone(now),
        ]

    def _silent_newcomers(self, now: float) -> list[Action]:
        silent = {
            attempt: newcomer
            for attempt, newcomer in self._newcomers.items()
            if now - newcomer.since > ANSWER_SECONDS
        }
        for attempt in silent:
            del self._newcomers[attempt]
        return [Refused(newcomer.name, SILENT) for newcomer in silent.values()]

    def _late_leavers(self, now: float) -> list[Action]:
        late = {
            attempt: leaver
            for attempt, leaver in self._leavers.items()
            if self._draining or now >= leaver.deadline
        }
        actions: list[Action] = []
        for attempt, leaver in late.items():
            del self._leavers[attempt]
            if not self._draining:
                leaver.flight.leaves += 1
                actions.append(self._try_again(leaver.flight, leaver.name, LEFT))
        return actions

    def _slow(self, now: float) -> list[Action]:
        usual = 10 * (statistics.median(self._durations) if self._durations else SLOW_SECONDS)
        actions: list[Action] = []
        for slot in self._slots.values():
            if slot.flights and now - slot.reported > max(SLOW_SECONDS, usual):
                slot.reported = now
                attempt, flight = next(iter(slot.flights.items()))
                actions.append(Overdue(attempt, flight.spec, slot.name, now - slot.since))
        return actions

    def _alone(self, now: float) -> list[Action]:
        if self._slots or self._newcomers or self._draining:
            self._alone_since, self._reported_alone = now, False
        elif not self._reported_alone and now - self._alone_since > QUIET_SECONDS:
            self._reported_alone = True
            return [Waiting(ALONE_SECONDS)]
        elif now - self._alone_since > ALONE_SECONDS:
            return [Abandoned(ALONE_SECONDS)]
        return []

    # --- steps

    def _next_flight(self) -> InFlight | None:
        if self._draining:
            return None
        if self._again:
            return self._again.popleft()
        if self._exhausted:
            return None
        try:
            spec = next(self._specs)
        except StopIteration:
            self._exhausted = True
            return None
        return None if spec is None else InFlight(spec)

    def _hand(self, worker: str, slot: WorkerSlot, flight: InFlight, now: float) -> Submit:
        if not slot.flights:
            slot.since = slot.reported = now
        attempt = next(self._attempts)
        slot.flights[attempt] = flight
        return Submit(attempt, worker, flight.spec)

    def _slot_of(self, attempt: int) -> WorkerSlot | None:
        return next((slot for slot in self._slots.values() if attempt in slot.flights), None)

    def _try_again(self, flight: InFlight, name: str, why: str) -> Outcome:
        if flight.deaths >= TRIES or flight.leaves >= LEAVES:
            return Lost(flight.spec, why)
        self._again.append(flight)
        return Retried(flight.spec, name, why)
