"""Follow which optimisers train a model, and warn if an unrecorded one takes over from the recorded
ones.
"""

from __future__ import annotations

import os
import sys
import warnings
import weakref
from collections.abc import Collection

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

# files between the line that calls `step` and the hook
BETWEEN = (__file__, os.path.join(os.path.dirname(torch.__file__), ""))


def trains(optimizer: Optimizer, model: nn.Module) -> bool:
    """Return whether an optimiser has any of the model's parameters.

    Args:
        optimizer: the optimiser.
        model: the model.
    """
    identities = {id(parameter) for parameter in model.parameters()}
    return any(
        id(parameter) in identities
        for group in optimizer.param_groups
        for parameter in group["params"]
    )


class Trainers:
    """Determine which optimisers train a model, without keeping any of them alive.

    Args:
        model: the recorded model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = weakref.ref(model)
        # id → the optimiser, its number of groups, and whether it trains the model
        self._known: dict[int, tuple[weakref.ref[Optimizer], int, bool]] = {}

    def include(self, optimizer: Optimizer) -> bool:
        """Return whether an optimiser trains the model.

        Every step of every optimiser asks, so recompute only when groups were added.
        """
        groups = len(optimizer.param_groups)
        known = self._known.get(id(optimizer))
        if known is not None and known[0]() is optimizer and known[1] == groups:
            return known[2]
        model = self._model()
        is_trainer = model is not None and trains(optimizer, model)
        self._known = {key: entry for key, entry in self._known.items() if entry[0]() is not None}
        self._known[id(optimizer)] = (weakref.ref(optimizer), groups, is_trainer)
        return is_trainer


class Takeover:
    """Warn once when another optimiser trains the model in place of the attached ones.

    Steps that others make inside a step of an attached optimiser, as the parts of a composed
    optimiser do, belong to that step. Optimisers are distinguished by identity, whatever `==` says,
    and are not kept alive.

    Args:
        trainers: determines which optimisers train the model.
        attached: the optimisers whose steps are recorded.
    """

    def __init__(self, trainers: Trainers, attached: Collection[Optimizer]) -> None:
        self._trainers = trainers
        self._attached = [weakref.ref(optimizer) for optimizer in attached]
        self._alone = 0
        self._inside = self._said = False
        self.inner_steps = 0
        self._handle = register_optimizer_step_post_hook(self._after_any)

    def end(self) -> None:
        """Remove the hook."""
        self._handle.remove()

    def begin(self) -> None:
        """Start to count steps of other optimisers in `inner_steps`, as parts of a step of an
        attached one, until `finish`.
        """
        self._inside = True

    def finish(self) -> None:
        """Mark the end of a step of an attached optimiser."""
        self._inside, self._alone = False, 0

    def _after_any(self, optimizer: Optimizer, *_: object) -> None:
        if self._is_attached(optimizer) or not self._trainers.include(optimizer):
            return
        if self._inside:
            self.inner_steps += 1
            return
        if self._said:
            return
        self._alone += 1
        if self._alone == 2:  # two foreign steps in a row, none of ours between: it has taken over
            self._said = True
            warnings.warn(
                "an optimiser that the recorder is not attached to trains the model; its steps "
                "are not recorded. If it replaces the attached one, close this recorder and "
                "attach a new one to it, with the step: attach(optimizer, step=…)",
                stacklevel=_level_of_step(),
            )

    def _is_attached(self, optimizer: Optimizer) -> bool:
        return any(reference() is optimizer for reference in self._attached)


def _level_of_step() -> int:
    """Return the `stacklevel`, seen from the caller, of the line outside torch that calls `step`."""
    frame, level = sys._getframe(1), 1
    while frame.f_code.co_filename.startswith(BETWEEN) and frame.f_back is not None:
        frame, level = frame.f_back, level + 1
    return level
