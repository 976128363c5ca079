"""Recognise buffers that older releases of libraries saved and today's model classes compute:
rotary frequencies, causal masks, counts.

Their names and headers make them candidates. What they hold decides: a weight that only looks like
one must not be left out.
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
    """A kind of leftover: the word for it, the end of its names, its dtypes, and how many numbers
    its shape may have.
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
    """Tell whether a tensor could be such a buffer, by its name and header.

    Args:
        name: of the tensor.
        header: its type and shape in the file.
        used: the tensors the model takes from the files. A count of batches is known only where the
            statistics it belongs to are among them: else the model has no such layer.
    """
    kind = _kind(name)
    if kind is None or header.dtype not in kind.dtypes:
        return False
    *others, last = header.shape or (1,)
    if kind.scalar and (last != 1 or any(extent != 1 for extent in others)):
        return False
    if kind.what == _MASK:  # a bias of a layer is a vector
        return (
            len(header.shape) in (2, 4)
            and header.shape[-1] == header.shape[-2]
            and set(header.shape[:-2]) <= {1}
        )
    if name.endswith(".num_batches_tracked"):
        return f"{name.rpartition('.')[0]}.running_mean" in used
    return len(header.shape) < 2 or set(others) <= {1}


def counts(name: str) -> bool:
    """Tell whether a known leftover counts, and so changes in training without a part in any
    loss.
    """
    return name.rpartition(".")[2] in _COUNTS


def refuted(name: str, tensor: Tensor, unstored: Mapping[str, Tensor]) -> str:
    """Return why a tensor is no leftover after all, as the end of a sentence; an empty string where
    it may be left out.

    Args:
        name: of the tensor.
        tensor: the one of that name in a checkpoint.
        unstored: the buffers the task's model builds and does not save, by name. Rotary frequencies
            and tensors of no known kind must be among them where there are any of that name; masks
            that are of the same length, too.
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
    """Return the note on tensors that are left out, of which `fixed` were named by `Task.fixed`."""
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
        f"left out what only the checkpoints hold: {shown}. The task's model does not save it, and "
        "no weight is among it"
    )


def _is_plausible(kind: _Kind, tensor: Tensor) -> bool:
    """Tell whether the numbers of a tensor are those of its kind, and no weights.

    Rotary frequencies are positive and descend, a causal mask is a lower triangle (or a band below
    the diagonal, where attention is local) or the triangle above it, positions are 0, 1, 2, …,
    token types 0, and the value of masked scores is far below 0.
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
    """Tell whether a stored buffer is the one the model computes, but for rounding."""
    import torch

    if stored.shape != own.shape:
        return False
    if not (stored.is_floating_point() and own.is_floating_point()):
        return torch.equal(stored.to(own.dtype), own)
    coarser = max(torch.finfo(stored.dtype).eps, torch.finfo(own.dtype).eps)
    return torch.allclose(stored.double(), own.double(), rtol=8 * coarser, atol=0, equal_nan=True)
