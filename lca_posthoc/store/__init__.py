"""The run directory: the only package that knows it. Create, write a span, commit, verify, open as labelled arrays."""

from .lock import hold
from .manifest import LossRecord, Manifest, StoredTensor, read_manifest
from .results import LossResults, Run, open_run
from .writer import RunWriter, create, remove_loss, required_bytes

__all__ = [
    "LossRecord",
    "LossResults",
    "Manifest",
    "Run",
    "RunWriter",
    "StoredTensor",
    "create",
    "hold",
    "open_run",
    "read_manifest",
    "remove_loss",
    "required_bytes",
]
