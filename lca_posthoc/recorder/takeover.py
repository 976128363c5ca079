"""Which optimisers train a model, and a warning where one that is not recorded takes over from those that are."""

from __future__ import annotations

import os
import sys
import warnings
import weakref
from collections.abc import Collection
from typing import Any

import torch
from torch import nn
from torch.optim.optimizer import Optimizer, register_optimizer_step_post_hook

BETWEEN = (__file__, os.path.join(os.path.dirname(torch.__file__), ""))  # from the line that makes a step to the hook


def trains(optimizer: Optimizer, model: nn.Module) -> bool:
    """Whether an optimiser has any of the model's parameters."""
    held = {id(parameter) for parameter in model.parameters()}
    return any(id(each) in held for group in optimizer.param_groups for each in group["params"])


class Takeover:
    """Has it said, once, where an optimiser that is not attached goes on with the model alone, as one that replaces another does.

    Steps that an attached optimiser makes of others within its own, as one that is made of several does, are its own. Optimisers are
    told apart by identity, whatever they say they equal, and neither they nor the model are kept alive.

    Args:
        model: that is recorded.
        attached: the optimisers whose steps are.
    """

    def __init__(self, model: nn.Module, attached: Collection[Optimizer]) -> None:
        self._model = weakref.ref(model)
        self._attached = [weakref.ref(each) for each in attached]
        self._known: dict[
            int, tuple[weakref.ref[Optimizer], int, bool]
        ] = {}  # by id: groups, and whether they train it
        self._alone = 0
        self._inside = self._said = False
        self.inner_steps = 0
        self._handle = register_optimizer_step_post_hook(self._after_any)

    def end(self) -> None:
        """Leave no hook behind."""
        self._handle.remove()

    def begin(self) -> None:
        """Count steps of others as parts of a step of an attached optimiser, in `inner_steps`, until `finish`."""
        self._inside = True

    def finish(self) -> None:
        """Note that a step of an attached optimiser is done."""
        self._inside, self._alone = False, 0

    def _after_any(self, optimizer: Optimizer, *_: Any) -> None:
        if self._is_attached(optimizer) or not self._trains(optimizer):
            return
        if self._inside:
            self.inner_steps += 1
            return
        if self._said:
            return
        self._alone += 1
        if self._alone == 2:  # one between two steps of ours is half of theirs
            self._said = True
            warnings.warn(
                "an optimiser that the recorder is not attached to makes steps of the model: they are not recorded. Where it replaces "
                "the one that is, close this recorder and attach another one to it, with the step: attach(optimizer, step=…)",
                stacklevel=_level_of_step(),
            )

    def _is_attached(self, optimizer: Optimizer) -> bool:
        return any(each() is optimizer for each in self._attached)

    def _trains(self, optimizer: Optimizer) -> bool:
        """`trains`, looked up once and again where groups were added: every step of every optimiser asks."""
        groups = len(optimizer.param_groups)
        known = self._known.get(id(optimizer))
        if known is not None and known[0]() is optimizer and known[1] == groups:
            return known[2]
        model = self._model()
        found = model is not None and trains(optimizer, model)
        self._known = {key: each for key, each in self._known.items() if each[0]() is not None}
        self._known[id(optimizer)] = (weakref.ref(optimizer), groups, found)
        return found


def _level_of_step() -> int:
    """The `stacklevel`, for who calls this, of the line outside torch that makes the step."""
    frame, level = sys._getframe(1), 1
    while frame.f_code.co_filename.startswith(BETWEEN) and frame.f_back is not None:
        frame, level = frame.f_back, level + 1
    return level
