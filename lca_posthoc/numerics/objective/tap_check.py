"""Compare what taps compute for a few examples in a batch with each of these examples alone.

For a single example, the sum of a site over all its output needs no axis. Whatever the model did
before (transposed, flattened batch and time), the axis of the examples is the one along which the
sums for a batch equal those sums. Plain backward passes of the same examples then verify the
shares.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .directions import Along, Motion, SumsAlong
from .example_axis import Axes, ExampleAxis, Signature, possible_axes
from .tap_products import Products
from .tap_sites import Site
from .taps import ExampleShares, Taps
from .values import Values

# An example whose loss hardly depends on the parameters has shares of pure rounding: the scale for
# its comparison is at least this part of the largest.
LEAST = 0.01
Direction = tuple[str, int]  # name of a tensor, and index of a motion


@dataclass(frozen=True)
class Check:
    """Hold the outcome of comparing a batch with single examples.

    Attributes:
        axes: for each site, in order: its function and tensors, and the location of the examples in
            its output, or None if no axis runs over them.
        untold: name of a tensor → why its shares cannot be separated by example.
    """

    axes: Axes
    untold: dict[str, str]


def unchecked(why: str) -> Check:
    """Return the outcome if there is nothing to compare."""
    return Check([], {"": why})


def same_elements(
    values: Callable[[object], Values],
    batch: tuple[object, int],
    alone: Mapping[int, object],
    dtype: torch.dtype,
) -> bool:
    """Return whether the first axis of a loss's elements runs over the examples of a batch.

    It does if the elements of an example, and their weights, sum to the same as for the example
    alone.

    Args:
        values: returns the weighted values of a batch, and the weights.
        batch: the data, and the number of examples.
        alone: position in the batch → batch of that one example.
        dtype: type of the computation.
    """
    data, examples = batch
    together = values(data)
    for position, single in alone.items():
        for whole, own in zip(together, values(single), strict=True):
            if whole is None or own is None:
                if whole is not own:
                    return False
                continue
            if whole.numel() != examples * own.numel():
                return False
            mine = whole.detach().double().reshape(examples, -1)[position]
            bound = tolerance_of(dtype) * float(mine.abs().sum())
            if not abs(float(mine.sum() - own.detach().double().sum())) <= bound:
                return False
    return True


class Drawn(Mapping[str, Tensor]):
    """Represent a random point at a distance from another: it moves every tensor by about its own
    size.

    Each tensor is computed on access, with the same numbers in every process.

    Args:
        point: the other point.
    """

    def __init__(self, point: Mapping[str, Tensor]) -> None:
        self._point = point

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._point[name].detach()
        if not tensor.is_floating_point():
            return tensor
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        drawn = torch.randn(tensor.shape, generator=generator, device="cpu").to(tensor)
        size = float(tensor.double().square().mean().sqrt()) if tensor.numel() else 0.0
        return tensor + drawn * (size or 1.0)

    def __iter__(self) -> Iterator[str]:
        return iter(self._point)

    def __len__(self) -> int:
        return len(self._point)


class _EveryAxis:
    """Record the sums along every axis that may be that of the examples."""

    def __init__(self, examples: int) -> None:
        self._examples = examples
        self.untold: dict[str, str] = {}
        self.signatures: dict[int, Signature] = {}
        self.sums: dict[int, dict[ExampleAxis, dict[Direction, Tensor]]] = {}

    def take(self, site: Site, source: str, index: int, products: Products) -> None:
        """Record the sums of one direction, (examples,) float64 for each axis.

        Args:
            site: the site.
            source: name of the tensor.
            index: index of the motion.
            products: products at the site.
        """
        self.signatures[site.position] = site.signature
        axes = self.sums.setdefault(site.position, {})
        for axis in possible_axes(products.shape, self._examples):
            sums = products.sums(axis, self._examples)
            of_axis = axes.setdefault(axis, {})
            of_axis[source, index] = of_axis.get((source, index), 0) + sums


class _Alone:
    """Record the sums over all of a site's output, and over the absolute values of its entries."""

    def __init__(self) -> None:
        self.untold: dict[str, str] = {}
        self.signatures: dict[int, Signature] = {}
        self.sums: dict[int, dict[Direction, Tensor]] = {}

    def take(self, site: Site, source: str, index: int, products: Products) -> None:
        """Record the sums of one direction."""
        self.signatures[site.position] = site.signature
        of_site = self.sums.setdefault(site.position, {})
        of_site[source, index] = of_site.get((source, index), 0) + products.whole()


def tolerance_of(dtype: torch.dtype) -> float:
    """Return how much a sum may differ between a batch and one example alone, relative to the size
    of its terms.
    """
    return 0.25 * math.sqrt(torch.finfo(dtype).eps)


def check(
    tensors: Mapping[str, Tensor],
    motions: Sequence[Motion],
    values: Callable[[object], Tensor],
    batch: tuple[object, int],
    alone: Mapping[int, object],
) -> Check:
    """Find the axes of the examples, and compare shares with those of single examples.

    Args:
        tensors: leaves of autograd, by name.
        motions: the directions.
        values: returns the weighted values of a batch.
        batch: the data, and the number of examples.
        alone: position in the batch → batch of that one example; not only the first, on which most
            axes agree.
    """
    taps = Taps(tensors, motions)
    tolerance = tolerance_of(next(iter(tensors.values())).dtype)
    data, examples = batch
    axes = _find_axes(taps, values, batch, alone, tolerance)
    shares = ExampleShares(tensors, len(motions), examples, axes)
    with taps:
        taps.begin(data)
        taps.backward(values(data).double().sum(), shares)
    gradients = SumsAlong(tensors, Along(dict.fromkeys(tensors), motions))
    singles = {position: _plainly(gradients, values, single) for position, single in alone.items()}
    return Check(axes, shares.untold | _differing(shares.shares, singles, tolerance))


def _differing(
    told: Mapping[str, Tensor], singles: Mapping[int, Mapping[str, Tensor]], tolerance: float
) -> dict[str, str]:
    """Return the tensors whose shares differ from those of single examples, with the first such
    example.
    """
    sizes = {
        position: sum(float(sums.abs().sum()) for sums in truth.values())
        for position, truth in singles.items()
    }
    least = LEAST * max(sizes.values())
    differing = {}
    for position, truth in singles.items():
        for name, shares in told.items():
            share = shares[:, position]
            difference = share - truth[name] if name in truth else share
            if not float(difference.abs().sum()) <= tolerance * max(sizes[position], least):
                differing[name] = f"example {position} of the batch differs from the same one alone"
    return differing


def _plainly(
    gradients: SumsAlong, values: Callable[[object], Tensor], data: object
) -> dict[str, Tensor]:
    """Return sums along directions by a plain backward pass, (directions,) float64."""
    sums = gradients.sums(values(data).double().sum())
    return {name: of_tensor[:, 0] for name, of_tensor in sums.items()}


def _find_axes(
    taps: Taps,
    values: Callable[[object], Tensor],
    batch: tuple[object, int],
    alone: Mapping[int, object],
    tolerance: float,
) -> Axes:
    data, examples = batch
    together = _EveryAxis(examples)
    singles = {position: _Alone() for position in alone}
    with taps:
        taps.begin(data)
        taps.backward(values(data).double().sum(), together)
        for position, single in alone.items():
            taps.begin(single)
            taps.backward(values(single).double().sum(), singles[position])
    axes: list[tuple[Signature, ExampleAxis | None]]
    axes = [(("", ()), None)] * (1 + max(together.sums, default=-1))
    for site, signature in together.signatures.items():
        recorded = {
            position: single.sums[site]
            for position, single in singles.items()
            if single.signatures.get(site) == signature
        }
        matching = [
            axis
            for axis, sums in together.sums[site].items()
            if recorded.keys() == alone.keys() and _agree(sums, recorded, tolerance)
        ]
        axes[site] = signature, next(iter(matching), None)
    return axes


def _agree(
    sums: Mapping[Direction, Tensor],
    alone: Mapping[int, Mapping[Direction, Tensor]],
    tolerance: float,
) -> bool:
    """Return whether examples have the same sums in a batch and alone, if both have any."""
    for direction, of_batch in sums.items():
        single = {
            position: recorded[direction]
            for position, recorded in alone.items()
            if direction in recorded
        }
        least = LEAST * max((float(size) for _, size in single.values()), default=0.0)
        for position, (total, size) in single.items():
            bound = tolerance * max(float(size), least)
            if not abs(float(of_batch[position] - total)) <= bound:
                return False
    return True
