"""Choose the tensors of a trajectory that training moves, and measure how much each moves."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from .displacements import Displacements, Piece, split, squares
from .headers import FLOATING
from .trajectory import Trajectory, is_statistic


@dataclass(frozen=True, kw_only=True)
class LeftOut:
    """Tensors in which no direction has a part, and the reason."""

    names: tuple[str, ...]
    reason: str


def chosen_tensors(
    trajectory: Trajectory, displacements: Displacements
) -> tuple[list[str], list[LeftOut]]:
    """Return the names of floating tensors, in order, without running statistics and second names
    of tied tensors; and those left out.

    Whether another tensor is a buffer, checkpoints do not say.
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
    """Return the names of tensors that move, and whose numbers at the first and at the last
    checkpoint are those of a tensor before them.
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
    """Return a digest of the numbers of a tensor in one checkpoint."""
    digest = hashlib.sha256()
    for block in displacements.blocks([name]):
        digest.update(displacements.values(block, checkpoint).tobytes())
    return digest.digest()


def motion_of(
    displacements: Displacements, blocks: Iterable[Sequence[Piece]], names: Sequence[str]
) -> dict[str, float]:
    """Return Σ‖Δθ‖² over all segments of each of some tensors, whose blocks are given."""
    motion = dict.fromkeys(names, 0.0)
    for block in blocks:
        for segments in displacements.row_blocks():
            for name, part in split(block, displacements.rows(block, segments)):
                motion[name] += squares(part)
    return motion
