"""Draw findings: one file per finding, of the same name. Nothing here computes, shows or saves.

Plots of one panel take and return `Axes`; plots of several take and return a `Figure`. By default
they make a pyplot figure.
"""

from ..base.declarations import declared_findings
from .blocks import blocks as blocks
from .candidates import candidates as candidates
from .causes import causes as causes
from .clusters import clusters as clusters
from .compare import compare as compare
from .curve import curve as curve
from .directions import directions as directions
from .distribution import distribution as distribution
from .examples import examples as examples
from .generalisation import generalisation as generalisation
from .helping import helping as helping
from .layers import layers as layers
from .microscope import film as film
from .microscope import microscope as microscope
from .oscillation import oscillation as oscillation
from .peaks import peaks as peaks
from .units import units as units

__all__ = sorted([*declared_findings(), "film"])
