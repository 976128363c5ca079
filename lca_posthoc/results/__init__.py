"""Own the run directory: create it, write and commit spans, verify it, and open it as labelled
arrays.
"""

from .boundary_checks import differ, disagreement, meeting
from .chunk_writer import ChunkWriter
from .commits import Commits, Marker
from .disk import free_space, is_object_store
from .lock import Held, has_kernel_lock, hold, require_lock
from .manifest import Identity, LossRecord, Manifest, StoredTensor
from .run import LossResults, Run, open_run
from .runfile import exists, read_manifest, refuse_other
from .shard_sums import names_of_sums, read_sums, remove_sums, sums_name, write_sums
from .shared_dir_check import check_shared_directory, shared_directory_token
from .starting import Announcement, Starting, announced, starting
from .underway import (
    EVENTS,
    LastRun,
    SpanReport,
    Underway,
    append_events,
    last_events,
    last_run,
    remove_reports,
    underway,
)
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
    "EVENTS",
    "Announcement",
    "ChunkWriter",
    "Commits",
    "Damage",
    "Held",
    "Identity",
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
    "append_events",
    "check_shared_directory",
    "compressed_share",
    "create",
    "differ",
    "disagreement",
    "estimated_bytes",
    "exists",
    "free_space",
    "has_kernel_lock",
    "hold",
    "is_object_store",
    "last_events",
    "last_run",
    "meeting",
    "names_of_sums",
    "open_run",
    "read_manifest",
    "read_sums",
    "refuse_other",
    "remove_loss",
    "remove_reports",
    "remove_sums",
    "require_lock",
    "required_bytes",
    "shared_directory_token",
    "starting",
    "sums_name",
    "underway",
    "verify",
    "write_sums",
]
