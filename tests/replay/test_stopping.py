"""Laws of the signals that stop a replay."""

from __future__ import annotations

import ctypes
import signal
import threading
from collections.abc import Callable, Iterator

import pytest

from lca_posthoc.errors import Interrupted
from lca_posthoc.replay.stopping import Stop, stopped_by_signals

NUMBERS = [signal.SIGINT, signal.SIGTERM]
SECONDS = 60  # after which a wait that nothing ended is a failure
UNHANDLED = ctypes.PyDLL(None)  # its `raise` returns before Python has called a handler


@pytest.fixture
def before() -> Iterator[list[object]]:
    handlers: list[object] = [signal.getsignal(number) for number in NUMBERS]
    yield handlers
    assert [signal.getsignal(number) for number in NUMBERS] == handlers


def in_one_call(*numbers: int) -> None:
    """Let signals arrive before Python can call its handler for any of them."""
    list(map(getattr(UNHANDLED, "raise"), numbers))


def stopped(begin: Callable[[Stop, list[int]], None]) -> tuple[Interrupted, list[int]]:
    """The error that a wait is ended with after `begin`, and the signals that were told of."""
    told = list[int]()

    def wait() -> None:
        with stopped_by_signals(told.append) as stop:
            begin(stop, told)
            threading.Event().wait(SECONDS)

    with pytest.raises(Interrupted) as caught:
        wait()
    return caught.value, told


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.usefixtures("before")
def test_a_first_signal_asks_and_is_told_of(number: signal.Signals) -> None:
    heard = threading.Event()
    told = list[int]()

    def tell(number: int) -> None:
        told.append(number)
        heard.set()

    with stopped_by_signals(tell) as stop:
        assert not stop.event.is_set()
        signal.raise_signal(number)
        assert stop.event.wait(SECONDS)
        assert heard.wait(SECONDS)
    assert told == [number]
    assert stop.signal == number
    assert stop.interrupted().exit_code == 128 + number


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.usefixtures("before")
def test_a_second_signal_stops(number: signal.Signals) -> None:
    def begin(stop: Stop, told: list[int]) -> None:
        signal.raise_signal(number)
        assert stop.event.wait(SECONDS)
        signal.raise_signal(number)

    error, told = stopped(begin)
    assert told == [number]
    assert error.exit_code == 128 + number


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("_", range(20))
@pytest.mark.usefixtures("before")
def test_a_second_signal_stops_where_one_call_of_a_handler_stands_for_both(
    number: signal.Signals, _: int
) -> None:
    error, told = stopped(lambda stop, told: in_one_call(number, number))
    assert told == [number]
    assert error.exit_code == 128 + number


@pytest.mark.usefixtures("before")
def test_a_third_signal_stops_what_the_second_one_began() -> None:
    def twice(stop: Stop, told: list[int]) -> None:
        signal.raise_signal(signal.SIGINT)
        assert stop.event.wait(SECONDS)
        try:
            signal.raise_signal(signal.SIGINT)
        finally:
            with pytest.raises(KeyboardInterrupt):
                signal.raise_signal(signal.SIGINT)

    stopped(twice)


@pytest.mark.usefixtures("before")
def test_other_threads_handle_no_signals() -> None:
    caught = list[object]()

    def run() -> None:
        with stopped_by_signals(lambda number: None) as stop:
            caught.extend((stop.event.is_set(), signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    assert caught == [False, signal.getsignal(signal.SIGINT)]
