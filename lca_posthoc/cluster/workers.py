"""Specs on the workers of a Dask client: each worker is given its own, so that it is known who
works on what.

Dask carries, starts and cancels; who gets which spec is decided here. A task is restricted to one
worker: when that one is gone, what it was working on and what merely waited there are told apart,
and a worker is given nothing before it has answered.
"""

from __future__ import annotations

import contextlib
import importlib
import queue
import statistics
import threading
import time
import uuid
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from .. import __version__
from ..errors import ResourceError
from . import broadcast
from .protocol import Done, Function, Lost, Outcome, Refused, Retried, Settled, Slow, Spec, Waiting

ANSWER_SECONDS = 120.0  # for a worker to come up, or to answer a small question
RESULT_SECONDS = 10.0  # for the few kilobytes of a result
ALONE_SECONDS = 300.0  # without any worker
QUIET_SECONDS = 10.0  # of them, in which a nanny starts a new one
LEAVE_SECONDS = 45.0  # Dask lets what runs on a leaving worker go on for 30
LOOK_SECONDS = 1.0  # between two looks at who is there
SLOW_SECONDS = 60.0  # and ten times as long as its peers
SILENT = (
    f"did not answer within {ANSWER_SECONDS:.0f} s: it is busy with other work, stuck, or without "
    f"lca_posthoc"
)
WITHOUT_US = f"has no lca_posthoc: it needs `pip install lca_posthoc=={__version__}`"
_EACH = 2
_TRIES = 2
_LEAVES = 4


@dataclass
class _InFlight:
    """A spec under way."""

    spec: Spec
    deaths: int = 0
    leaves: int = 0


@dataclass
class _WorkerSlot:
    """A worker that takes part: its specs by key, the first one running, since when."""

    flights: dict[str, _InFlight] = field(default_factory=dict)
    futures: dict[str, Any] = field(default_factory=dict)
    since: float = 0.0
    told: float = 0.0


class Workers:
    """See `Cluster`."""

    dashboard: str | None = None
    full_strength = 0
    # start workers in place of those that are gone for good
    replace: Callable[[], None] | None = None

    def __init__(self, client: Any, device: str | None, stop: threading.Event) -> None:
        self.device = device
        self._client, self._stop = client, stop
        self._stopping = f"lca-stop-{uuid.uuid4().hex}"
        self._delivered: list[str] = []
        self._question: tuple[str, Spec] | None = None
        self._slots: dict[str, _WorkerSlot] = {}
        self._known: set[str] = set()
        self._names: dict[str, str] = {}
        self._looked = 0.0
        self._look()

    @classmethod
    @contextlib.contextmanager
    def opened(cls, client: Any, device: str | None, stop: threading.Event) -> Iterator[Workers]:
        """Open them, and leave nothing behind on the workers afterwards."""
        workers = cls(client, device, stop)
        try:
            yield workers
        finally:
            if client.status == "running":  # else there is nobody to tell
                with contextlib.suppress(OSError, TimeoutError):
                    for key in workers._delivered:
                        client.unregister_worker_plugin(key)

    @property
    def workers(self) -> int:
        """See `Cluster`."""
        return len(self._slots)

    @property
    def max_per_host(self) -> int:
        """See `Cluster`."""
        info = self._ask(self._client.scheduler_info)["workers"]
        return max(
            Counter(info[address]["host"] for address in self._slots if address in info).values(),
            default=1,
        )

    @property
    def several_threads(self) -> Sequence[str]:
        """See `Cluster`."""
        threads = self._ask(self._client.nthreads)
        return [self._named(address) for address in self._slots if threads.get(address, 1) > 1]

    def deliver(self, data: bytes) -> str:
        """See `Cluster.deliver`."""
        key = f"lca-{uuid.uuid4().hex}"
        self._ask(self._client.register_plugin, _delivery(key, data), name=key)
        self._delivered.append(key)
        return key

    def settle_on(self, device: str) -> None:
        """See `Cluster.settle_on`; on GPUs every worker must offer `GPU=1`, so that nobody else's
        work shares it.
        """
        self.device = device
        if device != "cuda":
            return
        without = self._without_gpu(self._slots)
        if without:
            raise ResourceError(
                f"worker{'s' if len(without) > 1 else ''} "
                f"{', '.join(map(self._named, without[:3]))}"
                f"{f' and {len(without) - 3} more' if len(without) > 3 else ''} offer no GPU. "
                f"Start each with "
                "`CUDA_VISIBLE_DEVICES=N dask worker ADDRESS --nthreads 1 --resources GPU=1`, or "
                "compute with --device cpu."
            )

    def _without_gpu(self, addresses: Iterable[str]) -> list[str]:
        info = self._ask(self._client.scheduler_info)["workers"]
        return [
            address
            for address in addresses
            if info.get(address, {}).get("resources", {}).get("GPU", 0) < 1
        ]

    def check_workers(self, function: Function, spec: Spec) -> dict[str, Any]:
        """See `Cluster.check_workers`."""
        self._question = (_place(function), spec)
        answers = {}
        for address, answer in self._answers(
            {address: self._is_there(address) for address in self._slots}
        ):
            if answer is not True:
                answers[address] = answer if answer else {"error": WITHOUT_US}
        able = [address for address in self._slots if address not in answers]
        answers |= self._answers({address: self._question_to(address) for address in able})
        self._slots = {
            address: slot
            for address, slot in self._slots.items()
            if "error" not in answers[address]
        }
        return {self._named(address): answer for address, answer in answers.items()}

    def _answers(self, futures: dict[str, Any]) -> list[tuple[str, Any]]:
        deadline = time.monotonic() + ANSWER_SECONDS
        return [
            (address, self._answer(future, max(1.0, deadline - time.monotonic())))
            for address, future in futures.items()
        ]

    def _is_there(self, address: str) -> Any:
        """Ask whether this package is installed on a worker; one that lacks it could not say so in
        our words.
        """
        return self._client.submit(
            has_us(), key=f"lca-{uuid.uuid4().hex}", pure=False, workers=[address]
        )

    def _question_to(self, address: str) -> Any:
        assert self._question is not None
        return self._submit(*self._question, address, on_gpu=False)

    def _answer(self, future: Any, seconds: float) -> Any:
        from distributed import TimeoutError as DaskTimeoutError

        try:
            return future.result(timeout=seconds)
        except (DaskTimeoutError, TimeoutError):
            future.cancel()
            return {"error": SILENT}
        except Exception as error:
            return {"error": shortly(error)}

    # --- work
    # --------------------------------------------------------------------------------------------------------

    def map(
        self, function: Function, specs: Iterable[Spec], settled: Settled | None = None
    ) -> Generator[Outcome]:
        """See `Cluster.map`."""
        work = _Work(self, _place(function), iter(specs), settled)
        try:
            yield from work.run()
        finally:
            work.abandon()

    def _submit(self, place: str, spec: Spec, address: str, *, on_gpu: bool) -> Any:
        return self._client.submit(
            _work,
            place,
            spec,
            self._stopping,
            key=f"lca-{uuid.uuid4().hex}",
            pure=False,
            retries=0,
            workers=[address],
            allow_other_workers=False,
            resources={"GPU": 1} if on_gpu else None,
        )

    def _look(self) -> tuple[list[str], list[str]]:
        """Return who came and who went since the last look; those on their way out count as
        gone.
        """
        self._looked = time.monotonic()
        running = set(self._ask(lambda: self._client.sync(self._client.scheduler.ncores_running)))
        came = [address for address in running if address not in self._known]
        went = [address for address in self._slots if address not in running]
        self._known = (self._known | running) - set(went)
        if came:
            info = self._ask(self._client.scheduler_info)["workers"]
            self._names |= {
                address: str(info[address]["name"]) for address in came if address in info
            }
        if self._question is None:
            self._slots |= {address: _WorkerSlot() for address in came}
        return came, went

    def _ask(self, question: Any, *arguments: Any, **named: Any) -> Any:
        """Ask the scheduler; one that is gone is an error that says so."""
        from distributed.client import ClosedClientError

        try:
            return question(*arguments, **named)
        except (OSError, TimeoutError, ClosedClientError) as error:
            raise self._gone(error) from None

    def _gone(self, error: object) -> ResourceError:
        return ResourceError(
            f"the scheduler is gone ({shortly(error)}). What was committed is kept; start it and "
            f"run the same command again."
        )

    def _named(self, address: str) -> str:
        name = self._names.get(address, address)
        return address if name == address else f"{name} ({address})"

    def _left(self, address: str) -> bool:
        """Tell whether a worker that is gone was told to go, and so may still finish what it was
        doing.
        """
        with contextlib.suppress(OSError, TimeoutError):
            for _, event in reversed(self._client.get_events(address)):
                if event.get("action") == "remove-worker":
                    return bool(event.get("expected"))
            return address in self._ask(self._client.scheduler_info)["workers"]
        return False

    def _doing(self, key: str) -> list[str]:
        """Return the stack of a running task, the innermost call last."""
        with contextlib.suppress(Exception):
            stacks_by_worker = self._client.sync(
                self._client.scheduler.call_stack, keys=[key], callback_timeout=5
            )
            for stacks in stacks_by_worker.values():
                return [" ".join(frame.split()) for frame in stacks[key]]
        return []


class _Work:
    """One call of `Workers.map`."""

    def __init__(
        self, owner: Workers, place: str, source: Iterator[Spec], settled: Settled | None
    ) -> None:
        self._owner, self._place, self._source, self._settled = owner, place, source, settled
        self._again: deque[_InFlight] = deque()
        self._joining: dict[str, tuple[str, float]] = {}
        self._leaving: list[tuple[float, str, _InFlight]] = []
        self._arrived: queue.SimpleQueue[Any] = queue.SimpleQueue()
        self._took: deque[float] = deque(maxlen=200)
        self._exhausted = self._told = self._said_alone = False
        self._alone = time.monotonic()

    def run(self) -> Iterator[Outcome]:
        owner = self._owner
        while True:
            if owner._stop.is_set() and not self._told:
                owner._ask(_event(owner._stopping, owner._client).set)
                self._told = True
            self._hand_out()
            if (
                not any(slot.flights for slot in owner._slots.values())
                and not self._leaving
                and self._is_over()
            ):
                return
            future = _next(self._arrived, 0.2)
            if future is not None:
                yield from self._take(future)
            if time.monotonic() - owner._looked > LOOK_SECONDS:
                yield from self._look()

    def abandon(self) -> None:
        """Cancel what waits; what runs is nobody's any more."""
        # to be asked again
        self._owner._known -= {address for address, _ in self._joining.values()}
        futures = [
            future for slot in self._owner._slots.values() for future in slot.futures.values()
        ]
        for slot in self._owner._slots.values():
            slot.flights.clear()
            slot.futures.clear()
        with contextlib.suppress(Exception):
            self._owner._client.cancel(futures)

    def _is_over(self) -> bool:
        return self._owner._stop.is_set() or (self._exhausted and not self._again)

    def _hand_out(self) -> None:
        """Hand out one spec to every worker first, then one to wait."""
        if self._owner._stop.is_set():
            return
        for most in range(_EACH):
            for address, slot in self._owner._slots.items():
                if len(slot.flights) == most:
                    flight = self._again.popleft() if self._again else self._fresh()
                    if flight is None:
                        return
                    self._submit(address, slot, flight)

    def _fresh(self) -> _InFlight | None:
        spec = None if self._exhausted else next(self._source, None)
        self._exhausted = spec is None
        return None if spec is None else _InFlight(spec)

    def _submit(self, address: str, slot: _WorkerSlot, flight: _InFlight) -> None:
        on_gpu = self._owner.device == "cuda"
        future = self._owner._ask(
            self._owner._submit, self._place, flight.spec, address, on_gpu=on_gpu
        )
        if not slot.flights:
            slot.since = slot.told = time.monotonic()
        slot.flights[future.key], slot.futures[future.key] = flight, future
        future.add_done_callback(self._arrived.put)

    def _take(self, future: Any) -> Iterator[Outcome]:
        if future.key in self._joining:
            yield from self._join(self._joining.pop(future.key)[0], future)
            return
        place = next(
            (
                (worker, slot)
                for worker, slot in self._owner._slots.items()
                if future.key in slot.flights
            ),
            None,
        )
        if place is None:  # of a worker that is gone; its specs were dealt with
            return
        address, slot = place
        result = self._result(future)
        if result:
            now = time.monotonic()
            self._took.append(now - slot.since)
            slot.since = slot.told = now
            del slot.futures[future.key]
            yield Done(slot.flights.pop(future.key).spec, result[0], self._owner._named(address))
        elif future.status == "error" and type(future.exception()).__name__ != "KilledWorker":
            del slot.futures[future.key]
            flight = slot.flights.pop(future.key)
            flight.deaths += 1
            yield self._try_again(flight, address, shortly(future.exception()))
        elif self._owner._client.status != "running":
            raise self._owner._gone("the connection is lost")
        else:  # where it runs again under the same address, it comes as a new one
            self._owner._known.discard(address)
            yield from self._gone(address, self._owner._slots.pop(address))

    def _result(self, future: Any) -> list[Any]:
        """Return the result of a finished task, if its worker is still there to give it."""
        from distributed import TimeoutError as DaskTimeoutError

        if future.status == "finished":
            with contextlib.suppress(DaskTimeoutError, TimeoutError):
                return [future.result(timeout=RESULT_SECONDS)]
        return []

    def _look(self) -> Iterator[Outcome]:
        """Take in who came, deal with who went, speak of what is slow."""
        owner = self._owner
        came, went = owner._look()
        if owner._question is not None:
            for address in came:
                future = owner._question_to(address)
                self._joining[future.key] = address, time.monotonic()
                future.add_done_callback(self._arrived.put)
        for address in went:
            yield from self._gone(address, owner._slots.pop(address))
        for key, (address, since) in list(self._joining.items()):
            if time.monotonic() - since > ANSWER_SECONDS:
                del self._joining[key]
                yield Refused(owner._named(address), SILENT)
        if (
            owner.replace is not None
            and len(owner._slots) < owner.full_strength
            and not owner._stop.is_set()
        ):
            owner.replace()
        yield from self._leavers()
        yield from self._slow()
        if owner._slots or self._joining or owner._stop.is_set():
            self._alone = time.monotonic()
            self._said_alone = False
        elif not self._said_alone and time.monotonic() - self._alone > QUIET_SECONDS:
            self._said_alone = True
            yield Waiting(ALONE_SECONDS)
        elif time.monotonic() - self._alone > ALONE_SECONDS:
            raise ResourceError(
                f"no worker is left, and none came within {ALONE_SECONDS:.0f} s. What was "
                f"committed is kept; start workers and run "
                "the same command again."
            )

    def _join(self, address: str, future: Any) -> Iterator[Outcome]:
        answer = self._owner._answer(future, ANSWER_SECONDS)
        if "error" in answer:
            error = answer["error"]
            yield Refused(
                self._owner._named(address),
                error["message"] if isinstance(error, dict) else str(error),
            )
        elif self._owner.device == "cuda" and self._owner._without_gpu([address]):
            yield Refused(
                self._owner._named(address), "offers no GPU: start it with --resources GPU=1"
            )
        else:
            self._owner._slots[address] = _WorkerSlot()

    def _gone(self, address: str, slot: _WorkerSlot) -> Iterator[Outcome]:
        """Count a death against the spec a worker that is gone was working on; specs that waited
        there are handed out again.
        """
        may_finish = self._owner._left(address)
        for position, (key, flight) in enumerate(slot.flights.items()):
            self._owner._ask(slot.futures[key].cancel)
            if self._owner._stop.is_set():
                continue
            if position > 0:
                self._again.append(flight)
            elif may_finish:
                self._leaving.append((time.monotonic() + LEAVE_SECONDS, address, flight))
            else:
                flight.deaths += 1
                yield self._try_again(flight, address, "its worker died or cannot be reached")

    def _try_again(self, flight: _InFlight, address: str, why: str) -> Outcome:
        if flight.deaths >= _TRIES or flight.leaves >= _LEAVES:
            return Lost(flight.spec, why)
        self._again.append(flight)
        return Retried(flight.spec, self._owner._named(address), why)

    def _leavers(self) -> Iterator[Outcome]:
        """Wait for workers that were told to go, which may still finish, rather than do their work
        twice.
        """
        waiting, self._leaving = self._leaving, []
        for deadline, address, flight in waiting:
            result = self._settled(flight.spec) if self._settled else None
            if result is not None:
                yield Done(flight.spec, result, self._owner._named(address))
            elif self._settled and time.monotonic() < deadline and not self._owner._stop.is_set():
                self._leaving.append((deadline, address, flight))
            elif not self._owner._stop.is_set():
                flight.leaves += 1
                yield self._try_again(flight, address, "its worker left before it was done")

    def _slow(self) -> Iterator[Outcome]:
        usual = 10 * statistics.median(self._took) if self._took else 10 * SLOW_SECONDS
        now = time.monotonic()
        for address, slot in self._owner._slots.items():
            if slot.flights and now - slot.told > max(SLOW_SECONDS, usual):
                slot.told = now
                key, flight = next(iter(slot.flights.items()))
                yield Slow(
                    flight.spec,
                    self._owner._named(address),
                    now - slot.since,
                    self._owner._doing(key),
                )


def has_us() -> Any:
    """Return a function that travels by value and says whether this package is installed where it
    runs.
    """

    def is_there() -> bool:
        import importlib.util

        try:
            return importlib.util.find_spec("lca_posthoc") is not None
        except ImportError:
            return False

    return is_there


def _place(function: Function) -> str:
    """Return the name under which a callable is found again, so that a scheduler need not import
    it.
    """
    return f"{function.__module__}:{function.__qualname__}"


def _work(place: str, spec: Spec, stop: str) -> Any:
    """Run a spec on a worker unless the driver is draining."""
    from distributed import get_client

    if _event(stop, get_client()).is_set():
        return None
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)(spec)


def _event(name: str, client: Any) -> Any:
    from distributed import Event

    return Event(name, client=client)


def _next(arrived: queue.SimpleQueue[Any], seconds: float) -> Any:
    """Return the next future, waking up now and then so that signals are handled."""
    with contextlib.suppress(queue.Empty):
        return arrived.get(timeout=seconds)
    return None


def shortly(error: object) -> str:
    """Return an error or a message on one line of bounded length."""
    text = " ".join(str(error).split())
    return (
        f"{type(error).__name__}: {text}"[:300] if isinstance(error, BaseException) else text[:300]
    )


def _delivery(key: str, data: bytes) -> Any:
    from distributed import WorkerPlugin

    class Delivery(WorkerPlugin):  # type: ignore[misc]
        """Puts bytes into every worker process, also one that starts later."""

        name = key

        def setup(self, worker: Any) -> None:
            broadcast.take_in(key, data)

        def teardown(self, worker: Any) -> None:
            broadcast.drop(key)

    return Delivery()
