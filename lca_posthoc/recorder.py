"""The training side: save every iterate as one safetensors file."""

from __future__ import annotations

import os
from pathlib import Path
from types import TracebackType

import torch
from safetensors.torch import save_file

from .errors import InputError


class Recorder:
    """Saves a model's parameters and buffers, one file per training step.

    Args:
        directory: created if it does not exist; gets `step_00000000.safetensors` and so on.
        model: the module that is being trained; tied tensors are written once, under their first name.

    ```python
    with Recorder("checkpoints", model) as recorder:
        recorder.save(0)
        for step, batch in enumerate(loader, start=1):
            ...
            optimizer.step()
            recorder.save(step)
    ```
    """

    def __init__(self, directory: str | Path, model: torch.nn.Module) -> None:
        self.directory = Path(directory)
        self._model = model
        self._umask = os.umask(0)
        os.umask(self._umask)

    def __enter__(self) -> Recorder:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        pass

    def save(self, step: int) -> Path:
        """Write the iterate of `step` whole or not at all, and return its path.

        Raises:
            InputError: where the step is negative or already recorded.
            OSError: where the file cannot be written (no space, no permission).
        """
        if step < 0:
            raise InputError(f"step must be 0 or more, got {step}. Count optimiser steps from 0, the initial weights.")
        self.directory.mkdir(parents=True, exist_ok=True)
        path = self.directory / f"step_{step:08d}.safetensors"
        if path.exists():
            raise InputError(f"{path} exists. Record into an empty directory, or continue with the steps that follow.")
        temporary = path.with_name(f".{path.name}.tmp")
        try:
            save_file(self._tensors(), temporary, metadata={"format": "pt", "step": str(step)})
            temporary.chmod(0o666 & ~self._umask)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    def _tensors(self) -> dict[str, torch.Tensor]:
        persistent = self._model.state_dict(keep_vars=True)
        named = {**dict(self._model.named_parameters()), **dict(self._model.named_buffers())}
        return {
            name: tensor.detach().to("cpu", copy=True).contiguous()
            for name, tensor in named.items()
            if name in persistent
        }
