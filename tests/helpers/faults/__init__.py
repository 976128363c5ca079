"""Faults made for real, counted: `python -m tests.helpers.faults` for the full numbers,
`tests/replay/test_faults.py` for the reduced ones.

A fault is a function of how often, a place to work in and a seed. It raises `AssertionError` where
a single one of its cases changed a number or went unsaid, and returns one line that says what it
counted, or `NOT_DONE` with the reason why the machine cannot have it.
"""

from __future__ import annotations

import importlib
import os
import pkgutil
import random
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from lca_posthoc.numerics.schema import KEEP

Inject = Callable[[int, Path], str]
LETTERS = "abcdef"  # at the ends of rows that are parts of one
NOT_DONE = "not done: "
ONE_LEVEL = "LCA_FAULTS_KEEP"  # names the level of every trial, where all are to have one


@dataclass(frozen=True)
class Fault:
    """One row of the table: its title, how often CI does it and how often the full run does."""

    row: str
    title: str
    ci: int
    full: int
    inject: Inject


_FOUND: dict[str, Fault] = {}


def fault(row: str, title: str, *, ci: int, full: int) -> Callable[[Inject], Inject]:
    """Enter a function `(count, directory) -> what was counted` as the fault of a row."""

    def enter(inject: Inject) -> Inject:
        assert row not in _FOUND, row
        _FOUND[row] = Fault(row, title, ci, full, inject)
        return inject

    return enter


def faults() -> dict[str, Fault]:
    """Every fault by its row, in order."""
    for module in _modules():
        importlib.import_module(module)
    return {
        row: _FOUND[row]
        for row in sorted(_FOUND, key=lambda row: (int(row[1:].rstrip(LETTERS)), row))
    }


def drawn_levels(seed: int) -> Iterator[str]:
    """A level of `--keep` for each trial, drawn from a seed: in each four trials all four, unless
    one is named by the environment.
    """
    chance, level = random.Random(seed), os.environ.get(ONE_LEVEL)
    while True:
        yield from [level] * len(KEEP) if level else chance.sample(KEEP, len(KEEP))


def by_level(trials: Iterable[str]) -> str:
    """How many trials there were at each level, such as "2 at tensors, 1 at units"."""
    counts = Counter(trials)
    return ", ".join(f"{counts[level]} at {level}" for level in KEEP if counts[level])


def _modules() -> Iterator[str]:
    for found in pkgutil.iter_modules(__path__, f"{__name__}."):
        if not found.name.endswith("__main__"):
            yield found.name
