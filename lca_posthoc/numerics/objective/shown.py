"""Collect the texts that `Task.show` returns for the examples of a split, for reports and figures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor

from ...errors import InputError
from .batches import Split
from .containers import change_tensors
from .sources import user_code

_MOST_CHARACTERS = 80
_RECORDED = 256_000  # characters of all examples together in the record of a run
_LEAST_CHARACTERS = 4  # shorter texts are useless


def texts_of(split: Split, batch_size: int, show: Callable[..., Any]) -> list[str] | None:
    """Return a text for every example, cut so that all fit into the record of a run; None if there
    are too many examples.

    Args:
        split: the examples.
        batch_size: examples per batch.
        show: returns one text for every example of a batch on the CPU; called as `show(*batch)` if
            the batch is a tuple or list.

    Raises:
        InputError: if it returns something else.
    """
    length = min(_MOST_CHARACTERS, _RECORDED // split.examples)
    if length < _LEAST_CHARACTERS:
        return None
    texts: list[str] = []
    for first, (_, batch) in zip(
        range(0, split.examples, batch_size), split.batches(batch_size), strict=True
    ):
        count = min(batch_size, split.examples - first)
        texts += [text[:length] for text in _answer(split.name, show, batch, count)]
    return texts


def _answer(name: str, show: Callable[..., Any], batch: object, count: int) -> Sequence[str]:
    data = change_tensors(batch, Tensor.cpu)
    with user_code(f"Task.show of split {name!r} failed"):
        answer = show(*data) if isinstance(data, tuple | list) else show(data)
    texts = list(answer) if isinstance(answer, Sequence) and not isinstance(answer, str) else None
    if texts is None or len(texts) != count or not all(isinstance(text, str) for text in texts):
        what = type(answer).__name__ if texts is None else f"{len(texts)} entries"
        if texts and len(texts) == count:
            what += f" ({type(texts[0]).__name__})"
        raise InputError(
            f"Task.show of split {name!r} gave {what} for a batch of {count} examples. Return a "
            "list with one str for every example."
        )
    return texts
