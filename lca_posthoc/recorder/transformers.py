"""For the Trainer of Hugging Face's transformers: `Trainer(..., callbacks=[RecorderCallback("checkpoints")])`."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from .callback import Recording


class RecorderCallback(Recording, TrainerCallback):
    """Records the weights at the start of training and after every optimiser step.

    Steps are the trainer's own `global_step`: gradient accumulation counts once, and training resumed from a checkpoint goes on with the
    series. There must be space for `max_steps` iterates when training begins.

    Args:
        directory: as `Recorder`'s.
        frozen: whether frozen parameters (an adapter's base) are written too; `lca run` has them from the task's model.
        options: `every`, `steps`, `until`, `on_full` of `Recorder`.
    """

    def on_train_begin(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Save the weights that training begins with."""
        self.begin(given["model"], state.global_step, state.max_steps)

    def on_step_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Save the weights after an optimiser step; before a checkpoint to resume from have them all on the disk."""
        self.take(state.global_step)
        if control.should_save:
            self.flush()

    def on_epoch_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Likewise, where a checkpoint is written at the end of an epoch."""
        if control.should_save:
            self.flush()

    def on_train_end(self, args: Any, state: Any, control: Any, **given: Any) -> None:
        """Finish the files."""
        self.end()
