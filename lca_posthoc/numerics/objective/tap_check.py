"""Compare what taps tell of a few examples in a batch with each of these examples alone.

The sum of a site over all of its output, of one example alone, needs no axis. Whatever the model
did before (transposed, flattened batch and time), the axis of the examples is the one along which
the site's sums of a batch are those. Plain backward passes of the same examples then tell whether
the shares are right.
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

# an example whose loss hardly depends on the parameters has shares of rounding alone: the size it
# is compared by is at least this part of the largest
LEAST = 0.01
Direction = tuple[str, int]  # a tensor, and the index of a motion


@dataclass(frozen=True)
class Check:
    """The outcome of a comparison of a batch with single examples.

    Attributes:
        axes: by position of a site its function and tensors, and where the examples are in its
            output; None where no axis is theirs.
        untold: why the shares of a tensor cannot be told by example, by name.
    """

    axes: Axes
    untold: dict[str, str]


def unchecked(why: str) -> Check:
    """Return the outcome where there is nothing to compare."""
    return Check([], {"": why})


def same_elements(
    values: Callable[[object], Values],
    batch: tuple[object, int],
    alone: Mapping[int, object],
    dtype: torch.dtype,
) -> bool:
    """Tell whether the elements of the loss of a batch run over its examples first: whether those of
    an example sum to what it has alone, and their weights as well.

    Args:
        values: returns the weighted values of a batch, and the weights.
        batch: the data, and the number of examples.
        alone: batches of one example, by its position in the batch.
        dtype: in which they are computed.
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
    """A point in a direction from another that is drawn at random and moves every tensor by as much
    as its own numbers; each tensor is computed when it is asked for, the same in every process.

    Args:
        point: the other one.
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
    """Records the sums along every axis that may be that of the examples."""

    def __init__(self, examples: int) -> None:
        self._examples = examples
        self.untold: dict[str, str] = {}
        self.signatures: dict[int, Signature] = {}
        self.sums: dict[int, dict[ExampleAxis, dict[Direction, Tensor]]] = {}

    def take(self, site: Site, source: str, index: int, products: Products) -> None:
        """Record the sums of one direction, (examples,) float64 for each axis."""
        self.signatures[site.position] = site.signature
        axes = self.sums.setdefault(site.position, {})
        for axis in possible_axes(products.shape, self._examples):
            sums = products.sums(axis, self._examples)
            of_axis = axes.setdefault(axis, {})
            of_axis[source, index] = of_axis.get((source, index), 0) + sums


class _Alone:
    """Records the sums over all of a site's output, and over the sizes of its entries."""

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
    """Return by how much, of the size of its terms, a sum may differ between a batch and one
    example alone.
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
        tensors: leaves of autograd's, by name.
        motions: the directions.
        values: returns the weighted values of a batch.
        batch: the data, and the number of examples.
        alone: batches of one example, by its position in the batch; not the first alone, which
            most axes agree on.
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
    """Return which tensors' shares are not those of single examples, and of which example."""
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
    """Tell whether examples have the same sums in a batch and alone, where both have any."""
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
