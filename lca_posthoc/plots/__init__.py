"""From a finding to a figure: one file per finding, of the same name. Nothing here computes, shows
or saves.

Plots of one panel take and return `Axes`; plots of several take and return a `Figure`. Without one
they make a pyplot figure.
"""

from .candidates import candidates
from .compare import compare
from .curve import curve
from .distribution import distribution
from .generalisation import generalisation
from .helping import helping
from .layers import layers
from .microscope import film, microscope
from .oscillation import oscillation
from .peaks import peaks
from .units import units

__all__ = [
    "candidates",
    "compare",
    "curve",
    "distribution",
    "film",
    "generalisation",
    "helping",
    "layers",
    "microscope",
    "oscillation",
    "peaks",
    "units",
]
