"""One forward pass for several losses: functions of the model's outputs, and the entries of a dict that one call returns."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Returned:
    """What the function of a loss returned for a batch, with the outputs and the targets it was given, if it was."""

    result: Any
    outputs: Any = None
    targets: Any = None


class SharedOutputs:
    """A model's outputs for the batch at hand, shared as long as no loss has written into them.

    Only outputs that are a tensor are shared: what else a model may give could be changed without a trace. Losses that call the
    model themselves are given none: between their calls they may have changed the model, or how it is called.

    Attributes:
        returned: what was returned for the batch at hand by losses that return a dict, by the loss.
    """

    def __init__(self) -> None:
        self.returned: dict[int, Returned] = {}
        self._inputs: Any = None
        self._outputs: Any = None
        self._version = -1

    def of(self, model: Callable[[Any], Any], inputs: Any) -> Any:
        """`model(inputs)`, or what it was for the same object."""
        if inputs is not self._inputs or self._outputs._version != self._version:
            outputs = model(inputs)
            if not isinstance(outputs, Tensor) or outputs.is_inference():  # which counts no writes
                return outputs
            self._inputs, self._outputs, self._version = inputs, outputs, outputs._version
        return self._outputs
