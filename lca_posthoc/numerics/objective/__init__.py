"""Compute loss and gradient over a whole split at one point: batches, weights, precision,
normalisation mode, probes.
"""

from .batches import Split, automatic_batch_size, power_of_two
from .between import Between
from .bundles import Bundle
from .data import replicates_of
from .device_errors import is_out_of_memory, spoils_device, without_cudnn
from .directions import (
    Along,
    Motion,
    NoGradients,
    WholeGradients,
    blocks,
    row_sums_along,
    sums_along,
    units_of,
)
from .distances import Distances, distances
from .draws import Draws
from .element_groups import ElementOrder
from .evaluate import Objective, build_objective
from .example_axis import recalled, recorded
from .in_a_row import InARow, OfTensors, OfUnits, Units
from .mixing import refuse_mixed
from .model import new_model
from .passes import one_batch
from .precision import float32
from .probe import (
    Identity,
    check_loss,
    drop_impossible_replicates,
    hidden_from_autograd,
    identify,
    loss_of_sample,
    weights_of_sample,
)
from .readings import Numbers, Reading, read
from .recalibration import in_both_modes, statistics_of
from .rounding import rounding_errors
from .rows import InRows, Row, Rows, rows_of, rows_of_shapes
from .settings import ObjectiveSettings
from .shown import texts_of
from .sources import free_on
from .sums import Evaluation, PartialSums, joined
from .tensors import tensor_table
from .transfers import Arriving, FromDevice, to_device

__all__ = [
    "Along",
    "Arriving",
    "Between",
    "Bundle",
    "Distances",
    "Draws",
    "ElementOrder",
    "Evaluation",
    "FromDevice",
    "Identity",
    "InARow",
    "InRows",
    "Motion",
    "NoGradients",
    "Numbers",
    "Objective",
    "ObjectiveSettings",
    "OfTensors",
    "OfUnits",
    "PartialSums",
    "Reading",
    "Row",
    "Rows",
    "Split",
    "Units",
    "WholeGradients",
    "automatic_batch_size",
    "blocks",
    "build_objective",
    "check_loss",
    "distances",
    "drop_impossible_replicates",
    "float32",
    "free_on",
    "hidden_from_autograd",
    "identify",
    "in_both_modes",
    "is_out_of_memory",
    "joined",
    "loss_of_sample",
    "new_model",
    "one_batch",
    "power_of_two",
    "read",
    "recalled",
    "recorded",
    "refuse_mixed",
    "replicates_of",
    "rounding_errors",
    "row_sums_along",
    "rows_of",
    "rows_of_shapes",
    "spoils_device",
    "statistics_of",
    "sums_along",
    "tensor_table",
    "texts_of",
    "to_device",
    "units_of",
    "weights_of_sample",
    "without_cudnn",
]
