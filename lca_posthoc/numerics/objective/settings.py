"""Define the settings of an objective."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field

import torch

from ...errors import InputError
from .precision import dtype_of


@dataclass(frozen=True, kw_only=True)
class ObjectiveSettings:
    """Hold the device, the precision and the batches of an objective.

    Attributes:
        device: device of the model and the data.
        precision: "float32", "float64", and on devices that support them "tf32" and "bfloat16"
            (autocast), whose tensors and sums are float32.
        norm_stats: "running", "recalibrated" or "batch".
        batch_size: examples per batch; None for a deterministic choice from shapes for each split.
        subset: split → choice of its examples, see `batches.positions_of_subset`; `""` stands for
            every split.
        stored: normalised names of the tensors in the checkpoints; frozen parameters with other
            names keep the values the task's model builds. None if the checkpoints hold every
            tensor.

    Raises:
        InputError: if batch statistics have no batch size.
    """

    device: torch.device
    precision: str
    norm_stats: str
    batch_size: int | None
    subset: Mapping[str, str] = field(default_factory=dict)
    stored: Collection[str] | None = None

    def __post_init__(self) -> None:
        if self.norm_stats == "batch" and self.batch_size is None:
            raise InputError(
                "--norm-stats batch needs --batch-size N: the partition into batches is part of "
                "the loss."
            )

    @property
    def dtype(self) -> torch.dtype:
        """Return the type of floating tensors."""
        return dtype_of(self.precision)
