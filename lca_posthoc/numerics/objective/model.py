"""Build a task's model, and decide which of its tensors take part in the allocation and which keep
the values the model builds.
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

_BUILT: weakref.WeakSet[nn.Module] = weakref.WeakSet()  # models built in this process


def new_model(task: Task) -> nn.Module:
    """Build a new model of the task.

    Raises:
        InputError: if the factory raises, returns something other than a module, or returns one it
            returned before.
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
    # unwrap torch.compile: compiled code bypasses the F.batch_norm that `normalising` installs
    return getattr(model, "_orig_mod", model)


class ModelTensors:
    """Hold a model whose tensors have the values of one point.

    Attributes:
        module: the model.
        patterns: patterns of `Task.fixed`.
        table: tensors that are read from checkpoints.
        frozen: names of tensors that are not, because no checkpoint holds them.
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
        """Return the names of the other tensors."""
        return [name for name in self._by_name if name not in self._small]

    @cached_property
    def _rows(self) -> Rows:
        """Return the rows of small tensors that are interpolated together."""
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
        """Return the tensors that `Task.fixed` keeps as the model builds them, under every name
        they have.
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
        keep the values the model builds.
        """
        return added_entries(self.module)

    @property
    def unstored(self) -> dict[str, Tensor]:
        """Return the buffers that the model builds and does not save, by name."""
        return unstored(self.module)

    def fixed_of(self, names: Iterable[str]) -> list[str]:
        """Return the names that match `Task.fixed`."""
        return [name for name in names if is_fixed(name, self.patterns)]

    def own(self) -> dict[str, Tensor]:
        """Return the tensors that keep the values the task's model builds: fixed ones, and buffers
        that are not stored.
        """
        return {
            name: tensor
            for name, tensor in _named_tensors(self.module).items()
            if name not in self._by_name
        }

    def copy_own(self, other: nn.Module, names: Iterable[str]) -> None:
        """Copy some of the tensors in `own` from another model of the same task.

        Args:
            other: the other model.
            names: names of the tensors.
        """
        tensors = _named_tensors(other)
        with torch.no_grad():
            for name in names:
                self.own()[name].copy_(tensors[name])

    def seeded(self) -> list[str]:
        """Return the names of the frozen and fixed tensors if any of them holds a number that is
        not a float32, as random draws in float64 do; else an empty list.
        """
        names = [
            name for name in self.own() if name in self.frozen or is_fixed(name, self.patterns)
        ]
        return names if any(not _is_narrow(self.own()[name]) for name in names) else []

    def place(self, point: Mapping[str, Tensor]) -> None:
        """Copy values into the module's own tensors in place, so that recomputation under
        checkpointing sees them too.
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
        """Copy values in, and free the large tensors they came from.

        Inside the context, the large tensors of `point` are the module's own, if they have the same
        type; afterwards they are copies again.
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
        """Copy values in and set the model to eval again, so that modules recompute what they derive
        from weights.
        """
        self.module.train(True)
        self.place(point)
        self.module.eval()

    def restore(self) -> None:
        """Undo what a loss that computes derivatives itself changes on the model's tensors:
        gradients, and which tensors require them.
        """
        for tensor, has_gradient in self._gradients:
            tensor.grad = None
            if tensor.requires_grad != has_gradient and tensor.is_leaf:
                tensor.requires_grad_(has_gradient)

    @property
    def digests(self) -> dict[str, str]:
        """Return hashes of the tensors that checkpoints lack."""
        return {f"tensor {name!r}": digest_of(_some(tensor)) for name, tensor in self.own().items()}


def bind_tensors(
    module: nn.Module, patterns: Sequence[str], settings: ObjectiveSettings
) -> ModelTensors:
    """Require gradients of exactly those tensors of a model that are allocated, and return the
    model with its tensors.

    Args:
        module: the model; its tensors must have shapes.
        patterns: patterns of `Task.fixed`.
        settings: give the tensors that checkpoints hold, and the statistics that layers use.

    Raises:
        InputError: if a pattern matches no tensor, or a parameter is complex.
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
    """Return whether float32 can represent the values of a tensor exactly."""
    return not tensor.is_floating_point() or torch.equal(tensor, tensor.float().to(tensor.dtype))


def _some(tensor: Tensor) -> tuple[str, list[Tensor]]:
    """Return a tensor's type and layout, and a few thousand evenly spaced numbers; for a sparse
    tensor, of its indices and values.
    """
    flat = [part.reshape(-1) for part in dense_parts(tensor)]
    return f"{tensor.dtype}{tensor.layout}", [
        part[:: max(1, len(part) // 4096)].clone() for part in flat
    ]
