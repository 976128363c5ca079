"""For the Trainer of Lightning: `Trainer(..., callbacks=[RecorderCallback("checkpoints")])`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from ..errors import LCAError
from .recorder import Recorder


class RecorderCallback(Callback):
    """Records the weights at the start of training and after every optimiser step.

    Steps are the trainer's own `global_step`, which counts those of all optimisers: gradient accumulation counts once, and training
    resumed from a checkpoint goes on with the series. Weights are saved at the end of a batch. Tensors are named as in the
    `LightningModule`.

    There must be space for `max_steps` iterates, where the trainer is given them, when training begins.

    Args:
        directory: as `Recorder`'s.
        options: `every`, `steps`, `until`, `on_full` of `Recorder`.
    """

    def __init__(self, directory: str | Path, **options: Any) -> None:
        self._directory, self._options = directory, options
        self._recorder: Recorder | None = None
        self._saved = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Save the weights that training begins with."""
        self._close()
        self._recorder = Recorder(self._directory, pl_module, **self._options)
        if trainer.max_steps > 0:
            self._recorder.require_space(trainer.max_steps)
        self._recorder.save(trainer.global_step)
        self._saved = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save the weights after an optimiser step."""
        if self._recorder is not None and trainer.global_step > self._saved:
            self._recorder.save(trainer.global_step)
            self._saved = trainer.global_step

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Have on the disk what a checkpoint to resume from comes after."""
        if self._recorder is not None:
            self._recorder.flush()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Finish the files."""
        self._close()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Finish the files; the error of training stands before one of the recorder."""
        try:
            self._close()
        except LCAError as error:
            exception.add_note(f"the recorder, too: {error}")

    def _close(self) -> None:
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            recorder.close()
