"""What runs that are compared are to each other: repeats, pairs or one training, and in what else they differ."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import InputError
from ..store import LossResults

_SAME_LOSS = 1e-2  # relative: precisions differ by less
_Key = tuple[int, int, int]  # of a checkpoint: step, size, fingerprint


@dataclass(frozen=True)
class Design:
    """Holds what the runs are to each other.

    `once` (label, run) holds False where a run is of a training that an earlier run of its label is of. `pairs` has for each label
    the positions of the runs of the first label that its runs are paired with, "apart" where they are independent of these, and
    None where they are neither.
    """

    once: np.ndarray[Any, Any]
    pairs: list[list[int] | str | None]
    notes: list[str]

    def counted(self, values: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
        """(label, …, run) with NaN for runs that do not count."""
        shape = (self.once.shape[0], *[1] * (values.ndim - 2), self.once.shape[1])
        return np.where(self.once.reshape(shape), values, np.nan)


def design_of(given: dict[str, list[LossResults]], paired: bool | None) -> Design:
    """Return which runs are repeats of each other, and which are pairs.

    Raises:
        InputError: for `paired` where labels have different numbers of runs.
    """
    first = next(iter(given))
    sizes = [len(several) for several in given.values()]
    if paired and len(set(sizes)) > 1:
        counts = ", ".join(f"{size} under {label!r}" for label, size in zip(given, sizes, strict=True))
        raise InputError(f"runs in pairs have to be as many under every label, got {counts}.")
    marks = {label: [_marks(results) for results in several] for label, several in given.items()}
    notes, pairs = list[str](), list[list[int] | str | None]()
    once = np.zeros((len(given), max(sizes)), dtype=bool)
    for row, (label, several) in enumerate(marks.items()):
        for at, (_, moved) in enumerate(several):
            same = next((before for before in range(at) if moved & several[before][1]), None)
            once[row, at] = same is None
            if same is not None:
                notes.append(
                    f"{given[label][at].path} and {given[label][same].path} are of one training ({_shared(moved, several[same][1])}): "
                    f"under {label!r} it counts once, by the latter."
                )
    counting = {label: np.flatnonzero(once[row]).tolist() for row, label in enumerate(given)}
    for label, several in marks.items():
        order = _partners(marks[first], counting[first], several, counting[label]) if paired is None else None
        same = any(moved & other for _, moved in several for _, other in marks[first])
        if label == first:
            pairs.append("apart")
        elif paired:
            pairs.append(list(range(len(several))))
        elif order is not None and len(counting[label]) > 1:
            pairs.append(order)
            notes.append(
                f"The runs of {label!r} and {first!r} come in pairs that begin from the same checkpoint; differences are tested in pairs."
            )
        else:
            pairs.append(None if same else "apart")
        if label != first and same:
            untested = max(sizes) > 1 and pairs[-1] is None
            notes.append(
                f"{label!r} and {first!r} share trainings: what differs between them is how these were measured, not chance."
                + (" They are not tested against each other, as they are not independent." if untested else "")
            )
    return Design(once, pairs, notes)


def _marks(results: LossResults) -> tuple[_Key, frozenset[_Key]]:
    """A run's first checkpoint, and those that training has moved to: the ones that only runs of this training have."""
    keys = [(each.step, each.size, each.fingerprint) for each in results.manifest.checkpoints]
    motion = results.tensors["motion"]
    there = motion["step"].values[motion.sum("tensor").values > 0]
    start = min(there.tolist(), default=None)
    return keys[0], frozenset(key for key in keys if start is not None and key[0] > start and key != keys[0])


def _shared(one: frozenset[_Key], other: frozenset[_Key]) -> str:
    shared, most = len(one & other), max(len(one), len(other))
    return "the same checkpoints" if shared == most else f"{shared:,} of {most:,} checkpoints are the same"


def _partners(
    first: list[tuple[_Key, frozenset[_Key]]],
    counting_first: list[int],
    other: list[tuple[_Key, frozenset[_Key]]],
    counting: list[int],
) -> list[int] | None:
    """For each run of `other` the run of `first` that begins from the same checkpoint; None unless each has exactly one."""
    begins = [first[at][0] for at in counting_first]
    mine = [other[at][0] for at in counting]
    if Counter(begins) != Counter(mine) or len(set(begins)) < len(begins):
        return None
    order = [0] * len(other)  # runs that do not count are never asked for
    for at in counting:
        order[at] = counting_first[begins.index(other[at][0])]
    return order


def differences(given: dict[str, list[LossResults]]) -> list[str]:
    """A sentence for each thing that changes what the numbers mean and is not the same in every run."""
    said = [text for name, value in _MEANINGS.items() if (text := _difference(name, given, value))]
    return said + _other_losses(given)


def _steps(results: LossResults) -> str:
    checkpoints = results.manifest.checkpoints
    return f"{checkpoints[0].step:,} to {checkpoints[-1].step:,} ({results.manifest.segments:,} segments)"


_MEANINGS: dict[str, Callable[[LossResults], str]] = {
    "normalisation (--norm-stats)": lambda results: str(results.manifest.settings["norm_stats"]),
    "batches of normalisation": lambda results: (
        f"{results.record.batch_size:,}" if results.manifest.settings["norm_stats"] == "batch" else ""
    ),
    "loss": lambda results: results.name,
    "split": lambda results: results.record.on or "none",
    "examples": lambda results: f"{results.record.examples:,} of {results.record.total:,}",
    "precision": lambda results: results.precision,
    "rule": lambda results: str(results.manifest.settings["rule"]),
    "steps": _steps,
}


def _difference(name: str, given: dict[str, list[LossResults]], value: Callable[[LossResults], str]) -> str:
    """Which labels have which value; "" where there is one."""
    of_labels = {label: list(dict.fromkeys(filter(None, map(value, several)))) for label, several in given.items()}
    if len({each for values in of_labels.values() for each in values}) < 2:
        return ""
    by_values: dict[str, list[str]] = {}
    for label, values in of_labels.items():
        if values:
            by_values.setdefault(" and ".join(values), []).append(label)
    return f"Runs differ in {name}: {'; '.join(f'{values} under {_names(labels)}' for values, labels in by_values.items())}."


def _names(labels: list[str]) -> str:
    return ", ".join(labels[:4]) + (f" and {len(labels) - 4} more" if len(labels) > 4 else "")


def _other_losses(given: dict[str, list[LossResults]]) -> list[str]:
    """A word where a loss of one name has another value on the same weights, sample and settings."""
    known: dict[tuple[Any, ...], tuple[str, float]] = {}
    for label, several in given.items():
        for results in several:
            settings, record = results.manifest.settings, results.record
            begin = results.manifest.checkpoints[0]
            where = (
                *(begin.step, begin.size, begin.fingerprint, results.name, record.on, record.examples, record.total),
                *(settings["norm_stats"], record.batch_size if settings["norm_stats"] == "batch" else None),
            )
            identity = record.identity[0]
            if identity is None:
                continue
            value = float(identity["loss"])
            other, before = known.setdefault(where, (label, value))
            if abs(value - before) > _SAME_LOSS * max(abs(value), abs(before)):
                return [
                    f"Runs differ in the loss itself: at step {begin.step:,}, on the same weights, it is {before:.6g} under {other} and "
                    f"{value:.6g} under {label}."
                ]
    return []
