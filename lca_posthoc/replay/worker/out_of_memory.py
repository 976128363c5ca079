"""Recover when a worker runs out of memory: halve the batch and recompute the span."""

from __future__ import annotations

import gc
from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, TypeVar

from ...errors import ResourceError

if TYPE_CHECKING:
    from ...numerics.objective import Objective

R = TypeVar("R")


def with_smaller_batches(
    compute: Callable[[], R], objective: Objective, splits: Collection[str], norm_stats: str
) -> R:
    """Return the result of `compute`, halving the batch every time memory runs out.

    Args:
        compute: evaluates losses over the splits with the batch sizes of the objective.
        objective: whose batch sizes are halved.
        splits: those that are evaluated.
        norm_stats: the mode of normalisation layers.

    Raises:
        ResourceError: if the batch is part of the loss and must not be halved.
    """
    import torch

    from ...numerics.objective import is_out_of_memory

    while True:
        try:
            return compute()
        except Exception as error:
            largest = max((objective.batch_sizes[split] for split in splits), default=1)
            if not is_out_of_memory(error) or largest == 1:
                raise
            if norm_stats == "batch":
                raise ResourceError(
                    f"out of memory with batches of {largest} ({str(error)[:200]}). With "
                    "--norm-stats batch the batch is part of the loss and is not halved: use a "
                    "device with more memory, or another run with a smaller --batch-size."
                ) from error
            for split in splits:
                objective.batch_sizes[split] = min(objective.batch_sizes[split], largest // 2)
        gc.collect()  # the tensors of the failed pass, which its traceback held
        if objective.device.type == "cuda":
            torch.cuda.empty_cache()
