"""What is exported: which losses, which findings of them, and why one is left out."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

from .. import findings
from ..errors import InputError
from ..findings.generalisation import no_two_splits, two_splits
from ..store import LossResults, Run

NEEDS = {"units": ("units", "parameters"), "microscope": ("parameters",)}
PAIRED = "generalisation"  # of two losses
_NOT_TABLES = ("summary", "compare")  # `lca summary --json`; of several runs
_LARGE = ("microscope",)  # only where it is asked for

Say = Callable[[str], None]
Chosen = tuple[str, str, Callable[[], Any]]


def known() -> list[str]:
    """The findings that can be exported."""
    return [name for name in findings.__all__ if name not in _NOT_TABLES]


def choose(run: Run, losses: Sequence[str], wanted: Sequence[str], say: Say) -> Iterator[Chosen]:
    """The losses and findings to be exported, each with the call that computes it.

    Args:
        run: an open run.
        losses: their names; all where empty.
        wanted: names of findings; where empty, all that the run allows but `microscope`.
        say: told what is left out, and why.

    Raises:
        InputError: for an unknown name, or a finding asked for that the run does not allow.
    """
    for loss in losses:
        if loss not in run:
            raise InputError(f"{run.path} has no loss {loss!r}; it has {', '.join(map(repr, run))}.")
    for name in wanted:
        if name not in known():
            raise InputError(f"there is no finding {name!r} to export; there are {', '.join(known())}.")
    names = list(dict.fromkeys(losses or run))
    pair, calls = _pair(run, names), 0
    for loss in names:
        results = run[loss]
        for name in dict.fromkeys(wanted or (name for name in known() if name not in _LARGE)):
            if name == PAIRED and pair is not None and loss != pair[0].name:
                continue
            obstacle = _obstacle(results, name, pair, {each: run[each] for each in names})
            if obstacle is None:
                calls += 1
                yield loss, name, _call(name, pair if name == PAIRED and pair is not None else (results,))
            elif wanted:
                raise InputError(f"{name} of loss {loss!r} cannot be exported: {obstacle}")
            elif name != PAIRED or loss == names[0]:
                say(f"{name} of loss {loss!r} is left out: {obstacle}")
    if not calls:
        raise InputError(f"{run.path} has nothing to export yet. Let `lca run` commit a span first.")


def _call(name: str, given: tuple[LossResults, ...]) -> Callable[[], Any]:
    return lambda: getattr(findings, name)(*given)


def _pair(run: Run, names: Sequence[str]) -> tuple[LossResults, LossResults] | None:
    """The two losses over two splits that are compared."""
    pair = two_splits({name: run[name] for name in names})
    return None if pair is None else (run[pair[0]], run[pair[1]])


def _obstacle(
    results: LossResults, name: str, pair: tuple[LossResults, LossResults] | None, losses: dict[str, LossResults]
) -> str | None:
    """Why a finding cannot be had; None where it can."""
    keep = results.manifest.keep
    if not results.progress()["segments_done"]:
        return "it has no finished segment yet. Let `lca run` commit a span first."
    if keep not in NEEDS.get(name, (keep,)):
        return f"the run keeps {keep} (--keep {keep}). Run again into another directory with --keep {NEEDS[name][0]}."
    if name == PAIRED and pair is None:
        return no_two_splits(losses)
    if (
        name == PAIRED
        and pair is not None
        and pair[0].behind == pair[1].behind
        and not pair[0].steps["step"].equals(pair[1].steps["step"])
    ):
        return "its two losses do not have the same segments yet. Run `lca run` again to finish both."
    return None
