"""For the Trainer of Hugging Face's transformers: `Trainer(...,
callbacks=[RecorderCallback("checkpoints")])`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from transformers import TrainerCallback

from .callback import Recording

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments


class RecorderCallback(Recording, TrainerCallback):
    """Record the weights at the start of training and after every optimiser step.

    Steps are the trainer's own `global_step`: gradient accumulation counts once, and training
    resumed from a checkpoint goes on with the series. There must be space for `max_steps` iterates
    when training begins.

    Args:
        directory: as `Recorder`'s.
        frozen: True to write frozen parameters (an adapter's base) too; `lca run` takes those not
            written from the task's model.
        options: `every`, `steps`, `until`, `on_full` of `Recorder`.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        """Save the weights that training begins with."""
        self.begin(options["model"], state.global_step, state.max_steps)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        """Save the weights after an optimiser step; flush them before a checkpoint that training
        may be resumed from.
        """
        self.take(state.global_step)
        if control.should_save:
            self.flush()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        """Flush the weights where a checkpoint is written at the end of an epoch."""
        if control.should_save:
            self.flush()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        """Close the recorder, which finishes the files."""
        self.end()
