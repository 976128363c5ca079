"""Merge totals per parameter from the stored windows on reading; reading a part of a tensor costs
only that part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import xarray as xr
import zarr
from xarray.backends import BackendArray
from xarray.core import indexing

from ..numerics.schema import TOTAL_FIELDS, TOTALS, Totals, join_all
from .chunks import CheckedStore


class StoredTotals:
    """The stored totals of one tensor, window by window.

    Args:
        store: of the loss.
        key: of the tensor in the store.
    """

    def __init__(self, store: CheckedStore, key: str) -> None:
        self._arrays = {
            part: zarr.open_array(store, path=f"{part}/{key}", mode="r", zarr_format=3)
            for part in TOTAL_FIELDS
        }

    @property
    def windows(self) -> int:
        """Return the number of windows."""
        return int(self._arrays["totals"].shape[0])

    @property
    def shape(self) -> tuple[int, ...]:
        """Return the shape of the tensor."""
        return self._arrays["totals"].shape[2:]

    def read(self, window: int, part: tuple[int | slice, ...]) -> Totals:
        """Return the totals of a part of the tensor over a window.

        Args:
            window: its number.
            part: an index or a slice for each axis.
        """
        fields: Totals = {}
        for name, (names, _) in TOTAL_FIELDS.items():
            stored = np.asarray(self._arrays[name][(window, slice(None), *part)])
            fields |= dict(zip(names, stored, strict=True))
        return fields


class JoinedTotals(BackendArray):
    """The totals of one tensor over all windows, (total, *shape), float64, read on indexing.

    At most two windows of the part are in memory at a time.

    Args:
        store: of the loss.
        key: of the tensor in the store.
        unit: of the sums, in units of loss.
        borders: see `schema.join_all`.
    """

    def __init__(self, store: CheckedStore, key: str, unit: float, borders: Sequence[bool]) -> None:
        self._stored, self._unit, self._borders = StoredTotals(store, key), unit, borders
        self.shape = (len(TOTALS), *self._stored.shape)
        self.dtype = np.dtype("float64")

    def __getitem__(self, key: indexing.ExplicitIndexer) -> np.ndarray[Any, Any]:
        joined: np.ndarray[Any, Any] = indexing.explicit_indexing_adapter(
            key, self.shape, indexing.IndexingSupport.BASIC, self._read
        )
        return joined

    def _read(self, key: tuple[int | slice, ...]) -> np.ndarray[Any, Any]:
        names = TOTALS[key[0]]
        windows = range(self._stored.windows)
        joined = join_all((self._stored.read(window, key[1:]) for window in windows), self._borders)
        if isinstance(names, str):
            return self._in_units_of_loss(names, joined)
        return np.stack([self._in_units_of_loss(name, joined) for name in names])

    def _in_units_of_loss(self, name: str, joined: Totals) -> np.ndarray[Any, Any]:
        values = np.asarray(joined[name], "float64")
        return values * self._unit if name == "allocated" else values


def joined_totals(
    store: CheckedStore, key: str, unit: float, dims: tuple[str, ...], borders: Sequence[bool]
) -> xr.Variable:
    """Return the totals of one tensor as a lazy variable.

    Args:
        store: of the loss.
        key: of the tensor in the store.
        unit: of the sums, in units of loss.
        dims: of the tensor itself.
        borders: between the windows, see `schema.join_all`.
    """
    joined = JoinedTotals(store, key, unit, borders)
    return xr.Variable(("total", *dims), indexing.LazilyIndexedArray(joined))
