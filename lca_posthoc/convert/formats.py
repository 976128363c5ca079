"""The formats, told by what is in the files: those that are opened as a series, and those that are refused with the way out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import InputError
from .hdf5 import is_hdf5, open_hdf5
from .pytorch import SAFETENSORS, WHOLE, is_pytorch, is_safetensors, open_pytorch
from .series import Progress, Series


@dataclass(frozen=True)
class Format:
    """A format: its name, how a path shows that it holds it, what opens it, and which options say more about it."""

    name: str
    recognises: Callable[[Path], bool]
    open: Callable[..., Series]
    options: tuple[str, ...] = ()


def _refuse(what: str) -> Callable[..., Series]:
    def refuse(place: Path, progress: Progress, **asked: Any) -> Series:
        raise InputError(f"{place} holds {what}")

    return refuse


def _sharded(*patterns: str) -> Callable[[Path], bool]:
    """Whether files of these names lie in a directory, or up to two below, with no whole model beside or above them."""

    def recognises(place: Path) -> bool:
        for pattern in patterns:
            for depth in ("", "*/", "*/*/"):
                for mark in place.glob(depth + pattern) if place.is_dir() else ():
                    above = [each for each in mark.parents if each == place or place in each.parents]
                    if not any((each / name).is_file() for each in above for name in (*WHOLE, *SAFETENSORS)):
                        return True
        return False

    return recognises


def _is_read_as_it_is(place: Path) -> bool:
    return place.is_dir() and not is_pytorch(place) and any(map(is_safetensors, place.iterdir()))


FORMATS = (
    Format(
        "DeepSpeed shards",
        _sharded("*mp_rank_*_model_states.pt", "*zero_pp_rank_*_optim_states.pt"),
        _refuse(
            "DeepSpeed's shards, which only DeepSpeed puts together: run the zero_to_fp32.py that lies beside them for every step, into "
            "checkpoint-N directories, and import those."
        ),
    ),
    Format(
        "Megatron shards",
        _sharded("mp_rank_*/model_optim_rng.pt", "mp_rank_*/model_rng.pt", "mp_rank_*/distrib_optim.pt"),
        _refuse(
            "Megatron's shards, which only Megatron puts together: convert every iteration with its tools/checkpoint/convert.py, and "
            "import or read the result."
        ),
    ),
    Format(
        "torch.distributed.checkpoint shards",
        _sharded("*.distcp"),
        _refuse(
            "shards of torch.distributed.checkpoint: put every step together with python -m torch.distributed.checkpoint.format_utils "
            "dcp_to_torch SHARDS step_N.pt, and import those files."
        ),
    ),
    Format(
        "safetensors",
        _is_read_as_it_is,
        _refuse("safetensors files, which need no import: give it to `lca run` as it is."),
    ),
    Format("PyTorch checkpoints (.pt, .pth, .ckpt, .bin)", is_pytorch, open_pytorch, ("key", "pattern")),
    Format("HDF5 with a row for every iterate", is_hdf5, open_hdf5, ("dataset", "task")),
)
