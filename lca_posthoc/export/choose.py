"""The choice of losses and findings to export, and the reasons for which one is left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import xarray as xr

from .. import findings
from ..errors import InputError
from ..findings.generalisation import no_two_splits, two_splits
from ..store import LossResults, Run

NEEDS = {"units": ("units", "parameters"), "microscope": ("parameters",)}
PAIRED = "generalisation"  # of two losses
_NOT_TABLES = ("summary", "compare")  # `lca summary --json`; of several runs
_LARGE = ("microscope",)  # exported only on request

Say = Callable[[str], None]
Chosen = tuple[str, str, Callable[[], xr.Dataset]]


def known() -> list[str]:
    """Return the findings that can be exported."""
    return [name for name in findings.__all__ if name not in _NOT_TABLES]


def choose(run: Run, losses: Sequence[str], requested: Sequence[str], say: Say) -> Iterator[Chosen]:
    """Yield the losses and findings to export, each with the call that computes it.

    Args:
        run: an open run.
        losses: their names; all where empty.
        requested: names of findings; where empty, all that the run allows but `microscope`.
        say: called with a sentence on what is left out, and why.

    Raises:
        InputError: for an unknown name, or a finding asked for that the run does not allow.
    """
    for loss in losses:
        if loss not in run:
            raise InputError(
                f"{run.path} has no loss {loss!r}; it has {', '.join(map(repr, run))}."
            )
    for name in requested:
        if name not in known():
            raise InputError(
                f"there is no finding {name!r} to export; there are {', '.join(known())}."
            )
    names = list(dict.fromkeys(losses or run))
    pair, calls = _pair(run, names), 0
    for loss in names:
        results = run[loss]
        for name in dict.fromkeys(requested or (name for name in known() if name not in _LARGE)):
            if name == PAIRED and pair is not None and loss != pair[0].name:
                continue
            obstacle = _obstacle(results, name, pair, {other: run[other] for other in names})
            if obstacle is None:
                calls += 1
                yield (
                    loss,
                    name,
                    _call(name, pair if name == PAIRED and pair is not None else (results,)),
                )
            elif requested:
                raise InputError(f"{name} of loss {loss!r} cannot be exported: {obstacle}")
            elif name != PAIRED or loss == names[0]:
                say(f"{name} of loss {loss!r} is left out: {obstacle}")
    if not calls:
        raise InputError(
            f"{run.path} has nothing to export yet. Let `lca run` commit a span first."
        )


def _call(name: str, results: tuple[LossResults, ...]) -> Callable[[], xr.Dataset]:
    finding: Callable[..., xr.Dataset] = getattr(findings, name)
    return lambda: finding(*results)


def _pair(run: Run, names: Sequence[str]) -> tuple[LossResults, LossResults] | None:
    """Return the two losses over two splits that are compared; None where there are none."""
    pair = two_splits({name: run[name] for name in names})
    return None if pair is None else (run[pair[0]], run[pair[1]])


def _obstacle(
    results: LossResults,
    name: str,
    pair: tuple[LossResults, LossResults] | None,
    losses: dict[str, LossResults],
) -> str | None:
    """Say why a finding cannot be computed; None where it can."""
    keep = results.manifest.keep
    if not results.progress()["segments_done"]:
        return "it has no finished segment yet. Let `lca run` commit a span first."
    if keep not in NEEDS.get(name, (keep,)):
        return (
            f"the run keeps {keep} (--keep {keep}). Run again into another directory with --keep "
            f"{NEEDS[name][0]}."
        )
    if name == PAIRED and pair is None:
        return no_two_splits(losses)
    if (
        name == PAIRED
        and pair is not None
        and pair[0].behind == pair[1].behind
        and not pair[0].steps["step"].equals(pair[1].steps["step"])
    ):
        return (
            "its two losses do not have the same segments yet. Run `lca run` again to finish both."
        )
    return None
