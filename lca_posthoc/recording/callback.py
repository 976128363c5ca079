"""The part that the callbacks of all trainers share: a recorder that lives as long as a
training.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from .recorder import Recorder


class Recording:
    """Hold a recorder from the beginning of a training to its end.

    Args:
        directory: as `Recorder`'s.
        frozen: True to write parameters that are frozen when training begins too; False for trained
            ones and buffers alone.
        options: `every`, `steps`, `until`, `on_full` of `Recorder`.
    """

    def __init__(self, directory: str | Path, *, frozen: bool = False, **options: Any) -> None:
        super().__init__()
        self._directory, self._options = directory, {"frozen": frozen, **options}
        self._recorder: Recorder | None = None

    def begin(self, model: nn.Module, step: int, last: int) -> None:
        """Save the weights that training begins with, where there is space for all up to the step
        `last` (0 or less: unknown).
        """
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
        """Flush the iterates before a checkpoint that training may be resumed from."""
        if self._recorder is not None:
            self._recorder.flush()

    def end(self) -> None:
        """Close the recorder, which finishes the files."""
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            recorder.close()
