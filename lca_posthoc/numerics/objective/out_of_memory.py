"""Memory that ran out, told from other errors."""

from __future__ import annotations

import torch


def is_out_of_memory(error: BaseException) -> bool:
    """Tell whether an error says that memory ran out, of a GPU or of the host."""
    if isinstance(error, MemoryError | torch.OutOfMemoryError):
        return True
    # torch has no class for it
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)
