"""Define a data set with random examples: several seeded draws of each, so that a loss is the mean
over them.
"""

from __future__ import annotations

import contextlib
import random
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from ...errors import InputError


class Draws(Dataset[list[Any]]):
    """Draw every example of a data set several times, for data that augments or mixes examples at
    random.

    While one draw of one example is made, the random numbers of torch (on the CPU), numpy and
    `random` come from a seed that depends only on `seed`, the example's position and the draw. The
    draw is therefore the same in every process, batch, order and subset. A loss is the mean over
    all draws of all examples. Counts, subsets and groups refer to the examples of `data`, each with
    all its draws.

    Args:
        data: as for `Task.data`: tensors, a map-style Dataset, or a `DataLoader` for its
            `collate_fn`.
        transform: called as `transform(example)` for each draw, with what `data` returns at a
            position; returns an example. None if `data` augments its examples itself.
        draws: number of draws of each example.
        seed: seed of the draws.

    Raises:
        InputError: if examples cannot be read by position, or a number is out of range.

    >>> data = torch.arange(3.0), torch.arange(3)
    >>> noisy = Draws(data, lambda example: (example[0] + torch.rand(()), example[1]), draws=2)
    >>> len(noisy), len(noisy[1]), noisy[1][0] == noisy[1][0], noisy[1][0] == noisy[1][1]
    (3, 2, True, False)
    """

    def __init__(
        self,
        data: object,
        transform: Callable[[Any], Any] | None = None,
        *,
        draws: int = 4,
        seed: int = 0,
    ) -> None:
        for name, number, least in (("draws", draws, 1), ("seed", seed, 0)):
            if isinstance(number, bool) or not isinstance(number, int) or number < least:
                raise InputError(
                    f"Draws({name}=…) must be an integer of at least {least}, got {number!r}."
                )
        if transform is not None and not callable(transform):
            raise InputError(
                "Draws(transform=…) is called as transform(example) for each draw, got "
                f"{type(transform).__name__}."
            )
        examples: Any = data.dataset if isinstance(data, DataLoader) else data
        self._columns = _columns(examples)
        by_position = hasattr(examples, "__getitem__") and hasattr(examples, "__len__")
        if isinstance(examples, IterableDataset | str) or not by_position:
            raise InputError(
                f"Draws(…) needs examples that can be read by position, got "
                f"{type(examples).__name__}. Give tensors, or a map-style Dataset with __len__ and "
                "__getitem__."
            )
        self.data, self.transform, self.draws, self.seed = data, transform, draws, seed
        self._examples = examples

    def __len__(self) -> int:
        return len(self._columns[0] if self._columns else self._examples)

    def __getitem__(self, index: int) -> list[Any]:
        """Return all draws of one example."""
        examples = []
        for draw in range(self.draws):
            with _seeded(self.seed, int(index), draw):
                example = self._example(index)
                examples.append(example if self.transform is None else self.transform(example))
        return examples

    def _example(self, index: int) -> object:
        if not self._columns:
            return self._examples[index]
        row = [column[index].clone() for column in self._columns]  # a transform may write into it
        return (
            dict(zip(self._examples, row, strict=True))
            if isinstance(self._examples, Mapping)
            else tuple(row)
        )


def _columns(data: object) -> list[Tensor]:
    """Return the tensors of data given as columns; an empty list for a data set.

    Raises:
        InputError: if their lengths differ.
    """
    inside = (
        list(data.values())
        if isinstance(data, Mapping)
        else list(data)
        if isinstance(data, tuple)
        else []
    )
    if not inside or not all(isinstance(column, Tensor) and column.dim() for column in inside):
        return []
    if len({len(column) for column in inside}) > 1:
        raise InputError(
            "Draws(…) was given tensors of different lengths: "
            f"{sorted({len(column) for column in inside})}. Give one entry per example."
        )
    return inside


@contextlib.contextmanager
def _seeded(*numbers: int) -> Iterator[None]:
    """Seed the global generators of torch, numpy and Python, and restore them afterwards."""
    words = np.random.SeedSequence(numbers).generate_state(4)
    before = torch.get_rng_state(), np.random.get_state(), random.getstate()
    torch.default_generator.manual_seed(int(words[0]) << 32 | int(words[1]))
    np.random.seed(words)
    random.seed(words.tobytes())
    try:
        yield
    finally:
        torch.set_rng_state(before[0])
        np.random.set_state(before[1])
        random.setstate(before[2])
