"""Read a directory that DeepSpeed wrote: join float32 weights and moments from the partitions of
all ranks.

DeepSpeed's own zero_to_fp32.py joins weights the same way. ZeRO keeps the parameters of a group
flat and concatenated, in float32. At stages 1 and 2, each rank holds a consecutive part of the
concatenation. At stage 3, every parameter is cut into as many parts as there are ranks, the last
one padded, and a rank concatenates its parts. Without ZeRO, the weights are those of the model. No
pickle is executed.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError
from .standins import unpickled

_MODEL = re.compile(r"(?:zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<part>\d+)_model_states\.pt")
_OPTIMIZER = re.compile(
    r"(?:bf16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<part>\d+)_optim_states\.pt"
)
_AGAIN = "Copy the checkpoint again, or move it away."

Shapes = list[dict[str, tuple[int, ...]]]


def is_deepspeed(folder: Path) -> bool:
    """Return whether a directory is one checkpoint of DeepSpeed."""
    return folder.is_dir() and any(_MODEL.fullmatch(path.name) for path in folder.iterdir())


def files_of(folder: Path) -> list[Path]:
    """Return the files of a checkpoint, in order of rank."""
    model, optimizer = _of_ranks(folder, _MODEL), _of_ranks(folder, _OPTIMIZER)
    return [*model, *optimizer]


def read_deepspeed(folder: Path, look: bool) -> tuple[dict[str, object], list[str]]:
    """Read the model's state dict, the step and the optimiser's state.

    Args:
        folder: directory of one checkpoint.
        look: whether a placeholder for the optimiser's state is enough.

    Returns:
        The entries, and notes on what was skipped.

    Raises:
        InputError: if the checkpoint is damaged, lacks ranks, or has layers split between or within
            ranks, which only DeepSpeed can join.
    """
    read = [unpickled(file) for file in _of_ranks(folder, _MODEL)]
    models, notes = [model for model, _ in read], [note for _, more in read for note in more]
    ranks = [_zero(file) for file in _of_ranks(folder, _OPTIMIZER)]
    first = _mapping(models[0], folder)
    saved: dict[str, object] = {"global_step": first.get("global_steps")}
    if not ranks:
        return {**saved, **_without_zero(first, folder)}, [*dict.fromkeys(notes)]
    partitions = _Partitions.of(folder, first, ranks)
    weights = {**partitions.weights(), **_not_trained(folder, models)}
    saved["module"] = {**weights, **_shared(weights, first)}
    if not partitions.has_moments():
        notes.append(
            "left out the optimiser's states: DeepSpeed saved them elastically, or on another "
            "device. The import has weights, but not what moved them"
        )
    elif look:
        saved["optimizer"] = {"state": {}, "param_groups": []}
    else:
        saved["optimizer"] = partitions.optimizer()
    return saved, [*dict.fromkeys(notes)]


def _of_ranks(folder: Path, names: re.Pattern[str]) -> list[Path]:
    """Return the files of one kind for ranks 0, 1, 2, … in this order.

    Raises:
        InputError: if a rank is missing, or layers are split between ranks.
    """
    files: dict[int, Path] = {}
    for path in sorted(folder.iterdir()):
        match = names.fullmatch(path.name)
        if match and int(match["part"]):
            raise InputError(
                f"{folder} has layers split between ranks ({path.name}), which only DeepSpeed or "
                "Megatron can join. Merge every step with its tools, and import the result."
            )
        if match:
            files[int(match["rank"] or 0)] = path
    missing = [rank for rank in range(len(files)) if rank not in files]
    if missing:
        raise InputError(f"{folder} lacks the file of rank {missing[0]}. {_AGAIN}")
    return [files[rank] for rank in sorted(files)]


def _mapping(value: object, folder: Path) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise InputError(
            f"{folder} holds a {type(value).__name__} where DeepSpeed has a dictionary."
        )
    return value


def _zero(file: Path) -> Mapping[str, Any]:
    """Return the optimiser's entry of a rank's file."""
    saved, _ = unpickled(file)
    return _mapping(_mapping(saved, file).get("optimizer_state_dict"), file)


def _without_zero(first: Mapping[str, Any], folder: Path) -> dict[str, object]:
    """Return the state dict and the optimiser's state of a checkpoint without ZeRO.

    Raises:
        InputError: if there is no state dict.
    """
    module = first.get("module")
    if not isinstance(module, Mapping):
        raise InputError(
            f"{folder} holds no state dict: a pipeline's layers lie in separate files, which only "
            "DeepSpeed can join."
        )
    optimizer = first.get("optimizer")
    return {"module": module, **({"optimizer": optimizer} if optimizer is not None else {})}


@dataclass(frozen=True)
class _Partitions:
    """Hold the partitions of all ranks.

    Attributes:
        shapes: shapes of the parameters of every flat group, in order.
        flat: each rank's part of every group.
        states: each rank's state of the optimiser; its tensors are numbered like the groups.
        is_stage_3: whether groups are cut as at stage 3.
    """

    shapes: Shapes
    flat: list[list[Tensor]]
    states: list[Mapping[str, Any]]
    is_stage_3: bool

    @classmethod
    def of(
        cls, folder: Path, first: Mapping[str, Any], ranks: Sequence[Mapping[str, Any]]
    ) -> _Partitions:
        """Check and collect the partitions of a directory.

        Args:
            folder: directory of one checkpoint.
            first: contents of the first rank's model file.
            ranks: contents of each rank's optimiser file.

        Raises:
            InputError: if they are incomplete or inconsistent.
        """
        is_stage_3 = "fp32_flat_groups" in ranks[0]
        key = "fp32_flat_groups" if is_stage_3 else "single_partition_of_fp32_groups"
        shapes = first.get("param_shapes")
        if isinstance(shapes, Mapping):  # older releases had one group
            shapes = [shapes]
        if not isinstance(shapes, list) or not all(isinstance(group, Mapping) for group in shapes):
            raise InputError(
                f"{folder} does not state the shapes of its parameters (param_shapes); releases "
                "before 0.4 did not. Run the zero_to_fp32.py beside it, and import the result."
            )
        flat: list[Any] = [rank.get(key) for rank in ranks]
        for number, groups in enumerate(flat):
            if not isinstance(groups, list) or not all(isinstance(part, Tensor) for part in groups):
                raise InputError(
                    f"{folder}: rank {number} has no float32 weights ({key}); they may be kept "
                    f"on another device. {_AGAIN}"
                )
            if len(groups) != len(shapes):
                raise InputError(
                    f"{folder}: rank {number} has {len(groups)} groups of parameters, and the "
                    f"model {len(shapes)}. {_AGAIN}"
                )
        counts = {_partitions_of(rank) for rank in ranks} - {None}
        if counts and counts != {len(ranks)}:
            raise InputError(
                f"{folder} was saved by {max(filter(None, counts))} ranks, and has files of "
                f"{len(ranks)}. {_AGAIN}"
            )
        states = [
            state
            for rank in ranks
            if isinstance(
                state := rank.get("optimizer_state_dict", rank.get("base_optimizer_state")), Mapping
            )
        ]
        tables = [{name: tuple(shape) for name, shape in group.items()} for group in shapes]
        return cls(tables, flat, states, is_stage_3)

    def weights(self) -> dict[str, Tensor]:
        """Return the trained parameters in float32."""
        return self._joined(self.flat)

    def has_moments(self) -> bool:
        """Return whether every rank has the moments of its parameters."""
        return len(self.states) == len(self.flat) and all(
            isinstance(state.get("state"), Mapping) for state in self.states
        )

    def optimizer(self) -> dict[str, object]:
        """Return the optimiser's state in torch's form, with a number for every parameter."""
        names = [name for group in self.shapes for name in group]
        numbers = {name: number for number, name in enumerate(names)}
        state: dict[int, dict[str, object]] = {number: {} for number in numbers.values()}
        slots = [
            [rank["state"].get(group) or {} for group in range(len(self.shapes))]
            for rank in self.states
        ]
        size = self.flat[0][0].numel()
        for slot, value in slots[0][0].items():
            if isinstance(value, Tensor) and value.numel() == size > 1:
                parts = [[entry.get(slot) for entry in rank] for rank in slots]
                for name, tensor in self._joined(_tensors(parts)).items():
                    state[numbers[name]][slot] = tensor
        for entry, table in zip(slots[0], self.shapes, strict=True):
            for name in table if entry else ():
                state[numbers[name]]["step"] = entry.get("step")
        return {"state": state, "param_groups": self._groups(numbers)}

    def _groups(self, numbers: Mapping[str, int]) -> list[dict[str, object]]:
        """Return the parameter groups with their settings; stage 3 splits a group into several flat
        ones.
        """
        groups = []
        for settings in self.states[0].get("param_groups", []):
            names = [name for flat in settings["params"] for name in self.shapes[flat]]
            plain = {**settings, "params": [numbers[name] for name in names], "param_names": names}
            # DeepSpeed's own Adam has no AMSGrad and counts steps per group
            if plain.pop("bias_correction", True) is True and "betas" in plain:
                plain.setdefault("amsgrad", False)
            groups.append(plain)
        return groups

    def _joined(self, parts: Sequence[Sequence[Tensor]]) -> dict[str, Tensor]:
        """Join parameters from their flat parts, indexed (rank, group)."""
        joined: dict[str, Tensor] = {}
        for group, shapes in enumerate(self.shapes):
            flat = [rank[group].flatten() for rank in parts]
            pieces = self._pieces_3(flat, shapes) if self.is_stage_3 else self._pieces(flat, shapes)
            joined |= pieces
        return joined

    def _pieces(
        self, flat: Sequence[Tensor], shapes: Mapping[str, tuple[int, ...]]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the parameters of a group whose parts are consecutive."""
        whole, start = torch.cat([*flat]), 0
        _refuse_short(len(whole), sum(map(prod, shapes.values())))
        for name, shape in shapes.items():
            yield name, whole[start : start + prod(shape)].view(shape)
            start += prod(shape)

    def _pieces_3(
        self, flat: Sequence[Tensor], shapes: Mapping[str, tuple[int, ...]]
    ) -> Iterator[tuple[str, Tensor]]:
        """Yield the parameters of a group in which every rank holds a part of each parameter."""
        shares = {name: -(-prod(shape) // len(flat)) for name, shape in shapes.items()}
        _refuse_short(min(map(len, flat)), sum(shares.values()))
        start = 0
        for name, shape in shapes.items():
            stop = start + shares[name]
            yield name, torch.cat([part[start:stop] for part in flat])[: prod(shape)].view(shape)
            start = stop


def _tensors(parts: Sequence[Sequence[object]]) -> list[list[Tensor]]:
    """Return the tensors of all ranks and groups.

    Raises:
        InputError: if one is missing.
    """
    if not all(isinstance(part, Tensor) for rank in parts for part in rank):
        raise InputError("some ranks have no moments: the checkpoint is incomplete")
    return [[part for part in rank if isinstance(part, Tensor)] for rank in parts]


def _refuse_short(numbers: int, needed: int) -> None:
    if numbers < needed:
        raise InputError(
            f"the partitions of a group hold {numbers:,} numbers, and its parameters need "
            f"{needed:,}: the checkpoint is incomplete"
        )


def _partitions_of(rank: Mapping[str, Any]) -> int | None:
    """Return the number of ranks that share the parameters, from a rank's file."""
    count = rank.get("partition_count")
    if isinstance(count, list):
        count = max(count, default=None)
    return count if type(count) is int else None


def _not_trained(folder: Path, models: Sequence[Any]) -> dict[str, Tensor]:
    """Return buffers and frozen parameters, which no optimiser has.

    Raises:
        InputError: if a part is missing.
    """
    first = _mapping(models[0], folder)
    module = first.get("module")
    module = module if isinstance(module, Mapping) else {}
    buffers = {name: module[name] for name in first.get("buffer_names") or () if name in module}
    for name, shape in (first.get("frozen_param_shapes") or {}).items():
        parts = [
            (_mapping(model, folder).get("frozen_param_fragments") or {}).get(name)
            for model in models
        ]
        present = [part.flatten() for part in parts if isinstance(part, Tensor)]
        if len(present) < len(parts):
            raise InputError(f"{folder} lacks a part of the frozen parameter {name!r}. {_AGAIN}")
        whole = torch.cat(present)
        _refuse_short(len(whole), prod(shape))
        buffers[name] = whole[: prod(shape)].view(tuple(shape))
    return buffers


def _shared(weights: Mapping[str, Tensor], first: Mapping[str, Any]) -> dict[str, Tensor]:
    """Return the other names of parameters that several modules share."""
    shared = first.get("shared_params") or {}
    pairs = shared.items() if isinstance(shared, Mapping) else shared
    return {alias: weights[name] for alias, name in pairs if name in weights}
