"""Build the integration method of a run from its record."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from ..numerics.quadrature import RULES
from ..numerics.schema import in_units_of_loss
from ..results import LossRecord
from .requests import RunSettings

if TYPE_CHECKING:
    from ..numerics.allocation import Method


def method_of(
    settings: RunSettings, records: Mapping[str, LossRecord], never_refined: Iterable[str] = ()
) -> Method:
    """Return how to integrate some losses.

    Args:
        settings: of the run.
        records: of the losses, by name.
        never_refined: names of losses that stay at the rule's own level.
    """
    from ..numerics.allocation import Method

    return Method(
        rule=RULES[settings.rule],
        tolerance={
            name: in_units_of_loss(settings.tolerance, record.scale)
            for name, record in records.items()
        },
        allocation_tolerance={
            name: in_units_of_loss(settings.allocation_tolerance, record.scale)
            for name, record in records.items()
        },
        calibration={
            name: record.calibration
            for name, record in records.items()
            if record.calibration is not None
        },
        never_refined=frozenset(never_refined),
        per_example=frozenset(name for name, record in records.items() if record.per is not None),
    )
