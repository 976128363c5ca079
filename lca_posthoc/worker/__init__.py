"""What runs on a worker: say whether it can take part, describe a task, probe it, measure it, replay one span.

Each takes a JSON-like spec and returns one.
"""

from .admission import admit, versions
from .checks import describe, probe, sampled
from .costs import compressions, measure
from .spans import SAMPLED, looks_back, losses_at, replay_span, settled

__all__ = [
    "SAMPLED",
    "admit",
    "compressions",
    "describe",
    "looks_back",
    "losses_at",
    "measure",
    "probe",
    "replay_span",
    "sampled",
    "settled",
    "versions",
]
