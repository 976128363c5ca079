"""A task's model and its tensors: those that take part in the allocation, and those that stay as
the model builds them.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterable, Iterator, Mapping, MutableMapping, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from ...checkpoints.trajectory import TensorSpec
from ...errors import InputError, few
from ...tasks.task import Task, every_name
from .between import Between
from .containers import dense_parts, digest_of
from .rows import InRows, Rows, is_small, rows_of
from .settings import ObjectiveSettings
from .tensors import added_entries, is_fixed, tensor_table, unstored

_BUILT: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # by the factories of tasks in this process


def new_model(task: Task) -> nn.Module:
    """Return a new model of the task.

    Raises:
        InputError: where the factory raises, returns something else, or returns one it returned
            before.
    """
    try:
        model = task.model()
    except Exception as error:
        raise InputError(f"Task.model() raised {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"Task.model() returned {type(model).__name__}, not an nn.Module.")
    if model in _BUILT:
        raise InputError(
            "Task.model() returned the module it had returned before. Build a new one at every "
            "call: model=lambda: Net()."
        )
    _BUILT.add(model)
    # inside torch.compile's wrapper, for compiled code calls F.batch_norm past the one
    # `normalising` puts in its place
    return getattr(model, "_orig_mod", model)


class ModelTensors:
    """A model, whose tensors hold the values of one point.

    Attributes:
        module: the model.
        patterns: those of `Task.fixed`.
        table: the tensors that are read from checkpoints.
        frozen: names of the tensors that are not, because no checkpoint holds them.
    """

    def __init__(
        self,
        module: nn.Module,
        patterns: Sequence[str],
        table: list[TensorSpec],
        frozen: list[str],
    ) -> None:
        self.module, self.patterns, self.table, self.frozen = module, patterns, table, frozen
        tensors = _named_tensors(module)
        self._by_name = {spec.name: tensors[spec.name] for spec in table}
        self._gradients = [(tensor, tensor.requires_grad) for tensor in tensors.values()]

    @property
    def point(self) -> dict[str, Tensor]:
        """Return the tensors of the table, as the module holds them."""
        return dict(self._by_name)

    @cached_property
    def _small(self) -> dict[str, Tensor]:
        """Return the tensors that are copied together."""
        return {name: tensor for name, tensor in self._by_name.items() if is_small(tensor.shape)}

    @cached_property
    def _large(self) -> list[str]:
        """Return the names of the others."""
        return [name for name in self._by_name if name not in self._small]

    @cached_property
    def _rows(self) -> Rows:
        """Return which small tensors are interpolated together."""
        return rows_of(
            {name: tensor for name, tensor in self._small.items() if tensor.is_floating_point()}
        )

    @property
    def allocated(self) -> list[TensorSpec]:
        """Return the tensors that take part in the allocation."""
        return [spec for spec in self.table if spec.kind != "state"]

    @property
    def differentiable(self) -> dict[str, Tensor]:
        """Return the module's own tensors that take part in the allocation, by name."""
        return {spec.name: self._by_name[spec.name] for spec in self.allocated}

    @property
    def fixed(self) -> dict[str, Tensor]:
        """Return the tensors `Task.fixed` keeps as the model builds them, under every name they
        have.
        """
        identities = {
            id(tensor) for name, tensor in self.own().items() if is_fixed(name, self.patterns)
        }
        return {
            name: tensor
            for name, tensor in every_name(self.module).items()
            if id(tensor) in identities
        }

    @property
    def added(self) -> list[str]:
        """Return the entries of the model's state dict that are neither parameters nor buffers, and
        stay as the model builds them.
        """
        return added_entries(self.module)

    @property
    def unstored(self) -> dict[str, Tensor]:
        """Return the buffers the model builds and does not save, by name."""
        return unstored(self.module)

    def fixed_of(self, names: Iterable[str]) -> list[str]:
        """Return those of some names that `Task.fixed` names."""
        return [name for name in names if is_fixed(name, self.patterns)]

    def own(self) -> dict[str, Tensor]:
        """Return the tensors that stay as the task's model builds them: fixed ones, and buffers
        that are not stored.
        """
        return {
            name: tensor
            for name, tensor in _named_tensors(self.module).items()
            if name not in self._by_name
        }

    def copy_own(self, other: nn.Module, names: Iterable[str]) -> None:
        """Copy tensors that stay as a model builds them from another model of the same task."""
        tensors = _named_tensors(other)
        with torch.no_grad():
            for name in names:
                self.own()[name].copy_(tensors[name])

    def seeded(self) -> list[str]:
        """Return the names of the frozen and fixed tensors, where any of them holds numbers that
        float32 does not, as one drawn at random does; none otherwise.
        """
        names = [
            name for name in self.own() if name in self.frozen or is_fixed(name, self.patterns)
        ]
        return names if any(not _is_narrow(self.own()[name]) for name in names) else []

    def place(self, point: Mapping[str, Tensor]) -> None:
        """Copy values into the module's own tensors, in place: recomputation under checkpointing
        sees them too.
        """
        with torch.no_grad():
            for name in self._large:
                self._by_name[name].copy_(point[name])
            between: Mapping[str, Tensor] = {}
            if isinstance(point, Between):
                between = InRows(
                    self._rows,
                    {
                        row.names[0]: torch.lerp(row.of(point.start), row.of(point.end), point.x)[0]
                        for row in self._rows.every
                    },
                )
            values = [between[name] if name in between else point[name] for name in self._small]
            if values:
                torch._foreach_copy_(list(self._small.values()), values)

    @contextlib.contextmanager
    def holding(self, point: MutableMapping[str, Tensor]) -> Iterator[None]:
        """Copy values in, and free the large tensors they came from: inside the context, those of
        `point` are the module's own, where these are of the same type; afterwards they are copies
        again.
        """
        self.place(point)
        same = [name for name in self._large if point[name].dtype == self._by_name[name].dtype]
        for name in same:
            point[name] = self._by_name[name].detach()
        try:
            yield
        finally:
            for name in same:
                point[name] = point[name].clone(memory_format=torch.contiguous_format)

    def renew(self, point: Mapping[str, Tensor]) -> None:
        """Copy values in and set the model to eval anew: what modules derive from their weights
        there is derived from these.
        """
        self.module.train(True)
        self.place(point)
        self.module.eval()

    def restore(self) -> None:
        """Undo what a loss that takes derivatives itself changes on the model's tensors: their
        gradients, and which of them require any.
        """
        for tensor, has_gradient in self._gradients:
            tensor.grad = None
            if tensor.requires_grad != has_gradient and tensor.is_leaf:
                tensor.requires_grad_(has_gradient)

    @property
    def digests(self) -> dict[str, str]:
        """Return hashes of the tensors that checkpoints do not hold."""
        return {f"tensor {name!r}": digest_of(_some(tensor)) for name, tensor in self.own().items()}


def bind_tensors(
    module: nn.Module, patterns: Sequence[str], settings: ObjectiveSettings
) -> ModelTensors:
    """Let gradients flow to those of a model's tensors that are allocated and to no other; return
    the model with them.

    Args:
        module: the model, whose tensors have their shapes.
        patterns: those of `Task.fixed`.
        settings: tell which tensors the checkpoints hold, and what statistics layers take.

    Raises:
        InputError: where a pattern matches no tensor, or a parameter is complex.
    """
    table = tensor_table(module, settings.norm_stats, patterns, settings.stored)
    stored = {spec.name for spec in table}
    whole = tensor_table(module, settings.norm_stats, patterns)
    for parameter in module.parameters():
        parameter.requires_grad_(False)
    bound = _named_tensors(module)
    for spec in table:
        bound[spec.name].requires_grad_(spec.kind != "state")
    for pattern in patterns:
        if not any(is_fixed(name, [pattern]) for name in [*bound, *(settings.stored or ())]):
            raise InputError(
                f"Task.fixed names {pattern!r}, which no tensor of the model matches. Its tensors: "
                f"{few([*map(repr, bound)], 5)}."
            )
    frozen = [spec.name for spec in whole if spec.name not in stored]
    return ModelTensors(module, patterns, table, frozen)


def _named_tensors(module: nn.Module) -> dict[str, Tensor]:
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


def _is_narrow(tensor: Tensor) -> bool:
    """Tell whether float32 holds the values of a tensor exactly."""
    return not tensor.is_floating_point() or torch.equal(tensor, tensor.float().to(tensor.dtype))


def _some(tensor: Tensor) -> tuple[str, list[Tensor]]:
    """Return a tensor's layout, and a few thousand of its numbers from all over it: of a sparse
    one, of its indices and values.
    """
    flat = [part.reshape(-1) for part in dense_parts(tensor)]
    return f"{tensor.dtype}{tensor.layout}", [
        part[:: max(1, len(part) // 4096)].clone() for part in flat
    ]
