"""Read the allocations of single examples, or of single elements of the loss, in blocks that fit
into memory.

Such a loss is declared with `Loss(…, per="example")`. At any number of examples, segments and
tensors, this module holds at most `BLOCK // 4` stored numbers at a time, or one stored chunk where
that is larger.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np
import xarray as xr

from ..base.text import count
from ..errors import InputError
from ..results import LossResults
from .common import BLOCK, Numbers, label_of, moving_buffers, tables

Part: TypeAlias = "slice | Numbers"  # of the examples
_AT_ONCE = 2048  # examples of a block, where the stored chunks give no size


def tells_examples(results: LossResults) -> bool:
    """Tell whether a loss has results per example or element (`per=`)."""
    return results.record.per is not None


@dataclass(frozen=True, kw_only=True)
class ExampleReader:
    """Reads the examples of a loss, with allocations summed over layers.

    Attributes:
        table: the sums over examples, one row for each finished segment.
        data: as `LossResults.examples` returns it.
        per: its axis, "example" or "element".
        layers: the positions of the tensors of each layer.
        texts: descriptions of examples for readers, by number; the recorded `text` for others.
    """

    table: xr.Dataset
    data: xr.Dataset
    per: Literal["example", "element"]
    layers: Mapping[str, list[int]]
    texts: Mapping[int, str] | None

    @property
    def count(self) -> int:
        """Return the number of examples, or of elements."""
        return int(self.data.sizes[self.per])

    @property
    def segments(self) -> int:
        """Return the number of finished segments."""
        return int(self.data.sizes["step"])

    @property
    def membership(self) -> Numbers:
        """Return (tensor, layer), 1 where the tensor belongs to the layer."""
        matrix = np.zeros((self.data.sizes["tensor"], len(self.layers)))
        for column, members in enumerate(self.layers.values()):
            matrix[members, column] = 1
        return matrix

    def _lengths(self) -> tuple[int, int]:
        """Return how many segments and examples to read at once: whole stored chunks of `BLOCK //
        4` numbers together.
        """
        stored = self.data["allocated"].encoding.get("preferred_chunks", {})
        most = max(1, BLOCK // 4 // max(1, self.data.sizes["tensor"]))
        few, part = int(stored.get("step", 1)), int(stored.get(self.per, 1))
        wide = max(part, min(self.count, _AT_ONCE, most // few) // part * part)
        return max(few, most // wide // few * few), wide

    def blocks(self) -> Iterator[slice]:
        """Yield slices of examples, in their order."""
        wide = self._lengths()[1]
        for start in range(0, self.count, wide):
            yield slice(start, min(start + wide, self.count))

    def rows(self) -> Iterator[slice]:
        """Yield slices of segments, in their order."""
        tall = self._lengths()[0]
        for start in range(0, self.segments, tall):
            yield slice(start, min(start + tall, self.segments))

    def read(self, name: str, rows: slice, part: Part) -> Numbers:
        """Return (segment, example) float64 of a variable such as `loss_end`.

        Args:
            name: of the variable.
            rows: segments to read.
            part: examples to read.

        Raises:
            LCAError: if stored numbers are damaged.
        """
        picked = self.data[name].isel({"step": rows, self.per: part})
        values: Numbers = picked.transpose("step", self.per).values.astype(np.float64)
        return values

    def allocated(self, rows: slice, part: Part) -> Numbers:
        """Return (segment, example, layer) float64, in units of loss.

        Args:
            rows: segments to read.
            part: examples to read.

        Raises:
            LCAError: if stored numbers are damaged.
        """
        picked = self.data["allocated"].isel({"step": rows, self.per: part})
        stored = picked.transpose("step", self.per, "tensor").values
        summed: Numbers = stored.astype(np.float64) @ self.membership
        return summed

    def weights(self, part: Part) -> Numbers:
        """Return the weight of each example in the loss, on the first segment, (example,)."""
        weights: Numbers = self.read("weight", slice(0, 1), part)[0]
        return weights

    def coordinates(self, positions: Numbers, dim: str, prefix: str = "") -> dict[str, object]:
        """Return the coordinates of some examples along an axis `dim` of a finding.

        These are `example`, and where they exist, `index` (of an element in its target),
        `example_group` and `example_text`.

        Args:
            positions: along the axis of the data.
            dim: the axis.
            prefix: of each name, in place of "example_" where the name has that.
        """
        coords: dict[str, object] = {}
        before = prefix or "example_"
        names = {"example": f"{prefix}example", "index": f"{prefix}index"}
        names |= {"group": f"{before}group", "text": f"{before}text"}
        for name, called in names.items():
            if name in self.data.coords and self.per in self.data[name].dims:
                values = self.data[name].isel({self.per: positions}).values
                words = values.astype(str).astype(object) if name == "text" else values
                coords[called] = (dim, words)
        if self.texts is not None:
            numbers = self.data["example"].isel({self.per: positions}).values.tolist()
            shown = [str(self.texts.get(number, "")) for number in numbers]
            coords[names["text"]] = (dim, np.array(shown, dtype=object))
        return coords

    def sample(self, most: int, among: Numbers | None = None) -> Numbers:
        """Return at most `most` positions of examples: all, or one drawn from each of `most` stretches
        of nearly equal length. The seed is fixed. A fixed stride would pick the same places in every
        sequence of elements.

        Args:
            most: positions to return at most.
            among: the positions to draw from, in order; all by default.

        Raises:
            InputError: for fewer than one.
        """
        if most < 1:
            raise InputError(f"at least one example is needed, got {most}.")
        positions = np.arange(self.count) if among is None else among
        if len(positions) <= most:
            return positions
        edges = np.linspace(0, len(positions), most + 1).astype(int)
        drawn: Numbers = positions[np.random.default_rng(0).integers(edges[:-1], edges[1:])]
        return drawn

    def position(self, example: int, index: int | None = None) -> int:
        """Return the position along the data's axis of an example, or of an element of it.

        Args:
            example: its number.
            index: of an element in its target; None for an example.

        Raises:
            InputError: if there is none, or the loss has elements and `index` is missing.
        """
        numbers = self.data["example"].values
        fits = of_example = numbers == example
        if self.per == "element":
            if index is None:
                raise InputError(
                    f"this loss has results per element: write EXAMPLE:INDEX, such as {example}:0."
                )
            fits = fits & (self.data["index"].values == index)
        elif index is not None:
            raise InputError("this loss has results per example, not per element: write EXAMPLE.")
        if not fits.any():
            if of_example.any():  # an element is missing, not the example
                indices = self.data["index"].values[of_example]
                raise InputError(
                    f"example {example} has no element {index}; its elements are "
                    f"{example}:{indices.min()} to {example}:{indices.max()}."
                )
            raise InputError(
                f"the results have no {self.per} {example}{'' if index is None else f':{index}'}. "
                f"They have {count(self.count, self.per)}, of the numbers {numbers.min()} to "
                f"{numbers.max()}; `examples['example']` in Python lists them."
            )
        return int(np.flatnonzero(fits)[0])


def open_examples(
    results: LossResults, by: str | int = "module", texts: Mapping[int, str] | None = None
) -> ExampleReader:
    """Open the examples of a loss, to sum their allocations over layers.

    Buffers that moved are a layer of their own, as in `layers`.

    Args:
        results: one loss of a run.
        by: as of `layers`.
        texts: descriptions of examples by number, such as their label or their words.

    Raises:
        LCAError: if no segment is finished yet, or stored numbers are damaged.
        InputError: if the loss has no results per example or element, or for another `by`.
    """
    table, data = tables(results), results.examples
    buffers, layers = moving_buffers(table), dict[str, list[int]]()
    for position, name in enumerate(data["tensor"].values):
        layers.setdefault(label_of(str(name), by, buffers), []).append(position)
    per: Literal["example", "element"] = "element" if "element" in data.dims else "example"
    return ExampleReader(table=table, data=data, per=per, layers=layers, texts=texts)


def course(finding: xr.Dataset, change: xr.DataArray, allocated: xr.DataArray) -> xr.Dataset:
    """Return the data that figures draw of an example, or of a cluster, over the stretches of a
    finding.

    Args:
        finding: with the stretches.
        change: of the loss since the start, (step,).
        allocated: so far, (step, layer).
    """
    return xr.Dataset(
        {
            "change": ("step", change.values),
            "allocated": (("step", "layer"), allocated.transpose("stretch", "layer").values),
        },
        coords={
            "step": finding["stretch_start"].values,
            "step_end": ("step", finding["stretch_end"].values),
            "layer": finding["layer"].values,
        },
    )


def name_of_example(one: xr.Dataset, prefix: str) -> str:
    """Return the name of an example or an element, as `--example` takes it.

    Args:
        one: of a finding.
        prefix: of the coordinates `example` and `index`.
    """
    number = str(int(one[f"{prefix}example"]))
    index = f"{prefix}index"
    return f"{number}:{int(one[index])}" if index in one.coords else number
