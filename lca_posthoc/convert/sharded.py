"""Recognise folders in which one checkpoint lies in shards, and read them as one nested state."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from . import deepspeed, distributed
from .named_states import numbered

SHARD = ".distcp"  # of items that torch.save wrote, one behind the other
_WITHIN = ("pytorch_model_fsdp_0", "checkpoint")  # of accelerate; of Lightning with DeepSpeed


def is_sharded(folder: Path) -> bool:
    """Tell whether a folder itself is one checkpoint in shards."""
    return distributed.is_distributed(folder) or deepspeed.is_deepspeed(folder)


def shard_folder(path: Path) -> Path | None:
    """Return the folder of shards that an entry of a series is or has in it; None where there is
    none.
    """
    inside = [path / name for name in _WITHIN] + sorted(path.glob("global_step*"))
    folders = [folder for folder in inside if is_sharded(folder)]
    if is_sharded(path):
        return path
    return folders[0] if len(folders) == 1 else None


def shard_files(folder: Path) -> list[Path]:
    """Return the files of a checkpoint in shards."""
    if distributed.is_distributed(folder):
        return distributed.files_of(folder)
    return deepspeed.files_of(folder)


def read_shards(folder: Path, look: bool) -> tuple[Mapping[str, object], list[str]]:
    """Return what a folder of shards holds, nested, with states of optimisers that number their
    tensors, and notes on what is read past.

    Args:
        folder: of one checkpoint.
        look: whether tensors need no values, and states of optimisers are only said to be there.

    Raises:
        InputError: where it is damaged, or holds more than tensors and plain data.
    """
    if not distributed.is_distributed(folder):
        return deepspeed.read_deepspeed(folder, look)
    saved, notes = distributed.read_distributed(folder, look)
    states: dict[str, object] = {
        name: {"state": {}, "param_groups": []} if look else numbered(entry)
        for name, entry in saved.items()
        if isinstance(entry, Mapping) and _is_optimizer(entry)
    }
    return {**saved, **states}, notes


def _is_optimizer(entry: Mapping[str, object]) -> bool:
    """Tell whether an entry is an optimiser's state, nested or flat."""
    keys = [str(key) for key in entry]
    return "param_groups" in keys or (
        bool(keys) and all(key.startswith(("state.", "param_groups.")) for key in keys)
    )
