"""Limit what waits for a replay: the recorder writes an iterate only if there is room for it."""

from __future__ import annotations

import re
import sys
import threading
import warnings
from dataclasses import dataclass
from pathlib import Path

from ..base.text import count
from ..checkpoints.recorded import bytes_of, read_release, steps_there
from ..errors import InputError, ResourceError, amount

# a segment has two ends, and momentum needs the iterate before it
FEWEST = 3
_UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "TB": 10**12} | {
    "KiB": 2**10,
    "MiB": 2**20,
    "GiB": 2**30,
    "TiB": 2**40,
}
_BYTES = re.compile(rf"(\d+(?:\.\d+)?)\s*({'|'.join(_UNITS)})")
_SOONEST, _LATEST = 0.01, 0.5  # seconds between two checks for room


@dataclass(frozen=True)
class Bound:
    """Limit what may wait for a replay: a number of iterates, or bytes of iterates and their
    moments.
    """

    iterates: int | None = None
    bytes: int | None = None

    @classmethod
    def of(cls, at_most: int | str | None) -> Bound:
        """Parse the argument `at_most` of a recorder.

        >>> Bound.of(50), Bound.of("20 GB").bytes
        (Bound(iterates=50, bytes=None), 20000000000)

        Raises:
            InputError: if it is neither a number of iterates nor of bytes, or too small for any replay.
        """
        if at_most is None:
            return cls()
        if isinstance(at_most, int) and not isinstance(at_most, bool):
            if at_most < FEWEST:
                raise InputError(
                    f"at_most={at_most}: a replay needs {FEWEST} iterates at once, and each span of "
                    "segments one more than it has segments. Give at least 3; with 65, training and "
                    "a replay proceed side by side."
                )
            return cls(iterates=at_most)
        stated = _BYTES.fullmatch(at_most.strip()) if isinstance(at_most, str) else None
        if stated is None:
            raise InputError(
                f"at_most={at_most!r}: give a number of iterates, such as 65, or of bytes with its "
                f'unit, such as "20 GB" ({", ".join(_UNITS)}).'
            )
        return cls(bytes=int(float(stated[1]) * _UNITS[stated[2]]))

    def __bool__(self) -> bool:
        return self != Bound()

    def allows(self, iterates: int, size: int) -> bool:
        """Return whether some iterates may wait.

        Args:
            iterates: number of iterates.
            size: their total size in bytes.
        """
        return (self.iterates is None or iterates <= self.iterates) and (
            self.bytes is None or size <= self.bytes
        )

    def refuse_large(self, size: int) -> None:
        """Raise an error if the limit has no room for the iterates that a replay needs at once.

        Args:
            size: size of an iterate with its moments, in bytes.

        Raises:
            InputError: with the bytes that are needed.
        """
        if self.bytes is not None and FEWEST * size > self.bytes:
            raise InputError(
                f"at_most is {amount(self.bytes)}, and an iterate takes {amount(size)}: a replay "
                f"needs {FEWEST} at once, {amount(FEWEST * size)}. Give more; with room for 65, "
                "training and a replay proceed side by side."
            )

    def __str__(self) -> str:
        return count(self.iterates, "iterate") if self.iterates else amount(self.bytes or 0)


class Ring:
    """Track the iterates of a directory that wait for a replay, and the room for more.

    Iterates before the step that a replay released do not count: those that still exist stay for
    good.

    Args:
        directory: directory of the iterates.
        bound: the limit.
    """

    def __init__(self, directory: Path, bound: Bound) -> None:
        self._directory, self._bound = directory, bound
        self._waiting: dict[int, int] = {}  # bytes, by step
        self._given_up = threading.Event()
        self._said = False
        if bound:
            self._look()

    def give_up(self) -> None:
        """Stop every wait for room: an iterate without room raises an error from now on."""
        self._given_up.set()

    def is_released(self, step: int) -> bool:
        """Return whether a replay no longer needs an iterate, which may be gone."""
        release = read_release(self._directory)
        return release is not None and step < release.before

    def wait_for_room(self, step: int, size: int) -> None:
        """Wait until there is room for an iterate, and reserve it.

        Args:
            step: training step.
            size: size of the iterate with its moments, in bytes.

        Raises:
            InputError: if there can never be room.
            ResourceError: if `give_up` was called.
        """
        if not self._bound:
            return
        self._bound.refuse_large(size)
        seconds = _SOONEST
        while not self._has_room(size):
            self._look()
            if self._has_room(size):
                break
            self._say()
            if self._given_up.wait(seconds):
                raise ResourceError(
                    f"recording ended while the iterate of step {step} waited for room: "
                    f"{self._directory} holds {self._held()} of at most {self._bound}. Resume "
                    "training from a checkpoint of a step before."
                )
            seconds = min(2 * seconds, _LATEST)
        self._waiting[step] = size

    def leave(self, step: int) -> None:
        """Release the room of an iterate that was not written."""
        self._waiting.pop(step, None)

    def _has_room(self, size: int) -> bool:
        return self._bound.allows(1 + len(self._waiting), size + sum(self._waiting.values()))

    def _look(self) -> None:
        """Update which iterates wait."""
        release = read_release(self._directory)
        before = 0 if release is None else release.before
        waiting = [step for step in steps_there(self._directory) if step >= before]
        sizes = {step: bytes_of(self._directory, step) for step in waiting}
        self._waiting = {step: size for step, size in sizes.items() if size}

    def _held(self) -> str:
        return (
            f"{count(len(self._waiting), 'iterate')} "
            f"({amount(sum(self._waiting.values()))}) that no replay has released"
        )

    def _say(self) -> None:
        if self._said:
            return
        self._said = True
        text = (
            f"{self._directory} holds {self._held()}, of at most {self._bound}: recording and "
            "training wait for room. A replay makes room: `lca run "
            f"{self._directory} --task FILE --follow --consume`, beside this training"
        )
        try:
            warnings.warn(text, stacklevel=2)
        except UserWarning:  # a filter turns warnings into errors, but waiting is not an error
            print(text, file=sys.stderr)
