"""Record training by Lightning's Trainer: `Trainer(...,
callbacks=[RecorderCallback("checkpoints")])`.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from lightning.pytorch import Callback
from lightning.pytorch.utilities.model_helpers import is_overridden

from ..errors import LCAError
from .callback import Recording
from .optimizer_numbers import clip_factor, total_norm

if TYPE_CHECKING:
    from lightning.pytorch import LightningModule, Trainer
    from torch.optim import Optimizer


class RecorderCallback(Recording, Callback):
    """Record the weights at the start of training and after every optimiser step.

    Steps are the trainer's own `global_step`, which counts the steps of all optimisers: gradient
    accumulation counts once, and training resumed from a checkpoint continues the series. Weights
    are saved at the end of a batch. Tensors have the names of the `LightningModule`. When training
    starts, the disk must have space for `max_steps` iterates, if that is set.

    Every iterate also records what the optimisers did, see `Recorder.attach`. The factor of
    gradient clipping is recorded if the trainer clips the norm itself (`gradient_clip_val`), but
    not if it clips values or the module clips, as it may under manual optimisation.

    Args:
        directory: as for `Recorder`.
        frozen: False leaves out parameters that are frozen when training starts (an adapter's
            base); `lca run` then takes them from the task's model. Parameters that a callback
            unfreezes later could not be recorded.
        save: "scalars" or "moments", as for `Recorder.attach`.
        options: `every`, `steps`, `until`, `on_full` of `Recorder`.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        frozen: bool = True,
        save: Literal["scalars", "moments"] = "scalars",
        **options: Any,
    ) -> None:
        super().__init__(directory, frozen=frozen, save=save, **options)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the initial weights.

        Args:
            trainer: the trainer, given by Lightning.
            pl_module: the module that is trained.
        """
        self.begin(pl_module, trainer.global_step, trainer.max_steps, trainer.optimizers)
        self._saved = trainer.global_step

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Note the factor of the clipping that follows.

        Args:
            trainer: the trainer, given by Lightning.
            pl_module: the module that is trained.
            optimizer: the optimiser that is about to step.
        """
        clips_itself = is_overridden("configure_gradient_clipping", pl_module)
        if clips_itself or not pl_module.automatic_optimization:
            factor = torch.tensor(math.nan)
        elif not trainer.gradient_clip_val:
            factor = torch.ones(())
        elif trainer.gradient_clip_algorithm == "value":
            factor = torch.tensor(math.nan)
        else:
            parameters = [
                parameter for group in optimizer.param_groups for parameter in group["params"]
            ]
            factor = clip_factor(total_norm(parameters), float(trainer.gradient_clip_val))
        self.note_clipping(factor)

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: object,
        batch: object,
        batch_idx: int,
    ) -> None:
        """Save the weights if the batch ended with an optimiser step.

        Args:
            trainer: the trainer, given by Lightning.
            pl_module: the module that is trained.
            outputs: unused.
            batch: unused.
            batch_idx: unused.
        """
        if trainer.global_step > self._saved:
            self.take(trainer.global_step)
            self._saved = trainer.global_step

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, object]
    ) -> None:
        """Flush the iterates to disk before the trainer writes a checkpoint it may resume from.

        Args:
            trainer: the trainer, given by Lightning.
            pl_module: the module that is trained.
            checkpoint: unused.
        """
        self.flush()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the recorder, which completes the files.

        Args:
            trainer: the trainer, given by Lightning.
            pl_module: the module that is trained.
        """
        self.end()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Close the recorder; add its error, if any, as a note to the exception that ended
        training.

        Args:
            trainer: the trainer, given by Lightning.
            pl_module: the module that is trained.
            exception: the exception that ended training.
        """
        try:
            self.end()
        except LCAError as error:
            exception.add_note(f"the recorder, too: {error}")
