"""Wait for the iterates of a running training, until they make whole spans."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..base.text import count
from ..checkpoints.paths import is_remote
from ..checkpoints.places import Where
from ..checkpoints.recorded import (
    RecorderSign,
    bytes_of,
    name_of,
    read_sign,
    segments_between,
    steps_there,
)
from ..checkpoints.trajectory import Trajectory, extended
from ..errors import InputError
from ..results import Manifest
from .consume import only_directory, reads_before
from .stopping import Stop

UNKNOWN = 10_000  # segments to plan for where the recorder gives no number
_LONGEST_SPAN = 32
_LOOKED_AT = 3  # iterates that show the size of one; the first has no moments
_SOONEST, _LATEST = 0.02, 2.0  # seconds between two polls
_LOOKS = 4  # polls in the time that the missing iterates take


def refuse_remote(checkpoints: Where) -> None:
    """Reject checkpoints that no recorder can be writing.

    Raises:
        InputError: if the checkpoints are not in one directory, or behind a URL.
    """
    root = only_directory(checkpoints, "--follow")
    if is_remote(root):
        raise InputError(
            f"{root} is remote, but a recorder writes to local file systems. Leave --follow out."
        )


@dataclass
class Follower:
    """Waits for iterates of a recorder, until it closes.

    Args:
        root: the directory of the checkpoints.
        stop: the request to end early.
        begin: reports what is waited for, and what a first signal does.
        note: reports what the user should know.
        consumes: whether iterates are removed once they are replayed.
        has_causes: whether the motion before a segment is needed, and moments are recorded.
    """

    root: Path
    stop: Stop
    begin: Callable[[str, str], None]
    note: Callable[[Sequence[str]], None]
    consumes: bool
    has_causes: bool
    is_over: bool = field(default=False, init=False)
    span: int = field(default=0, init=False)
    _sign: RecorderSign | None = field(default=None, init=False)
    _said_dead: RecorderSign | None = field(default=None, init=False)
    _told: str = field(default="", init=False)
    _pace: float = field(default=0.4, init=False)  # seconds from one iterate to the next

    @property
    def segments(self) -> int:
        """Return the final number of segments, as far as the recorder announces it."""
        known = None if self._sign is None else self._sign.segments
        return UNKNOWN if known is None else max(1, known)

    @property
    def is_told(self) -> bool:
        """Tell whether the recorder announces the number of segments."""
        return self._sign is not None and self._sign.segments is not None

    def wait_for_first(self, recorded: Manifest | None, span: int | None) -> None:
        """Wait until there are iterates to begin with, and settle how many make a span.

        Args:
            recorded: the existing run, if any.
            span: the segments per span that are asked for.

        Raises:
            InputError: if no recorder writes the directory, or its room is too small.
            Interrupted: if the user stops it.
        """
        self._wait(lambda steps: _LOOKED_AT - len(steps) if recorded is None else 1 - len(steps))
        self.span = self._settled(recorded.span if recorded is not None else span)
        if recorded is None:
            self._wait(lambda steps: self.span - self._segments(steps))

    def _settled(self, fixed: int | None) -> int:
        """Return the segments of a span, at most half of what the recorder's room holds, so that
        training and replay overlap.

        Raises:
            InputError: if the room is too small.
        """
        sign = self._sign
        if sign is None or not sign.is_bounded or sign.state == "closed":
            return fixed or _LONGEST_SPAN
        if not self.consumes:
            raise InputError(
                f"the recorder of {self.root} waits when its iterates fill their room (at_most), "
                "and nothing makes room without --consume. Add that option."
            )
        largest = max((bytes_of(self.root, step) for step in steps_there(self.root)), default=1)
        room = sign.room(largest) or 0
        span = fixed or 1
        if self._needed(span) > room:
            raise InputError(
                f"the recorder of {self.root} lets {count(room, 'iterate')} wait (at_most), and a "
                f"span of {count(span, 'segment')} needs {self._needed(span)} at once. Record with "
                "a larger at_most" + (", or write another run with --out." if fixed else ".")
            )
        while fixed is None and self._needed(2 * (2 * span)) <= room and span < _LONGEST_SPAN:
            span *= 2
        return span

    def _needed(self, segments: int) -> int:
        """Return the most iterates that exist while so many segments are replayed.

        Each burst has one more iterate than segments, and the last iterate of the burst before
        stays until the next one begins.
        """
        bursts = None if self._sign is None else self._sign.bursts
        gaps = 0 if bursts is None else -(-segments // (bursts[1] - 1))
        return reads_before(self.has_causes) + segments + 1 + gaps

    def _segments(self, steps: Sequence[int]) -> int:
        """Return how many segments the iterates of some steps have, by what the recorder announces."""
        return segments_between(steps, None if self._sign is None else self._sign.bursts)

    def whole(self, trajectory: Trajectory, recorded: int = 0) -> Trajectory:
        """Return a trajectory without the checkpoints after its last whole span, unless there is
        none or no more will come.

        Args:
            trajectory: all existing iterates.
            recorded: checkpoints that the run already has, which stay.
        """
        starts = trajectory.starts
        rows = len(starts) // self.span * self.span
        if self.is_over or not (rows or recorded):
            return trajectory
        return trajectory.up_to(max(recorded, starts[rows - 1] + 2 if rows else 0))

    def more(self, trajectory: Trajectory, rename: Sequence[str]) -> Trajectory:
        """Wait for another whole span, or for the end, and return the grown trajectory.

        Args:
            trajectory: the iterates so far.
            rename: rules "OLD=NEW" for names of tensors.
        """
        known = len(trajectory.checkpoints)
        last = trajectory.checkpoints[-1].step
        # first complete a short last span
        missing = self.span - len(trajectory.starts) % self.span

        def lacks(steps: Sequence[int]) -> int:
            return missing - self._segments([last, *(step for step in steps if step > last)])

        while True:
            self._wait(lacks)
            later = [step for step in steps_there(self.root) if step > last]
            files = {step: self.root / name_of(step) for step in later}
            longer = extended(trajectory, files, rename, moments=self.has_causes)
            grown = self.whole(longer, known)
            if self.is_over or len(grown.checkpoints) > known:
                return grown
            missing += 1  # an earlier recorder wrote other bursts

    def _wait(self, lacks: Callable[[Sequence[int]], int]) -> None:
        """Wait until no iterate is missing, or until no more will come.

        Args:
            lacks: returns how many are missing, given the steps of those that exist.
        """
        seen: tuple[int, float] | None = None
        self._told = ""
        while not self.is_over:
            # in this order: after the recorder closed, everything it wrote is there
            sign, steps = read_sign(self.root), steps_there(self.root)
            self._refuse_without_sign(sign, steps)
            self._sign, before = sign, self._sign
            if self.span and sign != before:  # of a resumed training, with another bound
                self._settled(self.span)
            if sign is not None and sign.state == "closed":
                self.is_over = True
                return
            lacking = lacks(steps)
            if lacking <= 0:
                return
            seen = self._measure(seen, steps)
            lives = sign is None or sign.is_recording(self.root)
            self._say(sign, lives, steps)
            seconds = min(_LATEST, max(_SOONEST, lacking * self._pace / _LOOKS))
            if self.stop.event.wait(seconds):
                if lives or len(steps) < 2:
                    raise self.stop.interrupted()
                self.stop.event.clear()  # a second signal stops at once, as always
                self.is_over = True

    def _measure(
        self, seen: tuple[int, float] | None, steps: Sequence[int]
    ) -> tuple[int, float] | None:
        """Measure the recorder's pace from the last new iterate and its time."""
        if not steps:
            return None
        now = time.monotonic()
        if seen is None:
            return steps[-1], now
        came = sum(step > seen[0] for step in steps)
        if not came:
            return seen
        self._pace = (now - seen[1]) / came
        return steps[-1], now

    def _refuse_without_sign(self, sign: RecorderSign | None, steps: Sequence[int]) -> None:
        if sign is None and steps:
            raise InputError(
                f"{self.root} holds checkpoints, but no recorder is registered there, so nothing tells "
                "when the last one is written. Leave --follow out; "
                "the same command replays later ones."
            )

    def _say(self, sign: RecorderSign | None, lives: bool, steps: Sequence[int]) -> None:
        """Report what is waited for, and once that a recorder died."""
        goes_on = "committed results are kept. Run the same command again to resume"
        if sign is None:
            self._tell(f"waiting for a recorder to begin in {self.root}", goes_on)
        elif lives:
            self._tell(f"waiting for iterates of the recorder ({sign.who})", goes_on)
        else:
            if self._said_dead != sign:
                self._said_dead = sign
                self.note([self._death(sign, steps)])
            self._tell(
                "waiting for the training to resume, whose recorder ended without closing",
                "the run ends with the existing iterates",
            )

    def _tell(self, waits_for: str, on_signal: str) -> None:
        if waits_for != self._told:
            self._told = waits_for
            self.begin(waits_for, on_signal)

    def _death(self, sign: RecorderSign, steps: Sequence[int]) -> str:
        how = (
            "was ended by an error or an interruption"
            if sign.state == "failed"
            else "died without closing"
        )
        last = f", after the iterate of step {steps[-1]}" if steps else ""
        return (
            f"the recorder of {self.root} ({sign.who}) {how}{last}. If the training resumes "
            "into the directory, the replay continues; Ctrl-C ends the run with the existing "
            "iterates"
        )
