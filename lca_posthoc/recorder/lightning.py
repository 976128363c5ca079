"""For the Trainer of Lightning: `Trainer(..., callbacks=[RecorderCallback("checkpoints")])`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from ..errors import LCAError
from .callback import Recording


class RecorderCallback(Recording, Callback):
    """Records the weights at the start of training and after every optimiser step.

    Steps are the trainer's own `global_step`, which counts those of all optimisers: gradient accumulation counts once, and training
    resumed from a checkpoint goes on with the series. Weights are saved at the end of a batch. Tensors are named as in the
    `LightningModule`. There must be space for `max_steps` iterates, where the trainer is given them, when training begins.

    Args:
        directory: as `Recorder`'s.
        frozen: False leaves out what is frozen when training begins (an adapter's base), which `lca run` then has from the task's
            model; what a callback unfreezes later could not be recorded.
        options: `every`, `steps`, `until`, `on_full` of `Recorder`.
    """

    def __init__(self, directory: str | Path, *, frozen: bool = True, **options: Any) -> None:
        super().__init__(directory, frozen=frozen, **options)

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Save the weights that training begins with."""
        self.begin(pl_module, trainer.global_step, trainer.max_steps)
        self._saved = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Save the weights after an optimiser step."""
        if trainer.global_step > self._saved:
            self.take(trainer.global_step)
            self._saved = trainer.global_step

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Have on the disk what a checkpoint to resume from comes after."""
        self.flush()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Finish the files."""
        self.end()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """Finish the files; the error of training stands before one of the recorder."""
        try:
            self.end()
        except LCAError as error:
            exception.add_note(f"the recorder, too: {error}")
