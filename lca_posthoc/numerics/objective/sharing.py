"""Share one forward pass among several losses: functions of the model's outputs, and the entries of
a dict that one call returns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Returned:
    """Hold the result of a loss's function for a batch, and the outputs and targets it was called
    with; None if it takes none.
    """

    result: object
    outputs: object = None
    targets: object = None


class SharedOutputs:
    """Share a model's outputs for the current batch until a loss writes into them.

    Only outputs that are a tensor are shared, because a loss could change others without a trace.
    Losses that call the model themselves share nothing: between their calls they may have changed
    the model, or how it is called.

    Attributes:
        returned: identity of a loss's source → the dict that it returned for the current batch.
    """

    def __init__(self) -> None:
        self.returned: dict[int, Returned] = {}
        self._inputs: object = None
        self._outputs: Any = None
        self._version = -1

    def of(self, model: Callable[[Any], Any], inputs: object) -> object:
        """Return `model(inputs)`, or the outputs of the last such call if it had the same inputs
        object and the outputs are unchanged.

        Args:
            model: the model.
            inputs: inputs of the current batch.
        """
        if inputs is not self._inputs or self._outputs._version != self._version:
            outputs = model(inputs)
            if not isinstance(outputs, Tensor) or outputs.is_inference():  # writes are not counted
                return outputs
            self._inputs, self._outputs, self._version = inputs, outputs, outputs._version
        return self._outputs
