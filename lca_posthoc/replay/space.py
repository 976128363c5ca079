"""Reject results that need more than the free space, and name the remedy where a disk refuses a
file.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

from .. import results
from ..cluster import Cluster
from ..errors import LCAError, ResourceError, amount
from ..results import LossRecord, Manifest
from .prepare import Preparation, ask
from .requests import CompressionsRequest
from .worker import compressions

_BLOCK = 4096  # bytes; most file systems round the size of a file to multiples


def check_space(
    path: Path,
    cluster: Cluster,
    ready: Preparation,
    manifest: Manifest,
    keep: str,
    losses: Mapping[str, LossRecord],
    *,
    ignore_space: bool,
) -> list[str]:
    """Reject losses whose results need more than the free space, by a trial compression of a
    segment of each; return a note where space may run short.

    Args:
        path: of the run.
        cluster: does the trial.
        ready: the probed task.
        manifest: of the run with the losses.
        keep: the level of `--keep`.
        losses: to be added.
        ignore_space: whether to start with too little space.

    Raises:
        ResourceError: naming both sizes, and what to do.
    """
    space = results.free_space(path)
    most = results.required_bytes(manifest, keep, losses)
    if space is None or most <= space[1]:
        return []
    place, free = space
    shares = _compressed(cluster, ready, manifest)
    about = results.estimated_bytes(manifest, keep, losses, shares, _BLOCK)
    will_need = (
        f"the result will need about {amount(about)} after compression (at most "
        f"{amount(most)}), and {place} has {amount(free)} free"
    )
    if about > free and not ignore_space:
        lower = ready.draft.lower_levels(keep)
        raise ResourceError(f"{will_need}. {_less_space(lower)}")
    full = "a run on a full disk stops, and resumes once there is space"
    return [f"{will_need}: {full}"]


@contextlib.contextmanager
def named_disk_errors() -> Iterator[None]:
    """Translate an error of the file system into one that names a remedy.

    Raises:
        ResourceError: if space or a permission is missing.
        LCAError: for any other error of a file.
    """
    try:
        yield
    except OSError as error:
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            raise ResourceError(
                f"no permission: {error}. Grant it to this user, or write elsewhere with --out."
            ) from error
        if error.errno not in (errno.ENOSPC, errno.EDQUOT):
            raise LCAError(
                f"a file cannot be read or written: {error}. Committed results are kept; fix it "
                "and run again."
            ) from error
        raise ResourceError(
            f"no space left for the result ({error}). Free some and run again."
        ) from error


def _less_space(lower: Sequence[str]) -> str:
    """Return what to do where results need more than the free space.

    Args:
        lower: levels of `--keep` that may replace the current one, the lowest first.
    """
    options = [f"--keep {level}" for level in reversed(lower)]
    ways = [
        *([f"keep less with {' or '.join(options)}"] if options else []),
        "write elsewhere with --out",
        "or start anyway with --ignore-space: a run on a full disk stops, and resumes "
        "once there is space",
    ]
    text = ", ".join(ways)
    return f"{text[0].upper()}{text[1:]}."


def _compressed(
    cluster: Cluster, ready: Preparation, manifest: Manifest
) -> dict[str, dict[str, float]]:
    """Return the ratio that compression leaves of each loss's arrays, by a trial; see
    `Compressions`.
    """
    request = CompressionsRequest(
        setup=ready.setup,
        sample=ready.sample,
        batch_sizes=ready.batch_sizes,
        segments_of_window=manifest.length_of(0),
    )
    return ask(cluster, compressions, request).compressed
