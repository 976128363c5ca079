"""Groups of the elements of a loss: a label for every target token, pixel or label of every
example.

An example holds elements of several groups, so that batches are in the order of the data, and the
values of each are divided element by element.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ...errors import InputError

_NARROW = 2**15  # groups whose positions int16 holds
_KINDS = {"b": "int", "i": "int", "u": "int", "U": "str"}


@dataclass(frozen=True, eq=False)
class ElementOrder:
    """The elements of the examples of a split by group.

    Attributes:
        labels: ascending.
        codes: the position of its group for each element, (examples, draws, *elements of an
            example): two bytes an element, four where there are more than 32,768 groups.
    """

    labels: list[int] | list[str]
    codes: Tensor

    @property
    def counts(self) -> list[int]:
        """Return the number of examples that hold an element of each group."""
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
        """Return the mean number of groups of which a batch holds elements."""
        present = [len(torch.unique(codes)) for codes in self.batches(batch_size)]
        return sum(present) / len(present)


def element_codes(codes: Tensor, values: Tensor) -> Tensor:
    """Return the codes of a batch in the shape of the loss's values for it, on their device.

    Args:
        codes: (examples, *elements of an example).
        values: of the same shape; or flat, the elements of each example in turn.

    Raises:
        InputError: where the values have another shape.
    """
    if values.shape != codes.shape and values.shape != (codes.numel(),):
        raise InputError(
            f"group_by gives labels of shape {list(codes.shape)} for a batch of which the loss "
            f"gives values of shape {list(values.shape)}. Give one label for every value, in the "
            "loss's own shape (or values in one row, example by example); or one for every "
            "example."
        )
    return codes.reshape(values.shape).to(values.device)


def is_of_elements(labels: object) -> bool:
    """Tell whether labels are a tensor or an array with an axis beside that of the examples."""
    return len(getattr(labels, "shape", ())) > 1


def no_labels(name: str, what: str) -> InputError:
    """Return the error for a `group_by` that gave no labels.

    Args:
        name: of the split.
        what: it gave.
    """
    return InputError(
        f"group_by on split {name!r} gave {what}. Give one integer or string for every example: a "
        "1-d tensor, array or list of the whole split, or a function of a batch that returns one "
        "for the batch. Or give one for every element of the loss, as a tensor or array of the "
        "shape of its values."
    )


def element_labels(name: str, answer: Any, count: int) -> np.ndarray:
    """Return labels of elements as an array of integers, bools or strings, (count, *elements).

    Args:
        name: of the split.
        answer: a tensor or array.
        count: the examples of which there are labels.

    Raises:
        InputError: where they are of another type, or of more or fewer examples.
    """
    if isinstance(answer, Tensor) and (answer.is_floating_point() or answer.is_complex()):
        raise no_labels(name, f"labels of type {answer.dtype}".replace("torch.", ""))
    labels = answer.cpu().numpy() if isinstance(answer, Tensor) else np.asarray(answer)
    if labels.dtype.kind not in _KINDS:
        raise no_labels(name, f"labels of type {labels.dtype}")
    if len(labels) != count or not labels.size:
        raise no_labels(name, f"labels of shape {list(labels.shape)} for {count} examples")
    return labels


def element_order(name: str, parts: Iterable[np.ndarray]) -> ElementOrder:
    """Return the elements of a split by group.

    Args:
        name: of the split.
        parts: labels of its examples in their order, (examples, draws, *elements of an example).

    Raises:
        InputError: where examples have different numbers of elements, or labels of different types.
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
            raise no_labels(name, f"labels of type {' and '.join(sorted(kinds))}")
        labels, inverse = np.unique(part, return_inverse=True)
        own = [positions.setdefault(label, len(positions)) for label in labels.tolist()]
        coded.append(np.array(own, dtype=np.int32)[inverse.reshape(part.shape)])
    ascending = sorted(positions)
    ranks = np.empty(len(ascending), dtype=np.int16 if len(ascending) <= _NARROW else np.int32)
    ranks[[positions[label] for label in ascending]] = np.arange(len(ascending))
    codes = torch.cat([torch.from_numpy(ranks[part]) for part in coded])
    if kinds == {"int"}:
        ascending = [int(label) for label in ascending]  # of bools as well
    return ElementOrder(ascending, codes)
