"""Decide which worker is given which spec, and what becomes of it, without knowing an engine.

`Assignments` is told what happened: a worker came, answered or is gone, a spec is finished, so late
it is. It answers with what is to be done: hand a spec to a worker, cancel it, ask a newcomer, or
report an `Outcome`. It reads no clock and starts nothing, so that the same events have the same
answers.

Its laws:

* A worker has at most `WINDOW` specs: one it works on, and others that wait there.
* A spec that is taken ends as `Done` or as `Lost`, once; after `drain`, what is not handed out ends
  without either.
* A death counts against the spec its worker was working on, not against those that waited there.
* An answer that comes after its spec was dealt with, or twice, changes nothing.
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
TRIES = 2  # deaths that lose a spec
LEAVES = 4  # workers that left, each in the middle of it, that lose a spec
ANSWER_SECONDS = 120.0  # for a worker to come up, or to answer a small question
ALONE_SECONDS = 300.0  # without any worker
QUIET_SECONDS = 10.0  # of them, in which a nanny starts a new one
LEAVE_SECONDS = 45.0  # Dask lets what runs on a leaving worker go on for 30
SLOW_SECONDS = 60.0  # and ten times as long as its peers
SILENT = (
    f"did not answer within {duration(ANSWER_SECONDS)}: it is busy with other work, stuck, or "
    "without lca_posthoc"
)
DIED = "its worker died or cannot be reached"
LEFT = "its worker left before it was done"


@dataclass(frozen=True)
class Submit:
    """A spec is to be handed to a worker; its answer comes with the number of the attempt."""

    attempt: int
    worker: str
    spec: Spec


@dataclass(frozen=True)
class Cancel:
    """An attempt is nobody's any more."""

    attempt: int


@dataclass(frozen=True)
class Ask:
    """A newcomer is to be asked whether it can take part."""

    attempt: int
    worker: str


@dataclass(frozen=True)
class Overdue:
    """An attempt takes far longer than its peers; `worker` is the name people know."""

    attempt: int
    spec: Spec
    worker: str
    seconds: float


@dataclass(frozen=True)
class Abandoned:
    """No worker is left, and none came in so many seconds: there is nothing more to wait for."""

    seconds: float


Action = Submit | Cancel | Ask | Overdue | Abandoned | Outcome


@dataclass
class InFlight:
    """A spec under way, and how often a worker died of it or left."""

    spec: Spec
    deaths: int = 0
    leaves: int = 0


@dataclass
class WorkerSlot:
    """A worker that takes part: its specs by attempt, of which it works on the first, since when,
    and when that was last reported as slow.
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
    """A spec whose worker was told to leave, and until when it may still finish it."""

    flight: InFlight
    name: str
    deadline: float


class Assignments:
    """Assign specs to workers.

    Args:
        specs: taken one by one, when there is room; None where there is none before another one
            underway has ended.
        now: seconds on any clock, as in every event.
        leave_seconds: for which a worker that was told to leave may still finish what it works on.
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

    # --- what is

    @property
    def is_over(self) -> bool:
        """Tell whether nothing is under way and nothing will be."""
        underway = self._leavers or any(slot.flights for slot in self._slots.values())
        return not underway and (self._draining or (self._exhausted and not self._again))

    @property
    def attempts(self) -> list[int]:
        """Return the attempts that are with workers now."""
        return [attempt for slot in self._slots.values() for attempt in slot.flights]

    @property
    def newcomers(self) -> dict[int, str]:
        """Return, by attempt, the workers that were asked and did not answer yet."""
        return {attempt: newcomer.worker for attempt, newcomer in self._newcomers.items()}

    @property
    def leaving(self) -> dict[int, Spec]:
        """Return, by attempt, the specs whose workers may still finish though they are gone."""
        return {attempt: leaver.flight.spec for attempt, leaver in self._leavers.items()}

    # --- workers come and go

    def take_in(self, worker: str, name: str) -> None:
        """Let a worker take part."""
        self._slots[worker] = WorkerSlot(name)

    def came(self, worker: str, name: str, now: float) -> list[Action]:
        """Ask a worker that joined before it takes part."""
        attempt = next(self._attempts)
        self._newcomers[attempt] = _Newcomer(worker, name, now)
        return [Ask(attempt, worker)]

    def answered(self, attempt: int, refusal: str | None) -> list[Action]:
        """Let a newcomer take part, or refuse it with the reason."""
        newcomer = self._newcomers.pop(attempt, None)
        if newcomer is None:  # it was refused because it did not answer in time
            return []
        if refusal is not None:
            return [Refused(newcomer.name, refusal)]
        self.take_in(newcomer.worker, newcomer.name)
        return []

    def gone(self, worker: str, now: float, *, may_finish: bool, why: str = DIED) -> list[Action]:
        """Count a death against the spec a worker that is gone was working on, unless it may still
        finish; specs that waited there are handed out again. `why` says what it died of.
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
        """Hand one spec to every worker first, then one that waits there."""
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
        """Report what a spec returned."""
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
        """Count an exception that nobody caught like a death."""
        slot = self._slot_of(attempt)
        if slot is None:
            return []
        flight = slot.flights.pop(attempt)
        flight.deaths += 1
        return [self._try_again(flight, slot.name, why)]

    def drain(self) -> None:
        """Hand out nothing more; what is under way may end."""
        self._draining = True

    # --- time passes

    def tick(self, now: float) -> list[Action]:
        """Give up newcomers that do not answer and leavers that did not finish; name what is slow,
        and that nobody is left.
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
