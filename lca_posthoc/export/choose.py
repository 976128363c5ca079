"""Choose losses and findings to export, and explain why others are skipped."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import xarray as xr

from .. import findings
from ..base.declarations import declared_findings
from ..base.text import did_you_mean, no_loss
from ..errors import InputError
from ..findings.bands import needs_single_steps
from ..findings.common import (
    about_part,
    findings_beyond,
    has_part,
    takes_part,
    without_part,
)
from ..findings.generalisation import no_two_splits, two_splits
from ..findings.per_example import tells_examples
from ..results import LossResults, Run

Say = Callable[[str], None]
Chosen = tuple[str, str, Callable[[], xr.Dataset]]


def known() -> list[str]:
    """Return the findings that can be exported: all except those of several runs."""
    return sorted(
        name for name, finding in declared_findings().items() if finding.runs != "compared"
    )


def choose(run: Run, losses: Sequence[str], requested: Sequence[str], say: Say) -> Iterator[Chosen]:
    """Yield the losses and findings to export, each with the call that computes it.

    Args:
        run: an open run.
        losses: their names; empty for all.
        requested: names of findings; empty for all that the run allows except `microscope`.
            Findings of examples, causes and directions are then chosen only for losses and runs
            that have them.
        say: called with a sentence on what is skipped, and why.

    Raises:
        InputError: for an unknown name, or a requested finding that the run does not allow.
    """
    _check_names(run, losses, requested)
    names, wanted = list(dict.fromkeys(losses or run)), list(dict.fromkeys(requested))
    if not requested:
        beyond = findings_beyond(run.manifest.keep)
        wanted = [name for name in _unasked() if all(name not in more for more in beyond.values())]
        if run.manifest.sampled is None:
            _say_beyond(run.manifest.keep, beyond, say)
        else:
            say(about_part(run.manifest.sampled))
    pair, opened, calls = _pair(run, names), {name: run[name] for name in names}, 0
    for loss in names:
        for name in wanted:
            if not requested and not _has_subject(run[loss], name):
                continue
            paired = declared_findings()[name].losses == 2
            if paired and pair is not None and loss != pair[0].name:
                continue
            obstacle = _obstacle(run[loss], name, pair, opened)
            if obstacle is None:
                calls += 1
                of = pair if paired and pair is not None else (run[loss],)
                yield loss, name, _call(name, of)
            elif requested:
                raise InputError(f"{name} of loss {loss!r} cannot be exported: {obstacle}")
            elif not paired or loss == names[0]:
                say(f"{name} of loss {loss!r} is skipped: {obstacle}")
    if not calls:
        raise InputError(
            f"{run.path} has nothing to export yet. Let `lca run` commit a span first."
        )


def _check_names(run: Run, losses: Sequence[str], requested: Sequence[str]) -> None:
    """Reject a loss that the run lacks, and an unknown finding.

    Raises:
        InputError: naming the nearest one.
    """
    for loss in losses:
        if loss not in run:
            raise InputError(no_loss(run.path, loss, run))
    for name in requested:
        if name not in known():
            raise InputError(
                f"there is no finding {name!r} to export; there are {', '.join(known())}."
                f"{did_you_mean(name, known())}"
            )


def _has_subject(results: LossResults, name: str) -> bool:
    """Tell whether a loss has the examples and the part of results that a finding needs."""
    finding = declared_findings()[name]
    return (
        has_part(results, finding.part)
        and takes_part(results, name)
        and (not finding.examples or tells_examples(results))
    )


def _unasked() -> list[str]:
    """Return the findings that are exported by default."""
    return [name for name in known() if not declared_findings()[name].on_request]


def _say_beyond(keep: str, beyond: dict[str, list[str]], say: Say) -> None:
    """Say which default findings need more than the run's level of `--keep`."""
    unasked = set(_unasked())
    parts = [
        f"{', '.join(more)} (--keep {level})"
        for level, names in beyond.items()
        if (more := [name for name in names if name in unasked])
    ]
    if parts:
        say(f"the run keeps {keep}, so {' and '.join(parts)} are skipped.")


def too_little_kept(results: LossResults, name: str) -> str | None:
    """Say why a run keeps too little for a finding, and what to do; None if it keeps enough.

    Args:
        results: one loss of a run.
        name: of the finding.
    """
    level = declared_findings()[name].level
    if results.holds(level):
        return None
    return (
        f"the run keeps {results.manifest.keep}, but it needs --keep {level}. Run again into "
        f"another directory: --keep {level} --out OTHER.lca."
    )


def _call(name: str, results: tuple[LossResults, ...]) -> Callable[[], xr.Dataset]:
    finding: Callable[..., xr.Dataset] = getattr(findings, name)
    return lambda: finding(*results)


def _pair(run: Run, names: Sequence[str]) -> tuple[LossResults, LossResults] | None:
    """Return the two losses over two splits to compare; None if there are none."""
    pair = two_splits({name: run[name] for name in names})
    return None if pair is None else (run[pair[0]], run[pair[1]])


def _obstacle(
    results: LossResults,
    name: str,
    pair: tuple[LossResults, LossResults] | None,
    losses: dict[str, LossResults],
) -> str | None:
    """Say why a finding cannot be computed; None if it can."""
    if (too_little := too_little_kept(results, name)) is not None:
        return too_little
    if not results.progress()["segments_done"]:
        return "it has no finished segment yet. Let `lca run` commit a span first."
    if (on_lines := needs_single_steps(results, name)) is not None:
        return on_lines
    if not takes_part(results, name):
        return f"such findings {results.of_a_part()}"
    if not has_part(results, declared_findings()[name].part):
        return without_part(results, declared_findings()[name].part)
    if declared_findings()[name].examples and not tells_examples(results):
        return 'it has no results per example. Declare it with Loss(…, per="example").'
    if declared_findings()[name].losses != 2:
        return None
    if pair is None:
        return no_two_splits(losses)
    first, second = pair
    if first.behind == second.behind and not first.steps["step"].equals(second.steps["step"]):
        return (
            "its two losses do not have the same segments yet. Run `lca run` again to finish both."
        )
    return None
