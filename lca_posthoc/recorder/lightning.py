"""For the Trainer of Lightning: `Trainer(..., callbacks=[RecorderCallback("checkpoints")])`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from lightning.pytorch import Callback

from .recorder import Recorder


class RecorderCallback(Callback):
    """Records the weights at the start of training and after every optimiser step.

    Steps are counted as the trainer's `global_step` is, over all optimisers; gradient accumulation counts once, and training resumed
    from a checkpoint goes on with the series. Tensors are named as in the `LightningModule`.

    There must be space for `max_steps` iterates, where the trainer is given them, when training begins.

    Args:
        directory: as `Recorder`'s.
        options: `every`, `steps`, `until`, `on_full` of `Recorder`.
    """

    def __init__(self, directory: str | Path, **options: Any) -> None:
        self._directory, self._options = directory, options
        self._recorder: Recorder | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Save the weights that training begins with, and attach to the optimisers."""
        self._recorder = Recorder(self._directory, pl_module, **self._options)
        if trainer.max_steps > 0:
            self._recorder.require_space(trainer.max_steps)
        self._recorder.attach(*trainer.optimizers, step=trainer.global_step)

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        """Have on the disk what a checkpoint to resume from comes after."""
        if self._recorder is not None:
            self._recorder.flush()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Finish the files."""
        if self._recorder is not None:
            self._recorder.close()
