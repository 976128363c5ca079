"""Recognise formats by the contents of files: open those that are supported, and reject others with
advice.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from ..checkpoints.layouts import UNREADABLE, Unreadable
from ..errors import InputError
from .hdf5 import is_hdf5, open_hdf5
from .pytorch import is_pytorch, is_safetensors, open_pytorch
from .series import Progress, Series


@dataclass(frozen=True)
class Format:
    """Describe a format.

    Attributes:
        name: name of the format.
        recognises: returns whether a path holds it.
        open: opens a path as a series.
        options: options of `lca import` that the format takes.
    """

    name: str
    recognises: Callable[[Path], bool]
    open: Callable[..., Series]
    options: tuple[str, ...] = ()


def _refuse(what: str) -> Callable[..., Series]:
    def refuse(place: Path, progress: Progress, **options: object) -> Series:
        raise InputError(f"{place} holds {what}")

    return refuse


def _is_read_as_it_is(place: Path) -> bool:
    return place.is_dir() and not is_pytorch(place) and any(map(is_safetensors, place.iterdir()))


def _unreadable(layout: Unreadable) -> Format:
    return Format(layout.name, layout.recognises, _refuse(layout.words))


def _without_contents(layout: Unreadable) -> Format:
    """Return the format that rejects shards whose table of contents is missing."""
    return Format(
        layout.name,
        layout.recognises,
        _refuse(
            f"{layout.name} without the file that says how to join them (.metadata, or "
            "mp_rank_00_model_states.pt). Copy the complete directory of every step."
        ),
    )


FORMATS = (
    *(_unreadable(layout) for layout in UNREADABLE if not layout.is_imported),
    Format(
        "safetensors",
        _is_read_as_it_is,
        _refuse("safetensors files, which need no import: give it to `lca run` as it is."),
    ),
    Format(
        "PyTorch checkpoints (.pt, .pth, .ckpt, .bin, optimizer.pt beside safetensors, shards of "
        "torch.distributed.checkpoint and DeepSpeed)",
        is_pytorch,
        open_pytorch,
        ("key", "pattern"),
    ),
    Format("HDF5 with a row for every iterate", is_hdf5, open_hdf5, ("dataset", "task")),
    *(_without_contents(layout) for layout in UNREADABLE if layout.is_imported),
)
