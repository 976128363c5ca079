"""What the callbacks of all trainers are made of: a recorder that is there while training goes on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from .recorder import Recorder


class Recording:
    """Holds a recorder from the beginning of a training to its end.

    Args:
        directory: as `Recorder`'s.
        frozen: whether parameters that are frozen when training begins are written too; otherwise those that are trained, and buffers.
        options: `every`, `steps`, `until`, `on_full` of `Recorder`.
    """

    def __init__(self, directory: str | Path, *, frozen: bool = False, **options: Any) -> None:
        super().__init__()
        self._directory, self._options = directory, {"frozen": frozen, **options}
        self._recorder: Recorder | None = None

    def begin(self, model: nn.Module, step: int, last: int) -> None:
        """Save the weights that training begins with, once there is space for those up to a last step (0: unknown)."""
        self.end()
        self._recorder = Recorder(self._directory, model, **self._options)
        if last > 0:
            self._recorder.require_space(last)
        self._recorder.save(step)

    def take(self, step: int) -> None:
        """Save the weights after an optimiser step."""
        if self._recorder is not None:
            self._recorder.save(step)

    def flush(self) -> None:
        """Have on the disk what a checkpoint to resume from comes after."""
        if self._recorder is not None:
            self._recorder.flush()

    def end(self) -> None:
        """Finish the files."""
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            recorder.close()
