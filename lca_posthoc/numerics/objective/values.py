"""Compute the values of losses on one batch: call the model and the losses' functions in the run's
mode, and check what they return.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ...errors import InputError, SpanError
from ...tasks.task import Loss, Task
from .autocast import Watch
from .containers import fresh
from .data import ValueSource, origin, stated_loss
from .device_errors import is_out_of_memory, spoils_device
from .linear import multiplying
from .normalisation import normalising
from .precision import default_dtype, tf32
from .recurrent import recurring
from .returned import (
    checked_values,
    checked_weights,
    entries_of,
    inputs_and_targets,
    refuse_broadcast,
    value_of_term,
    way_out,
)
from .settings import ObjectiveSettings
from .sharing import Returned, SharedOutputs

# one value per element, multiplied by its weight, and the weights (float64), or None if all are 1
Values = tuple[Tensor, Tensor | None]


class LossValues:
    """Compute the values of losses on batches, at the point in the model.

    Args:
        task: defines the losses.
        losses: the evaluated losses by name.
        model: the model.
        settings: device, precision and mode of normalisation layers.

    Attributes:
        losses: the evaluated losses by name.
        functions: the losses converted to device and precision, by name.
        gave_weights: for each loss evaluated so far, whether its function ever returned weights.
        restore: undoes what a function changed on the model; called after each.
    """

    def __init__(
        self, task: Task, losses: Mapping[str, Loss], model: nn.Module, settings: ObjectiveSettings
    ) -> None:
        self.model, self.settings = model, settings
        self.functions = {
            name: loss.on_device(settings.device, settings.dtype) for name, loss in losses.items()
        }
        self.gave_weights: dict[str, bool] = {}
        self.restore: Callable[[], None] = lambda: None
        self._task, self.losses = task, losses
        # for each loss that returns a dict, by its name in the task: the entries of its first batch
        self._entries: dict[str, tuple[str, ...]] = {}
        self._functions_per_element: dict[str, Callable[[Any, Any], Any]] = {}

    def add_function(self, name: str) -> None:
        """Make a loss of the task available to `values` although it is not among those evaluated."""
        if name not in self.functions:
            loss = stated_loss(self._task, name)
            self.functions[name] = loss.on_device(self.settings.device, self.settings.dtype)

    def values(self, name: str, batch: object, shared: SharedOutputs | None = None) -> Values:
        """Return one value per element of a batch, multiplied by the element's weight, and the
        weights (float64) unless all are 1.

        Args:
            name: name of the loss.
            batch: a batch of its split; the function may write into it.
            shared: outputs of other losses on the batch, to reuse if possible.

        Raises:
            InputError: if the model or the function fails, or returns something invalid.
        """
        loss = self.functions[name]
        if loss.split is None:
            with self._user_code(loss, {}), self._autocasting():
                return value_of_term(name, loss, self.model), None
        returned = self.returned(name, batch, shared)
        result = self.entry(name, returned.result)
        values, weights = (
            result if isinstance(result, tuple) and len(result) == 2 else (result, None)
        )
        self.gave_weights[name] = self.gave_weights.get(name, False) or weights is not None
        where = f"loss {name!r} on split {loss.on!r}"
        values = checked_values(where, values)
        if loss.call is None:
            refuse_broadcast(name, values, returned.outputs, returned.targets)
        if weights is None:
            own = None if loss.call is not None else loss.element_weights(returned.targets)
            return values, own if own is None or own.shape == values.shape else None
        weights = checked_weights(where, values, weights).to(values.device, torch.float64)
        return values.double() * weights, weights

    def values_of_sources(
        self, names: Mapping[ValueSource, str], batch: object
    ) -> Iterator[tuple[ValueSource, Values]]:
        """Yield the values of several sources on one batch, which share as much of the forward pass
        as possible.

        Args:
            names: a loss of each source.
            batch: a batch of their split.
        """
        shared, common = SharedOutputs(), fresh(batch)
        for source, name in names.items():
            separate = common if self.functions[name].call is None else fresh(batch)
            yield source, self.values(name, separate, shared)

    def returned(self, name: str, batch: object, shared: SharedOutputs | None = None) -> Returned:
        """Return what a loss's function returns for a batch; the entries of one dict share it.

        Args:
            name: name of the loss.
            batch: a batch of its split.
            shared: as for `values`.
        """
        loss = self.functions[name]
        source = id(self.losses[name].source if name in self.losses else None)
        if shared is not None and source in shared.returned:
            return shared.returned[source]
        called: dict[str, object] = {}
        with self._user_code(loss, called), self._autocasting():
            if loss.call is not None:
                returned = Returned(loss.call(self.model, batch))
            else:
                inputs, targets = inputs_and_targets(batch)
                called["inputs"] = inputs
                outputs = self.model(inputs) if shared is None else shared.of(self.model, inputs)
                called.update(outputs=outputs, targets=targets)
                result = self._per_element(name, loss)(outputs, targets)
                returned = Returned(result, outputs, targets)
        if shared is not None and isinstance(returned.result, Mapping):
            shared.returned[source] = returned
        return returned

    def entry(self, name: str, returned: Any) -> Any:
        """Return the part of a function's result that is the loss of this name: all of it, or an
        entry of a dict.

        Args:
            name: name of the loss.
            returned: the function's result.

        Raises:
            InputError: if it is a dict and the name stands for no entry, the entry is missing, or
                the entries changed since an earlier batch.
        """
        stated, entry = origin(self._task, name)
        if entry is None and not isinstance(returned, Mapping):
            return returned
        entries = entries_of(stated, returned, entry)
        first = self._entries.setdefault(stated, entries)
        if set(first) != set(entries):
            other = min(set(first) ^ set(entries))
            raise InputError(
                f"loss {stated!r} returned an entry {other!r} for one batch and not for another. "
                "Return every entry for every batch; if one does not apply to an element, give the "
                "element a weight of 0: (values, weights)."
            )
        # the call only serves to observe the model
        if entry is None and name not in self.losses:
            entry = entries[0]
        if entry is None:
            raise InputError(
                f"loss {name!r} returned a dict. Each entry is a loss of its own: ask for --loss "
                f"{' --loss '.join(f'{name}/{key}' for key in entries)}."
            )
        return returned[entry]

    def expect_entries(self, entries: Mapping[str, tuple[str, ...]]) -> None:
        """Reject, from now on, other entries than these from losses that return dicts."""
        self._entries.update(entries)

    def _per_element(self, name: str, loss: Loss) -> Callable[[Any, Any], Any]:
        if name not in self._functions_per_element:
            self._functions_per_element[name] = loss.per_element()
        return self._functions_per_element[name]

    def weighs(self, name: str, batch: object) -> bool:
        """Return whether any element of a batch has a weight above 0.

        Args:
            name: name of the loss.
            batch: a batch of its split.
        """
        weights = self.weights(name, batch)
        return weights is None or bool(weights.sum() > 0)

    def lowest_weight(self, name: str, batch: object) -> float | None:
        """Return the smallest weight of an element of a batch; None if the loss returns no weights.

        Args:
            name: name of the loss.
            batch: a batch of its split.
        """
        weights = self.weights(name, batch)
        return None if weights is None else float(weights.min())

    def weights(self, name: str, batch: object) -> Tensor | None:
        """Return the weights of the elements of a batch, float64; None if all are equal.

        Args:
            name: name of the loss.
            batch: a batch of its split.
        """
        with self.mode():
            return self.values(name, fresh(batch))[1]

    def autocast(self, name: str, batch: object) -> str | None:
        """Return the type that a loss or the model casts to with its own autocast on a batch; None
        if neither enables it.

        Args:
            name: name of the loss.
            batch: a batch of its split.
        """
        watch = Watch(self.settings.device)
        with self.mode(), watch:
            self.values(name, fresh(batch))
        of_run = {"bfloat16"} if self.settings.precision == "bfloat16" else set()
        return min(watch.dtypes - of_run, default=None)

    @contextlib.contextmanager
    def mode(self, layers: contextlib.AbstractContextManager[None] | None = None) -> Iterator[None]:
        """Compute as the run does inside the context, around forward and backward passes, with
        autograd recording.

        Args:
            layers: a context that gives normalisation layers another behaviour than the run's mode.
        """
        with (
            layers or normalising(self.settings.norm_stats, self.model.buffers()),
            multiplying(self.settings.device),
            recurring(self.settings.device),
            default_dtype(self.settings.dtype),
            # also if no gradient is needed, because a loss may take derivatives itself
            torch.enable_grad(),
            tf32(self.settings.precision == "tf32"),
        ):
            yield

    def _autocasting(self) -> contextlib.AbstractContextManager[object]:
        if self.settings.precision != "bfloat16":
            return contextlib.nullcontext()
        return torch.autocast(self.settings.device.type, torch.bfloat16)

    @contextlib.contextmanager
    def _user_code(self, loss: Loss, called: Mapping[str, object]) -> Iterator[None]:
        """Convert errors of the model or the loss function, and name their split.

        Args:
            loss: the loss whose function is called.
            called: what was passed so far: the inputs to the model, then outputs and targets to the
                function.

        Raises:
            InputError: if the body raises an error.
            SpanError: if the body raises it.
            Exception: if memory runs out, or the device is unusable.
        """
        try:
            yield
        except (InputError, SpanError):
            raise
        except Exception as error:
            if is_out_of_memory(error) or spoils_device(error):
                raise
            place = (
                "in a term of the parameters" if loss.split is None else f"on split {loss.split!r}"
            )
            raise InputError(
                f"the model or the loss function failed {place}: {type(error).__name__}: "
                f"{error}{way_out(loss, error, called)}"
            ) from error
        finally:
            self.restore()
