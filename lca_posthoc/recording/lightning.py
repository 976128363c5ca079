"""For the Trainer of Lightning: `Trainer(..., callbacks=[RecorderCallback("checkpoints")])`."""

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

    Steps are the trainer's own `global_step`, which counts those of all optimisers: gradient
    accumulation counts once, and training resumed from a checkpoint goes on with the series.
    Weights are saved at the end of a batch. Tensors are named as in the `LightningModule`. There
    must be space for `max_steps` iterates, where that is set, when training begins.

    What the optimisers did is recorded with every iterate, see `Recorder.attach`; of clipping, the
    factor where the trainer clips the norm itself (`gradient_clip_val`), and none where it clips
    values or the module clips.

    Args:
        directory: as `Recorder`'s.
        frozen: False leaves out what is frozen when training begins (an adapter's base), which `lca
            run` then takes from the task's model; parameters that a callback unfreezes later could
            not be recorded.
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
        """Save the weights that training begins with."""
        self.begin(pl_module, trainer.global_step, trainer.max_steps, trainer.optimizers)
        self._saved = trainer.global_step

    def on_before_optimizer_step(
        self, trainer: Trainer, pl_module: LightningModule, optimizer: Optimizer
    ) -> None:
        """Note the factor of the clipping that follows."""
        if is_overridden("configure_gradient_clipping", pl_module):
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
        """Save the weights after an optimiser step."""
        if trainer.global_step > self._saved:
            self.take(trainer.global_step)
            self._saved = trainer.global_step

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, object]
    ) -> None:
        """Flush the iterates before a checkpoint that training may be resumed from."""
        self.flush()

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Close the recorder, which finishes the files."""
        self.end()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Finish the files; add an error of the recorder to that of the training as a note."""
        try:
            self.end()
        except LCAError as error:
            exception.add_note(f"the recorder, too: {error}")
