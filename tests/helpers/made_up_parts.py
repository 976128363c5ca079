"""The quadratic bowl with causes and directions whose every allocation is known in closed form."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import xarray as xr

from lca_posthoc import Run
from lca_posthoc.numerics.schema import CAUSES
from lca_posthoc.results import LossResults

from . import quadratic_bowl as bowl

Array = np.ndarray[Any, Any]
DIRECTIONS = 3
LABELS = ("_fc$1", "second", "third", *map(str, range(DIRECTIONS, bowl.SIZE)))


def gradient(group: int | None) -> Array:
    """The mean gradient along each segment, (segment, element), of a group or of all."""
    theta = bowl.path()
    middle = (
        np.average([bowl.middle(0), bowl.middle(1)], axis=0, weights=bowl.COUNTS)
        if group is None
        else bowl.middle(group)
    )
    return bowl.CURVATURE * ((theta[1:] + theta[:-1]) / 2 - middle)


def motion() -> Array:
    """Δθ, (segment, element)."""
    return np.diff(bowl.path(), axis=0)


def parts_of_motion(rest: float) -> Array:
    """The motion by cause, (cause, segment, element): random parts, of which `rest` times one is the
    rest of parameters; all that the buffer moved is rest.
    """
    random = np.random.default_rng(3).normal(size=(len(CAUSES), *motion().shape))
    random[-1] *= rest
    begin = bowl.offset(bowl.BUFFER)
    random[:, :, begin : begin + 3] = 0
    random[-1, :, begin : begin + 3] = motion()[:, begin : begin + 3]
    random[0] = motion() - random[1:].sum(0)
    return random * (motion() != 0)


def basis(seed: int = 5, count: int = DIRECTIONS) -> Array:
    """Orthonormal directions, (direction, element)."""
    random = np.random.default_rng(seed).normal(size=(bowl.SIZE, count))
    return np.linalg.qr(random)[0].T


def by_tensor(values: Array) -> Array:
    """Sums over the elements of each tensor, in place of the last axis."""
    starts = [bowl.offset(name) for name in bowl.SHAPES]
    return np.add.reduceat(values, starts, axis=-1)


def causes(results: LossResults, rest: float) -> xr.Dataset:
    """The dataset `LossResults.causes`."""
    groups = results.record.groups
    allocated = [
        by_tensor(parts_of_motion(rest) * gradient(group)).transpose(1, 0, 2)
        for group in (groups if groups is not None else [None])
    ]
    table = results.tensors
    dims = ("step", *(["group"] if groups is not None else []), "cause", "tensor")
    order = [list(bowl.SHAPES).index(str(name)) for name in table["tensor"].values]
    values = allocated[0] if groups is None else np.stack(allocated, axis=1)
    return xr.Dataset(
        {"allocated": (dims, values[..., order])},
        coords={"step": table["step"].values, "tensor": table["tensor"], "cause": list(CAUSES)},
    )


def along(results: LossResults, rows: Array) -> xr.Dataset:
    """The dataset `LossResults.along`, along some rows."""
    groups, moved = results.record.groups, motion()
    inside, remainder = list[Array](), list[Array]()
    for group in groups if groups is not None else [None]:
        slope = gradient(group)
        inside.append((moved @ rows.T) * (slope @ rows.T))
        remainder.append((moved * slope).sum(1) - inside[-1].sum(1))
    stacked = [of[0] if groups is None else np.stack(of, axis=1) for of in (inside, remainder)]
    group_dims = ["group"] if groups is not None else []
    distance = np.sqrt((moved**2).sum(1))
    projected = moved @ rows.T
    return xr.Dataset(
        {
            "allocated": (("step", *group_dims, "direction"), stacked[0]),
            "remainder": (("step", *group_dims), stacked[1]),
            "motion": (("step", "direction"), projected),
            "distance": ("step", distance),
            "captured": ("step", (projected**2).sum(1) / distance**2),
        },
        coords={"step": results.tensors["step"].values, "direction": list(LABELS[: len(rows)])},
    )


class OtherParts(LossResults):
    """A loss of the bowl with causes and directions."""

    def __init__(
        self, results: LossResults, *, rest: float = 1e-3, rows: Array | None = None
    ) -> None:
        settings: Any = {
            **results.manifest.settings,
            "signal": "train",
            "directions": {"directions": 3},
        }
        super().__init__(results.path, replace(results.manifest, settings=settings), results.name)
        self._rest, self._basis = rest, basis() if rows is None else rows

    @property
    def causes(self) -> xr.Dataset:
        return causes(self, self._rest)

    @property
    def along(self) -> xr.Dataset:
        return along(self, self._basis)


class OtherRun(Run):
    """The run of the bowl, each of its losses with causes and directions."""

    def __init__(self, run: Run, rest: float = 1e-3, rows: Array | None = None) -> None:
        super().__init__(run.path, run.manifest)
        self._rest, self._basis = rest, rows

    def __getitem__(self, loss: str) -> LossResults:
        return OtherParts(super().__getitem__(loss), rest=self._rest, rows=self._basis)
