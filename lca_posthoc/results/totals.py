"""Totals per parameter, joined from the stored windows as they are read: to read a part of a tensor
costs only that part.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import xarray as xr
import zarr
from xarray.backends import BackendArray
from xarray.core import indexing

from ..numerics.schema import FIELDS, TOTALS, Totals, join_all
from .chunks import CheckedStore


class JoinedTotals(BackendArray):
    """The totals of one tensor over all windows, (total, *shape), float64, read when they are
    indexed.

    At most log₂ of the windows + 2 of them are in memory at a time, of the part that is read.
    """

    def __init__(self, store: CheckedStore, path: str) -> None:
        self._stored = zarr.open_array(store, path=path, mode="r", zarr_format=3)
        self.shape = (len(TOTALS), *self._stored.shape[2:])
        self.dtype = np.dtype("float64")

    def __getitem__(self, key: indexing.ExplicitIndexer) -> np.ndarray[Any, Any]:
        joined: np.ndarray[Any, Any] = indexing.explicit_indexing_adapter(
            key, self.shape, indexing.IndexingSupport.BASIC, self._read
        )
        return joined

    def _read(self, key: tuple[int | slice, ...]) -> np.ndarray[Any, Any]:
        names = TOTALS[key[0]]
        joined = join_all(
            lambda window: self._window(window, key[1:]), range(self._stored.shape[0])
        )
        return (
            joined[names] if isinstance(names, str) else np.stack([joined[name] for name in names])
        )

    def _window(self, window: int, inner: tuple[int | slice, ...]) -> Totals:
        return dict(
            zip(FIELDS, np.asarray(self._stored[(window, slice(None), *inner)]), strict=True)
        )


def joined_totals(store: CheckedStore, path: str, dims: tuple[str, ...]) -> xr.Variable:
    """Return the totals of one tensor as a lazy variable; `dims` are those of the tensor itself."""
    return xr.Variable(("total", *dims), indexing.LazilyIndexedArray(JoinedTotals(store, path)))
