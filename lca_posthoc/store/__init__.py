"""The run directory, which only this package knows: create it, write and commit spans, verify, open
as labelled arrays.
"""

from .boundary_checks import differ, disagreement, meeting
from .commits import Marker
from .lock import Held, hold
from .manifest import LossRecord, Manifest, StoredTensor
from .results import LossResults, Run, open_run
from .runfile import read_manifest
from .shared_dir_check import token
from .starting import Announcement, Starting, announced, starting
from .underway import LastRun, SpanReport, Underway, last_run, remove_reports, underway
from .verify import Damage, Leftover, verify
from .writer import (
    RunWriter,
    compressed_share,
    create,
    estimated_bytes,
    remove_loss,
    required_bytes,
)

__all__ = [
    "Announcement",
    "Damage",
    "Held",
    "LastRun",
    "Leftover",
    "LossRecord",
    "LossResults",
    "Manifest",
    "Marker",
    "Run",
    "RunWriter",
    "SpanReport",
    "Starting",
    "StoredTensor",
    "Underway",
    "announced",
    "compressed_share",
    "create",
    "differ",
    "disagreement",
    "estimated_bytes",
    "hold",
    "last_run",
    "meeting",
    "open_run",
    "read_manifest",
    "remove_loss",
    "remove_reports",
    "required_bytes",
    "starting",
    "token",
    "underway",
    "verify",
]
