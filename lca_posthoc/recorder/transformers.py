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
        self._recorder = Recorder(self._directory, given["model"], **self._options)
        self._recorder.require_space(state.max_steps)
        self._recorder.save(state.global_step)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Save the weights after an optimiser step."""
        if self._recorder is not None:
            self._recorder.save(state.global_step)

    def on_save(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Have on the disk what a checkpoint to resume from comes after."""
        if self._recorder is not None:
            self._recorder.flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Finish the files."""
        if self._recorder is not None:
            self._recorder.close()
