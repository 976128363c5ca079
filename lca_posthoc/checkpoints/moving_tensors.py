"""Select the tensors of a trajectory that training moves, and measure how much each moves."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .displacements import Displacements, Piece, split, squares
from .headers import FLOATING
from .trajectory import Trajectory, is_statistic


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """List tensors that the directions leave out, with the reason."""

    names: tuple[str, ...]
    reason: str


def chosen_tensors(
    trajectory: Trajectory, displacements: Displacements
) -> tuple[list[str], list[LeftOut]]:
    """Select the floating tensors, without running statistics and second names of tied tensors.

    Checkpoints do not show whether a remaining tensor is a buffer.

    Args:
        trajectory: the checkpoints.
        displacements: displacements of the same trajectory.

    Returns:
        The names of the selected tensors, sorted, and the tensors left out.
    """
    reasons: dict[str, list[str]] = {}
    names = []
    for name, header in sorted(trajectory.tensors.items()):
        if header.dtype not in FLOATING:
            reasons.setdefault("no floating numbers", []).append(name)
        elif is_statistic(name):
            reasons.setdefault("running statistics of normalisation layers", []).append(name)
        else:
            names.append(name)
    if tied := _tied(trajectory, displacements, names):
        reasons["second names of tied tensors"] = tied
    left_out = [LeftOut(names=tuple(some), reason=reason) for reason, some in reasons.items()]
    return [name for name in names if name not in tied], left_out


def _tied(trajectory: Trajectory, displacements: Displacements, names: Sequence[str]) -> list[str]:
    """Return the names of tensors that move and equal an earlier tensor at the first and the last
    checkpoint.
    """
    alike: dict[object, list[str]] = {}
    for name in names:
        alike.setdefault(trajectory.tensors[name], []).append(name)
    tied = []
    for some in alike.values():
        seen = set[tuple[bytes, bytes]]()
        for name in some if len(some) > 1 else []:
            first, last = (_digest(displacements, name, end) for end in (0, displacements.segments))
            if (first, last) in seen and first != last:
                tied.append(name)
            seen.add((first, last))
    return tied


def _digest(displacements: Displacements, name: str, checkpoint: int) -> bytes:
    """Return a digest of a tensor's numbers in one checkpoint."""
    digest = hashlib.sha256()
    for block in displacements.blocks([name]):
        digest.update(displacements.values(block, checkpoint).tobytes())
    return digest.digest()


def motion_of(
    displacements: Displacements, blocks: Iterable[Sequence[Piece]], names: Sequence[str]
) -> dict[str, float]:
    """Return Σ‖Δθ‖² of each tensor over all segments.

    Args:
        displacements: displacements of a trajectory.
        blocks: blocks that cover the tensors.
        names: names of the tensors.
    """
    motion = dict.fromkeys(names, 0.0)
    for block in blocks:
        for segments in displacements.row_blocks():
            for name, part in split(block, displacements.rows(block, segments)):
                motion[name] += squares(part)
    return motion
