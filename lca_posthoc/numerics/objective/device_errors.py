"""Distinguish errors of devices from errors of code."""

from __future__ import annotations

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error means that a GPU or the host ran out of memory."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # torch has no exception class for it
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


def spoils_device(error: BaseException | None) -> bool:
    """Return whether an error, or its cause, makes the device unusable for this process: after an
    assertion or an illegal access on a GPU, every later call fails too.
    """
    while error is not None:
        # torch has an exception class for it since 2.8
        if isinstance(error, getattr(torch, "AcceleratorError", ())):
            return True
        if isinstance(error, RuntimeError) and str(error).startswith("CUDA error"):
            return True
        error = error.__cause__
    return False


def without_cudnn(error: BaseException) -> str:
    """Return advice for computing without cuDNN if cuDNN raised the error; "" for other errors."""
    said = str(error)
    if not isinstance(error, RuntimeError) or "cudnn" not in said.lower():
        return ""
    return (
        f"{'' if said.endswith('.') else '.'} To evaluate losses without cuDNN, set "
        "torch.backends.cudnn.enabled = False in the task file, and run again."
    )
