"""Who gets which spec: the state machine alone, without an engine.

Cases are stories of events in turn, with what must come of each; laws are checked on stories that
hypothesis makes up.
"""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)

from lca_posthoc.cluster import Done, Lost, Refused, Retried, Spec, Waiting
from lca_posthoc.cluster.assignments import (
    ALONE_SECONDS,
    ANSWER_SECONDS,
    DIED,
    LEAVE_SECONDS,
    LEAVES,
    LEFT,
    QUIET_SECONDS,
    SILENT,
    SLOW_SECONDS,
    TRIES,
    WINDOW,
    Abandoned,
    Action,
    Ask,
    Assignments,
    Cancel,
    Overdue,
    Submit,
)


def specs(count: int) -> Iterator[Spec]:
    return ({"value": value} for value in range(count))


def assigned(count: int, *workers: str) -> Assignments:
    machine = Assignments(specs(count), now=0.0)
    for worker in workers:
        machine.take_in(worker, worker)
    return machine


def shown(actions: list[Any]) -> list[str]:
    """Actions in short, so that a story can say what it expects."""
    return [_shown(action) for action in actions]


def _shown(action: Action) -> str:
    match action:
        case Submit(attempt, worker, spec):
            return f"{attempt}: {spec['value']} to {worker}"
        case Cancel(attempt):
            return f"cancel {attempt}"
        case Ask(attempt, worker):
            return f"{attempt}: ask {worker}"
        case Done(spec, result, worker, workers):
            return f"{spec['value']} is {result} on {worker} of {workers}"
        case Lost(spec, why):
            return f"{spec['value']} lost: {why}"
        case Retried(spec, worker, why):
            return f"{spec['value']} again after {worker}: {why}"
        case Refused(worker, why):
            return f"{worker} refused: {why}"
        case Overdue(attempt, spec, worker, seconds):
            return f"{attempt}: {spec['value']} slow on {worker} for {seconds:g}"
        case Waiting(seconds):
            return f"waiting {seconds:g}"
        case Abandoned(seconds):
            return f"abandoned after {seconds:g}"


Story = list[tuple[Callable[[Assignments], Any], list[str]]]


def hand_out(now: float = 0.0) -> Callable[[Assignments], Any]:
    return lambda machine: machine.assign(now)


def finish(attempt: int, result: str = "ok", now: float = 1.0) -> Callable[[Assignments], Any]:
    return lambda machine: machine.finished(attempt, result, now)


def fail(attempt: int) -> Callable[[Assignments], Any]:
    return lambda machine: machine.failed(attempt, "boom")


def die(worker: str, now: float = 1.0) -> Callable[[Assignments], Any]:
    return lambda machine: machine.gone(worker, now, may_finish=False)


def leave(worker: str, now: float = 1.0) -> Callable[[Assignments], Any]:
    return lambda machine: machine.gone(worker, now, may_finish=True)


def tick(now: float) -> Callable[[Assignments], Any]:
    return lambda machine: machine.tick(now)


def join(worker: str) -> Callable[[Assignments], Any]:
    return lambda machine: machine.take_in(worker, worker) or []


def come(worker: str, now: float = 0.0) -> Callable[[Assignments], Any]:
    return lambda machine: machine.came(worker, worker, now)


def answer(attempt: int, refusal: str | None = None) -> Callable[[Assignments], Any]:
    return lambda machine: machine.answered(attempt, refusal)


def drain(machine: Assignments) -> list[Action]:
    machine.drain()
    return []


STORIES: dict[str, tuple[int, tuple[str, ...], Story, bool]] = {
    "one to every worker first, then one to wait": (
        9,
        ("a", "b"),
        [
            (hand_out(), ["0: 0 to a", "1: 1 to b", "2: 2 to a", "3: 3 to b"]),
            (hand_out(), []),
            (finish(1), ["1 is ok on b of 2"]),
            (hand_out(), ["4: 4 to b"]),
        ],
        False,
    ),
    "it is over when all are done": (
        2,
        ("a",),
        [
            (hand_out(), ["0: 0 to a", "1: 1 to a"]),
            (finish(0), ["0 is ok on a of 1"]),
            (hand_out(), []),
            (finish(1), ["1 is ok on a of 1"]),
        ],
        True,
    ),
    "a result of None or False is a result": (
        1,
        ("a",),
        [(hand_out(), ["0: 0 to a"]), (finish(0, None), ["0 is None on a of 1"]), (hand_out(), [])],
        True,
    ),
    "a death costs a second try elsewhere, under a new number": (
        1,
        ("a", "b"),
        [
            (hand_out(), ["0: 0 to a"]),
            (die("a"), ["cancel 0", f"0 again after a: {DIED}"]),
            (hand_out(), ["1: 0 to b"]),
            (finish(1), ["0 is ok on b of 1"]),
        ],
        True,
    ),
    "a second death loses it, by name": (
        1,
        ("a", "b"),
        [
            (hand_out(), ["0: 0 to a"]),
            (die("a"), ["cancel 0", f"0 again after a: {DIED}"]),
            (hand_out(), ["1: 0 to b"]),
            (die("b"), ["cancel 1", f"0 lost: {DIED}"]),
            (hand_out(), []),
        ],
        True,
    ),
    "what waited on a worker that died is charged nothing": (
        2,
        ("a",),
        [
            (hand_out(), ["0: 0 to a", "1: 1 to a"]),
            (die("a"), ["cancel 0", "cancel 1", f"0 again after a: {DIED}"]),
            (join("b"), []),
            (hand_out(), ["2: 0 to b", "3: 1 to b"]),
            (die("b"), ["cancel 2", "cancel 3", f"0 lost: {DIED}"]),
            (join("c"), []),
            (hand_out(), ["4: 1 to c"]),
            (die("c"), ["cancel 4", f"1 again after c: {DIED}"]),
        ],
        False,
    ),
    "what waited runs after the first is done, and is charged then": (
        2,
        ("a",),
        [
            (hand_out(), ["0: 0 to a", "1: 1 to a"]),
            (finish(0), ["0 is ok on a of 1"]),
            (die("a"), ["cancel 1", f"1 again after a: {DIED}"]),
        ],
        False,
    ),
    "an exception counts like a death, and may be tried where it was": (
        1,
        ("a",),
        [
            (hand_out(), ["0: 0 to a"]),
            (fail(0), ["0 again after a: boom"]),
            (hand_out(), ["1: 0 to a"]),
            (fail(1), ["0 lost: boom"]),
            (hand_out(), []),
        ],
        True,
    ),
    "an exception and a death are two": (
        1,
        ("a", "b"),
        [
            (hand_out(), ["0: 0 to a"]),
            (fail(0), ["0 again after a: boom"]),
            (hand_out(), ["1: 0 to a"]),
            (die("a"), ["cancel 1", f"0 lost: {DIED}"]),
        ],
        True,
    ),
    "an answer that comes after the death is nobody's": (
        1,
        ("a", "b"),
        [
            (hand_out(), ["0: 0 to a"]),
            (die("a"), ["cancel 0", f"0 again after a: {DIED}"]),
            (finish(0), []),
            (fail(0), []),
            (hand_out(), ["1: 0 to b"]),
            (finish(0), []),
            (finish(1), ["0 is ok on b of 1"]),
        ],
        True,
    ),
    "an answer that comes twice counts once": (
        2,
        ("a",),
        [
            (hand_out(), ["0: 0 to a", "1: 1 to a"]),
            (finish(0), ["0 is ok on a of 1"]),
            (finish(0), []),
            (fail(0), []),
            (finish(7), []),
        ],
        False,
    ),
    "a worker that is gone twice is gone once": (
        1,
        ("a",),
        [
            (hand_out(), ["0: 0 to a"]),
            (die("a"), ["cancel 0", f"0 again after a: {DIED}"]),
            (die("a"), []),
            (die("never seen"), []),
        ],
        False,
    ),
    "a worker that was told to leave may still finish": (
        2,
        ("a", "b"),
        [
            (hand_out(), ["0: 0 to a", "1: 1 to b"]),
            (leave("a"), ["cancel 0"]),
            (tick(LEAVE_SECONDS), []),
            (hand_out(), []),
            (finish(0), ["0 is ok on a of 1"]),
            (finish(0), []),
            (finish(1), ["1 is ok on b of 1"]),
        ],
        True,
    ),
    "a worker that left before it was done costs less than a death": (
        1,
        ("a", "b"),
        [
            (hand_out(), ["0: 0 to a"]),
            (leave("a", 1.0), ["cancel 0"]),
            (tick(1.0 + LEAVE_SECONDS), [f"0 again after a: {LEFT}"]),
            (finish(0), []),
            (hand_out(), ["1: 0 to b"]),
            (die("b"), ["cancel 1", f"0 again after b: {DIED}"]),
        ],
        False,
    ),
    "what waited on a worker that left is handed out at once": (
        2,
        ("a",),
        [
            (hand_out(), ["0: 0 to a", "1: 1 to a"]),
            (leave("a"), ["cancel 0", "cancel 1"]),
            (join("b"), []),
            (hand_out(), ["2: 1 to b"]),
        ],
        False,
    ),
    "a drain lets what runs end and hands out nothing": (
        9,
        ("a",),
        [
            (hand_out(), ["0: 0 to a", "1: 1 to a"]),
            (drain, []),
            (finish(0), ["0 is ok on a of 1"]),
            (hand_out(), []),
            (finish(1, None), ["1 is None on a of 1"]),
        ],
        True,
    ),
    "a drain waits for nobody who is gone": (
        9,
        ("a", "b"),
        [
            (hand_out(), ["0: 0 to a", "1: 1 to b", "2: 2 to a", "3: 3 to b"]),
            (leave("a"), ["cancel 0", "cancel 2"]),
            (drain, []),
            (die("b"), ["cancel 1", "cancel 3"]),
            (tick(2.0), []),
        ],
        True,
    ),
    "a drain takes what a leaver finished": (
        1,
        ("a",),
        [
            (hand_out(), ["0: 0 to a"]),
            (leave("a"), ["cancel 0"]),
            (drain, []),
            (finish(0), ["0 is ok on a of 0"]),
        ],
        True,
    ),
    "a drain before anything is handed out": (3, ("a",), [(drain, []), (hand_out(), [])], True),
    "who joins is asked first": (
        3,
        ("a",),
        [
            (come("b"), ["0: ask b"]),
            (hand_out(), ["1: 0 to a", "2: 1 to a"]),
            (answer(0), []),
            (hand_out(), ["3: 2 to b"]),
        ],
        False,
    ),
    "who joins and is unfit is named and given nothing": (
        3,
        (),
        [
            (come("b"), ["0: ask b"]),
            (answer(0, "has no torch"), ["b refused: has no torch"]),
            (hand_out(), []),
        ],
        False,
    ),
    "who does not answer is named once, and a late answer is nobody's": (
        3,
        (),
        [
            (come("b"), ["0: ask b"]),
            (tick(ANSWER_SECONDS), []),
            (tick(ANSWER_SECONDS + 1), [f"b refused: {SILENT}"]),
            (tick(ANSWER_SECONDS + 2), []),
            (answer(0), []),
            (hand_out(), []),
        ],
        False,
    ),
    "a span that takes long is named, again after as long": (
        1,
        ("a",),
        [
            (hand_out(), ["0: 0 to a"]),
            (tick(10 * SLOW_SECONDS), []),
            (tick(10 * SLOW_SECONDS + 1), [f"0: 0 slow on a for {10 * SLOW_SECONDS + 1:g}"]),
            (tick(20 * SLOW_SECONDS + 1), []),
            (tick(20 * SLOW_SECONDS + 2), [f"0: 0 slow on a for {20 * SLOW_SECONDS + 2:g}"]),
        ],
        False,
    ),
    "slow is measured by its peers, from when it began": (
        3,
        ("a",),
        [
            (hand_out(), ["0: 0 to a", "1: 1 to a"]),
            (finish(0, now=10.0), ["0 is ok on a of 1"]),
            (tick(110.0), []),
            (tick(111.0), ["1: 1 slow on a for 101"]),
        ],
        False,
    ),
    "nobody left is told once, and given up in the end": (
        1,
        ("a",),
        [
            (tick(1000.0), []),
            (die("a"), []),
            (tick(1000.0 + QUIET_SECONDS), []),
            (tick(1001.0 + QUIET_SECONDS), [f"waiting {ALONE_SECONDS:g}"]),
            (tick(1000.0 + ALONE_SECONDS), []),
            (tick(1001.0 + ALONE_SECONDS), [f"abandoned after {ALONE_SECONDS:g}"]),
        ],
        False,
    ),
    "who joins ends the waiting, while it is asked already": (
        1,
        (),
        [
            (tick(QUIET_SECONDS + 1), [f"waiting {ALONE_SECONDS:g}"]),
            (come("b", 200.0), ["0: ask b"]),
            (tick(ANSWER_SECONDS + 200), []),
            (answer(0, "no"), ["b refused: no"]),
            (tick(ALONE_SECONDS + 1), []),
            (tick(ANSWER_SECONDS + 201 + QUIET_SECONDS), [f"waiting {ALONE_SECONDS:g}"]),
        ],
        False,
    ),
}


@pytest.mark.parametrize("story", STORIES)
def test_a_story_comes_out_as_told(story: str) -> None:
    count, workers, steps, over = STORIES[story]
    machine = assigned(count, *workers)
    told = [(event(machine), expected) for event, expected in steps]
    assert [shown(actions) for actions, _ in told] == [expected for _, expected in told]
    assert machine.is_over == over


@pytest.mark.parametrize(("kind", "most"), [("death", TRIES), ("leaver", LEAVES)])
def test_tries_are_counted_by_kind(kind: str, most: int) -> None:
    machine, now = assigned(1), 0.0
    reports: list[Any] = []
    for number in range(most):
        machine.take_in(str(number), str(number))
        assert len(machine.assign(now)) == 1
        actions = machine.gone(str(number), now, may_finish=kind == "leaver")
        now += LEAVE_SECONDS
        reports += [*actions, *machine.tick(now)]
    outcomes = [type(action) for action in reports if isinstance(action, Retried | Lost)]
    assert outcomes == [Retried] * (most - 1) + [Lost]


def test_specs_are_taken_only_when_there_is_room() -> None:
    taken: list[int] = []
    machine = Assignments(
        ({"value": value} for value in range(100) if taken.append(value) is None), 0.0
    )
    assert machine.assign(0.0) == []
    assert taken == []
    machine.take_in("a", "a")
    machine.assign(0.0)
    assert len(taken) == WINDOW


def test_it_imports_no_engine() -> None:
    program = (
        "import sys, lca_posthoc.cluster.assignments\n"
        "print([name for name in sys.modules if name.partition('.')[0] in "
        "('dask', 'distributed', 'torch', 'zarr')])"
    )
    ended = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert ended.stdout.strip() == "[]", ended.stderr


def test_specs_that_follow_from_others_are_asked_for_again() -> None:
    coming: list[Spec | None] = [{"value": 0}, None, {"value": 1}, None]
    machine = Assignments(iter(coming), now=0.0)
    machine.take_in("a", "a")
    assert shown(machine.assign(0.0)) == ["0: 0 to a"]
    assert not machine.is_over
    machine.finished(0, "ok", 1.0)
    assert not machine.is_over  # though nothing is underway
    assert shown(machine.assign(1.0)) == ["1: 1 to a"]
    machine.finished(1, "ok", 2.0)
    assert shown(machine.assign(2.0)) == []
    assert machine.is_over


class AnyStory(RuleBasedStateMachine):
    """Events in any order, with a ledger of its own."""

    @initialize(count=st.integers(0, 12), wait=st.sampled_from([0.0, LEAVE_SECONDS]))
    def begin(self, count: int, wait: float) -> None:
        self.count, self.now, self.drained, self.named = count, 0.0, False, 0
        self.machine = Assignments(specs(count), 0.0, wait)
        self.with_workers: dict[int, tuple[str, int]] = {}  # attempt → worker, spec
        self.past: list[int] = []  # attempts that ended or were cancelled
        self.questions: dict[int, str] = {}
        self.ended: Counter[int] = Counter()
        self.charged: Counter[int] = Counter()
        self.workers: list[str] = []

    def note(self, actions: Any) -> None:
        for action in actions:
            match action:
                case Submit(attempt, worker, spec):
                    assert not self.drained
                    assert worker in self.workers
                    assert attempt not in self.with_workers
                    assert attempt not in self.past
                    assert self.ended[spec["value"]] == 0
                    busy = {value for _, value in self.with_workers.values()}
                    assert spec["value"] not in busy
                    self.with_workers[attempt] = worker, spec["value"]
                case Cancel(attempt):
                    del self.with_workers[attempt]
                    self.past.append(attempt)
                case Ask(attempt, worker):
                    self.questions[attempt] = worker
                case Done(spec) | Lost(spec):
                    self.ended[spec["value"]] += 1
                case Retried(spec):
                    self.charged[spec["value"]] += 1

    def a_worker(self) -> str:
        self.named += 1
        return f"worker {self.named}"

    @rule()
    def joins(self) -> None:
        self.workers.append(self.a_worker())
        self.machine.take_in(self.workers[-1], self.workers[-1])

    @rule()
    def comes_to_be_asked(self) -> None:
        worker = self.a_worker()
        self.note(self.machine.came(worker, worker, self.now))

    @precondition(lambda self: self.questions)
    @rule(fit=st.booleans())
    def answers(self, fit: bool) -> None:
        attempt, worker = self.questions.popitem()
        if fit and attempt in self.machine.newcomers:
            self.workers.append(worker)
        self.note(self.machine.answered(attempt, None if fit else "unfit"))

    @rule()
    def hands_out(self) -> None:
        self.note(self.machine.assign(self.now))

    @precondition(lambda self: self.with_workers)
    @rule(data=st.data(), fails=st.booleans())
    def ends(self, data: st.DataObject, fails: bool) -> None:
        attempt = data.draw(st.sampled_from(sorted(self.with_workers)))
        del self.with_workers[attempt]
        self.past.append(attempt)
        self.note(
            self.machine.failed(attempt, "boom")
            if fails
            else self.machine.finished(attempt, "ok", self.now)
        )

    @precondition(lambda self: self.past)
    @rule(data=st.data(), fails=st.booleans())
    def answers_late_or_twice(self, data: st.DataObject, fails: bool) -> None:
        attempt = data.draw(st.sampled_from(self.past))
        may_count = attempt in self.machine.leaving and not fails
        actions = (
            self.machine.failed(attempt, "late")
            if fails
            else self.machine.finished(attempt, "late", self.now)
        )
        assert len(actions) == may_count
        self.note(actions)

    @precondition(lambda self: self.workers)
    @rule(data=st.data(), may_finish=st.booleans())
    def goes(self, data: st.DataObject, may_finish: bool) -> None:
        worker = data.draw(st.sampled_from(self.workers))
        self.workers.remove(worker)
        first = min(
            (attempt for attempt, (owner, _) in self.with_workers.items() if owner == worker),
            default=None,
        )
        running = None if first is None else self.with_workers[first][1]
        actions = self.machine.gone(worker, self.now, may_finish=may_finish)
        blamed = [action.spec["value"] for action in actions if isinstance(action, Retried | Lost)]
        none = running is None or may_finish or self.drained
        assert blamed == ([] if none else [running])
        self.note(actions)

    @rule(seconds=st.sampled_from([1.0, LEAVE_SECONDS, ANSWER_SECONDS + 1]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds
        self.note(self.machine.tick(self.now))

    @rule()
    def drains(self) -> None:
        self.machine.drain()
        self.drained = True

    @invariant()
    def nothing_ends_twice(self) -> None:
        assert all(times <= 1 for times in self.ended.values())

    @invariant()
    def no_worker_has_more_than_its_window(self) -> None:
        per_worker = Counter(worker for worker, _ in self.with_workers.values())
        assert all(specs <= WINDOW for specs in per_worker.values())
        assert sorted(self.machine.attempts) == sorted(self.with_workers)

    @invariant()
    def tries_are_bounded(self) -> None:
        assert all(times <= TRIES - 1 + LEAVES - 1 for times in self.charged.values())

    def teardown(self) -> None:
        """Left alone with a worker that works, every spec ends, once."""
        if not hasattr(self, "machine"):
            return
        self.joins()
        for _ in range(4 * self.count + 4):
            self.hands_out()
            for attempt in list(self.with_workers):
                del self.with_workers[attempt]
                self.note(self.machine.finished(attempt, "ok", self.now))
            self.time_passes(LEAVE_SECONDS)
        assert self.machine.is_over
        if not self.drained:
            assert self.ended == Counter(range(self.count))


def test_the_laws_hold_for_any_story() -> None:
    run_state_machine_as_test(
        AnyStory, settings=settings(max_examples=60, stateful_step_count=40, deadline=None)
    )
