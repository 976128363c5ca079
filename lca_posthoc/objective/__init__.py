"""Loss and gradient over a whole split at one point: batches, weights, precision, normalisation mode, probes."""

from .batches import Split, automatic_batch_size, power_of_two
from .evaluate import HIGHER, Objective, new_model, replicates_of
from .precision import float32
from .probe import Identity, check_loss, drop_weightless_replicates, hidden_from_autograd, identify
from .sources import is_out_of_memory
from .sums import Evaluation
from .tensors import is_statistic, tensor_table

__all__ = [
    "HIGHER",
    "Evaluation",
    "Identity",
    "Objective",
    "Split",
    "automatic_batch_size",
    "check_loss",
    "drop_weightless_replicates",
    "float32",
    "hidden_from_autograd",
    "identify",
    "is_out_of_memory",
    "is_statistic",
    "new_model",
    "power_of_two",
    "replicates_of",
    "tensor_table",
]
