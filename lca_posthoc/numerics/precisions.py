"""The precisions of forward and backward passes, and how far values in them may be apart."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Reference:
    """The precision that the error of a coarser one is measured against.

    Attributes:
        precision: its name.
        agree: as `Precision.agree`, where a batch and its parts are computed in it to tell a
            rounding of the coarser precision from a loss that does not add up.
    """

    precision: str
    agree: float


@dataclass(frozen=True, kw_only=True)
class Precision:
    """One precision; its bounds are relative.

    Attributes:
        dtype: the type of the parameters and of the data, under torch's name.
        reference: the precision its error is measured against; None for the highest.
        rounding: the bound on the rounding of one number.
        agree: the bound between two ways to compute one loss in one process, such as from a batch
            and from its parts.
        same_loss: the bound between a loss computed here and computed elsewhere, such as by another
            worker, or in another precision.
        refined: whether halving intervals mends more than the rounding of the losses at both ends
            spoils, so that a tolerance is of use.
        needs_gpu: whether only GPUs compute in it.
    """

    dtype: str
    reference: Reference | None
    rounding: float
    agree: float
    same_loss: float
    refined: bool = True
    needs_gpu: bool = False


PRECISIONS = {
    "float32": Precision(
        dtype="float32",
        reference=Reference(precision="float64", agree=1e-8),
        rounding=2.0**-24,
        agree=1e-4,
        same_loss=1e-4,
    ),
    "tf32": Precision(
        dtype="float32",
        reference=Reference(precision="float32", agree=1e-4),
        rounding=2.0**-11,
        agree=1e-2,
        same_loss=1e-2,
        needs_gpu=True,
    ),
    "bfloat16": Precision(
        dtype="float32",
        reference=Reference(precision="float32", agree=1e-4),
        rounding=2.0**-9,
        agree=1e-2,
        same_loss=5e-2,
        refined=False,
    ),
    "float64": Precision(
        dtype="float64",
        reference=None,
        rounding=2.0**-53,
        agree=1e-4,
        same_loss=1e-9,
    ),
}
