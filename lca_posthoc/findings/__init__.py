"""From a run to small labelled results: one file per analysis."""

from .candidates import candidates
from .curve import curve
from .distribution import distribution
from .generalisation import generalisation
from .helping import helping
from .layers import layers
from .microscope import microscope
from .oscillation import oscillation
from .summary import summary
from .units import units

__all__ = [
    "candidates",
    "curve",
    "distribution",
    "generalisation",
    "helping",
    "layers",
    "microscope",
    "oscillation",
    "summary",
    "units",
]
