"""Count the progress of a replay, and put it into words."""

from __future__ import annotations

from dataclasses import dataclass

from ...base.text import count, duration


@dataclass(kw_only=True)
class Progressed:
    """The progress of a replay: `done` of `total` segments, `before` of them when it began.

    With two losses each segment counts twice.
    """

    total: int = 0
    before: int = 0
    done: int = 0
    underway: float = 0.0
    spans: int = 0
    spans_done: int = 0
    workers: int = 0
    worst_residual: float = 0.0
    began: float = 0.0
    retried: int = 0
    failed: int = 0

    @property
    def reached(self) -> float:
        """Return the finished segments, with those that spans underway report."""
        return min(float(self.total), self.done + self.underway)

    def rate(self, now: float) -> float | None:
        """Return segments per second since work began.

        A moving rate would jump, because spans end in bunches.
        """
        seconds, segments = now - self.began, self.reached - self.before
        return segments / seconds if seconds > 0 and segments > 0 else None

    def seconds_left(self, now: float) -> float | None:
        """Return the seconds left at the rate so far."""
        rate = self.rate(now)
        return None if rate is None else (self.total - self.reached) / rate

    @property
    def trouble(self) -> str:
        """Return how many spans were retried or failed, in words."""
        counts = (("retried", self.retried), ("failed", self.failed))
        return "".join(f" · {count} {what}" for what, count in counts if count)

    def line(self, now: float) -> str:
        """Return all of the progress in one line."""
        rate, remaining = self.rate(now), self.seconds_left(now)
        workers = count(self.workers, "worker")
        speed = f"{rate:.3g} segments/s on {workers}" if rate is not None else workers
        rest = (
            f"about {duration(remaining)} left"
            if remaining is not None
            else f"after {duration(now - self.began)}"
        )
        return (
            f"{int(self.reached):,} of {count(self.total, 'segment')} · worst residual "
            f"{self.worst_residual:.1e}{self.trouble} · {speed} · {rest}"
        )
