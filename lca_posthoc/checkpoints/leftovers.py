"""Recognise buffers that older library releases saved and today's model classes compute: rotary
frequencies, causal masks, counts.

Names and headers only select candidates. The numbers decide, because a weight that merely looks
like such a buffer must not be left out.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..errors import few
from .headers import FLOATING, TensorHeader

if TYPE_CHECKING:
    from torch import Tensor

_WHOLE = frozenset({"I64", "I32", "I16", "I8", "U64", "U32", "U16", "U8"})
_ROTARY, _MASK, _MASKED = "rotary frequencies", "a causal mask", "the value of masked scores"
_POSITIONS, _TYPES = "positions", "token types"
_HOLD = {
    _ROTARY: "positive, each at most the one before it",
    _MASK: "a triangle or a band of one value, another elsewhere",
    _MASKED: "one number far below 0",
    _POSITIONS: "0, 1, 2, …",
    _TYPES: "0 everywhere",
}
_FAR_BELOW = -1e3
_COUNTS = frozenset({"num_batches_tracked", "n_averaged", "initted"})


@dataclass(frozen=True)
class _Kind:
    """Describe a kind of leftover: its name for messages, how tensor names end, its dtypes, and
    whether it is a single number.
    """

    what: str
    names: re.Pattern[str]
    dtypes: frozenset[str]
    scalar: bool = False


_ANY = FLOATING | _WHOLE | {"BOOL"}
_KINDS = (
    _Kind(_ROTARY, re.compile(r"(^|\.)inv_freq$"), FLOATING),
    _Kind(_MASK, re.compile(r"(^|\.)\w*(attn|attention)\.(bias|mask|causal_mask)$"), _ANY),
    _Kind(_MASKED, re.compile(r"(^|\.)masked_bias$"), FLOATING, scalar=True),
    _Kind(_POSITIONS, re.compile(r"(^|\.)position_ids$"), _WHOLE),
    _Kind(_TYPES, re.compile(r"(^|\.)token_type_ids$"), _WHOLE),
    _Kind("a count of batches", re.compile(r"\.num_batches_tracked$"), _WHOLE, scalar=True),
    _Kind(
        "a count of averaged weights",
        re.compile(r"^(n_averaged|initted)$"),
        _WHOLE | {"BOOL"},
        scalar=True,
    ),
    _Kind(
        "what a profiler counted", re.compile(r"(^|\.)total_(ops|params)$"), FLOATING, scalar=True
    ),
)


def _kind(name: str) -> _Kind | None:
    return next((kind for kind in _KINDS if kind.names.search(name)), None)


def is_known(name: str, header: TensorHeader, used: Collection[str]) -> bool:
    """Return whether a tensor could be such a buffer, judging by its name and header.

    Args:
        name: name of the tensor.
        header: type and shape of the tensor in the file.
        used: names of the tensors that the model takes from the files. A count of batches is known
            only if its statistics are among them: otherwise the model has no such layer.
    """
    kind = _kind(name)
    if kind is None or header.dtype not in kind.dtypes:
        return False
    *others, last = header.shape or (1,)
    if kind.scalar and (last != 1 or any(extent != 1 for extent in others)):
        return False
    if kind.what == _MASK:  # unlike a layer's bias, which is a vector
        return (
            len(header.shape) in (2, 4)
            and header.shape[-1] == header.shape[-2]
            and set(header.shape[:-2]) <= {1}
        )
    if name.endswith(".num_batches_tracked"):
        return f"{name.rpartition('.')[0]}.running_mean" in used
    return len(header.shape) < 2 or set(others) <= {1}


def counts(name: str) -> bool:
    """Return whether a known leftover is a counter, which changes in training without affecting any
    loss.
    """
    return name.rpartition(".")[2] in _COUNTS


def refuted(name: str, tensor: Tensor, unstored: Mapping[str, Tensor]) -> str:
    """Return why a tensor is not a leftover after all, as the end of a sentence; "" if it may be
    left out.

    Args:
        name: name of the tensor.
        tensor: the tensor of that name in a checkpoint.
        unstored: buffers that the task's model builds and does not save, by name. If it builds some
            under the same last name, rotary frequencies and tensors of no known kind must equal one
            of them; masks must equal one of the same shape.
    """
    kind = _kind(name)
    if kind is not None and kind.scalar:
        return "" if _is_plausible(kind, tensor) else _unlike(kind)
    same_end = [
        own
        for other, own in unstored.items()
        if other.rpartition(".")[2] == name.rpartition(".")[2]
    ]
    if kind is not None and kind.what != _ROTARY:
        same_end = [own for own in same_end if own.shape == tensor.shape]
    if same_end and not any(_same_values(tensor, own.cpu()) for own in same_end):
        return "and is not what the model itself computes under that name"
    if not same_end and (kind is None or not _is_plausible(kind, tensor)):
        return _unlike(kind) if kind else "and the model does not compute it"
    return ""


def _unlike(kind: _Kind) -> str:
    return f"and its numbers are not those of {kind.what} ({_HOLD[kind.what]})"


def left_out_note(names: Collection[str], fixed: Collection[str]) -> str:
    """Return the note on tensors that are left out.

    Args:
        names: names of the leftovers.
        fixed: names that `Task.fixed` lists.
    """
    kinds: dict[str, dict[str, None]] = {}
    for name in [*names, *fixed]:
        kind = _kind(name)
        what = (
            "named in Task.fixed"
            if name in fixed
            else kind.what
            if kind
            else "computed by the model"
        )
        kinds.setdefault(what, {})[re.sub(r"(?<=\.)\d+(?=\.)", "*", name)] = None
    shown = "; ".join(f"{few([*map(repr, group)], 6)} ({what})" for what, group in kinds.items())
    return (
        f"left out tensors that only the checkpoints hold: {shown}. The task's model does not save "
        "them, and none is a weight"
    )


def _is_plausible(kind: _Kind, tensor: Tensor) -> bool:
    """Return whether the numbers of a tensor fit its kind and are not weights.

    Rotary frequencies are positive and descend. A causal mask is a lower triangle (or a band below
    the diagonal, for local attention) or the triangle above it. Positions are 0, 1, 2, …, token
    types are 0, and the value of masked scores is far below 0.
    """
    import torch

    flat = tensor.reshape(-1)
    if kind.what == _ROTARY:
        wide = flat.double()
        return bool((wide > 0).all() and (wide.diff() <= 0).all())
    if kind.what == _MASK:
        square = tensor.reshape(tensor.shape[-2:])
        values = square.double()
        if not bool(((values == 0) | (values == 1) | (values <= _FAR_BELOW)).all()):
            return False
        marked = square.bool()
        width, ones = int(marked[-1].sum()), torch.ones_like(marked)
        return torch.equal(marked, ones.tril() & ones.triu(1 - width)) or torch.equal(
            marked, ones.triu(1)
        )
    if kind.what == _POSITIONS:
        return torch.equal(flat, torch.arange(len(flat), dtype=flat.dtype))
    if kind.what == _TYPES:
        return not bool(flat.any())
    return kind.what != _MASKED or bool((flat.double() <= _FAR_BELOW).all())


def _same_values(stored: Tensor, own: Tensor) -> bool:
    """Return whether a stored buffer equals the one the model computes, up to rounding."""
    import torch

    if stored.shape != own.shape:
        return False
    if not (stored.is_floating_point() and own.is_floating_point()):
        return torch.equal(stored.to(own.dtype), own)
    coarser = max(torch.finfo(stored.dtype).eps, torch.finfo(own.dtype).eps)
    return torch.allclose(stored.double(), own.double(), rtol=8 * coarser, atol=0, equal_nan=True)
