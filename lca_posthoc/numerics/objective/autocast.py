"""Detect whether code enables autocast: the loss of a training step often does, and is then not
computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Watch(TorchFunctionMode):
    """Record the types that autocast casts to while this mode is active, however the code enables
    autocast.

    Attributes:
        dtypes: names of the types that products are cast to.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.dtypes: set[str] = set()
        self._devices = {"cpu", device.type}

    def __torch_function__(
        self,
        function: Callable[..., object],
        types: Iterable[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, object] | None = None,
    ) -> object:
        for device in self._devices:
            if torch.is_autocast_enabled(device):
                self.dtypes.add(str(torch.get_autocast_dtype(device)).removeprefix("torch."))
        return function(*args, **(kwargs or {}))
