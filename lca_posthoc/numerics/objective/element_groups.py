"""Group the elements of a loss: every target token, pixel or label of every example has a label.

An example has elements of several groups, so batches follow the order of the data, and the values
of each batch are divided element by element.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError

_NARROW = 2**15  # number of groups that int16 can index
_KINDS = {"b": "int", "i": "int", "u": "int", "U": "str"}


@dataclass(frozen=True, eq=False)
class ElementOrder:
    """Assign the elements of a split's examples to groups.

    Attributes:
        labels: labels of the groups, ascending.
        codes: index of its group for each element, (examples, draws, *elements of an example): two
            bytes per element, or four for more than 32,768 groups.
    """

    labels: list[int] | list[str]
    codes: Tensor

    @property
    def counts(self) -> list[int]:
        """Return the number of examples that have an element of each group."""
        counts = torch.zeros(len(self.labels), dtype=torch.int64, device="cpu")
        for codes in self.codes:
            counts[torch.unique(codes).long()] += 1
        return counts.tolist()

    def batches(self, batch_size: int) -> list[Tensor]:
        """Return the codes of each batch in the order of the data, (examples × draws, *elements of
        an example).
        """
        return [codes.flatten(0, 1) for codes in torch.split(self.codes, batch_size)]

    def groups_per_batch(self, batch_size: int) -> float:
        """Return the mean number of groups per batch."""
        present = [len(torch.unique(codes)) for codes in self.batches(batch_size)]
        return sum(present) / len(present)


def element_codes(codes: Tensor, values: Tensor) -> Tensor:
    """Reshape the codes of a batch to the loss's values, on their device.

    Args:
        codes: codes, (examples, *elements of an example).
        values: values of the loss, of the same shape or flat, with the elements of each example in
            turn.

    Raises:
        InputError: if the values have another shape.
    """
    if values.shape != codes.shape and values.shape != (codes.numel(),):
        raise InputError(
            f"group_by gives labels of shape {list(codes.shape)} for a batch whose loss has "
            f"values of shape {list(values.shape)}. Give one label for every value, in the "
            "loss's own shape (or values in one row, example by example); or one for every "
            "example."
        )
    return codes.reshape(values.shape).to(values.device)


def is_of_elements(labels: object) -> bool:
    """Return whether labels are a tensor or an array with an axis besides that of the examples."""
    return len(getattr(labels, "shape", ())) > 1


def no_labels(name: str, what: str) -> str:
    """Return the error message for a `group_by` that returned something other than labels.

    Args:
        name: name of the split.
        what: what it returned.
    """
    return (
        f"group_by on split {name!r} gave {what}. Give one integer or string for every example: a "
        "1-d tensor, array or list of the whole split, or a function of a batch that returns one "
        "for the batch. Or give one for every element of the loss, as a tensor or array of the "
        "shape of its values."
    )


def element_labels(name: str, answer: Any, count: int) -> np.ndarray:
    """Convert labels of elements to an array of integers, bools or strings, (count, *elements).

    Args:
        name: name of the split.
        answer: labels, as a tensor or array.
        count: number of examples.

    Raises:
        InputError: if they have another type, or belong to more or fewer examples.
    """
    if isinstance(answer, Tensor) and (answer.is_floating_point() or answer.is_complex()):
        raise InputError(no_labels(name, f"labels of type {answer.dtype}".replace("torch.", "")))
    labels = answer.cpu().numpy() if isinstance(answer, Tensor) else np.asarray(answer)
    if labels.dtype.kind not in _KINDS:
        raise InputError(no_labels(name, f"labels of type {labels.dtype}"))
    if len(labels) != count or not labels.size:
        raise InputError(
            no_labels(name, f"labels of shape {list(labels.shape)} for {count} examples")
        )
    return labels


def element_order(name: str, parts: Iterable[np.ndarray]) -> ElementOrder:
    """Assign the elements of a split to groups.

    Args:
        name: name of the split.
        parts: labels of its examples in order, (examples, draws, *elements of an example).

    Raises:
        InputError: if examples have different numbers of elements, or labels different types.
    """
    positions: dict[Any, int] = {}
    coded: list[np.ndarray] = []
    kinds: set[str] = set()
    for part in parts:
        if coded and part.shape[1:] != coded[0].shape[1:]:
            raise InputError(
                f"group_by on split {name!r} gave labels of shape {list(part.shape[2:])} for "
                f"elements of some examples and {list(coded[0].shape[2:])} for others. Groups of "
                "elements need examples of one shape: pad them in the data set, not batch by batch."
            )
        kinds.add(_KINDS[part.dtype.kind])
        if len(kinds) > 1:
            raise InputError(no_labels(name, f"labels of type {' and '.join(sorted(kinds))}"))
        labels, inverse = np.unique(part, return_inverse=True)
        own = [positions.setdefault(label, len(positions)) for label in labels.tolist()]
        coded.append(np.array(own, dtype=np.int32)[inverse.reshape(part.shape)])
    ascending = sorted(positions)
    ranks = np.empty(len(ascending), dtype=np.int16 if len(ascending) <= _NARROW else np.int32)
    ranks[[positions[label] for label in ascending]] = np.arange(len(ascending))
    codes = torch.cat([torch.from_numpy(ranks[part]) for part in coded])
    if kinds == {"int"}:
        ascending = [int(label) for label in ascending]  # converts bools too
    return ElementOrder(ascending, codes)
