"""The functions that run on workers: check the worker, describe a task, probe it, measure it,
replay one span.

Each takes a request as plain data and returns its answer, or the error it met, as plain data; see
`requests`.
"""

from .checks import calibrations, describe, probe, sampled
from .compatibility import admit, versions
from .costs import compressions, measure
from .shards import committed, replay_in_shards
from .spans import SAMPLED, committed_result, looks_back, losses_at, replay_span, stretch_of

__all__ = [
    "SAMPLED",
    "admit",
    "calibrations",
    "committed",
    "committed_result",
    "compressions",
    "describe",
    "looks_back",
    "losses_at",
    "measure",
    "probe",
    "replay_in_shards",
    "replay_span",
    "sampled",
    "stretch_of",
    "versions",
]
