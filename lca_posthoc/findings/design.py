"""Analyse the design of a comparison of runs: repeats, pairs or one training, and other differences
between them.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..base.text import count
from ..errors import InputError
from ..results import LossResults

_SAME_LOSS = 1e-2  # relative; differences between precisions are smaller
_SAME_MOTION = 1e-2  # relative; differences between precisions are smaller
_Key = tuple[int, int, int]  # of a checkpoint: step, size, fingerprint


@dataclass(frozen=True)
class _Marks:
    """The marks of the training a run belongs to: its first checkpoint, those that training has
    moved to, and how far tensors moved.

    `motion` is Σ|Δθ| by the steps at both ends of a segment, and by tensor. A file's fingerprint is
    taken from samples, which may all lie in a large frozen part; the motion then distinguishes two
    trainings.
    """

    first: _Key
    moved: frozenset[_Key]
    motion: dict[tuple[int, int, str], float]

    def shared(self, other: _Marks) -> frozenset[_Key]:
        """Return the checkpoints that both runs have; none if the motion shows two different
        trainings.
        """
        both = self.motion.keys() & other.motion.keys()
        alike = all(
            math.isclose(self.motion[key], other.motion[key], rel_tol=_SAME_MOTION) for key in both
        )
        return self.moved & other.moved if alike else frozenset()


@dataclass(frozen=True)
class Design:
    """The design of a comparison.

    `once` (label, run) is False where a run has the same training as an earlier run of its label.
    `pairs` holds, for each label, the positions of the first label's runs that its runs are paired
    with, "apart" where the two are independent, or None where they are neither.
    """

    once: np.ndarray[Any, Any]
    pairs: list[list[int] | str | None]
    notes: list[str]

    def counted(self, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """Return values (label, …, run) with NaN for runs that do not count."""
        shape = (self.once.shape[0], *[1] * (values.ndim - 2), self.once.shape[1])
        return np.where(self.once.reshape(shape), values, np.nan)


def design_of(listed: dict[str, list[LossResults]], paired: bool | None) -> Design:
    """Return which runs are repeats of each other, and which form pairs.

    Args:
        listed: results of one loss, by label.
        paired: whether the k-th runs of all labels form pairs; None to pair by the first
            checkpoint.

    Raises:
        InputError: for `paired` if labels have different numbers of runs.
    """
    first = next(iter(listed))
    sizes = [len(several) for several in listed.values()]
    if paired and len(set(sizes)) > 1:
        counts = ", ".join(
            f"{size} under {label!r}" for label, size in zip(listed, sizes, strict=True)
        )
        raise InputError(f"pairs need the same number of runs under every label, got {counts}.")
    marks = {label: [_marks(results) for results in several] for label, several in listed.items()}
    notes, pairs = list[str](), list[list[int] | str | None]()
    once = np.zeros((len(listed), max(sizes)), dtype=bool)
    for row, (label, several) in enumerate(marks.items()):
        for position, of_run in enumerate(several):
            same = next(
                (before for before in range(position) if of_run.shared(several[before])), None
            )
            once[row, position] = same is None
            if same is not None:
                notes.append(
                    f"{listed[label][position].path} and {listed[label][same].path} are of one "
                    f"training ({_shared(of_run, several[same])}): under {label!r} it counts once, "
                    "as the latter."
                )
    counting = {label: np.flatnonzero(once[row]).tolist() for row, label in enumerate(listed)}
    for label, several in marks.items():
        order = (
            _partners(marks[first], counting[first], several, counting[label])
            if paired is None
            else None
        )
        same = any(of_run.shared(other) for of_run in several for other in marks[first])
        if label == first:
            pairs.append("apart")
        elif paired:
            pairs.append(list(range(len(several))))
        elif order is not None and len(counting[label]) > 1:
            pairs.append(order)
            notes.append(
                f"The runs of {label!r} and {first!r} form pairs that begin from the same "
                "checkpoint; differences are tested in pairs."
            )
        else:
            pairs.append(None if same else "apart")
        if label != first and same:
            untested = max(sizes) > 1 and pairs[-1] is None
            notes.append(
                f"{label!r} and {first!r} share trainings: they differ in how they "
                "were measured, not by chance."
                + (
                    " They are not tested against each other, as they are not independent."
                    if untested
                    else ""
                )
            )
    return Design(once, pairs, notes)


def _marks(results: LossResults) -> _Marks:
    keys = [
        (checkpoint.step, checkpoint.size, checkpoint.fingerprint)
        for checkpoint in results.manifest.checkpoints
    ]
    motion = results.tensors["motion"]
    moving = motion["step"].values[motion.sum("tensor").values > 0]
    start = min(moving.tolist(), default=None)
    moved = frozenset(
        key for key in keys if start is not None and key[0] > start and key != keys[0]
    )
    # statistics may be recomputed
    motion = motion.isel(tensor=motion["kind"].values == "parameter")
    rows = zip(
        motion["step"].values.tolist(),
        motion["step_end"].values.tolist(),
        motion.values.tolist(),
        strict=True,
    )
    names = motion["tensor"].values.tolist()
    of_segments = {
        (begin, end, name): value
        for begin, end, row in rows
        for name, value in zip(names, row, strict=True)
    }
    return _Marks(keys[0], moved, of_segments)


def _shared(one: _Marks, other: _Marks) -> str:
    shared, most = len(one.shared(other)), max(len(one.moved), len(other.moved))
    return (
        "the same checkpoints"
        if shared == most
        else f"{shared:,} of {most:,} checkpoints are the same"
    )


def _partners(
    first: list[_Marks],
    counting_first: list[int],
    other: list[_Marks],
    counting: list[int],
) -> list[int] | None:
    """Return the run of `first` that begins from the same checkpoint, for each run of `other`; None
    unless each has exactly one.
    """
    begins = [first[run].first for run in counting_first]
    mine = [other[run].first for run in counting]
    if Counter(begins) != Counter(mine) or len(set(begins)) < len(begins):
        return None
    order = [0] * len(other)  # places of runs that do not count are never read
    for run in counting:
        order[run] = counting_first[begins.index(other[run].first)]
    return order


def differences(listed: dict[str, list[LossResults]]) -> list[str]:
    """Return a sentence for each setting that changes the meaning of the numbers and differs
    between runs.
    """
    sentences = [
        text for name, value in _MEANINGS.items() if (text := _difference(name, listed, value))
    ]
    return sentences + _other_losses(listed)


def _steps(results: LossResults) -> str:
    checkpoints = results.manifest.checkpoints
    return (
        f"{checkpoints[0].step:,} to {checkpoints[-1].step:,} "
        f"({count(results.manifest.segments, 'segment')})"
    )


_MEANINGS: dict[str, Callable[[LossResults], str]] = {
    "normalisation (--norm-stats)": lambda results: str(results.manifest.settings["norm_stats"]),
    "batches of normalisation": lambda results: (
        f"{results.record.batch_size:,}"
        if results.manifest.settings["norm_stats"] == "batch"
        else ""
    ),
    "loss": lambda results: results.name,
    "split": lambda results: results.record.on or "none",
    "examples": lambda results: f"{results.record.examples:,} of {results.record.total:,}",
    "precision": lambda results: results.precision,
    "rule": lambda results: str(results.manifest.settings["rule"]),
    "steps": _steps,
}


def _difference(
    name: str, listed: dict[str, list[LossResults]], value: Callable[[LossResults], str]
) -> str:
    """Name the labels of each value; "" if all have the same."""
    of_labels = {
        label: list(dict.fromkeys(filter(None, map(value, several))))
        for label, several in listed.items()
    }
    if len({text for values in of_labels.values() for text in values}) < 2:
        return ""
    by_values: dict[str, list[str]] = {}
    for label, values in of_labels.items():
        if values:
            by_values.setdefault(" and ".join(values), []).append(label)
    return (
        f"Runs differ in {name}: "
        f"{'; '.join(f'{values} under {_names(labels)}' for values, labels in by_values.items())}."
    )


def _names(labels: list[str]) -> str:
    return ", ".join(labels[:4]) + (f" and {len(labels) - 4} more" if len(labels) > 4 else "")


def _other_losses(listed: dict[str, list[LossResults]]) -> list[str]:
    """Report where a loss of one name has different values on the same weights, sample and
    settings.
    """
    known: dict[tuple[object, ...], tuple[str, float]] = {}
    for label, several in listed.items():
        for results in several:
            settings, record = results.manifest.settings, results.record
            begin = results.manifest.checkpoints[0]
            where = (
                *(
                    begin.step,
                    begin.size,
                    begin.fingerprint,
                    results.name,
                    record.on,
                    record.examples,
                    record.total,
                ),
                *(
                    settings["norm_stats"],
                    record.batch_size if settings["norm_stats"] == "batch" else None,
                ),
            )
            identity = record.identity[0]
            if identity is None:
                continue
            value = float(identity["loss"])
            other, before = known.setdefault(where, (label, value))
            if abs(value - before) > _SAME_LOSS * max(abs(value), abs(before)):
                return [
                    f"Runs differ in the loss itself: at step {begin.step:,}, on the same weights, "
                    f"it is {before:.6g} under {other} and {value:.6g} under {label}."
                ]
    return []
