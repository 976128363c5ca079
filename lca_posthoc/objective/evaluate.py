r"""Loss and gradient of a whole split at one point.

$L(\theta) = \sum_e w_e\,\ell_e(\theta) \big/ \sum_e w_e$ over every element $e$ of the split; one value per element, $w_e = 1$
unless the loss gives weights. Sums over elements and batches accumulate in float64.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import InputError, SpanError
from ..task import Loss, Task
from ..trajectory import TensorSpec
from .batches import Split, automatic_batch_size
from .normalisation import normalising

PRECISIONS = {"float32": torch.float32, "float64": torch.float64}
_ON_AXIS_1 = {"ConvTranspose1d", "ConvTranspose2d", "ConvTranspose3d", "Conv1D"}


@dataclass(frozen=True)
class Evaluation:
    """A loss at one point and its gradient there, both float64; no gradient after a forward pass alone.

    `untouched` names the tensors the loss did not reach; their gradient is zero.
    """

    loss: float
    gradient: dict[str, Tensor]
    untouched: frozenset[str] = frozenset()


def tensor_table(model: nn.Module, norm_stats: str) -> list[TensorSpec]:
    """The model's tensors in its own order: parameters once each with their aliases, then persistent buffers.

    Floating buffers are allocated as tensors of kind "buffer", but for running statistics in `batch` mode, which the loss
    does not depend on. All else that is stored is "state".
    """
    stored = model.state_dict(keep_vars=True)
    by_id: dict[int, list[str]] = {}
    for name, tensor in stored.items():
        by_id.setdefault(id(tensor), []).append(name)
    parameters, owners = dict(model.named_parameters()), _owners(model)
    table = []
    for name, tensor in [*parameters.items(), *model.named_buffers()]:
        if id(tensor) not in by_id:
            continue  # a non-persistent buffer: the model builds it, checkpoints do not hold it
        kind = "parameter" if name in parameters else "buffer"
        if not tensor.is_floating_point() or (norm_stats == "batch" and is_statistic(name)):
            kind = "state"
        aliases = tuple(alias for alias in by_id[id(tensor)] if alias != name)
        table.append(TensorSpec(name, kind, tuple(tensor.shape), aliases, _unit_axis(owners[name], tensor.dim())))
    return table


def is_statistic(name: str) -> bool:
    """Whether a tensor is a normalisation layer's running mean or variance, by the name torch gives it."""
    return name.rpartition(".")[2] in ("running_mean", "running_var")


def _owners(model: nn.Module) -> dict[str, frozenset[str]]:
    """Tensor name → the names of the classes of the module that holds it."""
    return {
        f"{prefix}.{name}" if prefix else name: frozenset(kind.__name__ for kind in type(module).__mro__)
        for prefix, module in model.named_modules(remove_duplicate=False)
        for held in (module.named_parameters, module.named_buffers)
        for name, _ in held(recurse=False, remove_duplicate=False)
    }


def _unit_axis(owner: frozenset[str], dims: int) -> int | None:
    """Output neurons and channels run along axis 0, but along axis 1 of transposed convolutions and Conv1D."""
    if dims == 0:
        return None
    return 1 if dims > 1 and owner & _ON_AXIS_1 else 0


@contextlib.contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Build and call models under this default dtype: constants made on the way must have the precision asked for."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


class Objective:
    """Evaluates the losses of a task at any point in the space of its model's tensors.

    Args:
        build: gives the task, called under the default dtype of the precision.
        losses: names of the losses, None for the first of the task, `["all"]` for every one.
        device: where the model and the data live.
        precision: "float32" or "float64".
        norm_stats: "running" or "batch".
        batch_size: None for a deterministic choice from shapes, one for each split.
    """

    def __init__(
        self,
        build: Callable[[], Task],
        losses: list[str] | None,
        *,
        device: torch.device,
        precision: str,
        norm_stats: str,
        batch_size: int | None,
    ) -> None:
        self.device, self.dtype, self.norm_stats = device, PRECISIONS[precision], norm_stats
        if norm_stats == "batch" and batch_size is None:
            raise InputError("--norm-stats batch needs --batch-size N: the partition into batches is part of the loss.")
        with default_dtype(self.dtype):
            task = build()
            self.losses: dict[str, Loss] = {name: task.losses[name] for name in task.choose(losses)}
            self.task_losses = list(task.losses)
            self.model = _built(task).to(device=device, dtype=self.dtype).eval()
        self.table = tensor_table(self.model, norm_stats)
        self._tensors = self._bind()
        self.splits = {
            name: Split(name, task.data[name], device, self.dtype)
            for name in dict.fromkeys(loss.on for loss in self.losses.values())
        }
        self._batch_size = batch_size
        self.batch_sizes: dict[str, int] = {}
        self.evaluations = dict.fromkeys(self.losses, 0)
        self.forward_passes = dict.fromkeys(self.losses, 0)

    def _bind(self) -> dict[str, Tensor]:
        """The module's own tensors; gradients flow to those that are allocated and to no other."""
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        bound = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        for spec in self.table:
            bound[spec.name].requires_grad_(spec.kind != "state")
        return {spec.name: bound[spec.name] for spec in self.table}

    @property
    def allocated(self) -> list[TensorSpec]:
        """The tensors that take part in the allocation."""
        return [spec for spec in self.table if spec.kind != "state"]

    def settle_batch_sizes(
        self, point: Mapping[str, Tensor], recorded: Mapping[str, int] | None = None
    ) -> dict[str, int]:
        """Fix the batch size of every split: the one recorded, the one given, or a deterministic choice at `point`."""
        self.place(point)
        for name, split in self.splits.items():
            chosen = (recorded or {}).get(name) or self._batch_size or min(self._automatic(split))
            self.batch_sizes[name] = min(chosen, split.examples)
        return dict(self.batch_sizes)

    def _automatic(self, split: Split) -> Iterator[int]:
        for loss in self.losses.values():
            if loss.on == split.name:
                with self._mode():
                    yield automatic_batch_size(split, partial(self.values, loss), self.device)

    def place(self, point: Mapping[str, Tensor]) -> None:
        """Copy values into the module's own tensors, in place: recomputation under checkpointing sees them too."""
        with torch.no_grad():
            for name, tensor in self._tensors.items():
                tensor.copy_(point[name])

    def evaluate(
        self, point: Mapping[str, Tensor], losses: list[str], *, gradient: bool = True
    ) -> dict[str, Evaluation]:
        """Each loss over its whole split at `point`, with its gradient unless only the value is asked for.

        Args:
            point: every tensor of the table, on the device.
            losses: names.
            gradient: False for a forward pass alone.
        """
        self.place(point)
        found = {}
        for name in losses:
            counts = self.evaluations if gradient else self.forward_passes
            counts[name] += 1
            split = self.splits[self.losses[name].on]
            found[name] = self.over(self.losses[name], split.batches(self.batch_sizes[split.name]), gradient=gradient)
        return found

    def over(self, loss: Loss, batches: Iterator[Any], *, gradient: bool = True) -> Evaluation:
        """A loss over the batches given, at the point the module holds."""
        total = torch.zeros((), dtype=torch.float64, device=self.device)
        mass = torch.zeros((), dtype=torch.float64, device=self.device)
        sums = {
            spec.name: torch.zeros(spec.shape, dtype=torch.float64, device=self.device)
            for spec in self.allocated
            if gradient
        }
        reached: set[str] = set()
        with self._mode(), torch.set_grad_enabled(gradient):
            for batch in batches:
                values, weights = self.values(loss, batch)
                summed = values.double().sum() if weights is None else (values.double() * weights).sum()
                if gradient and summed.requires_grad:
                    summed.backward()  # type: ignore[no-untyped-call]
                    reached |= self._collect(sums)
                total += summed.detach()
                mass += values.numel() if weights is None else weights.sum()
        if not float(mass) > 0:
            raise InputError(
                f"the weights of a loss on split {loss.on!r} sum to {float(mass)}. Give at least one element a weight."
            )
        value = float(total / mass)
        return Evaluation(value, {name: each / mass for name, each in sums.items()}, frozenset(set(sums) - reached))

    def _collect(self, sums: dict[str, Tensor]) -> set[str]:
        """Move the gradients autograd left on the module's tensors into the float64 sums."""
        reached = set()
        for name, total in sums.items():
            tensor = self._tensors[name]
            if tensor.grad is not None:
                total += tensor.grad
                tensor.grad = None
                reached.add(name)
        return reached

    def values(self, loss: Loss, batch: Any) -> tuple[Tensor, Tensor | None]:
        """One value per element of a batch, and their weights where the loss gives any (float64, detached)."""
        with self._user_code(loss):
            if loss.call is not None:
                result = loss.call(self.model, batch)
            else:
                inputs, targets = unpack(batch)
                result = loss.per_element()(self.model(inputs), targets)
        values, weights = result if isinstance(result, tuple) and len(result) == 2 else (result, None)
        if not isinstance(values, Tensor) or not values.is_floating_point():
            raise InputError(
                f"a loss on split {loss.on!r} returned {type(values).__name__}, not a tensor of floating-point values."
            )
        if values.dim() == 0:
            raise InputError(
                f"a loss on split {loss.on!r} returned a scalar; one value per element is needed, so that every example counts "
                "once. Leave the mean out (reduction='none'), or use Loss(call=fn) and return (values, weights)."
            )
        if weights is None:
            return values, None
        if not isinstance(weights, Tensor) or weights.shape != values.shape:
            shape = list(weights.shape) if isinstance(weights, Tensor) else type(weights).__name__
            raise InputError(
                f"a loss on split {loss.on!r} returned values of shape {list(values.shape)} and weights {shape}; they must agree."
            )
        return values, weights.detach().to(values.device, torch.float64)

    @contextlib.contextmanager
    def _mode(self) -> Iterator[None]:
        with normalising(self.norm_stats), default_dtype(self.dtype):
            yield

    @contextlib.contextmanager
    def _user_code(self, loss: Loss) -> Iterator[None]:
        """Errors of the model or the loss function become ours, with the split they happened on."""
        try:
            yield
        except (InputError, SpanError, MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:
            raise InputError(
                f"the model or the loss function failed on split {loss.on!r}: {type(error).__name__}: {error}"
            ) from error


def unpack(batch: Any) -> tuple[Any, Any]:
    """The inputs and targets of a batch, for losses that are plain functions."""
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return batch[0], batch[1]
    kind = f"{type(batch).__name__} of {len(batch)}" if hasattr(batch, "__len__") else type(batch).__name__
    raise InputError(f"a batch is a {kind}, not (inputs, targets). Use Loss(call=fn), called as fn(model, batch).")


def _built(task: Task) -> nn.Module:
    try:
        model = task.model()
    except Exception as error:
        raise InputError(f"Task.model() raised {type(error).__name__}: {error}") from error
    if not isinstance(model, nn.Module):
        raise InputError(f"Task.model() returned {type(model).__name__}, not an nn.Module.")
    return model
