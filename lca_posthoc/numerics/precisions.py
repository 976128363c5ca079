"""Define the precisions of forward and backward passes, and how far results in them may differ."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, kw_only=True)
class Reference:
    """Name the precision against which the error of a coarser one is measured.

    Attributes:
        precision: its name.
        agree: bound like `Precision.agree` for computing a batch and its parts in it, which
            distinguishes rounding in the coarser precision from a loss that is not additive.
    """

    precision: str
    agree: float


@dataclass(frozen=True, kw_only=True)
class Precision:
    """Describe one precision; its bounds are relative.

    Attributes:
        dtype: type of the parameters and of the data, by torch's name.
        reference: precision against which its error is measured; None for the highest.
        rounding: bound on the rounding of one number.
        agree: bound between two ways to compute one loss in one process, such as from a batch and
            from its parts.
        same_loss: bound between losses computed in different places, such as by another worker or
            in another precision.
        refined: whether halving intervals reduces the error more than the rounding of the losses at
            both ends adds, so that a tolerance is useful.
        needs_gpu: whether only GPUs support it.
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
