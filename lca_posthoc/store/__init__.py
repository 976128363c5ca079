"""The run directory: the only package that knows it. Create, write a span, commit, verify, open as labelled arrays."""

from .lock import Held, hold
from .manifest import LossRecord, Manifest, StoredTensor
from .results import LossResults, Run, open_run
from .runfile import read_manifest
from .seams import differ, disagreement, meeting
from .token import token
from .verify import Damage, Leftover, verify
from .writer import RunWriter, compressed_share, create, estimated_bytes, remove_loss, required_bytes

__all__ = [
    "Damage",
    "Held",
    "Leftover",
    "LossRecord",
    "LossResults",
    "Manifest",
    "Run",
    "RunWriter",
    "StoredTensor",
    "compressed_share",
    "create",
    "differ",
    "disagreement",
    "estimated_bytes",
    "hold",
    "meeting",
    "open_run",
    "read_manifest",
    "remove_loss",
    "required_bytes",
    "token",
    "verify",
]
