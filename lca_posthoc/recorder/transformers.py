"""For the Trainer of Hugging Face's transformers: `Trainer(..., callbacks=[RecorderCallback("checkpoints")])`."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from transformers import TrainerCallback

from .recorder import Recorder


class RecorderCallback(TrainerCallback):
    """Records the weights at the start of training and after every optimiser step.

    Steps are the trainer's own `global_step`: gradient accumulation counts once, and training resumed from a checkpoint goes on with the
    series. There must be space for `max_steps` iterates when training begins.

    Args:
        directory: as `Recorder`'s.
        options: `every`, `steps`, `until`, `on_full` of `Recorder`.
    """

    def __init__(self, directory: str | Path, **options: Any) -> None:
        self._directory, self._options = directory, options
        self._recorder: Recorder | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Save the weights that training begins with."""
        self._close()
        self._recorder = Recorder(self._directory, given["model"], **self._options)
        self._recorder.require_space(state.max_steps)
        self._recorder.save(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Save the weights after an optimiser step; before a checkpoint to resume from have them all on the disk."""
        if self._recorder is not None:
            self._recorder.save(state.global_step)
            if control.should_save:
                self._recorder.flush()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Likewise, where a checkpoint is written at the end of an epoch."""
        if self._recorder is not None and control.should_save:
            self._recorder.flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Finish the files."""
        self._close()

    def _close(self) -> None:
        recorder, self._recorder = self._recorder, None
        if recorder is not None:
            recorder.close()
