"""Record training by the Trainer of Hugging Face's transformers: `Trainer(...,
callbacks=[RecorderCallback("checkpoints")])`.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from transformers import TrainerCallback

from .callback import Recording
from .optimizer_numbers import total_norm

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

_MARGIN = 1e-4  # relative; gradients this close to the largest norm may have been clipped to it


class RecorderCallback(Recording, TrainerCallback):
    """Record the weights at the start of training and after every optimiser step.

    Steps are the trainer's own `global_step`: gradient accumulation counts once, and training
    resumed from a checkpoint continues the series. When training starts, the disk must have space
    for `max_steps` iterates.

    Every iterate also records what the optimiser did, see `Recorder.attach`. The trainer clips
    gradients itself (`max_grad_norm`) and does not report the norm before clipping, so the recorded
    factor is 1 if gradients were unchanged, and missing if they were clipped.

    Args:
        directory: as for `Recorder`.
        frozen: whether to write frozen parameters (an adapter's base); if not, `lca run` takes them
            from the task's model.
        save: "scalars" or "moments", as for `Recorder.attach`.
        options: `every`, `steps`, `until`, `on_full` of `Recorder`.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        """Save the initial weights.

        Args:
            args: unused.
            state: state of the trainer.
            control: unused.
            options: further arguments of the trainer, among them the model and the optimiser.
        """
        optimizer = options.get("optimizer")
        optimizers = [] if optimizer is None else [optimizer]
        self.begin(options["model"], state.global_step, state.max_steps, optimizers)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        """Note whether the trainer clipped the gradients, which happens before this call.

        Args:
            args: arguments of the trainer.
            state: unused.
            control: unused.
            options: further arguments of the trainer, among them the model.
        """
        if not args.max_grad_norm:
            self.note_clipping(1.0)
        elif options.get("model") is not None:
            norm = total_norm(options["model"].parameters())
            is_below = norm < args.max_grad_norm * (1 - _MARGIN)
            self.note_clipping(torch.where(is_below, 1.0, math.nan))

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        """Save the weights after an optimiser step; flush them if the trainer is about to write a
        checkpoint.

        Args:
            args: unused.
            state: state of the trainer.
            control: says whether the trainer writes a checkpoint now.
            options: unused.
        """
        self.take(state.global_step)
        if control.should_save:
            self.flush()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        """Flush the weights if the trainer writes a checkpoint at the end of the epoch.

        Args:
            args: unused.
            state: unused.
            control: says whether the trainer writes a checkpoint now.
            options: unused.
        """
        if control.should_save:
            self.flush()

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        """Close the recorder, which completes the files.

        Args:
            args: unused.
            state: unused.
            control: unused.
            options: unused.
        """
        self.end()
