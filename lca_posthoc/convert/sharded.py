"""Recognise directories that hold one checkpoint in shards, and read them as one nested state."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from . import deepspeed, distributed
from .named_states import numbered

SHARD = ".distcp"  # suffix of files of concatenated items that torch.save wrote
_WITHIN = ("pytorch_model_fsdp_0", "checkpoint")  # accelerate's; Lightning's with DeepSpeed


def is_sharded(folder: Path) -> bool:
    """Return whether a directory itself is one checkpoint in shards."""
    return distributed.is_distributed(folder) or deepspeed.is_deepspeed(folder)


def shard_folder(path: Path) -> Path | None:
    """Return the directory of shards that an entry of a series is or contains, or None."""
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
    """Read a directory of shards as nested dictionaries; states of optimisers number their tensors.

    Args:
        folder: directory of one checkpoint.
        look: whether tensors need no values, and placeholders for optimiser states are enough.

    Returns:
        The entries, and notes on what was skipped.

    Raises:
        InputError: if the checkpoint is damaged, or holds more than tensors and plain data.
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
    """Return whether an entry is an optimiser's state, nested or flat."""
    keys = [str(key) for key in entry]
    return "param_groups" in keys or (
        bool(keys) and all(key.startswith(("state.", "param_groups.")) for key in keys)
    )
