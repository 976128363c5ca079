"""The moments of optimisers, copied into memory beside an iterate."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .staging import Layout, Stager
from .writer import Pool, Staged


class MomentStager:
    """Copy moments into staging memory, as a `Stager` does a model's tensors.

    There may be more of them from one step to the next, where a tensor gets its first gradient:
    these have memory of their own, and the memory of those before goes as they are written.
    """

    def __init__(self) -> None:
        self._pool: Pool | None = None
        self._stager: Stager | None = None

    def stage(self, moments: Mapping[str, Tensor]) -> Staged | None:
        """Take the moments as they are now; None where there are none.

        Raises:
            InputError: where a file cannot hold one of them.
        """
        if not moments:
            return None
        if self._pool is None or self._stager is None or not self._pool.layout.fits(moments):
            layout = Layout(moments)
            if self._stager is not None:
                self._stager.wait()  # it is copied from memory on the device that goes now
            self._pool, self._stager = Pool(layout), Stager(layout)
        staging = self._pool.take()
        try:
            self._stager.stage(moments, staging)
        except BaseException:
            self._pool.give_back(staging)
            raise
        return Staged(self._pool, staging)
