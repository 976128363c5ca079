"""Share among the callbacks of all trainers a recorder that lives as long as training."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from .recorder import Recorder


class Recording:
    """Hold a recorder from the start of training to its end.

    Args:
        directory: as for `Recorder`.
        frozen: whether to write parameters that are frozen when training starts; False writes
            trained parameters and buffers only.
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
        """Save the initial weights and start to follow the optimisers; first check the disk space.

        Args:
            model: the module that is trained.
            step: the optimiser step at which training starts.
            last: the last step; 0 or less if unknown, which skips the check.
            optimizers: optimisers that train the model.

        Raises:
            ResourceError: if the disk lacks the space for all iterates up to `last`.
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
        """Note the factor that clips gradients before the next step; NaN if unknown."""
        if self._recorder is not None:
            self._recorder.note_clipping(factor)

    def flush(self) -> None:
        """Flush the iterates to disk before the trainer writes a checkpoint it may resume from."""
        if self._recorder is not None:
            self._recorder.flush()

    def end(self) -> None:
        """Close the recorder, which completes the files."""
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            recorder.close()
