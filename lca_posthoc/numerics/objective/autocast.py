"""See whether code turns autocast on: the loss of a training step often does, and is then not
computed in float32.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch.overrides import TorchFunctionMode


class Watch(TorchFunctionMode):
    """Note the types to which autocast casts while this mode is on, however the code turns autocast
    on.

    Attributes:
        dtypes: the names of the types to which products are cast.
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
