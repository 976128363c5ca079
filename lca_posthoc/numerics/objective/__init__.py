"""Loss and gradient over a whole split at one point: batches, weights, precision, normalisation
mode, probes.
"""

from .batches import Split, automatic_batch_size, power_of_two
from .data import replicates_of
from .draws import Draws
from .evaluate import Objective, build_objective
from .model import new_model
from .out_of_memory import is_out_of_memory
from .precision import float32
from .probe import (
    Identity,
    check_loss,
    drop_weightless_replicates,
    hidden_from_autograd,
    identify,
    weights_of_sample,
)
from .recalibration import in_both_modes, statistics_of
from .settings import ObjectiveSettings
from .sums import Evaluation, Numbers
from .tensors import tensor_table

__all__ = [
    "Draws",
    "Evaluation",
    "Identity",
    "Numbers",
    "Objective",
    "ObjectiveSettings",
    "Split",
    "automatic_batch_size",
    "build_objective",
    "check_loss",
    "drop_weightless_replicates",
    "float32",
    "hidden_from_autograd",
    "identify",
    "in_both_modes",
    "is_out_of_memory",
    "new_model",
    "power_of_two",
    "replicates_of",
    "statistics_of",
    "tensor_table",
    "weights_of_sample",
]
