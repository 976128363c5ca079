"""Loss and gradient over a whole split at one point: batches, weights, precision, normalisation mode, probes."""

from .batches import Split, automatic_batch_size
from .evaluate import Evaluation, Objective, tensor_table
from .probe import Identity, check_loss, identify

__all__ = [
    "Evaluation",
    "Identity",
    "Objective",
    "Split",
    "automatic_batch_size",
    "check_loss",
    "identify",
    "tensor_table",
]
