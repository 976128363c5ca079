"""The part that the callbacks of all trainers share: a recorder that lives as long as a
training.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from .recorder import Recorder


class Recording:
    """Hold a recorder from the beginning of a training to its end.

    Args:
        directory: as `Recorder`'s.
        frozen: True to write parameters that are frozen when training begins too; False for trained
            ones and buffers alone.
        save: as for `Recorder.attach`.
        options: `every`, `steps`, `until`, `on_full` of `Recorder`.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        frozen: bool = False,
        save: Literal["scalars", "moments"] = "scalars",
        **options: Any,
    ) -> None:
        super().__init__()
        self._directory, self._options = directory, {"frozen": frozen, **options}
        self._save = save
        self._recorder: Recorder | None = None

    def begin(
        self, model: nn.Module, step: int, last: int, optimizers: Iterable[Optimizer]
    ) -> None:
        """Save the weights that training begins with, where there is space for all up to the step
        `last` (0 or less: unknown), and follow the optimisers.
        """
        self.end()
        self._recorder = Recorder(self._directory, model, **self._options)
        self._recorder.follow(*optimizers, step=step, save=self._save)
        if last > 0:
            self._recorder.require_space(last)
        self._recorder.save(step)

    def take(self, step: int) -> None:
        """Save the weights after an optimiser step."""
        if self._recorder is not None:
            self._recorder.save(step)

    def note_clipping(self, factor: float | Tensor) -> None:
        """Note the factor that gradients were clipped by before the step that follows; NaN where it
        is not known.
        """
        if self._recorder is not None:
            self._recorder.note_clipping(factor)

    def flush(self) -> None:
        """Flush the iterates before a checkpoint that training may be resumed from."""
        if self._recorder is not None:
            self._recorder.flush()

    def end(self) -> None:
        """Close the recorder, which finishes the files."""
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            recorder.close()
