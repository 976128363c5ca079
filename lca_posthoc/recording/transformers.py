"""For the Trainer of Hugging Face's transformers: `Trainer(...,
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

_MARGIN = 1e-4  # gradients this near to the largest norm may have been clipped to it


class RecorderCallback(Recording, TrainerCallback):
    """Record the weights at the start of training and after every optimiser step.

    Steps are the trainer's own `global_step`: gradient accumulation counts once, and training
    resumed from a checkpoint goes on with the series. There must be space for `max_steps` iterates
    when training begins.

    What the optimiser did is recorded with every iterate, see `Recorder.attach`; of clipping
    (`max_grad_norm`), which the trainer does itself, the factor 1 where gradients stayed as they
    were, and no factor where they were clipped: the trainer does not tell the norm before.

    Args:
        directory: as `Recorder`'s.
        frozen: True to write frozen parameters (an adapter's base) too; `lca run` takes those not
            written from the task's model.
        save: "scalars" or "moments", as for `Recorder.attach`.
        options: `every`, `steps`, `until`, `on_full` of `Recorder`.
    """

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        """Save the weights that training begins with."""
        optimizer = options.get("optimizer")
        optimizers = [] if optimizer is None else [optimizer]
        self.begin(options["model"], state.global_step, state.max_steps, optimizers)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **options: Any
    ) -> None:
        """Note whether gradients were clipped, which they have been by now."""
        if not args.max_grad_norm:
            self.note_clipping(1.0)
        elif options.get("model") is not None:
            norm = total_norm(options["model"].parameters())
            is_below = norm < args.max_grad_norm * (1 - _MARGIN)
            self.note_clipping(torch.where(is_below, 1.0, math.nan))

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
