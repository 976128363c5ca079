"""Run specs on the workers of a Dask scheduler: `Assignments` decides, `DaskClient` executes.

This module connects the two: messages from Dask become events of `Assignments`, and its actions
become Dask tasks or outcomes for the driver.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import time
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from ..base.text import duration
from ..errors import ResourceError
from . import assignments
from .assignments import Abandoned, Action, Ask, Assignments, Cancel, Overdue, Submit
from .dask_client import WITHOUT_US, DaskClient, answer_of, place_of, result_of, shortly
from .protocol import Committed, Crew, Function, Outcome, Question, Slow, Spec, Unusable

if TYPE_CHECKING:
    from distributed import Client, Future

LOOK_SECONDS = 1.0  # between two polls of the scheduler's workers
_ARRIVAL_SECONDS = 0.2  # of waiting for an answer, after which signals are handled
NO_GPU = "offers no GPU: start it with --resources GPU=1"


class Members:
    """The workers that take part, and those already seen.

    Attributes:
        able: addresses of those that take part, in order of arrival.
        question: a function's key and a spec, with which newcomers are asked; None to ask nothing.
    """

    def __init__(self, scheduler: DaskClient) -> None:
        self.able: list[str] = []
        self.question: tuple[str, Spec] | None = None
        self._scheduler = scheduler
        self._seen: set[str] = set()
        self._looked = 0.0
        self.able, _ = self.look()

    @property
    def is_look_due(self) -> bool:
        """Tell whether it is time for the next poll."""
        return time.monotonic() - self._looked > LOOK_SECONDS

    def look(self) -> tuple[list[str], list[str]]:
        """Return the workers that came since the last poll, and those taking part that left."""
        self._looked = time.monotonic()
        running = self._scheduler.running()
        came = [address for address in running if address not in self._seen]
        went = [address for address in self.able if address not in running]
        self._seen = (self._seen | running) - set(went)
        if came:
            self._scheduler.learn_names(came)
        return came, went

    def forget(self, addresses: Iterable[str]) -> None:
        """Treat workers as newcomers when they are seen again."""
        self._seen -= set(addresses)


class Workers:
    """The workers of a scheduler; see `Cluster`.

    Attributes:
        dashboard: the address of Dask's own page, if it is served.
        full_strength: how many workers there should be, if `replace` can start others.
        replace: starts workers in place of permanently lost ones.
    """

    dashboard: str | None = None
    full_strength = 0
    replace: Callable[[], None] | None = None

    def __init__(self, scheduler: DaskClient, device: str | None, stop: threading.Event) -> None:
        self._scheduler, self._device, self._stop = scheduler, device, stop
        self._members = Members(scheduler)

    @classmethod
    @contextlib.contextmanager
    def opened(cls, client: Client, device: str | None, stop: threading.Event) -> Iterator[Workers]:
        """Open the workers, and leave nothing behind on them afterwards.

        Args:
            client: of the scheduler.
            device: "cuda" or "cpu"; None until `settle_on`.
            stop: drains the cluster when set.
        """
        with DaskClient.opened(client) as scheduler:
            yield cls(scheduler, device, stop)

    def crew(self) -> Crew:
        """Return the workers that take part now, see `Cluster.crew`."""
        able, info, threads = self._members.able, self._scheduler.info(), self._scheduler.threads()
        hosts = Counter(info[address]["host"] for address in able if address in info)
        several = [address for address in able if threads.get(address, 1) > 1]
        return Crew(
            workers=len(able),
            device=self._device,
            max_per_host=max(hosts.values(), default=1),
            several_threads=tuple(map(self._scheduler.named, several)),
            dashboard=self.dashboard,
        )

    def deliver(self, data: bytes) -> str:
        """Send bytes to every worker, see `Cluster.deliver`."""
        return self._scheduler.deliver(data)

    def settle_on(self, device: str) -> None:
        """Compute on a device from now on, see `Cluster.settle_on`; on GPUs every worker must offer
        `GPU=1`, so that no other work shares it.
        """
        self._device = device
        if device == "cuda":
            self._refuse_without_gpu()

    def _refuse_without_gpu(self) -> None:
        without = self._scheduler.without_gpu(self._members.able)
        if without:
            raise ResourceError(
                f"worker{'s' if len(without) > 1 else ''} "
                f"{', '.join(map(self._scheduler.named, without[:3]))}{f' and {len(without) - 3} more' if len(without) > 3 else ''} "
                "offer no GPU. Start each with `CUDA_VISIBLE_DEVICES=N dask worker ADDRESS "
                "--nthreads 1 --resources GPU=1`, or compute with --device cpu."
            )

    def check_workers(self, question: Question, spec: Spec) -> dict[str, Spec]:
        """Ask every worker, see `Cluster.check_workers`.

        Args:
            question: a function at module level.
            spec: its argument.
        """
        scheduler, able = self._scheduler, self._members.able
        of_newcomers = self._members.question = place_of(question), spec
        answers = {
            address: answer or {"error": WITHOUT_US}
            for address, answer in _answers(able, scheduler.ask_for_us).items()
            if answer is not True
        }
        answers |= _answers(
            [address for address in able if address not in answers],
            lambda address: scheduler.submit(*of_newcomers, address, on_gpu=False),
        )
        self._members.able = [address for address in able if "error" not in answers[address]]
        return {scheduler.named(address): answer for address, answer in answers.items()}

    def map(
        self, function: Function, specs: Iterable[Spec | None], committed: Committed | None = None
    ) -> Generator[Outcome]:
        """Yield the outcome of each spec, see `Cluster.map`.

        Args:
            function: at module level.
            specs: JSON-like.
            committed: returns the result of a spec whose worker left during it, or None while there
                is none.
        """
        leave_seconds = assignments.LEAVE_SECONDS if committed else 0.0
        work = _Work(
            place_of(function),
            Assignments(specs, time.monotonic(), leave_seconds),
            self._scheduler,
            self._members,
            on_gpu=self._device == "cuda",
        )
        try:
            yield from self._outcomes(work, committed)
        finally:
            work.abandon()

    def _outcomes(self, work: _Work, committed: Committed | None) -> Iterator[Outcome]:
        while True:
            self._pass_on_stop(work)
            yield from work.hand_out()
            if work.is_over:
                return
            arrived = work.next_arrived()
            self._pass_on_stop(work)
            if arrived is not None:
                yield from work.take(*arrived)
            if self._members.is_look_due:
                yield from self._look(work, committed)

    def _pass_on_stop(self, work: _Work) -> None:
        if self._stop.is_set():
            work.drain()

    def _look(self, work: _Work, committed: Committed | None) -> Iterator[Outcome]:
        yield from work.look()
        short = len(self._members.able) < self.full_strength
        if self.replace is not None and short and not self._stop.is_set():
            self.replace()
        if committed is not None:
            yield from work.take_committed(committed)
        yield from work.tick()


class _Work:
    """One call of `Workers.map`: takes events, executes actions.

    Args:
        place: key of the function.
        assigned: decides which worker gets which spec.
        scheduler: executes.
        members: the workers; records those that come and leave.
        on_gpu: whether each spec needs a GPU of its own.
    """

    def __init__(
        self,
        place: str,
        assigned: Assignments,
        scheduler: DaskClient,
        members: Members,
        *,
        on_gpu: bool,
    ) -> None:
        self._place, self._on_gpu = place, on_gpu
        self._assigned, self._scheduler, self._members = assigned, scheduler, members
        self._futures: dict[int, tuple[str, Future]] = {}  # by attempt, with the worker's address
        self._questions: dict[int, tuple[str, Future]] = {}  # by attempt, with the worker's address
        self._arrived: queue.SimpleQueue[tuple[int, Future]] = queue.SimpleQueue()
        self._drained = False
        for address in members.able:
            assigned.take_in(address, scheduler.named(address))

    @property
    def is_over(self) -> bool:
        """Tell whether nothing is underway and nothing will be."""
        return self._assigned.is_over

    def drain(self) -> None:
        """Start nothing more, here and on the workers."""
        if not self._drained:
            self._drained = True
            self._scheduler.stop()
            self._assigned.drain()

    def abandon(self) -> None:
        """Cancel waiting specs; results of running ones are ignored."""
        self._members.forget(self._assigned.newcomers.values())  # to be asked again
        with contextlib.suppress(Exception):
            self._scheduler.client.cancel([future for _, future in self._futures.values()])

    # --- events

    def hand_out(self) -> Iterator[Outcome]:
        """Submit as many specs as there is room for."""
        return self._carry_out(self._assigned.assign(time.monotonic()))

    def next_arrived(self) -> tuple[int, Future] | None:
        """Return the next answer, waking up regularly so that signals are handled."""
        with contextlib.suppress(queue.Empty):
            return self._arrived.get(timeout=_ARRIVAL_SECONDS)
        return None

    def take(self, attempt: int, future: Future) -> Iterator[Outcome]:
        """Take a worker's answer to a question, or the result of a spec."""
        if attempt in self._questions:
            address, _ = self._questions.pop(attempt)
            yield from self._take_answer(attempt, address, future)
        elif attempt in self._futures:  # otherwise its worker is gone and its specs were reassigned
            yield from self._take_result(attempt, future)

    def _take_answer(self, attempt: int, address: str, future: Future) -> Iterator[Outcome]:
        refusal = self._refusal(address, answer_of(future, assignments.ANSWER_SECONDS))
        if refusal is None:
            self._members.able.append(address)
        return self._carry_out(self._assigned.answered(attempt, refusal))

    def _refusal(self, address: str, answer: dict[str, Spec]) -> str | None:
        if "error" in answer:
            error = answer["error"]
            return str(error["message"]) if isinstance(error, dict) else str(error)
        if self._on_gpu and self._scheduler.without_gpu([address]):
            return NO_GPU
        return None

    def _take_result(self, attempt: int, future: Future) -> Iterator[Outcome]:
        result = result_of(future)
        if result:
            del self._futures[attempt]
            return self._carry_out(self._assigned.finished(attempt, result[0], time.monotonic()))
        if future.status == "error" and isinstance(future.exception(), Unusable):
            return self._worker_unusable(self._futures[attempt][0], str(future.exception()))
        if future.status == "error" and type(future.exception()).__name__ != "KilledWorker":
            del self._futures[attempt]
            return self._carry_out(self._assigned.failed(attempt, shortly(future.exception())))
        if self._scheduler.client.status != "running":
            raise self._scheduler.gone("the connection is lost")
        address, _ = self._futures[attempt]
        self._members.forget([address])  # a worker restarted under the same address is a newcomer
        return self._worker_left(address)

    def look(self) -> Iterator[Outcome]:
        """Admit workers that came, and handle those that left."""
        came, went = self._members.look()
        for address in came:
            name = self._scheduler.named(address)
            if self._members.question is None:
                self._members.able.append(address)
                self._assigned.take_in(address, name)
            else:
                yield from self._carry_out(self._assigned.came(address, name, time.monotonic()))
        for address in went:
            yield from self._worker_left(address)

    def _worker_unusable(self, address: str, why: str) -> Iterator[Outcome]:
        """Restart a worker that can compute nothing more; it is then a newcomer."""
        self._members.forget([address])
        yield from self._worker_gone(address, may_finish=False, why=why)
        self._scheduler.restart(address)

    def _worker_left(self, address: str) -> Iterator[Outcome]:
        may_finish = self._scheduler.told_to_leave(address)
        return self._worker_gone(address, may_finish=may_finish, why=assignments.DIED)

    def _worker_gone(self, address: str, *, may_finish: bool, why: str) -> Iterator[Outcome]:
        self._members.able.remove(address)
        return self._carry_out(
            self._assigned.gone(address, time.monotonic(), may_finish=may_finish, why=why)
        )

    def take_committed(self, committed: Committed) -> Iterator[Outcome]:
        """Take results that leaving workers have committed, in place of computing them twice."""
        for attempt, spec in self._assigned.leaving.items():
            result = committed(spec)
            if result is not None:
                yield from self._carry_out(
                    self._assigned.finished(attempt, result, time.monotonic())
                )

    def tick(self) -> Iterator[Outcome]:
        """Handle the passing of time."""
        yield from self._carry_out(self._assigned.tick(time.monotonic()))
        for attempt in self._questions.keys() - self._assigned.newcomers.keys():
            del self._questions[attempt]

    # --- actions

    def _carry_out(self, actions: Sequence[Action]) -> Iterator[Outcome]:
        for action in actions:
            match action:
                case Submit(attempt, address, spec):
                    future = self._submit(self._place, spec, address, on_gpu=self._on_gpu)
                    self._await(self._futures, attempt, address, future)
                case Ask(attempt, address):
                    assert self._members.question is not None  # otherwise no newcomer is asked
                    place, spec = self._members.question
                    future = self._submit(place, spec, address, on_gpu=False)
                    self._await(self._questions, attempt, address, future)
                case Cancel(attempt):
                    self._scheduler.ask(self._futures.pop(attempt)[1].cancel)
                case Overdue(attempt, spec, name, seconds):
                    stack = self._scheduler.stack(self._futures[attempt][1].key)
                    yield Slow(spec, name, seconds, stack)
                case Abandoned(seconds):
                    raise _nobody_left(seconds)
                case _:
                    yield action

    def _submit(self, place: str, spec: Spec, address: str, *, on_gpu: bool) -> Future:
        return self._scheduler.ask(self._scheduler.submit, place, spec, address, on_gpu=on_gpu)

    def _await(
        self, awaited: dict[int, tuple[str, Future]], attempt: int, address: str, future: Future
    ) -> None:
        awaited[attempt] = address, future
        future.add_done_callback(lambda finished: self._arrived.put((attempt, finished)))


def _answers(addresses: Iterable[str], ask: Callable[[str], Future]) -> dict[str, Any]:
    """Ask workers simultaneously, and return their answers by address."""
    futures = {address: ask(address) for address in addresses}
    deadline = time.monotonic() + assignments.ANSWER_SECONDS
    return {
        address: answer_of(future, max(1.0, deadline - time.monotonic()))
        for address, future in futures.items()
    }


def _nobody_left(seconds: float) -> ResourceError:
    return ResourceError(
        f"no worker is left, and none came within {duration(seconds)}. Committed results are kept; "
        "start workers and run the same command again."
    )
