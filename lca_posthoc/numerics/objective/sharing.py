"""One forward pass for several losses: functions of the model's outputs, and the entries of a dict
that one call returns.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Returned:
    """The result of a loss's function for a batch, and the outputs and targets it was called with;
    None where it takes none.
    """

    result: object
    outputs: object = None
    targets: object = None


class SharedOutputs:
    """A model's outputs for the batch at hand, shared as long as no loss has written into them.

    Only outputs that are a tensor are shared: a loss could change others without a trace. Losses
    that call the model themselves share none: between their calls they may have changed the model,
    or how it is called.

    Attributes:
        returned: by the identity of a loss's source, the dict that it returned for the batch at
            hand.
    """

    def __init__(self) -> None:
        self.returned: dict[int, Returned] = {}
        self._inputs: object = None
        self._outputs: Any = None
        self._version = -1

    def of(self, model: Callable[[Any], Any], inputs: object) -> object:
        """Return `model(inputs)`, or the outputs of the last such call where that had the same
        object and they are unchanged.
        """
        if inputs is not self._inputs or self._outputs._version != self._version:
            outputs = model(inputs)
            if not isinstance(outputs, Tensor) or outputs.is_inference():  # which counts no writes
                return outputs
            self._inputs, self._outputs, self._version = inputs, outputs, outputs._version
        return self._outputs
