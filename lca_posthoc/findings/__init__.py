"""Turn a run into small labelled results: one file per analysis."""

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
from .microscope import microscope as microscope
from .oscillation import oscillation as oscillation
from .peaks import peaks as peaks
from .summary import summary as summary
from .units import units as units

__all__ = sorted([*declared_findings(), "summary"])
