"""Compare the loss at checkpoints where spans meet: both spans hold it, and the values must agree.

The comparison detects data changed outside the fingerprinted sample, and machines that compute
wrongly, for which the sums of neighbouring spans would not join.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping

from ..errors import LCAError
from ..numerics.precisions import PRECISIONS
from .commits import Commits

# maps a span to the loss at its first and its last checkpoint, groups averaged
Ends = Mapping[int, list[float]]


def differ(commits: Commits, one: float, other: float) -> bool:
    """Tell whether two values of a loss at one checkpoint differ by more than rounding on another
    machine may cause.

    Rounding is taken relative to the larger value plus a hundredth of the loss at the first
    checkpoint.

    Args:
        commits: of the loss.
        one: a value.
        other: another value.
    """
    first = commits.manifest.losses[commits.loss].identity[0]
    scale = max(abs(one), abs(other)) + (abs(first["loss"]) / 100 if first else 0.0)
    return (
        not abs(one - other) <= PRECISIONS[commits.manifest.settings["precision"]].same_loss * scale
    )


def disagreement(commits: Commits, span: int, known: Ends) -> str | None:
    """Describe how a span and the one before it differ at their shared checkpoint; None if they
    agree, or one is not committed.

    Args:
        commits: of a loss.
        span: the later one; if it starts elsewhere than the one before ends, they share none.
        known: ends that are known; the others are read from markers.

    Raises:
        LCAError: if a marker is damaged.
    """
    if not _joins(commits, span):
        return None
    before, after = (_ends(commits, index, known) for index in (span - 1, span))
    if before is None or after is None or not differ(commits, before[1], after[0]):
        return None
    step = commits.manifest.steps[commits.manifest.rows(span).start]
    return (
        f"loss {commits.loss!r} at step {step} is {before[1]:.8g} in span {span - 1} and "
        f"{after[0]:.8g} in span {span}"
    )


def meeting(commits: Commits, again: Collection[int] = ()) -> tuple[int, float] | None:
    """Return the position of a checkpoint at the end of a committed span next to one to be
    computed, and the loss there; None if there is none.

    Args:
        commits: of a loss.
        again: committed spans that will be recomputed.
    """
    pending = {*commits.pending(), *again}
    for span in sorted(pending):
        for beside, end in ((span - 1, 1), (span + 1, 0)):
            if beside in pending:
                continue
            try:
                ends = _ends(commits, beside, {})
            except LCAError:  # a damaged marker is reported elsewhere
                continue
            if ends is not None:
                rows, starts = commits.manifest.rows(beside), commits.manifest.starts
                return (starts[rows.stop - 1] + 1 if end else starts[rows.start]), ends[end]
    return None


def _joins(commits: Commits, span: int) -> bool:
    """Tell whether a span starts at the checkpoint where the one before ends."""
    manifest = commits.manifest
    return 0 < span < manifest.spans and manifest.follows(manifest.rows(span).start)


def _ends(commits: Commits, span: int, known: Ends) -> list[float] | None:
    if not 0 <= span < commits.manifest.spans:
        return None
    summary = None if span in known else commits.span_summary(span)
    ends: list[float] | None = known.get(span) if summary is None else summary["ends"]
    return ends
