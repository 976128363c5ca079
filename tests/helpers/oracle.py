"""A slow float64 oracle of the allocation, written from the definition and from nothing of the
package.

Every node of every segment is evaluated afresh, on a copy of the model in float64, with plain
autograd; normalisation layers are replaced by their formula, which gives running statistics a
gradient like any other tensor.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

Values = Callable[[nn.Module, tuple[Tensor, ...]], Any]


class PlainNorm(nn.Module):
    """y = (x − m) / √(v + ε) · w + b, with m and v the stored ones, or those of the batch (of each
    instance).
    """

    def __init__(self, norm: nn.Module, own_statistics: bool) -> None:
        super().__init__()
        self.eps, self.own = norm.eps, own_statistics or norm.running_mean is None
        self.each_instance = isinstance(norm, nn.modules.instancenorm._InstanceNorm)
        for name in ("weight", "bias"):
            self.register_parameter(name, getattr(norm, name))
        for name in ("running_mean", "running_var", "num_batches_tracked"):
            self.register_buffer(name, getattr(norm, name))

    def forward(self, x: Tensor) -> Tensor:
        channels = [1, x.shape[1]] + [1] * (x.dim() - 2)
        if self.own:
            axes = [
                axis
                for axis in range(x.dim())
                if axis != 1 and not (axis == 0 and self.each_instance)
            ]
            mean = x.mean(axes, keepdim=True)
            var = ((x - mean) ** 2).mean(axes, keepdim=True)
        else:
            mean, var = self.running_mean.reshape(channels), self.running_var.reshape(channels)
        y = (x - mean) / (var + self.eps) ** 0.5
        return (
            y
            if self.weight is None
            else y * self.weight.reshape(channels) + self.bias.reshape(channels)
        )


def _with_plain_norms(module: nn.Module, own_statistics: bool) -> nn.Module:
    for name, child in list(module.named_children()):
        if isinstance(child, nn.modules.batchnorm._NormBase):
            setattr(module, name, PlainNorm(child, own_statistics))
        else:
            _with_plain_norms(child, own_statistics)
    return module


@dataclass
class Truth:
    """Losses at every checkpoint; per segment the allocation A* and the weighted mean gradient, by
    tensor, float64.
    """

    losses: list[float]
    allocation: list[dict[str, Tensor]]
    gradient: list[dict[str, Tensor]]

    def stacked(self) -> dict[str, Tensor]:
        """The allocation with segments along the first axis."""
        return {
            name: torch.stack([each[name] for each in self.allocation])
            for name in self.allocation[0]
        }


class Oracle:
    """One loss of one model over one split.

    `values(model, batch)` gives values, or `(values, weights)`. Without a batch size all examples
    go in one batch.
    """

    def __init__(
        self,
        build: Callable[[], nn.Module],
        data: Sequence[Tensor],
        values: Values,
        *,
        norm_stats: str = "running",
        batch_size: int | None = None,
    ) -> None:
        self.model = _with_plain_norms(
            copy.deepcopy(build()).double().eval(), norm_stats == "batch"
        )
        self.values = values
        wide = [each.double() if each.is_floating_point() else each for each in data]
        count, size = len(wide[0]), batch_size or len(wide[0])
        self.batches = [
            tuple(each[at : at + size] for each in wide) for at in range(0, count, size)
        ]
        parameters, buffers = dict(self.model.named_parameters()), dict(self.model.named_buffers())
        self.all = {**parameters, **buffers}
        self.allocated = dict(parameters)
        if norm_stats == "running":
            self.allocated |= {
                name: each for name, each in buffers.items() if each.is_floating_point()
            }

    def loss(self, point: Mapping[str, Tensor]) -> Tensor:
        """The weighted mean over every element of the split, at a point that holds every tensor of
        the model.
        """
        with torch.no_grad():
            for name, tensor in self.all.items():
                tensor.requires_grad_(name in self.allocated)
                tensor.copy_(point[name])
        total, mass = torch.zeros(()), torch.zeros(())
        for batch in self.batches:
            found = self.values(self.model, batch)
            values, weights = found if isinstance(found, tuple) else (found, torch.ones_like(found))
            total = total + (values * weights).sum()
            mass = mass + weights.sum()
        return total / mass

    def gradient(self, point: Mapping[str, Tensor]) -> dict[str, Tensor]:
        loss = self.loss(point)
        found = torch.autograd.grad(loss, list(self.allocated.values()), allow_unused=True)
        pairs = zip(self.allocated.items(), found, strict=True)
        return {
            name: torch.zeros_like(tensor) if each is None else each
            for (name, tensor), each in pairs
        }

    def allocate(
        self,
        checkpoints: Sequence[Mapping[str, Tensor]],
        nodes: Sequence[float],
        weights: Sequence[float],
    ) -> Truth:
        """A = (θ′ − θ) · Σ_q w_q ∇L(θ + x_q (θ′ − θ)) on every segment in turn."""
        truth = Truth([], [], [])
        with _float64():
            for checkpoint in checkpoints:
                truth.losses.append(self.loss(checkpoint).item())
            for start, end in itertools.pairwise(checkpoints):
                mean = {name: torch.zeros_like(tensor) for name, tensor in self.allocated.items()}
                for x, w in zip(nodes, weights, strict=True):
                    gradient = self.gradient(_between(start, end, x))
                    for name in mean:
                        mean[name] = mean[name] + w * gradient[name]
                truth.gradient.append(mean)
                truth.allocation.append(
                    {
                        name: (end[name].double() - start[name].double()) * mean[name]
                        for name in mean
                    }
                )
        return truth


def _between(start: Mapping[str, Tensor], end: Mapping[str, Tensor], x: float) -> dict[str, Tensor]:
    point = {}
    for name in start:
        moves = start[name].is_floating_point()
        point[name] = (
            start[name].double() + x * (end[name].double() - start[name].double())
            if moves
            else start[name]
        )
    return point


def simpson(intervals: int) -> tuple[list[float], list[float]]:
    """Composite Simpson, written as the mean of Simpson's rule over pairs of intervals."""
    nodes, weights = [i / intervals for i in range(intervals + 1)], [0.0] * (intervals + 1)
    for pair in range(0, intervals, 2):
        for offset, weight in ((0, 1 / 6), (1, 4 / 6), (2, 1 / 6)):
            weights[pair + offset] += weight * 2 / intervals
    return nodes, weights


RULES = {
    "simpson": simpson(2),
    "trapezoid": ([0.0, 1.0], [0.5, 0.5]),
    "left": ([0.0], [1.0]),
    "midpoint": ([0.5], [1.0]),
    "gauss-2": ([0.5 - 0.5 / 3**0.5, 0.5 + 0.5 / 3**0.5], [0.5, 0.5]),
    "gauss-3": ([0.5 - 0.5 * 0.6**0.5, 0.5, 0.5 + 0.5 * 0.6**0.5], [5 / 18, 8 / 18, 5 / 18]),
}


@contextlib.contextmanager
def _float64() -> Iterator[None]:
    """Constants made inside a forward pass are float64 as well."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
