"""Handle Ctrl-C and SIGTERM: the first drains a replay, the second stops it."""

from __future__ import annotations

import contextlib
import signal
import socket
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from types import FrameType

from ..errors import Interrupted

_AT_ONCE = 0.1  # the most seconds from a signal until it is reported
_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@dataclass
class Stop:
    """A request to end a replay early, made by signals.

    Attributes:
        event: set once a first signal is handled; a cluster waits for it.
        signal: its number; 0 before.
    """

    event: threading.Event = field(default_factory=threading.Event)
    signal: int = 0
    _arrived: int = 0
    # set when there is nothing left to stop
    _over: threading.Event = field(default_factory=threading.Event)
    _sent_again: bool = False
    # held while checking whether all is over; a handler may interrupt the thread that holds it
    _deciding: threading.RLock = field(default_factory=threading.RLock)

    def interrupted(self) -> Interrupted:
        """Return the error that ends a replay after a signal."""
        error = Interrupted(
            "stopped; committed results are kept. Run the same command again to resume."
        )
        error.exit_code = 128 + (self.signal or signal.SIGINT)
        return error

    def _handle(self, number: int, frame: FrameType | None) -> None:
        with self._deciding:
            if self._over.is_set() and self._sent_again:  # the second signal, already handled
                self._sent_again = False
                return
            if self.event.is_set() or self._arrived > 1:
                self._over.set()
                # `except Exception` around the task must not catch it
                raise KeyboardInterrupt
            self.signal = number
            self.event.set()

    def _listen(self, arrives: socket.socket, tell: Callable[[int], None]) -> None:
        while arrived := arrives.recv(1):  # empty when the other end is closed
            if arrived[0] not in _SIGNALS:
                continue
            self._arrived += 1
            if self._arrived == 1:
                # once the handler ran, a second signal after the report is a new one
                self.event.wait(_AT_ONCE)
                tell(arrived[0])
            elif self._arrived == 2:
                self._send_again(arrived[0])

    def _send_again(self, number: int) -> None:
        """Send a second signal again where Python called the handler once for two."""
        self._over.wait(_AT_ONCE)
        with self._deciding:
            if not self._over.is_set():
                self._sent_again = True
                signal.pthread_kill(_main_thread(), number)


@contextlib.contextmanager
def stopped_by_signals(tell: Callable[[int], None]) -> Iterator[Stop]:
    """Set the yielded stop's event at the first Ctrl-C or SIGTERM; raise Interrupted at the second.

    Python's own handlers wait until the main thread returns from a computation. A thread therefore
    learns of a signal when it arrives, and calls `tell` with the number of the first. Outside the
    main thread, which alone may handle signals, this does nothing.

    Args:
        tell: takes the number of the first signal.

    Raises:
        Interrupted: at the second signal.
    """
    stop = Stop()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    with _told_at_once(stop, tell), _handled(stop):
        try:
            yield stop
        except KeyboardInterrupt:
            raise stop.interrupted() from None


@contextlib.contextmanager
def _told_at_once(stop: Stop, tell: Callable[[int], None]) -> Iterator[None]:
    """Receive signals as they arrive, in a thread that reports the first."""
    arrives, leaves = socket.socketpair()
    leaves.setblocking(False)  # `set_wakeup_fd` requires it
    listener = threading.Thread(target=stop._listen, args=(arrives, tell), daemon=True)
    listener.start()
    earlier = signal.set_wakeup_fd(leaves.fileno(), warn_on_full_buffer=False)
    try:
        yield
    finally:
        signal.set_wakeup_fd(earlier)
        leaves.close()
        listener.join()
        arrives.close()


@contextlib.contextmanager
def _handled(stop: Stop) -> Iterator[None]:
    """Handle both signals, and restore the previous handlers afterwards."""
    before = {number: signal.signal(number, stop._handle) for number in _SIGNALS}
    try:
        yield
    finally:
        with stop._deciding:
            stop._over.set()
        for number, handler in before.items():
            signal.signal(number, handler)


def _main_thread() -> int:
    number = threading.main_thread().ident
    assert number is not None, "the main thread has begun"
    return number
