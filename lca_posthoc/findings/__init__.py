"""From a run to small labelled results: one file per analysis."""

from .candidates import candidates
from .compare import compare
from .curve import curve
from .distribution import distribution
from .generalisation import generalisation
from .helping import helping
from .layers import layers
from .microscope import microscope
from .oscillation import oscillation
from .peaks import peaks
from .summary import summary
from .units import units

__all__ = [
    "candidates",
    "compare",
    "curve",
    "distribution",
    "generalisation",
    "helping",
    "layers",
    "microscope",
    "oscillation",
    "peaks",
    "summary",
    "units",
]
