"""Errors of devices, told from those of code."""

from __future__ import annotations

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out, of a GPU or of the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # torch has no class for it
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def spoils_device(error: BaseException | None) -> bool:
    """Tell whether an error, or what led to it, leaves its process without a device it can compute
    on: after an assertion or an illegal access on a GPU, every later call fails as well.
    """
    while error is not None:
        # torch has a class for it from 2.8 on
        if isinstance(error, getattr(torch, "AcceleratorError", ())):
            return True
        if isinstance(error, RuntimeError) and str(error).startswith("CUDA error"):
            return True
        error = error.__cause__
    return False


def without_cudnn(error: BaseException) -> str:
    """Return how to compute without cuDNN where an error says that it refuses what it was asked
    for; nothing for other errors.
    """
    said = str(error)
    if not isinstance(error, RuntimeError) or "cudnn" not in said.lower():
        return ""
    return (
        f"{'' if said.endswith('.') else '.'} To evaluate losses without cuDNN, set "
        "torch.backends.cudnn.enabled = False in the task file, and run again."
    )
