"""Copy the moments of optimisers into memory beside an iterate."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from .staging import Layout, Stager
from .writer import Pool, Staged


class MomentStager:
    """Copy moments into staging memory, as a `Stager` does for a model's tensors.

    Moments may appear from one step to the next, when a tensor gets its first gradient. The larger
    set gets new memory, and the old memory is freed once it is written.
    """

    def __init__(self) -> None:
        self._pool: Pool | None = None
        self._stager: Stager | None = None

    def stage(self, moments: Mapping[str, Tensor]) -> Staged | None:
        """Copy the current moments; return None if there are none.

        Args:
            moments: name in the file → moment.

        Raises:
            InputError: if a file cannot hold one of them.
        """
        if not moments:
            return None
        if self._pool is None or self._stager is None or not self._pool.layout.fits(moments):
            layout = Layout(moments)
            if self._stager is not None:
                self._stager.wait()  # the copy must finish before its buffer on the device is freed
            self._pool, self._stager = Pool(layout), Stager(layout)
        staging = self._pool.take()
        try:
            self._stager.stage(moments, staging)
        except BaseException:
            self._pool.give_back(staging)
            raise
        return Staged(self._pool, staging)
