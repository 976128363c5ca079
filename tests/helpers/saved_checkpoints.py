"""Checkpoints as others save them, and what must come of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from lca_posthoc.convert import convert

from .cli import (
    STEPS,
    iterates,
    step_file,
)

State = Mapping[str, torch.Tensor]


def save(path: Path, document: Any, **options: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(document, path, **options)
    return path


def series(place: Path, steps: tuple[int, ...] = STEPS) -> Path:
    """Plain state dicts, one for every step."""
    for step, state in zip(steps, iterates(), strict=False):
        save(place / f"step_{step}.pt", dict(state))
    return place


def equal(directory: Path, wanted: Mapping[int, State]) -> None:
    """Every step is there, as it was, with its dtype, and nothing else."""
    assert sorted(path.name for path in directory.iterdir()) == [
        step_file(directory, step).name for step in wanted
    ]
    for step, state in wanted.items():
        found = load_file(step_file(directory, step))
        assert found.keys() == state.keys()
        for name, tensor in state.items():
            assert (found[name].dtype, found[name].shape) == (tensor.dtype, tensor.shape), name
            assert found[name].numpy().tobytes() == tensor.contiguous().numpy().tobytes(), name


def told(source: Path, directory: Path, **options: Any) -> list[str]:
    """What an import says."""
    heard: list[str] = []
    convert(source, directory, say=heard.append, **options)
    return heard
